"""Training on generated sequences, for the synthetic experiments: runs of several seeds and learning rates are lanes of one program.

Lanes are for accelerators, which small models leave idle. On one CPU core three lanes of hope-linear took 1.6 times the CPU time of three
runs one after the other, and twice as long to compile: there `fit` is called with one seed and one rate at a time.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from nested_jax.models.loss import model_loss
from nested_jax.training.config import TrainConfig
from nested_jax.training.optimizer import make_optimizer
from nested_jax.training.state import TrainState
from nested_jax.training.step import make_train_step

PyTree = Any
STEPS_A_CALL = 50  # after which an interrupt is heard


class Phase(NamedTuple):
    """A part of the steps, with data of its own."""

    end: int  # step at which the next phase begins
    data: PyTree


class Fitted(NamedTuple):
    """Runs, stacked: leading axes (S, R) of seeds and learning rates."""

    params: PyTree  # of the checkpoint kept
    loss: jax.Array  # (S, R) nats a position over the last steps
    score: jax.Array  # (S, R) of the checkpoint kept, 0 without a score
    step: jax.Array  # (S, R) int32 steps after which the checkpoint was kept


def make_fit(
    model: nn.Module,
    config: TrainConfig,
    draw: Callable[[PyTree, TrainState], dict],
    score: Callable[[PyTree, PyTree], jax.Array] | None = None,
    score_every: int | None = None,
) -> Callable[..., Fitted]:
    """Builds (seeds, rates, data) -> `Fitted`; compiles once for every number of seeds and of learning rates, and shapes of the data.

    `rates` are peak learning rates, by default the configuration's; `data` is a pytree whose leaves have a leading axis of seeds, or a
    list of `Phase`, whose last one's data the score sees.

    Args:
        model: to train: a `LanguageModel`, or what has its `hidden` and `head`.
        config: the optimizer's settings and the number of steps.
        draw: a seed's data and the state of its run -> the step's batch of 'tokens', 'targets' and 'weights', each (count, length).
        score: parameters, a seed's data -> scalar by which the checkpoint is chosen, of equals the latest.
        score_every: steps between two checkpoints, a multiple of 50; None: the last step is the only one.
    """
    loss = lambda params, batch: model_loss(model, params, batch['tokens'], batch['targets'], weights=batch['weights'])

    @jax.jit
    @_lanes
    def start(key: jax.Array, data: PyTree, rate: jax.Array) -> TrainState:
        params = model.init(jax.random.fold_in(key, config.steps), jnp.zeros((1, 1), jnp.int32))['params']
        return TrainState(jnp.zeros((), jnp.int32), params, _optimizer(config, rate).init(params), key)

    @functools.partial(jax.jit, static_argnums=3)
    def advance(states: TrainState, data: PyTree, rates: jax.Array, steps: int) -> tuple[TrainState, jax.Array]:
        def run(state: TrainState, data: PyTree, rate: jax.Array) -> tuple[TrainState, jax.Array]:
            step = make_train_step(loss, _optimizer(config, rate))
            state, metrics = jax.lax.scan(lambda state, _: step(state, draw(data, state)), state, None, length=steps)
            return state, metrics['loss'].mean()

        return _lanes(run)(states, data, rates)

    keep = jax.jit(_lanes(functools.partial(_keep, score)))

    def fit(seeds: Sequence[int], rates: Sequence[float] = (config.learning_rate,), data: PyTree = None) -> Fitted:
        rates, done = jnp.asarray(rates, jnp.float32), 0
        keys = jnp.stack([jax.random.key(seed) for seed in seeds])
        phases = data if isinstance(data, list) else [Phase(config.steps, data)]
        states = start(jnp.broadcast_to(keys[:, None], (len(seeds), len(rates))), phases[0].data, rates)
        nothing = jnp.full((len(seeds), len(rates)), -jnp.inf)
        kept = Fitted(states.params, nothing, nothing, states.step)
        while done < config.steps:
            end, data = next(phase for phase in phases if done < phase.end)
            steps = min(STEPS_A_CALL, end - done)
            states, last = jax.block_until_ready(advance(states, data, rates, steps))
            done += steps
            if done == config.steps or (score_every and done % score_every == 0):
                kept = keep((kept, states, last), data, rates)
        return kept

    return fit


def fit_one(fit: Callable[..., Fitted], seed: int) -> tuple[PyTree, float]:
    """Parameters and loss of one run, at the configuration's learning rate."""
    fitted = fit([seed])
    return lane(fitted.params, 0, 0), float(fitted.loss[0, 0])


def lane(tree: PyTree, *index: int) -> PyTree:
    """One run's part of stacked leaves."""
    return jax.tree.map(lambda leaf: leaf[index], tree)


def _keep(score: Callable | None, runs: tuple[Fitted, TrainState, jax.Array], data: PyTree, rate: jax.Array) -> Fitted:
    """The better of the checkpoint kept so far and a run's state, of equals the latter; the loss is the last in any case."""
    kept, state, last = runs
    new = jnp.zeros(()) if score is None else score(state.params, data)
    choose = functools.partial(jnp.where, new >= kept.score)
    return Fitted(jax.tree.map(choose, state.params, kept.params), last, choose(new, kept.score), choose(state.step, kept.step))


def _lanes(function: Callable) -> Callable:
    """Maps over the runs (S, R), the data (S) and the rates (R); a single run is not mapped, which compiles and runs faster."""

    def mapped(runs: PyTree, data: PyTree, rates: jax.Array) -> PyTree:
        if jax.tree.leaves(runs)[0].shape[0] == rates.size == 1:
            return jax.tree.map(lambda leaf: leaf[None, None], function(lane(runs, 0, 0), lane(data, 0), rates[0]))
        return jax.vmap(jax.vmap(function, (0, None, 0)), (0, 0, None))(runs, data, rates)

    return mapped


def _optimizer(config: TrainConfig, rate: jax.Array) -> optax.GradientTransformation:
    """The trainer's, at another peak of the learning rate, to which all of its updates are proportional."""
    return optax.chain(make_optimizer(config), optax.scale(rate / config.learning_rate))
