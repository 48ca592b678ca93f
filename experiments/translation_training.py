"""Training and scoring translators: one update for all rows of the study."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.translation_text import (
    BEGIN,
    END,
    LENGTHS,
    Pairs,
    TextBatch,
    Vocabulary,
    batches,
    bucket_of,
    padded,
)
from jaxtransfer import losses, nets, ops, parallel, prng
from jaxtransfer.methods import distill
from jaxtransfer.methods.distill import Term
from jaxtransfer.model import from_linen
from jaxtransfer.train import init_state, train_step
from jaxtransfer.typing import Objective, Variables


@dataclasses.dataclass(frozen=True)
class Size:
    """Of a Transformer."""

    width: int
    heads: int
    hidden: int
    encoder_layers: int
    decoder_layers: int
    dropout: float


@dataclasses.dataclass(frozen=True)
class Training:
    """How a translator is trained."""

    updates: int
    tokens: int = 3072
    learning_rate: float = 3e-3
    warmup: int = 200
    smoothing: float = 0.1


def network(size: Size, vocabulary: int) -> nets.Transformer:
    """The network of a size."""
    return nets.Transformer(vocabulary, **dataclasses.asdict(size))


def word_term(**options: Any) -> dict[str, Term]:
    """The teacher's next word at every place."""
    return {"words": Term(loss=losses.token_distillation, options=options)}


def lesson_of(
    student: nets.Transformer,
    teacher: nets.Transformer | None = None,
    *,
    smoothing: float = 0.0,
    terms: dict[str, Term] | None = None,
    task_weight: float = 1.0,
    own_words: float = 0.0,
) -> Objective:
    """The objective of a row.

    Args:
        student: what learns.
        teacher: what terms need.
        smoothing: of the labels.
        terms: of distillation.
        task_weight: of the labels.
        own_words: share of the batches that the student writes itself.
    """
    objective = distill.objective(
        from_linen(student),
        None if teacher is None else from_linen(teacher),
        terms=terms or {},
        task_weight=task_weight,
        loss=functools.partial(losses.cross_entropy, label_smoothing=smoothing),
    )
    if not own_words:
        return objective

    def write(variables: Variables, batch: Any, key: jax.Array) -> jax.Array:
        source, length = batch["inputs"]["source"], batch["labels"].shape[1]
        step, cache = nets.decoding(student, variables, source, length=length)
        begin = jnp.full(len(source), BEGIN, batch["labels"].dtype)
        return ops.sample_tokens(step, cache, begin, key=key, length=length, end=END)

    return distill.on_policy(objective, write, begin=BEGIN, share=own_words)


def start(
    key: jax.Array, student: nets.Transformer, variables: Variables | None = None
) -> Variables:
    """Variables of a fresh student, or of one to go on with."""
    if variables is None:
        some = jnp.ones((1, 2), int)
        model = from_linen(student)
        variables = jax.jit(model.init)(key, {"source": some, "target": some})
    # Copies, for a training's update gives its state's memory away.
    return distill.init(jax.tree.map(jnp.copy, variables))


def make_optimizer(training: Training) -> optax.GradientTransformation:
    """Adam, up and then down along a cosine."""
    schedule = optax.warmup_cosine_decay_schedule(
        0.0,
        training.learning_rate,
        min(training.warmup, training.updates // 4),
        training.updates,
    )
    return optax.chain(
        optax.clip_by_global_norm(1.0), optax.adam(schedule, b2=0.98, eps=1e-9)
    )


Trainer = Callable[..., Variables]


def make_trainer(objective: Objective, training: Training) -> Trainer:
    """A training, compiled once for all seeds.

    Returns:
        ``(key, begun, stream, teacher=None, report=None) -> Variables`` of the trained
        network. It raises FloatingPointError for a loss that is not finite.
    """
    optimizer = make_optimizer(training)
    step = train_step(objective, optimizer)

    def taught(state: Any, texts: TextBatch) -> Any:
        batch = distill.sequence_batch(texts.source, texts.target, begin=BEGIN)
        return step(state, batch)

    update = parallel.jit_step(taught)

    def train(
        key: jax.Array,
        begun: Variables,
        stream: Iterator[TextBatch],
        teacher: Variables | None = None,
        report: Callable[[int, float], None] | None = None,
    ) -> Variables:
        frozen = {} if teacher is None else {"teacher": teacher}
        state = init_state(prng.stream(key, "run"), begun, optimizer, frozen=frozen)
        for number in range(1, training.updates + 1):
            state, measured = update(state, next(stream))
            if report is not None and (number % 50 == 0 or number == training.updates):
                loss = float(measured["loss"].total / measured["loss"].count)
                if not np.isfinite(loss):
                    raise FloatingPointError(
                        f"the loss is not finite after {number} updates; take a "
                        "smaller --learning-rate"
                    )
                report(number, loss)
        return distill.of_student(state.params, state.model_state)

    return train


class Translator:
    """Beam search of one network for all its variables, compiled once a length."""

    def __init__(
        self, network: nets.Transformer, *, beams: int, penalty: float, rows: int = 128
    ) -> None:
        """Set up the search.

        Args:
            network: whose variables are given later.
            beams: sequences that are followed at a time; 1 without penalty is greedy.
            penalty: exponent of the length.
            rows: sentences at a time.
        """
        self.rows = rows

        @jax.jit
        def search(variables: Variables, source: jax.Array) -> ops.Beams:
            length = source.shape[1] + 12
            step, cache = nets.decoding(network, variables, source, length=length)
            begin = jnp.full(len(source), BEGIN, jnp.int32)
            return ops.beam_search(
                step,
                cache,
                begin,
                beams=beams,
                length=length,
                end=END,
                length_penalty=penalty,
            )

        self._search = search

    def __call__(
        self, variables: Variables, sources: Sequence[list[int]]
    ) -> list[list[list[int]]]:
        """Sequences of each source, the best first, in the order of the sources."""
        limits = [bucket_of(len(source)) or LENGTHS[-1] for source in sources]
        found: list[list[list[int]]] = [[] for _ in sources]
        for limit in sorted(set(limits)):
            members = [n for n, own in enumerate(limits) if own == limit]
            for first in range(0, len(members), self.rows):
                chosen = members[first : first + self.rows]
                full = chosen + chosen[:1] * (self.rows - len(chosen))
                # What is longer than the longest bucket is cut, but keeps its end.
                cut = [_cut(sources[n], limit) for n in full]
                beams = self._search(variables, jnp.asarray(padded(cut, limit)))
                tokens, lengths = np.asarray(beams.tokens), np.asarray(beams.lengths)
                for row, number in enumerate(chosen):
                    found[number] = [
                        tokens[row, beam, : lengths[row, beam]].tolist()
                        for beam in range(tokens.shape[1])
                    ]
        return found


def _cut(tokens: list[int], limit: int) -> list[int]:
    return tokens if len(tokens) <= limit else [*tokens[: limit - 1], END]


def score(hypotheses: Sequence[str], references: Sequence[str]) -> tuple[float, float]:
    """BLEU and chrF of sacrebleu, at its defaults."""
    import sacrebleu

    given = list(hypotheses), [list(references)]
    return sacrebleu.corpus_bleu(*given).score, sacrebleu.corpus_chrf(*given).score


def likest(
    beams: Iterable[Sequence[list[int]]],
    references: Sequence[str],
    vocabulary: Vocabulary,
) -> list[list[int]]:
    """Of each beam the sequence of highest sentence BLEU to its reference."""
    import sacrebleu

    chosen = []
    for sequences, reference in zip(beams, references, strict=True):
        scores = [
            sacrebleu.sentence_bleu(vocabulary.text(tokens), [reference]).score
            for tokens in sequences
        ]
        chosen.append(sequences[int(np.argmax(scores))])
    return chosen


__all__ = [
    "Pairs",
    "Size",
    "Training",
    "Translator",
    "batches",
    "lesson_of",
    "likest",
    "make_trainer",
    "network",
    "score",
    "start",
    "word_term",
]
