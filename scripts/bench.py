"""Times the models against each other and against PyTorch peers: `python scripts/bench.py --suite cpu`.

Every figure is checked before it is timed: the chunked memories against their token-by-token references. A figure is the
median of repeated, warmed-up, synchronised runs, printed with minimum and maximum, and one row of
experiments/results/bench_<suite>.jsonl. Peers that cannot be imported are named, not passed over.

Suites are the modules of scripts/benchmarks: cpu, optim, decode, seal, checkpoint, scaling, which draws a picture beside
its rows, and gpu, which ends within nine minutes on one H100 or H200.
"""

import argparse
import importlib
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import jax

from experiments.grid import devices_for_cores
from nested_jax.evaluation.rows import append_row, hardware_name, make_row, read_rows
from nested_jax.training.config import private_cache
from scripts.benchmarks.timing import Settings

SUITES = ('cpu', 'optim', 'decode', 'seal', 'scaling', 'checkpoint', 'gpu')
WITH_SMOKE = ('optim', 'seal', 'scaling', 'checkpoint', 'gpu')
Part = Callable[[Settings], Iterator[dict]]  # settings -> metrics of each figure
# Of a row's metrics: what says which figure it is.
SETTINGS = ('what', 'curve', 'model', 'place', 'cost', 'tree', 'batch', 'length', 'devices', 'context', 'candidates', 'bptt')


def use_large_pages() -> None:
    """Starts the process again with memory in large pages, as demo.sh does, for all models and peers alike."""
    if 'GLIBC_TUNABLES' not in os.environ:
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {'GLIBC_TUNABLES': 'glibc.malloc.hugetlb=1'})


def parts_of(name: str, chosen: list[str] | None) -> list[Part]:
    """The parts of a suite, or those chosen by name.

    Raises:
        ValueError: naming what the suite does not have.
    """
    parts = {part.__name__: part for part in importlib.import_module(f'scripts.benchmarks.{name}').PARTS}
    if chosen is not None and not set(chosen) <= set(parts):
        raise ValueError(f'--parts is {" ".join(chosen)}, allowed with --suite {name} is some of {", ".join(parts)}')
    return [part for title, part in parts.items() if chosen is None or title in chosen]


def run_suite(name: str, settings: Settings, output: pathlib.Path, chosen: list[str] | None = None) -> None:
    """Runs a suite or parts of it, printing and storing a row for each figure as soon as it is there."""
    suite = importlib.import_module(f'scripts.benchmarks.{name}')
    if name == 'gpu':  # in processes of its own, each of which wants the card
        suite.run(settings, output)
        return
    if name in ('cpu', 'seal'):
        devices_for_cores()
    hardware = hardware_name(jax.devices())
    for part in parts_of(name, chosen):
        begun = time.perf_counter()
        for metrics in part(settings):
            wall, begun = time.perf_counter() - begun, time.perf_counter()
            config = {key: metrics[key] for key in SETTINGS if key in metrics} | {'repeats': settings.repeats}
            row = make_row(
                experiment=f'bench_{name}', model=metrics['model'], seed=0, config=config, metrics=metrics, hardware=hardware, wall_s=wall
            )
            append_row(output, row)
            shown = {key: f'{value:,.4g}' if isinstance(value, float) else value for key, value in metrics.items()}
            print('  '.join(f'{key} {value}' for key, value in shown.items()), flush=True)
    if hasattr(suite, 'draw'):
        suite.draw(read_rows(output), output.with_suffix('.png'))


def main(arguments: list[str] | None = None) -> None:
    """Reads the command line and runs a suite."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--suite', choices=SUITES, default='cpu')
    parser.add_argument('--repeats', type=int, default=5, help='runs each figure is the median of')
    parser.add_argument('--smoke', action='store_true', help=f'smallest sizes, whose numbers mean nothing: {", ".join(WITH_SMOKE)}')
    parser.add_argument('--output', type=pathlib.Path, help='file of rows; default experiments/results/bench_<suite>.jsonl')
    parser.add_argument('--parts', nargs='+', help='of the suite: run these alone, as lengths or chunks of scaling')
    parser.add_argument('--cells', nargs='+', help='of the suite gpu: run these alone, in this process')
    parser.add_argument('--prepare', action='store_true', help='with --cells: compile alone, into the cache of programs')
    args = parser.parse_args(arguments)
    if args.parts and args.suite == 'gpu':
        parser.error('--parts is given with --suite gpu, which has --cells')
    try:
        private_cache()
        if args.parts:
            parts_of(args.suite, args.parts)
    except ValueError as error:
        parser.error(str(error))
    if args.repeats < 1:
        parser.error(f'--repeats is {args.repeats}, allowed is an integer of at least 1')
    if args.smoke and args.suite not in WITH_SMOKE:
        parser.error(f'--smoke is given with --suite {args.suite}, allowed is one of {", ".join(WITH_SMOKE)}')
    if args.prepare and not args.cells:
        parser.error('--prepare is given without --cells, allowed is with them')
    if args.smoke and args.output is None:
        parser.error('--output is None, allowed with --smoke is a file: its rows are no results')
    output = args.output or ROOT / 'experiments' / 'results' / f'bench_{args.suite}.jsonl'
    if args.cells:
        from scripts.benchmarks import gpu

        gpu.work(args.cells, Settings(args.repeats, args.smoke, args.prepare), output)
        return
    run_suite(args.suite, Settings(args.repeats, args.smoke), output, args.parts)


if __name__ == '__main__':
    use_large_pages()
    main()
