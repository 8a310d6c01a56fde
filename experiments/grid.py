"""Grids of runs that go on where they stopped: a cell whose configuration has a row is not run again.

    cells = (Cell('transformer', 'parity', 0), Cell('transformer', 'parity', 1), ...)   # the most telling first
    grid = Grid('formal_languages', cells, config, prepare, describe, results)
    sys.exit(run_grid(grid, minutes=45))

A cell's rows are written when it is done, so that whatever ends the process costs the cell that it was at. The same command may run
several times at once, on a core each: a process passes over the cells that another one on this machine is at.
"""

import collections
import contextlib
import dataclasses
import fcntl
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import jax

from nested_jax.evaluation.rows import append_rows, config_digest, hardware_name, make_row, read_rows

INTERRUPTED = 130  # exit code, as the shell gives it


class Cell(NamedTuple):
    """One run."""

    model: str
    task: str
    seed: int


Train = Callable[[Sequence[int]], list[dict]]  # seeds -> metrics of each


@dataclasses.dataclass(frozen=True)
class Grid:
    """Cells in the order in which they are run, and what runs them."""

    experiment: str
    cells: tuple[Cell, ...]
    config: Callable[[Cell], dict]  # resolved configuration, JSON
    prepare: Callable[[str, str], Train]  # model, task -> what runs seeds; called once for consecutive cells
    describe: Callable[[dict], str]  # metrics in a few words
    results: pathlib.Path
    together: bool = False  # seeds that follow one another run side by side, and their rows are written together


def devices_for_cores() -> None:
    """As many CPU devices as cores that the process may use, a power of two, before JAX makes any: programs side by side, one a core.

    XLA's threads gain little on small programs. What JAX_NUM_CPU_DEVICES says goes first. Not for a trainer: as many threads serve the
    devices, and where they all wait in collectives XLA ends the process, which it did to one run of 3,000 steps in its last evaluation.
    """
    if jax.config.jax_num_cpu_devices == -1:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
        jax.config.update('jax_num_cpu_devices', 1 << (cores.bit_length() - 1))


@dataclasses.dataclass(frozen=True)
class GridArgs:
    """The arguments all grids have.

    Raises:
        ValueError: naming the argument, its value and what is allowed.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    """One run of every cell for each."""
    minutes: float | None = None
    """No cell is started later; the same command goes on with the rest. None: no limit."""
    together: bool | None = None
    """Seeds and learning rates of a cell run side by side, in one program. None: unless the device is a CPU."""
    smoke: bool = False
    """A few steps of the first cell and no row, to see that everything works; its numbers mean nothing."""

    def __post_init__(self):
        self.check('seeds', bool(self.seeds) and all(0 <= seed < 2**31 for seed in self.seeds), 'integers from 0 to below 2**31')
        self.check('minutes', self.minutes is None or self.minutes > 0, 'a number above 0 or None')

    def check(self, name: str, holds: bool, allowed: str) -> None:
        """Raises ValueError unless the argument is as it may be."""
        if not holds:
            raise ValueError(f'{name} is {getattr(self, name)!r}, allowed is {allowed}')

    def check_counts(self, *names: str) -> None:
        """Raises ValueError unless the arguments are at least 1."""
        for name in names:
            self.check(name, getattr(self, name) >= 1, 'an integer of at least 1')

    @property
    def side_by_side(self) -> bool:
        """What `together` comes to on the device."""
        return jax.default_backend() != 'cpu' if self.together is None else self.together


def make_cells(models: Iterable[str], tasks: Iterable[str], seeds: Iterable[int]) -> tuple[Cell, ...]:
    """All cells: every model's on the first task come first, a model's seeds one after another."""
    return tuple(dict.fromkeys(Cell(model, task, seed) for task in tasks for model in models for seed in seeds))


def run_grid(grid: Grid, *, minutes: float | None = None, store: bool = True) -> int:
    """Runs the cells that have no row, says what comes out of each, and stores it.

    Args:
        grid: to run.
        minutes: after which no cell is started.
        store: whether rows are read and written.

    Returns:
        The exit code: 0, or 130 after an interrupt.
    """
    began, prepared, model_task, elsewhere = time.monotonic(), None, None, 0
    left = len(_missing(grid, grid.cells, store))
    print(f'{grid.experiment}: {left} of {len(grid.cells)} cells to run', flush=True)
    for group in _groups(grid):
        if not _missing(grid, group, store):
            continue
        if minutes is not None and time.monotonic() - began > 60 * minutes:
            print(f'{minutes:g} minutes are over: the same command goes on with {left} cells', flush=True)
            return 0
        with _claimed(grid, group) if store else contextlib.nullcontext(True) as claimed:
            group = _missing(grid, group, store)  # none if another process has just finished them
            if not claimed or not group:
                elsewhere += len(group)
                continue
            try:
                if model_task != group[0][:2]:
                    model_task, prepared = group[0][:2], grid.prepare(*group[0][:2])
                left = len(_missing(grid, grid.cells, store)) if store else left
                left -= _run_group(grid, group, prepared, left, store)
            except KeyboardInterrupt:
                print(f'\ninterrupted in {_name(group)}: the same command goes on with its {left} cells', file=sys.stderr, flush=True)
                return INTERRUPTED
    if elsewhere:
        print(f'{elsewhere} cells were left to other processes', flush=True)
    return 0


@contextlib.contextmanager
def _claimed(grid: Grid, group: list[Cell]) -> Iterator[bool]:
    """Whether no other process on this machine is at the cells; none will be until this one has left them or has ended."""
    path = grid.results.with_suffix('.lock')
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, 'ab') as file:
        place = int(config_digest(grid.config(group[0])), 16) >> 2  # of the one byte that is locked, below 2**62
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, place)
        except (BlockingIOError, PermissionError):
            yield False
        else:
            yield True


def _groups(grid: Grid) -> list[list[Cell]]:
    """Cells that run side by side."""
    if not grid.together:
        return [[cell] for cell in grid.cells]
    groups = collections.defaultdict(list)
    for cell in grid.cells:
        groups[cell[:2]].append(cell)
    return list(groups.values())


def _missing(grid: Grid, cells: Iterable[Cell], store: bool) -> list[Cell]:
    """Those of the cells that have no row."""
    done = {row['config_digest'] for row in read_rows(grid.results)} if store else ()
    return [cell for cell in cells if config_digest(grid.config(cell)) not in done]


def _run_group(grid: Grid, group: list[Cell], train: Train, left: int, store: bool) -> int:
    """Runs, prints and stores a group; returns its number of cells."""
    began = time.monotonic()
    results = train([cell.seed for cell in group])
    seconds = (time.monotonic() - began) / len(group)
    if store:
        hardware = hardware_name(jax.devices())
        append_rows(
            grid.results,
            [
                make_row(
                    experiment=grid.experiment, model=cell.model, seed=cell.seed, config=grid.config(cell), metrics=metrics,
                    hardware=hardware, wall_s=seconds,
                )
                for cell, metrics in zip(group, results, strict=True)
            ],
        )  # fmt: skip
    for done, (cell, metrics) in enumerate(zip(group, results, strict=True), 1):
        print(f'{_name([cell])}: {grid.describe(metrics)}   {seconds:.0f} s, {left - done} cells left', flush=True)
    return len(group)


def _name(group: list[Cell]) -> str:
    seeds = ', '.join(str(cell.seed) for cell in group)
    return f'{group[0].task} {group[0].model} seed {seeds}'
