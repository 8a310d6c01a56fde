"""What of a model an update moves: adapters beside its weights, or the levels of its Continuum Memory System at their own periods.

The rest stays as it is. Adapters are thrown away once they are merged; levels are weights of the model and stay in place.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import optax

from nested_jax.config import LevelConfig, check
from nested_jax.optim.levels import steps_of
from nested_jax.seal.inner_loop import InnerConfig, inner_optimizer
from nested_jax.seal.lora import attach, init_lora, merge

PyTree = Any


class Part(NamedTuple):
    """Functions of the parameters of a model and of what is learned, a pytree."""

    start: Callable[[PyTree, jax.Array], PyTree]  # parameters, seed () -> what is learned, at which the model computes what it did
    variables: Callable[[PyTree, PyTree], PyTree]  # parameters, learned -> variables of the model
    merged: Callable[[PyTree, PyTree], PyTree]  # parameters, learned -> parameters
    optimizer: optax.GradientTransformation  # of `inner_optimizer`


def adapter_part(config: InnerConfig) -> Part:
    """Low-rank adapters, of `config.lora` (arXiv:2106.09685v2)."""
    return Part(
        start=lambda params, seed: init_lora(params, jax.random.key(seed), config.lora),
        variables=lambda params, adapters: attach(params, adapters, config.lora),
        merged=lambda params, adapters: merge(params, adapters, config.lora),
        optimizer=inner_optimizer(config),
    )


def level_part(config: InnerConfig, levels: Sequence[LevelConfig], tokens_per_step: int) -> Part:
    """The MLPs of all levels, each updated with the sum of the gradients of its period: Eq. (71), arXiv:2512.24695v1.

    Args:
        config: shared settings; its adapters have no part in this.
        levels: those of the model, whose periods are in tokens.
        tokens_per_step: places for tokens in the rows of a step.

    Raises:
        ValueError: for a step of no tokens.
    """
    check(tokens_per_step >= 1, 'tokens_per_step', tokens_per_step, 'an integer of at least 1')
    steps = {f'level_{index}': steps_of(level.period, tokens_per_step) for index, level in enumerate(levels)}
    return Part(
        start=lambda params, seed: {name: params['blocks']['channel'][name] for name in steps},
        variables=lambda params, learned: {'params': _with_levels(params, learned)},
        merged=_with_levels,
        optimizer=inner_optimizer(config, periods=lambda path: steps[path.split('/')[0]]),
    )


def _with_levels(params: PyTree, learned: PyTree) -> PyTree:
    return {**params, 'blocks': {**params['blocks'], 'channel': {**params['blocks']['channel'], **learned}}}
