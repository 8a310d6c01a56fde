"""Self-modifying memories: M_k, M_v, M_eta, M_alpha and M_memory generate their own keys, values and rates (Hope).

For every memory M of a head (Eq. 86-91, arXiv:2512.24695v1):

    k_t = norm(k + f_k(k)),  v_t = norm(v + f_v(k)),  logit eta_t += f_eta(k),  logit alpha_t += f_alpha(k)
    v_hat_t = norm(v_t + f(v_t))                       (tanh of f(v_t) for the two scalar memories)
    S_t = beta_t S_{t-1} - (1 - beta_t) eta_t grad 1/2 |f(k_t) - v_hat_t|^2
    M_t = M_{t-1} (alpha_t I - eta_t k_t k_t^T) + S_t  (and (1 - alpha_t) M_0, where memories decay to their initial state)
    y_t = f_memory(q_t)                                of M_t; with `read='anchor'` of the memory at the chunk's start

k, v and q, of unit norm, come from static projections; adaptive queries are norm(q + f_q(k)). f is the memory without its identity: the
identity sits in the generation of k, v and v_hat, where it makes a small initial state safe, and not in the fit, where every memory
would first have to unlearn k. Unit norms keep each step bounded: a memory's own outputs are its targets. What memories do not generate
(`self_modified`) lacks its f: without 'target' v_hat_t is v_t, and the scalar memories keep their targets. eta_t is a sigmoid's share of
`largest_rate`. MLPs erase each layer along its own input, and `damping` bounds their rates.

Two grids of chunks: k, v, eta, alpha and v_hat are read from the memories at their projection chunk's start, the
gradient of M_memory is taken at its own chunk's start (Eq. 90). The memories share key, eta and alpha, so the first
layers (for matrix memories: the only ones) are one layer with concatenated outputs and one triangular system a chunk. Each memory may be
of either kind: `matrix_memories` names those that are matrices beside MLPs.

Einsum letters: b batch, h head, m memory, c token of the chunk, d head width, f hidden unit.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nested_jax.memory import chunk, grid
from nested_jax.memory.products import inner, product
from nested_jax.memory.rows import normalize, scale_rows, square_norms

WIDE = ('memory', 'key', 'value', 'query')  # memories with a head's width of outputs
GATES = ('eta', 'alpha')  # memories with one output


@dataclasses.dataclass(frozen=True)
class Rule:
    """How the memories are read and written; the fields are those of `nested_jax.config.MemoryConfig`."""

    kind: Literal['matrix', 'mlp'] = 'mlp'
    matrix_memories: tuple[str, ...] = ()
    chunk_size: int = 16
    projection_chunk_size: int = 16
    dgd: Literal['per_layer', 'input_only', 'none'] = 'per_layer'
    gradient: Literal['token', 'chunk'] = 'chunk'
    read: Literal['running', 'anchor'] = 'running'
    retention: bool = True
    decay_to: Literal['zero', 'init'] = 'zero'
    adaptive_query: bool = False
    positive_eigenvalues: bool = False
    self_modified: tuple[str, ...] = ('key', 'value', 'target', 'eta', 'alpha')

    @property
    def base(self) -> int:
        """Tokens of the finer grid."""
        return min(self.chunk_size, self.projection_chunk_size)

    @property
    def wide(self) -> int:
        """Memories with a head's width of outputs: memory, key, value and perhaps query."""
        return 4 if self.adaptive_query else 3

    def places(self, kind: Literal['matrix', 'mlp']) -> tuple[list[int], list[int]]:
        """Which of the wide memories, and which of eta and alpha, are of a kind; of rules that mix them."""
        of_kind = lambda names: [place for place, name in enumerate(names) if (name in self.matrix_memories) == (kind == 'matrix')]
        return of_kind(WIDE[: self.wide]), of_kind(GATES)


class Memories(NamedTuple):
    """Weights of all memories, in the order memory, key, value, (query), eta, alpha; leading axes (B, H) or (H,).

    Matrix memories are first layers only; beside MLPs they come after these, and the second layers are fewer.
    """

    first: jax.Array  # (..., D, m D + 2) matrix; (..., D, (m + 2) F) MLP
    wide: jax.Array | None  # (..., m, F, D) second layers
    gate: jax.Array | None  # (..., 2, F, 1) second layers of eta and alpha


class Inputs(NamedTuple):
    """Static inputs of each token: (B, T, H, ...) outside, (B, H, c, ...) inside a chunk."""

    query: jax.Array  # (..., D), |q| = 1
    key: jax.Array  # (..., D), |k| = 1
    value: jax.Array  # (..., D), normalised before memories add to it
    eta: jax.Array  # (...) logits
    alpha: jax.Array  # (...) logits
    momentum: jax.Array | None  # (...) logits, or None for no momentum


class SelfModifyingState(NamedTuple):
    """A stream's memories at the start of its open chunk, and that chunk's inputs."""

    running: Memories
    momentum: Memories | None
    held: Memories | None  # with two chunk sizes: the memories at the start of the longer chunk
    opened: Inputs  # (B, c, H, ...)


class _Tokens(NamedTuple):
    """What of a chunk's tokens does not need the memories, in their dtype; a leading axis of chunks outside the scan."""

    query: jax.Array  # (B, H, c, D)
    key: jax.Array  # (B, H, c, D)
    value: jax.Array  # (B, H, c, D), |v| = 1
    eta: jax.Array  # (B, H, c)
    alpha: jax.Array  # (B, H, c)
    push: jax.Array | None  # (B, H, c) 1 - momentum; None without
    momentum: tuple[jax.Array, jax.Array] | None  # `chunk.decay_products` of the momentum, (B, H, c) and (B, H, c, c); None without


class _Generated(NamedTuple):
    query: jax.Array  # (B, H, c, D)
    key: jax.Array  # (B, H, c, D)
    wide_target: jax.Array  # (B, H, m, c, D), of matrix memories (B, H, c, m, D)
    gate_target: jax.Array  # (B, H, c, 2)
    eta: jax.Array  # (B, H, c)
    log_alpha: jax.Array  # (B, H, c)
    rate: jax.Array  # (B, H, c) learning rate of what enters the momentum: (1 - momentum) eta, so that a write adds up to eta
    momentum: tuple[jax.Array, jax.Array] | None  # as in `_Tokens`
    outputs: jax.Array | None  # (B, H, c, m D + 2) of the source's matrix memories at the key; None for MLPs


def self_modifying(
    inputs: Inputs,
    retention_scale: jax.Array,
    initial: Memories,
    *,
    rule: Rule,
    state: SelfModifyingState | None = None,
    position: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    implementation: Literal['jax', 'pallas_tpu', 'pallas_gpu'] = 'jax',
) -> tuple[jax.Array, SelfModifyingState]:
    """Read and write the memories chunk by chunk (Eq. 86-91, arXiv:2512.24695v1); no loop over tokens.

    Args:
        inputs: (B, T, H, ...) static queries, keys, values and gate logits.
        retention_scale: (H,) positive; log alpha = -retention_scale * softplus(logit).
        initial: (H, ...) the learned states that sequences and documents start from.
        rule: how to read and write.
        state: of an earlier call, or None.
        position: (B,) int32 tokens before this call; needed with `state`. Where it is zero the state is not looked at.
        segment_ids: (B, T) int32; a change at a chunk's first token starts the memories anew. Documents start on the
            coarser grid.
        implementation: plain JAX, or the kernels of `memory/kernels/self_modifying.py`, for a rule that `fits` and memories in float32.

    Returns:
        (B, T, H, D) outputs of M_memory in the memories' dtype, float32 or that of a wider `initial`, and the state.

    Raises:
        ValueError: if `state` comes without `position`, or momentum with token-wise gradients, whose erasure is part of the gradient; for
            an unknown implementation, and a rule or a dtype that the kernels cannot do.
    """
    if implementation not in _SCANS:
        raise ValueError(f'implementation is {implementation!r}, allowed is one of {", ".join(map(repr, _SCANS))}')
    if rule.gradient == 'token' and inputs.momentum is not None:
        raise ValueError("inputs.momentum is given, allowed is None with rule.gradient='token'")
    if state is not None and position is None:
        raise ValueError('position is None, allowed with a state is an int32 array (batch,)')
    batch, length = inputs.key.shape[:2]
    opened = None if state is None else (state.opened, _open_ids(segment_ids, rule.base))
    laid = grid.lay_out((inputs, segment_ids), rule.base, opened, position)
    chunks, ids = laid.chunks
    start = jax.tree.map(lambda x: jnp.broadcast_to(x[None], (batch, *x.shape)), _widened(initial))
    carry = _first_carry(rule, start, state, position, inputs.momentum is not None)
    # One for each row: devices that split the batch would else sum its gradient over them in every chunk.
    scale = jnp.broadcast_to(retention_scale[None], (batch, *retention_scale.shape))
    flags = _flags(rule, laid, ids, None if state is None else position)
    carry, y = _SCANS[implementation](rule, scale, start, carry, chunks, flags)
    return grid.gather_outputs(laid, y, length), SelfModifyingState(*carry, grid.open_chunk(laid, length)[0])


def _scan_chunks(rule: Rule, scale: jax.Array, start: Memories, carry, chunks: Inputs, flags):
    """All chunks, one after the other: the carry after the last complete one, and (n, B, c, H, D) outputs."""

    @jax.checkpoint
    def step(carry, xs):
        tokens, flag = xs
        y, after, before = _chunk(rule, scale, start, carry, tokens, flag)
        return after if flag['complete'] is None else grid.where_rows(flag['complete'], after, before), jnp.moveaxis(y, 1, 2)

    return jax.lax.scan(step, carry, (_static(chunks, start.first.dtype), flags))


def _scan_by_kernels(platform: str, rule: Rule, scale: jax.Array, start: Memories, carry, chunks: Inputs, flags):
    """The same on TPU or GPU."""
    from nested_jax.memory.kernels import self_modifying as kernels  # most programs need no Pallas

    asked = f"allowed with implementation='pallas_{platform}' is"
    if not kernels.fits(platform, rule, start):
        raise ValueError(f'rule is {rule}, with heads of {start.first.shape[-2]}, {asked} {kernels.ALLOWED[platform]}')
    if start.first.dtype != jnp.float32:
        raise ValueError(f'initial has dtype {start.first.dtype}, {asked} at most float32')
    momentum = None if chunks.momentum is None else jnp.moveaxis(chunks.momentum, 2, 3)
    tokens = _static(chunks, start.first.dtype)
    (running, pushed), y = kernels.scan_chunks(platform, rule, scale, start, carry[:2], tokens, momentum, flags)
    return (running, pushed, None), jnp.moveaxis(y, 2, 3)


_SCANS = {'jax': _scan_chunks} | {f'pallas_{name}': functools.partial(_scan_by_kernels, name) for name in ('tpu', 'gpu')}


def _widened(initial: Memories) -> Memories:
    """The learned states in float32 or wider: memories are held in it whatever the parameters' dtype."""
    return jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), initial)


def _open_ids(segment_ids: jax.Array | None, size: int) -> jax.Array | None:
    """Ids of the open chunk: its tokens belong to the document that goes on with the call's first token."""
    return None if segment_ids is None else jnp.broadcast_to(segment_ids[:, :1], (segment_ids.shape[0], size))


def _static(chunks: Inputs, dtype: jnp.dtype) -> _Tokens:
    """What of the tokens (n, B, c, H, ...) does not need the memories, for all chunks at once."""
    query, key, value, eta, alpha, momentum = jax.tree.map(lambda x: jnp.moveaxis(x, 2, 3).astype(dtype), chunks)
    tokens = _Tokens(query, key, normalize(value), eta, alpha, None, None)
    if momentum is None:
        return tokens
    log_momentum = jax.nn.log_sigmoid(momentum)
    return tokens._replace(push=-jnp.expm1(log_momentum), momentum=chunk.decay_products(log_momentum))


def _first_carry(rule: Rule, start: Memories, state: SelfModifyingState | None, position: jax.Array | None, momentum: bool):
    """(running, momentum, held) before the call's first chunk."""
    fresh = (
        start,
        jax.tree.map(jnp.zeros_like, start) if momentum else None,
        start if rule.chunk_size != rule.projection_chunk_size else None,
    )
    return fresh if state is None else grid.where_rows(position == 0, fresh, tuple(state[:3]))


def _flags(rule: Rule, laid: grid.Grid, ids: jax.Array | None, position: jax.Array | None) -> dict[str, jax.Array | None]:
    """What each base chunk is, (n, B) bool: complete, first of a chunk of the coarser grid, first of a document."""
    count, batch = jax.tree.leaves(laid.chunks)[0].shape[:2]
    ratio = max(rule.chunk_size, rule.projection_chunk_size) // rule.base
    index = jnp.arange(count)[:, None] + (jnp.zeros(batch, jnp.int32) if position is None else position // rule.base)[None]
    return {'complete': laid.complete, 'long': index % ratio == 0, 'fresh': None if ids is None else grid.starts_document(ids)}


def _chunk(rule: Rule, scale: jax.Array, start: Memories, carry, tokens: _Tokens, flag: dict[str, jax.Array | None]):
    """One base chunk: outputs (B, H, c, D), the carry after it, and the carry at its start."""
    running, momentum, held = carry
    if flag['fresh'] is not None:
        running = grid.where_rows(flag['fresh'], start, running)
        momentum = grid.where_rows(flag['fresh'], jax.tree.map(jnp.zeros_like, momentum), momentum)
    source, anchor = running, running
    if held is not None:
        held = grid.where_rows(flag['long'], running, held)
        source = held if rule.projection_chunk_size > rule.chunk_size else running
        anchor = _join(rule, held if rule.chunk_size > rule.projection_chunk_size else running, source)
    generated = _generate(rule, scale, source, tokens)
    write = _write_matrix if rule.kind == 'matrix' else _write_mlp
    y, after = write(rule, generated, anchor, running, momentum, start if rule.decay_to == 'init' else None)
    return y, (*after, held), (running, momentum, held)


def _join(rule: Rule, memory: Memories, rest: Memories) -> Memories:
    """M_memory from the one, the projections' memories from the other."""
    columns = _memory_columns(rule, rest)
    parts = rest.first[..., : columns.start], memory.first[..., columns], rest.first[..., columns.stop :]
    first = jnp.concatenate([part for part in parts if part.size], -1)
    if rest.wide is None or 'memory' in rule.matrix_memories:
        return rest._replace(first=first)
    return Memories(first, jnp.concatenate([memory.wide[..., :1, :, :], rest.wide[..., 1:, :, :]], -3), rest.gate)


def _memory_columns(rule: Rule, memories: Memories) -> slice:
    """Those of M_memory in the first layers: D or F."""
    if memories.wide is None:
        return slice(0, memories.first.shape[-2])
    count, hidden = _mlps(memories)
    return slice(count * hidden, count * hidden + memories.first.shape[-2]) if 'memory' in rule.matrix_memories else slice(0, hidden)


def _mlps(memories: Memories) -> tuple[int, int]:
    """How many memories are MLPs, and their hidden units."""
    return memories.wide.shape[-3] + memories.gate.shape[-3], memories.wide.shape[-2]


def _activate(z: jax.Array) -> tuple[jax.Array, jax.Array]:
    """SiLU and its derivative."""
    return jax.jvp(jax.nn.silu, (z,), (jnp.ones_like(z),))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _by_memory(count: int, rows: jax.Array) -> jax.Array:
    """Rows of all first layers, (..., c, count F) -> (..., count, c, F).

    As cuts, not a reshape and a transposition: XLA's CPU backend computes these element by element within what it fuses them with.
    The derivative is the inverse, not a sum of padded cuts.
    """
    return jnp.stack(jnp.split(rows, count, -1), -3)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _side_by_side(count: int, rows: jax.Array) -> jax.Array:
    """Inverse of `_by_memory`, (..., count, c, F) -> (..., c, count F)."""
    return jnp.concatenate([rows[..., i, :, :] for i in range(count)], -1)


_by_memory.defvjp(lambda count, rows: (_by_memory(count, rows), None), lambda count, _, cotangent: (_side_by_side(count, cotangent),))
_side_by_side.defvjp(lambda count, rows: (_side_by_side(count, rows), None), lambda count, _, cotangent: (_by_memory(count, cotangent),))


def _cut(rule: Rule, memories: Memories, rows: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """Outputs of all first layers: those of MLPs, (..., count, c, F), and of matrices beside them, (..., c, columns) or None."""
    count, hidden = _mlps(memories)
    if not rule.matrix_memories:
        return _by_memory(count, rows), None
    return _by_memory(count, rows[..., : count * hidden]), rows[..., count * hidden :]


def _outputs(rule: Rule, memories: Memories, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """f(x) of all memories, (..., c, D) -> (..., m, c, D), of matrix memories (..., c, m, D), and (..., c, 2)."""
    if rule.kind == 'matrix':
        return _split(rule, product(x, memories.first))
    rows, of_matrices = _cut(rule, memories, product(x, memories.first))
    wide, gate = jnp.split(jax.nn.silu(rows), [memories.wide.shape[-3]], -3)
    wide, gate = product(wide, memories.wide), jnp.moveaxis(product(gate, memories.gate)[..., 0], -2, -1)
    return (wide, gate) if of_matrices is None else _merge(rule, wide, gate, of_matrices)


def _merge(rule: Rule, wide: jax.Array, gate: jax.Array, of_matrices: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Outputs of MLPs and of the matrices beside them, (..., c, columns), in the order of all memories."""
    matrices, width = len(rule.places('matrix')[0]), wide.shape[-1]
    ends = [place * width for place in range(1, matrices + 1)]
    *wide_of_matrices, gate_of_matrices = jnp.split(of_matrices, ends, -1)
    wide = _ordered(rule.places('mlp')[0], jnp.unstack(wide, axis=-3), wide_of_matrices)
    gate = _ordered(rule.places('mlp')[1], jnp.unstack(gate, axis=-1), jnp.unstack(gate_of_matrices, axis=-1))
    return jnp.stack(wide, -3), jnp.stack(gate, -1)


def _ordered(places: list[int], of_places: Sequence[jax.Array], others: Sequence[jax.Array]) -> list[jax.Array]:
    """One list of both, in which the first stand at `places`."""
    first, second = iter(of_places), iter(others)
    return [next(first if place in places else second) for place in range(len(of_places) + len(others))]


def _targets(rule: Rule, generated: _Generated) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Inverse of `_merge`: targets (B, H, m, c, D) of wide MLPs, (B, H, c, g) of gates that are, and (B, H, c, columns) of matrices."""
    wide, gate = generated.wide_target, generated.gate_target
    if not rule.matrix_memories:
        return wide, gate, None
    (of_wide, of_gate), (wide_matrices, gate_matrices) = rule.places('mlp'), rule.places('matrix')
    columns = [wide[:, :, place] for place in wide_matrices] + [gate[..., place : place + 1] for place in gate_matrices]
    return wide[:, :, np.array(of_wide, int)], gate[..., np.array(of_gate, int)], jnp.concatenate(columns, -1)


def _split(rule: Rule, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Concatenated outputs of matrix memories, (..., c, m D + 2) -> (..., c, m, D) and (..., c, 2)."""
    return rows[..., : -len(GATES)].reshape(*rows.shape[:-1], rule.wide, -1), rows[..., -len(GATES) :]


def _generate(rule: Rule, scale: jax.Array, source: Memories, tokens: _Tokens) -> _Generated:
    """Keys, values, rates and targets of a chunk, all read from `source` (Eq. 86-87)."""
    part = lambda name, x: x if name in rule.self_modified else jnp.zeros_like(x)
    memory_axis = -2 if rule.kind == 'matrix' else -3
    wide, gates = _outputs(rule, source, tokens.key)
    _, to_key, to_value, *to_query = jnp.unstack(wide, axis=memory_axis)
    key = normalize(tokens.key + part('key', to_key))
    value = normalize(tokens.value + part('value', to_value))
    query = normalize(tokens.query + to_query[0]) if rule.adaptive_query else tokens.query
    if rule.kind == 'matrix':  # values and keys in one product
        at_value, at_key = jnp.split(product(jnp.concatenate([value, key], -2), source.first), 2, -2)
        wide_hat, gate_hat = _split(rule, at_value)
    else:
        (wide_hat, gate_hat), at_key = _outputs(rule, source, value), None
    wide_hat = part('target', wide_hat)
    log_alpha = -scale[..., None] * jax.nn.softplus(tokens.alpha + part('alpha', gates[..., 1]))
    if not rule.retention:
        log_alpha = jnp.zeros_like(log_alpha)
    eta = jax.nn.sigmoid(tokens.eta + part('eta', gates[..., 0])) * largest_rate(rule, jnp.exp(log_alpha))
    rate = eta if tokens.push is None else eta * tokens.push
    wide_target = normalize(jnp.expand_dims(value, memory_axis) + wide_hat)
    return _Generated(query, key, wide_target, jnp.tanh(gate_hat), eta, log_alpha, rate, tokens.momentum, at_key)


def largest_rate(rule: Rule, alpha: jax.Array) -> jax.Array:
    """Bound of eta under which no step grows the memory along a unit key.

    The eigenvalue along k is alpha - 2 eta for token-wise L2 with DGD and alpha - eta without. Anchored gradients without
    DGD have no erasure within the chunk: their rates sum to at most one.
    """
    if rule.gradient == 'chunk' and rule.dgd == 'none':
        return jnp.full_like(alpha, 1.0 / max(rule.chunk_size, rule.projection_chunk_size))
    largest = alpha if rule.positive_eigenvalues else 1.0 + alpha
    return largest if rule.dgd == 'none' else 0.5 * largest


def _write_matrix(rule: Rule, generated: _Generated, anchor: Memories, running: Memories, momentum: Memories | None, rest: Memories | None):
    """Outputs and (running, momentum) after a chunk of writes to matrix memories."""
    wide_target = generated.wide_target
    targets = jnp.concatenate([wide_target.reshape(*wide_target.shape[:-2], -1), generated.gate_target], -1)
    error, erase = -targets, generated.eta * (1.0 if rule.dgd == 'none' else 2.0)
    outputs = generated.outputs if anchor is running else None
    if rule.gradient == 'chunk':
        error += product(generated.key, anchor.first) if outputs is None else outputs
        erase = None if rule.dgd == 'none' else generated.eta
    decays = chunk.chunk_decays(generated.log_alpha, momentum=generated.momentum)
    pushed = None if momentum is None else momentum.first
    rest = None if rest is None else rest.first
    writes = chunk.layer_writes(
        decays, generated.key, error, generated.rate, running.first, pushed, erase=erase, outputs=outputs, rest=rest
    )
    first, pushed_after = chunk.weight_after(decays, writes, running.first, pushed, rest=rest)
    width = generated.query.shape[-1]
    if rule.read == 'anchor':
        y = generated.query @ anchor.first[..., :width]
    else:
        y = _read_columns(decays, writes, generated.query, running.first, pushed, rest, slice(width))
    return y, (Memories(first, None, None), None if momentum is None else Memories(pushed_after, None, None))


def _read_columns(decays, writes: chunk.LayerWrites, queries, weight, momentum, rest, columns: slice) -> jax.Array:
    """Running read of some of a layer's outputs."""
    cut = lambda x: None if x is None else x[..., columns]
    some = chunk.LayerWrites(writes.inputs, cut(writes.pushes), cut(writes.erasures))
    return chunk.read_running(decays, some, queries, cut(weight), cut(momentum), rest=cut(rest))


def _write_mlp(rule: Rule, generated: _Generated, anchor: Memories, running: Memories, momentum: Memories | None, rest: Memories | None):
    """Outputs and (running, momentum) after a chunk of writes to MLP memories, and matrices beside them, each layer by its own input."""
    key, eta, rate, wide_count = generated.key, generated.eta, generated.rate, anchor.wide.shape[-3]
    of_first_layers = product(key, anchor.first)
    rows, of_matrices = _cut(rule, anchor, of_first_layers)
    hidden, slope = _activate(rows)
    wide_rows, gate_rows = jnp.split(hidden, [wide_count], -3)
    wide_output, gate_output = product(wide_rows, anchor.wide), product(gate_rows, anchor.gate)
    wide_target, gate_target, matrix_target = _targets(rule, generated)
    wide_error = wide_output - wide_target
    gate_error = gate_output - jnp.moveaxis(gate_target, -1, -2)[..., None]
    back = jnp.concatenate([inner(wide_error, anchor.wide), inner(gate_error, anchor.gate)], -3) * slope
    back = scale_rows(back, damping(rule, eta[..., None, :], _steepness(anchor, slope), erased=rule.dgd != 'none'))
    # Rows that the erasures would compute again, if the weights are those of the anchor.
    known = (of_first_layers, wide_output, gate_output) if anchor is running else (None,) * 3
    decays = chunk.chunk_decays(generated.log_alpha, momentum=generated.momentum)
    each = jax.tree.map(lambda x: jnp.expand_dims(x, 2), decays)
    shrink = damping(rule, eta[..., None, :], square_norms(hidden), erased=rule.dgd == 'per_layer')
    of_first, of_second = _erasures(rule, each, key, hidden, eta[..., None, :], shrink)
    first, *second = zip(*(_layers(x) for x in (running, momentum, rest)), strict=True)
    back = _side_by_side(back.shape[2], back)
    if of_matrices is not None:
        back = jnp.concatenate([back, of_matrices - matrix_target], -1)
    first_writes = chunk.layer_writes(decays, key, back, rate, *first[:2], outputs=known[0], rest=first[2], **of_first)
    after = [chunk.weight_after(decays, first_writes, *first[:2], rest=first[2])]
    writes, parts = [], (slice(wide_count), slice(wide_count, None))
    rows = zip(parts, (wide_rows, gate_rows), (wide_error, gate_error), known[1:], second, strict=True)
    for part, inputs, error, outputs, weights in rows:
        cut = {name: x[:, :, part] for name, x in of_second.items()}
        pushing = rate[..., None, :] * shrink[:, :, part]
        writes.append(chunk.layer_writes(each, inputs, error, pushing, *weights[:2], outputs=outputs, rest=weights[2], **cut))
        after.append(chunk.weight_after(each, writes[-1], *weights[:2], rest=weights[2]))
    y = _read_mlp(rule, generated.query, anchor, decays, first_writes, writes[0], first, second[0])
    return y, tuple(None if part[0] is None else Memories(*part) for part in zip(*after, strict=True))


def _erasures(rule: Rule, decays: chunk.ChunkDecays, key: jax.Array, hidden: jax.Array, eta: jax.Array, shrink: jax.Array):
    """What `chunk.layer_writes` is told of the erasures of the first layers, and of all memories' second ones: all systems in one.

    Args:
        rule, key, hidden: of the chunk; hidden units (B, H, m + 2, c, F).
        decays: with an axis for the memories.
        eta: (B, H, 1, c).
        shrink: (B, H, m + 2, c) the second layers' `damping`.
    """
    if rule.dgd == 'none':
        return {}, {}
    if rule.dgd == 'input_only':
        return dict(erase=eta[:, :, 0]), {}
    first, second, erase = chunk.overlaps(key, key)[:, :, None], chunk.overlaps(hidden, hidden), eta * shrink
    inverse = chunk.erasure_inverse(decays, jnp.concatenate([first, second], 2), jnp.concatenate([eta, erase], 2))
    of_first = dict(erase=eta, gram=first, inverse=inverse[:, :, :1])
    return {name: x[:, :, 0] for name, x in of_first.items()}, dict(erase=erase, gram=second, inverse=inverse[:, :, 1:])


def _steepness(anchor: Memories, slope: jax.Array) -> jax.Array:
    """Squared norm of the outputs' derivative with respect to z, (..., m + 2, c, F) -> (..., m + 2, c)."""
    rows = jnp.concatenate([square_norms(anchor.wide), square_norms(anchor.gate)], -2)
    return jnp.einsum('...f,...cf->...c', rows, slope**2, precision=jax.lax.Precision.HIGHEST)


def damping(rule: Rule, eta: jax.Array, curvature: jax.Array, *, erased: bool) -> jax.Array:
    """Factor 1 / (1 + eta curvature) of a layer's rate, under which its step does not overshoot (Eq. 57 for any norm).

    Steps of a layer that is not erased add up over the chunk.
    """
    count = 1 if erased else max(rule.chunk_size, rule.projection_chunk_size)
    return 1.0 / (1.0 + count * eta * curvature)


def _layers(memories: Memories | None) -> tuple:
    return (None, None, None) if memories is None else tuple(memories)


def _read_mlp(rule: Rule, query, anchor: Memories, decays, first_writes, second_writes, first, second) -> jax.Array:
    """M_memory at the queries; `first` and `second` are (weight, momentum, rest) of its layers."""
    columns = _memory_columns(rule, anchor)
    rows = query @ anchor.first[..., columns] if rule.read == 'anchor' else _read_columns(decays, first_writes, query, *first, columns)
    if 'memory' in rule.matrix_memories:
        return rows
    hidden = jax.nn.silu(rows)
    if rule.read == 'anchor':
        return hidden @ anchor.wide[..., 0, :, :]
    one = lambda x: None if x is None else x[..., 0, :, :]
    return chunk.read_running(
        decays, chunk.LayerWrites(*map(one, second_writes)), hidden, one(second[0]), one(second[1]), rest=one(second[2])
    )


def self_modifying_reference(
    inputs: Inputs,
    retention_scale: jax.Array,
    initial: Memories,
    *,
    rule: Rule,
    segment_ids: jax.Array | None = None,
) -> jax.Array:
    """As `self_modifying` without a carried state, token by token, the inner gradient by automatic differentiation.

    Returns:
        (B, T, H, D) outputs of M_memory.
    """

    def one_head(tokens: Inputs, ids: jax.Array | None, scale: jax.Array, start: Memories) -> jax.Array:
        momentum = jax.tree.map(jnp.zeros_like, start)
        changes = jnp.zeros(tokens.eta.shape, bool) if ids is None else jnp.concatenate([jnp.zeros(1, bool), ids[1:] != ids[:-1]])
        step = lambda carry, xs: _token(rule, scale, start, carry, xs)
        return jax.lax.scan(step, (start, momentum, start, start), (tokens, jnp.arange(tokens.eta.shape[0]), changes))[1]

    heads = jax.vmap(one_head, in_axes=(1, None, 0, 0), out_axes=1)
    return jax.vmap(heads, in_axes=(0, 0, None, None))(inputs, segment_ids, retention_scale, _widened(initial))


def _token(rule: Rule, scale: jax.Array, start: Memories, carry, xs):
    """One token of one head; carry is (running, momentum, source, anchor of M_memory)."""
    running, momentum, source, anchor = carry
    token, index, change = xs
    choose = lambda flag, new, old: jax.tree.map(lambda a, b: jnp.where(flag, a, b), new, old)
    fresh = change & (index % rule.base == 0)
    running, momentum = choose(fresh, start, running), choose(fresh, jax.tree.map(jnp.zeros_like, start), momentum)
    source = choose(index % rule.projection_chunk_size == 0, running, source)
    anchor = choose(index % rule.chunk_size == 0, running, anchor)
    batched = jax.tree.map(lambda x: x[0], _static(jax.tree.map(lambda x: x[None, None, None, None], token), start.first.dtype))
    made = jax.tree.map(lambda x: x[0, 0], _generate(rule, scale[None, None], jax.tree.map(lambda x: x[None, None], source), batched))

    def objective(memories: Memories) -> jax.Array:
        wide, gates = _outputs(rule, memories, made.key)
        return 0.5 * jnp.sum((wide - made.wide_target) ** 2) + 0.5 * jnp.sum((gates - made.gate_target) ** 2)

    at = running if rule.gradient == 'token' else _join(rule, anchor, source)
    gradient, eta, alpha = jax.grad(objective)(at), made.eta[0], jnp.exp(made.log_alpha[0])
    rest = start if rule.decay_to == 'init' else jax.tree.map(jnp.zeros_like, start)
    beta = 0.0 if token.momentum is None else jax.nn.sigmoid(token.momentum)
    inputs, rates, erasures = _layer_inputs(rule, at, made.key[0], eta)
    momentum = jax.tree.map(lambda s, g, rate: beta * s - (1.0 - beta) * rate * g, momentum, gradient, rates)
    erased = jax.tree.map(_erase, running, inputs, erasures)
    if rule.dgd == 'none':
        erased = jax.tree.map(jnp.zeros_like, running)
    elif rule.dgd == 'input_only':
        erased = jax.tree.map(jnp.zeros_like, running)._replace(first=erased.first)
    keep = lambda w, r, e, s: alpha * w + (1.0 - alpha) * r - e + s
    running = jax.tree.map(keep, running, rest, erased, momentum)
    seen = _join(rule, anchor, source) if rule.read == 'anchor' else running
    y = _outputs(rule, seen, made.query)[0][0, 0]
    return (running, momentum, source, anchor), y


def _erase(weight: jax.Array, x: jax.Array, rate: jax.Array) -> jax.Array:
    """The DGD term eta x (x^T W) of one layer or a stack of layers."""
    return rate * x[..., :, None] * jnp.einsum('...i,...io->...o', x, weight)[..., None, :]


def _layer_inputs(rule: Rule, at: Memories, key: jax.Array, eta: jax.Array) -> tuple[Memories, Memories, Memories]:
    """Each layer's own input at one key, its learning rate and its rate of erasure, broadcastable to the layer."""
    if rule.kind == 'matrix':
        return Memories(key, None, None), Memories(eta, None, None), Memories(eta, None, None)
    rows, of_matrices = _cut(rule, at, key[None] @ at.first)
    hidden, slope = _activate(rows)
    first = eta * damping(rule, eta, _steepness(at, slope)[:, 0], erased=rule.dgd != 'none')
    hidden, wide = hidden[:, 0], at.wide.shape[-3]
    rates = (eta * damping(rule, eta, jnp.sum(hidden**2, -1), erased=rule.dgd == 'per_layer'))[:, None, None]
    second = rates[:wide], rates[wide:]
    columns = jnp.repeat(first, hidden.shape[-1])
    if of_matrices is not None:
        columns = jnp.concatenate([columns, jnp.full(of_matrices.shape[-1], eta)])
    return Memories(key, hidden[:wide], hidden[wide:]), Memories(columns[None], *second), Memories(eta, *second)
