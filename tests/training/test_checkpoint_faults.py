"""Saves that are cut off: by SIGKILL in every phase, by a write that the system refuses, by a fault. The older checkpoint stands."""

import errno
import os
import pathlib
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nested_jax.training.checkpoints import Checkpoints, SaveError
from nested_jax.training.config import claim_folder
from nested_jax.training.faults import InjectedError, parse_faults

ROOT = pathlib.Path(__file__).parents[2]

CHILD = """
import os, pathlib, resource, signal, sys, threading, time
import jax.numpy as jnp
from nested_jax.training.checkpoints import Checkpoints, SaveError
from nested_jax.training.faults import faults_of_environment

folder, case = pathlib.Path(sys.argv[1]), sys.argv[2]
checkpoints = Checkpoints(folder, 2, faults_of_environment())
save = lambda step, size=3: checkpoints.save(step, {'kernel': jnp.arange(float(size)) + step}, config={}, data={'next': step})

def kill_when_arrays_appear():
    while not any(path.is_file() for path in folder.glob('*.tmp/state/**/*')):
        time.sleep(0.0005)
    os.kill(os.getpid(), signal.SIGKILL)

save(1), save(2), checkpoints.wait()
if case == 'writing':
    threading.Thread(target=kill_when_arrays_appear, daemon=True).start()
    save(3, 3_000_000)
elif case == 'refused':
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    import random
    try:
        checkpoints.save(3, {'kernel': jnp.asarray([random.random() for _ in range(100_000)])}, config={}, data={})
        checkpoints.wait()
    except SaveError as error:
        print(error)
elif case == 'full':
    try:
        save(3, 5_000_000), checkpoints.wait()
    except SaveError as error:
        print(error)
save(3)
checkpoints.wait()
"""


def like(size=3):
    return {'kernel': jnp.zeros(size)}


def save(checkpoints, step, state=None):
    """Saves, and waits until that is done."""
    checkpoints.save(step, like() if state is None else state, config={}, data={})
    checkpoints.wait()


def run_child(folder, case, plan='', before=()):
    environment = os.environ | dict(NESTED_JAX_FAULTS=plan, JAX_NUM_CPU_DEVICES='1', JAX_PLATFORMS='cpu')
    ended = subprocess.run(
        [*before, sys.executable, '-c', CHILD, folder, case], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    return ended.returncode, ended.stdout, ended.stderr


AFTER = {'save': [1, 2], 'arrays': [1, 2], 'manifest': [1, 2], 'writing': [1, 2], 'renamed': [1, 2, 3], 'deleting': [2, 3]}


@pytest.mark.slow
@pytest.mark.parametrize('phase', AFTER)
def test_kill_in_any_phase_leaves_a_verified_checkpoint_and_a_folder_to_go_on_in(tmp_path, phase):
    """C4: what is left of the killed save is passed over, and removed before the next."""
    code, _, complained = run_child(tmp_path, phase, '' if phase == 'writing' else f'kill@3/{phase}')
    assert code == -signal.SIGKILL, complained
    left = sorted(path.name for path in tmp_path.iterdir() if path.name.endswith('.tmp'))
    expected = {'save': [], 'renamed': [], 'deleting': ['00000001.deleted.tmp']}.get(phase, ['00000003.tmp'])
    assert left == expected
    checkpoints = Checkpoints(tmp_path, 2)
    assert checkpoints.steps() == AFTER[phase] and not list(tmp_path.glob('*.tmp'))
    restored = checkpoints.restore(like())
    assert restored.step == AFTER[phase][-1] and not restored.rejected
    np.testing.assert_array_equal(restored.state['kernel'], np.arange(3.0) + restored.step)
    save(checkpoints, 4)
    assert checkpoints.steps() == [AFTER[phase][-1], 4]


@pytest.mark.slow
def test_write_that_the_system_refuses_is_an_error_in_a_line_and_a_later_save_works(tmp_path):
    code, said, complained = run_child(tmp_path, 'refused')
    assert code == 0, complained
    assert said.startswith(f'step 3 could not be saved in {tmp_path}') and 'the newest checkpoint is that of step 2' in said
    assert Checkpoints(tmp_path).steps() == [2, 3] and not list(tmp_path.glob('*.tmp'))
    assert Checkpoints(tmp_path).restore(like()).step == 3


@pytest.mark.slow
def test_disk_that_is_full(tmp_path):
    """C5: a file system of 6 MB, a state of 20 MB."""
    mount = f'mount -t tmpfs -o size=6m none {tmp_path}'
    private = lambda command: ('unshare', '-rm', 'sh', '-c', f'{mount} && {command}', 'sh')
    if subprocess.run(private('true'), capture_output=True).returncode:
        pytest.skip('this system lets nobody mount a file system of their own')
    code, said, complained = run_child(tmp_path, 'full', before=private(f'"$@" && ls {tmp_path}'))
    assert code == 0, complained
    assert said.startswith(f'step 3 could not be saved in {tmp_path}') and 'the newest checkpoint is that of step 2' in said
    assert said.splitlines()[-2:] == ['00000002', '00000003']  # a later save that fits works, and nothing is left of the other


@pytest.mark.parametrize('phase', ['save', 'arrays', 'manifest'])
def test_full_disk_leaves_the_older_ones_and_says_which_is_newest(tmp_path, phase):
    checkpoints = Checkpoints(tmp_path, 2, parse_faults(f'disk_full@1-3/{phase}'))
    with pytest.raises(SaveError, match='step 1 could not be saved in .*No space left on device.*; there is no checkpoint'):
        save(checkpoints, 1)
    save(checkpoints, 1)  # there is space again
    with pytest.raises(SaveError, match='step 2 .*; the newest checkpoint is that of step 1'):
        save(checkpoints, 2)
    assert checkpoints.steps() == [1] and not list(tmp_path.glob('*.tmp')) and checkpoints.verify(1) is None


def test_error_that_is_not_of_the_disk_passes_as_it_is(tmp_path):
    checkpoints = Checkpoints(tmp_path, 2, parse_faults('raise@1/arrays'))
    with pytest.raises(InjectedError):
        save(checkpoints, 1)
    assert not list(tmp_path.iterdir())


def test_bit_that_flips_after_the_save_costs_that_checkpoint_only(tmp_path):
    checkpoints = Checkpoints(tmp_path, 2, parse_faults('flip_bit@3/renamed=1001'))
    for step in (1, 2, 3):
        save(checkpoints, step, jax.tree.map(lambda leaf, now=step: leaf + now, like()))
    restored = checkpoints.restore(like())
    assert restored.step == 2 and len(restored.rejected) == 1 and 'is damaged' in restored.rejected[0]
    assert checkpoints.steps() == [2, 3]


def test_slow_disk_is_waited_for(tmp_path, monkeypatch):
    slept, checkpoints = [], Checkpoints(tmp_path, 2, parse_faults('sleep@1/arrays=5'))  # made first: it waits for git, which may sleep
    monkeypatch.setattr('nested_jax.training.faults.time.sleep', slept.append)
    save(checkpoints, 1)
    assert slept == [5.0] and checkpoints.verify(1) is None


def test_folder_that_may_not_be_written_is_said_in_a_line(tmp_path, monkeypatch):
    """C9."""
    checkpoints = Checkpoints(tmp_path / 'run', 2)
    save(checkpoints, 1)

    def refuse(path, *_, **__):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    with monkeypatch.context() as patch:  # not by its mode: root may write anywhere
        patch.setattr(pathlib.Path, 'mkdir', refuse)
        with pytest.raises(SaveError, match='step 2 could not be saved in .*Permission denied.*; the newest checkpoint is that of step 1'):
            save(checkpoints, 2)
        with pytest.raises(ValueError, match='train.output is .*new., allowed is a folder that can be written .*Permission denied'):
            claim_folder(tmp_path / 'new', {})
    (tmp_path / 'file').touch()
    with pytest.raises(ValueError, match='train.output is .*file/run., allowed is a folder that can be written .*Not a directory'):
        claim_folder(tmp_path / 'file' / 'run', {})
    assert checkpoints.restore(like()).step == 1
