"""Fault plans: what they say is what happens, where it is said; none is nothing."""

import errno
import os
import pathlib
import signal
import subprocess
import sys

import numpy as np
import pytest

from nested_jax.training import faults
from nested_jax.training.faults import Fault, InjectedError, faults_of_environment, parse_faults

ROOT = pathlib.Path(__file__).parents[2]


def test_text_of_a_plan():
    plan = parse_faults('kill@7/arrays, nan_batch@4-6,exit@9=3,sleep@5/save=0.5')
    assert plan.faults == (
        Fault('kill', 7, 7, 'arrays'), Fault('nan_batch', 4, 6), Fault('exit', 9, 9, 'step', 3.0), Fault('sleep', 5, 5, 'save', 0.5),
    )  # fmt: skip


@pytest.mark.parametrize(
    'text, message',
    [
        ('kill', "NESTED_JAX_FAULTS holds 'kill'"),
        ('kill@x', "holds 'kill@x'"),
        ('explode@3', "fault.kind is 'explode', allowed is one of raise, "),
        ('kill@3/lunch', "fault.phase is 'lunch', allowed is one of step, save, "),
        ('nan_batch@3/save', "fault.phase is 'save', allowed is one of step for nan_batch"),
        ('flip_bit@3', "fault.phase is 'step', allowed is one of renamed"),
        ('kill@0', 'fault.first is 0, allowed is from 1'),
        ('kill@5-4', 'fault.first is 5, allowed is from 1 to last=4'),
        ('kill@3,,kill@4', "holds ''"),
    ],
)
def test_impossible_plans_name_what_is_wrong(text, message):
    with pytest.raises(ValueError, match=message):
        parse_faults(text)


def test_environment(monkeypatch):
    for unset in (lambda: monkeypatch.delenv(faults.VARIABLE, raising=False), lambda: monkeypatch.setenv(faults.VARIABLE, '')):
        unset()
        assert faults_of_environment() is None
    monkeypatch.setenv(faults.VARIABLE, 'raise@2')
    assert faults_of_environment().faults == (Fault('raise', 2, 2),)


def test_happens_once_at_its_step_and_phase_and_nowhere_else():
    plan = parse_faults('raise@3-4/arrays')
    for step, phase in ((2, 'arrays'), (3, 'save'), (5, 'arrays'), (3, 'step')):
        plan.reach(phase, step)
    for step in (3, 4):
        with pytest.raises(InjectedError, match='injected at step 3, phase arrays'):
            plan.reach('arrays', step)
        plan.reach('arrays', step)


def test_full_disk_is_the_systems_error():
    with pytest.raises(OSError, match='No space left') as found:
        parse_faults('disk_full@1/save').reach('save', 1)
    assert found.value.errno == errno.ENOSPC


def test_batches_are_bad_whenever_they_are_read_and_copied_first():
    batch = dict(tokens=np.ones((2, 3), np.int32), weights=np.ones((2, 3), np.float32))
    plan = parse_faults('nan_batch@2,inf_batch@3')
    for _ in range(2):
        assert plan.batch(1, batch) is batch
        assert np.isnan(plan.batch(2, batch)['weights']).sum() == 1 and np.isinf(plan.batch(3, batch)['weights']).sum() == 1
    assert np.isfinite(batch['weights']).all()


def test_one_bit_of_the_largest_file(tmp_path):
    (tmp_path / 'small').write_bytes(b'1')
    (tmp_path / 'folder').mkdir()
    content = bytes(range(10))
    (tmp_path / 'folder' / 'large').write_bytes(content)
    parse_faults('flip_bit@1/renamed=27').reach('renamed', 1, tmp_path)
    changed = (tmp_path / 'folder' / 'large').read_bytes()
    assert [a ^ b for a, b in zip(content, changed, strict=True)] == [0, 0, 0, 8, 0, 0, 0, 0, 0, 0]
    assert (tmp_path / 'small').read_bytes() == b'1'


@pytest.mark.parametrize('text, code', [('exit@2=75', 75), ('kill@2', -signal.SIGKILL)])
def test_process_ends_as_planned_and_without_jax(text, code):
    program = (
        'import sys; from nested_jax.training.faults import faults_of_environment; assert "jax" not in sys.modules; '
        'plan = faults_of_environment(); [(print(step, flush=True), plan.reach("step", step)) for step in (1, 2, 3)]'
    )
    environment = os.environ | {faults.VARIABLE: text}
    ended = subprocess.run([sys.executable, '-c', program], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (code, '1\n2\n'), ended.stderr


def test_frozen_process_goes_on_when_told(tmp_path):
    program = 'from nested_jax.training.faults import parse_faults; parse_faults("stop@1").reach("step", 1); print("on")'
    process = subprocess.Popen([sys.executable, '-c', program], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    _, status = os.waitpid(process.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status) and os.WSTOPSIG(status) == signal.SIGSTOP
    process.send_signal(signal.SIGCONT)
    said, _ = process.communicate(timeout=60)
    assert said == 'on\n' and process.returncode == 0


def test_slow_phase(monkeypatch):
    slept = []
    monkeypatch.setattr(faults.time, 'sleep', slept.append)
    parse_faults('sleep@1/save=2.5').reach('save', 1)
    assert slept == [2.5]
