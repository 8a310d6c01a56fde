"""Guarded steps: what is not kept changes nothing, to the bit, on all devices alike."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nested_jax.memory.matrix import delta_rule
from nested_jax.optim.levels import by_level
from nested_jax.training.guard import ENOUGH, WINDOW, DivergedError, Skips, guard_from_json, guard_to_json, guarded, init_guard
from nested_jax.training.state import init_state
from nested_jax.training.step import make_train_step

ROWS, LENGTH = 8, 6


def linear_loss(params, batch):
    """Squared error of a sum of two linear maps; the root's derivative at zero is infinite, its value is not."""
    error = jnp.square(batch['tokens'] @ (params['level_0'] + params['level_1']) - batch['targets'])
    return jnp.sum(error) + jnp.sum(jnp.sqrt(batch['root'] * params['level_0'][0, 0] ** 2)), jnp.float32(error.size)


def clean_batch(seed=0):
    rng = np.random.default_rng(seed)
    tokens, targets = (rng.normal(size=(ROWS, size)).astype(np.float32) for size in (LENGTH, 2))
    return dict(tokens=tokens, targets=targets, root=np.ones(ROWS, np.float32))


def poisoned(kind):
    batch = clean_batch()
    if kind == 'gradient':
        batch['root'] = np.zeros(ROWS, np.float32)  # the loss is finite
        return batch
    batch['tokens'][5, 2] = dict(nan=np.nan, inf=np.inf)[kind]
    return batch


def optimizer():
    """AdamW with a schedule, its slow level updated every second step."""
    slow = by_level(optax.adamw(1e-2), lambda path: 2 if 'level_1' in path else 1)
    return optax.chain(slow, optax.scale_by_schedule(lambda count: 1.0 / (1 + count)))


def initial(sharding=None):
    init = lambda key: {f'level_{n}': jax.random.normal(jax.random.fold_in(key, n), (LENGTH, 2)) for n in range(2)}
    return init_state(init, optimizer(), 3, sharding)


def raw(tree):
    data = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    return [np.asarray(data(leaf)) for leaf in jax.tree.leaves(tree)]


def assert_same(left, right):
    for a, b in zip(raw(left), raw(right), strict=True):
        np.testing.assert_array_equal(a, b, strict=True)


def compiled(sigma=None):
    return jax.jit(guarded(make_train_step(linear_loss, optimizer()), sigma))


def after(step, batches):
    """The states after the batches, and the metrics of each."""
    state, guard, seen = initial(), init_guard(), []
    for batch in batches:
        state, (metrics, guard) = step(state, batch, guard)
        seen.append(metrics)
    return state, guard, seen


def test_kept_steps_are_the_plain_ones():
    plain = jax.jit(make_train_step(linear_loss, optimizer()))
    state = initial()
    for seed in range(3):
        state, _ = plain(state, clean_batch(seed))
    guarded_state, guard, seen = after(compiled(), [clean_batch(seed) for seed in range(3)])
    # The guard makes another program, whose products and sums are fused differently: the same numbers but for the last bit.
    for a, b in zip(raw(guarded_state), raw(state), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-9)
    assert int(guard.recorded) == 3 and not int(guard.skipped)
    np.testing.assert_array_equal(guard.losses[:3], [metrics['loss'] for metrics in seen])


@pytest.mark.parametrize('kind', ['nan', 'inf', 'gradient'])
def test_what_is_not_finite_changes_nothing_but_the_step(kind):
    """N1. After one step and after two: the slow level has a sum half collected, then none."""
    step = compiled()
    for done in (1, 2):
        batches = [clean_batch(seed) for seed in range(done)]
        before, guard, _ = after(step, batches)
        state, new, seen = after(step, [*batches, poisoned(kind)])
        assert np.isfinite(seen[-1]['loss']) == (kind == 'gradient') and not np.isfinite(seen[-1]['grad_norm'])
        assert_same(state._replace(step=before.step), before)
        assert int(state.step) == done + 1
        assert (int(new.skipped), int(new.consecutive), int(seen[-1]['skipped'])) == (1, 1, 1)
        assert_same((new.losses, new.norms, new.recorded), (guard.losses, guard.norms, guard.recorded))


def test_a_memory_that_overflows_within_the_forward_pass_changes_nothing():
    """N1. Nothing that comes in is large: what the memory holds grows by a rate beyond its bound, token by token."""
    rng = np.random.default_rng(0)
    k, v = (jnp.asarray(rng.normal(size=(ROWS, 48, 1, LENGTH)), jnp.float32) for _ in range(2))

    def loss(params, batch):
        key = k @ params['level_0'] @ params['level_1'].T
        key = key / jnp.linalg.norm(key, axis=-1, keepdims=True)
        read, memory = delta_rule(key, key, v, jnp.full(k.shape[:3], batch['beta']), chunk_size=16)
        return jnp.sum(jnp.square(read - v)), jnp.float32(v.size)

    step = jax.jit(guarded(make_train_step(loss, optimizer()), None))
    good, bad = dict(beta=jnp.float32(0.5)), dict(beta=jnp.float32(50.0))
    before, guard, seen = after(step, [good])
    assert np.isfinite(seen[0]['loss']) and not int(guard.skipped)
    state, guard, seen = after(step, [good, bad])
    assert int(guard.skipped) == 1 and not (np.isfinite(seen[1]['loss']) and np.isfinite(seen[1]['grad_norm']))
    assert_same(state._replace(step=before.step), before)


def test_a_kept_step_ends_a_row_of_skips():
    _, guard, seen = after(compiled(), [poisoned('nan'), poisoned('nan'), clean_batch(), poisoned('nan')])
    assert [int(metrics['consecutive']) for metrics in seen] == [1, 2, 0, 1]
    assert int(guard.skipped) == 3


def test_poisoned_optimizer_state_is_found_though_loss_and_gradient_are_finite():
    state = initial()
    spoil = lambda leaf: leaf.at[0].set(jnp.nan) if jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.ndim else leaf
    state = state._replace(opt_state=jax.tree.map(spoil, state.opt_state))
    new, (metrics, _) = compiled()(state, clean_batch(), init_guard())
    assert np.isfinite(metrics['loss']) and np.isfinite(metrics['grad_norm']) and metrics['skipped']
    assert_same(new.params, state.params)


@pytest.mark.parametrize('row', [0, 7])
def test_devices_agree_when_one_of_them_meets_it(row):
    """N4."""
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()), ('data',))
    whole, rows = (jax.sharding.NamedSharding(mesh, spec) for spec in (jax.P(), jax.P('data')))
    step = jax.jit(guarded(make_train_step(linear_loss, optimizer()), None), donate_argnums=0, out_shardings=whole)
    batch = clean_batch()
    batch['tokens'][row] = np.nan
    state = initial(whole)
    before = raw(state)
    new, (metrics, _) = step(state, jax.device_put(batch, rows), jax.device_put(init_guard(), whole))
    assert [bool(shard.data) for shard in metrics['skipped'].addressable_shards] == [True] * 8
    assert_same(new._replace(step=jnp.int32(0)), before)
    for leaf in jax.tree.leaves((new.params, new.opt_state)):
        for shard in leaf.addressable_shards:
            np.testing.assert_array_equal(shard.data, leaf.addressable_shards[0].data)


def values_step(sigma):
    """A guarded step whose loss and gradient norm are the batch's, and whose parameter counts the steps kept."""

    def step(state, batch):
        metrics = dict(loss=batch[0], grad_norm=batch[1])
        return state._replace(step=state.step + 1, params=state.params + 1), metrics

    return jax.jit(guarded(step, sigma))


def run_values(pairs, sigma=6.0):
    step, state, guard, skipped = values_step(sigma), initial()._replace(params=jnp.zeros(())), init_guard(), []
    for pair in pairs:
        state, (metrics, guard) = step(state, jnp.asarray(pair, jnp.float32), guard)
        skipped.append(int(metrics['skipped']))
    return state, guard, skipped


@pytest.mark.parametrize('where', [0, 1])
def test_spikes_against_numpy(where):
    """N2. Losses around 3 and norms around 1000, with a spike just below and one just above the bound, in each of them."""
    rng = np.random.default_rng(1)
    values = np.stack([3 + 0.1 * rng.normal(size=200), 1000 + rng.normal(size=200)], 1).astype(np.float32)
    bound = lambda past: past[-WINDOW:].mean(dtype=np.float64) + 6 * past[-WINDOW:].std(dtype=np.float64)
    for place, share in ((150, 0.99), (170, 1.01)):
        past = values[:place, where]
        values[place, where] = past[-WINDOW:].mean() + share * (bound(past) - past[-WINDOW:].mean())
    expected = [
        int(n >= ENOUGH and any(value > bound(past) for value, past in zip(values[n], values[:n].T, strict=True))) for n in range(200)
    ]
    state, guard, skipped = run_values(values)
    assert skipped == expected and sum(skipped) == 1 and skipped[170]
    assert float(state.params) == 199 and int(guard.recorded) == 200
    np.testing.assert_array_equal(np.sort(guard.losses), np.sort(values[-WINDOW:, 0]))


def test_nothing_is_a_spike_before_enough_values_or_without_being_asked():
    """N2."""
    quiet = [(1 + 0.01 * (n % 2), 1.0) for n in range(ENOUGH)]
    assert run_values([*quiet[1:], (100.0, 1.0)])[2][-1] == 0
    assert run_values([*quiet, (100.0, 1.0)])[2][-1] == 1
    assert run_values([*quiet, (100.0, 1.0)], sigma=None)[2][-1] == 0


def test_values_that_are_not_finite_do_not_enter_the_window():
    quiet = [(1 + 0.01 * (n % 2), 1.0) for n in range(ENOUGH)]
    assert run_values([*quiet, (np.nan, 1.0), (1.0, np.inf), (1.0, 1.0), (100.0, 1.0)])[2][-4:] == [1, 1, 0, 1]


def test_state_survives_json_to_the_bit():
    _, guard, _ = run_values(np.random.default_rng(0).normal(size=(150, 2)))
    assert_same(guard_from_json(json.loads(json.dumps(guard_to_json(guard)))), guard)


def test_sigma_must_be_positive():
    with pytest.raises(ValueError, match='spike_sigma is -1'):
        guarded(make_train_step(linear_loss, optimizer()), -1)


def test_batches_passed_over_add_up():
    """Twice back to a checkpoint that knows of neither, then on from one that was saved after them."""
    skips = Skips(3)
    skips.go_back(7, 4, 0)
    assert skips.passed_over == [[4, 7]] and skips.num_passed_over == 3
    ahead = skips.num_passed_over
    skips.load(None)
    skips.go_back(7, 4, ahead)
    assert skips.passed_over == [[4, 10]]  # steps 5 to 7 read batches 4 to 6, then 7 to 9
    saved = json.loads(json.dumps(skips.to_json()))
    skips.load(saved)
    skips.go_back(12, 8, 6)
    assert skips.passed_over == [[4, 10], [14, 18]] and skips.num_passed_over == 10
    for last in (False, True):
        skips.load(saved)
        if last:
            with pytest.raises(DivergedError, match='went back to step 8 three times'):
                skips.go_back(12, 8, 6)
        else:
            skips.go_back(12, 8, 6)
