"""Where a run's time goes, over all its restarts: steps that count, and everything else by its cause.

A ledger switches from one cause to the next, so that every second of a process belongs to one. It appends what it knows to
goodput.jsonl in the run's folder, about once a second of steps and after everything else: a process that is killed leaves it there.
`summary` reads the file. The steps that a later process did again are wasted; the time between the last line of a process that was
killed and the first of the next is recovery, which holds the seconds the last line does not know of. Time in which a run lay
stopped or finished is not counted. The other processes of a run count slow steps, in files of their own: a run is as slow as its slowest.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import socket
import statistics
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

CAUSES = ('start', 'restore', 'compile', 'data', 'step', 'save', 'evaluate')
FILE = 'goodput.jsonl'  # of the first process; goodput-1.jsonl and so on for the others
_EVERY_S = 1.0  # between two lines that say only that steps were done
_CLEAN = ('finished', 'stopped')
_FAR = 5  # medians
_NAMED = 4  # of processes and phases with slow steps, in a line
# A process that waits for another one cannot know it; that one says, by its own line, which of the first two it was.
_DATA, _WORK, _WAIT = 'for its batch', 'in its own work', 'waiting for its devices or another process'


class StepTimes:
    """Tells slow steps and waits for input from ordinary ones, and counts them by the phase that made them so.

    A step is slow above the median plus three median absolute deviations of those before it; a wait for input is a stall above five
    median steps. Neither is told before ten steps.
    """

    def __init__(self):
        self.slow = dict.fromkeys((_DATA, _WORK, _WAIT), 0)  # stalls are those of the first
        self._recent: deque[tuple[float, float]] = deque(maxlen=128)  # seconds of work and of waiting

    def add(self, step_s: float, data_s: float, waited_s: float = 0.0) -> str | None:
        """Counts one step.

        Args:
            step_s: seconds that it took, its batch being there.
            data_s: that its batch took to come.
            waited_s: of `step_s`, those in which the process waited for a result.

        Returns:
            Where the time went, of a step that is worth a line: one that took five times the median. None for all others.
        """
        told, work_s = None, step_s - waited_s
        if len(self._recent) >= 10:
            steps = [work + wait for work, wait in self._recent]
            median = statistics.median(steps)
            deviation = statistics.median(abs(value - median) for value in steps)
            if step_s > median + 3 * deviation:
                usual_work, usual_wait = (statistics.median(values) for values in zip(*self._recent, strict=True))
                self.slow[_WORK if work_s - usual_work >= waited_s - usual_wait else _WAIT] += 1
            self.slow[_DATA] += data_s > _FAR * median
            if step_s + data_s > _FAR * median:
                parts = {_DATA: data_s, _WORK: work_s, _WAIT: waited_s}
                phase = max(parts, key=parts.get)
                told = f'took {step_s + data_s:.2f} s where {median:.2f} s is usual, {parts[phase]:.2f} s of it {phase}'
        self._recent.append((work_s, waited_s))
        return told


class Ledger:
    """What one process, or one try of it, spends its time on.

    Args:
        folder: of the run; None keeps nothing.
        clock: seconds that never go back.
        wall: seconds that processes share.
        process: its index. The first, 0, keeps the account; the others only how many of their steps were slow, and each prints a line
            about a step that took it far longer than usual.
        began: by `clock`, when the process did; None: now.
    """

    def __init__(
        self,
        folder: str | os.PathLike | None,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
        process: int = 0,
        began: float | None = None,
    ):
        self._path = None if folder is None else pathlib.Path(folder) / (f'goodput-{process}.jsonl' if process else FILE)
        self._clock, self._wall, self._process = clock, wall, process
        self._where = f'process {process} on {socket.gethostname()}'
        self._open(clock() if began is None else began)

    def __enter__(self) -> 'Ledger':
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None:
            with contextlib.suppress(OSError):  # of a full disk, say: it must not hide what ended the run
                self._write(ended=kind.__name__)

    def begin(self, step: int) -> None:
        """Says from which step the process goes on; nothing is written before."""
        self._first = self._step = step
        self._write()

    @contextlib.contextmanager
    def during(self, cause: str) -> Iterator[None]:
        """A context whose time has a cause of its own."""
        before = self._switch(cause)
        try:
            yield
        finally:
            self._switch(before)
        if cause != 'data':
            self._write()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """A context, within a step, in which the process waits for what its devices compute."""
        began = self._clock()
        yield
        self._waited += self._clock() - began

    def step(self, step: int) -> None:
        """Says that steps up to `step` are done; what follows is a step until something else is said."""
        self._switch('step')
        step_s, data_s = (self._seconds[cause] - self._before[cause] for cause in ('step', 'data'))
        self._before = dict(self._seconds)
        waited_s, self._waited = self._waited, 0.0
        if step > self._step and (told := self._times.add(step_s, data_s, waited_s)):
            print(f'step {step} in {self._where} {told}', flush=True)
        self._step = step
        if self._clock() - self._written >= _EVERY_S:
            self._write()

    def go_back(self) -> None:
        """Begins anew, as a process that is started again does."""
        self._write(ended='back')
        self._open(self._clock())

    def close(self, ended: str) -> None:
        """Says how the run ended: 'finished' or 'stopped', after which time is not counted."""
        self._write(ended=ended)

    def _open(self, began: float) -> None:
        now = self._clock()
        self._began, self._id = self._wall() - (now - began), f'{os.getpid()}-{time.time_ns()}'
        self._seconds = dict.fromkeys(CAUSES, 0.0)
        self._before = dict(self._seconds)
        self._times, self._waited = StepTimes(), 0.0
        self._told = dict(self._times.slow)
        self._first: int | None = None
        self._step = 0
        self._cause, self._since, self._written = 'start', began, now

    def _switch(self, cause: str) -> str:
        now, before = self._clock(), self._cause
        self._seconds[before] += now - self._since
        self._cause, self._since = cause, now
        return before

    def _write(self, ended: str | None = None) -> None:
        self._switch(self._cause)
        self._written = self._since
        if self._first is None or self._path is None or (self._process and self._times.slow == self._told):
            return
        self._told = dict(self._times.slow)
        times = dict(began=self._began, now=self._wall(), seconds=self._seconds, where=self._where, slow=self._told)
        line = json.dumps(dict(process=self._id, first_step=self._first, step=self._step, ended=ended, **times))
        with open(self._path, 'a') as file:
            file.write(line + '\n')


@dataclasses.dataclass(frozen=True)
class Summary:
    """Seconds of a whole run by what they went into; `total_s` is their sum but for clocks that were set."""

    total_s: float  # wall time, in which the run lay stopped excepted
    productive_s: float  # steps that no later process did again
    badput_s: dict[str, float]  # cause -> seconds: of `CAUSES` without step, wasted, recovery
    wasted_steps: int  # done again
    restarts: int
    slow: dict[str, int]  # steps that took some process longer than usual, by process, host and what it was doing
    errors: dict[str, int]  # name -> processes, or tries, that it ended: SaveError, say

    @property
    def goodput(self) -> float:
        """Productive share of the time."""
        return self.productive_s / self.total_s if self.total_s else 0.0

    def __str__(self) -> str:
        parts = ', '.join(f'{name} {value / self.total_s:.1%}' for name, value in self.badput_s.items() if value and self.total_s)
        again = f'{self.restarts} restarts, {self.wasted_steps} steps done again'
        again += ''.join(f', {count} slow in {name}' for name, count in sorted(self.slow.items(), key=lambda item: -item[1])[:_NAMED])
        again += ''.join(f', {count} x {name}' for name, count in self.errors.items())
        return f'goodput {self.goodput:.1%} of {self.total_s:.1f} s ({parts}); {again}'


def summary(folder: str | os.PathLike) -> Summary:
    """What the ledgers of a run's processes add up to.

    Args:
        folder: of the run.

    Raises:
        FileNotFoundError: when it has no ledger.
    """
    tries = _tries(pathlib.Path(folder) / FILE)
    badput = dict.fromkeys([*(cause for cause in CAUSES if cause != 'step'), 'wasted', 'recovery'], 0.0)
    productive, total, wasted_steps = 0.0, 0.0, 0
    for index, lines in enumerate(tries):
        last, later = lines[-1], tries[index + 1 :]
        kept_to = min([last['step'], *(following[0]['first_step'] for following in later)])
        kept_s = max((line['seconds']['step'] for line in lines if line['step'] <= kept_to), default=0.0)
        kept_s = last['seconds']['step'] if kept_to == last['step'] else kept_s
        productive += kept_s
        badput['wasted'] += last['seconds']['step'] - kept_s
        wasted_steps += last['step'] - max(kept_to, last['first_step']) if kept_to < last['step'] else 0
        for cause in CAUSES:
            if cause != 'step':
                badput[cause] += last['seconds'][cause]
        total += last['now'] - last['began']
        if later and last['ended'] not in _CLEAN:
            gap = later[0][0]['began'] - last['now']
            badput['recovery'] += gap
            total += gap
    slow = Counter()
    others = (lines for path in pathlib.Path(folder).glob('goodput-*.jsonl') for lines in _tries(path))
    for last in (lines[-1] for lines in (*tries, *others)):  # of which older ones have no such counts
        slow.update({f'{last["where"]}, {phase}': count for phase, count in last.get('slow', {}).items() if count})
    ends = (lines[-1]['ended'] for lines in tries)
    errors = Counter(end for end in ends if end not in (None, 'back', *_CLEAN))
    return Summary(total, productive, badput, wasted_steps, max(len(tries) - 1, 0), dict(slow), dict(errors))


def _tries(path: pathlib.Path) -> list[list[dict[str, Any]]]:
    """Lines of each try, in order; a line that a kill cut off is left out."""
    tries: dict[str, list[dict[str, Any]]] = {}
    for text in path.read_text().splitlines(keepends=True):
        with contextlib.suppress(json.JSONDecodeError):
            line = json.loads(text)
            tries.setdefault(line['process'], []).append(line)
    return list(tries.values())
