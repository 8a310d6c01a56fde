"""Checkpoints: what comes back is what went in, and damage is met before a value is used."""

import json
import os
import pathlib
import shutil
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nested_jax.evaluation.rows import commit
from nested_jax.training import checkpoints
from nested_jax.training.checkpoints import Checkpoints, DamagedCheckpointsError, package_versions
from nested_jax.training.config import claim_folder
from nested_jax.training.state import TrainState

CONFIG = {'model': {'width': 8, 'levels': [{'period': 1}]}, 'train': {'learning_rate': 0.1, 'keep': 2, 'output': 'a'}}


class Memories(NamedTuple):
    running: Any
    position: Any


def make_state(value: float):
    value = float(value)
    params = {'kernel': jnp.full((4, 3), value), 'scale': jnp.arange(3.0) + value, 'half': jnp.full(2, value, jnp.bfloat16)}
    optimizer = optax.adam(0.1)
    train = TrainState(jnp.int32(7), params, optimizer.init(params), jax.random.key(5))
    return train, Memories(jnp.full((2, 3), 2 * value), jnp.arange(2))


def assert_same(left, right):
    def same(a, b):
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))

    assert jax.tree.structure(left) == jax.tree.structure(right)
    jax.tree.map(same, left, right)


def save(checkpoints, step, value, data=None):
    """Saves, and waits until that is done."""
    checkpoints.save(step, make_state(value), config=CONFIG, data=data or {})
    checkpoints.wait()


@pytest.fixture
def saved(tmp_path):
    """Checkpoints of steps 1, 2 and 3, whose values are the step."""
    checkpoints = Checkpoints(tmp_path / 'checkpoints', keep=3)
    for step in (1, 2, 3):
        save(checkpoints, step, step, {'next': step})
    return checkpoints


def test_round_trip_is_bitwise(saved):
    """F3: also of what made it, and of the resolved configuration."""
    restored = saved.restore(make_state(0), CONFIG)
    assert json.loads((saved.path(3) / 'meta.json').read_text())['config'] == CONFIG
    assert (restored.step, restored.data, restored.rejected) == (3, {'next': 3}, ())
    assert_same(restored.state, make_state(3))
    assert restored.versions == package_versions() and restored.versions['jax'] == jax.__version__
    kind = jax.devices()[0].device_kind
    made_by = dict(commit=commit(), devices={kind: 8}, processes=1, xla_flags=os.environ.get('XLA_FLAGS', ''), mesh={})
    assert restored.made_by == made_by and restored.changes == ()


def test_secrets_are_in_no_file_of_a_run_and_compare_as_equal(tmp_path):
    config = lambda token: CONFIG | {'data': {'hf_token': token, 'corpus': f'https://me:{token}@host/x'}}
    claim_folder(tmp_path / 'run', config('hush'))
    checkpoints = Checkpoints(tmp_path / 'run' / 'checkpoints')
    checkpoints.save(1, make_state(1), config=config('hush'), data={})
    claim_folder(tmp_path / 'run', config('another'))
    assert checkpoints.restore(make_state(0), config('another')).step == 1
    assert not any(b'hush' in path.read_bytes() for path in files_of(tmp_path))


def test_preferred_steps_come_first_while_they_verify(saved):
    even = lambda step: step % 2 == 0
    assert saved.restore(make_state(0), CONFIG, even).step == 2
    flip_somewhere(saved.path(2) / 'meta.json')
    assert saved.restore(make_state(0), CONFIG, even).step == 3


def test_restores_onto_other_devices(saved):
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:4]), ('data',))
    whole = jax.sharding.NamedSharding(mesh, jax.P())
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), make_state(0))
    restored = saved.restore(like).state
    assert_same(restored, make_state(3))
    assert restored[0].params['kernel'].sharding.is_equivalent_to(whole, 2)


def test_arrays_stay_the_same_from_one_device_to_eight(tmp_path):
    """R3. One after the other 1, 2, 4 and 8 devices, whole on each and split over them, and back to one."""
    state = {'kernel': jnp.asarray(np.random.default_rng(0).normal(size=(16, 8)), jnp.float32), 'half': jnp.arange(8, dtype=jnp.bfloat16)}
    checkpoints, expected = Checkpoints(tmp_path), jax.tree.map(np.asarray, state)
    for step, (count, spec) in enumerate([(1, None), (2, 'fsdp'), (4, None), (8, 'fsdp'), (8, None), (1, None)], 1):
        checkpoints.save(step, state, config={}, data={})
        where = jax.sharding.NamedSharding(jax.sharding.Mesh(np.asarray(jax.devices()[:count]), ('fsdp',)), jax.P(spec))
        like = jax.tree.map(lambda x, where=where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), state)
        state = checkpoints.restore(like).state
        assert state['kernel'].sharding == where and state['kernel'].addressable_shards[0].data.shape[0] == 16 // (count if spec else 1)
        assert_same(jax.tree.map(np.asarray, state), expected)


def test_empty_folder_has_nothing_to_restore(tmp_path):
    assert Checkpoints(tmp_path / 'new').restore(make_state(0)) is None


def files_of(folder):
    return sorted(path for path in folder.rglob('*') if path.is_file())


def flip(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << (position % 8)
    path.write_bytes(content)


def flip_somewhere(path):
    size = path.stat().st_size
    flip(path, size // 2)


DAMAGE = {
    'flipped': flip_somewhere,
    'truncated': lambda path: path.write_bytes(path.read_bytes()[:-1]),
    'emptied': lambda path: path.write_bytes(b''),
    'deleted': lambda path: path.unlink(),
}


@pytest.mark.parametrize('kind', DAMAGE)
def test_any_damaged_file_is_named_and_passed_over(saved, tmp_path, kind):
    """C1 and C2: by the digest, before any of its values is used; the one before is restored."""
    newest = saved.path(3)
    names = [path.relative_to(newest) for path in files_of(newest)]
    assert {'manifest.json', 'meta.json'} < {str(name) for name in names} and len(names) > 5
    for name in names:
        if (newest / name).stat().st_size == 0 and kind != 'deleted':
            continue  # nothing there to damage
        copy = tmp_path / 'copy'
        shutil.copytree(saved.folder, copy)
        damaged = Checkpoints(copy, keep=3)
        DAMAGE[kind](damaged.path(3) / name)
        restored = damaged.restore(make_state(0), CONFIG)
        assert restored.step == 2, name
        assert len(restored.rejected) == 1 and restored.rejected[0].startswith(f'step 3: {name} is '), restored.rejected
        assert_same(restored.state, make_state(2))
        shutil.rmtree(copy)


def test_the_first_of_several_processes_says_what_another_one_found(saved, monkeypatch):
    """Each reads a part of the files, and the first alone has a screen."""
    files = list(json.loads((saved.path(3) / 'manifest.json').read_text()))
    flip(saved.path(3) / files[2], 0)
    monkeypatch.setattr(jax, 'process_count', lambda: 3)
    monkeypatch.setattr(checkpoints, 'first_to_fail', lambda failed: 2)
    monkeypatch.setattr(checkpoints, 'first_says', lambda step: step)
    with pytest.raises(DamagedCheckpointsError, match=f'step 3: {files[2]} is damaged; step 2: process 2 could not read it; step 1'):
        saved.restore(make_state(0), CONFIG)


def test_a_flipped_bit_anywhere_in_any_file_is_found(saved):
    """C1: twelve places of every file. orbax alone reads such arrays without a word."""
    for path in files_of(saved.path(3)):
        content = path.read_bytes()
        for position in {len(content) * share // 12 for share in range(12)} if content else ():
            flip(path, position)
            assert saved.verify(3) == f'{path.relative_to(saved.path(3))} is damaged' or path.name == 'manifest.json', position
            assert saved.verify(3) is not None, position
            path.write_bytes(content)
    assert saved.verify(3) is None


def test_every_single_bit_of_a_small_file_counts(saved):
    manifest = saved.path(3) / 'manifest.json'
    content = manifest.read_bytes()
    for position in range(0, len(content), 17):
        for bit in range(8):
            broken = bytearray(content)
            broken[position] ^= 1 << bit
            manifest.write_bytes(broken)
            assert saved.verify(3) is not None, (position, bit)
    manifest.write_bytes(content)
    assert saved.verify(3) is None


def test_a_manifest_lists_what_is_there_no_more_and_no_less(saved):
    manifest = saved.path(3) / 'manifest.json'
    whole = json.loads(manifest.read_text())
    write = lambda files: manifest.write_text(json.dumps(files, indent=1, sort_keys=True))
    write({})
    assert saved.verify(3) == f'{min(whole)} is not in manifest.json'
    for name in whole:
        write({other: digest for other, digest in whole.items() if other != name})
        assert saved.verify(3) == f'{name} is not in manifest.json'
    write(whole)
    (saved.path(3) / 'state' / 'more').touch()
    assert [saved.verify(3, part, 3) for part in range(3)] == ['state/more is not in manifest.json'] * 3
    assert saved.restore(make_state(0)).rejected == ('step 3: state/more is not in manifest.json',)
    (saved.path(3) / 'state' / 'more').unlink()
    assert saved.verify(3) is None


def test_an_empty_manifest_of_an_empty_checkpoint_is_damage(saved):
    shutil.rmtree(saved.path(3))
    saved.path(3).mkdir()
    (saved.path(3) / 'manifest.json').write_text('{}')
    assert saved.verify(3) == 'meta.json is missing'


def test_refuses_to_start_over_when_all_are_bad(saved):
    """C3."""
    for step in (1, 2, 3):
        flip_somewhere(saved.path(step) / 'meta.json')
    with pytest.raises(DamagedCheckpointsError, match='refusing to start over .* .step 3: meta.json is damaged.*step 1'):
        saved.restore(make_state(0))


def test_starts_over_where_asked_to_and_throws_nothing_away(saved):
    """C3."""

    def damage():
        for step in saved.steps():
            flip_somewhere(saved.path(step) / 'meta.json')

    said = []
    assert saved.restore(make_state(0), start_over=said.append).step == 3 and not said
    for number in (1, 2):
        damage()
        assert saved.restore(make_state(0), start_over=said.append) is None
        aside = saved.folder.with_name(f'checkpoints.damaged-{number}')
        assert 'meta.json is damaged' in said[-1] and said[-1].endswith(f', and now in {aside}')
        assert saved.steps() == [] and len(list(aside.iterdir())) == (3 if number == 1 else 1)
        save(saved, 4, 4)


def test_what_is_not_as_it_was_is_told(saved, monkeypatch):
    """R3: which packages, devices and mesh numbers come from, where a run goes on with others."""
    monkeypatch.setattr(checkpoints, 'package_versions', lambda: package_versions() | dict(jax='9.9'))
    other = Checkpoints(saved.folder, mesh=dict(data=2, fsdp=4))
    expected = (f'jax {jax.__version__} when it was saved, 9.9 now', 'mesh none when it was saved, data=2, fsdp=4 now')
    assert other.restore(make_state(0)).changes == expected


def test_an_emptied_step_folder_is_passed_over(saved):
    """C2."""
    shutil.rmtree(saved.path(3))
    saved.path(3).mkdir()
    assert saved.restore(make_state(0)).rejected == ('step 3: manifest.json is missing',)


def test_keeps_the_newest(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in range(1, 6):
        save(checkpoints, step, step)
    assert checkpoints.steps() == [4, 5]


def test_never_removes_the_only_one_that_verifies(tmp_path, monkeypatch):
    """C8."""
    checkpoints = Checkpoints(tmp_path, keep=1)
    save(checkpoints, 1, 1)

    def save_then_damage(step):
        real = Checkpoints._retain
        with monkeypatch.context() as patch:
            patch.setattr(Checkpoints, '_retain', lambda self, saved: (flip_somewhere(self.path(step) / 'meta.json'), real(self, saved)))
            save(checkpoints, step, step)

    save_then_damage(2)
    assert checkpoints.steps() == [1, 2]
    save_then_damage(3)
    assert checkpoints.steps() == [1, 3]
    assert checkpoints.restore(make_state(0)).step == 1
    save(checkpoints, 4, 4)
    assert checkpoints.steps() == [4]


class Killed(BaseException):
    """What nothing catches."""


@pytest.mark.parametrize('damaged', [2, 1])
def test_killed_before_any_operation_on_files_one_that_verifies_is_left(tmp_path, monkeypatch, damaged):
    """C8: two checkpoints, one of which is damaged, and a save that keeps only the newest is killed before every one."""
    steps_left, kills = [], 0
    while True:
        folder, left = tmp_path / f'{kills}', kills
        checkpoints = Checkpoints(folder, keep=2)
        for step in (1, 2):
            save(checkpoints, step, step)
        flip_somewhere(checkpoints.path(damaged) / 'meta.json')
        good = 3 - damaged

        def counted(operation):
            def run(*arguments, **options):
                nonlocal left
                left -= 1
                if left < 0:  # as long as the process lives, nothing more happens
                    raise Killed
                return operation(*arguments, **options)

            return run

        with monkeypatch.context() as patch:
            for owner, name in ((pathlib.Path, 'mkdir'), (pathlib.Path, 'rename'), (shutil, 'rmtree'), (os, 'replace'), (os, 'fsync')):
                patch.setattr(owner, name, counted(getattr(owner, name)))
            try:
                save(Checkpoints(folder, keep=1), 3, 3)
            except Killed:
                kills += 1
            else:
                break
        again = Checkpoints(folder)
        assert not list(folder.glob('*.tmp'))
        restored = again.restore(make_state(0))
        assert restored.step in (good, 3)
        assert_same(restored.state, make_state(restored.step))
        steps_left.append(restored.step)
    assert steps_left == sorted(steps_left) and set(steps_left) == {good, 3} and kills >= 5


def test_saving_again_after_a_rejected_step_replaces_it(saved):
    flip_somewhere(saved.path(3) / 'meta.json')
    save(saved, 2, 20)
    assert saved.steps() == [1, 2]
    assert_same(saved.restore(make_state(0)).state, make_state(20))


@pytest.mark.parametrize('place', ['_manifest_text', '_digest', '_write'])
def test_interrupted_save_leaves_the_older_checkpoint(saved, monkeypatch, place):
    def die(*_):
        raise OSError(28, 'No space left on device')

    with monkeypatch.context() as patch:
        patch.setattr(f'nested_jax.training.checkpoints.{place}', die)
        with pytest.raises(OSError, match='No space'):
            save(saved, 4, 4)
    assert saved.steps() == [1, 2, 3] and not list(saved.folder.glob('*.tmp'))
    assert saved.restore(make_state(0)).step == 3


def test_leftovers_of_a_killed_save_are_ignored_and_removed(saved):
    shutil.copytree(saved.path(3), saved.folder / '00000004.tmp')
    assert saved.steps() == [1, 2, 3]
    assert not list(Checkpoints(saved.folder).folder.glob('*.tmp'))


@pytest.mark.parametrize(
    'change, message',
    [
        (lambda c: c['train'].update(learning_rate=0.2), r'train.learning_rate is 0.2, but .* train.learning_rate = 0.1'),
        (lambda c: c['model']['levels'][0].update(period=4), r'model.levels.0.period is 4, but .* = 1'),
        (lambda c: c['model']['levels'].append({'period': 2}), r'model.levels.1.period is 2, but .* = None'),
        (lambda c: c['train'].pop('learning_rate'), r'train.learning_rate is None, but .* = 0.1'),
    ],
)
def test_another_configuration_is_refused_by_the_field(saved, change, message):
    config = json.loads(json.dumps(CONFIG))
    change(config)
    with pytest.raises(ValueError, match=message):
        saved.restore(make_state(0), config)


def test_fields_that_touch_no_number_may_change(saved):
    config = CONFIG | {'train': CONFIG['train'] | {'keep': 9, 'output': 'b'}}
    assert saved.restore(make_state(0), config).step == 3


def test_wrong_shape_dtype_missing_and_extra_leaves_are_named(saved):
    """C7: by path, with both shapes."""

    def like(change):
        train, memories = make_state(0)
        params = dict(train.params)
        change(params)
        return train._replace(params=params), memories

    changes = [
        (lambda p: p.update(kernel=jnp.zeros((4, 4))), r'0/params/kernel is \[4, 3\] float32 in the checkpoint and \[4, 4\] float32'),
        (lambda p: p.update(scale=jnp.zeros(3, jnp.bfloat16)), r'0/params/scale is \[3\] float32 in the checkpoint and \[3\] bfloat16'),
        (lambda p: p.pop('scale'), r'0/params/scale is \[3\] float32 in the checkpoint and absent'),
        (lambda p: p.update(bias=jnp.zeros(1)), r'0/params/bias is absent in the checkpoint and \[1\] float32'),
    ]
    for change, message in changes:
        with pytest.raises(ValueError, match=message):
            saved.restore(like(change))


def test_another_dtype_is_read_only_when_asked_for_and_said(saved):
    def like(kernel=jnp.bfloat16, half=jnp.float32, count=jnp.int32):
        train, (running, position) = make_state(0)
        params = train.params | {'kernel': train.params['kernel'].astype(kernel), 'half': train.params['half'].astype(half)}
        return train._replace(params=params), Memories(running, position.astype(count))

    with pytest.raises(ValueError, match=r'0/params/half is \[2\] bfloat16 .* \[2\] float32 in the model; .* or restore\(..., cast=True\)'):
        saved.restore(like())
    save(saved, 4, 4 + 2**-9)  # more bits than bfloat16 has
    restored = saved.restore(like(), cast=True)
    assert restored.cast == (
        '0/params/half is [2] bfloat16 in the checkpoint and read as float32',
        '0/params/kernel is [4, 3] float32 in the checkpoint and read as bfloat16',
    )
    whole, _ = make_state(4 + 2**-9)
    expected = {'kernel': whole.params['kernel'].astype(jnp.bfloat16), 'half': whole.params['half'].astype(jnp.float32)}
    assert_same(restored.state[0].params, whole.params | expected)
    assert saved.restore(make_state(0), cast=True).cast == ()
    with pytest.raises(ValueError, match=r'1/position is \[2\] int32 in the checkpoint and \[2\] float32 .* the same shape and dtype$'):
        saved.restore(like(jnp.float32, jnp.bfloat16, jnp.float32), cast=True)


@pytest.mark.parametrize('present', [2, 0])
def test_another_format_is_refused(saved, monkeypatch, present):
    """C10: an older one than that of the code, and a newer one."""
    monkeypatch.setattr('nested_jax.training.checkpoints.FORMAT', present)
    with pytest.raises(ValueError, match=f'has checkpoint format 1, allowed is {present}'):
        saved.restore(make_state(0))


def test_keep_must_be_positive(tmp_path):
    with pytest.raises(ValueError, match='keep is 0'):
        Checkpoints(tmp_path, keep=0)
