"""Tokens on a grid of chunks, for streams that are cut anywhere.

A chunk's closed form needs all of its tokens, so a stream keeps the inputs of its open chunk beside the memory at that
chunk's start, and every call lays them out again in front of the new tokens. Outputs are causal, so what is computed for
the empty places behind the last token is never seen. Memories that are written by inert null tokens (zeros) keep no inputs: theirs
are moved along the grid (`align`) instead.

Letters: B batch, T tokens of the call, H heads, n chunks, c tokens of a chunk.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Grid(NamedTuple):
    """How the tokens of one call lie on the grid."""

    chunks: object  # pytree of (n, B, c, ...)
    complete: jax.Array | None  # (n, B) bool: the chunk's last token is known; None: that of all
    phase: jax.Array | None  # (B,) int32 tokens of the open chunk before the call; None: zero for all


def lay_out(inputs, chunk_size: int, opened=None, position: jax.Array | None = None) -> Grid:
    """Lay a call's tokens on the grid.

    Args:
        inputs: pytree of (B, T, ...).
        chunk_size: c.
        opened: pytree of (B, c, ...), the open chunk's inputs, or None for a call at a sequence's start.
        position: (B,) int32 tokens before the call; needed with `opened`.

    Returns:
        The `Grid`.
    """
    batch, length = jax.tree.leaves(inputs)[0].shape[:2]
    if opened is None:
        count = -(-length // chunk_size)
        rows = jax.tree.map(lambda x: _pad(x, count * chunk_size), inputs)
        ends = (jnp.arange(count) + 1) * chunk_size
        complete = None if length % chunk_size == 0 else jnp.broadcast_to((ends <= length)[:, None], (count, batch))
        return Grid(_cut(rows, count), complete, None)
    phase = position % chunk_size
    count = -(-(length + chunk_size - 1) // chunk_size)
    place = jnp.arange(count * chunk_size)[None] - phase[:, None]
    # Places before the call's first token come from the open chunk, places past its last repeat it.
    source = jnp.clip(jnp.where(place < 0, place + phase[:, None], place + chunk_size), 0, chunk_size + length - 1)
    joined = jax.tree.map(lambda old, new: _rows(jnp.concatenate([old.astype(new.dtype), new], 1), source), opened, inputs)
    complete = (jnp.arange(count)[:, None] + 1) * chunk_size <= (phase + length)[None]
    return Grid(_cut(joined, count), complete, phase)


def gather_outputs(grid: Grid, outputs: jax.Array, length: int) -> jax.Array:
    """Outputs of the call's own tokens, (n, B, c, ...) -> (B, T, ...)."""
    rows = jnp.moveaxis(outputs, 0, 1)
    rows = rows.reshape(rows.shape[0], -1, *rows.shape[3:])
    if grid.phase is None:
        return rows[:, :length]
    return _rows(rows, grid.phase[:, None] + jnp.arange(length)[None])


def open_chunk(grid: Grid, length: int):
    """Inputs of the chunk that is open after the call, pytree of (B, c, ...)."""
    count, _, size = jax.tree.leaves(grid.chunks)[0].shape[:3]

    def take(x: jax.Array) -> jax.Array:
        rows = jnp.moveaxis(x, 0, 1)
        rows = rows.reshape(rows.shape[0], count * size, *rows.shape[3:])
        if grid.phase is None:  # every row alike: a slice, which costs nothing when the state is not used
            start = min(length // size, count - 1) * size
            return rows[:, start : start + size]
        first = grid.complete.sum(0)[:, None] * size + jnp.arange(size)[None]
        return _rows(rows, jnp.minimum(first, count * size - 1))

    return jax.tree.map(take, grid.chunks)


def scan_chunks(step: Callable, inputs, fresh, chunk_size: int, *, state=None, position: jax.Array | None = None, segment_ids=None):
    """Read and write a memory chunk by chunk, each chunk rematerialised; a stream's state is the memory at its open chunk's start.

    Args:
        step: (memory, inputs of a chunk (B, c, ...)) -> (y (B, c, ...), memory after the chunk's last token).
        inputs: pytree of (B, T, ...).
        fresh: memory that sequences and documents start from, a pytree of (B, ...).
        chunk_size: c.
        state: what an earlier call returned, or None.
        position: (B,) int32 tokens before the call; needed with `state`. Where it is zero the state is not looked at.
        segment_ids: (B, T) int32; a change at a chunk's first token starts the memory anew.

    Returns:
        y (B, T, ...), and the state: the memory at the open chunk's start and that chunk's inputs (B, c, ...).

    Raises:
        ValueError: if `state` comes without `position`.
    """
    if state is not None and position is None:
        raise ValueError('position is None, allowed with a state is an int32 array (batch,)')
    batch, length = jax.tree.leaves(inputs)[0].shape[:2]
    # Tokens of the open chunk belong to the document that goes on with the call's first token.
    opened_ids = None if segment_ids is None else jnp.broadcast_to(segment_ids[:, :1], (batch, chunk_size))
    laid = lay_out((inputs, segment_ids), chunk_size, None if state is None else (state[1], opened_ids), position)
    chunks, ids = laid.chunks

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def run(memory, item):
        tokens, complete, begins = item
        memory = memory if begins is None else where_rows(begins, fresh, memory)
        y, after = step(memory, tokens)
        return after if complete is None else where_rows(complete, after, memory), y

    memory = fresh if state is None else where_rows(position == 0, fresh, state[0])
    memory, y = jax.lax.scan(run, memory, (chunks, laid.complete, None if ids is None else starts_document(ids)))
    return gather_outputs(laid, y, length), (memory, open_chunk(laid, length)[0])


class Pieces(NamedTuple):
    """A call cut where the segments of a stream end, row by row; every piece lies in one segment and begins at column 0.

    Rows that need fewer pieces than others end with empty ones.
    """

    rows: object  # pytree of (n, B, L, ...)
    phase: jax.Array | None  # (n, B) int32 tokens of the piece's segment before it; None: zero for all
    lengths: jax.Array | None  # (n, B) int32 tokens of the piece, the columns behind them are padding; None: L for all
    place: jax.Array | None  # (B, T) int32 where each token lies among the n * L columns; None: in order


def cut_pieces(inputs, size: int, position: jax.Array | None = None) -> Pieces:
    """Cut a call's tokens at multiples of `size` positions of the stream. Rows may stand at different phases.

    Args:
        inputs: pytree of (B, T, ...).
        size: of a segment.
        position: (B,) int32 tokens before the call; None for a call at a sequence's start.

    Returns:
        The `Pieces`, of L = min(T, size) columns.
    """
    time = jax.tree.leaves(inputs)[0].shape[1]
    columns = min(time, size)
    if position is None:
        rows = lay_out(inputs, columns).chunks
        count, batch = jax.tree.leaves(rows)[0].shape[:2]
        lengths = jnp.minimum(time - jnp.arange(count) * columns, columns)
        return Pieces(rows, None, None if time % columns == 0 else jnp.broadcast_to(lengths[:, None], (count, batch)), None)
    phase, count = position % size, 1 + -(-(time - 1) // size)
    first = jnp.minimum(size - phase, time)  # tokens of each row's first piece
    begins = jnp.concatenate([jnp.zeros_like(first)[None], first[None] + size * jnp.arange(count - 1, dtype=first.dtype)[:, None]])
    begins = jnp.minimum(begins, time)
    ends = jnp.concatenate([begins[1:], jnp.full_like(first, time)[None]])
    source = jnp.clip(begins.T[:, :, None] + jnp.arange(columns)[None, None], 0, time - 1).reshape(phase.shape[0], -1)
    rows = jax.tree.map(lambda x: _cut(_rows(x, source), count), inputs)
    token = jnp.arange(time)[None]
    later = token - first[:, None]
    place = jnp.where(later < 0, token, (1 + later // size) * columns + later % size)
    return Pieces(rows, (position[None] + begins) % size, ends - begins, place)


def join_pieces(pieces: Pieces, outputs: jax.Array, length: int) -> jax.Array:
    """Outputs of the call's own tokens, (n, B, L, ...) -> (B, T, ...)."""
    rows = gather_outputs(Grid(None, None, None), outputs, outputs.shape[0] * outputs.shape[2])
    return rows[:, :length] if pieces.place is None else _rows(rows, pieces.place)


def align(x: jax.Array, phase: jax.Array | None, length: int, *, edge: bool = False) -> jax.Array:
    """Pad (B, T, ...) to `length` tokens, row b after phase[b] of padding; zeros, or the nearest token's with `edge`."""
    time = x.shape[1]
    if phase is None:
        widths = [(0, length - time if axis == 1 else 0) for axis in range(x.ndim)]
        return jnp.pad(x, widths, mode='edge' if edge else 'constant')
    source = jnp.arange(length)[None] - phase[:, None]
    shifted = _rows(x, jnp.clip(source, 0, time - 1))
    inside = jnp.expand_dims((source >= 0) & (source < time), range(2, x.ndim))
    return shifted if edge else jnp.where(inside, shifted, jnp.zeros((), x.dtype))


def to_chunks(x: jax.Array, size: int) -> jax.Array:
    """(B, n c, H, ...) -> (n, B, H, c, ...)."""
    return jnp.moveaxis(_cut(x, x.shape[1] // size), 3, 2)


def from_chunks(y: jax.Array, phase: jax.Array | None, length: int) -> jax.Array:
    """(n, B, H, c, D) -> (B, T, H, D), without the padding of `align`."""
    return gather_outputs(Grid(None, None, phase), jnp.moveaxis(y, 2, 3), length)


def where_rows(flags: jax.Array, new, old):
    """Per batch row, `new` where the flag holds; pytrees of (B, ...)."""
    return jax.tree.map(lambda a, b: jnp.where(jnp.expand_dims(flags, range(1, a.ndim)), a, b), new, old)


def starts_document(segment_ids: jax.Array) -> jax.Array:
    """Chunks whose first token belongs to another document than the token before it, (n, B, c) -> (n, B) bool.

    The first chunk has no token before it within the call: False.
    """
    change = segment_ids[1:, :, 0] != segment_ids[:-1, :, -1]
    return jnp.concatenate([jnp.zeros_like(change[:1]) if change.shape[0] else jnp.zeros(segment_ids.shape[:2], bool), change])


def _pad(x: jax.Array, length: int) -> jax.Array:
    return jnp.pad(x, [(0, 0), (0, length - x.shape[1])] + [(0, 0)] * (x.ndim - 2))


def _cut(rows, count: int):
    return jax.tree.map(lambda x: jnp.moveaxis(x.reshape(x.shape[0], count, -1, *x.shape[2:]), 1, 0), rows)


def _rows(x: jax.Array, index: jax.Array) -> jax.Array:
    """x[b, index[b, s]], (B, S, ...) and (B, R) -> (B, R, ...)."""
    return jnp.take_along_axis(x, jnp.expand_dims(index, range(2, x.ndim)), axis=1)
