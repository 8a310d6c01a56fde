"""Self-modifying matrix memories by Pallas kernels for TPU, forward and backward.

The grid is (batch, heads, chunks). A head's memories stay in VMEM from chunk to chunk: keys, values, rates and targets are read from them,
and all of them written, between one load of the chunk's static tokens and one store of its reads. The backward kernel goes over the chunks
in reverse, from the memories they started with, and differentiates the same chunk. All products are in float32.

They have never run on a TPU yet: tested in interpret mode, and compiled ahead of time for v5e.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from nested_jax.memory import self_modifying as twin
from nested_jax.memory.kernels import tiles
from nested_jax.memory.kernels.tiles import dot

_GATES = 128  # columns that eta and alpha are given, two of them of use: lanes of a register
_SUBLANES = 8  # rows of a float32 tile


class _Scalars(NamedTuple):
    """Rows (1, C) of a chunk; the last three have one value for all of its tokens."""

    eta: jax.Array  # static logits
    alpha: jax.Array
    scale: jax.Array  # of the retention
    fresh: jax.Array  # above 0: the memories start anew
    complete: jax.Array  # above 0: the chunk's last token is known, so that its writes are kept


def fits(rule: twin.Rule, momentum: bool) -> bool:
    """Whether the kernels can do the rule."""
    one_grid = rule.chunk_size == rule.projection_chunk_size and rule.chunk_size % _SUBLANES == 0
    return rule.kind == 'matrix' and one_grid and not rule.adaptive_query and not momentum


def scan_chunks(rule: twin.Rule, scale, start, running, tokens, flags):
    """`twin.self_modifying`'s scan over chunks, for a rule that `fits`.

    Args:
        rule: how to read and write.
        scale: (B, H) of the retention.
        start: (B, H, D, 3 D + 2) learned memories that documents start from.
        running: the same before the first chunk.
        tokens: `twin._Tokens` of all chunks: queries, keys and values (N, B, H, C, D) and logits (N, B, H, C), float32.
        flags: 'complete' and 'fresh', (N, B) bool or None for all and none.

    Returns:
        (N, B, H, C, D) reads and the memories after the last complete chunk, (B, H, D, 3 D + 2).
    """
    shape = tokens.eta.shape
    over = lambda flag, value: jnp.full(shape, value) if flag is None else jnp.broadcast_to(flag[..., None, None], shape)
    rows = (tokens.eta, tokens.alpha, scale[None, ..., None], over(flags['fresh'], 0.0), over(flags['complete'], 1.0))
    scalars = jnp.stack([jnp.broadcast_to(row.astype(jnp.float32), shape) for row in rows], -2)
    y, last = _memory(rule, tokens.query, tokens.key, tokens.value, scalars, _apart(start), _apart(running))
    return y, jnp.concatenate([*last[:3], last[3][..., :2]], -1)


def _apart(memories: jax.Array) -> tuple[jax.Array, ...]:
    """M_memory, M_key, M_value, and eta's and alpha's side by side with zeros behind them."""
    wide, gates = memories[..., :-2], memories[..., -2:]
    return *jnp.split(wide, 3, -1), jnp.pad(gates, [(0, 0)] * (gates.ndim - 1) + [(0, _GATES - 2)])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _memory(rule, q, k, v, scalars, start, running):
    return _forward(rule, q, k, v, scalars, start, running, keep_starts=False)[:2]


def _memory_forward(rule, q, k, v, scalars, start, running):
    y, last, starts = _forward(rule, q, k, v, scalars, start, running, keep_starts=True)
    return (y, last), (q, k, v, scalars, start, starts)


def _memory_backward(rule, saved, cotangents):
    q, k, v, scalars, start, starts = saved
    y_bar, last_bar = cotangents
    count = q.shape[0]
    tokens, heads, chunks = _specs(start, lambda n: count - 1 - n)
    like = lambda arrays: [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays]
    call = pl.pallas_call(
        functools.partial(_backward_kernel, rule),
        grid=(*scalars.shape[1:3], count),
        in_specs=[*map(tokens, (q, k, v, scalars)), *heads, *chunks, tokens(y_bar), *heads],
        out_specs=[*map(tokens, (q, k, v, scalars)), *heads, *heads],
        out_shape=like([q, k, v, scalars, *start, *start]),
        scratch_shapes=[pltpu.VMEM(x.shape[2:], jnp.float32) for x in (*start, *start)],
        compiler_params=_IN_ORDER,
    )
    q_bar, k_bar, v_bar, scalars_bar, *memories_bar = call(q, k, v, scalars, *start, *starts, y_bar, *last_bar)
    return q_bar, k_bar, v_bar, scalars_bar, tuple(memories_bar[:4]), tuple(memories_bar[4:])


_memory.defvjp(_memory_forward, _memory_backward)
_IN_ORDER = pltpu.CompilerParams(dimension_semantics=('parallel', 'parallel', 'arbitrary'))


def _forward(rule, q, k, v, scalars, start, running, *, keep_starts: bool):
    """Reads, the last memories, and with `keep_starts` the memories (N, B, H, ...) that chunks start from."""
    tokens, heads, chunks = _specs(start, lambda n: n)
    all_chunks = [jax.ShapeDtypeStruct((q.shape[0], *x.shape), jnp.float32) for x in start]
    call = pl.pallas_call(
        functools.partial(_forward_kernel, rule),
        grid=(*scalars.shape[1:3], q.shape[0]),
        in_specs=[*map(tokens, (q, k, v, scalars)), *heads, *heads],
        out_specs=[tokens(q), *heads, *(chunks if keep_starts else [])],
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, jnp.float32),
            *(jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in start),
            *(all_chunks if keep_starts else []),
        ],
        scratch_shapes=[pltpu.VMEM(x.shape[2:], jnp.float32) for x in start],
        compiler_params=_IN_ORDER,
    )
    y, *memories = call(q, k, v, scalars, *start, *running)
    return y, tuple(memories[:4]), tuple(memories[4:])


def _specs(start, order):
    """What one program sees when its n-th step is chunk order(n): of an array (N, B, H, ...), of memories, and of those of all chunks."""
    tokens = lambda x: pl.BlockSpec((1, 1, 1, *x.shape[3:]), lambda b, h, n: (order(n), b, h, 0, 0))
    heads = [pl.BlockSpec((1, 1, *x.shape[2:]), lambda b, h, n: (b, h, 0, 0)) for x in start]
    chunks = [pl.BlockSpec((1, 1, 1, *x.shape[2:]), lambda b, h, n: (order(n), b, h, 0, 0)) for x in start]
    return tokens, heads, chunks


def _forward_kernel(rule, q, k, v, scalars, *refs):
    start, running, (y, *results), memory = refs[:4], refs[4:8], refs[8:-4], refs[-4:]
    last, starts = results[:4], results[4:]

    @pl.when(pl.program_id(2) == 0)
    def _():
        for ref, first in zip(memory, running, strict=True):
            ref[...] = first[0, 0]

    for ref, now in zip(starts, memory, strict=bool(starts)):
        ref[0, 0, 0] = now[...]
    after, rows = _chunk(rule, *_load(memory, start, q, k, v, scalars))
    y[0, 0, 0] = rows
    for ref, out, value in zip(memory, last, after, strict=True):
        ref[...] = value
        out[0, 0] = value


def _backward_kernel(rule, q, k, v, scalars, *refs):
    start, starts, (y_bar, *last_bar), refs = refs[:4], refs[4:8], refs[8:13], refs[13:]
    (q_bar, k_bar, v_bar, scalars_bar), start_bar, running_bar, sums, memory_bar = refs[:4], refs[4:8], refs[8:12], refs[12:16], refs[16:]

    @pl.when(pl.program_id(2) == 0)
    def _():
        for ref, value, total in zip(memory_bar, last_bar, sums, strict=True):
            ref[...] = value[0, 0]
            total[...] = jnp.zeros(total.shape, jnp.float32)

    memory = [ref.at[0, 0, 0] for ref in starts]
    _, pull = jax.vjp(functools.partial(_chunk, rule), *_load(memory, start, q, k, v, scalars))
    before_bar, from_bar, *tokens_bar, rows_bar = pull((tuple(ref[...] for ref in memory_bar), y_bar[0, 0, 0]))
    for ref, value in zip((q_bar, k_bar, v_bar), tokens_bar, strict=True):
        ref[0, 0, 0] = value
    for row, value in enumerate(rows_bar):
        scalars_bar[0, 0, 0, row : row + 1] = value
    for ref, out, value in zip(memory_bar, running_bar, before_bar, strict=True):
        ref[...] = value
        out[0, 0] = value
    for ref, out, value in zip(sums, start_bar, from_bar, strict=True):
        ref[...] += value
        out[0, 0] = ref[...]


def _load(memory, start, q, k, v, scalars):
    """Memories, what they start from, tokens (C, D), and the `_Scalars`."""
    rows = _Scalars(*(scalars[0, 0, 0, row : row + 1] for row in range(len(_Scalars._fields))))
    return tuple(ref[...] for ref in memory), tuple(ref[0, 0] for ref in start), q[0, 0, 0], k[0, 0, 0], v[0, 0, 0], rows


def _chunk(rule: twin.Rule, memory, start, q, k, v, scalars: _Scalars):
    """The memories after a chunk, and the reads (C, D); as `twin._generate` and `twin._write_matrix`."""
    fresh, complete = scalars.fresh[:, :1] > 0, scalars.complete[:, :1] > 0
    memory = tuple(jnp.where(fresh, first, now) for first, now in zip(start, memory, strict=True))
    part = lambda name, x: x if name in rule.self_modified else jnp.zeros_like(x)
    at = lambda rows: tuple(dot(rows, weight, 1, 0) for weight in memory)
    _, to_key, to_value, to_gates = at(k)
    key, value = _normalize(k + part('key', to_key)), _normalize(v + part('value', to_value))
    *hats, gate_hat = at(value)
    targets = *(_normalize(value + part('target', hat)) for hat in hats), jnp.tanh(gate_hat)
    gate = lambda name, number, logit: tiles.as_column(logit) + part(name, _column(to_gates, number))
    log_alpha = -tiles.as_column(scalars.scale) * jax.nn.softplus(gate('alpha', 1, scalars.alpha))
    if not rule.retention:
        log_alpha = jnp.zeros_like(log_alpha)
    eta = jax.nn.sigmoid(gate('eta', 0, scalars.eta)) * twin.largest_rate(rule, jnp.exp(log_alpha))
    outputs = at(key)
    error, erase = [-target for target in targets], eta * (1.0 if rule.dgd == 'none' else 2.0)
    if rule.gradient == 'chunk':
        error = [output - target for output, target in zip(outputs, targets, strict=True)]
        erase = None if rule.dgd == 'none' else eta

    row, column = tiles.indices(q.shape[0])
    log_decay = jnp.maximum(tiles.as_row(log_alpha), tiles.LOG_ZERO)
    kept, before, after = (jnp.exp(tiles.sums(log_decay, mask)) for mask in (column <= row, column < row, column > row))
    kept_last = jnp.exp(jnp.sum(log_decay, 1, keepdims=True))
    rest = start if rule.decay_to == 'init' else None
    decayed = lambda share, x, goal: share * x if goal is None else goal + share * (x - goal)
    rest_at = lambda rows, index: None if rest is None else dot(rows, rest[index], 1, 0)
    writes = [eta * rows for rows in error]
    if erase is not None:
        inverse = tiles.invert(erase * tiles.spans(log_decay, column < row) * dot(key, key, 1, 1))
        seen = [decayed(before, output, rest_at(key, index)) for index, output in enumerate(outputs)]
        writes = [dot(inverse, rows + erase * old, 1, 0) for rows, old in zip(writes, seen, strict=True)]
    goals = (None,) * len(memory) if rest is None else rest
    new = [decayed(kept_last, w, goal) - dot(after * key, rows, 0, 0) for w, goal, rows in zip(memory, goals, writes, strict=True)]
    y = dot(q, memory[0], 1, 0)
    if rule.read == 'running':
        y = decayed(kept, y, rest_at(q, 0)) - dot(tiles.spans(log_decay, column <= row) * dot(q, key, 1, 1), writes[0], 1, 0)
    return tuple(jnp.where(complete, now, old) for now, old in zip(new, memory, strict=True)), y


def _normalize(x: jax.Array) -> jax.Array:
    """As `nested_jax.memory.rows.normalize`."""
    return x * jax.lax.rsqrt(jnp.sum(x * x, 1, keepdims=True) + 1e-6)


def _column(x: jax.Array, number: int) -> jax.Array:
    """(C, 1) column of (C, lanes)."""
    return jnp.sum(jnp.where(jax.lax.broadcasted_iota(jnp.int32, x.shape, 1) == number, x, 0.0), 1, keepdims=True)
