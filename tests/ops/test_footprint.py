import jax
import jax.numpy as jnp

from jaxtransfer.ops.footprint import traced_bytes


def test_it_counts_what_every_operation_writes():
    inputs = jnp.zeros((4, 8))

    def layers(x):
        return jnp.tanh(x) @ jnp.ones((8, 2))

    assert traced_bytes(layers, inputs) == 4 * (4 * 8 + 8 * 2 + 4 * 2)


def test_it_looks_into_loops_and_calls_once():
    inputs = jnp.zeros((4, 8))

    def loop(x):
        step = jax.jit(lambda carry, _: (jnp.sin(carry), None))
        return jax.lax.scan(step, x, length=100)[0]

    assert traced_bytes(loop, inputs) == 4 * 4 * 8


def test_it_takes_tracers_and_keys():
    seen = []

    @jax.jit
    def outer(x, key):
        seen.append(traced_bytes(lambda x, k: x * jax.random.normal(k), x, key))
        return x

    outer(jnp.zeros(3), jax.random.key(0))
    assert seen[0] > 12
