"""Sequences split over devices: the loss and the gradients of one device, for every family, with packed documents."""

import functools

import jax
import numpy as np
import pytest

from nested_jax.models.language_model import LanguageModel
from nested_jax.models.loss import model_loss
from nested_jax.training.compiled import collectives
from tests.models.small_models import FAMILIES, random_params, small

SIZES = {'data': 2, 'sequence': 4}
LENGTH, ROWS = 16, 4
# On the grid of four, that of the stretches too: documents begin with a stretch, and go on through one or all; zeros are padding.
PACKED = np.array([[1] * 16, [1] * 4 + [2] * 12, [1] * 8 + [2] * 4 + [1] * 4, [1] * 12 + [2] * 2 + [0] * 2], np.int32)
# Between the borders of the stretches, less than the width of a convolution away from one: for models without a grid.
ANYWHERE = np.array([[1] * 16, [1] * 5 + [2] * 11, [1] * 7 + [2] * 4 + [1] * 5, [1] * 10 + [2] * 6], np.int32)
# Two rows a device, and a permuted state in each of the rounds: 2 + 4 - 1.
ROUNDS = 5
SLOW = ('transformer-conv', 'gated-deltanet')
OTHERS = tuple(name for name in FAMILIES if name not in (*SLOW, 'hope-attention'))
MODELS = [pytest.param(name, marks=pytest.mark.slow if name in SLOW else pytest.mark.exhaustive) for name in SLOW + OTHERS]


def make_mesh(sizes):
    names = tuple(sizes)
    return jax.make_mesh(tuple(sizes.values()), names, axis_types=(jax.sharding.AxisType.Auto,) * len(names))


@functools.cache
def model(name):
    return LanguageModel(small(name, dtype='float64'))


def batch(name):
    draw = np.random.default_rng(3)
    tokens, targets = draw.integers(0, 32, (2, ROWS, LENGTH)).astype(np.int32)
    ids = PACKED if model(name).config.grid > 1 else ANYWHERE
    return tokens, targets, ids, (ids > 0).astype(np.float64) * draw.random(ids.shape)


def objective(name):
    return jax.jit(jax.value_and_grad(lambda params, *rows: model_loss(model(name), params, *rows), has_aux=True))


@pytest.mark.parametrize('name', MODELS)
def test_stretches_have_the_loss_and_the_gradients_of_whole_sequences(name, x64):
    params, rows = random_params(model(name), dtype='float64'), batch(name)
    (nats, count), gradients = objective(name)(params, *rows)
    mesh = make_mesh(SIZES)
    with jax.set_mesh(mesh):
        placed = jax.device_put(rows, jax.NamedSharding(mesh, jax.P('data')))
        compiled = objective(name).lower(params, *placed).compile()
        (split_nats, split_count), split_gradients = compiled(params, *placed)
    # The scores of stock attention are float32.
    tolerance = 1e-6 if {'attention', 'titans-mag', 'titans-mal', 'titans-mac'} & set(model(name).config.unit) else 1e-12
    np.testing.assert_allclose([split_nats, split_count], [nats, count], rtol=tolerance)
    for (path, ours), theirs in zip(jax.tree.leaves_with_path(split_gradients), jax.tree.leaves(gradients), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * np.abs(theirs).max(), err_msg=jax.tree_util.keystr(path))
    check_collectives(compiled, model(name).config)


def check_collectives(compiled, config):
    """States are permuted once a round, and only keys and values of attention are gathered over a sequence."""
    found = [each for each in collectives(compiled.as_text()) if each.shapes[0][0] == 'f64']
    permuted = {each.runs for each in found if each.kind == 'collective-permute'}
    heads = (ROWS // 2, LENGTH, config.num_kv_heads, config.head_dim)
    gathered = {each.shapes[0][1] for each in found if each.kind == 'all-gather'}
    tokens = (ROWS, LENGTH // 4, config.width)  # of the gradient of the table of tokens, over the batch
    assert gathered <= ({heads, tokens} if 'attention' in config.unit else {tokens})
    assert heads in gathered or 'attention' not in config.unit
    if config.unit != ('attention',):
        scans = config.num_layers // len(config.unit)
        assert ROUNDS * scans in permuted
