"""The gradient of an inner step, and how the outer gradient goes back through it."""

from collections.abc import Callable
from typing import Literal

import jax

from jaxtransfer import tree
from jaxtransfer.ops.mapped import mapped_with
from jaxtransfer.typing import Batch, Frozen, ModelState, Objective, Params, Scalar

Order = Literal["first", "second"]
Backward = Literal["forward-over-reverse", "remat", "stored"]
"""How a second-order gradient goes back through an inner step.

- ``"forward-over-reverse"``: the product of the Hessian with the gradient so far, as a
  directional derivative of the inner gradient. Keeps no activations of a step; the
  inner loss is not differentiated with respect to the support examples, ``frozen`` or
  the model state.
- ``"remat"``: reverse over reverse, with the step run again on the way back. Keeps no
  activations either.
- ``"stored"``: reverse over reverse; memory grows with the number of steps.
"""

Slope = Callable[..., tuple[Params, ModelState]]
"""``(fast, slow, frozen, model_state, support, key) -> (gradient, model_state)``."""


def slope(task: Objective, backward: Backward) -> Slope:
    """Gradient of the loss on the support with respect to what adapts.

    Args:
        task: objective on the support examples.
        backward: how it is differentiated in turn.

    Returns:
        ``(fast, slow, frozen, model_state, support, key) -> (gradient, model_state)``,
        differentiable with respect to ``fast`` and ``slow``.

    Raises:
        ValueError: an unknown name.

    References:
        Forward over reverse: Kemaev et al., *Scalable meta-learning via mixed-mode
        differentiation*, 2025.
    """
    if backward not in ("forward-over-reverse", "remat", "stored"):
        raise ValueError(
            f'backward: got {backward!r}; choose "forward-over-reverse", "remat" or '
            '"stored"'
        )

    def loss(
        fast: Params,
        slow: Params,
        frozen: Frozen,
        model_state: ModelState,
        support: Batch,
        key: jax.Array,
    ) -> tuple[Scalar, ModelState]:
        value, (state, _) = task(
            tree.combine(fast, slow), frozen, model_state, support, key
        )
        return value, state

    plain = jax.grad(loss, has_aux=True)
    if backward == "stored":
        return plain
    if backward == "remat":
        return jax.checkpoint(plain)

    def tied(fast, slow, *given):
        gradient, state = plain(fast, slow, *given)
        # What does not depend on the task, such as a penalty's gradient, is mapped too.
        return mapped_with(gradient, (fast, slow, given)), state

    @jax.custom_vjp
    def mixed(fast, slow, *given):
        return tied(fast, slow, *given)

    def forward(fast, slow, *given):
        return tied(fast, slow, *given), (fast, slow, given)

    def back(saved, cotangents):
        fast, slow, given = saved
        along, _ = cotangents  # the state is not differentiated through

        def of_all(fast):
            return jax.grad(lambda f, s: loss(f, s, *given)[0], argnums=(0, 1))(
                fast, slow
            )

        _, (of_fast, of_slow) = jax.jvp(of_all, (fast,), (along,))
        return of_fast, of_slow, *(None for _ in given)

    mixed.defvjp(forward, back)

    def inner(fast, slow, *given):
        gradient, state = mixed(fast, slow, *given)
        # JAX 0.12 refuses a cotangent of what is the same for all tasks, even where
        # the rule drops it as here.
        return gradient, jax.lax.stop_gradient(state)

    return inner
