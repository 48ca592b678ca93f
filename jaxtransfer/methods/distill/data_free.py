"""Distillation without data: a generator invents what the teacher is sure of."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxtransfer import losses, prng
from jaxtransfer.methods._supervised import added
from jaxtransfer.methods.distill.objective import divergence
from jaxtransfer.methods.distill.student import check_whole, init, of_student
from jaxtransfer.ops.dtypes import number
from jaxtransfer.train import metrics
from jaxtransfer.typing import (
    Batch,
    Frozen,
    Metrics,
    Model,
    ModelState,
    Objective,
    Params,
    Scalar,
    Variables,
)


def with_generator(student: Variables, generator: Variables) -> Variables:
    """Variables of a student and of a generator that is trained with it.

    Args:
        student: of the student network.
        generator: of the generator.

    Returns:
        Variables for :func:`~jaxtransfer.train.init_state`.
    """
    own = init(student)
    return Variables(
        {**own.params, "generator": generator.params},
        {**own.model_state, "generator": generator.model_state},
    )


def data_free_objective(
    student: Model,
    teacher: Model,
    generator: Model,
    *,
    examples: int,
    noise: int = 100,
    tap: str | None = None,
    sure: float = 1.0,
    diverse: float = 5.0,
    active: float = 0.1,
    temperature: float = 1.0,
) -> Objective:
    r"""Distil a teacher on images that a generator makes from noise (DAFL).

    With :math:`x = g(z)`, :math:`z \sim N(0, 1)`, and the teacher's classes
    :math:`p = \mathrm{softmax}(t(x))`, the generator is trained by

    .. math:: L_g = \lambda_s\, \mathrm{CE}(t(x), \arg\max t(x))
              + \lambda_d \sum_c \bar p_c \log \bar p_c - \lambda_a\, |\phi_t(x)|

    (images that the teacher is sure of, of all classes, that move its features), the
    student by :math:`T^2\, \mathrm{KL}` on the same images, through which no gradient
    reaches the generator.

    Args:
        student: network of ``params["student"]``.
        teacher: network of ``frozen["teacher"]``.
        generator: network of ``params["generator"]``, from ``[examples, noise]``.
        examples: images of an update.
        noise: size of z.
        tap: the teacher's layer :math:`\phi_t`; none leaves its part out.
        sure: :math:`\lambda_s \ge 0`.
        diverse: :math:`\lambda_d \ge 0`.
        active: :math:`\lambda_a \ge 0`.
        temperature: :math:`T > 0` of the student's part.

    Returns:
        Objective over any batch, which is not read; variables are those of
        :func:`with_generator`. Its metrics are ``distillation``, ``sure``, ``diverse``
        and, with a tap, ``active``.

    Raises:
        ValueError: ``examples`` or ``noise`` is not positive; (at the first call)
            student and teacher differ in their number of classes, or layers of the
            student are held.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp
        >>> from jaxtransfer.model import from_linen
        >>> net, maker = from_linen(nn.Dense(3)), from_linen(nn.Dense(2))
        >>> x, z, key = jnp.ones((1, 2)), jnp.ones((1, 4)), jax.random.key(0)
        >>> begun = with_generator(net.init(key, x), maker.init(key, z))
        >>> objective = data_free_objective(net, net, maker, examples=8, noise=4)
        >>> loss, (_, measured) = objective(
        ...     begun.params, {"teacher": net.init(key, x)}, begun.model_state, {}, key)
        >>> sorted(measured)
        ['distillation', 'diverse', 'sure']

    References:
        Chen et al., *Data-free learning of student networks*, ICCV 2019.
        Deviation: the weight of the first part is an argument.
    """
    if examples < 1 or noise < 1:
        raise ValueError(f"examples and noise: got {examples} and {noise}; 1 or more")
    sure, diverse, active, temperature = map(
        number, (sure, diverse, active, temperature)
    )

    def value(
        params: Params,
        frozen: Frozen,
        model_state: ModelState,
        batch: Batch,
        key: jax.Array,
    ) -> tuple[Scalar, tuple[ModelState, Metrics]]:
        del batch
        check_whole(params, frozen)
        draw, own_key, student_key = prng.streams(key, "noise", "generator", "student")
        z = jax.random.normal(draw, (examples, noise), jnp.float32)
        made, _, generator_state = generator.apply(
            Variables(params["generator"], model_state["generator"]),
            z,
            train=True,
            key=own_key,
        )
        logits, features, _ = teacher.apply(
            frozen["teacher"], made, taps=() if tap is None else (tap,)
        )
        likeliest = jnp.argmax(logits, axis=-1)
        shares = jnp.mean(jax.nn.softmax(logits), axis=0)
        measured: dict[str, Any] = {
            "sure": metrics.mean(losses.cross_entropy(logits, likeliest)),
            "diverse": jnp.sum(jax.scipy.special.xlogy(shares, shares)),
        }
        addends = [
            sure * metrics.value(measured["sure"]),
            diverse * measured["diverse"],
        ]
        if tap is not None:
            measured["active"] = jnp.mean(jnp.abs(features[tap]))
            addends.append(-active * measured["active"])
        seen = jax.lax.stop_gradient(made)
        guess, _, student_state = student.apply(
            of_student(params, model_state), seen, train=True, key=student_key
        )
        taught = divergence(guess, jax.lax.stop_gradient(logits), temperature)
        measured["distillation"] = taught
        total = added(*addends, metrics.value(taught))
        state = {"student": student_state, "generator": generator_state}
        return total, ({**model_state, **state}, measured)

    return value


__all__ = ["data_free_objective", "with_generator"]
