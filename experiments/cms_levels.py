"""How many levels and how slow: `python -m experiments.cms_levels`.

Fig. 7, arXiv:2512.24695v1, varies the number of CMS levels and the period of the slowest one (its "lowest frequency" of 512, 2K and 8K
reads as periods in tokens) of a Llama-3 with levels put in, on tasks of long contexts, and finds that more levels are better and that the
slowest should not be too fast. Here hope-linear-tiny learns text from its first step, with the hidden units of its MLP shared out among
the levels: how much a level that is updated once in so many tokens, with the sum of their gradients, costs or gains. Periods are in tokens
across sequences, a step being 512, and lie in equal ratios between 512 and the slowest. In the nested variant (Eq. 72), of which the
paper reports nothing, a level starts anew whenever the next slower one is updated, from an initial state that is learned at that one's
period. Bits per byte of held-out text after 0.41M tokens.

Rows: five cells of seed 0, one of each number of levels among them, which took 281 to 514 s of half a core.
"""

import dataclasses
import pathlib
import sys
from typing import Literal

from experiments.arguments import parse_arguments
from experiments.grid import Cell
from experiments.text_runs import TextArgs, TextGrid, run_text_grid
from nested_jax.config import LevelConfig, ModelConfig
from nested_jax.data import open_dataset
from nested_jax.models.presets import preset

EXPERIMENT = 'cms_levels'
RESULTS = pathlib.Path(__file__).parent / 'results' / f'{EXPERIMENT}.jsonl'
BASE = 'hope-linear'
FASTEST = 512  # tokens: every step
NESTED = ' nested'


@dataclasses.dataclass(frozen=True)
class Args(TextArgs):
    """Vary the number of levels of a Continuum Memory System, and the period of the slowest."""

    levels: tuple[int, ...] = (1, 2, 3, 4)
    """Numbers of levels; one has no slowest and is run once."""
    slowest: tuple[int, ...] = (2048, 8192, 512)
    """Periods of the slowest level in tokens, multiples of 512; 512 updates all levels at every step."""
    variants: tuple[Literal['sequential', 'nested'], ...] = ('sequential', 'nested')
    """Whether levels go on or start anew; nested only where periods differ."""
    runs: pathlib.Path = pathlib.Path('runs') / EXPERIMENT
    """Folder of the runs' checkpoints."""
    results: pathlib.Path = RESULTS
    """File that a row for each run is added to."""

    def __post_init__(self):
        super().__post_init__()
        self.check('levels', bool(self.levels) and all(1 <= count <= 8 for count in self.levels), 'integers from 1 to 8')
        self.check('slowest', bool(self.slowest) and all(p >= FASTEST and p % FASTEST == 0 for p in self.slowest), 'multiples of 512')
        self.check('variants', bool(self.variants), 'at least one')


def main(argv: list[str] | None = None) -> int:
    """Runs the cells that have no row; returns the exit code."""
    args = parse_arguments(Args, argv, __doc__)
    if args.smoke:
        args = dataclasses.replace(args, levels=args.levels[:1], seeds=args.seeds[:1], runs=args.runs / 'smoke')
    grid = TextGrid(
        EXPERIMENT, make_cells(args), lambda cell: level_config(cell.task), lambda cell: args.train(cell.seed), args.results, args.runs
    )
    return run_text_grid(grid, open_dataset(), args)


def make_cells(args: Args) -> tuple[Cell, ...]:
    """A cell's task is '<levels> x <slowest>', or this and ' nested'; all cells of a seed before the next."""
    sequential = [f'{count} x {slowest if count > 1 else FASTEST}' for slowest in args.slowest for count in args.levels]
    nested = [f'{count} x {slowest}{NESTED}' for slowest in args.slowest for count in args.levels if count > 1 and slowest > FASTEST]
    tasks = dict.fromkeys(task for variant in args.variants for task in (sequential if variant == 'sequential' else nested))
    return tuple(Cell(BASE, task, seed) for seed in args.seeds for task in tasks)


def level_config(task: str) -> ModelConfig:
    """The model of a cell's task."""
    count, slowest = map(int, task.removesuffix(NESTED).split(' x '))
    base = preset(f'{BASE}-tiny')
    hidden = sum(level.hidden_dim for level in base.levels) // count
    ratio = (slowest // FASTEST) ** (1 / max(count - 1, 1))
    levels = tuple(LevelConfig(hidden, FASTEST * round(ratio**index)) for index in range(count))
    return dataclasses.replace(base, levels=levels, nested_levels=task.endswith(NESTED))


if __name__ == '__main__':
    sys.exit(main())
