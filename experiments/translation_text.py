"""Text for the translation study: sentences, subwords, batches of like length."""

import dataclasses
import io
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from jaxtransfer import data

PADDING, BEGIN, END, UNKNOWN = 0, 1, 2, 3
LENGTHS = (16, 22, 30, 44)
"""Lengths that batches have; a sentence of more tokens is left out of training."""

Sentences = dict[str, list[str]]


def read(split: str, data_dir: str | None) -> Sentences:
    """Sentences of a split of Multi30k by language, in one order."""
    source = data.load("multi30k", split, data_dir=data_dir)
    examples = [source[number] for number in range(len(source))]
    return {
        language: [example[language].item().decode() for example in examples]
        for language in ("en", "de", "fr", "cs")
    }


def invented(count: int, *, seed: int = 0) -> Sentences:
    """Sentences in no language, for trying out: digits, spelt in four ways."""
    generator = np.random.default_rng((count, seed))
    ways = {
        "en": "zero one two three four five six seven eight nine",
        "de": "null eins zwei drei vier sechs sieben acht neun zehn",
        "fr": "nul un deux trois quatre cinq six sept huit neuf",
        "cs": "nula jedna dva tri ctyri pet sest sedm osm devet",
    }
    numbers = [
        generator.integers(0, 10, generator.integers(2, 6)) for _ in range(count)
    ]
    return {
        language: [" ".join(words.split()[n] for n in each) for each in numbers]
        for language, words in ways.items()
    }


class Vocabulary:
    """Subwords of all languages.

    A source begins with the language that it is to be translated into.
    """

    def __init__(self, model: bytes) -> None:
        """Of a model of sentencepiece, such as of :func:`learn`."""
        import sentencepiece

        self.model = model
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.size = self._processor.get_piece_size()

    def sources(self, sentences: Sequence[str], into: str) -> list[list[int]]:
        """Tokens of sentences to be translated into a language, with the end."""
        tag = self._processor.piece_to_id(f"<{into}>")
        return [[tag, *ids, END] for ids in self._processor.encode(list(sentences))]

    def targets(self, sentences: Sequence[str]) -> list[list[int]]:
        """Tokens of sentences, with the end."""
        return [[*ids, END] for ids in self._processor.encode(list(sentences))]

    def text(self, tokens: Sequence[int]) -> str:
        """The sentence of tokens, up to the end."""
        ids = [int(token) for token in tokens]
        ids = ids[: ids.index(END)] if END in ids else ids
        return self._processor.decode([n for n in ids if n > UNKNOWN])


def learn(sentences: Sequence[str], size: int) -> Vocabulary:
    """Subwords by byte-pair encoding of sentences of all languages.

    Args:
        sentences: to learn from.
        size: how many subwords; fewer if there is too little text.
    """
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        vocab_size=size,
        model_type="bpe",
        character_coverage=1.0,
        hard_vocab_limit=False,
        pad_id=PADDING,
        bos_id=BEGIN,
        eos_id=END,
        unk_id=UNKNOWN,
        user_defined_symbols=["<de>", "<fr>", "<cs>"],
        num_threads=1,
        minloglevel=2,
    )
    return Vocabulary(model.getvalue())


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Sources and targets as tokens."""

    sources: list[list[int]]
    targets: list[list[int]]

    def __add__(self, other: "Pairs") -> "Pairs":
        return Pairs(self.sources + other.sources, self.targets + other.targets)


class TextBatch(NamedTuple):
    """Tokens of one shape, with padding behind them."""

    source: np.ndarray
    target: np.ndarray


def padded(sequences: Sequence[Sequence[int]], length: int) -> np.ndarray:
    """Tokens ``[sequences, length]``."""
    filled = np.full((len(sequences), length), PADDING, np.int32)
    for row, tokens in zip(filled, sequences, strict=True):
        row[: len(tokens)] = tokens
    return filled


def bucket_of(length: int) -> int | None:
    """The least of the lengths that holds so many tokens."""
    return next((limit for limit in LENGTHS if length <= limit), None)


def batches(pairs: Pairs, tokens: int, seed: tuple[int, ...]) -> Iterator[TextBatch]:
    """Batches without end, in an order that only the seed decides.

    Args:
        pairs: the sentences; of one bucket a batch, shuffled anew each time through.
        tokens: of a batch, of source or target with their padding.
        seed: of the order.
    """
    lengths = [
        bucket_of(max(len(source), len(target)))
        for source, target in zip(pairs.sources, pairs.targets, strict=True)
    ]
    members = {
        limit: np.flatnonzero([length == limit for length in lengths])
        for limit in LENGTHS
    }
    generator = np.random.default_rng(seed)
    while True:
        through = []
        for limit, numbers in members.items():
            if not len(numbers):
                continue
            rows = max(1, tokens // limit)
            # The last batch is filled up with others of its length.
            missing = -len(numbers) % rows
            more = generator.choice(numbers, missing)
            order = np.concatenate([generator.permutation(numbers), more])
            through += [(limit, part) for part in order.reshape(-1, rows)]
        for place in generator.permutation(len(through)):
            limit, rows = through[place]
            yield TextBatch(
                padded([pairs.sources[n] for n in rows], limit),
                padded([pairs.targets[n] for n in rows], limit),
            )
