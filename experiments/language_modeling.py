"""The models of Table 2 at equal parameters and tokens: `python -m experiments.language_modeling`.

Table 2, arXiv:2512.24695v1, trains them on FineWeb-Edu: 760M parameters on 30B tokens, 1.3B on 100B. Its perplexities (Wikitext):

    760M / 30B     Transformer++ 24.18, Samba 21.07, RetNet 25.77, DeltaNet 24.52, RWKV-7 23.75, Comba 22.41, TTT 24.17,
                   Miras (Memora) 22.28, DLA 23.12, Titans 20.08, Hope 18.68
    1.3B / 100B    17.92, 16.15, 18.91, 18.62, 18.44, 18.16, 18.42, 15.90, 16.31, 15.60, 14.39

Three scales, all with one protocol: every model tries the same learning rates for a fifth of the tokens with seed 0, on a part of the
held-out text, and then trains with its best one for each seed.

    --scale cpu    tiny presets (1M parameters) on bytes of the embedded corpus, 1.02M tokens: the default
    --scale gpu    six layers of the 124m presets (43M parameters outside the embedding), 100M tokens, bfloat16; --corpus names the shards
    --scale paper  the presets of --size on shards of FineWeb-Edu made by `python -m nested_jax.data.prepare` (README, Larger models), the
                   paper's 0.5M tokens a step and 4,096 tokens a sequence: 15B tokens at 340m, 30B at 760m, 100B at 1.3b

Zero-shot accuracies are not measured here. The models of the table come first, with three seeds; --models takes any family of the presets.
A run that is stopped goes on from its checkpoint in --runs when the same command is given again.

Rows at --scale cpu: the search and three seeds of the table's eleven models. On one core, other work on both, the search took 148 to
548 s a model and a run 153 to 841 s: 3.6 hours in all.
"""

import dataclasses
import pathlib
import sys
from typing import Literal

from experiments.arguments import parse_arguments
from experiments.grid import Cell, GridArgs
from experiments.text_runs import TextGrid, run_text_grid, smaller
from nested_jax.config import ModelConfig
from nested_jax.data import Dataset, open_dataset
from nested_jax.evaluation.rows import read_rows
from nested_jax.models.presets import preset
from nested_jax.training.config import TrainConfig

EXPERIMENT = 'language_modeling'
RESULTS = pathlib.Path(__file__).parent / 'results' / f'{EXPERIMENT}.jsonl'
TABLE = ('transformer', 'samba', 'retnet', 'deltanet', 'rwkv7', 'comba', 'ttt-linear', 'memora', 'dla', 'titans', 'hope')
OTHERS = (
    'hope-linear', 'gated-deltanet', 'hope-attention', 'transformer-conv', 'linear-attention', 'gla', 'mamba2', 'ttt-mlp', 'titans-mac',
    'titans-mag', 'titans-mal', 'moneta', 'yaad', 'atlas',
)  # fmt: skip
TRAINED = 'train'  # the task of a full run; the others are 'rate <learning rate>'
_TOKENS = {'340m': 15e9, '760m': 30e9, '1.3b': 100e9}


@dataclasses.dataclass(frozen=True)
class Scale:
    """How large, on what and how long."""

    size: str  # of the presets
    model: dict  # fields of `ModelConfig` to replace
    train: TrainConfig
    learning_rates: tuple[float, ...]


def scale(name: Literal['cpu', 'gpu', 'paper'], size: str) -> Scale:
    """A scale by name; `size` is that of the paper's."""
    if name == 'cpu':
        train = TrainConfig(steps=2000, eval_every=1000, eval_tokens=32_768, checkpoint_every=250)
        return Scale('tiny', {}, train, (2e-3, 3e-3, 6e-3))
    large = dict(dtype='bfloat16', remat='block')
    if name == 'gpu':
        train = TrainConfig(steps=1526, batch_size=64, sequence_length=1024, eval_every=500, checkpoint_every=100)
        return Scale('124m', large | dict(num_layers=6), train, (5e-4, 1e-3, 2e-3))
    train = TrainConfig(
        steps=round(_TOKENS[size] / 2**19), batch_size=128, sequence_length=4096, accumulation=8, warmup_steps=1000, eval_every=2000,
        checkpoint_every=500,
    )  # fmt: skip
    return Scale(size, large, train, (4e-4,))


@dataclasses.dataclass(frozen=True)
class Args(GridArgs):
    """Train the models of Table 2 on text and compare their held-out bits per byte."""

    models: tuple[str, ...] = TABLE
    """Families of the presets."""
    scale: Literal['cpu', 'gpu', 'paper'] = 'cpu'
    """Size of the models and of the runs."""
    size: Literal['340m', '760m', '1.3b'] = '340m'
    """Of the presets at --scale paper."""
    corpus: str = 'embedded'
    """As --data.corpus of experiments.hope_pretrain."""
    tokenizer: str | None = None
    """As --data.tokenizer of experiments.hope_pretrain."""
    runs: pathlib.Path = pathlib.Path('runs') / EXPERIMENT
    """Folder of the runs' checkpoints."""
    results: pathlib.Path = RESULTS
    """File that a row for each run is added to."""

    def __post_init__(self):
        super().__post_init__()
        self.check('models', bool(self.models), 'at least one')
        self.check('corpus', self.scale != 'paper' or self.corpus != 'embedded', 'a prepared folder at --scale paper')
        for name in self.models:
            preset(f'{name}-{self.setting.size}')

    @property
    def setting(self) -> Scale:
        """The scale, cut down for a smoke run."""
        chosen = scale(self.scale, self.size)
        if not self.smoke:
            return chosen
        return dataclasses.replace(chosen, train=smaller(chosen.train), learning_rates=chosen.learning_rates[:1])


def main(argv: list[str] | None = None) -> int:
    """Runs the cells that have no row; returns the exit code."""
    args = parse_arguments(Args, argv, __doc__)
    if args.smoke:
        args = dataclasses.replace(args, models=args.models[:1], seeds=args.seeds[:1], runs=args.runs / 'smoke')
    data = open_dataset(args.corpus, args.tokenizer)
    model = lambda cell: model_config(args, cell.model, data)
    grid = TextGrid(EXPERIMENT, make_cells(args), model, lambda cell: settings(args, cell), args.results, args.runs)
    return run_text_grid(grid, data, args)


def make_cells(args: Args) -> tuple[Cell, ...]:
    """Each model's search, then its first seed; the other seeds follow when all models have one."""
    search = [f'rate {rate:g}' for rate in args.setting.learning_rates] if len(args.setting.learning_rates) > 1 else []
    first, *later = args.seeds
    cells = [Cell(model, task, seed) for model in args.models for task, seed in [*((task, 0) for task in search), (TRAINED, first)]]
    return tuple(cells + [Cell(model, TRAINED, seed) for seed in later for model in args.models])


def model_config(args: Args, name: str, data: Dataset) -> ModelConfig:
    """The preset with the text's vocabulary."""
    return preset(f'{name}-{args.setting.size}', vocab_size=data.tokenizer.vocab_size, **args.setting.model)


def settings(args: Args, cell: Cell) -> TrainConfig:
    """Of a cell's run. A full run of a model whose search is not done has a rate that no row has."""
    train = dataclasses.replace(args.setting.train, seed=cell.seed)
    if cell.task != TRAINED:
        short = dict(steps=max(train.steps // 5, 1), final_eval_tokens=min(train.final_eval_tokens or 200_000, 200_000))
        return dataclasses.replace(train, learning_rate=float(cell.task.removeprefix('rate ')), **short)
    return dataclasses.replace(train, learning_rate=best_rate(args, cell.model))


def best_rate(args: Args, model: str) -> float:
    """The learning rate that did best in the search; the smallest float above 0 where the search is not done."""
    rates = args.setting.learning_rates
    if len(rates) == 1:
        return rates[0]
    short = settings(args, Cell(model, f'rate {rates[0]:g}', 0))
    rows = [row for row in read_rows(args.results) if row['model'] == model and row['config']['train']['steps'] == short.steps]
    found = {row['config']['train']['learning_rate']: row['metrics']['heldout_bits_per_byte'] for row in rows}
    return min(rates, key=found.__getitem__) if set(rates) <= set(found) else sys.float_info.min


if __name__ == '__main__':
    sys.exit(main())
