"""Self-modifying memories by Pallas kernels for TPU and, with the calls of `self_modifying_gpu.py`, for GPUs, forward and backward.

On TPU the grid is (batch, heads, chunks). A head's memories stay in VMEM from chunk to chunk, as a result that each of its programs writes
anew: keys, values, rates and targets are read from them, and all of them written, between one load of the chunk's static tokens and one
store of its reads. The backward kernel goes over the chunks in reverse, from the memories they started with, and differentiates the same
chunk. All products are in float32.

Memories are arrays of two axes, those of eta and alpha with zeros beside their one column: matrix memories one each, MLPs first layers and
then second layers; with momentum, that of each behind them.

They have never run on a TPU yet: tested in interpret mode, and compiled ahead of time for v5e.
"""

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from nested_jax.memory import self_modifying as twin
from nested_jax.memory.kernels import self_modifying_gpu as gpu
from nested_jax.memory.kernels import tiles
from nested_jax.memory.kernels.tiles import dot

Platform = Literal['tpu', 'gpu']
_MEMORIES = 5  # memory, key, value, eta, alpha
_LANES = {'tpu': 128, 'gpu': gpu.TILE}  # columns of a register or tile, which memories with one output are padded to
SUBLANES = 8  # rows of a float32 tile
_VMEM = 2**26  # bytes a program may take, of 128 MiB: MLPs' derivatives in chunks of 64 tokens outgrow the default


class _Scalars(NamedTuple):
    """Rows (1, C) of a chunk; the last three have one value for all of its tokens."""

    eta: jax.Array  # static logits
    alpha: jax.Array
    momentum: jax.Array  # zeros without
    scale: jax.Array  # of the retention
    fresh: jax.Array  # above 0: the memories start anew
    complete: jax.Array  # above 0: the chunk's last token is known, so that its writes are kept


class _Made(NamedTuple):
    """What a chunk's memories generate."""

    query: jax.Array  # (C, D)
    key: jax.Array  # (C, D)
    targets: tuple[jax.Array, ...]  # (C, D), of eta and alpha (C, lanes)
    eta: jax.Array  # (C, 1)
    rate: jax.Array  # (C, 1) of what enters the momentum
    log_alpha: jax.Array  # (C, 1)


class _Decays(NamedTuple):
    """As `nested_jax.memory.chunk.ChunkDecays`, (C, 1) and (C, C); the last token's (1, 1), and its row of spans as (C, 1)."""

    kept: jax.Array
    before: jax.Array
    last: jax.Array
    spans: jax.Array
    spans_before: jax.Array
    after: jax.Array
    momentum_last: jax.Array | None
    momentum_after: jax.Array | None
    pushed: jax.Array | None
    pushed_before: jax.Array | None
    pushed_last: jax.Array | None
    push_spans: jax.Array
    push_spans_before: jax.Array
    push_after: jax.Array


class _Layer(NamedTuple):
    weight: jax.Array
    momentum: jax.Array | None
    rest: jax.Array | None  # what retention decays to; None for zero


class _Writes(NamedTuple):
    """As `nested_jax.memory.chunk.LayerWrites`."""

    inputs: jax.Array
    pushes: jax.Array
    erasures: jax.Array | None


ALLOWED = {
    'tpu': f'one chunk size, a multiple of {SUBLANES}, one kind of memory, and no adaptive query',
    'gpu': f'one chunk size, heads and hidden layers of {gpu.TILE}, one kind of memory, and no adaptive query',
}


def fits(platform: Platform, rule: twin.Rule, initial: twin.Memories) -> bool:
    """Whether the platform's kernels can do the rule with such memories: `ALLOWED`."""
    if rule.chunk_size != rule.projection_chunk_size or rule.adaptive_query or rule.matrix_memories:
        return False
    sizes = {rule.chunk_size, initial.first.shape[-2], gpu.TILE if initial.wide is None else initial.wide.shape[-2]}
    return sizes == {gpu.TILE} if platform == 'gpu' else rule.chunk_size % SUBLANES == 0


def scan_chunks(platform: Platform, rule: twin.Rule, scale, start: twin.Memories, carry, tokens, momentum, flags):
    """`twin.self_modifying`'s scan over chunks, for a rule that `fits`.

    Args:
        platform: whose kernels.
        rule: how to read and write.
        scale: (B, H) of the retention.
        start: (B, H, ...) learned memories that documents start from.
        carry: memories before the first chunk, and their momentum or None.
        tokens: `twin._Tokens` of all chunks: queries, keys and values (N, B, H, C, D) and logits (N, B, H, C), float32.
        momentum: (N, B, H, C) logits, or None.
        flags: 'complete' and 'fresh', (N, B) bool or None for all and none.

    Returns:
        The carry after the last complete chunk, and (N, B, H, C, D) reads.
    """
    shape = tokens.eta.shape
    over = lambda flag, value: jnp.float32(value) if flag is None else flag[..., None, None]
    given = tokens.eta, tokens.alpha, jnp.float32(0.0) if momentum is None else momentum, scale[None, ..., None]
    rows = _Scalars(*given, over(flags['fresh'], 0.0), over(flags['complete'], 1.0))
    scalars = jnp.stack([jnp.broadcast_to(row.astype(jnp.float32), shape) for row in rows], -2)
    lanes = _LANES[platform]
    running = tuple(array for part in carry if part is not None for array in _apart(rule, part, lanes))
    y, last = _scan(platform, rule, tokens.query, tokens.key, tokens.value, scalars, _apart(rule, start, lanes), running)
    count = len(last) // (1 if momentum is None else 2)
    return (_together(rule, last[:count]), None if momentum is None else _together(rule, last[count:])), y


def _apart(rule: twin.Rule, memories: twin.Memories, lanes: int) -> tuple[jax.Array, ...]:
    """An array for each memory and layer."""
    padded = lambda gate: jnp.pad(gate, [(0, 0)] * (gate.ndim - 1) + [(0, lanes - 1)])
    if rule.kind == 'matrix':
        wide, gates = memories.first[..., :-2], memories.first[..., -2:]
        return *jnp.split(wide, 3, -1), padded(gates[..., :1]), padded(gates[..., 1:])
    unstack = functools.partial(jnp.unstack, axis=-3)
    return *jnp.split(memories.first, _MEMORIES, -1), *unstack(memories.wide), *map(padded, unstack(memories.gate))


def _together(rule: twin.Rule, arrays: tuple[jax.Array, ...]) -> twin.Memories:
    """Inverse of `_apart`."""
    *wide, eta, alpha = arrays
    if rule.kind == 'matrix':
        return twin.Memories(jnp.concatenate([*wide, eta[..., :1], alpha[..., :1]], -1), None, None)
    first, second = jnp.concatenate(wide[:_MEMORIES], -1), jnp.stack(wide[_MEMORIES:], -3)
    return twin.Memories(first, second, jnp.stack([eta[..., :1], alpha[..., :1]], -3))


# The calls of TPU kernels. q, k, v (N, B, H, C, D), scalars (N, B, H, 6, C), start and running tuples of (B, H, rows, columns)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _scan(platform, rule, q, k, v, scalars, start, running):
    return _forward(platform, rule, q, k, v, scalars, start, running, keep_starts=False)[:2]


def _scan_forward(platform, rule, q, k, v, scalars, start, running):
    y, last, starts = _forward(platform, rule, q, k, v, scalars, start, running, keep_starts=True)
    return (y, last), (q, k, v, scalars, start, starts)


def _scan_backward(platform, rule, saved, cotangents):
    q, k, v, scalars, start, starts = saved
    y_bar, last_bar = cotangents
    if platform == 'gpu':
        return gpu.backward(functools.partial(_chunk_of_rows, rule), q, k, v, scalars, start, starts, y_bar, last_bar)
    tokens, heads = _specs(lambda n: q.shape[0] - 1 - n)
    given, memories = (q, k, v, scalars), (*start, *last_bar)
    call = pl.pallas_call(
        functools.partial(_backward_kernel, rule, len(start), len(starts)),
        grid=(*scalars.shape[1:3], q.shape[0]),
        in_specs=[*map(tokens, given), *map(heads, start), *map(tokens, (*starts, y_bar)), *map(heads, last_bar)],
        out_specs=[*map(tokens, given), *map(heads, memories)],
        out_shape=[jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in (*given, *memories)],
        compiler_params=_IN_ORDER,
    )
    q_bar, k_bar, v_bar, scalars_bar, *memories_bar = call(*given, *start, *starts, y_bar, *last_bar)
    return q_bar, k_bar, v_bar, scalars_bar, tuple(memories_bar[: len(start)]), tuple(memories_bar[len(start) :])


_scan.defvjp(_scan_forward, _scan_backward)
_IN_ORDER = pltpu.CompilerParams(dimension_semantics=('parallel', 'parallel', 'arbitrary'), vmem_limit_bytes=_VMEM)


def _forward(platform, rule, q, k, v, scalars, start, running, *, keep_starts: bool):
    """Reads, the last memories, and with `keep_starts` the memories (N, B, H, ...) that chunks start from."""
    if platform == 'gpu':
        return gpu.forward(functools.partial(_chunk_of_rows, rule), q, k, v, scalars, start, running, keep_starts=keep_starts)
    tokens, heads = _specs(lambda n: n)
    given = (q, k, v, scalars)
    starts = [jax.ShapeDtypeStruct((q.shape[0], *x.shape), jnp.float32) for x in running] * keep_starts
    call = pl.pallas_call(
        functools.partial(_forward_kernel, rule, len(start), len(running)),
        grid=(*scalars.shape[1:3], q.shape[0]),
        in_specs=[*map(tokens, given), *map(heads, (*start, *running))],
        out_specs=[tokens(q), *map(heads, running), *map(tokens, starts)],
        out_shape=[*(jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in (q, *running)), *starts],
        compiler_params=_IN_ORDER,
    )
    y, *memories = call(*given, *start, *running)
    return y, tuple(memories[: len(running)]), tuple(memories[len(running) :])


def _specs(order):
    """What one program sees when its n-th step is chunk order(n): of arrays (N, B, H, ...), and of memories (B, H, ...)."""
    tokens = lambda x: pl.BlockSpec((1, 1, 1, *x.shape[3:]), lambda b, h, n: (order(n), b, h, 0, 0))
    heads = lambda x: pl.BlockSpec((1, 1, *x.shape[2:]), lambda b, h, n: (b, h, 0, 0))
    return tokens, heads


def _cut(refs, *counts: int) -> list:
    """Consecutive groups of refs, and what is left."""
    groups = []
    for count in counts:
        groups.append(refs[:count])
        refs = refs[count:]
    return [*groups, refs]


def _forward_kernel(rule, count, memories, q, k, v, scalars, *refs):
    start, running, (y,), memory, starts = _cut(refs, count, memories, 1, memories)

    @pl.when(pl.program_id(2) == 0)
    def _():
        for ref, first in zip(memory, running, strict=True):
            ref[...] = first[...]

    for ref, now in zip(starts, memory, strict=bool(starts)):
        ref[0] = now[...]
    after, y[0, 0, 0] = _chunk(rule, *_load([ref.at[0, 0] for ref in memory], start, q, k, v, scalars))
    for ref, value in zip(memory, after, strict=True):
        ref[0, 0] = value


def _backward_kernel(rule, count, memories, q, k, v, scalars, *refs):
    start, starts, (y_bar,), last_bar, tokens_bar, scalars_bar, start_bar, memory_bar = _cut(
        refs, count, memories, 1, memories, 3, 1, count
    )

    @pl.when(pl.program_id(2) == 0)
    def _():
        for ref, value in zip(memory_bar, last_bar, strict=True):
            ref[...] = value[...]
        for total in start_bar:
            total[...] = jnp.zeros(total.shape, jnp.float32)

    _, pull = jax.vjp(functools.partial(_chunk, rule), *_load([ref.at[0, 0, 0] for ref in starts], start, q, k, v, scalars))
    before_bar, from_bar, *wide_bar, rows_bar = pull((tuple(ref[0, 0] for ref in memory_bar), y_bar[0, 0, 0]))
    for ref, value in zip(tokens_bar, wide_bar, strict=True):
        ref[0, 0, 0] = value
    for row, value in enumerate(rows_bar):
        scalars_bar[0][0, 0, 0, row : row + 1] = value
    for ref, value in zip(memory_bar, before_bar, strict=True):
        ref[0, 0] = value
    for total, value in zip(start_bar, from_bar, strict=True):
        total[0, 0] += value


def _load(memory, start, q, k, v, scalars):
    """Memories, what they start from, tokens (C, D), and the `_Scalars`."""
    rows = _Scalars(*(scalars[0, 0, 0, row : row + 1] for row in range(len(_Scalars._fields))))
    return tuple(ref[...] for ref in memory), tuple(ref[0, 0] for ref in start), q[0, 0, 0], k[0, 0, 0], v[0, 0, 0], rows


# A chunk, as `twin._chunk`; memories are tuples of arrays of two axes


def _chunk(rule: twin.Rule, memory, start, q, k, v, scalars: _Scalars):
    """The memories after a chunk, and the reads (C, D)."""
    fresh, complete, count = scalars.fresh[:, :1] > 0, scalars.complete[:, :1] > 0, len(start)
    weights = tuple(jnp.where(fresh, first, now) for first, now in zip(start, memory[:count], strict=True))
    momenta = tuple(jnp.where(fresh, 0.0, now) for now in memory[count:])
    made = _generate(rule, weights, q, k, v, scalars, momentum=bool(momenta))
    decays = _decays(made.log_alpha, tiles.as_column(scalars.momentum) if momenta else None)
    nones = (None,) * count
    layers = [_Layer(*parts) for parts in zip(weights, momenta or nones, start if rule.decay_to == 'init' else nones, strict=True)]
    y, written = (_write_matrix if rule.kind == 'matrix' else _write_mlp)(rule, made, decays, layers)
    new = [_after(decays, writes, layer) for writes, layer in zip(written, layers, strict=True)]
    after = *(weight for weight, _ in new), *(momentum for _, momentum in new if momentum is not None)
    return tuple(jnp.where(complete, now, old) for now, old in zip(after, (*weights, *momenta), strict=True)), y


def _chunk_of_rows(rule: twin.Rule, memory, start, q, k, v, rows: tuple[jax.Array, ...]):
    """The same with the scalars as a tuple."""
    return _chunk(rule, memory, start, q, k, v, _Scalars(*rows))


def _generate(rule: twin.Rule, weights, q, k, v, scalars: _Scalars, *, momentum: bool) -> _Made:
    part = lambda name, x: x if name in rule.self_modified else jnp.zeros_like(x)
    _, to_key, to_value, to_eta, to_alpha = _outputs(rule, weights, k)
    key, value = _normalize(k + part('key', to_key)), _normalize(v + part('value', to_value))
    *hats, eta_hat, alpha_hat = _outputs(rule, weights, value)
    targets = *(_normalize(value + part('target', hat)) for hat in hats), jnp.tanh(eta_hat), jnp.tanh(alpha_hat)
    log_alpha = -tiles.as_column(scalars.scale) * jax.nn.softplus(tiles.as_column(scalars.alpha) + part('alpha', _first_column(to_alpha)))
    if not rule.retention:
        log_alpha = jnp.zeros_like(log_alpha)
    eta = jax.nn.sigmoid(tiles.as_column(scalars.eta) + part('eta', _first_column(to_eta))) * twin.largest_rate(rule, jnp.exp(log_alpha))
    return _Made(q, key, targets, eta, eta * jax.nn.sigmoid(-tiles.as_column(scalars.momentum)) if momentum else eta, log_alpha)


def _outputs(rule: twin.Rule, weights, x: jax.Array) -> list[jax.Array]:
    """f(x) of all memories."""
    first = [dot(x, weight, 1, 0) for weight in weights[:_MEMORIES]]
    if rule.kind == 'matrix':
        return first
    return [dot(jax.nn.silu(z), weight, 1, 0) for z, weight in zip(first, weights[_MEMORIES:], strict=True)]


def _decays(log_alpha: jax.Array, momentum: jax.Array | None) -> _Decays:
    """Of retention (C, 1), and of the momentum's logits (C, 1) or None."""
    row, column = tiles.indices(log_alpha.shape[0])
    masks = column <= row, column < row, column > row

    def products(log_factor: jax.Array):
        log_factor = jnp.maximum(tiles.as_row(log_factor), tiles.LOG_ZERO)
        kept, before, after = (jnp.exp(tiles.sums(log_factor, mask)) for mask in masks)
        last = jnp.exp(jnp.sum(log_factor, 1, keepdims=True))
        return kept, before, last, tiles.spans(log_factor, masks[0]), tiles.spans(log_factor, masks[1]), after

    kept, before, last, spans, spans_before, after = products(log_alpha)
    if momentum is None:
        nothing = (None,) * 5
        return _Decays(kept, before, last, spans, spans_before, after, *nothing, spans, spans_before, after)
    momentum_kept, _, momentum_last, momentum_spans, _, momentum_after = products(jax.nn.log_sigmoid(momentum))
    kept_row = tiles.as_row(momentum_kept)
    pushed, pushed_before = (jnp.sum(x * kept_row, 1, keepdims=True) for x in (spans, spans_before))
    push_spans, push_spans_before = dot(spans, momentum_spans, 1, 0), dot(spans_before, momentum_spans, 1, 0)
    of_last = lambda x: jnp.sum(jnp.where(row[:, : x.shape[1]] == row.shape[0] - 1, x, 0.0), 0, keepdims=True)
    return _Decays(
        kept, before, last, spans, spans_before, after, momentum_last, momentum_after, pushed, pushed_before, of_last(pushed),
        push_spans, push_spans_before, tiles.as_column(of_last(push_spans)),
    )  # fmt: skip


def _write_matrix(rule: twin.Rule, made: _Made, decays: _Decays, layers: list[_Layer]):
    """Reads, and the writes of each layer."""
    outputs = [dot(made.key, layer.weight, 1, 0) for layer in layers]
    errors, erase = [-target for target in made.targets], made.eta * (1.0 if rule.dgd == 'none' else 2.0)
    if rule.gradient == 'chunk':
        errors = [output - target for output, target in zip(outputs, made.targets, strict=True)]
        erase = None if rule.dgd == 'none' else made.eta
    system = _System(decays, made.key, erase)
    written = [system.write(error, made.rate, layer, output) for error, layer, output in zip(errors, layers, outputs, strict=True)]
    return _read_layer(rule, decays, written[0], made.query, layers[0]), written


def _write_mlp(rule: twin.Rule, made: _Made, decays: _Decays, layers: list[_Layer]):
    """Reads, and the writes of each layer, first layers before second ones."""
    firsts, seconds = layers[:_MEMORIES], layers[_MEMORIES:]
    system, written = _System(decays, made.key, None if rule.dgd == 'none' else made.eta), ([], [])
    for first, second, target in zip(firsts, seconds, made.targets, strict=True):
        z = dot(made.key, first.weight, 1, 0)
        share = jax.nn.sigmoid(z)
        hidden, slope = z * share, share * (1.0 + z * (1.0 - share))
        output = dot(hidden, second.weight, 1, 0)
        error = output - target
        steepness = jnp.sum(dot(slope * slope, second.weight * second.weight, 1, 0), 1, keepdims=True)
        back = dot(error, second.weight, 1, 1) * slope * twin.damping(rule, made.eta, steepness, erased=rule.dgd != 'none')
        shrink = twin.damping(rule, made.eta, jnp.sum(hidden * hidden, 1, keepdims=True), erased=rule.dgd == 'per_layer')
        inner = _System(decays, hidden, made.eta * shrink if rule.dgd == 'per_layer' else None)
        written[0].append(system.write(back, made.rate, first, z))
        written[1].append(inner.write(error, made.rate * shrink, second, output))
    hidden = jax.nn.silu(_read_layer(rule, decays, written[0][0], made.query, firsts[0]))
    return _read_layer(rule, decays, written[1][0], hidden, seconds[0]), [*written[0], *written[1]]


class _System:
    """What a chunk's erasures of layers with the same inputs and rates owe to one another."""

    def __init__(self, decays: _Decays, inputs: jax.Array, erase: jax.Array | None):
        self.decays, self.inputs, self.erase = decays, inputs, erase
        if erase is not None:
            self.gram = dot(inputs, inputs, 1, 1)
            self.inverse = tiles.invert(erase * decays.spans_before * self.gram)

    def write(self, error: jax.Array, rate: jax.Array, layer: _Layer, output: jax.Array) -> _Writes:
        """As `nested_jax.memory.chunk.layer_writes`."""
        decays, pushes = self.decays, rate * error
        if self.erase is None:
            return _Writes(self.inputs, pushes, None)
        seen = _decayed(decays.before, output, layer.rest, self.inputs)
        if layer.momentum is None:
            return _Writes(self.inputs, dot(self.inverse, pushes + self.erase * seen, 1, 0), None)
        seen += decays.pushed_before * dot(self.inputs, layer.momentum, 1, 0) - dot(decays.push_spans_before * self.gram, pushes, 1, 0)
        return _Writes(self.inputs, pushes, dot(self.inverse, self.erase * seen, 1, 0))


def _decayed(share: jax.Array, rows: jax.Array, rest: jax.Array | None, inputs: jax.Array) -> jax.Array:
    """What retention leaves of the rows inputs W where W decays to `rest`."""
    if rest is None:
        return share * rows
    goal = dot(inputs, rest, 1, 0)
    return goal + share * (rows - goal)


def _after(decays: _Decays, writes: _Writes, layer: _Layer) -> tuple[jax.Array, jax.Array | None]:
    """As `nested_jax.memory.chunk.weight_after`."""
    rows = decays.push_after * writes.pushes
    if writes.erasures is not None:
        rows += decays.after * writes.erasures
    kept = decays.last * layer.weight if layer.rest is None else layer.rest + decays.last * (layer.weight - layer.rest)
    weight = kept - dot(writes.inputs, rows, 0, 0)
    if layer.momentum is None:
        return weight, None
    momentum = decays.momentum_last * layer.momentum - dot(writes.inputs, decays.momentum_after * writes.pushes, 0, 0)
    return weight + decays.pushed_last * layer.momentum, momentum


def _read_layer(rule: twin.Rule, decays: _Decays, writes: _Writes, queries: jax.Array, layer: _Layer) -> jax.Array:
    """Queries times the layer's weight at their own token, or at the chunk's start."""
    y = dot(queries, layer.weight, 1, 0)
    if rule.read == 'anchor':
        return y
    overlap = dot(queries, writes.inputs, 1, 1)
    y = _decayed(decays.kept, y, layer.rest, queries) - dot(decays.push_spans * overlap, writes.pushes, 1, 0)
    if layer.momentum is not None:
        y += decays.pushed * dot(queries, layer.momentum, 1, 0)
    return y if writes.erasures is None else y - dot(decays.spans * overlap, writes.erasures, 1, 0)


def _normalize(x: jax.Array) -> jax.Array:
    """As `nested_jax.memory.rows.normalize`."""
    return x * jax.lax.rsqrt(jnp.sum(x * x, 1, keepdims=True) + 1e-6)


def _first_column(x: jax.Array) -> jax.Array:
    """(C, 1) of (C, lanes)."""
    return jnp.sum(jnp.where(jax.lax.broadcasted_iota(jnp.int32, x.shape, 1) == 0, x, 0.0), 1, keepdims=True)
