"""The rows of the CIFAR study: every family of distillation as terms of one objective.

Weights and temperatures are those of the papers or of the benchmark of Tian et al.
(2020, CIFAR-100); none was tuned here but the temperature and the weight of the row of
tuned KD, which are options. Deviations: CRD compares the teacher's pooled features as
they are, with negatives half as many as images; HCL is the loss of "review" (ReviewKD)
without its fusion of stages.
"""

from typing import Any

import flax.linen as nn
import jax

from jaxtransfer import losses
from jaxtransfer.methods import distill
from jaxtransfer.methods.distill import Term
from jaxtransfer.model import from_linen
from jaxtransfer.typing import Model

CE = "labels alone"
KD = "KD"
TUNED = "tuned KD"
MUTUAL = "mutual"
SIMKD = "SimKD"


def last_blocks(depth: int) -> tuple[str, str, str]:
    """Paths of the last block of each stage of a CIFAR ResNet."""
    number = (depth - 2) // 6 - 1
    first, second, third = (f"layer{stage}_{number}" for stage in (1, 2, 3))
    return first, second, third


def _pooled(maps: jax.Array) -> jax.Array:
    """What the head sees, ``[batch, channels]``."""
    return maps.mean(axis=(1, 2))


def _of_pooled(loss: Any) -> Any:
    """A loss of embeddings, of the maps they are means of."""

    def value(own: jax.Array, taught: jax.Array, **options: Any) -> jax.Array:
        return loss(_pooled(own), _pooled(taught), **options)

    return value


def _standardized(own: jax.Array, taught: jax.Array, **options: Any) -> jax.Array:
    return losses.knowledge_distillation(
        losses.standardize_logits(own), losses.standardize_logits(taught), **options
    )


def _variational(guess: Any, maps: jax.Array, **options: Any) -> jax.Array:
    return losses.variational_information_distillation(
        guess[0], maps, guess[1], **options
    )


def _contrastive(
    own: jax.Array,
    taught: jax.Array,
    indices: jax.Array,
    *,
    state: Any,
    key: jax.Array,
) -> tuple[jax.Array, Any]:
    """CRD with its memory, and negatives of other classes."""
    count = max(1, len(state["labels"]) // 2)
    negatives = losses.sample_negatives(key, state["labels"], indices, count=count)
    given = own, _pooled(taught), indices, negatives, state["memory"]
    value = losses.contrastive_representation_distillation(*given)
    return value, {**state, "memory": losses.update_contrastive_memory(*given)}


class _Embedding(nn.Module):
    features: int

    @nn.compact
    def __call__(self, maps: jax.Array) -> jax.Array:
        return nn.Dense(self.features, name="linear")(_pooled(maps))


def _embedding(student: tuple[int, ...], teacher: tuple[int, ...]) -> Model:
    """A linear map of the pooled maps."""
    del student
    return from_linen(_Embedding(teacher[-1]))


class _Projector(nn.Module):
    channels: int

    @nn.compact
    def __call__(self, maps: jax.Array, train: bool = False) -> jax.Array:
        x = maps
        layers = ((self.channels // 2, 1), (self.channels // 2, 3), (self.channels, 1))
        for number, (channels, size) in enumerate(layers):
            x = nn.Conv(channels, (size, size), use_bias=False, name=f"conv{number}")(x)
            x = nn.BatchNorm(not train, momentum=0.9, name=f"norm{number}")(x)
            x = nn.relu(x)
        return x


def projector(student: tuple[int, ...], teacher: tuple[int, ...]) -> Model:
    """SimKD's: three convolutions with batch normalisation."""
    del student
    return from_linen(_Projector(teacher[-1]))


def make_rows(
    student_depth: int,
    teacher_depth: int,
    filters: int,
    key: jax.Array,
    labels: jax.Array,
    tuned: tuple[float, float] = (4.0, 0.9),
) -> dict[str, dict[str, Term]]:
    """Terms by row; those of :data:`MUTUAL` have an objective of their own.

    Args:
        student_depth: of the CIFAR ResNet.
        teacher_depth: of the CIFAR ResNet.
        filters: of the teacher's first stage.
        key: of CRD's memory.
        labels: of all training images, by index.
        tuned: temperature and weight of the row of tuned KD.
    """
    own, taught = last_blocks(student_depth), last_blocks(teacher_depth)
    last: Any = {"student": own[-1], "teacher": taught[-1]}

    def each(loss: Any, **options: Any) -> dict[str, Term]:
        """One term a stage."""
        return {
            f"stage {n}": Term(loss=loss, student=s, teacher=t, **options)
            for n, (s, t) in enumerate(zip(own, taught, strict=True), 1)
        }

    memory = losses.contrastive_memory(key, examples=len(labels), features=4 * filters)
    return {
        CE: {},
        KD: {"logits": Term(loss=losses.knowledge_distillation, weight=0.9)},
        TUNED: {
            "logits": Term(
                loss=losses.knowledge_distillation,
                weight=tuned[1],
                options={"temperature": tuned[0]},
            )
        },
        "hint": {
            "maps": Term(
                loss=losses.hint,
                student=own[1],
                teacher=taught[1],
                bridge=distill.match(always=True, norm=True),
                weight=100.0,
            )
        },
        "attention": each(losses.attention_transfer, weight=1000.0),
        "similarity": {
            "maps": Term(loss=losses.similarity_preserving, weight=3000.0, **last)
        },
        "relational": {
            "pooled": Term(
                loss=_of_pooled(losses.relational_knowledge_distillation), **last
            )
        },
        "PKT": {
            "pooled": Term(
                loss=_of_pooled(losses.probabilistic_knowledge_transfer),
                weight=30_000.0,
                **last,
            )
        },
        "VID": each(_variational, bridge=distill.variational),
        "CRD": {
            "pooled": Term(
                loss=_contrastive,
                batch=("index",),
                bridge=_embedding,
                state={"memory": memory, "labels": labels},
                random=True,
                weight=0.8,
                **last,
            )
        },
        "DKD": {
            "logits": Term(
                loss=losses.decoupled_knowledge_distillation,
                batch=("labels",),
                options={"alpha": 1.0, "beta": 2.0, "temperature": 4.0},
            )
        },
        "DIST": {
            "logits": Term(
                loss=losses.dist,
                options={"temperature": 4.0, "beta": 2.0, "gamma": 2.0},
            )
        },
        "HCL": each(losses.hierarchical_context),
        "review": {"stages": distill.review(own, taught)},
        "standardised logits": {
            "logits": Term(loss=_standardized, weight=9.0, options={"temperature": 2.0})
        },
        SIMKD: {"maps": Term(loss=losses.simkd, bridge=projector, **last)},
        MUTUAL: {},
    }


TASK_WEIGHT = {KD: 0.1, "standardised logits": 0.1, SIMKD: 0.0}
"""Of the labels; 1 in the other rows."""
