"""The trainer on a mesh: the run of one device, also when it goes on with other devices."""

import dataclasses
import io
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rich.console

from nested_jax.config import LevelConfig, ModelConfig, as_dict
from nested_jax.training import loop
from nested_jax.training.config import TrainConfig
from nested_jax.training.mesh_sizes import choose_mesh
from nested_jax.training.metrics import read_metrics

# Two levels, of which one is updated every second step: the sums of its gradients are state that is split as well.
MODEL = ModelConfig('attention', num_layers=2, width=16, num_heads=2, head_dim=8, levels=(LevelConfig(16, 64), LevelConfig(16, 128)))
TRAIN = TrainConfig(
    steps=6, batch_size=4, sequence_length=16, warmup_steps=2, log_every=3, eval_every=6, eval_tokens=128, checkpoint_every=6
)


def train(folder, data, devices, mesh=None, model=MODEL):
    config = dataclasses.replace(TRAIN, output=str(folder))
    settings = {'model': as_dict(model), 'train': as_dict(config)}
    console = rich.console.Console(file=io.StringIO(), width=200)
    return loop.train(config, model, data, settings, devices=jax.devices()[:devices], mesh=mesh, console=console)


def in_host_memory(state):
    raw = lambda leaf: jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
    return jax.tree.map(lambda leaf: np.array(raw(leaf)), state)


# Devices, their mesh, the step at which the run is stopped on them, and how many parts a matrix of a level is in.
WAYS = {
    'short': ((2, 'fsdp=2', 4, 2), (1, None, 6, 1)),
    'long': ((4, 'fsdp=2,tensor=2', 2, 4), (1, None, 4, 1), (4, 'data=2,fsdp=2', 6, 2)),
}


@pytest.mark.parametrize(
    ('way', 'dtype', 'rtol'),
    [
        pytest.param('short', 'float32', 1e-6, marks=pytest.mark.slow),
        pytest.param('long', 'float32', 1e-6, marks=pytest.mark.exhaustive),
        pytest.param('long', 'bfloat16', 2e-3, marks=pytest.mark.exhaustive),
    ],
)
def test_a_run_goes_on_with_other_devices_on_another_mesh(data, tmp_path, monkeypatch, way, dtype, rtol):
    """R3: what is restored is what was saved, to the bit, and the losses of all steps are those of one device."""
    model = dataclasses.replace(MODEL, dtype=dtype)
    unbroken = train(tmp_path / 'one', data, 1, model=model)
    real, real_restore, last, saved, restored = loop._Trainer.train_step, loop._Trainer.restore, 0, None, []

    def train_step(self, now, batch):
        real(self, now, batch)
        if now in {until for _, _, until, _ in WAYS[way][:-1]}:
            os.kill(os.getpid(), signal.SIGTERM)

    def restore(self):
        found = real_restore(self)
        restored.append(in_host_memory(self.state))
        return found

    meshes, real_loss = [], loop.make_loss

    def make_loss(model):
        """Notes the mesh the model is compiled for, which its rows are split over."""
        inner = real_loss(model)
        return lambda params, batch: (meshes.append(jax.sharding.get_abstract_mesh().axis_names), inner(params, batch))[1]

    monkeypatch.setattr(loop._Trainer, 'train_step', train_step)
    monkeypatch.setattr(loop._Trainer, 'restore', restore)
    monkeypatch.setattr(loop, 'make_loss', make_loss)
    for devices, mesh, until, shares in WAYS[way]:
        result = train(tmp_path / 'moved', data, devices, mesh, model)
        assert (result.resumed_from, result.step) == (last, until)
        if saved is not None:
            jax.tree.map(np.testing.assert_array_equal, restored[-1], saved)
        kernel = result.state.params['blocks']['channel']['level_1']['up']['kernel']
        moment = next(leaf for path, leaf in jax.tree_util.tree_leaves_with_path(result.state.opt_state)
                      if 'mu' in str(path) and 'level_1' in str(path) and 'up' in str(path))  # fmt: skip
        for leaf in (kernel, moment):
            assert leaf.addressable_shards[0].data.size * shares == leaf.size
        last, saved = until, in_host_memory(result.state)
    assert set(meshes) == {tuple(choose_mesh(mesh, MODEL, devices)) for devices, mesh, _, _ in WAYS[way]}
    np.testing.assert_allclose(result.heldout.nats, unbroken.heldout.nats, rtol=rtol)
    losses = lambda name: [line['loss'] for line in read_metrics(tmp_path / name / 'metrics.jsonl') if 'loss' in line]
    np.testing.assert_allclose(losses('moved'), losses('one'), rtol=rtol)


@pytest.mark.slow
def test_a_run_goes_on_with_its_blocks_unrolled(data, tmp_path, monkeypatch):
    """C7. Scanned or not, parameters are stacked: a checkpoint fits both."""
    scanned = train(tmp_path / 'scanned', data, 1)
    real = loop._Trainer.train_step

    def train_step(self, now, batch):
        real(self, now, batch)
        if now == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(loop._Trainer, 'train_step', train_step)
        assert train(tmp_path / 'moved', data, 1).step == 3
    unrolled = train(tmp_path / 'moved', data, 1, model=dataclasses.replace(MODEL, scan_layers=False))
    assert (unrolled.resumed_from, unrolled.step, unrolled.model.config.scan_layers) == (3, 6, False)
    np.testing.assert_allclose(unrolled.heldout.nats, scanned.heldout.nats, rtol=1e-6)
    with pytest.raises(ValueError, match='model.num_layers is 1, but .* = 2'):
        train(tmp_path / 'moved', data, 1, model=dataclasses.replace(MODEL, num_layers=1))


def test_a_mesh_that_does_not_fit_leaves_no_trace(data, tmp_path):
    for mesh, message in (
        ('fsdp=3', "mesh is 'fsdp=3', 3 devices"),
        ('tensor=4', 'mesh has tensor=4'),
        ('fsdp=8', 'train.batch_size is 4'),
        ('sequence=3', 'train.sequence_length is 16'),
    ):
        with pytest.raises(ValueError, match=message):
            train(tmp_path, data, {'fsdp=8': 8, 'sequence=3': 3}.get(mesh, 4), mesh)
    assert not list(tmp_path.iterdir())


@pytest.mark.exhaustive
def test_split_sequences_are_trained_and_evaluated_as_whole_ones(data, tmp_path):
    whole, split = train(tmp_path / 'whole', data, 1), train(tmp_path / 'split', data, 4, 'data=2,sequence=2')
    assert split.step == whole.step == TRAIN.steps
    np.testing.assert_allclose(split.heldout.bits_per_byte, whole.heldout.bits_per_byte, rtol=1e-6)
