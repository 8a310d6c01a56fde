"""The inner update: K candidates, each with data, learning rate and number of steps of its own, learn in one compiled program.

A candidate is a few short sequences (`Candidate`). Candidates are laid out in buckets of equal shape, rows and lengths rounded up to
powers of two, instead of one length for all; a bucket is a `Batch`. Which rows a step reads is settled beforehand, by the candidate's
own seed, so that a candidate's result is the same alone and in any company.

The update is the reference's (Appendix B, arXiv:2506.10943v2): AdamW on adapters, clipping at norm 1, a learning rate that falls linearly
to zero over the candidate's own steps. Losses are means over the real tokens of a step's rows; padding costs nothing and teaches nothing.

Letters in shapes: K candidates, R rows, T tokens, S steps, N rows a step.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from nested_jax.models.language_model import LanguageModel
from nested_jax.models.loss import model_loss
from nested_jax.seal.lora import LoraConfig, attach, init_lora
from nested_jax.training.optimizer import clip_by_global_norm

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Candidate:
    """What one self-edit has the model learn.

    Raises:
        ValueError: naming the field, its value and what is allowed.
    """

    sequences: tuple[tuple[int, ...], ...]  # tokens, at least two each
    learning_rate: float
    steps: int
    seed: int = 0  # of the adapter's start and of the order of the rows
    prompt_lengths: tuple[int, ...] | None = None  # tokens at the front of each sequence that are not learned; None: none

    def __post_init__(self):
        _check(bool(self.sequences), 'sequences', self.sequences, 'at least one')
        short = next((sequence for sequence in self.sequences if len(sequence) < 2), None)
        _check(short is None, 'sequences', short, 'sequences of at least two tokens')
        _check(self.learning_rate >= 0, 'learning_rate', self.learning_rate, 'a number of at least 0')
        _check(self.steps >= 0, 'steps', self.steps, 'an integer of at least 0')
        lengths, counts = self.prompt_lengths, [len(sequence) for sequence in self.sequences]
        fits = lengths is None or (len(lengths) == len(counts) and all(0 <= n < count for n, count in zip(lengths, counts, strict=True)))
        _check(fits, 'prompt_lengths', lengths, 'one for each sequence, shorter than it')


@dataclasses.dataclass(frozen=True)
class InnerConfig:
    """What all candidates share.

    Raises:
        ValueError: naming the field, its value and what is allowed.
    """

    lora: LoraConfig = LoraConfig()
    rows_per_step: int | None = None  # a step's rows, drawn epoch by epoch without repetition; None: all
    clip_norm: float = 1.0
    weight_decay: float = 0.0
    kl_to_base: float = 0.0  # weight of KL(base || learner) per token, on the tokens that are learned

    def __post_init__(self):
        _check(self.rows_per_step is None or self.rows_per_step >= 1, 'rows_per_step', self.rows_per_step, 'an integer of at least 1')
        _check(self.clip_norm > 0, 'clip_norm', self.clip_norm, 'a number above 0')
        for name in ('weight_decay', 'kl_to_base'):
            _check(getattr(self, name) >= 0, name, getattr(self, name), 'a number of at least 0')


class Batch(NamedTuple):
    """Candidates of one bucket; arrays lead with K."""

    tokens: jax.Array  # (K, R, T) int32
    targets: jax.Array  # (K, R, T) int32
    weights: jax.Array  # (K, R, T) float32: 1 where the target is learned
    rows: jax.Array  # (K, S, N) int32: what each step reads; -1 is no row
    learning_rate: jax.Array  # (K,) float32
    steps: jax.Array  # (K,) int32
    seed: jax.Array  # (K,) uint32


class Learned(NamedTuple):
    """What the inner loop returns, by candidate."""

    adapters: PyTree  # leaves lead with K
    losses: jax.Array  # (K, S) float32 nats a token before each step, 0 after the candidate's last


def make_inner_loop(model: LanguageModel, config: InnerConfig) -> Callable[[PyTree, Batch], Learned]:
    """Builds (parameters, batch) -> `Learned`, compiled once for each shape of a bucket.

    The weights are held once whatever K is: only adapters, their moments and the activations are by candidate.

    Args:
        model: whose parameters stay as they are.
        config: shared settings.
    """
    optimizer = optax.chain(
        clip_by_global_norm(config.clip_norm), optax.scale_by_adam(), optax.add_decayed_weights(config.weight_decay)
    )  # fmt: skip
    loss = functools.partial(_loss, model, config)

    def learn(params: PyTree, candidate: Batch) -> Learned:
        adapters = init_lora(params, jax.random.key(candidate.seed), config.lora)

        def step(carry: tuple, inputs: tuple) -> tuple:
            adapters, state = carry
            index, rows = inputs
            value, gradient = jax.value_and_grad(loss)(adapters, params, candidate, rows)
            updates, new_state = optimizer.update(gradient, state, adapters)
            rate = candidate.learning_rate * (1 - index / jnp.maximum(candidate.steps, 1))
            new = jax.tree.map(lambda leaf, update: leaf - rate * update, adapters, updates)
            active = index < candidate.steps
            keep = lambda new, old: jax.tree.map(functools.partial(jnp.where, active), new, old)
            return (keep(new, adapters), keep(new_state, state)), jnp.where(active, value, 0.0)

        steps = jnp.arange(candidate.rows.shape[0])
        (adapters, _), losses = jax.lax.scan(step, (adapters, optimizer.init(adapters)), (steps, candidate.rows))
        return Learned(adapters, losses)

    return jax.jit(jax.vmap(learn, in_axes=(None, 0)))


def buckets(candidates: Sequence[Candidate], config: InnerConfig, *, at_most: int = 64) -> Iterator[tuple[list[int], Batch]]:
    """Lays candidates out in batches of equal shape.

    Rows, tokens and steps are rounded up to powers of two, so that few programs are compiled; the order within a bucket is the
    candidates' own.

    Args:
        candidates: in any order.
        config: of the inner loop that will read them.
        at_most: candidates in one batch.

    Yields:
        The candidates' places in `candidates`, and their batch.

    Raises:
        ValueError: for a batch of no candidates.
    """
    _check(at_most >= 1, 'at_most', at_most, 'an integer of at least 1')
    shapes = {}
    for place, candidate in enumerate(candidates):
        longest = max(map(len, candidate.sequences)) - 1
        shape = tuple(map(_power_of_two, (len(candidate.sequences), longest, max(candidate.steps, 1))))
        shapes.setdefault(shape, []).append(place)
    for shape, places in sorted(shapes.items()):
        for start in range(0, len(places), at_most):
            part = places[start : start + at_most]
            laid_out = [_lay_out(candidates[place], shape, config.rows_per_step) for place in part]
            yield part, Batch(*map(np.stack, zip(*laid_out, strict=True)))


def learn_all(
    inner_loop: Callable[[PyTree, Batch], Learned],
    params: PyTree,
    candidates: Sequence[Candidate],
    config: InnerConfig,
    *,
    at_most: int = 64,
) -> list[PyTree]:
    """Adapters of every candidate, in the order of `candidates`."""
    adapters: list[PyTree] = [None] * len(candidates)
    for places, batch in buckets(candidates, config, at_most=at_most):
        learned = inner_loop(params, batch).adapters
        for index, place in enumerate(places):
            adapters[place] = jax.tree.map(lambda leaf, index=index: leaf[index], learned)
    return adapters


def real_share(batch: Batch) -> float:
    """Share of a bucket's places that hold a token to learn from, over the steps that are taken."""
    rows = np.asarray(batch.rows)
    real = (np.asarray(batch.weights) > 0).sum(-1)  # (K, R)
    read = np.take_along_axis(real[:, None], np.maximum(rows, 0), -1) * (rows >= 0)
    return float(read.sum() / (rows.size * batch.tokens.shape[-1]))


def _loss(model: LanguageModel, config: InnerConfig, adapters: PyTree, params: PyTree, candidate: Batch, rows: jax.Array) -> jax.Array:
    """Mean over the real tokens of a step's rows."""
    tokens, targets = candidate.tokens[rows], candidate.targets[rows]
    weights = candidate.weights[rows] * (rows >= 0)[:, None]
    learner = _Adapted(model, attach(params, adapters, config.lora))
    total, count = model_loss(learner, params, tokens, targets, weights=weights)
    if config.kl_to_base:
        base, _ = model.apply({'params': params}, tokens)
        new, _ = learner.apply({'params': params}, tokens)
        total += config.kl_to_base * (_kl(jax.lax.stop_gradient(base), new) * weights).sum()
    return total / jnp.maximum(count, 1.0)


def _kl(base: jax.Array, new: jax.Array) -> jax.Array:
    """KL divergence from logits (..., V) to logits (..., V), (...)."""
    known, log = jax.nn.log_softmax(base), jax.nn.log_softmax(new)
    return (jnp.exp(known) * (known - log)).sum(-1)


class _Adapted(NamedTuple):
    """A model that is applied with adapters wherever it is applied."""

    model: LanguageModel
    variables: PyTree

    def apply(self, _: PyTree, *args: Any, **options: Any) -> Any:
        return self.model.apply(self.variables, *args, **options)

    def head(self, params: PyTree) -> jax.Array:
        return self.model.head(params)


def _lay_out(candidate: Candidate, shape: tuple[int, int, int], rows_per_step: int | None) -> tuple[np.ndarray, ...]:
    """A candidate's fields of a `Batch`, without the axis of candidates."""
    rows, length, steps = shape
    tokens, targets = np.zeros((rows, length), np.int32), np.zeros((rows, length), np.int32)
    weights = np.zeros((rows, length), np.float32)
    for row, sequence in enumerate(candidate.sequences):
        count = len(sequence) - 1
        skipped = max(candidate.prompt_lengths[row] - 1, 0) if candidate.prompt_lengths else 0
        tokens[row, :count], targets[row, :count], weights[row, skipped:count] = sequence[:-1], sequence[1:], 1.0
    plan = _plan(candidate, rows, steps, rows_per_step)
    scalars = np.float32(candidate.learning_rate), np.int32(candidate.steps), np.uint32(candidate.seed)
    return tokens, targets, weights, plan, *scalars


def _plan(candidate: Candidate, rows: int, steps: int, rows_per_step: int | None) -> np.ndarray:
    """(S, N) rows of each step: all of them, or epochs in an order of the candidate's seed, one after another."""
    real = len(candidate.sequences)
    if rows_per_step is None:
        return np.broadcast_to(np.where(np.arange(rows) < real, np.arange(rows), -1), (steps, rows)).astype(np.int32)
    rng, order = np.random.default_rng(candidate.seed), np.zeros(0, np.int32)
    while order.size < steps * rows_per_step:
        order = np.concatenate([order, rng.permutation(real).astype(np.int32)])
    return order[: steps * rows_per_step].reshape(steps, rows_per_step)


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()


def _check(holds: bool, name: str, value: object, allowed: str) -> None:
    if not holds:
        raise ValueError(f'{name} is {value!r}, allowed is {allowed}')
