"""One optimizer step: against a step written out, under accumulation, donation, devices and compilation."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nested_jax.training.state import TrainState, init_state, step_key
from nested_jax.training.step import make_eval_step, make_train_step, microbatches

ROWS, LENGTH = 8, 6


def linear_loss(params, batch):
    """Weighted squared error of a linear map, in the shape of a language model's loss."""
    error = jnp.square(batch['tokens'] @ params['kernel'] - batch['targets'])
    return jnp.sum(error * batch['weights']), jnp.sum(batch['weights'])


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    weights = (rng.random((ROWS, 2)) < 0.7).astype(np.float32)
    tokens, targets = (rng.normal(size=(ROWS, size)).astype(np.float32) for size in (LENGTH, 2))
    return dict(tokens=tokens, targets=targets, weights=weights)


def initial(optimizer, sharding=None):
    init = lambda key: {'kernel': jax.random.normal(key, (LENGTH, 2))}
    return init_state(init, optimizer, 3, sharding)


def test_step_is_gradient_of_the_mean_over_targets(batch):
    optimizer = optax.sgd(0.1)
    state = initial(optimizer)
    kernel = np.asarray(state.params['kernel'], np.float64)
    error = (batch['tokens'] @ kernel - batch['targets']) * batch['weights']
    count = batch['weights'].sum()
    gradient = 2 * batch['tokens'].T @ error / count
    new, metrics = make_train_step(linear_loss, optimizer)(state, batch)
    np.testing.assert_allclose(new.params['kernel'], kernel - 0.1 * gradient, atol=1e-6)
    np.testing.assert_allclose(metrics['loss'], (error**2).sum() / count, rtol=1e-6)
    np.testing.assert_allclose(metrics['grad_norm'], np.sqrt((gradient**2).sum()), rtol=1e-6)
    assert metrics['tokens'] == count and int(new.step) == 1


@pytest.mark.parametrize('accumulation', [2, 4, 8])
def test_accumulation_gives_the_step_of_the_whole_batch(batch, accumulation):
    """Rows have different numbers of targets, so a mean of means would differ."""
    optimizer = optax.adam(0.1)
    whole, expected = make_train_step(linear_loss, optimizer)(initial(optimizer), batch)
    parts, metrics = jax.jit(make_train_step(linear_loss, optimizer, accumulation))(initial(optimizer), batch)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6), metrics, expected)
    np.testing.assert_allclose(parts.params['kernel'], whole.params['kernel'], rtol=1e-5)


def test_microbatches_hold_every_row_once():
    rows = jnp.arange(8)[:, None]
    parts = microbatches({'tokens': rows}, 2)['tokens']
    assert parts.shape == (2, 4, 1)
    np.testing.assert_array_equal(parts[0, :, 0], [0, 2, 4, 6])
    np.testing.assert_array_equal(parts[1, :, 0], [1, 3, 5, 7])


def test_batch_without_targets_changes_no_parameter(batch):
    optimizer = optax.sgd(0.1)
    state = initial(optimizer)
    new, metrics = make_train_step(linear_loss, optimizer)(state, batch | {'weights': jnp.zeros((ROWS, 2))})
    np.testing.assert_array_equal(new.params['kernel'], state.params['kernel'])
    assert metrics['loss'] == 0 and metrics['tokens'] == 0


@pytest.mark.parametrize('accumulation', [1, 2])
def test_a_loss_that_takes_a_key_gets_another_one_each_step_and_microbatch(batch, accumulation):
    """Each microbatch marks half of 64 places. Of one key for several, marks would be all or none, or those of the step before."""

    def loss(params, batch, key=None):
        return jnp.sum(params['kernel'] * jax.random.bernoulli(key, 0.5, (64,))), jnp.ones(())

    optimizer = optax.sgd(1.0)
    step, state = jax.jit(make_train_step(loss, optimizer, accumulation)), init_state(lambda _: {'kernel': jnp.zeros(64)}, optimizer, 3)
    marks = []
    for _ in range(2):
        new, _ = step(state, batch)
        np.testing.assert_array_equal(step(state, batch)[0].params['kernel'], new.params['kernel'])
        marks.append((state.params['kernel'] - new.params['kernel']) * accumulation)
        state = new
    for found in marks:
        assert set(np.asarray(found).tolist()) == set(range(accumulation + 1))
    assert 10 < np.sum(marks[0] != marks[1]) < 54


def test_donated_step_equals_the_plain_one(batch):
    optimizer = optax.adam(0.1)
    step = make_train_step(linear_loss, optimizer, 2)
    plain, _ = jax.jit(step)(initial(optimizer), batch)
    donated, _ = jax.jit(step, donate_argnums=0)(initial(optimizer), batch)
    np.testing.assert_array_equal(plain.params['kernel'], donated.params['kernel'])


def test_sharded_step_equals_the_single_device_one(batch):
    optimizer = optax.adam(0.1)
    step = make_train_step(linear_loss, optimizer, 2)
    single, expected = jax.jit(step)(initial(optimizer), batch)
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:4]), ('data',))
    whole, rows = (jax.sharding.NamedSharding(mesh, spec) for spec in (jax.P(), jax.P('data')))
    sharded, metrics = jax.jit(step, out_shardings=whole)(initial(optimizer, whole), jax.device_put(batch, rows))
    np.testing.assert_allclose(np.asarray(sharded.params['kernel']), np.asarray(single.params['kernel']), rtol=1e-5)
    np.testing.assert_allclose(float(metrics['loss']), float(expected['loss']), rtol=1e-6)


def test_loop_of_steps_compiles_once(batch):
    traces = []

    def counted(params, batch):
        traces.append(None)
        return linear_loss(params, batch)

    optimizer = optax.adam(0.1)
    step = jax.jit(make_train_step(counted, optimizer, 2), donate_argnums=0)
    state = initial(optimizer)
    for _ in range(4):
        state, _ = step(state, batch)
    assert len(traces) == 1 and int(state.step) == 4


def test_evaluation_step_sums(batch):
    optimizer = optax.sgd(0.1)
    params = initial(optimizer).params
    nats, count = make_eval_step(linear_loss)(params, batch)
    parts = [{name: rows[part] for name, rows in batch.items()} for part in (slice(0, 3), slice(3, 8))]
    halves = [make_eval_step(linear_loss)(params, part) for part in parts]
    np.testing.assert_allclose(nats, sum(half[0] for half in halves), rtol=1e-6)
    assert count == sum(half[1] for half in halves)


def test_state_is_reproducible_and_its_keys_differ_by_step():
    optimizer = optax.adam(0.1)
    first, second = initial(optimizer), initial(optimizer)
    np.testing.assert_array_equal(first.params['kernel'], second.params['kernel'])
    keys = [jax.random.key_data(step_key(TrainState(jnp.int32(step), None, None, first.key))).tolist() for step in range(3)]
    assert len(set(map(tuple, keys))) == 3
