import dataclasses
import itertools
import json

import jax
import numpy as np
import pytest

from experiments import distill_translation as study
from experiments import translation_study as parts
from experiments import translation_text as text
from experiments import translation_training as training

pytest.importorskip("sentencepiece")
pytest.importorskip("sacrebleu")

SMOKE = study.PRESETS["smoke"]


@pytest.fixture(scope="module")
def corpus():
    return parts.read(SMOKE)


def test_smoke_writes_tables_networks_and_samples(tmp_path):
    """Networks of an earlier run are taken up, and then score the same."""
    config = dataclasses.replace(
        SMOKE, run_dir=tmp_path / "a", rows=(study.LABELS, study.OWN), seeds=1
    )
    found = study.main(config)
    (file,) = tmp_path.rglob("results.json")
    rows = json.loads(file.read_text())["rows"]
    assert {row["method"] for row in rows} == {study.LABELS, study.OWN, *study.POOR}
    samples = json.loads((file.parent / "samples.json").read_text())["samples"]
    assert len(samples["source"]) == len(samples["en→de, GKD, seed 0"]) == 5
    (file.parent / "en_de_gkd_seed_0.safetensors").unlink()
    again = dataclasses.replace(config, run_dir=tmp_path / "b", earlier=file.parent)
    repeated = study.main(again)
    assert repeated["teachers"] == found["teachers"]
    assert repeated["rows"] == found["rows"]
    (log,) = (tmp_path / "b").rglob("losses.jsonl")
    assert {json.loads(line)["training"] for line in log.open()} == {"GKD, seed 0"}


def test_networks_of_other_options_are_trained_again(tmp_path, capsys):
    """A student of other updates is; what it learns from is not, nor searched again."""
    config = dataclasses.replace(
        SMOKE,
        run_dir=tmp_path / "a",
        rows=(study.LABELS,),
        poor_rows=(study.TAUGHT,),
        seeds=1,
    )
    found = study.main(config)
    assert {row.method for row in found["rows"]} == {study.LABELS, study.TAUGHT}
    (file,) = tmp_path.rglob("en_cs_translated.json")
    beams = json.loads(file.read_text())
    file.write_text(json.dumps(beams[:1] * len(beams)))
    again = dataclasses.replace(
        config, run_dir=tmp_path / "b", earlier=file.parent, poor_updates=3
    )
    study.main(again)
    told = " ".join(capsys.readouterr().err.split())
    assert "poor_updates was 2, is 3" in told
    (log,) = (tmp_path / "b").rglob("losses.jsonl")
    trained = {json.loads(line)["training"] for line in log.open()}
    assert trained == {"en→cs, and sequence-KD, seed 0"}
    (kept,) = (tmp_path / "b").rglob("en_cs_translated.json")
    assert kept.read_text() == file.read_text().replace(" ", "")


def test_text_survives_the_vocabulary(corpus):
    words, sentences = corpus.vocabulary, corpus.test["de"]
    for tokens, sentence in zip(words.targets(sentences), sentences, strict=True):
        assert tokens[-1] == text.END and words.text(tokens) == sentence
        assert words.text([*tokens, 9, 9]) == sentence
    first = {words.sources(sentences, into)[0][0] for into in ("de", "fr", "cs")}
    assert len(first) == 3 and text.UNKNOWN not in first


def test_batches_hold_every_pair_and_follow_the_seed(corpus):
    given = parts.pairs(corpus, "de")
    some = text.batches(given, 128, (0, 1))
    seen = set()
    for batch in itertools.islice(some, 12):
        assert batch.source.shape == batch.target.shape
        assert batch.source.shape[1] in text.LENGTHS
        for source, target in zip(*batch, strict=True):
            pair = tuple(source[source != 0]), tuple(target[target != 0])
            seen.add(pair)
    expected = set(
        zip(map(tuple, given.sources), map(tuple, given.targets), strict=True)
    )
    assert seen == expected
    again = next(text.batches(given, 128, (0, 1)))
    other = next(text.batches(given, 128, (0, 2)))
    np.testing.assert_array_equal(
        again.source, next(text.batches(given, 128, (0, 1)))[0]
    )
    assert not np.array_equal(again.source, other.source)


def test_translations_come_in_the_order_of_the_sources(corpus):
    """Buckets and batches don't show; a source that is too long is cut."""
    network = training.network(SMOKE.student, corpus.vocabulary.size)
    key = jax.random.key(0)
    variables = training.start(key, network)
    variables = parts.Variables(variables.params["student"], {})
    sources = corpus.vocabulary.sources(corpus.test["en"][:3], "de")
    long = [[9] * 60 + [text.END], *sources, [9] * 20 + [text.END]]
    search = training.Translator(network, beams=2, penalty=0.6, rows=2)
    found = search(variables, long)
    assert [len(beams) for beams in found] == [2] * 5
    for number, source in enumerate(sources):
        assert search(variables, [source])[0] == found[number + 1]


def test_of_a_beam_the_likest_is_chosen(corpus):
    words, lines = corpus.vocabulary, corpus.test["de"][:2]
    right = words.targets(lines)
    beams = [[right[1], right[0]], [right[1], right[0]]]
    assert training.likest(beams, lines, words) == right


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"poor": ("cs", "fr")}, "earlier: the subwords .* without 'fr'"),
        ({"vocabulary": 64}, "of vocabulary = 48, this run has 64"),
        ({"poor": ("xx",), "earlier": None}, "poor: no 'xx'; choose among"),
        ({"sentences": -5, "earlier": None}, "sentences: 0 or more, got -5"),
    ],
)
def test_text_that_an_earlier_run_did_not_have(tmp_path, changed, message):
    before = {"poor": ["cs"], "vocabulary": 48, "dataset": "invented"}
    (tmp_path / "config.json").write_text(json.dumps({"config": before}))
    config = dataclasses.replace(SMOKE, poor=("cs",), vocabulary=48, earlier=tmp_path)
    with pytest.raises(ValueError, match=message):
        parts.read(dataclasses.replace(config, **changed))


@pytest.mark.parametrize(
    "rows", [("magic",), (), (study.WORDS, study.LABELS, study.OWN)]
)
def test_rows_that_make_no_sense(tmp_path, rows):
    config = dataclasses.replace(SMOKE, run_dir=tmp_path, rows=rows)
    with pytest.raises(ValueError, match="rows:"):
        study.main(config)
    config = dataclasses.replace(SMOKE, run_dir=tmp_path, poor_rows=("magic",))
    with pytest.raises(ValueError, match="poor_rows:"):
        study.main(config)
    config = dataclasses.replace(SMOKE, run_dir=tmp_path, earlier=tmp_path)
    with pytest.raises(FileNotFoundError, match="earlier: .* give the folder of a run"):
        study.main(config)
    assert not list(tmp_path.iterdir())
