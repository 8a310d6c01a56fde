"""SIGINT and SIGTERM end a run after a step, with a checkpoint: in a run of several processes, all of them after the same one."""

import ctypes
import functools
import os
import signal
import threading
from collections.abc import Callable
from types import FrameType

import jax
from jax.experimental import multihost_utils


class StopSignals:
    """While open, notes SIGINT and SIGTERM instead of dying; the second one ends the process with 128 + its number.

    Where there are other processes, JAX has a handler of its own for SIGTERM, which tells them; a signal is noted and passed on to it.
    JAX's cannot be put back from Python, so that in this case the handlers of this class stay after it is closed.
    """

    def __init__(self):
        self.received: int | None = None
        self._num_steps = 0

    def __enter__(self) -> 'StopSignals':
        signals = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
        self._pass_on = _handler_of_jax() if signals and jax.distributed.is_initialized() else None
        self._before = {number: signal.signal(number, self._note) for number in signals}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items() if self._pass_on is None else ():
            if handler is not None:
                signal.signal(number, handler)

    def reached(self) -> int | None:
        """The signal to stop for after the step in hand; to be asked once in every step, by all processes."""
        if not jax.distributed.is_initialized():
            return self.received
        # Counted here, since a run that goes back to a checkpoint does steps again, and JAX wants numbers that grow.
        self._num_steps += 1
        return (self.received or signal.SIGTERM) if multihost_utils.reached_preemption_sync_point(self._num_steps) else None

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            os._exit(128 + number)
        self.received = number
        if self._pass_on is not None:
            self._pass_on(signal.SIGTERM)


@functools.cache
def _handler_of_jax() -> Callable[[int], None] | None:
    """What JAX does about SIGTERM, asked of the system before Python replaces it: it stores a flag that a thread of JAX looks at."""
    if callable(signal.getsignal(signal.SIGTERM)):  # one of Python's; it knows nothing of others
        return None
    find = ctypes.pythonapi.PyOS_getsig
    find.argtypes, find.restype = [ctypes.c_int], ctypes.c_void_p
    address = find(signal.SIGTERM)
    return ctypes.CFUNCTYPE(None, ctypes.c_int)(address) if address else None
