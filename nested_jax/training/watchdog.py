"""Ends a process that stands still, with all its stacks on standard error.

A collective that waits for a process which will not come, or a read from a dead disk, keeps a run alive and idle for ever: JAX's
heartbeat goes on beating. What restarts the run needs it to end. Time in which the process was stopped, by Ctrl-Z say, does not count.
"""

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import TypeVar

EXIT_CODE = 76  # of a process that was ended
OTHER_S = 3600.0  # what compiling, a batch of an evaluation, reading and writing checkpoints may take
T = TypeVar('T')


class Watchdog:
    """A thread that ends the process when a step, or what is done between steps, takes too long.

    Args:
        step_s: seconds a step may take, reading its batch and waiting for the one before included; None: no limits, and no thread.
        other_s: seconds that anything else may take.

    Raises:
        ValueError: if a limit is not above 0.
    """

    def __init__(self, step_s: float | None, other_s: float = OTHER_S):
        for name, value in (('step_s', step_s), ('other_s', other_s)):
            if not (value is None or value > 0):
                raise ValueError(f'{name} is {value!r}, allowed is a number above 0')
        self.step_s, self.other_s = step_s, other_s
        self._closed, self._awake = threading.Event(), 0.0  # seconds, as the thread counts them
        self._expect('start', other_s)

    def step(self, step: int) -> None:
        """Says that the step before has ended and this one begins."""
        self._expect(f'step {step}', self.step_s)

    @contextlib.contextmanager
    def other(self, place: str) -> Iterator[None]:
        """What has a limit of its own; the step that it interrupts gets its time anew."""
        before, _, limit = self._now
        self._expect(place, self.other_s)
        yield
        self._expect(before, limit)

    def each(self, items: Iterable[T]) -> Iterator[T]:
        """The items, each with the whole time of what is being done."""
        place, _, limit = self._now
        for item in items:
            self._expect(place, limit)
            yield item

    def __enter__(self) -> 'Watchdog':
        if self.step_s is not None:
            self._thread = threading.Thread(target=self._watch, name='watchdog', daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._closed.set()
        if self.step_s is not None:
            self._thread.join()

    def _expect(self, place: str, limit: float | None) -> None:
        self._now = place, self._awake, limit  # one assignment, which the thread sees whole

    def _watch(self) -> None:
        tick, before = min(self.step_s / 10, 1.0), time.monotonic()
        while not self._closed.wait(tick):
            now = time.monotonic()
            self._awake, before = self._awake + min(now - before, 2 * tick), now
            place, began, limit = self._now
            if self._awake - began > limit:
                _end(f'watchdog: {place} has not ended within {limit:g} s')


def _end(message: str) -> None:
    print(message, file=sys.__stderr__, flush=True)
    faulthandler.dump_traceback(file=sys.__stderr__, all_threads=True)
    os._exit(EXIT_CODE)  # an ordinary exit would wait for what stands still
