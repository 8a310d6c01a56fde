"""The products of small matrices against numpy, and their derivatives, of second order too, against those of plain products."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nested_jax.memory.products import inner, outer, product

CASES = {
    'product': (product, lambda a, b: a @ b, (5, 4), (4, 3)),
    'outer': (outer, lambda a, b: a.swapaxes(-1, -2) @ b, (5, 4), (5, 3)),
    'inner': (inner, lambda a, b: a @ b.swapaxes(-1, -2), (5, 4), (3, 4)),
}


@pytest.mark.parametrize('name', CASES)
def test_products_and_their_derivatives(x64, name):
    function, plain, *shapes = CASES[name]
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=(2, 3, *shape)) for shape in shapes)
    np.testing.assert_allclose(function(jnp.asarray(a), jnp.asarray(b)), plain(a, b), rtol=1e-13, atol=1e-13)

    def slopes(f, a, b):
        return jax.grad(lambda a, b: jnp.sum(jnp.sin(f(a, b))), (0, 1))(a, b)

    def curvature(f):
        first = slopes(f, a, b)
        second = jax.grad(lambda a, b: sum(jnp.sum(jnp.cos(slope)) for slope in slopes(f, a, b)), (0, 1))(a, b)
        return first, second

    got, want = jax.jit(lambda: (curvature(function), curvature(plain)))()
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-11, atol=1e-12), got, want)


def test_the_derivative_of_a_derivative_is_right_through_a_scan_with_checkpoints(x64):
    """As of levels that learn within the sequence beside memories that learn within the chunk."""
    rng = np.random.default_rng(0)
    weight, inputs, rows, way = (jnp.asarray(rng.normal(size=shape) / 4) for shape in ((3, 5), (4, 3), (4, 5), (3, 5)))

    @jax.checkpoint
    def step(weight, _):
        return jnp.tanh(outer(inputs, product(rows, product(jnp.tanh(weight).T, weight))) + weight), None

    inner_loss = lambda weight: jnp.sum(jax.lax.scan(step, weight, None, length=2)[0] ** 2)
    loss = jax.jit(lambda weight: jnp.sum(jnp.sin(jax.grad(inner_loss)(weight))))
    slope = (loss(weight + 1e-6 * way) - loss(weight - 1e-6 * way)) / 2e-6
    np.testing.assert_allclose(jnp.vdot(jax.grad(loss)(weight), way), slope, rtol=1e-6)
