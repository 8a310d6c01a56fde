"""The suite 'gpu': `python scripts/bench.py --suite gpu --repeats 5`, at most nine minutes on one H100 or H200.

The first few cells (`gpu_cells.py`) that take long to compile do so before any is timed, in processes side by side that share a cache of
programs: with eight at a time on 16 cores not all came to their end within three minutes. Then cells run in a process of their own,
one after another, each row being written at once. A cell that fails has a row that says why. One that takes longer than its budget, or
takes the process with it, is given up, and another process goes on with the next. No cell is begun that could not end in time.
"""

import os
import pathlib
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable

from nested_jax.evaluation.rows import append_row, make_row
from scripts.benchmarks.timing import Settings

MINUTES = 9.0
PREPARING_S = 180.0  # after which what is still compiling is left to its turn; flash-linear-attention's searches take 110 to 130
SIDE_BY_SIDE = 5  # processes that compile, a cell each
GRACE_S = 30.0  # for a process to start and import
BEGIN = 'begin: '  # what a worker says before each cell


def run(settings: Settings, output: pathlib.Path) -> None:
    """Runs all cells, in workers."""
    from scripts.benchmarks.gpu_cells import CELLS

    deadline = time.monotonic() + 60 * MINUTES
    budgets = {cell.name: cell.budget_s for cell in CELLS}
    command = [sys.executable, sys.argv[0], '--suite', 'gpu', '--repeats', str(settings.repeats), '--output', str(output)]
    command += ['--smoke'] * settings.smoke

    def start(names: list[str], share: float, **options) -> subprocess.Popen:
        # Memory as it is needed, up to a share: PyTorch's kernels are on the card too.
        memory = {'XLA_PYTHON_CLIENT_PREALLOCATE': 'false', 'XLA_PYTHON_CLIENT_MEM_FRACTION': f'{share:.2f}'}
        pages = {'GLIBC_TUNABLES': ''}  # large ones are for programs on CPU
        environment = os.environ | memory | pages | {'PYTHONUNBUFFERED': '1', 'JAX_COMPILATION_CACHE_DIR': cache}
        return subprocess.Popen([*command, '--cells', *names], text=True, env=environment, **options)

    def compile_alone(name: str) -> subprocess.Popen:
        quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # what fails does so again when it is its turn
        return start([name, '--prepare'], 0.92 / SIDE_BY_SIDE, **quiet)

    failed = lambda name, reason: append_row(output, failed_row(name, reason, settings, 'unknown'))
    with tempfile.TemporaryDirectory() as cache:
        if not settings.smoke:
            slow = [cell.name for cell in CELLS if cell.slow_to_compile]
            side_by_side(slow[:SIDE_BY_SIDE], compile_alone, time.monotonic() + PREPARING_S)
        supervise(budgets, lambda names: start(names, 0.92, stdout=subprocess.PIPE), failed, deadline)


def side_by_side(names: list[str], start: Callable[[str], subprocess.Popen], deadline: float) -> None:
    """Lets a process for each name come to its end, and ends those that have not at the deadline of `time.monotonic`."""
    running = []
    try:
        running.extend(map(start, names))
        while any(process.poll() is None for process in running) and time.monotonic() < deadline:
            time.sleep(0.1)
    finally:
        for process in running:
            process.kill()
            process.wait()


def supervise(budgets: dict[str, float], start: Callable, failed: Callable[[str, str], None], deadline: float) -> None:
    """Starts workers until every cell was begun or time is up.

    Args:
        budgets: cell's name -> seconds, in their order.
        start: names -> a process that runs these, saying 'begin: <name>' before each; its standard output is read and passed on.
        failed: told the name and the reason of each cell that was given up.
        deadline: of `time.monotonic`.
    """
    left = list(budgets)
    while left:
        fitting = [name for name in left if time.monotonic() + budgets[name] <= deadline]
        if not fitting:
            print(f'no time left for {", ".join(left)}', flush=True)
            return
        process = start(fitting)
        try:
            current, reason = follow(process, budgets, deadline)
        finally:
            process.kill()
            process.wait()
        begun = fitting.index(current) + 1 if current in fitting else len(fitting)
        if reason is not None:
            failed(current or fitting[0], reason)
        left = fitting[begun:] if reason is not None and current else []


def follow(process: subprocess.Popen, budgets: dict[str, float], deadline: float) -> tuple[str | None, str | None]:
    """Passes on what a worker says until it ends; returns the cell it was at and why it was given up, None if it was not."""
    lines: queue.Queue = queue.Queue()

    def pump() -> None:
        with process.stdout:
            for line in process.stdout:
                lines.put(line)
        lines.put(None)

    threading.Thread(target=pump, daemon=True).start()
    current, limit = None, time.monotonic() + GRACE_S
    while True:
        try:
            line = lines.get(timeout=max(0.0, min(limit, deadline) - time.monotonic()))
        except queue.Empty:
            return current, 'took longer than its budget' if time.monotonic() < deadline else 'was at work when time was up'
        if line is None:
            code = process.wait()
            return current, None if code == 0 else f'ended its process with code {code}'
        print(line, end='', flush=True)
        if line.startswith(BEGIN):
            current = line.removeprefix(BEGIN).strip()
            if time.monotonic() + budgets[current] > deadline:
                return current, 'would not end in time'
            limit = time.monotonic() + budgets[current]


def work(names: list[str], settings: Settings, output: pathlib.Path, cells: tuple | None = None) -> None:
    """Runs cells in this process, writing their rows; one that raises has a row that says so. Prepared ones have no rows."""
    import jax

    from nested_jax.evaluation.rows import hardware_name
    from scripts.benchmarks.gpu_cells import CELLS

    hardware, by_name = hardware_name(jax.devices()), {cell.name: cell for cell in cells or CELLS}
    for name in names:
        print(f'{BEGIN}{name}', flush=True)
        begun = time.monotonic()
        try:
            found = by_name[name].run(settings._replace(repeats=1) if settings.prepare else settings)
        except Exception as error:  # whatever a compiler or a kernel raises: the other cells go on
            if settings.prepare:
                raise
            append_row(output, failed_row(name, f'{type(error).__name__}: {str(error)[:500]}', settings, hardware))
            print(f'  failed: {error}'[:500], flush=True)
            continue
        for metrics in [] if settings.prepare else found:
            config = dict(cell=name, model=metrics['model'], what=metrics['what'], repeats=settings.repeats)
            config |= {
                key: metrics[key]
                for key in ('batch', 'time', 'heads', 'dim', 'length', 'accumulation', 'remat', 'chunk_size', 'scan_layers', 'kernels')
                if key in metrics
            }
            wall = time.monotonic() - begun
            row = make_row(
                experiment='bench_gpu', model=metrics['model'], seed=0, config=config, metrics=metrics, hardware=hardware, wall_s=wall
            )
            append_row(output, row)
            shown = {key: f'{value:,.4g}' if isinstance(value, float) else value for key, value in metrics.items()}
            print('  ' + '  '.join(f'{key} {value}' for key, value in shown.items()), flush=True)


def failed_row(name: str, reason: str, settings: Settings, hardware: str) -> dict:
    """Of a cell that was given up."""
    config = dict(cell=name, what='failed', repeats=settings.repeats)
    metrics = dict(what='failed', model=name, reason=reason)
    return make_row(experiment='bench_gpu', model=name, seed=0, config=config, metrics=metrics, hardware=hardware, wall_s=0.0)
