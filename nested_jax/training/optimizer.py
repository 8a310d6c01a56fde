"""The outer optimizer: AdamW, Muon or M3 with warm-up and cosine, clipping that is safe at zero, and a period for each CMS level."""

import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from nested_jax.config import ModelConfig
from nested_jax.optim.levels import by_level, steps_of
from nested_jax.optim.m3 import scale_by_m3
from nested_jax.optim.muon import scale_by_muon
from nested_jax.optim.nested import nested
from nested_jax.training.config import TrainConfig

PyTree = Any


def make_optimizer(
    config: TrainConfig, level_periods: dict[str, int] | None = None, shardings: PyTree | None = None, *, nested_levels: bool = False
) -> optax.GradientTransformation:
    """The optimizer as the trainer runs it.

    Clipping sees the whole gradient at every step. The learning rate follows the step and not the number of a level's updates, so
    slow and fast levels stand at the same point of the schedule.

    Args:
        config: the run's settings.
        level_periods: CMS level's name -> tokens between its updates, the fastest first; levels not named, and everything else, are
            updated every step.
        shardings: of the parameters, a NamedSharding for each: without them Muon and M3 gather matrices that Auto meshes split.
        nested_levels: whether each level but the slowest starts anew after its updates within the next slower one's period, from an
            initial state that is updated as often as that one, by the same rule.

    Raises:
        ValueError: for nested levels of which one would start anew at each of its updates.
    """
    rule = optax.chain(_scale_by(config, shardings), optax.add_decayed_weights(config.weight_decay, mask=decay_mask))
    steps = {name: steps_of(period, config.tokens_per_step) for name, period in (level_periods or {}).items()}

    def every(steps: dict[str, int]) -> optax.GradientTransformation:
        levels = by_level(rule, functools.partial(_of_level, steps, otherwise=1)) if max(steps.values(), default=1) > 1 else rule
        return optax.chain(clip_by_global_norm(config.clip_norm), levels, optax.scale_by_learning_rate(warmup_cosine(config)))

    if not nested_levels:
        return every(steps)
    if len(steps) < 2 or any(fast >= slow for fast, slow in itertools.pairwise(steps.values())):
        allowed = f'two periods or more that ascend in steps of {config.tokens_per_step} tokens, for nested levels'
        raise ValueError(f'level_periods is {level_periods}, allowed is {allowed}')
    slower = dict(zip(steps, list(steps.values())[1:], strict=False))
    restarts = {name: steps[name] * math.ceil(slow / steps[name]) for name, slow in slower.items()}
    return nested(every(steps), every(slower), functools.partial(_of_level, restarts, otherwise=0))


def _of_level(values: dict[str, int], path: str, otherwise: int) -> int:
    """What the level whose name stands in a parameter's path has."""
    return next((values[name] for name in path.split('/') if name in values), otherwise)


def _scale_by(config: TrainConfig, shardings: PyTree | None) -> optax.GradientTransformation:
    """AdamW's direction, or Muon's or M3's for the matrices that projections are, sized as AdamW's updates are."""
    adam = optax.scale_by_adam(b1=config.beta1, b2=config.beta2)
    if config.optimizer == 'adamw':
        return adam
    if config.optimizer == 'muon':
        matrix = scale_by_muon(scaling='moonshot', shardings=shardings)
    else:
        matrix = scale_by_m3(periods=(config.slow_period,), scaling='rms', shardings=shardings)
    return optax.partition({'matrix': matrix, 'adam': adam}, matrix_labels)


def matrix_labels(params: PyTree) -> PyTree:
    """'matrix' for the kernels that decay, which are stacks of (inputs, outputs); 'adam' for everything else, the head included."""
    label = lambda path, _: 'matrix' if _names(path)[-1] == 'kernel' and _decays(*_names(path)) else 'adam'
    return jax.tree_util.tree_map_with_path(label, params)


def warmup_cosine(config: TrainConfig) -> optax.Schedule:
    """Linear warm-up from 1 / warmup_steps of the peak, then a cosine down to a tenth of it at the last step."""
    peak, warmup = config.learning_rate, config.warmup_steps
    first = peak / warmup if warmup else peak
    return optax.warmup_cosine_decay_schedule(first, peak, warmup, config.steps, end_value=0.1 * peak)


def decay_mask(params: PyTree) -> PyTree:
    """Marks what weight decay acts on: the matrix kernels of projections.

    Left out are initial memories, gates, norms, biases, convolutions and embeddings: zero is not "simple" there, it is a memory that starts
    empty or a gate half open.
    """
    return jax.tree_util.tree_map_with_path(lambda path, _: _decays(*_names(path)), params)


def _names(path: tuple) -> list[str]:
    return jax.tree_util.keystr(path, simple=True, separator='/').split('/')


def _decays(*names: str) -> bool:
    *inside, last = names
    left_out = any(
        name.startswith(('gate_', 'initial')) or name.endswith('_gate') or 'convolution' in name or 'norm' in name for name in inside
    )
    return last in ('kernel', 'head') and not left_out


def global_norm(tree: PyTree) -> jax.Array:
    """Euclidean norm over all leaves, () float32, whose gradient at zero is zero.

    The gradient of `optax.global_norm` is NaN there, and a meta-learning step takes it whenever an inner gradient vanishes.
    """
    total = sum((jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(tree)), jnp.zeros((), jnp.float32))
    nonzero = total != 0  # NaN is not zero, and must be seen
    return jnp.where(nonzero, jnp.sqrt(jnp.where(nonzero, total, 1.0)), 0.0)


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """Scales updates down to a global norm of at most `max_norm`; differentiable everywhere, zero included.

    Raises:
        ValueError: if `max_norm` is not above 0.
    """
    if max_norm <= 0:
        raise ValueError(f'max_norm is {max_norm}, allowed is a number above 0')

    def update(updates: PyTree, state: optax.EmptyState, params: PyTree | None = None) -> tuple[PyTree, optax.EmptyState]:
        del params
        scale = max_norm / jnp.maximum(global_norm(updates), max_norm)
        return jax.tree.map(lambda leaf: leaf * scale.astype(leaf.dtype), updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def level_periods(model_config: ModelConfig, sequence_length: int) -> dict[str, int]:
    """CMS level's name -> tokens between its updates across steps.

    A level that is updated within the sequences is left out: what steps change are its initial weights, at every step.
    """
    inside = lambda period: model_config.in_sequence is not None and period < sequence_length
    return {f'level_{index}': level.period for index, level in enumerate(model_config.levels) if not inside(level.period)}
