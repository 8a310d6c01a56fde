"""The trainer when something comes at an odd moment: a signal in any phase, a failure of the last save, a spike that is met twice."""

import dataclasses
import io
import os
import pathlib
import shutil
import signal

import jax
import numpy as np
import pytest
import rich.console

from nested_jax.config import LevelConfig, ModelConfig, as_dict
from nested_jax.training import loop
from nested_jax.training.checkpoints import SaveError
from nested_jax.training.config import TrainConfig
from nested_jax.training.metrics import read_metrics
from nested_jax.training.signals import StopSignals

pytestmark = pytest.mark.usefixtures('compilations_on_disk')
MODEL = ModelConfig(
    'attention', num_layers=1, width=8, num_heads=1, head_dim=8, levels=(LevelConfig(8, 64), LevelConfig(8, 192)), max_length=16
)
TRAIN = TrainConfig(
    steps=8, batch_size=4, sequence_length=16, warmup_steps=2, log_every=1, eval_every=4, eval_tokens=128, checkpoint_every=3
)


def train(folder, data, config=TRAIN):
    config = dataclasses.replace(config, output=str(folder))
    settings, console = {'model': as_dict(MODEL), 'train': as_dict(config)}, rich.console.Console(file=io.StringIO(), width=200)
    result = loop.train(config, MODEL, data, settings, devices=jax.devices()[:1], console=console)
    return result, console.file.getvalue()


def history(folder):
    return [line | dict(tokens_per_second=0) for line in read_metrics(pathlib.Path(folder) / 'metrics.jsonl')]


@pytest.fixture(scope='module')
def unbroken(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp('unbroken')
    train(folder, data)
    return history(folder)


def test_every_step_asks_for_signals_and_the_last_save_may_fail(data, tmp_path, monkeypatch):
    """S3: a signal that nobody asks for stops nothing. C6: no later save waits for the last one, and the run must not end well."""
    asked, real = [], StopSignals.reached
    monkeypatch.setattr(StopSignals, 'reached', lambda self: (asked.append(None), real(self))[1])
    monkeypatch.setenv('NESTED_JAX_FAULTS', 'disk_full@8/arrays')
    with pytest.raises(SaveError, match='step 8 could not be saved in .*No space left.*; the newest checkpoint is that of step 6'):
        train(tmp_path, data)
    assert len(asked) == TRAIN.steps


@pytest.mark.slow
@pytest.mark.parametrize(
    ('place', 'number'),
    [
        ('save', signal.SIGTERM),
        *(pytest.param(name, signal.SIGINT, marks=pytest.mark.exhaustive) for name in ('save', 'restore', 'compile', 'evaluate')),
        pytest.param('evaluate', signal.SIGTERM, marks=pytest.mark.exhaustive),
    ],
)
def test_a_signal_in_any_phase(data, unbroken, tmp_path, monkeypatch, place, number):
    """S2. While steps are done it is noted, and obeyed after the next one; before them there is nothing to save, and the run just ends.

    SIGTERM before them ends the process: see test_hope_pretrain.py.
    """
    real, calls = getattr(loop._Trainer, place), []

    def interrupted(self, *arguments):
        calls.append(None)
        if len(calls) == 1:
            os.kill(os.getpid(), number)
        return real(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loop._Trainer, place, interrupted)
        if place in ('restore', 'compile'):
            with pytest.raises(KeyboardInterrupt):
                train(tmp_path, data)
            done = 0
        else:
            result, _ = train(tmp_path, data)
            done = result.step
            assert result.stopped_by == number and done == dict(save=4, evaluate=5)[place]
    assert not list(tmp_path.glob('checkpoints/*.tmp'))
    assert train(tmp_path, data)[0].resumed_from == done
    assert history(tmp_path) == unbroken


@pytest.mark.slow
def test_a_run_whose_checkpoints_are_gone_does_not_start_over_in_silence(data, unbroken, tmp_path):
    """C3: who removes them asks for it."""
    _, said = train(tmp_path, data)
    assert 'starting over' not in said
    shutil.rmtree(tmp_path / 'checkpoints')
    result, said = train(tmp_path, data)
    assert f'starting over: {tmp_path} has the metrics of step 8, and no checkpoint' in said
    assert result.resumed_from == 0 and history(tmp_path) == unbroken


@pytest.mark.slow
def test_a_spike_is_skipped_and_comes_again_the_same_when_the_steps_are_done_again(data, tmp_path, monkeypatch):
    """N2 and N5: 6 sigma in a run, and the loss of the spike to the bit after going back without passing over its batch."""
    config = dataclasses.replace(
        TRAIN, steps=76, eval_every=100, checkpoint_every=36, keep=9, on_nonfinite='skip', spike_sigma=6.0, learning_rate=1e-5
    )
    real, seen = loop._Trainer.look_at, []

    def disturb(self, step, batch):
        alike = {name: np.full_like(batch[name], value) for name, value in dict(tokens=65, targets=200).items()}  # all pull the same way
        return batch | alike if step == 74 else batch

    def look_at(self, step, metrics, num_bytes):
        seen.append((step, np.float32(metrics['loss']).tobytes(), int(metrics['skipped'])))
        return real(self, step, metrics, num_bytes)

    monkeypatch.setattr(loop._Trainer, 'disturb', disturb)
    monkeypatch.setattr(loop._Trainer, 'look_at', look_at)
    whole, said = train(tmp_path / 'whole', data, config)
    assert [step for step, _, skipped in seen if skipped] == [74] and 'step 74 is skipped: its loss is' in said
    first, seen[:] = seen[72:], []
    shutil.copytree(tmp_path / 'whole', tmp_path / 'again')
    shutil.rmtree(tmp_path / 'again/checkpoints/00000076')
    again, _ = train(tmp_path / 'again', data, config)
    assert again.resumed_from == 72 and seen == first
    raw = lambda state: jax.tree.map(np.asarray, (state.params, state.opt_state))
    jax.tree.map(np.testing.assert_array_equal, raw(again.state), raw(whole.state))
    assert history(tmp_path / 'again') == history(tmp_path / 'whole')


@pytest.mark.slow
@pytest.mark.parametrize('max_skips', [3, 10])
def test_spikes_in_a_row_send_the_run_back_to_its_last_checkpoint_without_their_batches(data, tmp_path, monkeypatch, max_skips):
    """N3: every spike is a finite one beyond 6 sigma. The run ends as one that was never given the batches since the checkpoint."""
    assert max_skips != 10 or TRAIN.max_skips == max_skips  # the default
    saved, first = 108, 111  # the last regular checkpoint, and the first of the steps that are spikes
    last = first + max_skips - 1
    config = dataclasses.replace(
        TRAIN, steps=last + 6, eval_every=200, checkpoint_every=54, keep=9, on_nonfinite='skip', spike_sigma=6.0, max_skips=max_skips,
        learning_rate=1e-5,
    )  # fmt: skip
    real, run_step = loop._Trainer.look_at, loop._Trainer.run_step
    seen, read = [], []

    def spikes(self, step, batch):
        """A spike is recorded, so that the next one must be larger: one batch with a sum of weights, to divide by, that is ever smaller."""
        turn = step + self.skips.num_passed_over - first
        if not 0 <= turn < max_skips:
            return batch
        batch = self.batches[0]
        weights = np.array(batch['weights'])
        weights[-1, -1] = (weights.sum() - weights[-1, -1]) * (1.5 ** -(turn + 1) - 1)
        return batch | dict(weights=weights)

    def look_at(self, step, metrics, num_bytes):
        seen.append((step, bool(np.isfinite(metrics['loss']) and np.isfinite(metrics['grad_norm'])), int(metrics['skipped'])))
        return real(self, step, metrics, num_bytes)

    def passed_over(self, step, batch):
        return self.batches[step - 1 + (last - saved) * (step > saved)]

    monkeypatch.setattr(loop._Trainer, 'look_at', look_at)
    monkeypatch.setattr(loop._Trainer, 'run_step', lambda self, batch: (read.append(batch['tokens'].copy()), run_step(self, batch))[1])
    with monkeypatch.context() as patch:
        patch.setattr(loop._Trainer, 'disturb', spikes)
        result, said = train(tmp_path / 'spikes', data, config)
    assert f'{max_skips} steps skipped in a row: back to step {saved}, without batches {saved} to {last - 1}' in said
    assert [step for step, _, skipped in seen if skipped] == [*range(first, last + 1)] and all(finite for _, finite, _ in seen)
    assert [step for step, _, _ in seen] == [*range(1, last + 1), *range(saved + 1, config.steps + 1)]
    marks = [line for line in history(tmp_path / 'spikes') if 'passed_over_from' in line]
    assert [(line['step'], line['passed_over_from'], line['passed_over_to']) for line in marks] == [(saved, saved, last)]
    again = read[last:]
    read.clear()
    monkeypatch.setattr(loop._Trainer, 'disturb', passed_over)
    expected, _ = train(tmp_path / 'expected', data, config)
    for tokens, wanted in zip(again, read[saved:], strict=True):
        np.testing.assert_array_equal(tokens, wanted)
    raw = lambda state: jax.tree.map(np.asarray, (state.step, state.params, state.opt_state))
    jax.tree.map(np.testing.assert_array_equal, raw(result.state), raw(expected.state))
