"""Saves that go on while the run does: they keep what they were given, end before the next begins, and say when they went wrong."""

import ctypes
import os
import signal
import threading
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from nested_jax.training import faults, signals
from nested_jax.training.checkpoints import Checkpoints, SaveError
from nested_jax.training.faults import InjectedError, parse_faults
from nested_jax.training.signals import StopSignals


def make_state(value):
    """A number on one device, an array split over all, one that all hold, and a key."""
    mesh = jax.make_mesh((len(jax.devices()),), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
    put = lambda array, *spec: jax.device_put(array, jax.sharding.NamedSharding(mesh, jax.P(*spec)))
    split, whole = put(np.arange(16.0, dtype=np.float32) + value, 'data'), put(np.full((3, 5), value, np.float32))
    return dict(step=jnp.int32(value), split=split, whole=whole, key=jax.random.key(value))


def assert_same(left, right):
    raw = lambda x: np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(raw(a), raw(b)), left, right)


class Disk:
    """A disk that writes nothing until it is told to: what the fault `sleep` waits for."""

    def __init__(self, monkeypatch):
        self.free, self.reached = threading.Event(), threading.Event()
        monkeypatch.setattr(faults, 'time', types.SimpleNamespace(sleep=self._wait))

    def _wait(self, seconds):
        self.reached.set()
        assert self.free.wait(60)


@pytest.fixture
def disk(monkeypatch):
    disk = Disk(monkeypatch)
    yield disk
    disk.free.set()


def begin(checkpoints, step, data=None):
    return checkpoints.save(step, make_state(step), config={}, data=data or {})


@pytest.mark.parametrize('phase', ['arrays', 'manifest'])
def test_a_save_returns_before_its_checkpoint_is_there(tmp_path, disk, phase):
    told = []
    checkpoints = Checkpoints(tmp_path, 2, parse_faults(f'sleep@1/{phase}'), told.append)
    data = {'batches': [1, 2]}
    path = begin(checkpoints, 1, data)
    data['batches'].append(3)  # of a later step
    assert disk.reached.wait(60) and checkpoints.steps() == [] and not path.exists() and not told
    disk.free.set()
    restored = checkpoints.restore(make_state(0))  # waits
    assert (restored.step, restored.data, restored.rejected, told) == (1, {'batches': [1, 2]}, (), [1])
    assert_same(restored.state, make_state(1))
    checkpoints.wait()


def test_the_next_save_begins_when_the_one_before_has_ended(tmp_path, disk):
    checkpoints, began = Checkpoints(tmp_path, 1, parse_faults('sleep@1/arrays')), []
    begin(checkpoints, 1)
    second = threading.Thread(target=lambda: (begin(checkpoints, 2), began.append(checkpoints.steps())))
    second.start()
    assert disk.reached.wait(60)
    second.join(0.2)
    assert second.is_alive() and not (tmp_path / '00000002.tmp').exists()
    disk.free.set()
    second.join(60)
    assert began[0][0] == 1
    checkpoints.wait()
    assert checkpoints.steps() == [2] and not list(tmp_path.glob('*.tmp'))


def buffers(tree):
    for leaf in jax.tree.leaves(tree):
        data = jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
        for shard in data.addressable_shards:
            yield shard.data.unsafe_buffer_pointer(), shard.data.nbytes


def test_what_is_done_to_the_state_after_the_save_began_is_not_in_it(tmp_path, monkeypatch):
    """Its memory is overwritten before orbax has read a byte, as a step that is given it as its own might do."""
    state, real = make_state(7), ocp.save_async

    def save_async(path, taken):
        for place, size in buffers(state):
            ctypes.memset(place, 0x55, size)
        return real(path, taken)

    monkeypatch.setattr(ocp, 'save_async', save_async)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(7, state, config={}, data={})
    assert_same(checkpoints.restore(make_state(0)).state, make_state(7))
    assert not np.array_equal(state['whole'], make_state(7)['whole'])


def test_state_that_is_donated_while_it_is_written(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    state = {f'{n}': jnp.full(100_000, float(n)) for n in range(8)}
    before = jax.tree.map(np.array, state)
    step = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf + 1, tree), donate_argnums=0)
    checkpoints.save(1, state, config={}, data={})
    for _ in range(3):
        state = step(state)
    assert_same(checkpoints.restore(state).state, before)


def test_failed_write_is_said_once_by_the_next_save_and_the_one_after_works(tmp_path):
    checkpoints = Checkpoints(tmp_path, 2, parse_faults('disk_full@2/arrays'))
    begin(checkpoints, 1)
    begin(checkpoints, 2)
    message = 'step 2 could not be saved in .*No space left on device.*; the newest checkpoint is that of step 1'
    with pytest.raises(SaveError, match=message):
        begin(checkpoints, 3)
    assert checkpoints.steps() == [1] and not list(tmp_path.glob('*.tmp'))
    checkpoints.wait()
    begin(checkpoints, 3)
    checkpoints.wait()
    assert checkpoints.steps() == [1, 3] and checkpoints.verify(3) is None


@pytest.mark.parametrize('phase', ['arrays', 'manifest', 'renamed'])
def test_error_of_the_thread_passes_as_it_is(tmp_path, phase):
    checkpoints = Checkpoints(tmp_path, 2, parse_faults(f'raise@1/{phase}'))
    begin(checkpoints, 1)
    with pytest.raises(InjectedError):
        checkpoints.restore(make_state(0))
    assert [path.name for path in tmp_path.iterdir()] == (['00000001'] if phase == 'renamed' else [])


def test_processes_hear_of_one_that_could_not_write_its_part(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    begin(checkpoints, 1)
    monkeypatch.setattr('nested_jax.training.checkpoints.first_to_fail', lambda failed: None if failed else 1)
    with pytest.raises(SaveError, match='process 1 could not write its part of the checkpoint of step 1, and says why'):
        checkpoints.wait()


def test_a_process_that_fails_waits_for_what_it_began_and_says_what_became_of_it(tmp_path, monkeypatch):
    said, checkpoints = [], Checkpoints(tmp_path, 2, parse_faults('sleep@1-2/arrays=0.3,disk_full@3/manifest'))
    met = []
    monkeypatch.setattr('nested_jax.training.checkpoints.wait', lambda: met.append(checkpoints.steps()))
    checkpoints.end(said.append, together=False)
    for step, together in ((1, False), (2, True)):
        begin(checkpoints, step)
        met.clear()  # where a save begins
        checkpoints.end(said.append, together)
        assert not said and checkpoints.verify(step) is None and met == [[1, 2]] * together
    begin(checkpoints, 3)
    checkpoints.end(said.append, together=False)
    checkpoints.wait()
    assert len(said) == 1 and said[0].startswith('step 3 could not be saved')
    assert Checkpoints(tmp_path).steps() == [1, 2] and not list(tmp_path.glob('*.tmp'))


def test_a_second_signal_does_not_wait_for_a_slow_disk(tmp_path, disk, monkeypatch):
    codes, checkpoints = [], Checkpoints(tmp_path, 2, parse_faults('sleep@1/arrays'))
    monkeypatch.setattr(signals.os, '_exit', lambda code: (codes.append(code), disk.free.set()))

    def send():
        for _ in range(2):
            threading.Event().wait(0.1)
            os.kill(os.getpid(), signal.SIGTERM)

    with StopSignals() as stop:
        begin(checkpoints, 1)
        sender = threading.Thread(target=send)
        sender.start()
        checkpoints.wait()
        sender.join()
    assert codes == [128 + signal.SIGTERM] and stop.received == signal.SIGTERM
