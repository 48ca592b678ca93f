"""Augmentation that can be drawn again: a student sees what its cached teacher saw."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Integer, Key

from jaxtransfer.typing import AnyArray, Inputs

Augment = Callable[[jax.Array, Any], Any]
"""``(key, inputs of one example) -> inputs``, pure and traceable."""

Variant = int | np.integer | Integer[AnyArray, ""] | Integer[AnyArray, " batch"]
"""Which variant: one of all examples of a batch, or one an example."""

_PROBED = 4


def variant_key(
    key: Key[Array, ""],
    index: int | Integer[AnyArray, ""],
    variant: int | Integer[AnyArray, ""],
) -> Key[Array, ""]:
    """The key of one variant of one example, whatever batch it comes in.

    ``fold_in(fold_in(key, index), variant)``

    Args:
        key: typed key of the augmentation.
        index: place of the example in the data set.
        variant: which of its variants.

    Returns:
        A typed key.

    Example:
        >>> import jax
        >>> key = jax.random.key(0)
        >>> bool(variant_key(key, 3, 1) == variant_key(key, 3, 1))
        True
        >>> bool(variant_key(key, 3, 1) == variant_key(key, 1, 3))
        False
    """
    return jax.random.fold_in(jax.random.fold_in(key, index), variant)


@dataclasses.dataclass(frozen=True, eq=False)
class Augmentation:
    """A number of random variants of every example, each a function of its place.

    Called on the inputs of some examples, with their places in the data set and the
    variant, it gives the same pixels in every batch and every run: it is given to
    :func:`~jaxtransfer.methods.distill.cache_teacher` and called again in training.

    Attributes:
        augment: ``(key, inputs of one example) -> inputs``; None changes nothing.
        key: typed key, needed with ``augment``.
        variants: how many variants an example has, ≥ 1.
        name: what errors call it; by default the function's own name.

    Raises:
        ValueError: fewer than one variant, or several of nothing.
        TypeError: an ``augment`` without a typed key.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> def flip(key, image):
        ...     return jnp.where(jax.random.bernoulli(key), image[:, ::-1], image)
        >>> augmentation = Augmentation(flip, key=jax.random.key(0), variants=4)
        >>> images = jnp.arange(24.0).reshape(3, 2, 4, 1)
        >>> places = jnp.array([2, 0])
        >>> batch = augmentation(images[places], places, variant=1)
        >>> alone = augmentation(images[:1], jnp.array([0]), variant=1)
        >>> bool((batch[1] == alone[0]).all())
        True
    """

    augment: Augment | None = None
    _: dataclasses.KW_ONLY
    key: jax.Array | None = None
    variants: int = 1
    name: str = ""

    def __post_init__(self):
        if self.variants < 1:
            raise ValueError(f"variants: got {self.variants}; it must be at least 1")
        if self.augment is None:
            if self.variants > 1:
                raise ValueError(
                    f"variants: got {self.variants} without an augment, so that all "
                    "were equal; give augment=, or leave variants out"
                )
            object.__setattr__(self, "name", self.name or "none")
            return
        if self.key is None or not jax.dtypes.issubdtype(
            self.key.dtype, jax.dtypes.prng_key
        ):
            raise TypeError(
                "key: an augmentation is drawn from a typed key; give "
                "key=jax.random.key(seed)"
            )
        own = getattr(self.augment, "__name__", type(self.augment).__name__)
        object.__setattr__(self, "name", self.name or own)

    def __call__(
        self, inputs: Inputs, indices: Integer[AnyArray, " batch"], variant: Variant = 0
    ) -> Any:
        """The inputs of some examples, as the teacher saw them.

        Args:
            inputs: pytree of ``[batch, ...]``, as in the data set.
            indices: places of these examples in the data set.
            variant: one for all or one an example, ``0 … variants - 1``.

        Returns:
            What ``augment`` makes of them, ``[batch, ...]``.
        """
        if self.augment is None or self.key is None:
            return inputs
        indices = jnp.asarray(indices)
        variants = jnp.broadcast_to(jnp.asarray(variant), indices.shape)
        keys = jax.vmap(variant_key, (None, 0, 0))(self.key, indices, variants)
        return jax.vmap(self.augment)(keys, inputs)

    def variant(self, epoch: Any) -> Any:
        """The variant of an epoch, ``epoch % variants``; of numbers or traced."""
        return epoch % self.variants

    def describe(self, examples: Inputs = None) -> dict[str, Any]:
        """What tells it from another, for a manifest.

        Args:
            examples: of the data set; if given, a few numbers made of what becomes of
                the first ones are added, so that a change of the function shows.
        """
        key = None
        if self.augment is not None and self.key is not None:
            data = np.asarray(jax.random.key_data(self.key))
            key = [str(jax.random.key_impl(self.key)), *map(int, data.ravel())]
        found = {"name": self.name, "variants": self.variants, "key": key}
        if examples is not None:
            found["probe"] = self._probe(examples)
        return found

    def _probe(self, examples: Inputs) -> list[float]:
        """A weighted sum of the pixels of a few variants of the first examples."""
        if self.augment is None:
            return []
        number = len(jax.tree.leaves(examples)[0])
        places = np.arange(min(_PROBED, number))
        first = jax.tree.map(lambda leaf: np.asarray(leaf[places]), examples)
        sums = []
        for variant in range(min(_PROBED, self.variants)):
            changed = jax.jit(self)(first, places, np.int32(variant))
            total = np.zeros(len(places))
            for leaf in jax.tree.leaves(changed):
                rows = np.asarray(leaf, np.float64).reshape(len(places), -1)
                total += rows @ np.cos(np.arange(rows.shape[1]))
            sums += total.tolist()
        return sums


__all__ = ["Augment", "Augmentation", "Variant", "variant_key"]
