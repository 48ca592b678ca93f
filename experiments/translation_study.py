"""What all parts of the translation study share: its options, its text, its runs."""

import dataclasses
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from experiments import translation_text as text
from experiments import translation_training as training
from experiments.common import Row, StudyConfig, keep, options_of
from experiments.translation_text import Pairs, Sentences, Vocabulary
from experiments.translation_training import Size, Training, Translator
from jaxtransfer import pretrained
from jaxtransfer.model import from_linen
from jaxtransfer.typing import Variables

LABELS, WORDS, SEQUENCES = "labels alone", "word-KD", "sequence-KD"
INTERPOLATED, OWN = "sequence interpolation", "GKD"
RICH = (LABELS, WORDS, SEQUENCES, INTERPOLATED, OWN)
ALONE, BEGUN = "few pairs alone", "begun with the rich pair"
TAUGHT, BOTH = "and sequence-KD", "begun so, and sequence-KD"
POOR = (ALONE, BEGUN, TAUGHT, BOTH)
VOCABULARY = "vocabulary.model"


@dataclasses.dataclass(frozen=True)
class Config(StudyConfig):
    """Options of the study."""

    dataset: Literal["multi30k", "invented"] = "multi30k"
    """Or "invented": words for digits, for trying out."""
    teacher: Size = Size(128, 4, 256, 3, 3, 0.1)
    """Of the large network."""
    student: Size = Size(64, 4, 128, 2, 1, 0.1)
    """Of the small ones."""
    vocabulary: int = 3000
    """Subwords of all languages together."""
    teacher_updates: int = 2400
    """Of the teacher of the rich pair."""
    mixed_updates: int = 800
    """More of them, on the rich and the poor pairs."""
    student_updates: int = 800
    """Of a student of the rich pair."""
    poor_updates: int = 500
    """Of a student of a poor pair."""
    tokens: int = 3072
    """Of a batch, of source or target with their padding."""
    learning_rate: float = 3e-3
    """The highest, of Adam; of what goes on from weights, a third of it."""
    poor_pairs: int = 2000
    """Sentences of a poor pair."""
    poor: tuple[str, ...] = ("cs", "fr")
    """Languages of the poor pairs; none leaves that part out."""
    rows: tuple[str, ...] = RICH
    """Students of the rich pair."""
    poor_rows: tuple[str, ...] = POOR
    """Students of a poor pair."""
    beams: int = 4
    """Of the search; greedy search is scored too."""
    penalty: float = 0.6
    """Exponent of the length in the search."""
    sentences: int = 0
    """Training sentences, the first ones; 0 is all."""
    test_sentences: int = 0
    """Test sentences, the first ones; 0 is all."""
    earlier: Path | None = None
    """Folder of an earlier run, whose subwords are used; its networks and what they
    translated are taken up where the options that they depend on are the same."""


class Corpus(NamedTuple):
    """All text of the study."""

    train: Sentences
    test: Sentences
    vocabulary: Vocabulary


def read(config: Config) -> Corpus:
    """Sentences and the subwords that are learned from those of training.

    Raises:
        ValueError: a language that there is not, fewer sentences than none, or subwords
            of an earlier run that were not learned from the same text.
    """
    for name in ("sentences", "test_sentences", "poor_pairs"):
        if getattr(config, name) < 0:
            raise ValueError(f"{name}: 0 or more, got {getattr(config, name)}")
    if config.dataset == "invented":
        train, test = text.invented(config.sentences), text.invented(20, seed=1)
    else:
        train = text.read("train", config.data_dir)
        test = text.read("test_2016_flickr", config.data_dir)
    if unknown := sorted(set(config.poor) - set(train) | set(config.poor) & {"en"}):
        raise ValueError(f"poor: no {unknown[0]!r}; choose among {sorted(train)}")
    train = _first(train, config.sentences)
    if config.earlier is not None:
        before = options_of(config.earlier)
        if strange := sorted(set(config.poor) - set(before["poor"])):
            raise ValueError(
                f"earlier: the subwords of {config.earlier} were learned without "
                f"{strange[0]!r}, whose letters they may lack; leave it out of --poor, "
                "or --earlier"
            )
        for name in ("dataset", "vocabulary"):
            if before[name] != (own := getattr(config, name)):
                raise ValueError(
                    f"earlier: the subwords of {config.earlier} are of {name} = "
                    f"{before[name]}, this run has {own}; give the same"
                )
        vocabulary = Vocabulary(_of_run(config.earlier, VOCABULARY).read_bytes())
    else:
        few = _first(train, config.poor_pairs)
        learned = train["en"] + train["de"]
        for language in config.poor:
            learned = learned + few[language]
        vocabulary = text.learn(learned, config.vocabulary)
    return Corpus(train, _first(test, config.test_sentences), vocabulary)


def _first(sentences: Sentences, count: int) -> Sentences:
    return {name: lines[: count or None] for name, lines in sentences.items()}


def pairs(corpus: Corpus, into: str, count: int = 0) -> Pairs:
    """Training pairs of English and a language, the first ones."""
    part = _first(corpus.train, count)
    words = corpus.vocabulary
    return Pairs(words.sources(part["en"], into), words.targets(part[into]))


def _file_name(name: str) -> str:
    return re.sub("[^a-z0-9]+", "_", name.lower())


def _of_run(folder: Path, name: str) -> Path:
    """A file that every run has."""
    if not (folder / name).is_file():
        raise FileNotFoundError(
            f"earlier: {folder} has no {name}; give the folder of a run of this study, "
            "RUN_DIR/distill_translation/TIME"
        )
    return folder / name


class Study:
    """What the parts of the study share."""

    def __init__(self, config: Config, corpus: Corpus, folder: Path) -> None:
        """Set up networks and searches."""
        self.config, self.corpus, self.folder = config, corpus, folder
        size = corpus.vocabulary.size
        self.teacher = training.network(config.teacher, size)
        self.student = training.network(config.student, size)
        self.searches = {
            network: (
                Translator(network, beams=config.beams, penalty=config.penalty),
                Translator(network, beams=1, penalty=0.0),  # greedy
            )
            for network in (self.teacher, self.student)
        }
        self.key = jax.random.key(config.seed)
        self.rows: list[Row] = []
        self.samples: dict[str, list[str]] = {}
        self.say: Callable[[str], None] = print
        self.before = options_of(config.earlier) if config.earlier else {}

    def recipe(self, updates: int, begun: bool = False) -> Training:
        """How long and how fast; more gently if there is something to lose."""
        rate = self.config.learning_rate / (3 if begun else 1)
        return Training(updates, tokens=self.config.tokens, learning_rate=rate)

    def stream(self, of: Pairs, seed: int) -> Iterator[Any]:
        """Batches of a seed."""
        return text.batches(of, self.config.tokens, (self.config.seed, seed))

    def report(self, name: str) -> Callable[[int, float], None]:
        """Write down how a training goes."""

        def write(number: int, loss: float) -> None:
            line = {"training": name, "update": number, "loss": loss}
            keep(self.folder, "losses.jsonl", **line)

        return write

    def earlier(self, file: str, options: Sequence[str]) -> Path | None:
        """A file of the earlier run, if it is there and was made with the same options.

        A teacher of more poor languages than are asked for will do.
        """
        if self.config.earlier is None or not (self.config.earlier / file).is_file():
            return None
        own = json.loads(json.dumps(dataclasses.asdict(self.config), default=str))
        for name in options:
            before = self.before.get(name)
            if name == "poor":
                same = set(own[name]) <= set(before or ())
            else:
                same = own[name] == before
            if not same:
                self.say(f"{file}: made again, {name} was {before}, is {own[name]}")
                return None
        return self.config.earlier / file

    def trained(
        self,
        network: Any,
        name: str,
        options: Sequence[str],
        train: Callable[[], Variables],
    ) -> Variables:
        """A network: from the folder of an earlier run, or trained.

        Args:
            network: whose variables they are.
            name: the file is named after it.
            options: what it depends on.
            train: trains it.
        """
        file = f"{_file_name(name)}.safetensors"
        if (earlier := self.earlier(file, options)) is not None:
            some = jax.ShapeDtypeStruct((1, 2), np.dtype("int32"))
            inputs = {"source": some, "target": some}
            variables = pretrained.load(earlier, from_linen(network), inputs)[0]
        else:
            variables = train()
        pretrained.save(self.folder / file, variables)
        return variables

    def searched(
        self,
        name: str,
        options: Sequence[str],
        teacher: Variables,
        sources: list[list[int]],
    ) -> list[list[list[int]]]:
        """What a teacher writes, the best sequence of each source first.

        Args:
            name: the file is named after it.
            options: what it depends on.
            teacher: the teacher's variables.
            sources: what it translates.
        """
        file = f"{_file_name(name)}.json"
        if (earlier := self.earlier(file, options)) is not None:
            try:
                beams = json.loads(earlier.read_text())
            except ValueError as error:
                raise ValueError(
                    f"earlier: {earlier} is damaged ({error}); remove it to have that "
                    "written again"
                ) from error
        else:
            beams = self.searches[self.teacher][0](teacher, sources)
        (self.folder / file).write_text(json.dumps(beams, separators=(",", ":")))
        self.say(f"{name}: {len(beams)} sentences")
        return beams

    def translate(self, network: Any, variables: Variables, into: str) -> Any:
        """Scores by measure on the test sentences, and the translations."""
        words, test = self.corpus.vocabulary, self.corpus.test
        sources = words.sources(test["en"], into)
        searched, greedy = (
            [words.text(beams[0]) for beams in search(variables, sources)]
            for search in self.searches[network]
        )
        bleu, chrf = training.score(searched, test[into])
        plain, _ = training.score(greedy, test[into])
        return {"BLEU": bleu, "chrF": chrf, "BLEU, greedy": plain}, searched

    def add(
        self, pair: str, method: str, found: list[dict[str, float]], baseline: Any
    ) -> None:
        """Rows of a method, one a measure."""
        for measure in found[0] if found else ():
            values = [scores[measure] for scores in found]
            self.rows.append(Row(f"{pair}, {measure}", method, values, baseline))

    def scored(
        self, network: Any, variables: Variables, into: str, name: str
    ) -> dict[str, float]:
        """Scores, told and kept with the first translations."""
        scores, lines = self.translate(network, variables, into)
        told = ", ".join(f"{key} {value:.2f}" for key, value in scores.items())
        self.say(f"en→{into}, {name}: {told}")
        keep(self.folder, "values.jsonl", pair=f"en→{into}", network=name, **scores)
        self.samples[f"en→{into}, {name}"] = lines[:5]
        return scores
