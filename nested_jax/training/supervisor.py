"""Starts a run's processes on this machine, and starts all of them again when one ends badly. Imports no JAX.

The run itself knows how to go on from its newest verified checkpoint: the same command is given again, under a new port. Processes say
where they are in a small file each (`Whereabouts`), by which a crash loop is told from bad luck: one that ends at the same step three
times in a row will do so a fourth time. There is a budget of restarts, given anew with every checkpoint that a run gets beyond the last.
"""

import dataclasses
import math
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from types import FrameType
from typing import BinaryIO

from nested_jax.config import check
from nested_jax.training.cluster import FAILED, LOCAL

VARIABLE = 'NESTED_JAX_WHEREABOUTS'  # file of a process
_LISTEN = 'JAX_COORDINATOR_BIND_ADDRESS'  # which JAX reads; it lets in whoever reaches it, from other machines too unless told otherwise
SAME_STEP = 3  # times in a row that end a run
_POLL_S = 0.05
_SETTLE_S = 1.0  # in which a process whose end made others fail is seen to have ended too


class Whereabouts:
    """Says in a file which step a process is about to do, and which was saved last.

    Args:
        path: of the file; None or empty: nothing is said.
    """

    def __init__(self, path: str | None):
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600) if path else None
        self.say(0, 0)

    def say(self, step: int | None = None, saved: int | None = None) -> None:
        """Replaces what was said before, each number in one call: a process that is killed leaves the old or the new one.

        Each has a place of its own, since the run says the one and the thread that saves the other.
        """
        for place, number in enumerate((step, saved)):
            if self._file is not None and number is not None:
                os.pwrite(self._file, f'{number:20d}\n'.encode(), 21 * place)


def read_whereabouts(path: str | os.PathLike) -> tuple[int, int]:
    """(step about to be done, step saved last); zeros where the process has not got so far."""
    path = pathlib.Path(path)
    words = path.read_text().split() if path.exists() else []
    return (int(words[0]), int(words[1])) if len(words) == 2 else (0, 0)


@dataclasses.dataclass(frozen=True)
class Ended:
    """How one attempt ended."""

    process: int  # that ended badly, first as far as can be told; -1: none
    code: int  # its exit code, 128 + number for a signal
    step: int  # that it was about to do, or the others were, whichever is lower; 0: before the first
    saved: int  # newest step saved
    asked: bool  # by a signal that it answered: it saved and stopped, where one that is killed has no exit code of its own


class Supervisor:
    """Runs one command as several processes until all of them end well.

    Args:
        command: of every process; what it is to join is in its environment.
        processes: how many.
        devices: simulated CPU devices of each; None: as the environment says.
        logs: folder of their output, a file for each process and attempt.
        restarts: that are allowed without a newer checkpoint.
        environment: variables of the processes.
        say: prints a line.

    Raises:
        ValueError: naming the argument, its value and what is allowed.
    """

    def __init__(
        self,
        command: list[str],
        processes: int,
        *,
        devices: int | None = None,
        logs: str | os.PathLike,
        restarts: int = 10,
        environment: Mapping[str, str] = os.environ,
        say: Callable[[str], None] = print,
    ):
        check(bool(command), 'command', command, 'a program and its arguments')
        check(processes >= 1, 'processes', processes, 'an integer of at least 1')
        check(devices is None or devices >= 1, 'devices', devices, 'an integer of at least 1 or None')
        check(restarts >= 0, 'restarts', restarts, 'an integer of at least 0')
        self.command, self.count, self.restarts, self.say = command, processes, restarts, say
        self.logs = pathlib.Path(logs)
        local = dict(JAX_PLATFORMS='cpu') | ({} if devices is None else dict(JAX_NUM_CPU_DEVICES=str(devices)))
        self._environment = dict(environment) | local
        self._processes: list[subprocess.Popen] = []
        self._signals = 0

    def run(self) -> int:
        """The exit code: 0 when all processes ended well, else that of the one that did not."""
        self.logs.mkdir(parents=True, exist_ok=True)
        before = {number: signal.signal(number, self._pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            return self._run()
        finally:
            self._kill()
            for number, handler in before.items():
                signal.signal(number, handler)

    def _run(self) -> int:
        steps, best, used, attempt = [], 0, 0, 0
        while True:
            attempt += 1
            ended = self._attempt(attempt)
            if not ended.code or ended.asked or self._signals:
                return ended.code
            if ended.saved > best:
                best, used = ended.saved, 0
            steps.append(ended.step)
            where = f'at step {ended.step}' if ended.step else 'before the first step'
            self.say(f'attempt {attempt}: process {ended.process} ended with code {ended.code} {where}; its output is in {self.logs}')
            if len(steps) >= SAME_STEP and len(set(steps[-SAME_STEP:])) == 1:
                self.say(f'a crash loop, {SAME_STEP} times in a row {where}: not started again')
                return ended.code
            if used == self.restarts:
                self.say(f'started again {used} times without a newer checkpoint than that of step {best}: not started again')
                return ended.code
            used += 1
            self.say(f'all processes are started again, from step {ended.saved}' if ended.saved else 'all processes are started again')

    def _attempt(self, attempt: int) -> Ended:
        files = [self.logs / f'attempt-{attempt}-process-{index}.step' for index in range(self.count)]
        port = _free_port()
        for index, file in enumerate(files):
            file.unlink(missing_ok=True)
            told = dict(zip(LOCAL, (f'localhost:{port}', str(self.count), str(index)), strict=True))
            told |= {_LISTEN: f'localhost:{port}', VARIABLE: str(file)}
            self._processes.append(self._start(self._environment | told, file.with_suffix('.log'), index))
        tee = threading.Thread(target=_tee, args=(self._processes[0].stdout, files[0].with_suffix('.log')))
        tee.start()
        codes = self._wait()
        self._kill()
        tee.join()
        # Whoever failed may have done so since another one had ended: processes that say more than that come first.
        bad = min(((index, code) for index, code in enumerate(codes) if code), key=lambda end: end[1] == FAILED, default=(-1, 0))
        where = [read_whereabouts(file) for file in files]
        code = 128 - bad[1] if bad[1] < 0 else bad[1]
        asked = bad[1] in (128 + signal.SIGINT, 128 + signal.SIGTERM)
        return Ended(bad[0], code, min(step for step, _ in where), max(saved for _, saved in where), asked)

    def _start(self, environment: dict[str, str], log: pathlib.Path, index: int) -> subprocess.Popen:
        """A process in a session of its own, so that it dies with all it has started and Ctrl-C reaches it through here only."""
        with open(log, 'wb') as file:
            output = subprocess.PIPE if index == 0 else file
            return subprocess.Popen(self.command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)

    def _wait(self) -> list[int | None]:
        """Exit codes when all have ended, or one badly: None for those that then still run.

        One that failed is not taken for the first at once: whoever made it fail may be seen to have ended a moment later.
        """
        until = math.inf
        while True:
            codes = [process.poll() for process in self._processes]
            bad = {code for code in codes if code}
            if bad:
                until = min(until, time.monotonic() + _SETTLE_S)
            if None not in codes or bad - {FAILED} or time.monotonic() >= until:
                return codes
            time.sleep(_POLL_S)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        """The first signal asks the processes to save and stop, the second not to wait for that, the third is SIGKILL."""
        self._signals += 1
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM if self._signals < 3 else signal.SIGKILL)

    def _kill(self) -> None:
        """Ends what is left: those that wait for a process that has ended would wait for long, and write to the run's folder later."""
        for process in self._processes:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            process.wait()
        self._processes = []


def _tee(source: BinaryIO, log: pathlib.Path) -> None:
    """Copies a process's output to its log and to standard output."""
    with source, open(log, 'wb') as file:
        for line in source:
            file.write(line)
            file.flush()
            sys.stdout.write(line.decode(errors='replace'))
            sys.stdout.flush()


def _free_port() -> int:
    with socket.socket() as bound:
        bound.bind(('localhost', 0))
        return bound.getsockname()[1]
