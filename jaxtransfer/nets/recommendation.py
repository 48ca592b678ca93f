"""Rating prediction from the fields of a user and of an item, in Linen."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxtransfer.nets.vision import MLP
from jaxtransfer.typing import AnyArray


class _Embeddings(nn.Module):
    fields: tuple[int, ...]
    marks: int
    features: int

    @nn.compact
    def __call__(self, inputs: AnyArray) -> jax.Array:
        parts = [
            nn.Embed(size, self.features, name=f"field_{number}")(inputs[:, number])
            for number, size in enumerate(self.fields)
        ]
        if self.marks:
            marks = jnp.asarray(inputs[:, len(self.fields) :], parts[0].dtype)
            total = nn.Dense(self.features, use_bias=False, name="marks")(marks)
            parts.append(total / jnp.maximum(marks.sum(-1, keepdims=True), 1))
        return jnp.concatenate(parts, axis=-1)


class UserPreference(nn.Module):
    """User preference estimator of MeLU: embedded fields, then decision layers.

    Every field of user and item is looked up in a table of its own (``embeddings``);
    what is in several categories at once, such as genres, is the mean of their vectors.
    Fully connected layers (``decision``) make one number of them. In MeLU the decision
    layers adapt to a user and the embeddings are common to all users.

    Attributes:
        fields: number of values of every field, in the order of the inputs' columns.
        marks: number of categories, a column of 0 and 1 for each, after the fields.
        features: width of an embedding.
        widths: hidden decision layers.

    Raises:
        ValueError: (in init) there are no fields.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> net = UserPreference(fields=(2, 7), marks=3, features=4)
        >>> rows = jnp.array([[0, 6, 1, 0, 1], [1, 2, 0, 0, 0]])
        >>> ratings, variables = net.init_with_output(jax.random.key(0), rows)
        >>> ratings.shape, sorted(variables["params"])
        ((2, 1), ['decision', 'embeddings'])

    References:
        Lee et al., *MeLU: Meta-learned user preference estimator for cold-start
        recommendation*, KDD 2019, section 3.1 and figure 2.
    """

    fields: tuple[int, ...]
    marks: int = 0
    features: int = 32
    widths: tuple[int, ...] = (64, 64)

    @nn.compact
    def __call__(self, inputs: AnyArray) -> jax.Array:
        """Map integers ``[rows, fields + marks]`` to ``[rows, 1]``."""
        if not self.fields:
            raise ValueError(
                f"fields: got {self.fields}; give the number of values of one at least"
            )
        x = _Embeddings(self.fields, self.marks, self.features, name="embeddings")(
            inputs
        )
        return MLP(1, self.widths, name="decision")(x)
