"""One optimizer step and one evaluation step, as pure functions to compile.

A loss function maps (parameters, batch) to (sum of nats, number of targets), so microbatches and evaluation batches add up exactly. On a
mesh of Explicit axes it runs with Auto ones; what goes in and comes out, and what the optimizer does, is laid out as the types say.
"""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from nested_jax.models.language_model import LanguageModel
from nested_jax.models.loss import model_loss
from nested_jax.models.streaming import in_sequence_loss
from nested_jax.optim.sharding import run_in_auto_mode
from nested_jax.training.optimizer import global_norm
from nested_jax.training.state import TrainState, step_key

Batch = dict[str, jax.Array]
LossFunction = Callable[..., tuple[jax.Array, jax.Array]]  # (params, batch), or (params, batch, key) when it is trained


def make_loss(model: LanguageModel) -> LossFunction:
    """The next-token loss of a batch of the data pipeline, (params, batch) -> (sum of nats, number of targets).

    Where `in_sequence` is set, of the model that learns while it reads. Of a model with dropout it also takes a key, and drops with one.
    """
    objective = model_loss if model.config.in_sequence is None else in_sequence_loss
    rows = lambda batch: (batch[name] for name in ('tokens', 'targets', 'segment_ids', 'weights'))

    def loss(params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        return objective(model, params, *rows(batch))

    def dropout_loss(params: Any, batch: Batch, key: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        return model_loss(model, params, *rows(batch), key=key)

    return dropout_loss if model.config.dropout else loss


def make_train_step(
    loss_function: LossFunction, optimizer: optax.GradientTransformation, accumulation: int = 1
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """Builds the function of one optimizer step.

    Args:
        loss_function: sum of nats and number of targets of a batch. One with a parameter `key` gets a key of its own for every microbatch
            of every step, of `step_key`.
        optimizer: fed the gradient of the mean over all targets of the step.
        accumulation: microbatches the batch is cut into; must divide the batch's rows.

    Returns:
        (state, batch) -> (state, metrics); metrics are float32 scalars: loss (nats a target), grad_norm (before clipping), tokens.
    """
    value_and_grad = jax.value_and_grad(loss_function, has_aux=True)
    takes_key = 'key' in inspect.signature(loss_function).parameters

    def summed(params: Any, batch: Batch, *key: jax.Array) -> tuple[jax.Array, jax.Array, Any]:
        (nats, count), grads = value_and_grad(params, batch, *key)
        return nats.astype(jnp.float32), count.astype(jnp.float32), grads

    def gradient(params: Any, batch: Batch, *key: jax.Array) -> tuple[jax.Array, jax.Array, Any]:
        if accumulation == 1:
            return summed(params, batch, *key)
        keys = (jax.random.split(each, accumulation) for each in key)
        return _accumulate(summed, params, (microbatches(batch, accumulation), *keys))

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        zero = jnp.zeros(())
        given = (state.params, batch, step_key(state)) if takes_key else (state.params, batch)
        nats, count, grads = run_in_auto_mode(gradient, given, like=(zero, zero, state.params))
        targets = jnp.maximum(count, 1.0)
        grads = jax.tree.map(lambda grad: grad / targets, grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = dict(loss=nats / targets, grad_norm=global_norm(grads), tokens=count)
        return TrainState(state.step + 1, params, opt_state, state.key), metrics

    return train_step


def make_eval_step(loss_function: LossFunction) -> Callable[[Any, Batch], tuple[jax.Array, jax.Array]]:
    """Builds (params, batch) -> (sum of nats, number of targets), both float32."""

    def eval_step(params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        nats, count = run_in_auto_mode(loss_function, (params, batch), like=(jnp.zeros(()),) * 2)
        return nats.astype(jnp.float32), count.astype(jnp.float32)

    return eval_step


def microbatches(batch: Batch, accumulation: int) -> Batch:
    """Cuts rows (B, ...) into (accumulation, B / accumulation, ...), row i going to microbatch i % accumulation.

    Rows are dealt out rather than cut in blocks: with the rows sharded in blocks, every device then keeps its own.
    """

    def deal(rows: jax.Array) -> jax.Array:
        return rows.reshape(rows.shape[0] // accumulation, accumulation, *rows.shape[1:]).swapaxes(0, 1)

    return jax.tree.map(deal, batch)


def _accumulate(summed: Callable, params: Any, batches: tuple) -> tuple[jax.Array, jax.Array, Any]:
    def body(carry, batch):
        return jax.tree.map(jnp.add, carry, summed(params, *batch)), None

    zero = jnp.zeros((), jnp.float32)
    total, _ = jax.lax.scan(body, (zero, zero, jax.tree.map(jnp.zeros_like, params)), batches)
    return total
