"""Knowledge review: stages of a student fused from the deepest to the shallowest."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxtransfer import losses
from jaxtransfer.methods.distill.terms import Scheduled, Term
from jaxtransfer.model import from_linen
from jaxtransfer.typing import Model


class _Fusion(nn.Module):
    shapes: tuple[tuple[int, ...], ...]
    width: int

    @nn.compact
    def __call__(self, *maps: jax.Array, train: bool = False) -> tuple[jax.Array, ...]:
        def normed(x: jax.Array, channels: int, size: int, name: str) -> jax.Array:
            with jax.numpy_dtype_promotion("standard"):  # maps may be narrower or wider
                x = nn.Conv(channels, (size, size), use_bias=False, name=name)(x)
                return nn.BatchNorm(not train, momentum=0.9, name=f"{name}_norm")(x)

        carried, outputs = None, []
        for number in reversed(range(len(maps))):
            x = normed(maps[number], self.width, 1, f"inner{number}")
            if carried is not None:
                deeper = jax.image.resize(
                    carried, (*x.shape[:3], carried.shape[-1]), "nearest"
                )
                both = jnp.concatenate([x, deeper], axis=-1)
                with jax.numpy_dtype_promotion("standard"):
                    shares = nn.Conv(2, (1, 1), name=f"attention{number}")(both)
                shares = nn.sigmoid(shares)
                x = x * shares[..., :1] + deeper * shares[..., 1:]
            carried = x
            height, width, channels = self.shapes[number]
            if x.shape[1:3] != (height, width):
                x = jax.image.resize(x, (len(x), height, width, x.shape[-1]), "nearest")
            outputs.append(normed(x, channels, 3, f"outer{number}"))
        return tuple(reversed(outputs))


def fusion(*, width: int | None = None) -> Any:
    """A bridge over several stages: each is fused with all that lie deeper.

    From the deepest stage on: a 1x1 convolution to a common width; the fused map of the
    stage below it, enlarged, is added, both weighted at every position by attention of
    the two; a 3x3 convolution to the teacher's channels. Convolutions end with batch
    normalisation.

    Args:
        width: channels of the fusion; by default those of the teacher's deepest stage,
            at most 512.

    Returns:
        ``(student's shapes, teacher's shapes) -> network``, for a
        :class:`~jaxtransfer.methods.distill.Term` of several layers; its output are as
        many maps of the teacher's shapes.

    Raises:
        ValueError: (at the call) as many layers of each are needed, all maps.

    References:
        Chen et al., *Distilling knowledge via knowledge review*, CVPR 2021.
    """

    def make(student: Any, teacher: Any) -> Model:
        if len(student) != len(teacher) or {len(s) for s in (*student, *teacher)} != {
            4
        }:
            raise ValueError(
                "fusion: as many layers of student and teacher are needed, all maps "
                f"[batch, height, width, channels]; got {student} and {teacher}"
            )
        inner = width or min(512, teacher[-1][-1])
        return from_linen(_Fusion(tuple(tuple(t[1:]) for t in teacher), inner))

    return make


def _reviewed(*maps: jax.Array, **options: Any) -> jax.Array:
    half = len(maps) // 2
    first, *others = (
        losses.hierarchical_context(own, taught, **options)
        for own, taught in zip(maps[:half], maps[half:], strict=True)
    )
    return sum(others, first)


def review(
    student: Sequence[str],
    teacher: Sequence[str],
    *,
    weight: Scheduled = 1.0,
    width: int | None = None,
) -> Term:
    r"""The term of ReviewKD: fused stages against the teacher's, on a pyramid.

    .. math:: L = \sum_i \mathrm{HCL}\big(f_i(s_i, \dots, s_n),\, t_i\big)

    Args:
        student: layers of the student, the shallowest first.
        teacher: as many layers of the teacher.
        weight: a number or a schedule; the paper lets it grow to its full size over the
            first 20 epochs.
        width: as for :func:`fusion`.

    Returns:
        The term, for :func:`~jaxtransfer.methods.distill.objective`.

    Raises:
        ValueError: not as many layers of each, or fewer than two.

    Example:
        >>> review(("layer1_0", "layer2_0"), ("layer1_8", "layer2_8")).student
        ('layer1_0', 'layer2_0')

    References:
        Chen et al., *Distilling knowledge via knowledge review*, CVPR 2021.
    """
    if len(student) != len(teacher) or len(student) < 2:
        raise ValueError(
            f"review: got layers {list(student)} and {list(teacher)}; give as many of "
            "each, two or more"
        )
    return Term(
        loss=_reviewed,
        student=tuple(student),
        teacher=tuple(teacher),
        bridge=fusion(width=width),
        weight=weight,
    )


__all__ = ["fusion", "review"]
