"""On eight devices: the losses of one, a share of the state on each, and no collective that moves an optimizer's moment."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nested_jax.models.language_model import LanguageModel
from nested_jax.models.loss import model_loss
from nested_jax.models.presets import preset, preset_names
from nested_jax.training.config import TrainConfig
from nested_jax.training.optimizer import make_optimizer
from nested_jax.training.sharding import Placement, ShardingRules, check_mesh, choose_mesh, make_mesh, parse_mesh, recipe
from nested_jax.training.state import init_state
from nested_jax.training.step import make_train_step

ONE = {'data': 1}
FSDP = {'fsdp': 8}
BOTH = {'fsdp': 4, 'tensor': 2}
MESHES = {'data': {'data': 8}, 'fsdp': FSDP, 'fsdp-tensor': BOTH, 'data-fsdp-tensor': {'data': 2, 'fsdp': 2, 'tensor': 2}}
STEPS = 20
TRAIN = TrainConfig(steps=STEPS, batch_size=8, sequence_length=64, learning_rate=1e-3, warmup_steps=2)


def batches(name):
    draw = np.random.default_rng(0)
    for _ in range(STEPS):
        tokens = draw.integers(0, preset(name).vocab_size, (8, 65)).astype(np.int32)
        ids = np.ones((8, 64), np.int32)
        yield {'tokens': tokens[:, :-1], 'targets': tokens[:, 1:], 'segment_ids': ids, 'weights': ids.astype(np.float32)}


def make(name, sizes):
    """The state, made where it belongs, the compiled step, and the placement."""
    blocks = 2 if preset(name).mixer == 'mamba-attention' else 1
    model = LanguageModel(preset(name, num_layers=2 * blocks, scan_layers=True, remat='block'))
    optimizer = make_optimizer(TRAIN)
    placement = Placement.on(make_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values())))]))
    init = lambda key: model.init(key, jnp.zeros((1, 64), jnp.int32))['params']
    shardings = placement.state(optimizer, jax.eval_shape(init, jax.random.key(0)))
    state = init_state(init, optimizer, 0, shardings)
    loss = lambda params, batch: model_loss(model, params, *(batch[key] for key in ('tokens', 'targets', 'segment_ids', 'weights')))
    step = jax.jit(make_train_step(loss, optimizer), donate_argnums=0, out_shardings=(shardings, placement.replicated))
    with jax.set_mesh(placement.mesh):
        return state, step.lower(state, jax.device_put(next(batches(name)), placement.rows)).compile(), placement


def losses(name, sizes, steps=STEPS):
    state, step, placement = make(name, sizes)
    found = []
    for batch, _ in zip(batches(name), range(steps), strict=False):
        state, metrics = step(state, jax.device_put(batch, placement.rows))
        found.append(float(metrics['loss']))
    return found


alone = functools.cache(functools.partial(losses, sizes=ONE))
ALWAYS = [('hope-linear-tiny', 'fsdp'), ('transformer-tiny', 'fsdp-tensor')]
PRODUCT = [(f'{family}-tiny', mesh) for family in ('hope', 'hope-linear', 'transformer') for mesh in MESHES]
OTHERS = [(name, 'fsdp') for name in preset_names() if name.endswith('-tiny') and (name, 'fsdp') not in PRODUCT]


def check_losses(name, mesh):
    found = losses(name, MESHES[mesh])
    np.testing.assert_allclose(found, alone(name), rtol=1e-6)
    assert len(set(found)) == STEPS


@pytest.mark.parametrize(('name', 'mesh'), ALWAYS)
def test_losses_are_those_of_one_device(name, mesh):
    check_losses(name, mesh)


@pytest.mark.exhaustive
@pytest.mark.parametrize(('name', 'mesh'), [case for case in PRODUCT + OTHERS if case not in ALWAYS])
def test_losses_of_every_family_are_those_of_one_device(name, mesh):
    check_losses(name, mesh)
