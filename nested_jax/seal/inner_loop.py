"""The inner update: K candidates, each with data, learning rate and number of steps of its own, learn in one compiled program.

The update is the reference's (Appendix B, arXiv:2506.10943v2): AdamW on adapters, clipping at norm 1, a learning rate that falls linearly
to zero over the candidate's own steps. Losses are means over the real tokens of a step's rows; padding costs nothing and teaches nothing.
What a candidate learns depends on nothing but itself: it comes out the same alone and in any company (`buckets.py` lays them out).

Letters in shapes: K candidates.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from nested_jax.config import check
from nested_jax.models.language_model import LanguageModel
from nested_jax.models.loss import model_loss
from nested_jax.optim.levels import Periods, by_level
from nested_jax.seal.buckets import Batch, Candidate, buckets
from nested_jax.seal.lora import LoraConfig, attach, init_lora
from nested_jax.training.optimizer import clip_by_global_norm

PyTree = Any


@dataclasses.dataclass(frozen=True)
class InnerConfig:
    """What all candidates share.

    Raises:
        ValueError: naming the field, its value and what is allowed.
    """

    lora: LoraConfig = LoraConfig()
    clip_norm: float = 1.0
    weight_decay: float = 0.0
    kl_to_base: float = 0.0  # weight of KL(base || learner) per token, on the tokens that are learned

    def __post_init__(self):
        check(self.clip_norm > 0, 'clip_norm', self.clip_norm, 'a number above 0')
        for name in ('weight_decay', 'kl_to_base'):
            check(getattr(self, name) >= 0, name, getattr(self, name), 'a number of at least 0')


class Learned(NamedTuple):
    """What the inner loop returns, by candidate."""

    adapters: PyTree  # leaves lead with K
    loss: jax.Array  # (K,) float32 nats a token before the candidate's last step, 0 without a step


def make_inner_loop(model: LanguageModel, config: InnerConfig, devices: Sequence[jax.Device] = ()) -> Callable[..., Learned]:
    """Builds (parameters, batch) -> `Learned`, compiled once for each shape of a bucket, whatever the numbers of steps.

    The weights are held once on a device whatever K is: only adapters, their moments and the activations are by candidate.

    Args:
        model: whose parameters stay as they are.
        config: shared settings.
        devices: to split candidates over, where their number divides K; each has all parameters, and none waits for another.

    Returns:
        The loop. A third argument, adapters without an axis in front, is what all candidates start from in place of fresh ones.
    """
    optimizer = inner_optimizer(config)
    step = descent_step(optimizer, jax.value_and_grad(functools.partial(candidate_loss, model, config)))

    def start(params: PyTree, given: PyTree | None, seed: jax.Array) -> tuple:
        adapters = init_lora(params, jax.random.key(seed), config.lora) if given is None else given
        return adapters, optimizer.init(adapters), jnp.zeros(())

    def learn(params: PyTree, batch: Batch, given: PyTree | None) -> Learned:
        carry = jax.vmap(start, (None, None, 0))(params, given, batch.seed)
        advance = lambda index, carry: jax.vmap(step, (None, None, 0, 0))(index, params, batch, carry)
        adapters, _, last = jax.lax.fori_loop(0, batch.steps.max(), advance, carry)
        return Learned(adapters, last)

    @jax.jit
    def run(params: PyTree, batch: Batch, given: PyTree | None = None) -> Learned:
        if len(devices) < 2 or batch.seed.shape[0] % len(devices):
            return learn(params, batch, given)
        mesh, axis = jax.sharding.Mesh(devices, ('candidates',)), jax.P('candidates')
        split = jax.shard_map(learn, mesh=mesh, in_specs=(jax.P(), axis, jax.P()), out_specs=axis, check_vma=False)
        return split(params, batch, given)

    return run


def inner_optimizer(config: InnerConfig, periods: Periods | None = None) -> optax.GradientTransformation:
    """AdamW behind clipping, without the learning rate: its updates times that are subtracted.

    Args:
        config: shared settings.
        periods: steps between two updates of each part of what is learned, as `optim.by_level` takes them; None: every step.
    """
    adamw = optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(config.weight_decay))
    return optax.chain(clip_by_global_norm(config.clip_norm), adamw if periods is None else by_level(adamw, periods))


def descent_step(optimizer: optax.GradientTransformation, value_and_gradient: Callable[..., tuple[jax.Array, PyTree]]) -> Callable:
    """Builds (index, context, candidate, carry) -> carry: one step of one candidate; after its own last one nothing changes.

    Args:
        optimizer: its updates times the candidate's learning rate, which falls linearly to zero, are subtracted.
        value_and_gradient: (learned, context, candidate, rows (N,) that the step reads) -> loss and gradient.

    Returns:
        The step; the carry is (learned, the optimizer's state, the last loss).
    """

    def step(index: jax.Array, context: PyTree, candidate: Batch, carry: tuple) -> tuple:
        learned, state, last = carry
        rows = candidate.rows[index % candidate.rows.shape[0]]
        value, gradient = value_and_gradient(learned, context, candidate, rows)
        updates, new_state = optimizer.update(gradient, state, learned)
        rate = candidate.learning_rate * (1 - index / jnp.maximum(candidate.steps, 1))
        new = jax.tree.map(lambda leaf, update: leaf - rate * update, learned, updates)
        keep = functools.partial(jnp.where, index < candidate.steps)
        return jax.tree.map(keep, (new, new_state, value), (learned, state, last))

    return step


def learn_all(
    inner_loop: Callable[[PyTree, Batch], Learned], params: PyTree, candidates: Sequence[Candidate], **layout: Any
) -> list[PyTree]:
    """Adapters of every candidate, in the order of `candidates`; `layout` goes to `buckets`."""
    adapters: list[PyTree] = [None] * len(candidates)
    for places, batch in buckets(candidates, **layout):
        learned = inner_loop(params, batch).adapters
        for index, place in enumerate(places):
            adapters[place] = jax.tree.map(lambda leaf, index=index: leaf[index], learned)
    return adapters


def candidate_loss(
    model: LanguageModel, config: InnerConfig, adapters: PyTree, params: PyTree, candidate: Batch, rows: jax.Array
) -> jax.Array:
    """What a step makes smaller: the mean over the real tokens of its rows (N,), of one candidate of a batch."""
    read = read_rows(candidate, rows)
    learner = Learner(model, attach(params, adapters, config.lora))
    total, count = token_loss(learner, params, read)
    if config.kl_to_base:
        base = jax.lax.stop_gradient(logits_of(Learner(model, {'params': params}), read))
        total += config.kl_to_base * (kl_divergence(base, logits_of(learner, read)) * read.weights).sum()
    return total / jnp.maximum(count, 1.0)


class Read(NamedTuple):
    """What a step reads."""

    tokens: jax.Array  # (N, T) int32
    targets: jax.Array  # (N, T) int32
    weights: jax.Array  # (N, T) float32
    segment_ids: jax.Array  # (N, T) int32


def read_rows(candidate: Batch, rows: jax.Array) -> Read:
    """Rows (N,) of a candidate; one of -1 has no weight."""
    weights = candidate.weights[rows] * (rows >= 0)[:, None]
    return Read(candidate.tokens[rows], candidate.targets[rows], weights, candidate.segment_ids[rows])


class Learner(NamedTuple):
    """A model that is applied with its own variables, adapters among them, wherever it is applied."""

    model: LanguageModel
    variables: PyTree

    def apply(self, _: PyTree, *args: Any, **options: Any) -> Any:
        """What the model computes, whatever parameters are handed over."""
        return self.model.apply(self.variables, *args, **options)

    def head(self, params: PyTree) -> jax.Array:
        """As the model's."""
        return self.model.head(params)


def token_loss(learner: Learner, params: PyTree, read: Read) -> tuple[jax.Array, jax.Array]:
    """Sum of the losses of a step's tokens in nats, and of their weights; `params` hold the head."""
    return model_loss(learner, params, read.tokens, read.targets, read.segment_ids, read.weights)


def logits_of(learner: Learner, read: Read) -> jax.Array:
    """(N, T, V)."""
    return learner.apply(None, read.tokens, segment_ids=read.segment_ids)[0]


def kl_divergence(base: jax.Array, new: jax.Array) -> jax.Array:
    """KL divergence from logits (..., V) to logits (..., V), (...)."""
    known, log = jax.nn.log_softmax(base), jax.nn.log_softmax(new)
    return (jnp.exp(known) * (known - log)).sum(-1)
