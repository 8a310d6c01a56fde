"""The outer optimizer: clipping, schedule, what decays, and levels at their own periods."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nested_jax.models import LanguageModel, preset, preset_names
from nested_jax.optim.m3 import scale_by_m3
from nested_jax.optim.muon import scale_by_muon
from nested_jax.training.config import TrainConfig
from nested_jax.training.optimizer import clip_by_global_norm, decay_mask, global_norm, make_optimizer, matrix_labels, warmup_cosine

CONFIG = TrainConfig(steps=100, warmup_steps=10, batch_size=2, sequence_length=8, learning_rate=1e-2)


@pytest.mark.parametrize('scale', [1e-3, 1.0, 1e3])
def test_clipping_agrees_with_optax_away_from_zero(scale):
    tree = {'a': scale * jnp.arange(3.0), 'b': scale * jnp.ones((2, 2))}
    ours, _ = clip_by_global_norm(1.0).update(tree, optax.EmptyState())
    theirs, _ = optax.clip_by_global_norm(1.0).update(tree, optax.EmptyState())
    for name in tree:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-6)


def test_derivative_of_clipping_at_zero_is_the_identity():
    def clipped_sum(clip):
        return lambda x: jnp.sum(clip.update({'x': x}, optax.EmptyState())[0]['x'])

    gradient = jax.grad(clipped_sum(clip_by_global_norm(0.5)))(jnp.zeros(3))
    np.testing.assert_array_equal(gradient, np.ones(3, np.float32))
    assert float(global_norm({})) == 0.0
    assert np.isnan(global_norm(jnp.asarray([1.0, jnp.nan]))) and np.isinf(global_norm(jnp.asarray([1.0, jnp.inf])))


def test_outer_gradient_through_a_clipped_inner_step_with_no_gradient_is_finite():
    """The case optax's clipping answers with NaN: an inner loss that is flat."""

    def outer(x, clip):
        inner = jax.grad(lambda y: 0.0 * jnp.sum(y**2))(x)
        updates, _ = clip.update(inner, optax.EmptyState())
        return jnp.sum((x - updates) ** 2)

    x = jnp.array([1.0, 2.0])
    np.testing.assert_allclose(jax.grad(outer)(x, clip_by_global_norm(1.0)), 2 * x)


def test_clip_norm_must_be_positive():
    with pytest.raises(ValueError, match='max_norm is 0'):
        clip_by_global_norm(0)


def test_schedule_warms_up_and_ends_at_a_tenth():
    rates = np.array([float(warmup_cosine(CONFIG)(step)) for step in range(101)])
    np.testing.assert_allclose(rates[0], 1e-3, rtol=1e-5)
    np.testing.assert_allclose(rates[10], 1e-2, rtol=1e-5)
    np.testing.assert_allclose(rates[100], 1e-3, rtol=1e-5)
    assert (np.diff(rates[:11]) > 0).all() and (np.diff(rates[10:]) < 0).all()
    none = TrainConfig(steps=5, warmup_steps=0, learning_rate=1e-2)
    np.testing.assert_allclose(float(warmup_cosine(none)(0)), 1e-2, rtol=1e-6)


def test_decay_mask_holds_projections_only():
    leaf = jnp.zeros((2, 3))
    params = {
        'embedding': leaf,
        'head': leaf,
        'blocks': {
            'mixer': {
                'block': {
                    'query': {'kernel': leaf},
                    'query_convolution': {'kernel': leaf},
                    'gate_logits': {'kernel': leaf},
                    'gate_bias': leaf,
                    'norm': {'scale': leaf},
                },
                'beta_gate': {'kernel': leaf, 'bias': leaf},
                'initial_memory': leaf,
                'initial_k': {'kernel': leaf},
            },
            'channel': {'level_0': {'gate': {'kernel': leaf}, 'down': {'kernel': leaf}, 'norm': {'scale': leaf}}},
        },
    }
    marked = {jax.tree_util.keystr(path, simple=True, separator='/') for path, on in jax.tree.leaves_with_path(decay_mask(params)) if on}
    assert marked == {
        'head',
        'blocks/mixer/block/query/kernel',
        'blocks/channel/level_0/gate/kernel',
        'blocks/channel/level_0/down/kernel',
    }


def test_matrices_are_the_projections_that_decay():
    """In all families, none of them a vector, a gate, a memory or the head."""
    for name in (name for name in preset_names() if name.endswith('-tiny')):
        model = LanguageModel(preset(name))
        params = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, model.config.grid), jnp.int32))['params']
        labels, decays = (jax.tree.leaves_with_path(tree) for tree in (matrix_labels(params), decay_mask(params)))
        paths = [jax.tree_util.keystr(path, simple=True, separator='/') for path, _ in labels]
        matrices = {path for path, (_, label) in zip(paths, labels, strict=True) if label == 'matrix'}
        assert matrices == {path for path, (_, on) in zip(paths, decays, strict=True) if on} - {'head'}
        assert matrices, name


@pytest.mark.parametrize('name', ['muon', 'm3'])
def test_matrices_go_to_the_chosen_optimizer_and_the_rest_to_adam(name):
    config = dataclasses.replace(CONFIG, optimizer=name, slow_period=2 if name == 'm3' else 100, clip_norm=1e9)
    params = {'blocks': {'query': {'kernel': jax.random.normal(jax.random.key(0), (2, 4, 6))}}, 'head': jnp.ones((4, 3))}
    gradients = [jax.tree.map(lambda p, key=key: jax.random.normal(key, p.shape), params) for key in jax.random.split(jax.random.key(1), 5)]
    rate, decay = optax.scale_by_learning_rate(warmup_cosine(config)), optax.add_decayed_weights(config.weight_decay)
    rules = {'muon': scale_by_muon(scaling='moonshot'), 'm3': scale_by_m3(periods=(2,), scaling='rms')}
    matrix = optax.chain(rules[name], decay, rate)
    expected = _run(matrix, params['blocks'], [gradient['blocks'] for gradient in gradients])[-1]
    adam = optax.chain(optax.scale_by_adam(b1=config.beta1, b2=config.beta2), decay, rate)
    head = _run(adam, params['head'], [gradient['head'] for gradient in gradients])[-1]
    found = _run(make_optimizer(config), params, gradients)[-1]
    np.testing.assert_allclose(found['blocks']['query']['kernel'], expected['query']['kernel'], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(found['head'], head, rtol=1e-6)


def _level_params():
    levels = {f'level_{i}': {'up': {'kernel': jnp.full((2, 2), 1.0 + i)}} for i in range(3)}
    return {'blocks': {'channel': levels}, 'head': jnp.ones((2, 2))}


def _run(optimizer, params, gradients):
    update = jax.jit(optimizer.update)
    state, history = optimizer.init(params), [params]
    for gradient in gradients:
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        history.append(params)
    return history


def test_levels_move_at_their_periods_and_only_then():
    # 16 tokens a step: periods of 16, 48 and 20 tokens are 1, 3 and (rounded up) 2 steps.
    optimizer = make_optimizer(CONFIG, {'level_0': 16, 'level_1': 48, 'level_2': 20})
    params = _level_params()
    keys = jax.random.split(jax.random.key(0), 7)
    gradients = [jax.tree.map(lambda p, key=key: jax.random.normal(key, p.shape), params) for key in keys]
    history = _run(optimizer, params, gradients)
    for name, period in (('level_0', 1), ('level_1', 3), ('level_2', 2)):
        weights = [step['blocks']['channel'][name]['up']['kernel'] for step in history]
        moved = [step for step in range(1, 8) if not np.array_equal(weights[step - 1], weights[step])]
        assert moved == [step for step in range(1, 8) if step % period == 0], name


def test_slow_level_follows_the_schedule_of_the_global_step():
    """Adam's first update is the sign of the gradient times the rate, so a level that moves first at step 3 shows the rate of step 3."""
    config = TrainConfig(steps=100, warmup_steps=10, batch_size=2, sequence_length=8, learning_rate=1e-2, weight_decay=0.0)
    params = _level_params()
    gradients = [jax.tree.map(jnp.ones_like, params)] * 3
    history = _run(make_optimizer(config, {'level_1': 48}), params, gradients)
    move = history[3]['blocks']['channel']['level_1']['up']['kernel'] - history[0]['blocks']['channel']['level_1']['up']['kernel']
    np.testing.assert_allclose(move, -float(warmup_cosine(config)(2)) * np.ones((2, 2)), rtol=1e-4)


def test_periods_of_a_step_change_nothing():
    params = _level_params()
    gradients = [jax.tree.map(lambda p: p / 3, params)] * 4
    plain = _run(make_optimizer(CONFIG), params, gradients)
    levels = _run(make_optimizer(CONFIG, {'level_0': 1, 'level_1': 16}), params, gradients)
    jax.tree.map(np.testing.assert_array_equal, plain[-1], levels[-1])


@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
def test_nested_levels_start_anew_from_what_the_slower_period_learns(optimizer):
    """Levels of 1, 2 and 5 steps: the fastest starts anew every 2 steps, the middle one after its three updates within 5 steps."""
    # The clipping of initial states and their decay see these alone: left out here, they are those of levels of the slower periods.
    alone = dict(clip_norm=1e9, weight_decay=0.0)
    config = TrainConfig(steps=10, warmup_steps=2, batch_size=2, sequence_length=8, optimizer=optimizer, **alone)
    params, periods = _level_params(), {'level_0': 16, 'level_1': 32, 'level_2': 80}
    gradients = [jax.tree.map(lambda p, key=key: jax.random.normal(key, p.shape), params) for key in jax.random.split(jax.random.key(0), 7)]
    found = _run(make_optimizer(config, periods, nested_levels=True), params, gradients)
    plain = _run(make_optimizer(config, periods), params, gradients)
    learned = _run(make_optimizer(config, {'level_0': 32, 'level_1': 80}), params, gradients)
    kernel = lambda history, step, name: history[step]['blocks']['channel'][name]['up']['kernel']
    same = lambda a, b: bool(jnp.allclose(a, b, rtol=0, atol=1e-6))
    assert all(same(kernel(found, step, 'level_2'), kernel(plain, step, 'level_2')) for step in range(8))
    assert all(same(found[step]['head'], plain[step]['head']) for step in range(8))
    for name, restarts in (('level_0', (2, 4, 6)), ('level_1', (6,))):
        for step in range(1, 8):
            assert same(kernel(found, step, name), kernel(learned, step, name)) or step not in restarts, (name, step)
            assert same(kernel(found, step, name), kernel(plain, step, name)) == (step < restarts[0]), (name, step)


@pytest.mark.parametrize('periods', [{'level_0': 16}, {'level_0': 8, 'level_1': 16}, {}])
def test_nested_levels_need_periods_that_ascend(periods):
    with pytest.raises(ValueError, match='level_periods is .*, allowed is two periods or more that ascend in steps of 16 tokens'):
        make_optimizer(CONFIG, periods, nested_levels=True)
