"""Mechanistic Architecture Design (MAD), six tasks of token manipulation: `python -m experiments.mad`.

Table 4, arXiv:2512.24695v1, which has five of the six (noisy in-context recall is missing) and does not say how many seeds, which
settings and which average. Tasks are those of `nested_jax/data/tasks/mad.py` at the reference's baseline (arXiv:2403.17844; rules of
athms/mad-lab): two blocks of a mixer and a SwiGLU MLP, width 128 with four heads of 32, parameters about equal, AdamW with a cosine.

Accuracy over the scored positions is reported as micro (share right) and macro (torchmetrics' default, the reference's: mean over the
classes present among targets or predictions, those only predicted counting zero), beside that of the most frequent answer. In the recall
tasks training is on all next tokens. Compression has the reference's auto-encoder: what the last position holds, plus sinusoidal
positions, goes through two dense layers, each with a norm before and a GELU after, and an output layer; ours adds positions to the
final norm's output. Memorization trains on the reference's 256 sequences.

Cut to what a CPU affords, and therefore not the paper's numbers: 600 steps of 16 sequences, three quarters of a pass over 12,800 (the
reference: 200 passes in batches of 128), two learning rates, one weight decay, tests of 500 sequences. Each run chooses its learning rate
by 200 validation sequences; the reference chooses that, and when to stop, by the test.

A run (one seed, both learning rates) takes of one CPU core, in seconds by transformer, gated-deltanet, comba, titans, rwkv7 and hope: of
memorization 35 to 81, 87 to 154, 49 to 80, 70 to 202, 80 to 298 and 266 to 361; of compression 32 to 116, 55 to 168, 50 to 70, 58 to 92,
72 to 119 and 243 to 327; of in-context recall 206 to 364, 208 to 304, 175 to 225, 252 to 269 and 329 to 550, hope not measured. The first
of three seeds compiles, and other work ran beside most of them, so that the smallest figures are the nearest to an empty machine's.
Selective copying, on sequences twice as long, took 686 and 1,064 by the first two. The other recall tasks are as long as the first. 54 of
the 126 runs have rows. Two processes share the grid and go on where they stopped:

    taskset -c 0 python -m experiments.mad --minutes 40 --tasks compression in-context-recall noisy-in-context-recall
    taskset -c 1 python -m experiments.mad --minutes 40 --tasks memorization fuzzy-in-context-recall selective-copying
"""

import dataclasses
import functools
import math
import pathlib
import sys
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from experiments.arguments import parse_arguments
from experiments.grid import Grid, Train, make_cells, run_grid
from experiments.task_runs import Predict, TaskArgs, examples, majority, make_train, model_config, registered
from nested_jax.config import ModelConfig
from nested_jax.data.tasks import mad
from nested_jax.data.tasks.task import Example, Task
from nested_jax.layers.common import RMSNorm
from nested_jax.models.language_model import LanguageModel

EXPERIMENT = 'mad'
RESULTS = pathlib.Path(__file__).parent / 'results' / f'{EXPERIMENT}.jsonl'
MODELS = ('hope-linear', 'transformer', 'gated-deltanet', 'titans', 'rwkv7', 'comba', 'hope')
TASKS = {
    'compression': mad.Compression(),
    'memorization': mad.Memorization(),
    'in-context-recall': mad.InContextRecall(),
    'fuzzy-in-context-recall': mad.FuzzyInContextRecall(),
    'selective-copying': mad.SelectiveCopying(),
    'noisy-in-context-recall': mad.NoisyInContextRecall(),
}
MEMORIZED = 256  # sequences that memorization trains on


@dataclasses.dataclass(frozen=True)
class Args(TaskArgs):
    """Train small models on the tasks of MAD."""

    learning_rates: tuple[float, ...] = (3e-3, 1e-3)
    """Peaks that every run tries; it keeps what does best on validation sequences."""
    steps: int = 600
    """Optimizer steps."""
    batch_size: int = 16
    """Sequences a step."""
    train_examples: int = 12_800
    """Of the training set, which is read again and again in new orders; memorization has at most 256."""
    models: tuple[str, ...] = registered(MODELS)
    """Families of the presets, or variants: <family>-without-<part>, <family>-chunk-<tokens>."""
    tasks: tuple[str, ...] = tuple(TASKS)
    """Of compression, memorization, in-context-recall, fuzzy-in-context-recall, selective-copying and noisy-in-context-recall."""
    results: pathlib.Path = RESULTS
    """File that a row for each run is added to."""

    def __post_init__(self):
        super().__post_init__()
        for name in ('models', 'tasks'):
            self.check(name, bool(getattr(self, name)), 'at least one')
        self.check('tasks', set(self.tasks) <= set(TASKS), f'some of {", ".join(TASKS)}')
        for name in self.models:
            model(name, self.tasks[0])

    def of(self, task: str) -> 'Args':
        """The arguments with a task's training set."""
        return dataclasses.replace(self, train_examples=min(self.train_examples, MEMORIZED)) if task == 'memorization' else self


def main(argv: list[str] | None = None) -> int:
    """Runs the cells that have no row; returns the exit code."""
    args = parse_arguments(Args, argv, __doc__)
    if args.smoke:
        args = args.smaller(models=args.models[:1], tasks=args.tasks[:1])
    cells = make_cells(args.models, args.tasks, args.seeds)
    config = lambda cell: args.of(cell.task).config(cell, model(cell.model, cell.task), TASKS[cell.task])
    grid = Grid(EXPERIMENT, cells, config, functools.partial(prepare, args), describe, args.results, args.side_by_side)
    return run_grid(grid, minutes=args.minutes, store=not args.smoke)


def model(name: str, task: str) -> ModelConfig:
    """The model of a name, with a task's vocabulary; an auto-encoder does not need the head."""
    config = model_config(name, width=128, heads=4, vocab_size=TASKS[task].vocab_size, max_length=256)
    return dataclasses.replace(config, tie_embeddings=task == 'compression')


def prepare(args: Args, name: str, task: str) -> Train:
    """What trains and tests a model on a task."""
    config, module = model(name, task), AutoEncoder if task == 'compression' else LanguageModel
    return make_train(
        args.of(task), TASKS[task], module(config), validation='validation', score=right_positions,
        evaluate=lambda predict, seed: evaluate(predict, TASKS[task], seed, args.test_examples),
        loss_everywhere=task.endswith('recall'),
    )  # fmt: skip


class AutoEncoder(nn.Module):
    """Restores a sequence from what a language model's last position holds."""

    config: ModelConfig  # of the language model, whose head is not used

    def setup(self):
        self.encoder = LanguageModel(self.config)
        self.norms = [RMSNorm(self.config.norm_epsilon) for _ in range(3)]
        self.layers = [nn.Dense(self.config.width) for _ in range(2)]
        self.head_kernel = self.param('head', nn.initializers.lecun_normal(), (self.config.width, self.config.vocab_size))

    def __call__(self, tokens: jax.Array) -> tuple[jax.Array, None]:
        """(B, T) tokens -> (B, T, V) logits of each, and no state."""
        return self.hidden(tokens)[0] @ self.head_kernel, None

    def hidden(self, tokens: jax.Array, *, segment_ids: None = None) -> tuple[jax.Array, None]:
        """The (B, T, width) rows that the head reads, and no state."""
        encoded, _ = self.encoder.hidden(tokens, segment_ids=segment_ids)
        rows = encoded[:, -1:] + sinusoids(tokens.shape[1], self.config.width)[None]
        for norm, layer in zip(self.norms, self.layers, strict=False):
            rows = nn.gelu(layer(norm(rows)))
        return self.norms[-1](rows), None

    def head(self, params: Any) -> jax.Array:
        """The (width, V) matrix from hidden rows to logits."""
        return params['head']


def sinusoids(length: int, width: int) -> jax.Array:
    """(length, width) sines, then cosines, of each position at wavelengths from 2 pi to 20,000 pi; width is even."""
    angles = np.arange(length)[:, None] * np.exp(-math.log(10_000) * np.linspace(0, 1, width // 2))[None]
    return jnp.asarray(np.concatenate([np.sin(angles), np.cos(angles)], 1), jnp.float32)


def right_positions(predictions: jax.Array, batch: Example) -> jax.Array:
    """Share of scored positions that are right, as a float32 scalar."""
    return ((predictions == batch['targets']) * batch['weights']).sum() / batch['weights'].sum()


def evaluate(predict: Predict, task: Task, seed: int, count: int) -> dict[str, Any]:
    """Micro and macro accuracy on test sequences, and those of the most frequent answer.

    Args:
        predict: (count, length) tokens -> (count, length) answers.
        task: of MAD.
        seed: of the sequences.
        count: sequences.
    """
    batch = examples(task, 'test', seed, count)
    trivial = micro_macro(np.full_like(batch['tokens'], majority(task, seed)), batch)
    return dict(test=micro_macro(predict(batch['tokens']), batch), majority=trivial, answers=int(batch['weights'].sum()))


def micro_macro(predictions: np.ndarray, batch: Example) -> dict[str, float]:
    """Share of scored positions that are right, and the mean of the classes' shares.

    The mean is over the classes present among targets or predictions at scored positions; one that is only predicted counts 0.

    Args:
        predictions: (N, T).
        batch: 'targets' and 'weights' (N, T).
    """
    scored = batch['weights'] > 0
    predicted, targets = predictions[scored], batch['targets'][scored]
    classes = int(max(predicted.max(), targets.max())) + 1
    count = lambda values: np.bincount(values, minlength=classes)
    right, due, given = count(targets[predicted == targets]), count(targets), count(predicted)
    present = due + given > 0
    shares = right[present] / np.maximum(due[present], 1)
    return dict(micro=float((predicted == targets).mean()), macro=float(shares.mean()))


def describe(metrics: dict) -> str:
    """Percentages, those of the most frequent answer, and the learning rate."""
    shares, trivial = (f'{100 * metrics[name]["micro"]:.1f} / {100 * metrics[name]["macro"]:.1f}' for name in ('test', 'majority'))
    return f'micro / macro {shares} % (majority {trivial}), rate {metrics["learning_rate"]:g}'


if __name__ == '__main__':
    sys.exit(main())
