"""Leaves as matrices, the stable solve, quotients and roots at zero."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from nested_jax.optim.matrices import as_matrix, divide, matrix_shape, resolvent, root, root_mean_square

SHAPES = [((4, 3), (3, 2)), ((2, 5), (5, 4)), ((3, 3), (3, 1)), ((2, 4, 3), (2, 3, 5)), ((2, 1, 3), (2, 3, 3))]


def draw(*shapes, seed=0):
    generator = np.random.default_rng(seed)
    return [jnp.asarray(generator.normal(size=shape)) for shape in shapes]


@pytest.mark.parametrize(('keys_shape', 'values_shape'), SHAPES)
def test_resolvent_solves_the_normal_equations(x64, keys_shape, values_shape):
    keys, values = draw(keys_shape, values_shape)
    system = np.eye(keys_shape[-1]) + 0.7 * np.einsum('...ni,...nj->...ij', keys, keys)
    np.testing.assert_allclose(resolvent(keys, values, 0.7), np.linalg.solve(system, values), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(('keys_shape', 'values_shape'), SHAPES)
@pytest.mark.parametrize('scale', [1e12, *(pytest.param(scale, marks=pytest.mark.slow) for scale in (1e-6, 1.0, 1e6))])
def test_resolvent_is_a_contraction_in_float32(keys_shape, values_shape, scale):
    keys, values = (leaf.astype(jnp.float32) for leaf in draw(keys_shape, values_shape))
    for _ in range(5):
        shrunk = resolvent(scale * keys, values, 0.5)
        assert jnp.linalg.norm(shrunk) <= jnp.linalg.norm(values) * (1 + 1e-6)
        values = shrunk


@pytest.mark.parametrize(('keys_shape', 'values_shape'), SHAPES[:2])
def test_resolvent_derivatives(x64, keys_shape, values_shape):
    keys, values = draw(keys_shape, values_shape)
    check_grads(resolvent, (keys, values, jnp.asarray(0.3)), order=1, modes=('fwd', 'rev'), rtol=1e-5)
    zero = jax.grad(lambda *args: resolvent(*args).sum(), (0, 1, 2))(0 * keys, values, 0.0)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(zero))


def test_leaves_as_matrices():
    for shape, expected in (((), (1, 1)), ((3,), (1, 3)), ((2, 3), (2, 3)), ((4, 2, 3), (4, 2, 3))):
        assert as_matrix(jnp.zeros(shape)).shape == matrix_shape(jax.ShapeDtypeStruct(shape, jnp.float32)) == expected


def test_quotients_and_roots_at_zero():
    zero = jnp.zeros((2, 2))
    assert float(root(jnp.zeros(()))) == float(jax.grad(root)(0.0)) == 0
    assert float(jax.grad(lambda x: root_mean_square(x).sum())(zero).sum()) == 0
    assert float(jax.grad(lambda x: divide(x, x).sum())(zero).sum()) == 0
    np.testing.assert_allclose(root_mean_square(jnp.array([[3.0, 4.0]])), [[np.sqrt(12.5)]], rtol=1e-6)
