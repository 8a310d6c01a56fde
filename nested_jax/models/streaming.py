"""Learning while reading: a language model whose CMS levels are updated within a sequence by its own next-token loss.

The blocks named by `config.in_sequence` have their levels copied for every sequence; the copies take the steps of Eq. (71),
arXiv:2512.24695v1, each level once a period. `in_sequence_loss` is the training objective, differentiable through the updates; a
`Stream` is the same model reading tokens in pieces of any length. Nothing else is copied: the other blocks are shared, and in training so
are levels whose first period is not over before the sequence is.
"""

import dataclasses
import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nested_jax.config import ModelConfig
from nested_jax.memory import continuum
from nested_jax.models.language_model import Block, LanguageModel, close_state, open_rows, open_state
from nested_jax.models.loss import next_token_loss

PyTree = Any


class Stream(NamedTuple):
    """A batch of sequences being read side by side; every leaf but `length` has a leading batch axis."""

    fast: continuum.ContinuumState  # float32 levels of the named blocks, (B, blocks, ...)
    start: PyTree  # the model's state before the open chunk
    state: PyTree  # the model's state after the last token
    tokens: jax.Array  # (B, chunk_size) int32: the open chunk in its first `length` places
    length: int  # tokens in the open chunk, 0 to chunk_size: a full one is learned from once its last target is known


def in_sequence_loss(
    model: LanguageModel,
    params: PyTree,
    tokens: jax.Array,
    targets: jax.Array,
    segment_ids: jax.Array | None = None,
    weights: jax.Array | None = None,
    *,
    learning_rates: jax.Array | float | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Sum of next-token losses of a model that learns from each chunk before it reads the next: Eq. (71), (73), arXiv:2512.24695v1.

    Differentiable with respect to the parameters, which are the initial weights of the updated levels, through `config.in_sequence.bptt`
    chunks. A chunk is learned from when tokens follow it: the last 1 to chunk_size tokens are only read.

    Args:
        model: with `config.in_sequence` set.
        params: its parameters.
        tokens: (B, T) int32.
        targets: (B, T) int32, the token after each.
        segment_ids: (B, T) int32 documents of packed rows, starting on multiples of `config.grid`; fast weights start anew with each.
            Default: a row is a document.
        weights: (B, T) float32 factors of each token's loss, inner and outer alike. Default ones.
        learning_rates: () or (levels,) of the inner steps, for learned ones. Default `config.in_sequence.learning_rate`.

    Returns:
        The sum in nats and the sum of the weights, float32 scalars.

    Raises:
        ValueError: if `config.in_sequence` is None, or the levels' periods make no schedule.
    """
    config, length = model.config, tokens.shape[1]
    schedule = _schedule(config, length)
    rates = config.in_sequence.learning_rate if learning_rates is None else jnp.asarray(learning_rates)
    # A cache that holds more tokens than there are would only be carried from chunk to chunk.
    model = LanguageModel(dataclasses.replace(config, max_length=min(config.max_length, length)))
    rows = dict(tokens=tokens, targets=targets, segment_ids=segment_ids, weights=weights)
    nats = jax.vmap(functools.partial(_sequence_loss, model, params, schedule, _per_level(rates, schedule)))(rows).sum()
    return nats, jnp.asarray(tokens.size, nats.dtype) if weights is None else weights.sum()


def init_stream(model: LanguageModel, params: PyTree, batch_size: int) -> Stream:
    """A stream before its first token.

    Args:
        model: with `config.in_sequence` set.
        params: its parameters.
        batch_size: sequences side by side, each with its own copy of the updated levels (`fast_weight_bytes`).

    Raises:
        ValueError: if `config.in_sequence` is None, the levels' periods make no schedule, or `batch_size` is below 1.
    """
    if batch_size < 1:
        raise ValueError(f'batch_size is {batch_size}, allowed is at least 1')
    schedule = _schedule(model.config)
    fast = continuum.init_state(_initial(model.config, params, schedule), schedule)
    fast = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf[None], (batch_size, *leaf.shape)), fast)
    state = model.init_state(batch_size)
    return Stream(fast, state, state, jnp.zeros((batch_size, schedule.chunk_size), jnp.int32), 0)


def read(model: LanguageModel, params: PyTree, stream: Stream, tokens: jax.Array) -> tuple[jax.Array, Stream]:
    """Read tokens and learn from every chunk that they complete; any cut of a sequence into calls gives the same numbers.

    Runs on the host, with a compiled function for each length of piece that the open chunk leaves room for: read single tokens, or many.

    Args:
        model: as of `init_stream`.
        params: as of `init_stream`.
        stream: where the last call left off; not changed.
        tokens: (B, T) integers.

    Returns:
        (B, T, V) float32 logits of the token after each, and the stream after the last token.

    Raises:
        ValueError: for tokens of another shape or dtype.
    """
    if tokens.ndim != 2 or tokens.shape[0] != stream.tokens.shape[0] or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(f'tokens is {tokens.dtype}{tokens.shape}, allowed is an integer array ({stream.tokens.shape[0]}, time)')
    size, logits, done = stream.tokens.shape[1], [], 0
    while done < tokens.shape[1]:
        rest = tokens[:, done:]
        if stream.length == size:  # its last target has come
            fast, _, _ = _learn(model, params, stream.fast, stream.start, stream.tokens, rest[:, 0])
            stream = Stream(fast, stream.state, stream.state, stream.tokens, 0)
        if stream.length == 0 and rest.shape[1] > size:  # a whole chunk with its last target: one pass reads and learns
            fast, state, rows = _learn(model, params, stream.fast, stream.start, rest[:, :size], rest[:, size])
            stream = Stream(fast, state, state, stream.tokens, 0)
        else:
            piece = rest[:, : size - stream.length]
            rows, state = _extend(model, params, stream.fast.weights, stream.state, piece)
            filled = jax.lax.dynamic_update_slice(stream.tokens, piece.astype(jnp.int32), (0, stream.length))
            stream = Stream(stream.fast, stream.start, state, filled, stream.length + piece.shape[1])
        logits.append(rows)
        done += rows.shape[1]
    return jnp.concatenate(logits, 1) if logits else jnp.zeros((*tokens.shape, model.config.vocab_size)), stream


def fast_weight_bytes(model: LanguageModel, batch_size: int, length: int | None = None) -> int:
    """Bytes that the per-sequence copies of the updated levels take.

    A sequence has one copy of each updated level of each named block, and one sum of gradients for all but the fastest. A stream holds one
    such set. Training keeps one for each chunk that is learned from, for the backward pass, and works on about three more: the current
    one, its inner and its outer gradient.

    Args:
        model: with `config.in_sequence` set.
        batch_size: sequences on the device.
        length: of the sequences trained on; None for a stream.

    Raises:
        ValueError: if `config.in_sequence` is None, or the levels' periods make no schedule.
    """
    schedule = _schedule(model.config, length)
    shapes = jax.eval_shape(lambda key: model.init(key, jnp.zeros((1, 1), jnp.int32))['params'], jax.random.key(0))
    state = jax.eval_shape(lambda params: continuum.init_state(_initial(model.config, params, schedule), schedule), shapes)
    one = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((state.weights, state.sums)))
    return one * batch_size * (1 if length is None else _chunks_learned(length, schedule.chunk_size) + 3)


def _schedule(config: ModelConfig, length: int | None = None) -> continuum.Schedule:
    """Of all levels, or of those that are updated before a sequence of `length` tokens ends."""
    if config.in_sequence is None:
        raise ValueError('config.in_sequence is None, allowed is an InSequenceConfig naming the blocks to update')
    periods = [level.period for level in config.levels]
    schedule = continuum.make_schedule(periods, config.in_sequence.variant)
    kept = len(periods) if length is None else sum(period < length for period in periods)
    return dataclasses.replace(schedule, updates=schedule.updates[:kept], resets=schedule.resets[:kept])


def _chunks_learned(length: int, chunk_size: int) -> int:
    return (length - 1) // chunk_size


def _per_level(rates: jax.Array | float, schedule: continuum.Schedule) -> jax.Array | float:
    return rates if jnp.ndim(rates) == 0 else rates[: len(schedule.updates)]


def _initial(config: ModelConfig, params: PyTree, schedule: continuum.Schedule) -> tuple[PyTree, ...]:
    """The updated levels of the named blocks, leaves (blocks, ...)."""
    blocks = np.array(sorted(config.in_sequence.blocks))
    levels = (params['blocks']['channel'][f'level_{i}'] for i in range(len(schedule.updates)))
    return tuple(jax.tree.map(lambda leaf: leaf[blocks], level) for level in levels)


def _sequence_loss(model: LanguageModel, params: PyTree, schedule: continuum.Schedule, rates: jax.Array | float, row: PyTree) -> jax.Array:
    """Of one sequence; `row` holds (T,) arrays."""
    initial = _initial(model.config, params, schedule)
    fixed = dict(initial=initial, schedule=schedule)
    size, length = schedule.chunk_size, row['tokens'].shape[0]
    count = _chunks_learned(length, size)
    chunks = jax.tree.map(lambda leaf: leaf[: count * size].reshape(count, size), row)
    tail = jax.tree.map(lambda leaf: leaf[count * size :], row)
    begins = None
    if row['segment_ids'] is not None:
        first = row['segment_ids'][::size]
        begins = jnp.concatenate([jnp.zeros(1, bool), first[1:] != first[:-1]])

    def chunk_loss(weights, carry, chunk):
        nats, (carry, _) = _chunk_loss(model, params, weights, carry, chunk)
        return nats, (carry, None)

    state, carry, losses = continuum.init_state(**fixed), model.init_state(1), jnp.zeros(1)
    if count:
        state, carry, (losses, _) = continuum.scan_chunks(
            chunk_loss,
            state,
            carry,
            chunks,
            learning_rates=rates,
            bptt=model.config.in_sequence.bptt,
            restarts=None if begins is None else begins[:count],
            **fixed,
        )
    if begins is not None:
        state = continuum.restart(state, begins[count], **fixed)
    return losses.sum() + jax.checkpoint(chunk_loss)(state.weights, carry, tail)[0]


def _chunk_loss(model: LanguageModel, params: PyTree, weights: tuple[PyTree, ...], state: PyTree, chunk: PyTree):
    """One sequence's chunk, `state` with a batch axis of 1: (sum of nats, (state, (1, T, width) hidden rows))."""
    ids = chunk.get('segment_ids')
    method = functools.partial(_hidden, fast=weights, segment_ids=None if ids is None else ids[None])
    hidden, state = model.apply({'params': params}, chunk['tokens'][None], state, method=method)
    return next_token_loss(hidden[0], model.head(params), chunk['targets'], chunk.get('weights')), (state, hidden)


def _hidden(model: LanguageModel, tokens: jax.Array, state: PyTree, *, fast: tuple[PyTree, ...], segment_ids: jax.Array | None = None):
    """`LanguageModel.hidden` with the named blocks' fastest levels replaced, leaves (blocks, ...).

    Runs of named blocks and of others are scanned apart: in one scan over all, each block's levels would be copied for every sequence.
    """
    config = model.config
    layers, context = open_state(state, segment_ids, True)
    rows = open_rows(config, model.embedding, tokens)
    stacked, states, used = model.variables['params']['blocks'], [], 0

    def block(rows, inputs):
        variables, layer = inputs
        return Block(config, parent=None).apply({'params': variables}, rows, layer, context)

    block = block if config.remat == 'none' else jax.checkpoint(block, prevent_cse=False)
    for start, stop, named in _runs(config.num_layers, config.in_sequence.blocks):
        variables, before = jax.tree.map(lambda leaf, part=slice(start, stop): leaf[part], (stacked, layers))
        if named:
            levels = jax.tree.map(lambda leaf, part=slice(used, used + stop - start): leaf[part], fast)
            channel = {**variables['channel'], **{f'level_{i}': level for i, level in enumerate(levels)}}
            variables, used = {**variables, 'channel': channel}, used + stop - start
        rows, after = jax.lax.scan(block, rows, (variables, before), unroll=1 if config.scan_layers else stop - start)
        states.append(after)
    layers = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *states)
    return model.norm(rows.x), close_state(state, layers, context, tokens, segment_ids)


def _runs(num_layers: int, named: tuple[int, ...]) -> list[tuple[int, int, bool]]:
    """(start, stop, whether named) of the runs of blocks that are all named or all not."""
    groups = itertools.groupby(range(num_layers), key=lambda layer: layer in named)
    return [(blocks[0], blocks[-1] + 1, is_named) for is_named, blocks in ((key, list(group)) for key, group in groups)]


@functools.partial(jax.jit, static_argnums=0)
def _extend(model: LanguageModel, params: PyTree, weights: tuple[PyTree, ...], state: PyTree, tokens: jax.Array):
    """(logits, state) after tokens within a chunk."""

    def row(weights, state, tokens):
        method = functools.partial(_hidden, fast=weights)
        hidden, state = model.apply({'params': params}, tokens[None], _add_batch(state), method=method)
        return _logits(model, params, hidden[0]), _drop_batch(state)

    return jax.vmap(row)(weights, state, tokens)


@functools.partial(jax.jit, static_argnums=0)
def _learn(model: LanguageModel, params: PyTree, fast: continuum.ContinuumState, state: PyTree, tokens: jax.Array, last: jax.Array):
    """(fast, state, logits) after a whole chunk, given the token after it."""
    schedule = _schedule(model.config)
    initial = _initial(model.config, params, schedule)

    def row(fast, state, tokens, last):
        chunk = dict(tokens=tokens, targets=jnp.append(tokens[1:], last))
        gradient = jax.grad(functools.partial(_chunk_loss, model, params), has_aux=True)
        gradients, (state, hidden) = gradient(fast.weights, _add_batch(state), chunk)
        fast = continuum.write(fast, gradients, initial=initial, schedule=schedule, learning_rates=model.config.in_sequence.learning_rate)
        return fast, _drop_batch(state), _logits(model, params, hidden[0])

    return jax.vmap(row)(fast, state, tokens, last)


def _logits(model: LanguageModel, params: PyTree, hidden: jax.Array) -> jax.Array:
    wide = jnp.promote_types(hidden.dtype, jnp.float32)
    return jnp.matmul(hidden, model.head(params).astype(hidden.dtype), preferred_element_type=wide)


def _add_batch(state: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: leaf[None], state)


def _drop_batch(state: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: leaf[0], state)
