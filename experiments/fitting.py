"""Training on sequences that are drawn anew at every step, for the synthetic experiments: no data set, no files, one compilation."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from nested_jax.models.language_model import LanguageModel
from nested_jax.models.loss import model_loss
from nested_jax.training.config import TrainConfig
from nested_jax.training.optimizer import make_optimizer
from nested_jax.training.state import TrainState, step_key
from nested_jax.training.step import make_train_step

_STEPS_A_CALL = 50


def make_fit(model: LanguageModel, config: TrainConfig, draw: Callable[[jax.Array], dict]) -> Callable[[int], tuple[Any, float]]:
    """Builds seed -> (parameters, loss in nats a position over the last steps); compiles once for all seeds.

    Args:
        model: to train.
        config: the optimizer's settings and the number of steps.
        draw: key -> a step's batch of 'tokens', 'targets' and 'weights', each (count, length).
    """
    optimizer = make_optimizer(config)
    loss = lambda params, batch: model_loss(model, params, batch['tokens'], batch['targets'], weights=batch['weights'])
    train_step = make_train_step(loss, optimizer)

    @jax.jit
    def start(key: jax.Array) -> TrainState:
        params = model.init(jax.random.fold_in(key, config.steps), jnp.zeros((1, 1), jnp.int32))['params']
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), key)

    @functools.partial(jax.jit, static_argnums=1)
    def advance(state: TrainState, steps: int) -> tuple[TrainState, jax.Array]:
        one = lambda state, _: train_step(state, draw(step_key(state)))
        state, metrics = jax.lax.scan(one, state, None, length=steps)
        return state, metrics['loss'].mean()

    def fit(seed: int) -> tuple[Any, float]:
        state, done = start(jax.random.key(seed)), 0
        while done < config.steps:
            steps = min(_STEPS_A_CALL, config.steps - done)
            state, mean = advance(state, steps)
            done += steps
        return state.params, float(mean)

    return fit
