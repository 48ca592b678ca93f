"""A new head on a network."""

from collections.abc import Mapping
from typing import Any

import jax

from jaxtransfer import prng
from jaxtransfer.model.calls import lies_under, paths
from jaxtransfer.typing import Inputs, Model, ModelState, Variables

_PARTS = "backbone", "head"


def _below(paths: tuple[str, ...], part: str) -> tuple[str, ...]:
    return tuple(
        path.removeprefix(part).removeprefix("/")
        for path in paths
        if path == part or path.startswith(f"{part}/") or path == ""
    )


def with_head(backbone: Model, head: Model, *, tap: str | None = None) -> Model:
    """Put a new head on a network: ``head(backbone(inputs))``.

    Args:
        backbone: the source network.
        head: the new task model; its inputs are what is tapped.
        tap: module of the backbone to tap; its output if ``None``.

    Returns:
        A model whose parameters and state are ``{"backbone": …, "head": …}``, and
        whose tap paths begin with ``backbone/`` and ``head/``. A part that holds
        nothing may be missing from what ``apply`` is given, as after ``tree.combine``.

    Raises:
        ValueError: (in ``init`` and ``apply``) a tap does not exist.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp
        >>> from jaxtransfer.model import from_linen
        >>> model = with_head(from_linen(nn.Dense(4)), from_linen(nn.Dense(2)))
        >>> variables = model.init(jax.random.key(0), jnp.ones((1, 3)))
        >>> sorted(variables.params), model.apply(variables, jnp.ones((5, 3)))[0].shape
        (['backbone', 'head'], (5, 2))
    """
    own_taps = () if tap is None else (tap,)

    def source(output: Any, features: Mapping[str, Any]) -> Any:
        return output if tap is None else features[tap]

    def init(key: jax.Array, inputs: Inputs) -> Variables:
        backbone_key, head_key = prng.streams(key, "backbone", "head")
        below = backbone.init(backbone_key, inputs)
        output, features, _ = backbone.apply(below, inputs, taps=own_taps)
        above = head.init(head_key, source(output, features))
        return Variables(
            {"backbone": below.params, "head": above.params},
            {"backbone": below.model_state, "head": above.model_state},
        )

    def apply(
        variables: Variables,
        inputs: Inputs,
        *,
        train: bool = False,
        key: jax.Array | None = None,
        taps: tuple[str, ...] = (),
        held: tuple[str, ...] = (),
    ) -> tuple[Any, dict[str, Any], ModelState]:
        params, state = variables
        taps, held = paths("taps", taps), paths("held", held)
        for name, given in (("tap", taps), ("held:", {*held} - {""})):
            astray = [path for path in given if not lies_under(path, _PARTS)]
            if astray:
                raise ValueError(
                    f"{name} {astray[0]!r} must begin with 'backbone/' or 'head/'"
                )
        keys = {"backbone": None, "head": None}
        if key is not None:
            keys = {part: prng.stream(key, part) for part in keys}
        lower = _below(taps, "backbone")
        output, features, backbone_state = backbone.apply(
            Variables(params.get("backbone", {}), state.get("backbone", {})),
            inputs,
            train=train,
            key=keys["backbone"],
            taps=tuple({*own_taps, *lower} - {""}),
            held=_below(held, "backbone"),
        )
        features = {**features, "": output}
        result, head_features, head_state = head.apply(
            Variables(params.get("head", {}), state.get("head", {})),
            source(output, features),
            train=train,
            key=keys["head"],
            taps=tuple(set(_below(taps, "head")) - {""}),
            held=_below(held, "head"),
        )
        head_features = {**head_features, "": result}
        found = {
            **{f"backbone/{p}".removesuffix("/"): f for p, f in features.items()},
            **{f"head/{p}".removesuffix("/"): f for p, f in head_features.items()},
        }
        return (
            result,
            {tap: found[tap] for tap in taps},
            {"backbone": backbone_state, "head": head_state},
        )

    return Model(init, apply)
