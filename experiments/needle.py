"""Needles in a haystack, at lengths far beyond those trained on: `python -m experiments.needle`.

Table 1, arXiv:2512.24695v1, has accuracies in % at 4,096 / 8,192 / 16,384 tokens, after training on some 50B tokens of text:

                   S-NIAH-1            S-NIAH-2            S-NIAH-3            MK-NIAH-1
    Transformer    88.6 / 76.4 / 79.8  100 / 98.8 / 94.2   78.0 / 69.2 / 40.8  79.4 / 83.0 / 61.4
    RWKV-7         100 / 100 / 99.6    93.8 / 44.8 / 12.6  63.8 / 13.2 / 5.8   21.4 / 18.8 / 9.6
    Titans         100 / 100 / 100     99.6 / 84.6 / 75.4  74.2 / 42.8 / 21.2  26.4 / 23.6 / 8.2
    Hope           100 / 100 / 100     99.2 / 88.4 / 78.2  73.2 / 46.2 / 24.8  29.4 / 24.8 / 14.8

SETTING

COSTS
"""

import dataclasses
import pathlib
import sys

import tyro

from experiments.haystack_runs import HaystackArgs, run
from nested_jax.data.tasks.haystack import HaystackTask
from nested_jax.data.tasks.needles import KINDS, Needles

EXPERIMENT = 'needle'
RESULTS = pathlib.Path(__file__).parent / 'results' / f'{EXPERIMENT}.jsonl'


@dataclasses.dataclass(frozen=True)
class Args(HaystackArgs):
    """Train small models to find needles and test them on longer texts."""

    known_tasks = tuple(KINDS)

    tasks: tuple[str, ...] = ('single_1', 'multikey_1')
    """Of single_1, single_2, single_3, multikey_1, multikey_2, multikey_3, multivalue and multiquery."""
    brief: bool = True
    """Needles and questions in the fewest words, not in the reference's."""
    digits: int = 4
    """Of a number; the reference has 7."""
    results: pathlib.Path = RESULTS
    """File that a row for each run is added to."""

    def text(self, task: str, length: int) -> HaystackTask:
        """The needles of a kind."""
        return Needles(length=length, kind=task, brief=self.brief, digits=self.digits)


def main(argv: list[str] | None = None) -> int:
    """Runs the cells that have no row; returns the exit code."""
    return run(EXPERIMENT, tyro.cli(Args, args=argv, description=__doc__))


if __name__ == '__main__':
    sys.exit(main())
