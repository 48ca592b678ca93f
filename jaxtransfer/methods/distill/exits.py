"""Self-distillation with early exits: shallow heads that learn from the last one."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxtransfer import losses
from jaxtransfer.methods.distill.student import of_student
from jaxtransfer.methods.distill.terms import Term
from jaxtransfer.model import from_linen
from jaxtransfer.typing import Model, ModelState, Params, Variables


class _Head(nn.Module):
    classes: int

    @nn.compact
    def __call__(self, maps: jax.Array) -> jax.Array:
        inner = tuple(range(1, maps.ndim - 1))
        with jax.numpy_dtype_promotion("standard"):  # maps may be narrower or wider
            return nn.Dense(self.classes, name="linear")(jnp.mean(maps, axis=inner))


def exit_head(student: tuple[int, ...], teacher: tuple[int, ...]) -> Model:
    """A head on an inner layer: the mean over positions, and a linear map to classes.

    Args:
        student: shape of the layer, ``[batch, ..., channels]``.
        teacher: shape of the logits, ``[batch, classes]``.

    Returns:
        The network, for ``Term(bridge=exit_head)``.
    """
    del student
    return from_linen(_Head(teacher[-1]))


def _exit_loss(
    logits: jax.Array,
    deepest: jax.Array,
    labels: jax.Array,
    *,
    alpha: Any,
    temperature: Any,
    where: jax.Array | None = None,
) -> jax.Array:
    task = losses.cross_entropy(logits, labels, where=where)
    taught = losses.knowledge_distillation(
        logits, deepest, temperature=temperature, where=where
    )
    return (1 - alpha) * task + alpha * taught


def early_exits(
    paths: Sequence[str],
    *,
    alpha: float = 0.3,
    temperature: float = 3.0,
    weight: float = 1.0,
) -> dict[str, Term]:
    r"""Terms of heads on inner layers, which the network itself teaches (BYOT).

    .. math:: L_e = (1 - \alpha)\, \ell(e(x), y) + \alpha\, T^2\,
              \mathrm{KL}(\mathrm{softmax}(s(x)/T) \,\|\, \mathrm{softmax}(e(x)/T))

    for each exit, with the output :math:`s(x)` as a constant. The heads are bridges:
    they are made by :func:`~jaxtransfer.methods.distill.start`, trained with the
    student, which learns through them, and not part of it.

    Args:
        paths: layers that have an exit.
        alpha: :math:`\alpha`, weight of the deepest head, 0 … 1.
        temperature: :math:`T > 0`.
        weight: of every exit beside the student's own task loss.

    Returns:
        Terms for :func:`~jaxtransfer.methods.distill.objective`, with others or alone
        (the teacher is then None); batches need labels. :func:`exit_logits` runs them.

    Raises:
        ValueError: no paths, one twice, or a number out of range.

    Example:
        >>> sorted(early_exits(["layer1_0", "layer2_0"]))
        ['exit layer1_0', 'exit layer2_0']

    References:
        Zhang et al., *Be your own teacher*, ICCV 2019. Deviations: heads are
        linear; its third part, a hint from the deepest features, is a term to be added.
    """
    if not paths or len(set(paths)) < len(paths):
        raise ValueError(f"paths: got {list(paths)}; name each layer once")
    if not 0 <= alpha <= 1 or temperature <= 0:
        raise ValueError(
            f"alpha is in 0 … 1 and temperature positive, got {alpha} and {temperature}"
        )
    return {
        f"exit {path}": Term(
            loss=_exit_loss,
            student=path,
            of="student",
            bridge=exit_head,
            batch=("labels",),
            options={"alpha": alpha, "temperature": temperature},
            weight=weight,
        )
        for path in paths
    }


def exit_logits(
    student: Model,
    params: Params,
    model_state: ModelState,
    inputs: Any,
    paths: Sequence[str],
) -> dict[str, jax.Array]:
    """Logits of every exit, and of the network under ``""``, in evaluation mode.

    Under ``jit`` what lies behind the last exit that is used is not computed.

    Args:
        student: the network.
        params: of the training state.
        model_state: of the training state.
        inputs: ``[batch, ...]``.
        paths: as for :func:`early_exits`.

    Returns:
        ``[batch, classes]`` by path.

    Raises:
        ValueError: a layer has no exit.
    """
    bridges = params.get("bridges", {})
    lacking = [path for path in paths if f"exit {path}" not in bridges]
    if lacking:
        raise ValueError(
            f"paths: there is no exit at {lacking[0]!r}; there are "
            f"{sorted(name.removeprefix('exit ') for name in bridges)}"
        )
    outputs, features, _ = student.apply(
        of_student(params, model_state), inputs, taps=tuple(paths)
    )
    found = {"": outputs}
    for path in paths:
        head = exit_head((), outputs.shape)
        own = Variables(bridges[f"exit {path}"], {})
        found[path] = head.apply(own, features[path])[0]
    return found


__all__ = ["early_exits", "exit_head", "exit_logits"]
