"""Small models by name, trained on the tasks of `nested_jax/data/tasks`: what the grids of formal languages and of MAD share.

A name is a family of the presets, 'hope-linear', or one of its variants: 'hope-linear-without-dgd' leaves a part out
(`models.presets.without`), 'hope-linear-zero' decays to zero and not to learned initial states, 'hope-linear-chunk-1' refreshes memories
and projections at every token, 'transformer-window-256' sees no more tokens than that.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from experiments.fitting import Fitted, lane, make_fit
from experiments.grid import Cell, GridArgs, Train
from nested_jax.config import LevelConfig, ModelConfig, as_dict
from nested_jax.data.tasks.task import Example, Task
from nested_jax.models.presets import preset, preset_names, without
from nested_jax.training.config import TrainConfig
from nested_jax.training.state import TrainState

Predict = Callable[[np.ndarray], np.ndarray]  # (count, length) tokens -> (count, length) answers
ROWS_A_CALL = 100  # of a prediction
VALIDATION_SEED = 2**31  # added to a run's, apart from all of theirs
_NAME = re.compile(r'(?P<family>.+?)(-without-(?P<part>[a-z]+))?(?P<zero>-zero)?(-chunk-(?P<chunk>\d+))?(-window-(?P<window>\d+))?')


@dataclasses.dataclass(frozen=True)
class TaskArgs(GridArgs):
    """The arguments of a grid that trains on generated examples."""

    learning_rates: tuple[float, ...] = (3e-3, 1e-2)
    """Peaks that every run tries; it keeps what does best on examples of its own for this choice."""
    steps: int = 600
    """Optimizer steps."""
    warmup_steps: int = 50
    """Steps of linear warm-up; a cosine goes down to a tenth."""
    batch_size: int = 32
    """Examples a step."""
    weight_decay: float = 0.1
    """Of the projections' kernels."""
    train_examples: int = 10_000
    """Of the training set, which is read again and again in new orders."""
    validation_examples: int = 200
    """Examples by which learning rates and checkpoints are chosen."""
    test_examples: int = 500
    """Examples of each test."""

    def __post_init__(self):
        super().__post_init__()
        self.check_counts('train_examples', 'validation_examples', 'test_examples')
        rates = self.learning_rates
        self.check('learning_rates', bool(rates) and all(rate > 0 for rate in rates), 'numbers above 0')
        self.train(1)

    def train(self, length: int) -> TrainConfig:
        """The optimizer's settings, which check their own; the learning rate is only a scale for those tried."""
        return TrainConfig(
            steps=self.steps, batch_size=self.batch_size, sequence_length=length, learning_rate=1.0,
            warmup_steps=self.warmup_steps, weight_decay=self.weight_decay,
        )  # fmt: skip

    def smaller(self, **others: Any) -> Any:
        """The arguments of a smoke run."""
        sizes = dict(steps=2, warmup_steps=1, batch_size=2, train_examples=4, validation_examples=4, test_examples=4)
        return dataclasses.replace(self, seeds=self.seeds[:1], learning_rates=self.learning_rates[:1], **sizes | others)

    def config(self, cell: Cell, model: ModelConfig, task: Task) -> dict:
        """The configuration of a cell's row, all that its numbers depend on."""
        names = ('steps', 'warmup_steps', 'batch_size', 'weight_decay', 'train_examples', 'validation_examples', 'test_examples')
        return dict(
            model=as_dict(model), task=dict(name=cell.task, **as_dict(task)),
            train={name: getattr(self, name) for name in names} | dict(learning_rates=self.learning_rates), seed=cell.seed,
        )  # fmt: skip


def registered(models: Sequence[str]) -> tuple[str, ...]:
    """Those of the models that are built."""
    return tuple(model for model in models if _NAME.fullmatch(model)['family'] in families())


def families() -> tuple[str, ...]:
    """All families of the presets."""
    return tuple(name.removesuffix('-tiny') for name in preset_names() if name.endswith('-tiny'))


def model_config(name: str, *, width: int, heads: int, vocab_size: int, max_length: int) -> ModelConfig:
    """A model of two blocks: a family's mixer and one MLP, of which all families' parameters agree about as the presets' do.

    Args:
        name: see the module.
        width: of the model.
        heads: of the mixer, together as wide.
        vocab_size: tokens.
        max_length: tokens that attention looks back at most.

    Raises:
        ValueError: naming the model and what is allowed.
    """
    parts = _NAME.fullmatch(name)
    if parts is None or parts['family'] not in families():
        variants = '-without-<part>, -zero, -chunk-<tokens> or -window-<tokens>'
        raise ValueError(f'model is {name!r}, allowed is one of {", ".join(families())}, or a variant, {variants}')
    tiny = preset(f'{parts["family"]}-tiny')
    hidden = sum(level.hidden_dim for level in tiny.levels) * width // tiny.width
    config = dataclasses.replace(
        tiny, num_layers=2, width=width, num_heads=heads, head_dim=width // heads, levels=(LevelConfig(hidden, 1),),
        vocab_size=vocab_size, max_length=max_length,
    )  # fmt: skip
    if parts['part']:
        config = without(config, parts['part'])
    if parts['zero']:
        if config.memory.decay_to == 'zero':
            raise ValueError(f'model is {name!r}, allowed is -zero for families whose memories decay to their initial states')
        config = dataclasses.replace(config, memory=dataclasses.replace(config.memory, decay_to='zero'))
    if parts['chunk']:
        sizes = dict(chunk_size=int(parts['chunk']), projection_chunk_size=int(parts['chunk']))
        memory, config = config.memory, dataclasses.replace(config, memory=dataclasses.replace(config.memory, **sizes))
        if config.memory == memory:
            raise ValueError(f'model is {name!r}, allowed is {parts["family"]!r} for the chunk that it has anyway')
    if parts['window']:
        if 'attention' not in config.unit:
            raise ValueError(f'model is {name!r}, allowed is a window for families with attention')
        config = dataclasses.replace(config, attention=dataclasses.replace(config.attention, window=int(parts['window'])))
    return config


def make_train(
    args: TaskArgs,
    task: Task,
    model: nn.Module,
    *,
    validation: str,
    score: Callable[[jax.Array, Example], jax.Array],
    evaluate: Callable[[Predict, int], dict],
    score_every: int | None = None,
    loss_everywhere: bool = False,
) -> Train:
    """Builds what trains seeds and measures them.

    Args:
        args: sizes and the learning rates to try.
        task: that generates examples.
        model: see `fitting.make_fit`.
        validation: split by whose examples, of other seeds, learning rates and checkpoints are chosen.
        score: predictions and a batch -> scalar to choose by; of equals the lower training loss is chosen.
        evaluate: what a run answers, and its seed -> metrics.
        score_every: see `fitting.make_fit`.
        loss_everywhere: train on the targets of all positions, not on the scored ones alone.
    """
    answers = lambda params, tokens: model.apply({'params': params}, tokens)[0].argmax(-1)
    draw = functools.partial(_batch, loss_everywhere)
    length = task.example(0)['tokens'].size
    fit = make_fit(
        model, args.train(length), draw, lambda params, data: score(answers(params, data['validation']['tokens']), data['validation']),
        score_every,
    )  # fmt: skip
    compiled = jax.jit(answers)

    def train(seeds: Sequence[int]) -> list[dict]:
        fitted = fit_rates(args, fit, seeds, stack([_data(args, task, validation, seed) for seed in seeds]))
        return [best(args, lane(fitted, index), functools.partial(measure, seed=seed)) for index, seed in enumerate(seeds)]

    def measure(params: Any, seed: int) -> dict:
        return evaluate(functools.partial(_predict, compiled, params), seed)

    return train


def fit_rates(args: TaskArgs, fit: Callable[..., Fitted], seeds: Sequence[int], data: Any) -> Fitted:
    """Runs of all seeds and learning rates, side by side or one rate after another, as (S, R) leaves; see `fitting.make_fit`."""
    if args.side_by_side:
        fits = [fit(seeds, args.learning_rates, data)]
    else:
        fits = [fit(seeds, (rate,), data) for rate in args.learning_rates]
    return jax.tree.map(lambda *leaves: np.concatenate(leaves, 1), *fits)


def best(args: TaskArgs, runs: Fitted, measure: Callable[[Any], dict]) -> dict:
    """The metrics of a seed's runs (R): what was tried, what was chosen, and what is measured of the parameters chosen."""
    index = choose(runs.score, runs.loss)
    params, loss, score, step = lane(runs, index)
    tried = [[rate, float(score), _finite(loss)] for rate, score, loss in zip(args.learning_rates, runs.score, runs.loss, strict=True)]
    return dict(
        learning_rate=args.learning_rates[index], step=int(step), loss=_finite(loss), validation=float(score), tried=tried,
        parameters=sum(leaf.size for leaf in jax.tree.leaves(params)), **measure(params),
    )  # fmt: skip


def choose(scores: Sequence[float], losses: Sequence[float]) -> int:
    """The index of the highest score, of equals that of the lowest loss; a loss that is no number is the highest."""
    return max(range(len(scores)), key=lambda index: (scores[index], -losses[index] if math.isfinite(losses[index]) else -math.inf))


def majority(task: Task, seed: int, count: int = 256) -> int:
    """The most frequent answer in training."""
    batch = examples(task, 'train', seed, count)
    return int(np.bincount(batch['targets'][batch['weights'] > 0]).argmax())


@functools.lru_cache(maxsize=16)
def examples(task: Task, split: str, seed: int, count: int) -> Example:
    """The first examples of a split."""
    return task.batch(0, count, split=split, seed=seed)


def reading_order(steps: int, batch_size: int, most: int, seed: int) -> np.ndarray:
    """Which of at most `most` examples each step reads, (steps, batch_size) int32: every one once before any is read again."""
    rng, reads = np.random.default_rng(seed), steps * batch_size
    count = min(most, reads)
    order = np.concatenate([rng.permutation(count) for _ in range(-(-reads // count))])[:reads]
    return order.reshape(steps, batch_size).astype(np.int32)


def _data(args: TaskArgs, task: Task, validation: str, seed: int) -> dict:
    """A run's training set, the order in which it is read, and what its choices are made by."""
    order = reading_order(args.steps, args.batch_size, args.train_examples, seed)
    return dict(
        train=examples(task, 'train', seed, int(order.max()) + 1), order=order,
        validation=examples(task, validation, VALIDATION_SEED + seed, args.validation_examples),
    )  # fmt: skip


def stack(trees: list) -> Any:
    """Trees of equal shapes, stacked leaf by leaf on the device."""
    return jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), *trees)


def _batch(loss_everywhere: bool, data: dict, state: TrainState) -> dict:
    batch = jax.tree.map(lambda rows: rows[data['order'][state.step]], data['train'])
    return batch | dict(weights=jnp.ones_like(batch['weights'])) if loss_everywhere else batch


def _predict(compiled: Callable, params: Any, tokens: np.ndarray) -> np.ndarray:
    """In calls of one size, so that one program serves all tests of a length."""
    count = -(-len(tokens) // ROWS_A_CALL) * ROWS_A_CALL
    padded = np.pad(tokens, ((0, count - len(tokens)), (0, 0)))
    parts = [compiled(params, padded[start : start + ROWS_A_CALL]) for start in range(0, count, ROWS_A_CALL)]
    return np.concatenate(parts)[: len(tokens)]


def _finite(value: float) -> float | None:
    """The number, None where it is none, which JSON has no sign for."""
    return float(value) if math.isfinite(value) else None
