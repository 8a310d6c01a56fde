"""Faults on demand, for tests of what a run survives: a process that dies, a full disk, a flipped bit, numbers that are not finite.

A plan is a text, `kind@step`, `kind@first-last`, `kind@step/phase` or `kind@step/phase=value`, several joined by commas:

    kill@7/arrays               SIGKILL while the checkpoint of step 7 is saved, its arrays written and nothing else
    nan_batch@4-6,exit@9=3      NaN in the batches that steps 4 to 6 of an undisturbed run read; exit code 3 before step 9
    sleep@5/save=2              a save that takes two seconds more
    1:kill@6/arrays             SIGKILL of process 1 of several, which all have the plan; without a number, of each of them

`NESTED_JAX_FAULTS` holds the plan of a process. Without one there is no plan to ask, and nothing is asked.

Phases are where it happens: `step`, before the step starts, is the default; of a save, in their order, `save` (nothing is written),
`arrays` (the arrays are), `manifest` (everything is, under the temporary name), `renamed` (the checkpoint is there, older ones are
too) and `deleting` (an older one has lost its name, not its files); `evaluate`, before held-out text is read. Of a save, all but `save`
happen in its thread, while the run goes on; processes but the first know only of `save` and `arrays`.

A fault happens once a process, except in batches, which are as bad whenever they are read. Imports no JAX.
"""

import dataclasses
import errno
import os
import pathlib
import re
import signal
import time
from collections.abc import Callable
from typing import Any

import numpy as np

VARIABLE = 'NESTED_JAX_FAULTS'
SAVE_PHASES = ('save', 'arrays', 'manifest', 'renamed', 'deleting')
PHASES = ('step', *SAVE_PHASES, 'evaluate')
_TEXT = re.compile(r'((?P<process>\d+):)?(?P<kind>\w+)@(?P<first>\d+)(-(?P<last>\d+))?(/(?P<phase>\w+))?(=(?P<value>\d+(\.\d+)?))?')
_BATCH = ('nan_batch', 'inf_batch')


class InjectedError(RuntimeError):
    """What the fault `raise` raises."""


@dataclasses.dataclass(frozen=True)
class Fault:
    """One fault of a plan.

    Raises:
        ValueError: naming the field, its value and what is allowed.
    """

    kind: str
    first: int  # step before which, or of whose save, it happens; steps count from 1
    last: int  # of the steps
    phase: str = 'step'
    value: float = 0.0  # exit: the code; sleep: seconds; flip_bit: which bit, from the start of the largest file
    process: int | None = None  # that it happens in; None: in each

    def __post_init__(self):
        kinds = (*_ACTIONS, *_BATCH)
        phases = ('step',) if self.kind in _BATCH else ('renamed',) if self.kind == 'flip_bit' else PHASES
        for name, holds, allowed in (
            ('kind', self.kind in kinds, f'one of {", ".join(kinds)}'),
            ('phase', self.phase in phases, f'one of {", ".join(phases)} for {self.kind}'),
            ('first', 1 <= self.first <= self.last, f'from 1 to last={self.last}'),
        ):
            if not holds:
                raise ValueError(f'fault.{name} is {getattr(self, name)!r}, allowed is {allowed}')


class FaultPlan:
    """The faults of one process.

    Args:
        faults: that happen.
    """

    def __init__(self, faults: tuple[Fault, ...]):
        self.faults = faults
        self._done: set[tuple[int, int]] = set()

    def reach(self, phase: str, step: int, folder: pathlib.Path | None = None) -> None:
        """Does what the plan says about this place.

        Args:
            phase: one of `PHASES`.
            step: about to start, or being saved.
            folder: of the checkpoint, once it is there.
        """
        for index, fault in enumerate(self.faults):
            due = fault.kind in _ACTIONS and fault.phase == phase and fault.first <= step <= fault.last
            if due and (index, step) not in self._done:
                self._done.add((index, step))
                _ACTIONS[fault.kind](fault, folder)

    def batch(self, number: int, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The batch with what the plan does to it: the weight of the last row's last target is not finite.

        Args:
            number: of the batch, from 1.
            batch: as read.
        """
        for fault in self.faults:
            if fault.kind in _BATCH and fault.first <= number <= fault.last:
                weights = np.array(batch['weights'])
                weights[-1, -1] = np.nan if fault.kind == 'nan_batch' else np.inf
                batch = batch | dict(weights=weights)
        return batch


def parse_faults(text: str, process: int = 0) -> FaultPlan:
    """Reads a plan.

    Args:
        text: of the plan.
        process: whose faults are wanted.

    Raises:
        ValueError: naming the part that is no fault, or its field.
    """
    faults = tuple(_parse(part.strip()) for part in text.split(','))
    return FaultPlan(tuple(fault for fault in faults if fault.process in (None, process)))


def faults_of_environment(process: int = 0) -> FaultPlan | None:
    """One process's plan in `NESTED_JAX_FAULTS`; None where it is unset or empty."""
    text = os.environ.get(VARIABLE, '')
    return parse_faults(text, process) if text else None


def _parse(text: str) -> Fault:
    found = _TEXT.fullmatch(text)
    if found is None:
        raise ValueError(
            f'{VARIABLE} holds {text!r}, allowed is kind@step, kind@first-last, kind@step/phase, kind@step/phase=value and process:kind@...'
        )
    first, process = int(found['first']), found['process']
    last, value = int(found['last'] or first), float(found['value'] or 0)
    return Fault(found['kind'], first, last, found['phase'] or 'step', value, None if process is None else int(process))


def _raise(fault: Fault, _: Any) -> None:
    raise InjectedError(f'injected at step {fault.first}, phase {fault.phase}')


def _disk_full(fault: Fault, _: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _flip_bit(fault: Fault, folder: pathlib.Path) -> None:
    path = max((path for path in folder.rglob('*') if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(path.read_bytes())
    place, bit = divmod(int(fault.value), 8)
    content[place % len(content)] ^= 1 << bit
    path.write_bytes(content)


_ACTIONS: dict[str, Callable[[Fault, Any], None]] = {
    'raise': _raise,
    'exit': lambda fault, _: os._exit(int(fault.value)),
    'kill': lambda fault, _: os.kill(os.getpid(), signal.SIGKILL),
    'stop': lambda fault, _: os.kill(os.getpid(), signal.SIGSTOP),
    'sleep': lambda fault, _: time.sleep(fault.value),
    'disk_full': _disk_full,
    'flip_bit': _flip_bit,
}
