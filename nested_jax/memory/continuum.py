"""Continuum Memory System: levels of weights, each with its own update period (section 7.1, arXiv:2512.24695v1).

Levels are numbered from the fastest, as in Eq. 70. A level's weights stay frozen over exactly `period` tokens while the gradients of the
task's own loss are summed; then they take one step of gradient descent (Eq. 71). The three variants differ in where a level's
initial weights come from:

- sequential (Eq. 73): every level starts from its own initial weights and is never put back within a sequence;
- nested (Eq. 72): level l is put back to its initial weights after ceil(period[l + 1] / period[l]) of its updates, which is where the next
  slower level l + 1 takes its step. Eq. 72 counts levels from the slowest (its s + 1 is our l, its s our l + 1), so the slowest level has
  none above it and is never put back. The step that falls together with re-initialisation has no effect, and a level as slow as its
  neighbour never moves;
- independent (Eq. 74): the sequential schedule, with the levels side by side (`aggregate`).

Initial weights are inputs here, learned by whoever differentiates through `scan_chunks`: the argmin of Eq. 72 and 73.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

PyTree = Any
Variant = Literal['sequential', 'nested']
ChunkLoss = Callable[[tuple[PyTree, ...], PyTree, PyTree], tuple[jax.Array, tuple[PyTree, PyTree]]]


def chain(levels: Sequence[Callable[[jax.Array], jax.Array]], x: jax.Array) -> jax.Array:
    """Pass `x` through the levels, the fastest first: Eq. (70), arXiv:2512.24695v1.

    Args:
        levels: one function for each level, with the residual and the norm in it where wanted.
        x: (..., width).

    Returns:
        (..., width).
    """
    for level in levels:
        x = level(x)
    return x


def aggregate(levels: Sequence[Callable[[jax.Array], jax.Array]], x: jax.Array, weights: jax.Array | None = None) -> jax.Array:
    """Sum what the levels make of the same `x`: Eq. (74), arXiv:2512.24695v1.

    Args:
        levels: one function for each level; a residual stays outside, or it is counted once for each level.
        x: (..., width).
        weights: (levels,) factors of the levels' outputs; default 1.

    Returns:
        (..., width).

    Raises:
        ValueError: if there is not one weight for each level.
    """
    outputs = [level(x) for level in levels]
    if weights is not None:
        if weights.shape != (len(levels),):
            raise ValueError(f'weights has shape {weights.shape}, allowed is ({len(levels)},): one for each level')
        outputs = [weight * output for weight, output in zip(weights, outputs, strict=True)]
    return sum(outputs[1:], outputs[0])


@dataclasses.dataclass(frozen=True)
class Schedule:
    """When each level is updated and put back, counted in chunks; made by `make_schedule`."""

    chunk_size: int  # tokens: the fastest period
    updates: tuple[int, ...]  # chunks between two updates of each level
    resets: tuple[int | None, ...]  # chunks between two re-initialisations of each level; None: never


def make_schedule(periods: Sequence[int], variant: Variant = 'sequential') -> Schedule:
    """Turn periods in tokens into a schedule on chunks of the fastest one.

    Args:
        periods: tokens between two updates of each level, the fastest first.
        variant: 'sequential' (the independent one's too) or 'nested'.

    Raises:
        ValueError: if a period is not a positive multiple of the first, if they do not ascend, or if the variant is unknown.
    """
    if variant not in ('sequential', 'nested'):
        raise ValueError(f"variant is {variant!r}, allowed is 'sequential' or 'nested'")
    periods = tuple(periods)
    if not periods or periods[0] < 1 or list(periods) != sorted(periods) or any(period % periods[0] for period in periods):
        raise ValueError(f'periods is {periods}, allowed are ascending multiples of the first, which is at least 1')
    updates = tuple(period // periods[0] for period in periods)
    resets = (None,) * len(periods)
    if variant == 'nested':
        resets = tuple(fast * math.ceil(slow / fast) for fast, slow in zip(updates, updates[1:], strict=False)) + (None,)
    return Schedule(periods[0], updates, resets)


class ContinuumState(NamedTuple):
    """Fast weights of one sequence."""

    weights: tuple[PyTree, ...]  # of each level, like its initial weights
    sums: tuple[PyTree | None, ...]  # of each level's gradients since its last update; None where every chunk updates
    position: jax.Array  # shape (), int32: chunks since the start of the document


def init_state(initial: Sequence[PyTree], schedule: Schedule) -> ContinuumState:
    """State at the start of a document.

    Args:
        initial: initial weights of each level.
        schedule: of as many levels.

    Raises:
        ValueError: if there are more or fewer levels than the schedule has.
    """
    if len(initial) != len(schedule.updates):
        raise ValueError(f'initial has {len(initial)} levels, allowed is {len(schedule.updates)} as in the schedule')
    sums = tuple(jax.tree.map(jnp.zeros_like, level) if every > 1 else None for level, every in zip(initial, schedule.updates, strict=True))
    return ContinuumState(tuple(initial), sums, jnp.zeros((), jnp.int32))


def write(
    state: ContinuumState,
    gradients: tuple[PyTree, ...],
    *,
    initial: Sequence[PyTree],
    schedule: Schedule,
    learning_rates: jax.Array | float,
) -> ContinuumState:
    """End a chunk: add its gradients to the sums, and step the levels whose period ends here: Eq. (71), arXiv:2512.24695v1.

    Args:
        state: at the chunk's start.
        gradients: of the sum of the chunk's losses, for each level, at `state.weights`.
        initial: initial weights of each level, for the nested variant.
        schedule: of the levels.
        learning_rates: () or (levels,), of the step with a sum of gradients.

    Returns:
        The state at the next chunk's start. Levels between two boundaries are unchanged to the bit.
    """
    chunks = state.position + 1
    rates = jnp.broadcast_to(jnp.asarray(learning_rates), (len(schedule.updates),))
    new_weights, new_sums = [], []
    for level, every in enumerate(schedule.updates):
        total, weights = gradients[level], state.weights[level]
        step = lambda weight, gradient, rate=rates[level]: (weight - rate * gradient).astype(weight.dtype)
        if every == 1:
            weights, sums = jax.tree.map(step, weights, total), None
        else:
            due = chunks % every == 0
            total = jax.tree.map(jnp.add, state.sums[level], total)
            weights = _select(due, jax.tree.map(step, weights, total), weights)
            sums = jax.tree.map(lambda leaf, due=due: jnp.where(due, jnp.zeros_like(leaf), leaf), total)
        if schedule.resets[level] is not None:
            weights = _select(chunks % schedule.resets[level] == 0, initial[level], weights)
        new_weights.append(weights)
        new_sums.append(sums)
    return ContinuumState(tuple(new_weights), tuple(new_sums), chunks)


def restart(state: ContinuumState, begins: jax.Array, *, initial: Sequence[PyTree], schedule: Schedule) -> ContinuumState:
    """The state at the start of a document where `begins`, () bool, else `state`."""
    return _select(begins, init_state(initial, schedule), state)


def detach(state: ContinuumState, initial: Sequence[PyTree]) -> ContinuumState:
    """The same numbers, with the updates made so far as constants: weights = initial + stop_gradient(weights - initial).

    The gradient still reaches the initial weights, directly: in the first-order way of MAML.
    """
    constant = jax.lax.stop_gradient
    # x - stop_gradient(x) is exactly zero, so that the weights keep every bit.
    straight = lambda weight, start: constant(weight) + (start - constant(start))
    weights = jax.tree.map(straight, state.weights, tuple(initial))
    return ContinuumState(weights, jax.tree.map(constant, state.sums), state.position)


def scan_chunks(
    chunk_loss: ChunkLoss,
    state: ContinuumState,
    carry: PyTree,
    chunks: PyTree,
    *,
    initial: Sequence[PyTree],
    schedule: Schedule,
    learning_rates: jax.Array | float,
    bptt: int | None = None,
    restarts: jax.Array | None = None,
) -> tuple[ContinuumState, PyTree, tuple[jax.Array, PyTree]]:
    """Read chunks of `schedule.chunk_size` tokens one after another, learning from each: Eq. (71), arXiv:2512.24695v1.

    A chunk's gradient takes the carry at the chunk's start as constant and follows every path within the chunk. The whole is
    differentiable, through the updates and through the carry. Each chunk is rematerialised in the backward pass, which so keeps only
    the state and the carry at each chunk's start.

    Args:
        chunk_loss: (weights of each level, carry, chunk) -> (sum of losses, (carry after the chunk, outputs)).
        state: of one sequence; `jax.vmap` this function over a batch.
        carry: what the model hands from chunk to chunk.
        chunks: pytree with a leading axis (chunks,).
        initial: initial weights of each level.
        schedule: of the levels.
        learning_rates: () or (levels,).
        bptt: chunks of a document that an outer gradient follows the updates through. After every `bptt`-th chunk the updates made so far
            become constants (`detach`), learning rates included; 1 follows no update, None follows all.
        restarts: (chunks,) bool, True where a chunk starts a document: its levels start from their initial weights. Default none.

    Returns:
        (state, carry, (losses (chunks,), outputs with a leading axis (chunks,))).

    Raises:
        ValueError: if `bptt` is below 1.
    """
    if bptt is not None and bptt < 1:
        raise ValueError(f'bptt is {bptt}, allowed is at least 1, or None for no limit')
    value_and_gradient = jax.value_and_grad(chunk_loss, has_aux=True)

    def read(carried, inputs):
        state, carry = carried
        chunk, begins = inputs
        if begins is not None:
            state = restart(state, begins, initial=initial, schedule=schedule)
        (loss, (carry, outputs)), gradients = value_and_gradient(state.weights, carry, chunk)
        if bptt == 1:  # so that no gradient of a gradient is built at all
            gradients = jax.lax.stop_gradient(gradients)
        state = write(state, gradients, initial=initial, schedule=schedule, learning_rates=learning_rates)
        if bptt is not None:
            state = _select(state.position % bptt == 0, detach(state, initial), state)
        return (state, carry), (loss, outputs)

    (state, carry), outputs = jax.lax.scan(jax.checkpoint(read, prevent_cse=False), (state, carry), (chunks, restarts))
    return state, carry, outputs


def _select(condition: jax.Array, true: PyTree, false: PyTree) -> PyTree:
    """Elementwise choice between two trees: levels are small beside the chunk's work, and under vmap a cond is a select anyway."""
    return jax.tree.map(lambda yes, no: jnp.where(condition, yes, no), true, false)
