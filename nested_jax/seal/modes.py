"""The inner update put to other uses: training at test time, and adapters that start from where learning is quick.

Test-time training (arXiv:1909.13231v3; of language models on a task's own prompt, arXiv:2411.07279v2) adapts a model to a prompt, answers
it and forgets the update. First-order MAML (Sec. 5.2, arXiv:1703.03400v3) moves the adapters that every update starts from so that after
an update on one text the loss on another falls: on questions, after learning the passage they are about.

Letters in shapes: K candidates, Q prompts of each, T tokens, V vocabulary.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

from nested_jax.models.language_model import LanguageModel
from nested_jax.seal.buckets import Batch
from nested_jax.seal.inner_loop import InnerConfig, candidate_loss, make_inner_loop
from nested_jax.seal.lora import attach

PyTree = Any


def make_test_time_training(model: LanguageModel, config: InnerConfig) -> Callable[..., jax.Array]:
    """Builds (parameters, batch, prompts (K, Q, T), given=None) -> logits (K, Q, V) of what follows each prompt.

    The candidates of `batch` hold what is adapted to; `given` are adapters to start from. Of the update nothing is left.

    Args:
        model: whose parameters stay as they are.
        config: of the update.
    """
    inner_loop = make_inner_loop(model, config)
    ask = lambda params, adapters, prompts: model.apply(attach(params, adapters, config.lora), prompts)[0][:, -1]

    @jax.jit
    def answer(params: PyTree, batch: Batch, prompts: jax.Array, given: PyTree | None = None) -> jax.Array:
        return jax.vmap(ask, (None, 0, 0))(params, inner_loop(params, batch, given).adapters, prompts)

    return answer


class MetaStep(NamedTuple):
    """What a step of meta-learning returns."""

    adapters: PyTree  # the next start
    state: optax.OptState
    loss: jax.Array  # () float32: of the queries after the updates, mean over candidates


def make_meta_step(model: LanguageModel, config: InnerConfig, optimizer: optax.GradientTransformation) -> Callable[..., MetaStep]:
    """Builds (parameters, adapters, optimizer state, support, query) -> `MetaStep`: one step of first-order MAML.

    Every candidate of the batch `support` is learned from the adapters; the mean gradient of the losses of `query`, candidate by
    candidate, taken where the updates ended, is what the optimizer moves the start by. How the end depends on the start is left out.

    Args:
        model: whose parameters stay as they are.
        config: of the updates.
        optimizer: of the start.
    """
    inner_loop = make_inner_loop(model, config)

    def query_loss(adapters: PyTree, params: PyTree, query: Batch) -> jax.Array:
        return candidate_loss(model, config, adapters, params, query, query.rows[0])

    @jax.jit
    def step(params: PyTree, adapters: PyTree, state: optax.OptState, support: Batch, query: Batch) -> MetaStep:
        learned = inner_loop(params, support, adapters).adapters
        losses, gradients = jax.vmap(jax.value_and_grad(query_loss), (0, None, 0))(learned, params, query)
        updates, state = optimizer.update(jax.tree.map(lambda leaf: leaf.mean(0), gradients), state, adapters)
        return MetaStep(optax.apply_updates(adapters, updates), state, losses.mean())

    return step
