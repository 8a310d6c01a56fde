"""Nested levels across steps: against a loop in NumPy, identity 26, and what trainers need of the state."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nested_jax.optim import by_level, nested
from tests.optim.test_levels import make_gradients, run

RESTARTS = {'fast': 4, 'slow': 0}


def make_params(dtype=jnp.float64):
    draw = np.random.default_rng(0).normal
    return {name: {'w': jnp.asarray(draw(size=(3, 2)), dtype), 'b': jnp.asarray(draw(size=2), dtype)} for name in RESTARTS}


def test_equals_a_loop_over_steps_in_numpy(x64):
    """Eq. 71 for the level, the same with the slower level's period for its initial state, Eq. 72."""
    params, steps, period, every, rate, slow_rate = make_params(), 11, 2, 4, 0.1, 0.03
    gradients = make_gradients(steps, params)
    optimizer = nested(by_level(optax.sgd(rate), {'fast': period, 'slow': 1}), by_level(optax.sgd(slow_rate), every), RESTARTS)
    history, _ = run(optimizer, params, gradients)
    plain, _ = run(by_level(optax.sgd(rate), {'fast': period, 'slow': 1}), params, gradients)
    jax.tree.map(np.testing.assert_array_equal, history['slow'], plain['slow'])
    for name, leaf in params['fast'].items():
        weight, start, taken = np.asarray(leaf), np.asarray(leaf), np.asarray(gradients['fast'][name])
        for step in range(1, steps + 1):
            if step % period == 0:
                weight = weight - rate * taken[step - period : step].sum(0)
            if step % every == 0:
                start = start - slow_rate * taken[step - every : step].sum(0)
                weight = start
            np.testing.assert_allclose(history['fast'][name][step - 1], weight, rtol=0, atol=1e-14)


def test_returns_to_an_initial_state_that_nothing_moves(x64):
    """Identity 26: exactly theta_0 after the slower level's context, as a sequential level does not."""
    params = make_params()
    gradients = make_gradients(8, params)
    history, state = run(nested(optax.adam(0.1), optax.set_to_zero(), RESTARTS), params, gradients)
    sequential, _ = run(optax.adam(0.1), params, gradients)
    for name, leaf in params['fast'].items():
        np.testing.assert_array_equal(state.initial['fast'][name], leaf)
        for step in range(8):
            back = np.abs(np.asarray(history['fast'][name][step] - leaf)).max()
            assert back < 1e-15 if step % 4 == 3 else back > 1e-3
            assert float(jnp.abs(sequential['fast'][name][step] - leaf).max()) > 1e-3


def test_the_initial_state_is_another_buffer_and_may_be_abstract():
    params = make_params(jnp.float32)
    optimizer = nested(optax.adam(0.1), optax.adam(0.1), lambda path: 4 if path.startswith('fast') else 0)
    state = optimizer.init(params)
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
    assert jax.tree.map(jax.typeof, optimizer.init(abstract)) == jax.tree.map(jax.typeof, state)
    assert jax.tree.leaves(state.initial['slow']) == []
    step = jax.jit(lambda params, state: optimizer.update(params, state, params), donate_argnums=(0, 1))
    updates, state = step(params, state)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves((updates, state)))


def test_state_is_sharded_like_the_parameters():
    mesh = jax.make_mesh((8,), ('data',), axis_types=(jax.sharding.AxisType.Explicit,))
    sharding = jax.sharding.NamedSharding(mesh, jax.P('data', None))
    optimizer = nested(optax.sgd(0.1), optax.adam(0.1), RESTARTS)
    with jax.set_mesh(mesh):
        params = jax.device_put({'fast': jnp.ones((16, 2)), 'slow': jnp.ones((16, 2))}, sharding)
        state = optimizer.init(params)
        updates, after = jax.jit(optimizer.update)(params, state, params)
    matrices = [leaf for leaf in jax.tree.leaves((state, after, updates)) if leaf.ndim == 2]
    assert len(matrices) == 8 and all(leaf.sharding.is_equivalent_to(sharding, 2) for leaf in matrices)


@pytest.mark.parametrize('steps', [-1, 1.5, True])
def test_wrong_restarts_are_named(steps):
    with pytest.raises(ValueError, match=r"restarts at \['fast'\].* allowed is an integer of at least 0"):
        nested(optax.sgd(0.1), optax.sgd(0.1), {'fast': steps, 'slow': 0}).init({'fast': jnp.ones(2), 'slow': jnp.ones(2)})


def test_parameters_are_needed():
    optimizer = nested(optax.sgd(0.1), optax.sgd(0.1), 2)
    with pytest.raises(ValueError, match='params'):
        optimizer.update(jnp.ones(2), optimizer.init(jnp.ones(2)))
