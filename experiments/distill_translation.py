"""Translation distilled: into a small student, and from a rich pair to poor ones.

The rich pair: a teacher learns English to German from all sentences of Multi30k; small
students learn it from the labels, from the teacher's next word (word-KD), from its
translations (sequence-KD), from those of its beam that are most like the label
(interpolation), or from its opinion of their own words (GKD).

The poor pairs: there are few sentences of English to Czech and to French. A small
student learns from them alone; from them, having begun as a student of the rich pair;
or from them and the translations of the other English sentences by a large one, which
has learned the rich pair and both poor ones. Scores: sacrebleu on test_2016_flickr,
after the last update.
"""

import functools
import json
import time
from typing import Any

from experiments import translation_training as training
from experiments.common import command_line, progress, show, start_run
from experiments.translation_study import (
    ALONE,
    BEGUN,
    BOTH,
    INTERPOLATED,
    LABELS,
    OWN,
    POOR,
    RICH,
    SEQUENCES,
    TAUGHT,
    VOCABULARY,
    WORDS,
    Config,
    Study,
    pairs,
    read,
)
from experiments.translation_text import Pairs
from experiments.translation_training import Size
from jaxtransfer import prng
from jaxtransfer.typing import Variables

# What has to be the same for a network of an earlier run to be taken up.
OF_TEACHER = (
    *("dataset", "seed", "sentences", "tokens", "learning_rate"),
    *("teacher", "teacher_updates"),
)
OF_MIXED = (*OF_TEACHER, "mixed_updates", "poor_pairs", "poor")
OF_RICH = (*OF_TEACHER, "student", "student_updates", "beams", "penalty")
OF_POOR = (*OF_MIXED, *OF_RICH, "rows", "poor_updates")

PRESETS = {
    "smoke": Config(
        dataset="invented",
        teacher=Size(16, 2, 16, 1, 1, 0.0),
        student=Size(8, 2, 16, 1, 1, 0.0),
        vocabulary=120,
        teacher_updates=3,
        mixed_updates=2,
        student_updates=2,
        poor_updates=2,
        tokens=128,
        poor_pairs=20,
        poor=("cs",),
        beams=2,
        sentences=60,
        test_sentences=6,
        seeds=2,
    ),
    "cpu": Config(),
    "paper": Config(
        teacher=Size(256, 4, 1024, 6, 6, 0.3),
        student=Size(128, 4, 256, 2, 2, 0.1),
        vocabulary=8000,
        teacher_updates=8000,
        mixed_updates=4000,
        student_updates=8000,
        poor_updates=3000,
        tokens=8192,
        beams=5,
        seeds=5,
    ),
}


def rich_teacher(study: Study) -> Variables:
    """The teacher of the rich pair."""
    recipe = study.recipe(study.config.teacher_updates)
    lesson = training.lesson_of(study.teacher, smoothing=recipe.smoothing)

    def train() -> Variables:
        return training.make_trainer(lesson, recipe)(
            prng.stream(study.key, "teacher"),
            training.start(prng.stream(study.key, "teacher"), study.teacher),
            study.stream(pairs(study.corpus, "de"), 1000),
            report=study.report("teacher"),
        )

    return study.trained(study.teacher, "teacher", OF_TEACHER, train)


def mixed_teacher(study: Study, begun: Variables) -> Variables:
    """The teacher of the rich and the poor pairs, that goes on from the rich one's."""
    config, corpus = study.config, study.corpus
    recipe = study.recipe(config.mixed_updates, begun=True)
    lesson = training.lesson_of(study.teacher, smoothing=recipe.smoothing)
    together = pairs(corpus, "de")
    few = [pairs(corpus, language, config.poor_pairs) for language in config.poor]
    # As many sentences of each language.
    times = max(1, len(together.sources) // max(1, config.poor_pairs))
    for some in few:
        together = together + Pairs(some.sources * times, some.targets * times)

    def train() -> Variables:
        return training.make_trainer(lesson, recipe)(
            prng.stream(study.key, "mixed teacher"),
            training.start(study.key, study.teacher, begun),
            study.stream(together, 1001),
            report=study.report("mixed teacher"),
        )

    return study.trained(study.teacher, "mixed teacher", OF_MIXED, train)


def rich(study: Study, teacher: Variables) -> list[Variables]:
    """Students of the rich pair; those of word-KD, or of the first row, come back."""
    config, corpus = study.config, study.corpus
    recipe = study.recipe(config.student_updates)
    own_recipe = study.recipe(max(1, config.student_updates // 4), begun=True)
    of_labels = pairs(corpus, "de")
    lessons = {LABELS: of_labels, WORDS: of_labels, OWN: of_labels}
    if {SEQUENCES, INTERPOLATED} & set(config.rows):
        beams = study.searched("en de translated", OF_RICH, teacher, of_labels.sources)
        best = [sequences[0] for sequences in beams]
        lessons[SEQUENCES] = Pairs(of_labels.sources, best)
        if INTERPOLATED in config.rows:
            chosen = training.likest(beams, corpus.train["de"], corpus.vocabulary)
            lessons[INTERPOLATED] = Pairs(of_labels.sources, chosen)
    hard = training.make_trainer(
        training.lesson_of(study.student, smoothing=recipe.smoothing), recipe
    )
    both = study.student, study.teacher
    trainers = {
        LABELS: hard,
        SEQUENCES: hard,
        INTERPOLATED: hard,
        WORDS: training.make_trainer(
            training.lesson_of(*both, terms=training.word_term(), task_weight=0.5),
            recipe,
        ),
        # From the students of the labels: their own words must be words.
        OWN: training.make_trainer(
            training.lesson_of(
                *both,
                terms=training.word_term(divergence="jensen_shannon"),
                task_weight=0.0,
                own_words=0.5,
            ),
            own_recipe,
        ),
    }
    trained: dict[str, list[Variables]] = {}
    for method in config.rows:
        found, kept = [], []
        for seed in range(config.seeds):
            key = prng.stream(study.key, f"student {seed}")
            # Whatever begins with other students begins with those of the same seed.
            before = trained[LABELS][seed] if method == OWN else None
            name = f"{method}, seed {seed}"
            train = functools.partial(
                trainers[method],
                key,
                training.start(key, study.student, before),
                study.stream(lessons[method], seed),
                teacher if method in (WORDS, OWN) else None,
                study.report(name),
            )
            variables = study.trained(study.student, f"en de {name}", OF_RICH, train)
            kept.append(variables)
            found.append(study.scored(study.student, variables, "de", name))
        trained[method] = kept
        compared = method != LABELS and LABELS in config.rows
        study.add("en→de", method, found, LABELS if compared else None)
    return trained.get(WORDS, trained[config.rows[0]])


def poor(study: Study, into: str, mixed: Variables, begun: list[Variables]) -> None:
    """Students of a poor pair."""
    config, corpus = study.config, study.corpus
    few = pairs(corpus, into, config.poor_pairs)
    lessons = {ALONE: few, BEGUN: few}
    if {TAUGHT, BOTH} & set(config.poor_rows):
        sources = corpus.vocabulary.sources(corpus.train["en"], into)
        sources = sources[config.poor_pairs :]
        beams = study.searched(
            f"en {into} translated", (*OF_MIXED, "beams", "penalty"), mixed, sources
        )
        written = Pairs(sources, [own[0] for own in beams])
        # Half of what is read is labelled.
        times = max(1, len(sources) // max(1, len(few.sources)))
        enriched = written + Pairs(few.sources * times, few.targets * times)
        lessons |= {TAUGHT: enriched, BOTH: enriched}
    fresh, gentle = (
        study.recipe(config.poor_updates, begun=begun) for begun in (False, True)
    )
    lesson = training.lesson_of(study.student, smoothing=fresh.smoothing)
    trainers = {
        False: training.make_trainer(lesson, fresh),
        True: training.make_trainer(lesson, gentle),
    }
    for method in config.poor_rows:
        found = []
        for seed in range(config.seeds):
            key = prng.stream(study.key, f"{into} {seed}")
            before = begun[seed] if method in (BEGUN, BOTH) else None
            name = f"{method}, seed {seed}"
            train = functools.partial(
                trainers[before is not None],
                key,
                training.start(key, study.student, before),
                study.stream(lessons[method], seed),
                report=study.report(f"en→{into}, {name}"),
            )
            variables = study.trained(
                study.student, f"en {into} {name}", OF_POOR, train
            )
            found.append(study.scored(study.student, variables, into, name))
        compared = method != ALONE and ALONE in config.poor_rows
        study.add(f"en→{into}", method, found, ALONE if compared else None)


def main(config: Config) -> dict[str, Any]:
    """Run the study.

    Returns:
        ``{"rows": ..., "teachers": scores by name, "samples": ...}``.

    Raises:
        ValueError: an unknown row, or a row that another one must come before.
        FileNotFoundError: the data set is not prepared, or the folder of ``earlier``
            has no subwords or options.
    """
    for option, known in (("rows", RICH), ("poor_rows", POOR)):
        if unknown := sorted(set(getattr(config, option)) - set(known)):
            raise ValueError(f"{option}: no {unknown[0]!r}; choose among {list(known)}")
    if not config.rows or (OWN in config.rows and config.rows[0] != LABELS):
        raise ValueError(
            f"rows: got {config.rows}; {LABELS!r} must come first, as {OWN!r} goes on "
            "from it"
        )
    corpus = read(config)
    folder = start_run("distill_translation", config)
    (folder / VOCABULARY).write_bytes(corpus.vocabulary.model)
    started = time.perf_counter()
    study = Study(config, corpus, folder)
    teachers = {}
    with progress() as display:
        bar = display.add_task("translation", total=3 + len(config.poor))
        study.say = display.console.print

        def done(what: str) -> None:
            display.update(bar, advance=1, description=what)

        teacher = rich_teacher(study)
        teachers["en→de"] = study.scored(study.teacher, teacher, "de", "teacher")
        done("students of the rich pair")
        begun = rich(study, teacher)
        done("mixed teacher")
        if config.poor:
            mixed = mixed_teacher(study, teacher)
            for into in ("de", *config.poor):
                teachers[f"mixed, en→{into}"] = study.scored(
                    study.teacher, mixed, into, "mixed teacher"
                )
            done("students of the poor pairs")
            for into in config.poor:
                poor(study, into, mixed, begun)
                done(f"students of en→{into}")
    samples = {"source": corpus.test["en"][:5], **study.samples}
    for into in ("de", *config.poor):
        samples[f"en→{into}, reference"] = corpus.test[into][:5]
    written = json.dumps(
        {"teachers": teachers, "samples": samples}, indent=2, ensure_ascii=False
    )
    (folder / "samples.json").write_text(written + "\n")
    show(
        "Multi30k: translation distilled",
        study.rows,
        folder,
        unit="score",
        started=started,
    )
    return {"rows": study.rows, "teachers": teachers, "samples": samples}


if __name__ == "__main__":
    command_line(main, PRESETS)
