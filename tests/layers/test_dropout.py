"""What is dropped and how the rest is scaled; masks by key, and of a stretch of the sequence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nested_jax.layers import sequence
from nested_jax.layers.dropout import dropout, split_key

SHAPE = (8, 16, 32)


@pytest.mark.parametrize('rate', [0.1, 0.75])
def test_a_share_is_zero_and_the_rest_is_scaled(rate):
    found = np.asarray(dropout(jnp.full(SHAPE, 3.0), jax.random.key(0), rate))
    zero = found == 0
    np.testing.assert_allclose(found[~zero], 3.0 / (1 - rate), rtol=1e-6)
    # Within five standard deviations of binomial counts, over all and in each row, at each position and in each channel.
    for axes in ((0, 1, 2), (1, 2), (0, 2), (0, 1)):
        count = np.prod([SHAPE[axis] for axis in axes])
        assert np.abs(zero.mean(axes) - rate).max() < 5 * np.sqrt(rate * (1 - rate) / count)
    rows, positions = zero.reshape(8, -1), zero.swapaxes(0, 1).reshape(16, -1)
    assert len({row.tobytes() for row in rows}) == 8 and len({row.tobytes() for row in positions}) == 16


def test_the_key_alone_decides():
    x = jnp.ones(SHAPE)
    first, again, other = (np.asarray(dropout(x, jax.random.key(seed), 0.5)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert 0.4 < np.mean(first == other) < 0.6
    assert dropout(x, None, 0.5) is x and split_key(None, 2) == (None, None)
    assert dropout(x.astype(jnp.bfloat16), jax.random.key(0), 0.5).dtype == jnp.bfloat16
    np.testing.assert_array_equal(jax.jit(lambda x: dropout(x, jax.random.key(0), 0.5))(x), first)


def test_masks_are_the_same_where_float64_is_the_default(x64):
    wide = dropout(jnp.ones(SHAPE), jax.random.key(0), 0.5)
    jax.config.update('jax_enable_x64', False)
    np.testing.assert_array_equal(wide, dropout(jnp.ones(SHAPE), jax.random.key(0), 0.5))


def test_stretches_of_a_sequence_draw_their_part_of_the_mask():
    def weighted(key, rows):
        return jnp.sum(dropout(rows[0], key, 0.5) * rows[1])

    key, x = jax.random.key(0), jnp.ones(SHAPE)
    gradient = jax.jit(jax.grad(lambda x, key, y: sequence.split(weighted, key, (x, y), grid=1)))
    mesh = jax.make_mesh((2, 4), ('data', 'sequence'), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        found = gradient(jax.device_put(x, jax.NamedSharding(mesh, jax.P('data'))), key, x)
    np.testing.assert_array_equal(found, dropout(x, key, 0.5))
