"""The conventions of public functions of arrays, enforced on all of them."""

import doctest
import inspect
import re

import pytest

from jaxtransfer import losses, ops, scores

PUBLIC = {
    f"{module.__name__.rpartition('.')[2]}.{name}": (module, getattr(module, name))
    for module in (losses, ops, scores)
    for name in module.__all__
    if not inspect.isclass(getattr(module, name))
}
# Names a first argument may have: data, predictions, parameters or, for what takes
# no array, the function or the progress that it maps.
DATA = re.compile(
    r"(\w+_)?(logits|features|maps|embeddings|layers|attention|hidden|values|losses)"
    r"|scale|predictions|probabilities|source|params|state|classes|inputs"
    r"|x|fn|progress|step|key|tree"
)
# Plain arithmetic, of no paper. All others say which paper and where in it.
OF_NO_PAPER = {
    "losses.accuracy",
    "losses.domain_accuracy",
    "losses.l2",
    "losses.mean",
    "losses.mean_squared_error",
    "scores.choose",
    "scores.oracle_target_accuracy",
    "scores.source_accuracy",
}

every = pytest.mark.parametrize(
    ("module", "function"), PUBLIC.values(), ids=PUBLIC.keys()
)


def _sections(function):
    return re.split(r"\n\n?(?=\w[\w ]*:\n)", inspect.getdoc(function))


@pytest.mark.parametrize(
    "module", [losses, ops, scores], ids=["losses", "ops", "scores"]
)
def test_all_is_sorted_and_leaves_nothing_public_out(module):
    public = {
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }
    assert module.__all__ == sorted(public)


@every
def test_docstring_says_what_it_takes_and_returns(module, function):
    summary, *rest = inspect.getdoc(function).splitlines()
    assert summary.endswith(".") and len(summary) <= 84 and rest[0] == ""
    titles = [part.partition(":\n")[0] for part in _sections(function)[1:]]
    order = ["Args", "Returns", "Raises", "Example", "Reference"]
    assert [t for t in order if t in titles] == titles
    assert {"Args", "Returns", "Example"} <= set(titles)
    # `make doctest` runs it.
    assert doctest.DocTestParser().get_examples(inspect.getdoc(function))
    arguments = next(p for p in _sections(function) if p.startswith("Args:"))
    described = re.findall(r"^    \*{0,2}(\w+): ", arguments, flags=re.MULTILINE)
    assert described == list(inspect.signature(function).parameters)


@every
def test_raises_section_where_it_raises(module, function):
    source = inspect.getsource(inspect.unwrap(function))
    if "raise ValueError" in source:
        assert "\nRaises:\n    ValueError:" in inspect.getdoc(function)


OF_PAPERS = {name for name in PUBLIC if not name.startswith("ops.")} - OF_NO_PAPER


@pytest.mark.parametrize("name", sorted({*OF_PAPERS, "ops.dann"}))
def test_reference_names_the_paper_and_the_place(name):
    reference = inspect.getdoc(PUBLIC[name][1]).partition("\nReference:\n")[2]
    assert re.search(r'".+?"'.replace(".", r"[\s\S]"), reference), "no title"
    assert re.search(r"\b(19|20)\d\d\b", reference), "no year"
    place = r"\b(eqs?\.|sec\.) \d|authors'\s+code"
    assert re.search(place, reference), "no equation, section or authors' code"


@every
def test_data_first_and_defaults_by_keyword(module, function):
    parameters = list(inspect.signature(function).parameters.values())
    assert DATA.fullmatch(parameters[0].name)
    for parameter in parameters:
        assert parameter.annotation is not inspect.Parameter.empty
        has_default = parameter.default is not inspect.Parameter.empty
        assert has_default == (parameter.kind is parameter.KEYWORD_ONLY), parameter
    masks = [p for p in parameters if p.name == "where" or p.name.endswith("_where")]
    assert all(p.default is None for p in masks)


FUNCTIONS = {name.partition(".")[2] for name in PUBLIC if name.startswith("losses.")}
# Of parameters, of values that were measured before, or what makes a state.
WITHOUT_MASK = {
    "channel_attention",
    "class_queue",
    "contrastive_memory",
    "elastic_weight_consolidation",
    "init_synaptic_intelligence",
    "l1_sp",
    "l2",
    "l2_sp",
    "neighbor_bank",
    "overhaul_margin",
    "synaptic_importance",
    "uniform_layers",
    "update_synaptic_intelligence",
}


@pytest.mark.parametrize("name", sorted(FUNCTIONS - WITHOUT_MASK))
def test_losses_of_data_take_masks(name):
    parameters = inspect.signature(getattr(losses, name)).parameters
    masks = {p for p in parameters if p.endswith("where")}
    two_sets = any(p.startswith("source") for p in parameters)
    assert masks == ({"source_where", "target_where"} if two_sets else {"where"})


def test_aliases_are_the_same_functions():
    assert losses.mmd is losses.maximum_mean_discrepancy
    assert losses.coral is losses.correlation_alignment
