"""Needles in a haystack, at lengths far beyond those trained on: `python -m experiments.needle`.

Table 1, arXiv:2512.24695v1, has accuracies in % at 4,096 / 8,192 / 16,384 tokens, after training on some 50B tokens of text:

                   S-NIAH-1            S-NIAH-2            S-NIAH-3            MK-NIAH-1
    Transformer    88.6 / 76.4 / 79.8  100 / 98.8 / 94.2   78.0 / 69.2 / 40.8  79.4 / 83.0 / 61.4
    RWKV-7         100 / 100 / 99.6    93.8 / 44.8 / 12.6  63.8 / 13.2 / 5.8   21.4 / 18.8 / 9.6
    Titans         100 / 100 / 100     99.6 / 84.6 / 75.4  74.2 / 42.8 / 21.2  26.4 / 23.6 / 8.2
    Hope           100 / 100 / 100     99.2 / 88.4 / 78.2  73.2 / 46.2 / 24.8  29.4 / 24.8 / 14.8

Two blocks of width 64, two heads of 32 and one MLP, on bytes. Needles and the question are brief ('sela-kegu is: 5391.', 'sela-kegu is')
and numbers have four digits; --no-brief --digits 7 is the reference's form, of which pilots of gated-deltanet learned nothing in up to
2,000 steps. Training is 5,000 steps of 1,024 bytes, texts of 64 bytes at first, then of 128, 256, 512 and 1,024 too, the loss on all
bytes. Tests are 40 texts of each length up to 16 times the longest trained on, read in pieces, beside the most frequent answer and, of
several needles, the last. -zero has Hope's memories decay to zero instead of to their initial states, -window-256 is attention that sees
256 tokens.

Four models have rows of one seed in single_1. All have one learning rate; a pilot of the Transformer at 2e-3 did not end in time. On a
core of two, the other in use, a run took 187 s with windows of 256 and 259 s for gated-deltanet; while other work shared the core it took
455 s for hope-linear-zero and 773 s for the Transformer. Two processes share the grid and go on where they stopped:

    taskset -c 0 python -m experiments.needle --minutes 40 --tasks single_1
    taskset -c 1 python -m experiments.needle --minutes 40 --tasks multikey_1
"""

import dataclasses
import pathlib
import sys

from experiments.arguments import parse_arguments
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
    return run(EXPERIMENT, parse_arguments(Args, argv, __doc__))


if __name__ == '__main__':
    sys.exit(main())
