"""Checkpoints that are verified before a value of them is used.

One checkpoint is one folder, named by its step:

    state/          the state's arrays, written by orbax (v1)
    meta.json       format, step, configuration without secrets, data cursor, every leaf's shape and dtype, package versions,
                    and what it was made by: commit, devices, processes, mesh, XLA's flags
    manifest.json   sha256 of each file above, written last

The folder is filled under a temporary name and renamed when it is complete, so a folder named by a step is complete unless it
was damaged later. orbax itself reads a file with a flipped bit without a word, casts dtypes silently and does not fall back;
the checks here stand before it.

A save keeps the run only while the state is copied; the rest is done by a thread while the run goes on. There is one save at a time, and
the run hears how it ended when it waits for it: before the next one, before it reads a checkpoint, and before it ends.

The processes of a run write its arrays together, each what its devices hold, into a folder they share. Everything else is done by the
first alone: it decides which checkpoint to read, lists the digests when all arrays are there, and gives the folder its name. Before a
value is used, each process has read a part of the files anew, and all know that every part was as it was written. The threads of a save
run no collective, which could come between those of the steps: orbax's meet through JAX's coordination service.
"""

import collections
import contextlib
import dataclasses
import hashlib
import importlib.metadata
import itertools
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from nested_jax.config import redacted
from nested_jax.evaluation.rows import commit
from nested_jax.training.config import check_same_config
from nested_jax.training.distributed import first_says, first_then_others, first_to_fail, is_first, wait
from nested_jax.training.faults import FaultPlan

FORMAT = 1
PyTree = Any
_MANIFEST = 'manifest.json'
_META = 'meta.json'
_TEMPORARY = '.tmp'
_NONE = -1  # no step
_FLOATS = {'float16', 'bfloat16', 'float32', 'float64'}
_PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'grain', 'numpy', 'nested_jax')


class DamagedCheckpointsError(RuntimeError):
    """All checkpoints of a run are damaged: starting over silently would throw the run away."""


class SaveError(OSError):
    """A checkpoint could not be written; those before it are as they were."""


@dataclasses.dataclass(frozen=True)
class Restored:
    """What `Checkpoints.restore` read."""

    step: int
    state: PyTree
    data: dict  # the data cursor
    versions: dict[str, str]  # packages that wrote it
    made_by: dict  # see `made_by`; empty for a checkpoint that came before it
    changes: tuple[str, ...]  # of these two, what is not as it is now, each with both values
    rejected: tuple[str, ...]  # newer checkpoints passed over, each with its reason
    cast: tuple[str, ...]  # leaves read as another dtype than they were written in, each with both


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: made when absent; leftovers of an interrupted save are removed.
        keep: newest checkpoints kept. An older one stays while none of those verifies.
        faults: that tests inject.
        saved: told the step of a checkpoint, in the first process, by the thread that has just given it its name.
        mesh: axis -> devices, of the run that writes; kept for those who go on on another one.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        keep: int = 2,
        faults: FaultPlan | None = None,
        saved: Callable[[int], None] = lambda step: None,
        mesh: Mapping[str, int] | None = None,
    ):
        if keep < 1:
            raise ValueError(f'keep is {keep}, allowed is an integer of at least 1')
        self.folder = pathlib.Path(folder).absolute()
        self.keep = keep
        self.faults = faults
        self._saved = saved
        self._begun: tuple[int, Future[None]] | None = None  # the save not waited for
        self._made_by = made_by() | dict(mesh=dict(mesh or {}))  # once: the source tree may move on under a long run
        if is_first():
            self.folder.mkdir(parents=True, exist_ok=True)
            for leftover in self.folder.glob('*' + _TEMPORARY):
                shutil.rmtree(leftover)

    def path(self, step: int) -> pathlib.Path:
        """Folder of one step's checkpoint."""
        return self.folder / f'{step:08d}'

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, damaged or not, oldest first."""
        return sorted(int(path.name) for path in self.folder.iterdir() if path.name.isdigit() and path.is_dir())

    def save(self, step: int, state: PyTree, *, config: dict, data: dict) -> pathlib.Path:
        """Begins to write a checkpoint, when the save begun last has ended; those no longer kept are removed at its end.

        When this returns, the state may be changed or donated. The checkpoint is there when `wait` returns.

        Checkpoints of later steps are removed too: `restore` rejected them, and this run is about to write them again.

        Args:
            step: steps done.
            state: pytree of `jax.Array`: parameters, optimizer, running memories, key.
            config: the run's configuration, JSON.
            data: where the data stands, JSON.

        Raises:
            SaveError: of this save or, as `wait` does, of the one before; the older checkpoints are as they were.
        """
        self.wait()
        meta = dict(format=FORMAT, step=step, config=redacted(config), data=data, leaves=_leaves(state))
        meta |= dict(versions=package_versions(), made_by=self._made_by)
        text = json.dumps(meta, indent=1)  # now: the run goes on and may change what it is made of
        try:
            with self._save_error(step):
                self._reach('save', step)
                if is_first():
                    self._temporary(step).mkdir()
                wait()
                arrays = ocp.save_async(self._temporary(step) / 'state', _copied(state))
        except BaseException:
            self._remove_temporary(step)
            raise
        thread = ThreadPoolExecutor(1, thread_name_prefix=f'save-{step}')
        self._begun = step, thread.submit(self._finish, step, arrays, text)
        thread.shutdown(wait=False)
        return self.path(step)

    def wait(self) -> None:
        """Until the save begun last has ended in all processes, which all call this. Returns at once when that is known.

        Raises:
            SaveError: when the disk is full, say; the older checkpoints are as they were.
        """
        if self._begun is None:
            return
        (step, thread), self._begun = self._begun, None
        error = thread.exception()
        failed = first_to_fail(error is not None)
        if failed is None:
            return
        self._remove_temporary(step)
        raise error or SaveError(f'process {failed} could not write its part of the checkpoint of step {step}, and says why')

    def end(self, say: Callable[[str], None], together: bool) -> None:
        """Waits as a process does that has failed and is about to end.

        Args:
            say: prints a line: what became of the save, where it failed too.
            together: whether all processes failed at once, and wait for the first; else they may not be there to agree with.
        """
        if self._begun is not None and (error := self._begun[1].exception()) is not None:
            say(str(error))
        if self._begun is not None and together:
            wait()
        self._begun = None

    def _finish(self, step: int, arrays: ocp.AsyncResponse, meta: str) -> None:
        """What the thread does."""
        with self._save_error(step):
            arrays.result()  # of all processes: orbax's threads wait for one another
            self._reach('arrays', step)
            if is_first():
                temporary = self._temporary(step)
                _write(temporary / _META, meta)
                _write(temporary / _MANIFEST, _manifest_text({name: _digest(temporary / name) for name in _files(temporary)}))
                self._reach('manifest', step)
        if is_first():
            for later in self.steps():
                if later >= step:
                    self._delete(later, step)
            self._temporary(step).rename(self.path(step))
            self._saved(step)
            self._reach('renamed', step)
            self._retain(step)

    def _temporary(self, step: int) -> pathlib.Path:
        return self.path(step).with_name(f'{step:08d}{_TEMPORARY}')

    def _remove_temporary(self, step: int) -> None:
        if is_first():
            shutil.rmtree(self._temporary(step), ignore_errors=True)

    @contextlib.contextmanager
    def _save_error(self, step: int) -> Iterator[None]:
        """Says in a line what the system refused."""
        try:
            yield
        except (OSError, ValueError) as error:  # orbax turns some of the former into the latter
            older = self.steps()
            stands = f'the newest checkpoint is that of step {older[-1]}' if older else 'there is no checkpoint'
            raise SaveError(f'step {step} could not be saved in {self.folder} ({error}); {stands}') from error

    def _reach(self, phase: str, step: int) -> None:
        if self.faults is not None:
            self.faults.reach(phase, step, self.path(step))

    def verify(self, step: int, part: int = 0, parts: int = 1) -> str | None:
        """None when every byte is as it was written and nothing is missing or was added, else what is wrong, with the file's name.

        Args:
            step: of the checkpoint.
            part: which files to read, of each `parts` one.
            parts: into which the reading is split.
        """
        folder = self.path(step)
        try:
            text = (folder / _MANIFEST).read_text()
            files = json.loads(text)
            if not isinstance(files, dict) or _manifest_text(files) != text:
                return f'{_MANIFEST} is damaged'
            there = set(_files(folder)) - {_MANIFEST}
            if odd := (files.keys() ^ there) | ({_META} - files.keys()):
                name = min(odd)
                return f'{name} is not in {_MANIFEST}' if name in there else f'{name} is missing'
            for name, digest in list(files.items())[part::parts]:
                if _digest(folder / name) != digest:
                    return f'{name} is damaged'
        except FileNotFoundError:
            return f'{_MANIFEST} is missing'
        except (ValueError, OSError) as error:  # not UTF-8, not JSON, not to be read
            return f'{_MANIFEST} is damaged ({error})'
        return None

    def restore(
        self,
        like: PyTree,
        config: dict | None = None,
        prefer: Callable[[int], bool] = lambda step: True,
        *,
        allow_data_change: bool = False,
        cast: bool = False,
        start_over: Callable[[str], None] | None = None,
    ) -> Restored | None:
        """Reads the newest checkpoint that verifies, when the save begun last has ended.

        Args:
            like: pytree of arrays or `jax.ShapeDtypeStruct`: structure, shapes, dtypes and shardings to restore.
            config: configuration it must have been written with; None skips the comparison.
            prefer: steps whose checkpoints are taken before all others.
            allow_data_change: whether `config.DATA_FIELDS` of the configuration may differ.
            cast: read floating numbers as the floating dtype that `like` has, rounded where it is narrower, and say which. The trainer
                never asks: its parameters are float32 whatever the model computes in.
            start_over: where there are checkpoints and none verifies, told which are moved aside and why; None: that is an error.

        Returns:
            What was read, or None when the folder holds no checkpoint at all, or none any more.

        Raises:
            DamagedCheckpointsError: when there are checkpoints and none verifies, unless `start_over`.
            ValueError: naming the field of the configuration, or the leaf, that differs.
            SaveError: as `wait` does.
        """
        self.wait()
        rejected = []
        left = sorted(self.steps(), key=lambda step: (prefer(step), step)) if is_first() else []
        while (step := first_says(left.pop() if left else _NONE)) != _NONE:
            reason = self.verify(step, jax.process_index(), jax.process_count())
            failed = first_to_fail(reason is not None)
            if failed is None:
                return self._load(step, like, config, tuple(rejected), allow_data_change, cast)
            if reason is None and is_first():  # whose screen it is: what the other one found, by reading its files again
                reason = self.verify(step, failed, jax.process_count())
            rejected.append(f'step {step}: {reason or f"process {failed} could not read it"}')
        if rejected:
            found = f'in {self.folder}: every checkpoint there is damaged ({"; ".join(rejected)})'
            if start_over is None:
                raise DamagedCheckpointsError(f'refusing to start over {found}; --start-over moves them aside and begins at step 0')
            aside = first_then_others(lambda: self._set_aside() if is_first() else None)
            start_over(f'starting over {found}, and now in {aside}')
        return None

    def _set_aside(self) -> pathlib.Path:
        """Moves all checkpoints to a new folder beside theirs, which is empty then; returns it."""
        names = (f'{self.folder.name}.damaged-{number}' for number in itertools.count(1))
        aside = next(path for path in map(self.folder.with_name, names) if not path.exists())
        self.folder.rename(aside)
        self.folder.mkdir()
        return aside

    def _load(
        self, step: int, like: PyTree, config: dict | None, rejected: tuple[str, ...], allow_data_change: bool, cast: bool
    ) -> Restored:
        folder = self.path(step)
        meta = json.loads((folder / _META).read_text())
        if meta['format'] != FORMAT:
            raise ValueError(f'{folder} has checkpoint format {meta["format"]}, allowed is {FORMAT}')
        if config is not None:
            check_same_config(meta['config'], config, folder, allow_data_change)
        changed = _check_leaves(meta['leaves'], _leaves(like), cast)
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, 'sharding', None)), like)
        versions, made = meta['versions'], meta.get('made_by', {})
        was, now = versions | made, package_versions() | self._made_by
        moved = (name for name in now if was.get(name, now[name]) != now[name])
        changes = tuple(f'{name} {_said(was[name])} when it was saved, {_said(now[name])} now' for name in moved)
        return Restored(step, ocp.load(folder / 'state', abstract), meta['data'], versions, made, changes, rejected, changed)

    def _retain(self, saved: int) -> None:
        steps = self.steps()
        old, kept = steps[: -self.keep], steps[-self.keep :]
        if old and all(self.verify(step) for step in reversed(kept)):
            good = next((step for step in reversed(old) if self.verify(step) is None), None)
            old = [step for step in old if step != good]
        for step in old:
            self._delete(step, saved)

    def _delete(self, step: int, saved: int) -> None:
        # Renamed first: a folder half removed must not look like a checkpoint.
        doomed = self.path(step).with_name(f'{step:08d}.deleted{_TEMPORARY}')
        self.path(step).rename(doomed)
        self._reach('deleting', saved)
        shutil.rmtree(doomed)


def package_versions() -> dict[str, str]:
    """Versions of the packages that decide what a number comes out as."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = 'not installed'
    return versions


def made_by() -> dict:
    """What else decides what a number comes out as: commit of the source, devices by kind, processes, XLA's flags."""
    devices = dict(collections.Counter(device.device_kind for device in jax.devices()))
    return dict(commit=commit(), devices=devices, processes=jax.process_count(), xla_flags=os.environ.get('XLA_FLAGS', ''))


def _said(value: Any) -> str:
    """A version or a count as a line has it; of a dictionary, 'data=2, fsdp=4'."""
    return (', '.join(f'{name}={count}' for name, count in value.items()) if isinstance(value, dict) else str(value)) or 'none'


def _copied(state: PyTree) -> PyTree:
    """The arrays in memory of their own: what a step is given as its own (donated) it writes over.

    orbax moves arrays to the host before it returns. What is there already, on CPU devices, it does not copy.
    """

    def copy(leaf: jax.Array) -> jax.Array:
        if any(device.platform != 'cpu' for device in leaf.sharding.device_set):
            return leaf
        shards = [jax.device_put(shard.data, shard.device, may_alias=False) for shard in leaf.addressable_shards]
        return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, shards)

    return jax.tree.map(copy, state)


def _leaves(tree: PyTree) -> dict[str, list]:
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator='/'): [list(leaf.shape), str(leaf.dtype)] for path, leaf in flat}


def _check_leaves(saved: dict[str, list], wanted: dict[str, list], cast: bool) -> tuple[str, ...]:
    """Raises ValueError for the first leaf that differs; returns those that differ as `cast` allows."""
    changed = []
    for name in dict.fromkeys([*saved, *wanted]):
        if saved.get(name) == wanted.get(name):
            continue
        was, now = (' '.join(map(str, leaves[name])) if name in leaves else 'absent' for leaves in (saved, wanted))
        castable = name in saved and name in wanted and saved[name][0] == wanted[name][0] and {saved[name][1], wanted[name][1]} <= _FLOATS
        if not (cast and castable):
            allowed = 'the same shape and dtype' + (', or restore(..., cast=True)' if castable else '')
            raise ValueError(f'{name} is {was} in the checkpoint and {now} in the model; allowed is {allowed}')
        changed.append(f'{name} is {was} in the checkpoint and read as {wanted[name][1]}')
    return tuple(changed)


def _files(folder: pathlib.Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob('*') if path.is_file())


def _digest(path: pathlib.Path) -> str:
    with open(path, 'rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


def _manifest_text(files: dict[str, str]) -> str:
    return json.dumps(files, indent=1, sort_keys=True)


def _write(path: pathlib.Path, text: str) -> None:
    with open(path, 'w') as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
