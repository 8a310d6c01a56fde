"""Loss against the position in the context: `python -m experiments.context_use`.

Fig. 10, arXiv:2512.24695v1, shows how models' perplexity falls with the context they have read, without numbers: those whose memories
are worth more fall further. Here tiny presets train on sequences of 1,024 bytes (0.41M tokens) and read held-out files in windows of
4,096: bits per byte of the positions 0 to 31, 32 to 63, 64 to 127, ..., 2,048 to 4,095. Beyond 1,023 is beyond the lengths trained on. A
window begins in a file, so that the text before a position is the same file's; files shorter than a window are left out.

The Transformer sees the whole window at positions it was not trained on; transformer-window, with 256 tokens of attention, meets none.
In hope-linear-in-sequence the levels of the last block learn from the window itself, every 32 and every 256 tokens, by the next-token
loss, in training and on held-out files alike.
"""

import dataclasses
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.arguments import parse_arguments
from experiments.grid import make_cells
from experiments.text_runs import TextArgs, TextGrid, run_text_grid, show
from nested_jax.config import AttentionConfig, InSequenceConfig, ModelConfig
from nested_jax.data import Dataset, open_dataset
from nested_jax.models import streaming
from nested_jax.models.presets import preset, with_periods
from nested_jax.training.config import TrainConfig
from nested_jax.training.loop import Result

EXPERIMENT = 'context_use'
RESULTS = pathlib.Path(__file__).parent / 'results' / f'{EXPERIMENT}.jsonl'
WINDOWED = 'transformer-window'
LEARNING = 'hope-linear-in-sequence'
MODELS = ('hope-linear', 'hope', LEARNING, 'gated-deltanet', 'transformer', WINDOWED, 'titans')
EDGES = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # positions at which the next bin begins
TASK = 'text'


@dataclasses.dataclass(frozen=True)
class Args(TextArgs):
    """Train models on text and measure their loss by position in longer windows."""

    models: tuple[str, ...] = MODELS
    """Families of the presets, transformer-window or hope-linear-in-sequence."""
    steps: int = 400
    """Optimizer steps of one sequence of 1,024 tokens."""
    windows: int = 100
    """Held-out windows of 4,096 tokens, of different files."""
    inner_rate: float = 1e-2
    """Of the updates that hope-linear-in-sequence makes while it reads."""
    runs: pathlib.Path = pathlib.Path('runs') / EXPERIMENT
    """Folder of the runs' checkpoints."""
    results: pathlib.Path = RESULTS
    """File that a row for each run is added to."""

    def __post_init__(self):
        super().__post_init__()
        self.check_counts('windows')
        self.check('models', bool(self.models), 'at least one')
        for name in self.models:
            self.model(name)

    def model(self, name: str) -> ModelConfig:
        """The tiny preset, the Transformer with 256 tokens of attention, or Hope with levels that learn while it reads."""
        if name == WINDOWED:
            return preset('transformer-tiny', attention=AttentionConfig(window=256))
        if name == LEARNING:
            within = InSequenceConfig(blocks=(3,), learning_rate=self.inner_rate)
            return dataclasses.replace(with_periods(preset('hope-linear-tiny'), (32, 256)), in_sequence=within)
        return preset(f'{name}-tiny')

    def train(self, seed: int) -> TrainConfig:
        """The settings of a run."""
        long = dict(batch_size=1, sequence_length=1024, eval_every=200, checkpoint_every=100, final_eval_tokens=200_000)
        settings = super().train(seed)
        return settings if self.smoke else dataclasses.replace(settings, **long)


def main(argv: list[str] | None = None) -> int:
    """Runs the cells that have no row; returns the exit code."""
    args = parse_arguments(Args, argv, __doc__)
    if args.smoke:
        sizes = dict(windows=1, models=args.models[:1], seeds=args.seeds[:1])
        args = dataclasses.replace(args, runs=args.runs / 'smoke', **sizes)
    data = open_dataset()
    windows = heldout_windows(data, args.windows)
    measure = lambda result, data: dict(by_position=bits_by_position(result, windows))
    grid = TextGrid(
        EXPERIMENT, make_cells(args.models, (TASK,), args.seeds), lambda cell: args.model(cell.model), lambda cell: args.train(cell.seed),
        args.results, args.runs, lambda cell: measure, dict(windows=len(windows), edges=EDGES),
    )  # fmt: skip
    return run_text_grid(grid, data, args, describe)


def heldout_windows(data: Dataset, count: int) -> np.ndarray:
    """The first 4,097 bytes of held-out files that have as many, (count, 4,097); fewer if there are no more."""
    size = EDGES[-1] + 1
    long = [index for index in range(len(data.heldout.lengths)) if data.heldout.lengths[index] >= size][:count]
    return np.stack([np.asarray(data.heldout.read(index, 0, size), np.int32) for index in long])


def bits_by_position(result: Result, windows: np.ndarray) -> dict[str, float]:
    """Bits per byte in each bin of positions, by '<first>-<last>'."""
    model, params = result.model, result.state.params
    nats = jax.jit(optax.softmax_cross_entropy_with_integer_labels)
    if model.config.in_sequence is None:
        read = jax.jit(lambda params, tokens: model.apply({'params': params}, tokens)[0])
    else:
        read = lambda params, tokens: streaming.read(model, params, streaming.init_stream(model, params, 1), tokens)[0]
    losses = [np.asarray(nats(read(params, jnp.asarray(window[None, :-1])), window[None, 1:])[0]) for window in windows]
    losses = np.mean(losses, 0) / np.log(2)
    return {f'{first}-{last - 1}': float(losses[first:last].mean()) for first, last in zip((0, *EDGES[:-1]), EDGES, strict=True)}


def describe(metrics: dict) -> str:
    """Bits per byte of the run, then of each bin."""
    return show(metrics) + ', by position ' + ' '.join(f'{bits:.3f}' for bits in metrics['by_position'].values())


if __name__ == '__main__':
    sys.exit(main())
