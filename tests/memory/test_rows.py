import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from nested_jax.memory.rows import normalize, scale_rows, square_norms


@pytest.mark.parametrize('shape', [(5,), (1, 3, 5), (2, 3, 1)])
def test_rows_against_numpy(x64, shape):
    x = np.random.default_rng(0).normal(size=shape)
    factors = np.random.default_rng(1).normal(size=shape[:-1])
    np.testing.assert_allclose(square_norms(x), (x**2).sum(-1), rtol=1e-12)
    np.testing.assert_allclose(scale_rows(x, factors), x * factors[..., None], rtol=1e-12)
    np.testing.assert_allclose(normalize(x), x / np.sqrt((x**2).sum(-1, keepdims=True) + 1e-6), rtol=1e-12)
    check_grads(normalize, (x,), order=2, rtol=1e-6)


def test_normalize_at_zero():
    gradient = jax.grad(lambda x: normalize(x).sum())(jnp.zeros((2, 4)))
    np.testing.assert_array_equal(normalize(jnp.zeros((2, 4))), 0)
    np.testing.assert_allclose(gradient, 1e3, rtol=1e-6)


def test_no_row_sums_in_the_compiled_derivative():
    """The reason the dots are there: no reduction over rows is left for XLA to compile badly."""
    program = jax.jit(jax.grad(lambda x: normalize(x).sum())).lower(jnp.ones((1, 8, 4), jnp.float32)).as_text()
    assert 'dot_general' in program
    assert 'dimensions = [2]' not in program
