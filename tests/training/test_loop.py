"""The trainer: resumed runs are the unbroken run, bit for bit; a run that goes wrong says so and saves nothing of it."""

import dataclasses
import io
import json
import os
import pathlib
import re
import signal
import threading
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rich.console

from nested_jax.config import InSequenceConfig, LevelConfig, ModelConfig, as_dict
from nested_jax.training import faults, loop
from nested_jax.training.checkpoints import DamagedCheckpointsError, SaveError
from nested_jax.training.config import TrainConfig, claim_folder, lock_folder, renew_claim
from nested_jax.training.goodput import summary
from nested_jax.training.metrics import read_metrics

pytestmark = pytest.mark.usefixtures('compilations_on_disk')
TOKENS = 4 * 16  # a step
# Periods of 1, 2 and 5 steps: none but the first divides the places where runs are cut.
LEVELS = tuple(LevelConfig(8, period * TOKENS) for period in (1, 2, 5))
MODEL = ModelConfig('attention', num_layers=1, width=8, num_heads=1, head_dim=8, levels=LEVELS, max_length=16)
TRAIN = TrainConfig(
    steps=8,
    batch_size=4,
    sequence_length=16,
    warmup_steps=2,
    accumulation=2,
    log_every=3,
    eval_every=4,
    eval_tokens=128,
    checkpoint_every=3,
)


def run_config(train, model=MODEL):
    return {'model': as_dict(model), 'train': as_dict(train)}


def train(folder, data, config=TRAIN, model=MODEL, devices=1, **options):
    config = dataclasses.replace(config, output=str(folder))
    console = rich.console.Console(file=io.StringIO(), width=200)
    where = dict(devices=jax.devices()[:devices], console=console)
    result = loop.train(config, model, data, run_config(config, model), **options, **where)
    return result, console.file.getvalue()


def stop_after(monkeypatch, step, number=signal.SIGTERM):
    """Sends this process a signal while it runs a step."""
    real = loop._Trainer.train_step

    def train_step(self, now, batch):
        real(self, now, batch)
        if now == step:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(loop._Trainer, 'train_step', train_step)


def assert_same_state(left, right):
    raw = lambda x: np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(raw(a), raw(b)), left, right)


def records(folder):
    """The log without the speeds."""
    lines = read_metrics(pathlib.Path(folder) / 'metrics.jsonl')
    return [{name: value for name, value in line.items() if name != 'tokens_per_second'} for line in lines]


@pytest.fixture(scope='module')
def unbroken(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp('unbroken')
    result, said = train(folder, data)
    return result, said, folder


@pytest.mark.slow
def test_levels_that_learn_within_sequences_train_and_resume(data, tmp_path, monkeypatch):
    levels = LevelConfig(8, 4), LevelConfig(8, 8)
    model = dataclasses.replace(MODEL, levels=levels, in_sequence=InSequenceConfig(blocks=(0,), learning_rate=0.05))
    config = dataclasses.replace(TRAIN, learning_rate=3e-2)
    whole, said = train(tmp_path / 'whole', data, config, model)
    assert re.search(r'levels updated within each sequence: [\d.]+ MiB', said)
    losses = [line['heldout_part_bits_per_byte'] for line in records(tmp_path / 'whole') if 'heldout_part_bits_per_byte' in line]
    assert whole.heldout.bits_per_byte < losses[0] < 8
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        assert train(tmp_path / 'cut', data, config, model)[0].step == 4
    assert_same_state(train(tmp_path / 'cut', data, config, model)[0].state, whole.state)
    static = dataclasses.replace(model, in_sequence=None)
    other = train(tmp_path / 'static', data, config, static)[0]
    assert abs(other.heldout.bits_per_byte - whole.heldout.bits_per_byte) > 1e-4


def test_a_run_learns_and_leaves_everything_behind(unbroken, data):
    result, said, folder = unbroken
    assert result.step == 8 and result.stopped_by is None and result.resumed_from == 0
    lines = records(folder)
    losses = [line['loss'] for line in lines if 'loss' in line]
    assert [line['step'] for line in lines] == [3, 4, 6, 8, 8]
    assert losses[-1] < losses[0]
    assert lines[-1]['heldout_bits_per_byte'] == result.heldout.bits_per_byte
    # Every held-out token but each document's first is a target once.
    assert result.heldout.tokens == data.heldout.num_tokens - len(data.heldout.lengths)
    assert {path.name for path in folder.iterdir()} == {
        'checkpoints', 'config.json', 'goodput.jsonl', 'loss.png', 'metrics.jsonl', 'tensorboard',
    }  # fmt: skip
    assert sorted(path.name for path in (folder / 'checkpoints').iterdir()) == ['00000006', '00000008']
    assert re.search(r'goodput [\d.]+% of', said)
    assert 'step 8/8' in said and 'bits/byte' in said and 'compiled in' in said


@pytest.mark.parametrize('cut', [1, 3, 4, 7])
def test_stopped_and_resumed_is_the_unbroken_run(unbroken, data, tmp_path, monkeypatch, cut):
    whole, _, folder = unbroken
    with monkeypatch.context() as patch:
        stop_after(patch, cut)
        first, _ = train(tmp_path, data)
    assert (first.step, first.stopped_by, first.heldout) == (cut, signal.SIGTERM, None)
    second, said = train(tmp_path, data)
    assert second.resumed_from == cut and f'going on from step {cut}' in said
    assert_same_state(second.state, whole.state)
    assert second.heldout == whole.heldout
    assert records(tmp_path) == records(folder)


def test_killed_run_goes_on_from_the_last_checkpoint_and_drops_later_lines(unbroken, data, tmp_path, monkeypatch):
    whole, _, folder = unbroken

    def die(self, step):
        if step == 6:
            raise KeyboardInterrupt
        return save(self, step)

    save = loop._Trainer.save
    with monkeypatch.context() as patch:
        patch.setattr(loop._Trainer, 'save', die)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path, data)
    assert records(tmp_path)[-1]['step'] == 6
    second, _ = train(tmp_path, data)
    assert second.resumed_from == 3
    spent = summary(tmp_path)
    assert (spent.restarts, spent.wasted_steps) == (1, 3)
    assert spent.productive_s + sum(spent.badput_s.values()) == pytest.approx(spent.total_s, rel=0.02)
    assert_same_state(second.state, whole.state)
    assert records(tmp_path) == records(folder)


def test_finished_run_called_again_only_evaluates(unbroken, data):
    whole, _, folder = unbroken
    before = records(folder)
    again, _ = train(folder, data)
    assert again.resumed_from == 8 and again.heldout == whole.heldout
    assert_same_state(again.state, whole.state)
    assert records(folder) == before


def test_damaged_checkpoint_is_passed_over_and_reported(unbroken, data, tmp_path, monkeypatch):
    whole, _, folder = unbroken
    with monkeypatch.context() as patch:
        stop_after(patch, 7)
        train(tmp_path, data)
    path = tmp_path / 'checkpoints' / '00000007' / 'meta.json'
    path.write_text(path.read_text()[:-1])
    second, said = train(tmp_path, data)
    assert second.resumed_from == 6 and second.rejected == ('step 7: meta.json is damaged',)
    assert 'passed over a damaged checkpoint: step 7' in said
    assert_same_state(second.state, whole.state)


def test_refuses_to_start_over_when_every_checkpoint_is_damaged(unbroken, data, tmp_path, monkeypatch):
    """C3."""
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        train(tmp_path, data)
    (tmp_path / 'checkpoints' / '00000001' / 'manifest.json').unlink()
    with pytest.raises(DamagedCheckpointsError, match='refusing to start over'):
        train(tmp_path, data)
    result, said = train(tmp_path, data, start_over=True)
    assert result.resumed_from == 0 and 'starting over in ' in said and 'manifest.json is missing' in said
    assert_same_state(result.state, unbroken[0].state)
    assert (tmp_path / 'checkpoints.damaged-1' / '00000001' / 'meta.json').exists()


def test_folder_of_another_configuration_is_refused(unbroken, data):
    _, _, folder = unbroken
    for field, value in dict(learning_rate=0.5, seed=1, batch_size=8, sequence_length=32).items():  # R6 among them
        with pytest.raises(ValueError, match=f'train.{field} is {value}, but .*{field} = '):
            train(folder, data, dataclasses.replace(TRAIN, **{field: value}))
    with pytest.raises(ValueError, match='model.levels.1.period is 64'):
        levels = (LEVELS[0], LevelConfig(8, 64), LEVELS[2])
        train(folder, data, model=dataclasses.replace(MODEL, levels=levels))


def test_damaged_config_is_an_error_in_a_line(data, tmp_path):
    (tmp_path / 'config.json').write_text('{"mod')
    with pytest.raises(ValueError, match='config.json is damaged'):
        train(tmp_path, data)


def test_renewed_configuration_stands_in_the_file_that_is_locked(tmp_path):
    claim_folder(tmp_path, {'data': {'digest': 'a' * 64}})
    with lock_folder(tmp_path):
        for digest in ('b', 'c' * 99):
            renew_claim(tmp_path, {'data': {'digest': digest}})
            claim_folder(tmp_path, {'data': {'digest': digest}})
            with pytest.raises(ValueError, match='in use by another run'), lock_folder(tmp_path):
                pass


@pytest.fixture(scope='module')
def other_text(texts_of):
    return texts_of('Document')


def test_changed_data_is_refused_by_the_field(data, other_text, tmp_path, monkeypatch):
    """R6. Text is told by the checkpoint, and by the configuration where that has its digest, as that of hope_pretrain does."""
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        train(tmp_path, data)
    with pytest.raises(ValueError, match='data.corpus=.*; the checkpoint was made with .*; allowed with --allow-data-change'):
        train(tmp_path, other_text)
    for field, value in (('seed', 7), ('batch_size', 8)):
        before = getattr(TRAIN, field)
        with pytest.raises(ValueError, match=f'train.{field} is {value}, but .* = {before}: .*, or --allow-data-change'):
            train(tmp_path, data, dataclasses.replace(TRAIN, **{field: value}))
    with pytest.raises(ValueError, match='train.learning_rate is 1.0, but .*, or another output folder$'):
        train(tmp_path, data, dataclasses.replace(TRAIN, learning_rate=1.0), allow_data_change=True)


@pytest.mark.slow
def test_changed_data_is_read_when_asked_for_and_said(data, other_text, tmp_path, monkeypatch):
    """R6. From then on the folder is that of the changed run: no more asking, and the run before the change is refused."""
    read, changed = [], dataclasses.replace(TRAIN, seed=7)
    real = loop._Trainer.run_step
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        train(tmp_path, data)
    with monkeypatch.context() as patch:
        patch.setattr(loop._Trainer, 'run_step', lambda self, batch: (read.append(batch['tokens'].copy()), real(self, batch))[1])
        stop_after(patch, 6)
        result, said = train(tmp_path, other_text, changed, allow_data_change=True)
    assert result.resumed_from == 4 and 'data.seed=7; the checkpoint was made with 0' in said and 'data.corpus=' in said
    expected = loop.training_batches(other_text.train, length=16, batch_size=4, grid=MODEL.grid, seed=7)
    for number, tokens in enumerate(read, 4):
        np.testing.assert_array_equal(tokens, expected[number]['tokens'])
    with pytest.raises(ValueError, match='train.seed is 0, but .* = 7'):
        train(tmp_path, data)
    result, said = train(tmp_path, other_text, changed)
    assert (result.resumed_from, result.step) == (6, 8) and 'was made with' not in said
    assert len(read) == 2 and bool(loop._all_finite(result.state))


@pytest.mark.parametrize('step', [1, 4])
def test_diverging_run_stops_and_saves_nothing_of_it(data, tmp_path, monkeypatch, step):
    real = loop._Trainer.train_step

    def poisoned(self, now, batch):
        if now == step:
            params = jax.tree.map(lambda leaf: leaf.at[...].set(jnp.nan), self.state.params)
            self.state = self.state._replace(params=params)
        real(self, now, batch)

    monkeypatch.setattr(loop._Trainer, 'train_step', poisoned)
    with pytest.raises(loop.DivergedError, match=f'at step {step} the loss is nan'):
        train(tmp_path, data)
    assert [path.name for path in (tmp_path / 'checkpoints').iterdir()] == ['00000003'][: step - 1]
    assert all(np.isfinite(line['loss']) for line in records(tmp_path) if 'loss' in line)


def test_poisoned_optimizer_is_not_saved(data, tmp_path, monkeypatch):
    """The loss of the step before the save is still finite."""
    real = loop._Trainer.train_step

    def poisoned(self, now, batch):
        real(self, now, batch)
        if now == 3:
            nan = lambda leaf: leaf * jnp.nan if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf
            self.state = self.state._replace(opt_state=jax.tree.map(nan, self.state.opt_state))

    monkeypatch.setattr(loop._Trainer, 'train_step', poisoned)
    with pytest.raises(loop.DivergedError, match='not finite after step 3'):
        train(tmp_path, data)
    assert not list((tmp_path / 'checkpoints').iterdir())


def test_poisoned_optimizer_is_found_on_the_step(data, tmp_path, monkeypatch):
    """N1. Step 4 is no step that is logged or saved; its loss and gradient are finite, and the parameters it makes are not."""
    real = loop._Trainer.run_step

    def poisoned(self, batch):
        if int(self.state.step) == 3:
            spoil = lambda leaf: leaf.at[0].set(jnp.inf) if jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.ndim else leaf
            self.state = self.state._replace(opt_state=jax.tree.map(spoil, self.state.opt_state))
        state, metrics = real(self, batch)
        assert np.isfinite(metrics['loss']) and np.isfinite(metrics['grad_norm'])
        return state, metrics

    monkeypatch.setattr(loop._Trainer, 'run_step', poisoned)
    with pytest.raises(loop.DivergedError, match='not finite after step 4, which is not saved'):
        train(tmp_path, data)
    assert [path.name for path in (tmp_path / 'checkpoints').iterdir()] == ['00000003']


SKIP = dataclasses.replace(TRAIN, on_nonfinite='skip', max_skips=2)


def faulty(monkeypatch, folder, data, plan, config, cut=None):
    """A run under a plan of faults, stopped and resumed after step `cut`."""
    with monkeypatch.context() as patch:
        patch.setenv('NESTED_JAX_FAULTS', plan)
        if cut is not None:
            with monkeypatch.context() as stopping:
                stop_after(stopping, cut)
                assert train(folder, data, config)[0].step == cut
        return train(folder, data, config)


def test_bad_batch_ends_the_run_by_default(data, tmp_path, monkeypatch):
    with pytest.raises(loop.DivergedError, match='at step 4 the loss is nan'):
        faulty(monkeypatch, tmp_path, data, 'nan_batch@4,sleep@3/arrays=0.5', TRAIN)  # while 3 is being written
    assert [path.name for path in (tmp_path / 'checkpoints').iterdir()] == ['00000003']


def test_the_log_has_the_steps_before_a_bad_batch(data, tmp_path, monkeypatch):
    """N1. They were not due yet."""
    with pytest.raises(loop.DivergedError, match='at step 4 the loss is nan'):
        faulty(monkeypatch, tmp_path / 'bad', data, 'nan_batch@4', dataclasses.replace(TRAIN, log_every=50))
    train(tmp_path / 'good', data)
    expected, (line,) = records(tmp_path / 'good')[0], records(tmp_path / 'bad')
    assert line['step'] == expected['step'] == 3
    for name in ('loss', 'bits_per_byte', 'grad_norm', 'learning_rate'):
        assert line[name] == expected[name]


def test_bad_batch_is_skipped_counted_and_resumed(data, tmp_path, monkeypatch):
    whole, said = faulty(monkeypatch, tmp_path / 'whole', data, 'nan_batch@4,inf_batch@7', SKIP)
    assert whole.step == 8 and 'step 4 is skipped: its loss is nan' in said and 'step 7 is skipped' in said
    assert [(line['step'], line['skipped_steps']) for line in records(tmp_path / 'whole') if 'loss' in line] == [(3, 0), (6, 1), (8, 1)]
    counts = [int(leaf) for leaf in jax.tree.leaves(whole.state.opt_state) if leaf.shape == () and leaf.dtype == jnp.int32]
    assert max(counts) == 6  # updates that Adam and the schedule have seen
    cut, _ = faulty(monkeypatch, tmp_path / 'cut', data, 'nan_batch@4,inf_batch@7', SKIP, cut=4)
    assert cut.resumed_from == 4
    assert_same_state(cut.state, whole.state)
    assert records(tmp_path / 'cut') == records(tmp_path / 'whole')


@pytest.mark.slow
def test_bad_batches_in_a_row_send_the_run_back_without_them(data, tmp_path, monkeypatch):
    """N3, of steps that are not finite; of spikes: test_loop_signals.py."""
    read = []
    real = loop._Trainer.run_step
    monkeypatch.setattr(loop._Trainer, 'run_step', lambda self, batch: (read.append(batch['tokens'].copy()), real(self, batch))[1])
    whole, said = faulty(monkeypatch, tmp_path / 'whole', data, 'nan_batch@5-6', SKIP)
    assert '2 steps skipped in a row: back to step 3, without batches 3 to 5' in said
    assert summary(tmp_path / 'whole').wasted_steps == 3
    marks = [line for line in records(tmp_path / 'whole') if 'passed_over_from' in line]
    assert whole.step == 8 and marks == [dict(step=3, passed_over_from=3, passed_over_to=6)]
    trainer_batches = loop.training_batches(data.train, length=16, batch_size=4, grid=MODEL.grid, seed=0)
    expected = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10]  # step 4 reads batch 6 the second time
    assert len(read) == len(expected)
    for tokens, number in zip(read, expected, strict=True):
        np.testing.assert_array_equal(tokens, trainer_batches[number]['tokens'])
    for cut in (4, 7):  # before the run goes back, and after
        again, _ = faulty(monkeypatch, tmp_path / f'cut{cut}', data, 'nan_batch@5-6', SKIP, cut=cut)
        assert_same_state(again.state, whole.state)
        assert records(tmp_path / f'cut{cut}') == records(tmp_path / 'whole')


def test_run_that_goes_back_to_one_step_again_and_again_ends(data, tmp_path, monkeypatch):
    with pytest.raises(loop.DivergedError, match='went back to step 3 three times'):
        faulty(monkeypatch, tmp_path, data, 'nan_batch@4-99', SKIP)


@pytest.mark.slow
def test_poisoned_state_is_left_by_going_back(data, tmp_path, monkeypatch):
    real = loop._Trainer.run_step
    poisonings = []

    def poisoned(self, batch):
        if int(self.state.step) == 4 and not poisonings:
            poisonings.append(None)
            spoil = lambda leaf: leaf.at[0].set(jnp.nan) if jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.ndim else leaf
            self.state = self.state._replace(opt_state=jax.tree.map(spoil, self.state.opt_state))
        return real(self, batch)

    monkeypatch.setattr(loop._Trainer, 'run_step', poisoned)
    result, said = train(tmp_path, data, SKIP)
    assert result.step == 8 and 'back to step 3' in said
    assert bool(loop._all_finite(result.state))


def test_full_disk_is_said_and_leaves_the_older_checkpoint(data, tmp_path, monkeypatch):
    with pytest.raises(
        SaveError, match='step 6 could not be saved in .*No space left on device.*; the newest checkpoint is that of step 3'
    ):
        faulty(monkeypatch, tmp_path, data, 'disk_full@6/arrays', TRAIN)
    assert [path.name for path in (tmp_path / 'checkpoints').iterdir()] == ['00000003']


def test_slow_disk_keeps_the_run_only_when_the_next_save_is_due(unbroken, data, tmp_path, monkeypatch):
    """C9. The write of step 3 ends while the run waits to save step 6; it has gone on until then. That of step 8 ends before all else."""
    whole, _, folder = unbroken
    happened, due = [], threading.Event()
    real_step, real_save, real_evaluate = loop._Trainer.train_step, loop._Trainer.save, loop._Trainer.evaluate

    def write(step):
        assert due.wait(60)
        threading.Event().wait(0.3)
        happened.append(f'{step:.0f} is written')

    def train_step(self, step, batch):
        real_step(self, step, batch)
        happened.append(step)
        time.sleep(0.4 * (step in (4, 5)))

    def save(self, step):
        happened.append(f'{step} is to be saved')
        if step == 6:
            due.set()
        real_save(self, step)

    def evaluate(self, batches):
        happened.append('evaluation')
        return real_evaluate(self, batches)

    monkeypatch.setattr(faults, 'time', types.SimpleNamespace(sleep=write))
    monkeypatch.setattr(loop._Trainer, 'train_step', train_step)
    monkeypatch.setattr(loop._Trainer, 'save', save)
    monkeypatch.setattr(loop._Trainer, 'evaluate', evaluate)
    result, _ = faulty(monkeypatch, tmp_path, data, 'sleep@3/arrays=3,sleep@8/manifest=8', TRAIN)
    assert happened == [
        1, 2, 3, '3 is to be saved', 4, 'evaluation', 5, 6, '6 is to be saved', '3 is written', 7, 8, '8 is to be saved', '8 is written',
        'evaluation',
    ]  # fmt: skip
    spent = summary(tmp_path)
    assert spent.badput_s['save'] > 0.3 and spent.productive_s > 0.8  # the wait, and steps 4 and 5: one second has one cause
    assert_same_state(result.state, whole.state)
    assert records(tmp_path) == records(folder) and result.checkpoint.name == '00000008'


def test_second_run_in_one_folder_is_refused(data, tmp_path, monkeypatch):
    real = loop._Trainer.save
    refusals = []

    def save(self, step):
        with pytest.raises(ValueError, match='is in use by another run'):
            train(tmp_path, data)
        refusals.append(step)
        return real(self, step)

    monkeypatch.setattr(loop._Trainer, 'save', save)
    assert train(tmp_path, data)[0].step == 8 and refusals == [3, 6, 8]


@pytest.mark.slow
def test_a_step_that_takes_long_is_named_with_its_process_and_phase(data, tmp_path, monkeypatch, capsys):
    """S6. What lies between steps has no such line: the first step after it is no longer than others."""
    config = dataclasses.replace(TRAIN, steps=16, eval_every=11, checkpoint_every=12)
    faulty(monkeypatch, tmp_path, data, 'sleep@15=3,sleep@11/evaluate=3,sleep@12/save=3', config)
    lines = re.findall('step ([0-9]+) in process 0 on .* took ([0-9.]+) s .* in its own work', capsys.readouterr().out)
    assert [int(step) for step, seconds in lines if float(seconds) > 2.9] == [15]
    assert any(name.endswith(', in its own work') for name in summary(tmp_path).slow)


def test_step_is_traced_once_whatever_happens_around_it(data, tmp_path, monkeypatch):
    """F5."""
    traces = []
    real = loop.make_train_step

    def counted(*arguments):
        step = real(*arguments)
        return lambda state, batch: (traces.append(None), step(state, batch))[1]

    monkeypatch.setattr(loop, 'make_train_step', counted)
    train(tmp_path, data)
    assert len(traces) == 1


def test_eight_devices_agree_with_one(unbroken, data, tmp_path):
    config = dataclasses.replace(TRAIN, batch_size=8, accumulation=1, steps=2, warmup_steps=1)
    one, _ = train(tmp_path / 'one', data, config)
    eight, _ = train(tmp_path / 'eight', data, config, devices=8, mesh='fsdp=8', explicit=True)
    np.testing.assert_allclose(eight.heldout.nats, one.heldout.nats, rtol=1e-5)
    assert any('fsdp' in str(jax.typeof(leaf)) for leaf in jax.tree.leaves(eight.state.params))
    assert [json.loads((each.checkpoint / 'meta.json').read_text())['made_by']['mesh'] for each in (one, eight)] == [
        {'data': 1},
        {'fsdp': 8},
    ]


def test_batch_that_the_devices_do_not_divide(data, tmp_path):
    with pytest.raises(ValueError, match=r'train.batch_size is 4, allowed is a multiple of accumulation x devices = 2 x 8'):
        train(tmp_path, data, devices=8)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    'field, value',
    [
        ('steps', 0),
        ('batch_size', 3),
        ('warmup_steps', 8),
        ('learning_rate', 0.0),
        ('beta2', 1.0),
        ('keep', 0),
        ('seed', -1),
        ('output', ' '),
        ('output', 'runs/a\0b'),
        ('output', 'runs/a\nb'),
        ('on_nonfinite', 'ignore'),
        ('spike_sigma', 5.0),
        ('max_skips', 0),
        ('watchdog_s', 0.0),
        ('optimizer', 'sgd'),
        ('slow_period', 7),
    ],
)
def test_impossible_settings_name_the_field(field, value):
    with pytest.raises(ValueError, match=f'train.({field}|accumulation|warmup_steps) is'):
        dataclasses.replace(TRAIN, **{field: value})


def test_model_that_cannot_read_the_run():
    loop.check_model(TRAIN, MODEL, 256)
    with pytest.raises(ValueError, match="model.vocab_size is 256, allowed is at least the tokenizer's, 300"):
        loop.check_model(TRAIN, MODEL, 300)
    titans = dataclasses.replace(MODEL, mixer='titans', memory=dataclasses.replace(MODEL.memory, chunk_size=12, projection_chunk_size=12))
    with pytest.raises(ValueError, match='train.sequence_length is 16, allowed is a multiple of .* 12'):
        loop.check_model(TRAIN, titans, 256)


def test_config_survives_json():
    """F2."""
    config = as_dict(TRAIN)
    assert TrainConfig(**json.loads(json.dumps(config))) == TRAIN


def test_younger_settings_are_in_a_configuration_only_when_used():
    """Digests of stored results were made without them."""
    younger = {'on_nonfinite', 'spike_sigma', 'max_skips', 'watchdog_s', 'optimizer', 'slow_period'}
    assert not younger & set(as_dict(TRAIN)) and younger <= set(dataclasses.asdict(TRAIN))
    used = dataclasses.replace(TRAIN, on_nonfinite='skip', spike_sigma=None)
    assert younger & set(as_dict(used)) == {'on_nonfinite', 'spike_sigma'}
    assert TrainConfig(**as_dict(used)) == used
