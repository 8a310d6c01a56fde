"""Stages of a long loop, each done once: a program killed anywhere goes on where it stopped and ends with the same bits.

    stages = Stages(folder)
    edits = stages('round-1/edits', lambda: dict(tokens=sample(params)))   # computed, stored, returned
    edits = stages('round-1/edits', lambda: dict(tokens=sample(params)))   # read

A stage must be a pure function of the run's configuration and of earlier stages. Its arrays are written under another name and renamed
when they are complete, so that a stage is there whole or not at all; a file that was damaged later is told by the digest in front of it,
named, and computed again.
"""

import hashlib
import io
import os
import pathlib
import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import traverse_util

Arrays = dict[str, np.ndarray]
_NAME = re.compile(r'[A-Za-z0-9._-]{1,128}(/[A-Za-z0-9._-]{1,128})*')


class Stages:
    """The finished stages in a folder.

    Args:
        folder: made when absent.
        say: told of damaged files.
    """

    def __init__(self, folder: str | os.PathLike, say: Callable[[str], None] = print):
        self.folder, self.say = pathlib.Path(folder), say
        self.computed = 0  # stages that this object did not find

    def __call__(self, name: str, make: Callable[[], Arrays]) -> Arrays:
        """A stage's arrays, made when there are none yet.

        Raises:
            ValueError: for a name that is not made of letters, digits, '.', '_', '-', and '/' between parts.
        """
        if not _NAME.fullmatch(name) or '..' in name.split('/'):
            raise ValueError(f'name is {name!r}, allowed are letters, digits, . _ - and / between parts')
        path = self.folder / f'{name}.stage'
        found = self._read(path)
        if found is None:
            self.computed += 1
            self._write(path, make())
            found = self._read(path)
        return found

    def tree(self, name: str, make: Callable[[], Any]) -> Any:
        """The same for a pytree of nested dicts of arrays, such as parameters."""
        flat = lambda: {path: np.asarray(leaf) for path, leaf in traverse_util.flatten_dict(jax.device_get(make()), sep='/').items()}
        return traverse_util.unflatten_dict(self(name, flat), sep='/')

    def _read(self, path: pathlib.Path) -> Arrays | None:
        if not path.exists():
            return None
        told, _, stored = path.read_bytes().partition(b'\n')
        if told != hashlib.sha256(stored).hexdigest().encode():
            self.say(f'{path} is damaged; it is computed again')
            return None
        with np.load(io.BytesIO(stored), allow_pickle=False) as file:
            return {name: file[name] for name in file.files}

    def _write(self, path: pathlib.Path, arrays: Arrays) -> None:
        buffer = io.BytesIO()
        np.savez(buffer, **{name: np.asarray(value) for name, value in arrays.items()})
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f'.{os.getpid()}.tmp')
        with open(temporary, 'wb') as file:
            file.write(hashlib.sha256(buffer.getvalue()).hexdigest().encode() + b'\n' + buffer.getvalue())
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
