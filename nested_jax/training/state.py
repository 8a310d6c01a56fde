"""What a training step reads and writes."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class TrainState(NamedTuple):
    """Everything that the next step depends on, the batch excepted."""

    step: jax.Array  # () int32: steps done
    params: Any  # float32 pytree
    opt_state: Any
    key: jax.Array  # () typed key, the run's root: what is random at a step takes fold_in(key, step)


def init_state(
    init_params: Callable[[jax.Array], Any],
    optimizer: optax.GradientTransformation,
    seed: int,
    sharding: Any = None,
) -> TrainState:
    """Makes the state before the first step, in one compiled call.

    Args:
        init_params: parameters from a key.
        optimizer: its state is made from the parameters.
        seed: of the root key.
        sharding: of the leaves, one for all or a state of them: each device makes its share only. None leaves them where JAX puts them.
    """

    def init(key: jax.Array) -> TrainState:
        params = init_params(jax.random.fold_in(key, 0))
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), key)

    return jax.jit(init, out_shardings=sharding)(jax.random.key(seed))


def step_key(state: TrainState) -> jax.Array:
    """The key of what is random after `state.step` steps."""
    return jax.random.fold_in(state.key, state.step)
