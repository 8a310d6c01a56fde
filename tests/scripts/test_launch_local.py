"""Several processes on this machine: they lose nothing to a kill, stop together, and one process goes on with as many devices."""

import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from nested_jax.training.checkpoints import Checkpoints
from nested_jax.training.cluster import LOCAL
from nested_jax.training.goodput import FILE
from nested_jax.training.supervisor import read_whereabouts
from tests.training.stored import stored_arrays

ROOT = pathlib.Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.multiprocess
SIZES = {
    'model.preset': 'transformer-tiny', 'train.steps': 6, 'train.batch-size': 8, 'train.sequence-length': 32, 'train.checkpoint-every': 2,
    'train.eval-every': 3, 'train.eval-tokens': 128, 'train.final-eval-tokens': 128, 'train.warmup-steps': 2, 'train.log-every': 1,
}  # fmt: skip

# The job with faults that only one attempt of the launcher has: plans of the first, the second and so on, then none.
PLANS = """
attempt = int(re.search('attempt-([0-9]+)', os.environ['NESTED_JAX_WHEREABOUTS'])[1])
os.environ['NESTED_JAX_FAULTS'] = [*os.environ['NESTED_JAX_FAULTS'].split(';'), *[''] * attempt][attempt - 1]
"""
# The job that stores what every process holds of an array when it saves it, and when it has restored it.
HELD = """
def note(what, step, state):
    raw = lambda leaf: jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
    leaves = {jax.tree_util.keystr(path): raw(leaf) for path, leaf in jax.tree.leaves_with_path(state)}
    shards = {f'{name}|{[part.start or 0 for part in shard.index]}': np.array(shard.data)
              for name, leaf in leaves.items() for shard in leaf.addressable_shards}
    np.savez(f'{sys.argv[-1].partition("=")[2]}-{what}-{step}-{jax.process_index()}.npz', **shards)

def saving(self, step, state, **more):
    note('saved', step, state)
    return save(self, step, state, **more)

def restoring(self, *arguments, **more):
    found = restore(self, *arguments, **more)
    if found is not None:
        note('restored', found.step, found.state)
    return found

import jax, jax.numpy as jnp, numpy as np
from nested_jax.training.checkpoints import Checkpoints
save, restore = Checkpoints.save, Checkpoints.restore
Checkpoints.save, Checkpoints.restore = saving, restoring
"""


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """With texts to learn."""
    folder, draw = tmp_path_factory.mktemp('launch'), random.Random(0)
    (folder / 'text').mkdir()
    for index in range(40):
        (folder / 'text' / f'{index}.txt').write_text(' '.join(draw.choices(['one', 'two', 'three', 'four'], k=300)))
    return folder


def start(
    folder: pathlib.Path, name: str, processes: int, devices: int, faults: str = '', restarts: int = 10, first: str = '', **more: object
) -> subprocess.Popen:
    """The launcher, of a job that does what `first` says before anything else."""
    options = [f'--{key}={value}' for key, value in (SIZES | more).items()]
    paths = [f'--data.corpus={folder / "text"}', f'--train.output={folder / name}']
    program = f"import os, re, runpy, sys\n{first}\nrunpy.run_module('experiments.hope_pretrain', run_name='__main__', alter_sys=True)"
    job = [sys.executable, *(['-c', program] if first else ['-m', 'experiments.hope_pretrain']), *options, *paths]
    counts = ['--processes', str(processes), '--devices', str(devices), '--restarts', str(restarts)]
    counts += ['--logs', str(folder / f'{name}-logs')]
    own = {
        'NESTED_JAX_FAULTS': faults,
        'JAX_COMPILATION_CACHE_DIR': str(folder / 'cache'),
        'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    }
    environment = {key: value for key, value in os.environ.items() if key != 'XLA_FLAGS'} | own
    command = [sys.executable, ROOT / 'scripts/launch_local.py', *counts, '--', *job]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen, code: int = 0) -> str:
    said, _ = process.communicate(timeout=600)
    assert process.returncode == code, said[-3000:]
    return said


def losses(folder: pathlib.Path) -> dict[int, float]:
    records = map(json.loads, (folder / 'metrics.jsonl').read_text().splitlines())
    return {record['step']: record['loss'] for record in records if 'loss' in record}


def assert_ends_as_undisturbed(folder: pathlib.Path, name: str) -> None:
    """To the bit: the loss of every step, and what the last checkpoint holds."""
    assert losses(folder / name) == losses(folder / 'undisturbed')
    last, expected = (stored_arrays(folder / run / 'checkpoints/00000006') for run in (name, 'undisturbed'))
    assert last == expected


@pytest.fixture(scope='module')
def undisturbed(folder):
    """Losses of two processes that nothing happens to."""
    finish(start(folder, 'undisturbed', 2, 4))
    found = losses(folder / 'undisturbed')
    assert sorted(found) == [1, 2, 3, 4, 5, 6] and found[6] < found[1]
    return found


def tell(launcher: subprocess.Popen, index: int, number: int) -> None:
    """A signal for one of the launcher's processes, not for itself."""
    own = f'{LOCAL[2]}={index}'.encode()
    (process,) = (pid for pid in children(launcher) if own in pathlib.Path(f'/proc/{pid}/environ').read_bytes().split(b'\0'))
    os.kill(process, number)


def children(launcher: subprocess.Popen) -> list[int]:
    """Of the launcher, whatever else runs: other tests have processes of the same index."""
    tasks = pathlib.Path(f'/proc/{launcher.pid}/task').iterdir()
    return [int(pid) for task in tasks for pid in (task / 'children').read_text().split()]


def wait_for_step(process: subprocess.Popen, folder: pathlib.Path, step: int, saved: int | None = None) -> None:
    """Until a step is done, and a checkpoint written, where one is wanted."""
    metrics = folder / 'metrics.jsonl'
    while process.poll() is None and not (metrics.exists() and step in losses(folder)):
        time.sleep(0.05)
    while process.poll() is None and not (saved is None or (folder / f'checkpoints/{saved:08d}').exists()):
        time.sleep(0.05)


def test_processes_that_are_killed_frozen_and_stuck_one_after_the_other_lose_nothing(folder, undisturbed):
    """S4 and S5. Not the first and the first are killed while they save, one is frozen, one is alive and stuck: five attempts."""
    faults = '1:kill@4/save;1:stop@4;0:kill@6/arrays;1:sleep@6=300'
    limits = {'processes.heartbeat-s': 10, 'train.watchdog-s': 20}
    said = finish(start(folder, 'worn', 2, 4, faults=faults, first=PLANS, **limits))
    ends = re.findall(r'attempt (\d): process (\d) ended with code (\d+)', said)
    assert [(attempt, code) for attempt, _, code in ends] == [('1', '137'), ('2', '134'), ('3', '137'), ('4', '76')]
    assert [process for _, process, code in ends if code != '76'] == ['1', '0', '0']  # of the frozen one, the other one
    assert re.findall(r'started again, from step (\d)', said) == ['2', '2', '4', '4']
    logs = ''.join(path.read_text() for path in (folder / 'worn-logs').glob('attempt-4-*.log'))
    assert 'watchdog: step 6 has not ended within 20 s' in logs and 'Thread 0x' in logs
    assert_ends_as_undisturbed(folder, 'worn')


@pytest.mark.exhaustive
@pytest.mark.parametrize('index', [1, 0])
def test_a_killed_process_is_started_again_with_all_and_nothing_is_lost(folder, undisturbed, index):
    """S4."""
    name = f'killed-{index}'
    process = start(folder, name, 2, 4, faults='1:sleep@6=5')
    wait_for_step(process, folder / name, 5, saved=4)
    tell(process, index, signal.SIGKILL)
    said = finish(process)
    assert 'ended with code 137' in said and 'started again, from step 4' in said
    assert_ends_as_undisturbed(folder, name)


@pytest.mark.exhaustive
def test_a_frozen_process_counts_as_dead_and_all_are_started_again(folder, undisturbed):
    """S5. JAX sees by its heartbeat that it is gone: the other one waits in a collective, and would for ever."""
    process = start(folder, 'frozen', 2, 4, faults='1:sleep@6=5', **{'processes.heartbeat-s': 10, 'processes.shutdown-s': 10})
    wait_for_step(process, folder / 'frozen', 5, saved=4)
    tell(process, 1, signal.SIGSTOP)
    said = finish(process)
    assert 'process 0 ended with code 134' in said and 'started again, from step 4' in said
    assert_ends_as_undisturbed(folder, 'frozen')


@pytest.mark.exhaustive
def test_a_process_that_is_alive_and_stuck_is_ended_with_its_stacks(folder, undisturbed):
    """S5. Its heart beats, so JAX sees nothing; the watchdog of either process does."""
    said = finish(start(folder, 'stuck', 2, 4, faults='1:sleep@6=300', restarts=0, **{'train.watchdog-s': 20}), code=76)
    assert 'ended with code 76 at step 6' in said
    logs = ''.join(path.read_text() for path in (folder / 'stuck-logs').glob('*.log'))
    assert 'watchdog: step 6 has not ended within 20 s' in logs and 'Thread 0x' in logs
    assert {step: loss for step, loss in undisturbed.items() if step < 6}.items() >= losses(folder / 'stuck').items()


def held(paths: list[pathlib.Path]) -> dict[str, np.ndarray]:
    """Global arrays, put together from what processes held of them: copies are alike, and nothing is missing."""
    shards, arrays = [], {}
    for path in paths:
        with np.load(path) as file:
            shards += [(*name.split('|'), file[name]) for name in file.files]
    for name in {name for name, _, _ in shards}:
        parts = [(json.loads(place), part) for other, place, part in shards if other == name]
        shape = np.max([np.add(place, part.shape) for place, part in parts], axis=0).astype(int)
        whole, there = np.zeros(shape, parts[0][1].dtype), np.zeros(shape, bool)
        for place, part in parts:
            where = tuple(slice(begin, begin + size) for begin, size in zip(place, part.shape, strict=True))
            assert (whole[where] == part)[there[where]].all(), name
            whole[where], there[where] = part, True
        assert there.all(), f'{name} is not whole'
        arrays[name] = whole
    return arrays


def test_stopped_together_and_gone_on_with_by_one_process(folder, undisturbed):
    """R3. One process restores whole, to the bit, the arrays of which two saved a part each, and the losses stay those of whole ones."""
    process = start(folder, 'stopped', 2, 4, faults='0:sleep@2/manifest=1,1:sleep@4=5', first=HELD, mesh='fsdp=8')
    wait_for_step(process, folder / 'stopped', 3)
    tell(process, 1, signal.SIGTERM)
    said = finish(process)
    done = max(losses(folder / 'stopped'))
    assert f'saved step {done}' in said and 3 <= done < 6
    assert f'going on from step {done}' in finish(start(folder, 'stopped', 1, 8, first=HELD))
    files = lambda what: sorted(folder.glob(f'stopped-{what}-{done}-*.npz'))
    size = lambda arrays: sum(array.size for array in arrays.values())
    saved, restored = held(files('saved')), held(files('restored'))
    assert saved.keys() == restored.keys() and size(saved) > 100_000 and size(held(files('saved')[:1])) < 0.6 * size(saved)
    for name, array in saved.items():
        np.testing.assert_array_equal(restored[name], array, err_msg=name, strict=True)
    found = losses(folder / 'stopped')
    np.testing.assert_allclose([found[step] for step in range(1, 7)], [undisturbed[step] for step in range(1, 7)], rtol=1e-6)


@pytest.mark.exhaustive
def test_twenty_steps_after_a_change_of_processes_and_a_slow_one_is_named(folder):
    """Losses of another topology stay those of the first. S6: a slow process says so itself, the other one that it waits."""
    sizes = {'train.steps': 36, 'train.checkpoint-every': 36}
    finish(start(folder, 'long', 2, 4, **sizes))
    expected = losses(folder / 'long')
    process = start(folder, 'moved', 2, 4, faults='1:sleep@13=8', **sizes)
    wait_for_step(process, folder / 'moved', 12)
    tell(process, 0, signal.SIGTERM)
    finish(process)
    done = max(losses(folder / 'moved'))
    assert 12 <= done <= 16
    first, second = (path.read_text() for path in sorted((folder / 'moved-logs').glob('*.log')))
    slow = lambda process, phase: rf'step 1\d in process {process} on \S+ took \d+\.\d+ s where .* s of it {phase}'
    assert re.search(slow(1, 'in its own work'), second) and re.search(slow(0, 'waiting for its devices or another process'), first)
    assert f'going on from step {done}' in finish(start(folder, 'moved', 1, 8, **sizes))
    found = losses(folder / 'moved')
    np.testing.assert_allclose([found[step] for step in range(1, 37)], [expected[step] for step in range(1, 37)], rtol=1e-6)


def test_a_loss_that_is_not_finite_in_one_process_is_skipped_by_all_or_ends_all(folder, undisturbed):
    """N4. The decision follows from sums over all: otherwise parameters would part, and steps after it with them."""
    skip = {'train.on-nonfinite': 'skip'}
    finish(start(folder, 'nan', 2, 4, faults='1:nan_batch@3', **skip))
    found = losses(folder / 'nan')
    assert sorted(found) == [1, 2, 4, 5, 6]
    np.testing.assert_allclose([found[1], found[2]], [undisturbed[1], undisturbed[2]], rtol=1e-6)
    records = map(json.loads, (folder / 'nan' / 'metrics.jsonl').read_text().splitlines())
    assert {record['step']: record['skipped_steps'] for record in records if 'skipped_steps' in record} == {
        step: int(step == 3) for step in range(1, 7)
    }
    assert np.isfinite(list(found.values())).all() and found[4] != undisturbed[4]
    # Where the run is to stop at the first one, nothing of it is saved, and no process goes on.
    finish(start(folder, 'abort', 2, 4, faults='1:nan_batch@4', restarts=0), code=1)
    logs = [path.read_text() for path in sorted((folder / 'abort-logs').glob('*.log'))]
    complaints = [[line for line in log.splitlines() if line.startswith('error: ')] for log in logs]
    assert len(complaints) == 2 and len(complaints[0]) == 1 and complaints[0] == complaints[1], complaints
    assert 'step 4' in complaints[0][0]
    assert [path.name for path in (folder / 'abort/checkpoints').iterdir()] == ['00000002']


@pytest.mark.parametrize('index', [2, pytest.param(0, marks=pytest.mark.exhaustive)])
def test_a_signal_for_one_of_three_stops_all_at_one_step(folder, index):
    """S1. All end by themselves, within two seconds and what the save takes: were one still running, the launcher would wait for it."""
    name = f'three-{index}'
    sizes = {'train.batch-size': 6, 'train.steps': 60, 'train.checkpoint-every': 60}  # one save, which is the stop's
    process = start(folder, name, 3, 1, faults=f'{index}:sleep@4-60=0.2', **sizes)
    wait_for_step(process, folder / name, 3)
    told = time.time()
    tell(process, index, signal.SIGTERM)
    said = finish(process)
    done = max(losses(folder / name))
    assert f'saved step {done}' in said and 3 <= done < 60 and 'started again' not in said
    ended = json.loads((folder / name / FILE).read_text().splitlines()[-1])
    assert ended['ended'] == 'stopped' and ended['now'] - told < 2 + ended['seconds']['save']
    assert [read_whereabouts(path) for path in sorted((folder / f'{name}-logs').glob('*.step'))] == [
        (done, done), (done, 0), (done, 0)  # the first alone says what is saved
    ]  # fmt: skip
    checkpoints = Checkpoints(folder / name / 'checkpoints')
    assert checkpoints.steps()[-1] == done and checkpoints.verify(done) is None
