"""Bits per byte of trained models at other context lengths: `python -m experiments.context_length runs/a runs/b`.

Reads the newest checkpoint of runs of `experiments.hope_pretrain` and evaluates each on the same held-out text, cut into windows of each
length: the longer the window, the more a model can know of the text before a token, if it can use more than it was trained on. Memories
are carried through the whole window; softmax attention sees all of it, at positions it was not trained on.
"""

import dataclasses
import json
import pathlib
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import tyro

from experiments.arguments import parse_arguments
from nested_jax.config import ModelConfig
from nested_jax.data import Dataset, evaluation_batches, open_dataset
from nested_jax.evaluation.perplexity import HeldOut, evaluate
from nested_jax.evaluation.rows import append_row, hardware_name, make_row
from nested_jax.models.language_model import LanguageModel
from nested_jax.training.checkpoints import Checkpoints
from nested_jax.training.config import TrainConfig
from nested_jax.training.optimizer import level_periods, make_optimizer
from nested_jax.training.state import init_state
from nested_jax.training.step import make_eval_step, make_loss

EXPERIMENT = 'context_length'
RESULTS = pathlib.Path(__file__).parent / 'results' / f'{EXPERIMENT}.jsonl'


@dataclasses.dataclass(frozen=True)
class Args:
    """Evaluate trained models at several context lengths."""

    runs: tyro.conf.Positional[tuple[pathlib.Path, ...]]
    """Output folders of experiments.hope_pretrain, on the embedded corpus and bytes."""
    lengths: tuple[int, ...] = (256, 1024, 4096)
    """Tokens of a window."""
    tokens: int = 200_000
    """Held-out tokens read at each length."""
    results: pathlib.Path = RESULTS
    """File that a row for each run is added to."""

    def __post_init__(self):
        for name in ('runs', 'lengths'):
            if not getattr(self, name):
                raise ValueError(f'{name} is {getattr(self, name)!r}, allowed is at least one')
        for run in self.runs:
            if not (run / 'config.json').is_file():
                raise ValueError(f'runs has {str(run)!r}, allowed is the output folder of a run, with its config.json')
        if min(*self.lengths, self.tokens) < 1:
            raise ValueError(f'lengths is {self.lengths!r} and tokens is {self.tokens!r}, allowed are integers of at least 1')


def main(argv: list[str] | None = None) -> int:
    """Evaluates every run at every length, prints and stores what it measures; returns the exit code."""
    args = parse_arguments(Args, argv, __doc__)
    data = open_dataset('embedded')
    for run in args.runs:
        began, run_config = time.monotonic(), json.loads((run / 'config.json').read_text())
        config, params, step = restore_params(run, run_config)
        bits = {str(length): evaluate_at(config, params, data, length, args.tokens).bits_per_byte for length in args.lengths}
        print(f'{run}  ' + '  '.join(f'{length}: {value:.4f}' for length, value in bits.items()), flush=True)
        row = make_row(
            experiment=EXPERIMENT, model=run.name, seed=run_config['train']['seed'],
            config=run_config | dict(lengths=args.lengths, eval_tokens=args.tokens), metrics=dict(bits_per_byte=bits, step=step),
            hardware=hardware_name(jax.devices()), wall_s=time.monotonic() - began,
        )  # fmt: skip
        append_row(args.results, row)
    return 0


def restore_params(run: pathlib.Path, run_config: dict) -> tuple[ModelConfig, Any, int]:
    """A run's model, its newest parameters and the step they are of."""
    train, config = TrainConfig(**run_config['train']), ModelConfig.from_dict(run_config['model'])
    optimizer = make_optimizer(train, level_periods(config, train.sequence_length))
    init_params = lambda key: LanguageModel(config).init(key, jnp.zeros((1, train.sequence_length), jnp.int32))['params']
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.eval_shape(lambda: init_state(init_params, optimizer, train.seed))
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), abstract)
    restored = Checkpoints(run / 'checkpoints', train.keep).restore(abstract, run_config)
    if restored is None:
        raise ValueError(f'runs has {str(run)!r}, allowed is a run with a checkpoint')
    return config, restored.state.params, restored.step


def evaluate_at(config: ModelConfig, params: Any, data: Dataset, length: int, tokens: int) -> HeldOut:
    """The loss on the first `tokens` held-out tokens in windows of `length`."""
    model = LanguageModel(dataclasses.replace(config, max_length=max(length, config.max_length)))
    batches = evaluation_batches(data.heldout, length=length, batch_size=1, grid=config.grid, max_tokens=tokens)
    return evaluate(jax.jit(make_eval_step(make_loss(model))), params, batches, data.tokenizer.count_bytes)


if __name__ == '__main__':
    sys.exit(main())
