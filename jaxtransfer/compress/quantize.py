"""Weights and activations in 8-bit integers, in training and after it, by qwix."""

import contextlib
import functools
import inspect
import re
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from jaxtransfer import tree
from jaxtransfer.model import from_linen, from_nnx
from jaxtransfer.model.calls import mode_arguments, positional
from jaxtransfer.model.nnx import linen_path
from jaxtransfer.typing import Inputs, Model, Params, Variables

# The largest magnitude is 127. Qwix puts it at 127.5, where the rounding of a negative
# one depends on the last bit, so that integers made twice would differ.
_LARGEST = f"absmax,{127.5 / 127}"
_ABSENT = (
    "compress.quantized needs the package qwix; run: python -m pip install "
    "'jaxtransfer[compress]'"
)


class Quantized(NamedTuple):
    """A network in 8-bit integers.

    Attributes:
        model: to train. Its variables are those of the plain network, in floating
            point; each product takes weights and inputs rounded to 8 bits, and the
            gradient passes the rounding as if it were not there.
        integer: to use: its weights are 8-bit integers. It is not trained.
        convert: variables of ``model`` → variables of ``integer``.
        paths: what is in 8 bits, ``"conv1/kernel"``; all else is as it was.
    """

    model: Model
    integer: Model
    convert: Callable[[Variables], Variables]
    paths: tuple[str, ...]


def quantized(
    module: nn.Module | Callable[[nnx.Rngs], nnx.Module],
    inputs: Inputs,
    *,
    rules: tree.Rules = ".*",
    key_streams: tuple[str, ...] = ("dropout",),
) -> Quantized:
    r"""A network whose layers multiply 8-bit integers.

    .. math:: \hat x = \Delta\,\mathrm{round}(x / \Delta), \qquad
              \Delta = \max |x| / 127

    for both sides of each product in a module that has weights, with one
    :math:`\Delta` for each output channel of a weight and one for each row of its
    inputs that is summed over: each token of ``[batch, tokens, width]`` in a dense
    layer, each example in a convolution. They are measured anew in every pass: nothing
    is calibrated, and an example's output does not depend on the others of its batch.
    The integers are multiplied and summed exactly, in training too. The gradient is
    that of the product before rounding in dense layers and grouped convolutions
    (:math:`X^\top C` for weights, C the gradient of the outputs), that of the rounded
    product in other convolutions. Biases, normalisation, modules without weights and
    embeddings (those that are the output matrix too) stay in floating point; of
    float16, products are made in float32. Zero stays zero, so pruning
    (:func:`~jaxtransfer.compress.pruned`) goes with it. Loops inside of the network
    (``jax.lax.scan``) are unrolled.

    ``quantized(...).model`` is a student like any other, for
    :func:`jaxtransfer.methods.distill.objective`: same parameters, state and taps.

    Args:
        module: Linen module, or for NNX ``nnx.Rngs -> nnx.Module``, as for
            :func:`~jaxtransfer.model.from_linen` and
            :func:`~jaxtransfer.model.from_nnx`.
        inputs: example of its inputs, arrays or ``jax.ShapeDtypeStruct``; only shapes
            and types are used.
        rules: modules whose weights are quantized, by path (``"layer1.*"``, all by
            default); see :func:`jaxtransfer.tree.match`.
        key_streams: as for :func:`~jaxtransfer.model.from_linen`.

    Returns:
        The two networks, and how variables go from one to the other.

    Raises:
        ImportError: qwix is not there.
        TypeError: a :class:`~jaxtransfer.typing.Model` is given, not the module, or an
            NNX module, not the function that builds it.
        ValueError: a rule matches no module that has parameters, no weight would be
            quantized (embeddings never are), or a layer multiplies its weights in
            another shape than it holds them (:class:`~jaxtransfer.nets.Conv4`) or by
            ``@``, which can't be done; (at a call) ``integer`` is to be trained, or
            what is converted is in integers already.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxtransfer import nets
        >>> x = jax.random.normal(jax.random.key(0), (4, 6))
        >>> student = quantized(nets.MLP(3, widths=(8,)), x)
        >>> variables = student.model.init(jax.random.key(1), x)
        >>> served = student.convert(variables)
        >>> served.params["head"]["kernel"]["array"]["qvalue"].dtype
        dtype('int8')
        >>> trained = student.model.apply(variables, x)[0]
        >>> bool(jnp.allclose(student.integer.apply(served, x)[0], trained))
        True

    References:
        Jacob et al., *Quantization and training of neural networks for efficient
        integer-arithmetic-only inference*, CVPR 2018; straight-through gradient: Bengio
        et al., 2013. Deviation: activations have ranges of their own in each pass, not
        running ones, and normalisation is not folded into the weights.
    """
    try:
        import qwix
    except ImportError as error:
        raise ImportError(_ABSENT) from error
    if isinstance(module, Model):
        raise TypeError(
            "module: got a Model, which hides its layers; give the module itself, as "
            "to model.from_linen or model.from_nnx"
        )
    example = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), inputs)
    linen = isinstance(module, nn.Module)
    plain = from_linen(module, key_streams=key_streams) if linen else from_nnx(module)
    abstract = jax.eval_shape(lambda: plain.init(jax.random.key(0), _zeros(example)))
    leaves = tree.flatten(abstract.params)
    parts = [path.rpartition("/") for path in leaves]
    modules = sorted({module for module, _, _ in parts})
    # Flax's embeddings multiply by the transpose, which integers can't; they stay out.
    others = {module for module, _, name in parts if name != "embedding"}
    try:
        chosen = tree.match(rules, modules) & others
    except ValueError as error:
        said = str(error).replace("matches no parameter", "matches no module")
        raise ValueError(f"rules: {said}") from error
    if not chosen:
        raise ValueError(
            f"rules: {rules!r} matches nothing but embeddings, which stay floating "
            f"point; other modules are {sorted(others)}"
        )
    names = chosen if linen else _paths_in_qwix(module, chosen)
    rule = qwix.QuantizationRule(
        module_path="|".join(sorted(map(re.escape, names))),
        weight_qtype=jnp.int8,
        act_qtype=jnp.int8,
        weight_calibration_method=_LARGEST,
        act_calibration_method=_LARGEST,
    )

    training, serving = _providers()
    if linen:
        wrap = functools.partial(from_linen, key_streams=key_streams)
        trained = wrap(_patched(module, training, rule))
        served = wrap(_patched(module, serving, rule))
    else:
        arguments = positional(example)
        later = {"skip_nnx_init": True}  # nothing to convert: the weights stay floats
        trained = _built(module, training, rule, arguments, later)
        served = _built(module, serving, rule, arguments, {})
    with _refusing(chosen):  # the plain network was traced above
        boxes = _boxes(served, example)
    if not boxes:
        raise ValueError(
            f"rules: {rules!r} matches no module that multiplies by its weights; "
            f"modules are {sorted(chosen)}"
        )
    for path in leaves:
        module_path, _, name = path.rpartition("/")
        if name == "kernel" and module_path in chosen and path not in boxes:
            raise _other_shape(boxes, f"{path!r} is one.")
    shapes = {path: _named(box)["array"] for path, box in boxes.items()}

    def convert(variables: Variables) -> Variables:
        found = dict(tree.flatten(variables.params))
        for path, shape in shapes.items():
            if f"{path}/array/qvalue" in found:
                raise ValueError(
                    f"variables: {path!r} is in integers already; convert the "
                    "variables of Quantized.model, once"
                )
            weight = jnp.reshape(found.pop(path), shape["qvalue"].shape)
            if weight.dtype == jnp.float16:
                weight = weight.astype(jnp.float32)
            axes = _alike(shape["scale"].shape, weight.shape)
            held = qwix.quantize(
                weight, jnp.int8, channelwise_axes=axes, calibration_method=_LARGEST
            )
            found[f"{path}/array/qvalue"] = held.qvalue
            found[f"{path}/array/scale"] = held.scale
        return variables._replace(params=tree.unflatten(found))

    def init(key: jax.Array, inputs: Inputs) -> Variables:
        return convert(plain.init(key, inputs))

    def apply(variables: Variables, inputs: Inputs, **options: Any) -> Any:
        if options.get("train"):
            raise ValueError(
                "train: a network of integers is not trained; train Quantized.model, "
                "then convert its variables"
            )
        given, inputs = _arrays((variables, inputs))
        params = _boxed(given.params, boxes) if linen else given.params
        output, features, _ = served.apply(
            given._replace(params=params), inputs, **options
        )
        return output, features, variables.model_state

    def learn(variables: Variables, inputs: Inputs, **options: Any) -> Any:
        return trained.apply(*_arrays((variables, inputs)), **options)

    result = Quantized(
        Model(plain.init, learn), Model(init, apply), convert, tuple(boxes)
    )
    _try(result, abstract, example)
    return result


@functools.cache
def _providers() -> tuple[Any, Any]:
    """Qwix's, of the network to train and of that of integers, with what they lack."""
    import qwix

    signature = inspect.signature(jax.lax.conv_general_dilated)
    no_weight: Any = types.SimpleNamespace(shape=None)

    class Trained(qwix.QtProvider):
        def get_intercept_map(self) -> dict[str, Any]:
            return _widened(super().get_intercept_map(), self)

        def _create_dot_general_qt_config(
            self, rule: Any, op_id: Any, lhs: Any, rhs: Any
        ) -> Any:
            """Both sides are rounded alike, so which one is the weight is no matter.

            Qwix would go by the shapes, and refuse inputs that have the weight's.
            """
            return super()._create_dot_general_qt_config(
                rule, op_id, no_weight, no_weight
            )

        def conv_general_dilated(self, *arguments: Any, **named: Any) -> Any:
            """With the gradient of grouped convolutions, which qwix can't give."""
            given = signature.bind(*arguments, **named).arguments
            if given.get("feature_group_count", 1) == 1:
                return super().conv_general_dilated(**given)
            plain = jax.lax.conv_general_dilated(**given)
            for side in ("lhs", "rhs"):
                given[side] = jax.lax.stop_gradient(given[side])
            value = super().conv_general_dilated(**given)
            return value + (plain - jax.lax.stop_gradient(plain))

    class Served(qwix.PtqProvider):
        def get_intercept_map(self) -> dict[str, Any]:
            return _widened(super().get_intercept_map(), self)

    return Trained, Served


_CONV = "jax.lax.conv_general_dilated"
_PATCH_CONV = "jaxtransfer.nets.layers.conv_general_dilated"
_PRODUCTS = (
    _CONV,
    _PATCH_CONV,
    "jax.lax.dot_general",
    "jax.numpy.dot",
    "jax.numpy.einsum",
)


def _widened(functions: dict[str, Any], provider: Any) -> dict[str, Any]:
    """Qwix's products, made in float32 where they would be in float16.

    There its scales below 0.008 become 1, and sums of integers over 65504 infinite.
    Convolutions of :func:`~jaxtransfer.nets.PatchConv` are made as JAX's.
    """
    functions = functions | {_PATCH_CONV: functions[_CONV]}
    wide = {
        name: _wide(functions[name], provider)
        for name in _PRODUCTS
        if name in functions
    }
    return functions | wide


def _wide(product: Callable[..., Any], provider: Any) -> Callable[..., Any]:

    def narrow(x: Any) -> bool:
        return isinstance(x, jax.Array) and x.dtype == jnp.float16

    def made(*arguments: Any, **named: Any) -> Any:
        given = arguments, named
        rule, _ = provider._get_current_rule_and_op_id("", only_rule=True)
        if rule is None or not any(map(narrow, jax.tree.leaves(given))):
            return product(*arguments, **named)
        # Weights in integers, which are no arrays, go by their inputs.
        arrays = [x for x in (*arguments, *named.values()) if isinstance(x, jax.Array)]
        arguments, named = jax.tree.map(
            lambda x: x.astype(jnp.float32) if narrow(x) else x, given
        )
        value = product(*arguments, **named)
        return value.astype(jnp.float16) if all(map(narrow, arrays)) else value

    return made


def _patched(
    module: Any, provider: Any, rule: Any, *inputs: Any, **options: Any
) -> Any:
    """The module as qwix changes it.

    Without `disable_jit` JAX keeps a jitted function of jax.numpy as it was traced
    first: quantized for networks that are not, or the other way round.
    """
    import qwix

    made = provider([rule], disable_jit=True)
    return qwix.quantize_model(module, made, *inputs, **options)


def _built(
    build: Callable[[nnx.Rngs], nnx.Module],
    provider: Any,
    rule: Any,
    arguments: tuple[Any, ...],
    options: dict[str, Any],
) -> Model:
    def changed(rngs: nnx.Rngs) -> nnx.Module:
        module = build(rngs)
        mode = mode_arguments(type(module).__call__, False)
        return _patched(module, provider, rule, *_zeros(arguments), **mode, **options)

    return from_nnx(changed)


def _arrays(given: Any) -> Any:
    """Arrays of JAX: qwix can't do with NumPy's."""
    return jax.tree.map(jnp.asarray, given)


def _zeros(example: Any) -> Any:
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), example)


def _paths_in_qwix(build: Any, chosen: set[str]) -> set[str]:
    """How qwix names the NNX modules of our paths: items of a list are levels."""
    skeleton = nnx.eval_shape(lambda: build(nnx.Rngs(0)))
    return {
        "/".join(map(str, path))
        for path, _ in nnx.iter_modules(skeleton)
        if linen_path(path) in chosen
    }


_PARTS = ("qvalue", "scale")


def _boxes(served: Model, example: Any) -> dict[str, Any]:
    """What is in integers, by path, as shapes in the structure that qwix wants."""
    held = jax.eval_shape(lambda: served.init(jax.random.key(0), _zeros(example)))
    leaves = tree.flatten(held.params)
    boxes = {
        path: leaf
        for path, leaf in leaves.items()
        if not isinstance(leaf, jax.ShapeDtypeStruct)
    }
    inside = "/array/qvalue"  # NNX: as the arrays of a nested dict
    for path in [path.removesuffix(inside) for path in leaves if path.endswith(inside)]:
        boxes[path] = {
            "array": {name: leaves[f"{path}/array/{name}"] for name in _PARTS}
        }
    return boxes


def _named(box: Any) -> dict[str, Any]:
    """The arrays of a weight in integers as a nested dict."""
    qvalue, scale = jax.tree.leaves(box)
    return {"array": {"qvalue": qvalue, "scale": scale}}


def _boxed(params: Params, boxes: dict[str, Any]) -> dict[str, Any]:
    """Nested dict of arrays → the same with the structures that qwix wants."""
    found = dict(tree.flatten(params))
    for path, box in boxes.items():
        arrays = [found.pop(f"{path}/array/{name}") for name in _PARTS]
        found[path] = jax.tree.unflatten(jax.tree.structure(box), arrays)
    return tree.unflatten(found)


def _alike(first: tuple[int, ...], second: tuple[int, ...]) -> list[int]:
    return [axis for axis, size in enumerate(first) if size == second[axis]]


_UNTRACED = (TypeError, ValueError, AttributeError)  # of layers that can't be


@contextlib.contextmanager
def _refusing(paths: Iterable[str]) -> Iterator[None]:
    """Say which layers can't be in integers, if one can't be traced."""
    try:
        yield
    except jax.dtypes.TypePromotionError:  # a setting of JAX's, not the layers
        raise
    except _UNTRACED as error:
        raise _other_shape(paths, str(error)) from error


def _try(made: Quantized, variables: Variables, example: Any) -> None:
    """Trace both networks once: some layers can't be."""

    def run(variables: Variables, inputs: Any) -> Any:
        trained = made.model.apply(variables, inputs)[0]
        return trained, made.integer.apply(made.convert(variables), inputs)[0]

    with _refusing(made.paths):
        jax.eval_shape(run, variables, example)


def _other_shape(paths: Iterable[str], detail: str) -> ValueError:
    how, instead = "in another shape than it holds them", "use flax's Conv and Dense"
    if re.match("unsupported.* for @:|matmul |tensordot ", detail):
        how, instead = "by @, matmul or tensordot", "write jnp.dot or jnp.einsum"
    return ValueError(
        f"module: a layer multiplies its weights {how}, which can't be done with "
        f"integers; {instead}, or name the other modules in rules=. {detail} Found "
        f"were {sorted(paths)}"
    )


__all__ = ["Quantized", "quantized"]
