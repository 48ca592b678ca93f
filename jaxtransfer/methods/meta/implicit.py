"""Implicit MAML: the meta-gradient at the end of the inner problem, not through it."""

import math
import operator
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax.scipy.sparse.linalg import cg

from jaxtransfer import tree
from jaxtransfer.methods.meta.descent import maml
from jaxtransfer.methods.meta.learned import Learned
from jaxtransfer.methods.meta.learner import Adapted, Learner, Task, Visit
from jaxtransfer.ops.dtypes import common_dtype, number
from jaxtransfer.ops.mapped import mapped_with
from jaxtransfer.ops.varying import vary, varying_axes
from jaxtransfer.typing import Batch, Frozen, ModelState, Params

Solver = Literal["conjugate gradient", "neumann"]


def proximal(
    optimizer: optax.GradientTransformation, strength: float
) -> optax.GradientTransformation:
    r"""Pull every step back to where the optimizer was initialised.

    The gradient handed on is that of
    :math:`L(\phi) + \frac\lambda2\|\phi - \phi_0\|^2`.

    Args:
        optimizer: any optax transformation.
        strength: :math:`\lambda`.

    Returns:
        The transformation; it needs the parameters at each update.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> pulled = proximal(optax.sgd(1.0), 0.5)
        >>> state = pulled.init(jnp.array(0.0))
        >>> float(pulled.update(jnp.array(0.0), state, jnp.array(2.0))[0])
        -1.0
    """

    def init(params: Any) -> Any:
        return params, optimizer.init(params)

    def update(slopes: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        anchor, inner = state
        slopes = jax.tree.map(
            lambda g, p, a: g + strength * (p - a), slopes, params, anchor
        )
        updates, inner = optimizer.update(slopes, inner, params)
        return updates, (anchor, inner)

    return optax.GradientTransformation(init, update)  # pyright: ignore[reportArgumentType]


def implicit_maml(
    task: Task,
    optimizer: optax.GradientTransformation,
    *,
    steps: int,
    strength: float = 2.0,
    solver: Solver = "conjugate gradient",
    iterations: int = 5,
    rules: tree.Rules | None = None,
) -> Learner:
    r"""Implicit MAML (iMAML): differentiate the solution of a regularised problem.

    .. math:: \phi^*(\theta) = \arg\min_\phi L_S(\phi)
              + \frac\lambda2\|\phi-\theta\|^2,
              \qquad \frac{d\phi^*}{d\theta}
              = \left(I + \frac1\lambda\nabla^2 L_S(\phi^*)\right)^{-1}

    The steps in between leave no trace: memory does not depend on their number, and any
    optimizer will do. The gradient is right as far as the inner problem is solved.
    Parameters that don't adapt (``rules``) get theirs by the same theorem, the support
    has none. The system is solved in float32 or wider, whatever the parameters are.

    Args:
        task: the losses inside and outside.
        optimizer: of the inner problem; the pull to the start is added to the gradient
            it is given.
        steps: of the optimizer.
        strength: :math:`\lambda`; must exceed the negative curvature of the loss.
        solver: of the linear system, by products with the Hessian: conjugate gradients,
            or the Neumann series (which needs :math:`\lambda` above the largest
            curvature).
        iterations: of the solver.
        rules: paths of the parameters that adapt; all if None.

    Returns:
        The learner; it takes no ``step_weights`` in
        :func:`~jaxtransfer.methods.meta.objective`.

    Raises:
        TypeError: a learned optimizer, or ``iterations`` that are no integer.
        ValueError: ``strength`` is not positive or infinite, ``iterations`` is below 1,
            an unknown solver, or a task with statistics by step.

    References:
        Rajeswaran et al., *Meta-learning with implicit gradients*, NeurIPS 2019, eqs.
        3-7; defaults of its Omniglot runs. Neumann: Lorraine et al., AISTATS 2020.
    """
    strength = number(strength)
    if not 0 < strength < math.inf:
        raise ValueError(f"strength: got {strength}; it must be positive and finite")
    if isinstance(optimizer, Learned):
        raise TypeError(
            "optimizer: got a learned one, of whose steps implicit MAML keeps no "
            "trace; give it to meta.maml, or take one of optax"
        )
    iterations = operator.index(iterations)
    if iterations < 1:
        raise ValueError(f"iterations: got {iterations}; it must be 1 or more")
    if solver not in _SOLVERS:
        raise ValueError(f"solver: got {solver!r}; choose one of {sorted(_SOLVERS)}")
    if task.per_step:
        raise ValueError(
            'task: statistics="per_step" belong to steps, of which implicit MAML keeps '
            "no trace; choose another for meta.task"
        )
    solve = _SOLVERS[solver]
    descend = maml(
        task,
        proximal(optimizer, strength),
        steps=steps,
        first_order=True,
        rules=rules,
    )

    def divided(params: Params) -> tuple[Params, Params]:
        return (params, {}) if rules is None else tree.partition(params, rules)

    @jax.custom_vjp
    def solution(params, found, *given):
        # What did not adapt, too: its gradient depends on the task.
        return mapped_with(found, (params, given))

    def forward(params, found, *given):
        return mapped_with(found, (params, given)), (found, given)

    def back(saved, cotangents):
        found, (frozen, model_state, support, key) = saved
        fast, slow = divided(found)
        of_fast, of_slow = divided(cotangents)

        def slopes(fast: Params) -> tuple[Params, Params]:
            def loss(fast: Params, slow: Params) -> Any:
                whole = tree.combine(fast, slow)
                return task.support(whole, frozen, model_state, support, key)[0]

            return jax.grad(loss, argnums=(0, 1))(fast, slow)

        def curved(along: Params) -> tuple[Params, Params]:
            return jax.jvp(slopes, (fast,), (along,))[1]

        def system(along: Params) -> Params:
            bent, _ = curved(along)
            return jax.tree.map(lambda v, h: v + h / strength, along, bent)

        solved = solve(system, of_fast, iterations)
        _, mixed = curved(solved)
        of_slow = jax.tree.map(lambda v, m: v - m / strength, of_slow, mixed)
        zeros = jax.tree.map(jnp.zeros_like, found)
        return tree.combine(solved, of_slow), zeros, *(None for _ in (0, 1, 2, 3))

    solution.defvjp(forward, back)

    def adapt(
        params: Params,
        frozen: Frozen,
        model_state: ModelState,
        support: Batch,
        key: jax.Array,
        visit: Visit | None = None,
    ) -> Adapted:
        params, support = jax.tree.map(jnp.asarray, (dict(params), support))
        axes = varying_axes((params, support))
        params = vary(params, axes)
        found = jax.lax.stop_gradient(
            descend.adapt(params, frozen, model_state, support, key, visit)
        )
        given = frozen, model_state, support, key
        adapted = solution(params, found.params, *given)
        state = found.model_state
        if task.statistics is not None:
            state = task.statistics(adapted, *given)
        return Adapted(adapted, state, found.visited)

    return Learner(
        descend.init,
        adapt,
        task.query,
        task.predict,
        descend.statistics,
        gradient_at_end_only=True,
    )


def _conjugate_gradient(
    system: Callable[[Params], Params], right: Params, iterations: int
) -> Params:
    dtype = common_dtype(jnp.float32, *jax.tree.leaves(right))

    def wide(values: Params) -> Params:
        return jax.tree.map(lambda leaf: leaf.astype(dtype), values)

    def narrow(values: Params) -> Params:
        return jax.tree.map(lambda leaf, own: leaf.astype(own.dtype), values, right)

    wanted = wide(right)
    leaves = jax.tree.leaves(wanted)
    # Its squares must neither vanish nor overflow; a power of two changes no digit.
    largest = jnp.max(jnp.stack([jnp.max(jnp.abs(leaf)) for leaf in leaves]))
    scale = jnp.ldexp(jnp.ones((), dtype), jnp.frexp(largest)[1])
    found = cg(
        lambda along: wide(system(narrow(along))),
        jax.tree.map(lambda leaf: leaf / scale, wanted),
        maxiter=iterations,
        tol=0.0,
    )[0]
    # It answers not-a-number with zeros.
    lost = jnp.stack([jnp.sum(0.0 * leaf) for leaf in leaves]).sum()
    return narrow(jax.tree.map(lambda leaf: leaf * scale + lost, found))


def _neumann(
    system: Callable[[Params], Params], right: Params, iterations: int
) -> Params:
    def step(guess: Params, _: None) -> tuple[Params, None]:
        # x <- b + (I - A) x, whose k-th value is the series up to its k-th power.
        product = system(guess)
        return jax.tree.map(lambda b, x, y: b + x - y, right, guess, product), None

    return jax.lax.scan(step, right, length=iterations)[0]


_SOLVERS = {"conjugate gradient": _conjugate_gradient, "neumann": _neumann}
