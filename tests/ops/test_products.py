import jax
import jax.numpy as jnp
import numpy as np

from jaxtransfer.ops import gram, product

ROWS = jax.random.normal(jax.random.key(0), (2, 5, 3))
WEIGHTS = jax.random.normal(jax.random.key(1), (2, 5, 5))  # not symmetric


def of_gram(rows):
    return jnp.sum(WEIGHTS * jnp.sin(gram(rows)))


def of_product(rows):
    return jnp.sum(WEIGHTS * jnp.sin(product(rows, rows.mT)))


def dots(function):
    return str(jax.make_jaxpr(function)(ROWS)).count("dot_general[")


def test_gram_is_the_product_with_itself_and_so_are_its_derivatives():
    np.testing.assert_array_equal(gram(ROWS), product(ROWS, ROWS.mT))
    for derive in (jax.grad, jax.jacfwd, jax.hessian):
        np.testing.assert_allclose(
            derive(of_gram)(ROWS), derive(of_product)(ROWS), rtol=1e-5, atol=1e-5
        )


def test_gram_is_differentiated_with_one_product():
    assert dots(jax.grad(of_gram)) == 2  # one of them is that of the value
    assert dots(jax.grad(of_product)) == 3


def test_products_are_in_full_precision():
    for function in (jax.grad(of_gram), jax.grad(of_product)):
        program = str(jax.make_jaxpr(function)(ROWS))
        found = program.count("Precision.HIGHEST")
        assert found == 2 * dots(function)  # of both factors
