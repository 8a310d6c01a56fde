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
