"""A pre-trained Transformer with its MLPs at CMS levels: the same function at first, levels that keep their periods afterwards."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nested_jax.config import InSequenceConfig, LevelConfig
from nested_jax.models.axes import logical_axes
from nested_jax.models.language_model import LanguageModel
from nested_jax.models.level_stacking import stack_levels
from nested_jax.models.loss import model_loss
from nested_jax.models.pretrained import load_pretrained
from nested_jax.models.streaming import init_stream, read
from nested_jax.optim.levels import by_level
from nested_jax.training.config import TrainConfig
from nested_jax.training.optimizer import level_periods, make_optimizer
from nested_jax.training.state import TrainState
from nested_jax.training.step import make_train_step
from tests.models import pretrained_goldens as goldens

FAST, MIDDLE, SLOW = (LevelConfig(96, period) for period in (64, 128, 256))
WIDE = LevelConfig(160, 128)


@pytest.fixture(scope='module')
def pretrained(tmp_path_factory):
    return load_pretrained(goldens.write(tmp_path_factory.mktemp('llama'), 'llama'), max_length=64)


def logits(config, params) -> np.ndarray:
    return np.asarray(
        jax.jit(lambda params, tokens: LanguageModel(config).apply({'params': params}, tokens)[0])(params, goldens.tokens(64))
    )


def assert_same_bits(config, params, other, changed) -> None:
    np.testing.assert_array_equal(logits(other, changed).view(np.int32), logits(config, params).view(np.int32))


@pytest.mark.parametrize(
    ('levels', 'placement', 'aggregation'),
    [
        ((FAST, SLOW), 0, 'chain'),
        ((FAST, WIDE, SLOW), (2, 0), 'chain'),
        ((FAST, SLOW), 1, 'sum'),
        ((FAST, WIDE, SLOW), (2, 0), 'sum'),
    ],
)
def test_the_function_is_the_same_to_the_bit(pretrained, levels, placement, aggregation):
    config, params = pretrained
    stacked, changed = stack_levels(config, params, levels, placement, key=jax.random.key(0), aggregation=aggregation)
    assert stacked == dataclasses.replace(config, levels=levels, aggregation=aggregation)
    shapes = jax.eval_shape(LanguageModel(stacked).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))['params']
    jax.tree.map(lambda leaf, like: np.testing.assert_equal((leaf.shape, leaf.dtype), (like.shape, like.dtype)), changed, shapes)
    logical_axes(changed)
    assert_same_bits(config, params, stacked, changed)


def test_each_mlp_is_at_its_level(pretrained):
    config, params = pretrained
    _, changed = stack_levels(config, params, (FAST, WIDE, SLOW), (2, 0), key=jax.random.key(0))
    channel, old = changed['blocks']['channel'], params['blocks']['channel']['level_0']
    for block, level in enumerate(('level_2', 'level_0')):
        jax.tree.map(lambda leaf, was, at=block: np.testing.assert_array_equal(leaf[at], was[at]), channel[level], old)
    for level, blocks in {'level_0': [0], 'level_1': [0, 1], 'level_2': [1]}.items():
        for block in blocks:
            assert not channel[level]['down']['kernel'][block].any()
            assert channel[level]['gate']['kernel'][block].std() == pytest.approx(64**-0.5, rel=0.1)
    assert np.abs(channel['level_1']['up']['kernel'][0] - channel['level_1']['up']['kernel'][1]).max() > 0.1
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    _, changed = stack_levels(config, half, (FAST, WIDE), 0, key=jax.random.key(0), aggregation='sum')
    assert {leaf.dtype for leaf in jax.tree.leaves(changed)} == {jnp.dtype('bfloat16')}


def batch() -> dict[str, jax.Array]:
    rows = jnp.asarray(np.random.RandomState(3).randint(0, 8, (2, 33)).astype(np.int32))
    return dict(tokens=rows[:, :-1], targets=rows[:, 1:])


def train_step(config, optimizer):
    loss = lambda params, batch: model_loss(LanguageModel(config), params, batch['tokens'], batch['targets'])
    return jax.jit(make_train_step(loss, optimizer))


def begin(params, optimizer) -> TrainState:
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), jax.random.key(0))


@pytest.mark.parametrize('aggregation', ['chain', 'sum'])
def test_training_goes_on_and_levels_keep_their_periods(pretrained, aggregation):
    """The pre-trained MLPs at the slow level, updated every fourth step of 64 tokens; a new fast level learns at once."""
    config, params = stack_levels(*pretrained, (FAST, SLOW), 1, key=jax.random.key(0), aggregation=aggregation)
    train = TrainConfig(steps=8, batch_size=2, sequence_length=32, learning_rate=3e-3, warmup_steps=1)
    optimizer = make_optimizer(train, level_periods(config, train.sequence_length))
    step, state, losses, moved = train_step(config, optimizer), begin(params, optimizer), [], []
    for _ in range(8):
        before = state.params['blocks']
        state, metrics = step(state, batch())
        losses.append(float(metrics['loss']))
        change = jax.tree.map(lambda new, old: bool((new != old).any()), state.params['blocks'], before)
        moved.append({name: any(jax.tree.leaves(change['channel'][name])) for name in ('level_0', 'level_1')})
        assert all(jax.tree.leaves(change['mixer']))
    assert [step['level_1'] for step in moved] == [False, False, False, True] * 2
    assert all(step['level_0'] for step in moved)
    assert losses[-1] < 0.8 * losses[0]
    assert state.params['blocks']['channel']['level_0']['down']['kernel'].any(axis=(1, 2)).all()


def test_zero_learning_rate_keeps_every_bit(pretrained):
    config, params = stack_levels(*pretrained, (FAST, SLOW), (1, 0), key=jax.random.key(0))
    optimizer = by_level(optax.adamw(0.0), lambda path: 2 if 'level_1' in path else 1)
    step, state = train_step(config, optimizer), begin(params, optimizer)
    for _ in range(3):
        state, _ = step(state, batch())
    assert_same_bits(*pretrained, config, state.params)


@pytest.mark.slow
def test_levels_learn_within_a_sequence(pretrained):
    """Reading in chunks of 16 tokens: what the pre-trained model says while nothing is learned, something else when it is."""
    config, params = stack_levels(*pretrained, (LevelConfig(32, 16), LevelConfig(96, 32)), 1, key=jax.random.key(0))
    told = []
    for rate in (0.0, 1e-3):
        model = LanguageModel(dataclasses.replace(config, in_sequence=InSequenceConfig((1,), learning_rate=rate)))
        told.append(read(model, params, init_stream(model, params, 1), jnp.asarray(goldens.tokens(64)[:, :48]))[0])
    expected = logits(*pretrained)[:, :48]
    np.testing.assert_allclose(told[0], expected, rtol=0, atol=2e-4)
    np.testing.assert_allclose(told[1][:, :16], expected[:, :16], rtol=0, atol=2e-4)
    assert np.abs(told[1][:, 16:] - expected[:, 16:]).max() > 1e-2


@pytest.mark.parametrize(
    ('levels', 'placement', 'message'),
    [
        ((FAST, SLOW), 2, 'placement is 2, allowed is a level from 0 to 1, or one for each of 2 blocks'),
        ((FAST, SLOW), (0, 1, 1), r'placement is \(0, 1, 1\)'),
        ((FAST, WIDE), 1, r'levels\[1\].hidden_dim is 160, allowed is 96, that of the MLPs placed there'),
        ((), 0, 'placement is 0'),
    ],
)
def test_placements_that_do_not_fit(pretrained, levels, placement, message):
    with pytest.raises(ValueError, match=message):
        stack_levels(*pretrained, levels, placement, key=jax.random.key(0))


def test_only_a_model_of_one_level_is_stacked(pretrained):
    stacked = stack_levels(*pretrained, (FAST, SLOW), 0, key=jax.random.key(0))
    with pytest.raises(ValueError, match="2 levels and aggregation 'chain', allowed is a model of one mixer, one level"):
        stack_levels(*stacked, (FAST, MIDDLE, SLOW), 0, key=jax.random.key(0))
