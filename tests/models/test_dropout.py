"""A model with dropout: where and when it drops, that recomputed blocks draw the same masks, and its gradient."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from nested_jax.config import InSequenceConfig, LevelConfig, as_dict
from nested_jax.models.language_model import LanguageModel
from nested_jax.models.loss import model_loss
from nested_jax.models.presets import preset
from nested_jax.models.sampling import generate
from nested_jax.training.step import make_eval_step, make_loss
from tests.models.small_models import random_params, small

RATE = 0.5
TOKENS, TARGETS = np.random.default_rng(0).integers(0, 32, (2, 4, 16)).astype(np.int32)
TWO_LEVELS = dict(levels=(LevelConfig(12, 512), LevelConfig(12, 1024)))


def with_dropout(family, rate=RATE, **options):
    return LanguageModel(small(family, dropout=rate, **options))


@functools.partial(jax.jit, static_argnums=0)
def hidden(model, params, key=None):
    return model.apply({'params': params}, TOKENS, method='hidden', rngs=None if key is None else {'dropout': key})[0]


def branches(params):
    """(block, path of the matrix a branch ends with) of each branch: all that is added to the residual stream comes through these."""
    paths = [path for path, _ in jax.tree.leaves_with_path(params['blocks']) if _ends_a_branch(path)]
    count = jax.tree.leaves(params['blocks'])[0].shape[0]
    return [(block, path) for block in range(count) for path in paths]


def _ends_a_branch(path):
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    return name.endswith('down/kernel') or name.endswith(('mixer/output/kernel', 'mixer/output_projection/kernel'))


def only(params, kept):
    """The parameters with all branches but one (or all of them) put to nothing."""

    def cut(path, leaf):
        if not _ends_a_branch(path):
            return leaf
        blocks = np.arange(leaf.shape[0]) if kept is None or kept[1] != path else np.delete(np.arange(leaf.shape[0]), kept[0])
        return leaf.at[blocks].set(0.0)

    return {**params, 'blocks': jax.tree_util.tree_map_with_path(cut, params['blocks'])}


@pytest.mark.parametrize(
    ('family', 'options', 'count'),
    [
        ('transformer', TWO_LEVELS, 2 * 3),
        ('transformer', dict(aggregation='sum'), 2 * 2),
        pytest.param('samba', dict(num_layers=4), 4 * 2, marks=pytest.mark.slow),
    ],
)
def test_every_place_of_every_layer_has_a_mask_of_its_own(family, options, count):
    """Without branches the last rows are the embedding's; where it was dropped, those of a single branch show what was kept of that."""
    model = with_dropout(family, **options)
    params = random_params(model, dtype=np.float32)
    run = lambda params: np.asarray(hidden(model, params, jax.random.key(1)))
    dropped = run(only(params, None)) == 0
    assert abs(dropped.mean() - RATE) < 0.1
    places = branches(params)
    kept = np.array([(run(only(params, place)) != 0)[dropped] for place in places])
    assert len(places) == count
    # A mask for two of all the places, or for one of them and the embedding, would agree everywhere, or be constant.
    assert np.abs(kept.mean(1) - (1 - RATE)).max() < 0.1
    agreement = np.array([[np.mean(one == other) for other in kept] for one in kept])
    assert np.abs(agreement - 0.5 - np.eye(count) / 2).max() < 0.15


@pytest.mark.parametrize('aggregation', ['chain', 'sum'])
def test_nothing_is_dropped_without_a_key(aggregation):
    """In evaluation and generation, and with a key where the share is 0."""
    model = with_dropout('transformer', aggregation=aggregation, **TWO_LEVELS)
    plain = LanguageModel(dataclasses.replace(model.config, dropout=0.0))
    params = random_params(model, dtype=np.float32)
    expected = hidden(plain, params)
    np.testing.assert_array_equal(hidden(model, params), expected)
    np.testing.assert_array_equal(hidden(plain, params, jax.random.key(0)), expected)
    first, again, other = (hidden(model, params, jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, expected) and not np.allclose(first, other)
    ids = np.ones_like(TOKENS)
    batch = dict(tokens=TOKENS, targets=TARGETS, segment_ids=ids, weights=ids.astype(np.float32))
    nats = [jax.jit(make_eval_step(make_loss(each)))(params, batch)[0] for each in (model, plain)]
    assert nats[0] == nats[1] != jax.jit(make_loss(model))(params, batch, jax.random.key(0))[0]
    write = functools.partial(generate, prompt=TOKENS[:, :4], key=jax.random.key(0), max_new_tokens=6, temperature=1.0, top_p=1.0)
    np.testing.assert_array_equal(write(model, {'params': params}), write(plain, {'params': params}))


def gradients(model, params, seed=2):
    loss = lambda params, key: model_loss(model, params, TOKENS, TARGETS, key=key)[0]
    return jax.jit(jax.value_and_grad(loss))(params, jax.random.key(seed))


FORMS = [dict(remat='block'), dict(remat='dots', scan_layers=False)]


@pytest.mark.parametrize(
    'family', ['transformer', *(pytest.param(name, marks=pytest.mark.slow) for name in ('hope-linear', 'samba', 'rwkv7'))]
)
def test_recomputed_and_unrolled_blocks_draw_the_same_masks(family, x64):
    model = with_dropout(family, dtype='float64')
    params = random_params(model)
    expected, other = gradients(model, params), gradients(model, params, seed=3)
    assert abs(expected[0] - other[0]) > 1e-3 * expected[0]
    for form in FORMS:
        found = gradients(with_dropout(family, dtype='float64', **form), params)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max(), err_msg=str(form))  # scores of attention are float32


def test_gradient_is_that_of_finite_differences(x64):
    """Of a level's matrix in the first block, behind which all kinds of masks lie, in a model of float64 throughout."""
    model = with_dropout('linear-attention', 0.3, dtype='float64')
    params, key = random_params(model), jax.random.key(4)
    direction = np.random.default_rng(5).normal(size=params['blocks']['channel']['level_0']['up']['kernel'].shape)
    direction[1] = 0

    def loss(step):
        moved = jax.tree_util.tree_map_with_path(
            lambda path, leaf: leaf + step * direction if 'level_0/up' in jax.tree_util.keystr(path, simple=True, separator='/') else leaf,
            params,
        )
        return model_loss(model, moved, TOKENS, TARGETS, key=key)[0]

    slope, value = jax.jit(jax.grad(loss)), jax.jit(loss)
    size = 1e-5
    measured = (value(size) - value(-size)) / (2 * size)
    np.testing.assert_allclose(slope(0.0), measured, rtol=1e-7)
    assert abs(measured) > 1e-3


@pytest.mark.parametrize('value', [-0.1, 1.0, float('nan')])
def test_shares_are_checked(value):
    with pytest.raises(ValueError, match=f'dropout is {value}, allowed is a share from 0 on and below 1'):
        preset('transformer-tiny', dropout=value)


def test_models_that_learn_within_the_sequence_have_none():
    with pytest.raises(ValueError, match='dropout is 0.1, allowed is 0 where levels are updated within a sequence'):
        preset('hope-tiny', in_sequence=InSequenceConfig((3,)), dropout=0.1)


def test_configurations_tell_of_it_where_it_is_set():
    assert 'dropout' not in as_dict(preset('hope-tiny')) and as_dict(preset('hope-tiny', dropout=0.1))['dropout'] == 0.1
