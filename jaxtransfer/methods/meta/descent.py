"""Learning a task by gradient steps from a learned start: MAML and its family.

The gradient-based learners differ in what adapts (a path rule), in the optimizer inside
(fixed or learned) and in how the outer gradient is taken; the loop is one.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxtransfer import tree
from jaxtransfer.methods.meta.gradients import Backward, slope
from jaxtransfer.methods.meta.learned import Learned
from jaxtransfer.methods.meta.learner import (
    Adapted,
    Learner,
    Task,
    Visit,
    check_support,
)
from jaxtransfer.ops.varying import vary, varying_axes
from jaxtransfer.typing import Batch, Frozen, ModelState, Params, Variables

Optimizer = optax.GradientTransformation | Learned


def maml(
    task: Task,
    optimizer: Optimizer,
    *,
    steps: int,
    first_order: bool = False,
    rules: tree.Rules | None = None,
    per_step: tree.Rules | None = None,
    from_zero: tree.Rules | None = None,
    backward: Backward = "forward-over-reverse",
) -> Learner:
    r"""Model-agnostic meta-learning (MAML): a few gradient steps from a learned start.

    .. math:: \theta_{j+1} = \theta_j - \mathrm{optimizer}(\nabla L_S(\theta_j)),
              \quad j = 0 \dots K-1

    Differentiable with respect to the start, through every step and through the
    optimizer's own state. Of second order, Adam needs ``eps_root`` above 0, e.g.
    ``optax.adam(rate, eps_root=1e-8)``: a root has no derivative at 0, so that at the
    default a slope of 0 can make the gradient not-a-number under a finite loss.

    Args:
        task: the losses inside and outside, from :func:`~jaxtransfer.methods.meta.task`
            or put together by hand.
        optimizer: any optax transformation that needs no more than the gradient and
            the parameters (so no line search, as in ``optax.lbfgs``), or a learned one
            such as :func:`~jaxtransfer.methods.meta.meta_sgd`.
        steps: :math:`K \ge 0`; may be larger at test than in training.
        first_order: take the inner gradients as constants (FOMAML).
        rules: paths of the parameters that adapt (``"head"`` is ANIL); all if None.
        per_step: paths of parameters that have values of their own for every step and
            don't adapt, such as the scale and offset of normalisation in MAML++.
        from_zero: paths of parameters that begin every task at 0 and are not learned:
            the context of CAVIA.
        backward: how the second-order gradient is taken; see
            :data:`~jaxtransfer.methods.meta.Backward`.

    Returns:
        The learner. With a learned optimizer its meta-parameters are
        ``{"network": …, "optimizer": …}``, else those of the network. Rows for each
        step, of parameters and statistics, are made by its ``init``.

    Raises:
        ValueError: ``steps`` is negative; (at the call) a rule matches nothing that is
            not per step, the meta-parameters lack the optimizer's, the optimizer needs
            the loss too, or there are no support examples.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> from jaxtransfer.methods import meta
        >>> def loss(params, frozen, model_state, batch, key):
        ...     return jnp.mean((batch["labels"] - params["w"]) ** 2), (model_state, {})
        >>> learner = maml(meta.Task(loss, loss), optax.sgd(0.5), steps=1)
        >>> support = {"labels": jnp.array([2.0, 4.0])}
        >>> adapted = learner.adapt(
        ...     {"w": jnp.array(0.0)}, {}, {}, support, jax.random.key(0))
        >>> float(adapted.params["w"])
        3.0

    References:
        Finn, Abbeel, Levine, *Model-agnostic meta-learning for fast adaptation of
        deep networks*, ICML 2017, eq. 1 and algorithm 2.
    """
    if steps < 0:
        raise ValueError(f"steps: got {steps}; it must be 0 or more")
    gradient = slope(task.support, "stored" if first_order else backward)
    settled = task.statistics or _unchanged
    collected = task.collected or _unchanged

    def rows(leaves: Any) -> Any:
        return jax.tree.map(
            lambda leaf: jnp.repeat(jnp.asarray(leaf)[None], steps + 1, 0), leaves
        )

    def of_step(state: ModelState, number: Any) -> ModelState:
        return _row(state, number) if task.per_step else state

    def init(variables: Variables) -> Variables:
        params, state = variables
        if per_step is not None:
            repeated, rest = tree.partition(params, per_step)
            params = tree.combine(rows(repeated), rest)
        if isinstance(optimizer, Learned):
            network = variables.params
            if per_step is not None:
                _, network = tree.partition(network, per_step)
            fast = network if rules is None else tree.partition(network, rules)[0]
            params = {"network": params, "optimizer": optimizer.init(fast, steps)}
        return Variables(params, rows(state) if task.per_step else state)

    def begin(params: Params) -> tuple[optax.GradientTransformation, Any, Any, Any]:
        """The optimizer, and what adapts, what does not, and what is per step."""
        repeated = {}
        if isinstance(optimizer, Learned):
            if set(params) != {"network", "optimizer"}:
                raise ValueError(
                    f"params: got {sorted(params)} where a learned optimizer needs "
                    "['network', 'optimizer']; begin with learner.init(variables)"
                )
            inner, params = optimizer.build(params["optimizer"]), params["network"]
        else:
            inner = optimizer
        if per_step is not None:
            repeated, params = tree.partition(params, per_step)
        if from_zero is not None:
            zero, params = tree.partition(params, from_zero)
            params = tree.combine(jax.tree.map(jnp.zeros_like, zero), params)
        fast, slow = (params, {}) if rules is None else tree.partition(params, rules)
        return inner, fast, slow, repeated

    def adapt(
        params: Params,
        frozen: Frozen,
        model_state: ModelState,
        support: Batch,
        key: jax.Array,
        visit: Visit | None = None,
    ) -> Adapted:
        check_support(support)
        inner, fast, slow, repeated = begin(params)
        slots = inner.init(fast)
        axes = varying_axes((params, support))
        (fast, slots, model_state), slow, repeated = vary(
            ((fast, slots, model_state), slow, repeated), axes
        )

        def network(fast: Params, number: Any) -> dict[str, Any]:
            return tree.combine(fast, slow, _row(repeated, number))

        def look(fast: Any, state: ModelState, number: Any) -> Any:
            if visit is None:
                return None
            whole = network(fast, number)
            return visit(whole, settle(whole, state, number))

        def settle(whole: Params, state: ModelState, number: Any) -> ModelState:
            return settled(whole, frozen, of_step(state, number), support, key)

        # What is seen of a step keeps no activations either.
        see = look if backward == "stored" else jax.checkpoint(look)

        def step(carry: Any, number_and_key: Any) -> tuple[Any, Any]:
            fast, slots, state = carry
            number, key = number_and_key
            held = tree.combine(slow, _row(repeated, number))
            slopes, after = gradient(
                fast, held, frozen, of_step(state, number), support, key
            )
            if not task.per_step:  # Flax returns float32 statistics as float64 in x64
                state = jax.tree.map(lambda x, was: x.astype(was.dtype), after, state)
            if first_order:
                slopes = jax.lax.stop_gradient(slopes)
            updates, slots = _updates(inner, slopes, slots, fast)
            fast = optax.apply_updates(fast, updates)
            return (fast, slots, state), see(fast, state, number + 1)

        carry = fast, slots, model_state
        first = see(fast, model_state, 0)
        if steps == 1:
            carry, rest = step(carry, (0, key))
            rest = jax.tree.map(lambda leaf: leaf[None], rest)
        elif steps:
            numbers = jnp.arange(steps), jax.random.split(key, steps)
            carry, rest = jax.lax.scan(step, carry, numbers)
        visited = None
        if visit is not None:
            visited = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], first)
            if steps:
                visited = jax.tree.map(
                    lambda *parts: jnp.concatenate(parts), visited, rest
                )
        fast, _, state = carry
        whole = network(fast, steps)
        return Adapted(whole, settle(whole, state, steps), visited)

    def statistics(
        params: Params,
        frozen: Frozen,
        model_state: ModelState,
        support: Batch,
        key: jax.Array,
    ) -> ModelState:
        if task.per_step:
            return adapt(
                params,
                frozen,
                model_state,
                support,
                key,
                visit=lambda whole, state: collected(
                    whole, frozen, state, support, key
                ),
            ).visited
        _, fast, slow, repeated = begin(params)
        whole = tree.combine(fast, slow, _row(repeated, 0))
        return collected(whole, frozen, model_state, support, key)

    return Learner(
        init,
        adapt,
        task.query,
        task.predict,
        None if task.collected is None else statistics,
    )


def _unchanged(params, frozen, model_state, support, key):
    del params, frozen, support, key
    return model_state


def _updates(
    optimizer: optax.GradientTransformation, slopes: Params, slots: Any, fast: Params
) -> tuple[Any, Any]:
    try:
        return optimizer.update(slopes, slots, fast)
    except TypeError as error:
        # A chain hides in its signature what its parts ask for.
        if "required keyword-only argument" not in str(error):
            raise
        raise ValueError(
            "optimizer: the inner loop gives it the gradient and the parameters, and "
            f"it needs more ({error}); take one without a line search or a plateau, "
            "such as optax.sgd"
        ) from error


def _row(repeated: Params, number: Any) -> Params:
    """The values of one step; the last ones for steps beyond those trained."""

    def pick(leaf: jax.Array) -> jax.Array:
        at = jnp.minimum(number, len(leaf) - 1)
        return jax.lax.dynamic_index_in_dim(leaf, at, keepdims=False)

    return jax.tree.map(pick, repeated)


def anil(
    task: Task, optimizer: Optimizer, *, head: tree.Rules = "head", **options: Any
) -> Learner:
    """Almost no inner loop (ANIL): only the head adapts, all of the network is learned.

    Args:
        task: as for :func:`maml`.
        optimizer: as for :func:`maml`.
        head: paths of the head.
        **options: the other arguments of :func:`maml`.

    Returns:
        The learner.

    References:
        Raghu et al., *Rapid learning or feature reuse?*, ICLR 2020, section 4.
    """
    return maml(task, optimizer, rules=head, **options)


def boil(
    task: Task, optimizer: Optimizer, *, head: str = "head", **options: Any
) -> Learner:
    """Body only update in the inner loop (BOIL): everything but the head adapts.

    Args:
        task: as for :func:`maml`.
        optimizer: as for :func:`maml`.
        head: path of the head, a regular expression.
        **options: the other arguments of :func:`maml`.

    Returns:
        The learner.

    References:
        Oh et al., *BOIL: Towards representation change for few-shot learning*, ICLR
        2021, section 3.
    """
    return maml(task, optimizer, rules=rf"(?!(?:{head})(?:/|$)).+", **options)


def cavia(
    task: Task,
    optimizer: Optimizer,
    *,
    context: tree.Rules = ".*context/value",
    **options: Any,
) -> Learner:
    r"""Fast context adaptation (CAVIA): only a context that begins at 0 adapts.

    .. math:: \phi_0 = 0, \quad
              \phi_{j+1} = \phi_j - \alpha \nabla_\phi L_S(\theta, \phi_j)

    Args:
        task: as for :func:`maml`, of a network that reads the context.
        optimizer: as for :func:`maml`; the paper's is SGD of rate 1.
        context: paths of the context; the default is that of ``nets.Context``.
        **options: the other arguments of :func:`maml`.

    Returns:
        The learner.

    References:
        Zintgraf et al., *Fast context adaptation via meta-learning*, ICML 2019, eqs.
        3-5.
    """
    return maml(task, optimizer, rules=context, from_zero=context, **options)
