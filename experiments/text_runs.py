"""Language models trained on text as cells of a grid: what the comparison of models, the ablations and the grid of levels share.

A cell's run lies in a folder of its own, named by its configuration, under `--runs`; a run that was stopped goes on from its checkpoint.
"""

import dataclasses
import math
import pathlib
import statistics
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from experiments.grid import Cell, Grid, GridArgs, Train, run_grid
from nested_jax.config import ModelConfig, as_dict
from nested_jax.data import Dataset
from nested_jax.evaluation.rows import config_digest
from nested_jax.models.language_model import LanguageModel
from nested_jax.training.config import FREE_FIELDS, TrainConfig, check_model
from nested_jax.training.loop import Result, train
from nested_jax.training.metrics import read_metrics

Measure = Callable[[Result, Dataset], dict]  # what else a finished run is asked


@dataclasses.dataclass(frozen=True)
class TextArgs(GridArgs):
    """The arguments of grids that train tiny models on the embedded corpus."""

    learning_rate: float = 3e-3
    """Of all cells."""
    steps: int = 800
    """Optimizer steps of 512 tokens."""
    runs: pathlib.Path = pathlib.Path('runs')
    """Folder of the runs' checkpoints."""

    def __post_init__(self):
        super().__post_init__()
        self.check_counts('steps')
        self.train(0)

    def train(self, seed: int) -> TrainConfig:
        """The settings of a run."""
        warmup = min(100, self.steps // 8)
        settings = TrainConfig(
            steps=self.steps, learning_rate=self.learning_rate, warmup_steps=warmup, eval_every=400, checkpoint_every=200, seed=seed
        )
        return smaller(settings) if self.smoke else settings


@dataclasses.dataclass(frozen=True)
class TextGrid:
    """What the cells of a grid train, and what they measure besides the loss."""

    experiment: str
    cells: tuple[Cell, ...]
    model: Callable[[Cell], ModelConfig]
    train: Callable[[Cell], TrainConfig]
    results: pathlib.Path
    runs: pathlib.Path
    measure: Callable[[Cell], Measure | None] = lambda cell: None
    measured: dict = dataclasses.field(default_factory=dict)  # what the measures depend on, for the rows' configuration


def smaller(settings: TrainConfig) -> TrainConfig:
    """The settings of a smoke run."""
    sizes = dict(steps=2, warmup_steps=1, batch_size=2, sequence_length=64, accumulation=1, eval_tokens=256, final_eval_tokens=256)
    return dataclasses.replace(settings, **sizes)


def one_block(model: ModelConfig) -> ModelConfig:
    """The model of a smoke run: a block, or what a hybrid has in its place."""
    within = model.in_sequence and dataclasses.replace(model.in_sequence, blocks=(0,))
    return dataclasses.replace(model, num_layers=len(model.unit), scan_layers=True, in_sequence=within)


def run_text_grid(grid: TextGrid, data: Dataset, args: GridArgs, describe: Callable[[dict], str] | None = None) -> int:
    """Runs the cells that have no row; returns the exit code.

    Raises:
        ValueError: for a cell that could not start, before anything is compiled.
    """
    if args.smoke:
        grid = dataclasses.replace(grid, model=lambda cell, model=grid.model: one_block(model(cell)))
    for cell in grid.cells:
        check_model(grid.train(cell), grid.model(cell), data.tokenizer.vocab_size)

    def prepare(model: str, task: str) -> Train:
        def train(seeds: Sequence[int]) -> list[dict]:
            cells = [Cell(model, task, seed) for seed in seeds]
            return [run_cell(grid.model(cell), grid.train(cell), data, grid.runs, grid.measure(cell)) for cell in cells]

        return train

    task = lambda cell: dict(task=dict(name=cell.task))
    config = lambda cell: cell_config(grid.model(cell), grid.train(cell), data) | task(cell) | grid.measured
    runs = Grid(grid.experiment, grid.cells, config, prepare, describe or show, grid.results)
    return run_grid(runs, minutes=args.minutes, store=not args.smoke)


def cell_config(model: ModelConfig, settings: TrainConfig, data: Dataset) -> dict:
    """The configuration of a row: all that its numbers depend on, and no path of a machine."""
    free = {name.removeprefix('train.') for name in FREE_FIELDS}
    kept = {name: value for name, value in as_dict(settings).items() if name not in free}
    return dict(model=as_dict(model), data=dict(digest=data.digest, tokenizer_digest=data.tokenizer.digest), train=kept)


def run_cell(model: ModelConfig, settings: TrainConfig, data: Dataset, runs: pathlib.Path, measure: Measure | None = None) -> dict:
    """Trains one model, or goes on with it, and says what came out.

    Args:
        model: to train.
        settings: of the run; its output folder is chosen here.
        data: the text.
        runs: folder of the runs' folders.
        measure: what else to measure of the trained model.

    Returns:
        The metrics of a row.

    Raises:
        KeyboardInterrupt: when a signal stopped the run, once it is saved.
    """
    config = cell_config(model, settings, data)
    settings = dataclasses.replace(settings, output=str(runs / config_digest(config)))
    count = math.gcd(settings.batch_size // settings.accumulation, len(jax.devices()))  # devices that get as many rows each
    result = train(settings, model, data, config, devices=jax.devices()[:count])
    if result.stopped_by is not None:
        raise KeyboardInterrupt
    speeds = [record['tokens_per_second'] for record in read_metrics(runs / config_digest(config) / 'metrics.jsonl') if 'loss' in record]
    metrics = dict(
        heldout_bits_per_byte=result.heldout.bits_per_byte, heldout_perplexity=result.heldout.perplexity,
        heldout_bytes=result.heldout.num_bytes, tokens=settings.steps * settings.tokens_per_step, parameters=count_parameters(model),
        tokens_per_second=statistics.median(speeds),
    )  # fmt: skip
    return metrics | (measure(result, data) if measure else {})


def count_parameters(model: ModelConfig) -> int:
    """Parameters outside the embedding and the head."""
    params = jax.eval_shape(LanguageModel(model).init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))['params']
    return sum(leaf.size for name, part in params.items() if name not in ('embedding', 'head') for leaf in jax.tree.leaves(part))


def show(metrics: dict) -> str:
    """Bits per byte and speed in a few words."""
    return f'{metrics["heldout_bits_per_byte"]:.4f} bits per byte, {metrics["tokens_per_second"]:,.0f} tokens/s'
