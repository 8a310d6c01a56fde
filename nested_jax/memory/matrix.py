"""Matrix memories: linear attention, the (gated) delta rule and delta gradient descent (DGD).

A memory is a matrix S that is written once a token and read as y_t = S_t^T q_t. All the rules here have one form,

    S_t = a_t S_{t-1} - erase_t k_t (k_t^T S_{t-1}) + rate_t k_t u_t^T

with u_t = v_t, or v_t - A^T k_t where gradients are taken at the anchor A, the state a chunk starts from. So one chunk-parallel
algorithm serves them all. Within a chunk the net writes r_t = rate_t u_t - erase_t S_{t-1}^T k_t are affine in the chunk's start state S_0,

    R = U - W S_0,    (I + tril(erase_t A_{t-1,j} k_t.k_j, -1)) [U W] = [rate V, erase a_{t-1} K]

with A_tj = prod_{j<i<=t} a_i (the WY form of arXiv:2412.06464v3), hence so is the chunk's last state. U, W and the state's transition
are computed for all chunks at once; a scan over chunks then only multiplies a state by a matrix; the reads are again computed for all
chunks at once.

Einsum letters: b batch, n chunks, h head, t, i, j tokens of a chunk, k key dim, v value dim.
"""

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nested_jax.memory.chunk import chunk_decays, invert_unit_lower

# On CPU, chunks go in groups of about this many key elements, rematerialised one by one: a working set that stays in
# the cache makes forward and backward 1.5 times as fast and takes a quarter of the memory (8 x 1024 tokens, 4 heads of 32).
_GROUP_ELEMENTS = 2**17
_LOG_ZERO = -1e4  # exp of it is exactly zero
_HIGHEST = jax.lax.Precision.HIGHEST


class MemoryState(NamedTuple):
    """State of a memory with a chunk grid."""

    running: jax.Array  # (B, H, D_k, D_v) the memory after the last token
    anchor: jax.Array  # (B, H, D_k, D_v) the memory at the start of the open chunk
    position: jax.Array  # (B,) int32 tokens since the start; the open chunk holds position % chunk_size of them


class _Rule(NamedTuple):
    """The recurrence of the module's header, with gates (B, T, H)."""

    log_decay: jax.Array | None  # log a_t, or (B, T, H, D_k) per channel without erasure; None where a_t = 1
    rate: jax.Array | None = None  # None where rate_t = 1
    erase: jax.Array | None = None  # None where nothing is erased
    anchored: bool = False  # u_t = v_t - A^T k_t
    read: str = 'running'


class _Tokens(NamedTuple):
    """Inputs in chunks."""

    q: jax.Array  # (N, B, H, C, D_k)
    k: jax.Array
    v: jax.Array  # (N, B, H, C, D_v)
    log_decay: jax.Array | None  # (N, B, H, C[, D_k]), as the gates below
    rate: jax.Array | None
    erase: jax.Array | None
    count: jax.Array | None  # (N, B, 1, C) segments begun up to each token
    entering: jax.Array | None  # (N, B, 1, 1) segments begun before the chunk


class _Segments(NamedTuple):
    """Where the tokens of each chunk began."""

    same: jax.Array  # (N, B, 1, C, C) two tokens are of one segment
    carried: jax.Array  # (N, B, 1, C) the token's segment began before its chunk


class _Chunks(NamedTuple):
    """What reads and writes of all chunks need besides the net writes; 'fresh' for segments that began inside the chunk."""

    reads: jax.Array  # (N, B, H, C, D_k) queries times what is left of the chunk's start state
    fresh_reads: jax.Array | None  # the same of the initial state
    scores: jax.Array | None  # (N, B, H, C, C) A_tj q_t.k_j; None where reads see the anchor only
    tails: jax.Array  # (N, B, H, C, D_k) keys times what is left of their write at the chunk's end
    keep: jax.Array  # (N, B, H, 1 or D_k, 1) what is left of the start state at the chunk's end
    fresh_keep: jax.Array | None


def linear_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array | None = None,
    *,
    state: jax.Array | None = None,
    initial: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    chunk_size: int = 64,
) -> tuple[jax.Array, jax.Array]:
    """Linear attention with optional decay: S_t = e^{g_t} S_{t-1} + k_t v_t^T, y_t = S_t^T q_t.

    Scalar decays give RetNet, Mamba-2 and simple GLA, one per key channel GLA and HGRN2.

    Args:
        q, k: (B, T, H, D_k) queries and keys, used as they are.
        v: (B, T, H, D_v) values.
        log_decay: (B, T, H) or (B, T, H, D_k) g_t <= 0, -inf allowed; None for no decay.
        state: (B, H, D_k, D_v) a state returned earlier, or None to start from `initial`.
        initial: (H, D_k, D_v) where a sequence and each new segment start from, zeros when None.
        segment_ids: (B, T) integers; the state restarts from `initial` at each token whose id differs from the token's before.
            The first token of a call continues `state`.
        chunk_size: tokens computed in parallel; does not change the result.

    Returns:
        (B, T, H, D_v) y in q's dtype, and the last state in float32 (float64 for float64 inputs).

    Raises:
        ValueError: for shapes that don't fit one another or a chunk_size below 1.
    """
    chunk_size = _check(q, k, v, {}, state, initial, segment_ids, chunk_size, grid=False)
    _check_decay(log_decay, k)
    if q.shape[1] == 1:
        return linear_attention_reference(q, k, v, log_decay, state=state, initial=initial, segment_ids=segment_ids)
    rule = _Rule(log_decay)
    return _chunked(rule, q, k, v, state, initial, segment_ids, chunk_size)


def linear_attention_reference(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array | None = None,
    *,
    state: jax.Array | None = None,
    initial: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    chunk_size: int = 64,
) -> tuple[jax.Array, jax.Array]:
    """Token-by-token twin of `linear_attention`: same arguments, results and errors."""
    _check(q, k, v, {}, state, initial, segment_ids, chunk_size, grid=False)
    _check_decay(log_decay, k)

    def write(memory, anchor, key, value, decay):
        return decay[..., None] * memory + _outer(key, value)

    decay = _decay(log_decay, k)
    gates = (decay if decay.ndim == 4 else decay[..., None],)
    return _recurrent(write, q, k, v, gates, state, initial, segment_ids)


def delta_rule(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    beta: jax.Array,
    log_decay: jax.Array | None = None,
    *,
    state: jax.Array | None = None,
    initial: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    chunk_size: int = 64,
) -> tuple[jax.Array, jax.Array]:
    """(Gated) delta rule: S' = e^{g_t} S_{t-1}, S_t = S' + beta_t k_t (v_t - S'^T k_t)^T, y_t = S_t^T q_t.

    Eq. (10), arXiv:2412.06464v3.

    Args:
        q, k: (B, T, H, D_k) queries and keys, used as they are; stable for |k| = 1 and beta in (0, 2).
        v: (B, T, H, D_v) values.
        beta: (B, T, H) writing strengths.
        log_decay: (B, T, H) g_t <= 0, -inf allowed; None for no decay.
        state, initial, segment_ids, chunk_size: as in `linear_attention`.

    Returns:
        (B, T, H, D_v) y in q's dtype, and the last state in float32 (float64 for float64 inputs).

    Raises:
        ValueError: for shapes that don't fit one another or a chunk_size below 1.
    """
    chunk_size = _check(q, k, v, {'beta': beta, 'log_decay': log_decay}, state, initial, segment_ids, chunk_size, grid=False)
    if q.shape[1] == 1:
        return delta_rule_reference(q, k, v, beta, log_decay, state=state, initial=initial, segment_ids=segment_ids)
    beta = beta.astype(_wide(q, k, v))
    rule = _Rule(log_decay, beta, beta if log_decay is None else beta * _decay(log_decay, k))
    return _chunked(rule, q, k, v, state, initial, segment_ids, chunk_size)


def delta_rule_reference(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    beta: jax.Array,
    log_decay: jax.Array | None = None,
    *,
    state: jax.Array | None = None,
    initial: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    chunk_size: int = 64,
) -> tuple[jax.Array, jax.Array]:
    """Token-by-token twin of `delta_rule`: same arguments, results and errors."""
    _check(q, k, v, {'beta': beta, 'log_decay': log_decay}, state, initial, segment_ids, chunk_size, grid=False)

    def write(memory, anchor, key, value, beta, decay):
        memory = decay[..., None] * memory
        return memory + beta[..., None] * _outer(key, value - _recall(memory, key))

    gates = (beta[..., None], _decay(log_decay, k)[..., None])
    return _recurrent(write, q, k, v, gates, state, initial, segment_ids)


def delta_gradient_descent(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    eta: jax.Array,
    log_alpha: jax.Array,
    *,
    objective: str = 'l2',
    gradient: str = 'token',
    read: str = 'running',
    state: jax.Array | MemoryState | None = None,
    initial: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    chunk_size: int = 64,
) -> tuple[jax.Array, jax.Array | MemoryState]:
    """Delta gradient descent: S_t = (alpha_t I - eta_t k_t k_t^T) S_{t-1} - eta_t grad_t.

    Eq. (88), arXiv:2512.24695v1, transposed; with gradient='chunk' its Eq. (92) and (93), with the sign of (92) corrected.

    Args:
        q, k: (B, T, H, D_k) queries and keys, used as they are. For |k| = 1, 'l2' and 'token' it is stable for eta <= (1 + alpha) / 2.
        v: (B, T, H, D_v) values.
        eta: (B, T, H) learning rates.
        log_alpha: (B, T, H) log of the retention, <= 0, -inf allowed. A token with eta = 0 and log_alpha = 0 writes nothing.
        objective: 'l2' for the gradient k (S^T k - v)^T of 1/2 |S^T k - v|^2, 'dot' for the gradient -k v^T of -v^T S^T k.
        gradient: 'token' takes it at S_{t-1}, which makes the result independent of chunk_size; 'chunk' at the chunk's first state.
        read: 'running' reads y_t = S_t^T q_t, 'anchor' reads the chunk's first state (Eq. 90 as printed).
        state: what an earlier call with the same options returned, or None to start from `initial`.
        initial, segment_ids: as in `linear_attention`. A segment that begins inside a chunk reads `initial` as its anchor until the chunk
            ends, so its result depends on where it lies on the grid.
        chunk_size: tokens computed in parallel, and the grid of 'chunk' and 'anchor', which counts from the first call's first token.

    Returns:
        (B, T, H, D_v) y in q's dtype, and the last state in float32 (float64 for float64 inputs): a `MemoryState` with
        gradient='chunk' or read='anchor', otherwise the running memory (B, H, D_k, D_v).

    Raises:
        ValueError: for an unknown option, shapes that don't fit one another or a chunk_size below 1.
    """
    grid = _check_options(objective, gradient, read)
    chunk_size = _check(q, k, v, {'eta': eta, 'log_alpha': log_alpha}, state, initial, segment_ids, chunk_size, grid=grid)
    if q.shape[1] == 1:
        options = dict(objective=objective, gradient=gradient, read=read, chunk_size=chunk_size)
        common = dict(state=state, initial=initial, segment_ids=segment_ids)
        return delta_gradient_descent_reference(q, k, v, eta, log_alpha, **options, **common)
    eta = eta.astype(_wide(q, k, v))
    anchored = (objective, gradient) == ('l2', 'chunk')
    erase = 2 * eta if (objective, gradient) == ('l2', 'token') else eta
    return _chunked(_Rule(log_alpha, eta, erase, anchored, read), q, k, v, state, initial, segment_ids, chunk_size, grid=grid)


def delta_gradient_descent_reference(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    eta: jax.Array,
    log_alpha: jax.Array,
    *,
    objective: str = 'l2',
    gradient: str = 'token',
    read: str = 'running',
    state: jax.Array | MemoryState | None = None,
    initial: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    chunk_size: int = 64,
) -> tuple[jax.Array, jax.Array | MemoryState]:
    """Token-by-token twin of `delta_gradient_descent`: same arguments, results, errors and grid."""
    grid = _check_options(objective, gradient, read)
    chunk_size = _check(q, k, v, {'eta': eta, 'log_alpha': log_alpha}, state, initial, segment_ids, chunk_size, grid=grid)

    def write(memory, anchor, key, value, eta, alpha):
        error = -value if objective == 'dot' else _recall(memory if gradient == 'token' else anchor, key) - value
        retained = alpha[..., None] * memory - eta[..., None] * _outer(key, _recall(memory, key))
        return retained - eta[..., None] * _outer(key, error)

    gates = (eta[..., None], _decay(log_alpha, k)[..., None])
    return _recurrent(write, q, k, v, gates, state, initial, segment_ids, grid=chunk_size if grid else None, read=read)


# Arguments


def _check(q, k, v, gates: dict[str, Any], state, initial, segment_ids, chunk_size, *, grid: bool) -> int:
    """Raise ValueError for arguments that don't fit one another; return chunk_size as an int."""
    if q.ndim != 4 or q.shape[1] < 1:
        raise ValueError(f'q must be (batch, time >= 1, heads, dim), got {q.shape}')
    batch, time, heads, dim = q.shape
    if k.shape != q.shape:
        raise ValueError(f"k must have q's shape {q.shape}, got {k.shape}")
    if v.ndim != 4 or v.shape[:3] != q.shape[:3]:
        raise ValueError(f'v must be {q.shape[:3]} and a value dim, got {v.shape}')
    memory = (heads, dim, v.shape[3])
    expected = {name: (gate, (batch, time, heads)) for name, gate in gates.items()}
    expected |= {'initial': (initial, memory), 'segment_ids': (segment_ids, (batch, time))}
    if state is not None and isinstance(state, MemoryState) != grid:
        raise ValueError(f'state must be {"a MemoryState" if grid else "an array"} with these options, got {type(state).__name__}')
    if isinstance(state, MemoryState):
        parts = zip(MemoryState._fields, state, ((batch, *memory), (batch, *memory), (batch,)), strict=True)
        expected |= {f'state.{name}': (part, shape) for name, part, shape in parts}
    else:
        expected['state'] = (state, (batch, *memory))
    for name, (array, shape) in expected.items():
        if array is not None and array.shape != shape:
            raise ValueError(f'{name} must have shape {shape}, got {array.shape}')
    if segment_ids is not None and not jnp.issubdtype(segment_ids.dtype, jnp.integer):
        raise ValueError(f'segment_ids must be integers, got {segment_ids.dtype}')
    return _check_chunk_size(chunk_size)


def _check_chunk_size(chunk_size: int) -> int:
    try:
        size = operator.index(chunk_size)
    except TypeError:
        size = 0
    if size < 1:
        raise ValueError(f'chunk_size must be an integer of at least 1, got {chunk_size!r}')
    return size


def _check_decay(log_decay: jax.Array | None, k: jax.Array) -> None:
    if log_decay is not None and log_decay.shape not in (k.shape[:3], k.shape):
        raise ValueError(f'log_decay must have shape {k.shape[:3]} or {k.shape}, got {log_decay.shape}')


def _check_options(objective: str, gradient: str, read: str) -> bool:
    """Raise ValueError for an unknown option; return whether they make the chunk grid part of the result."""
    allowed = {'objective': ('l2', 'dot'), 'gradient': ('token', 'chunk'), 'read': ('running', 'anchor')}
    for (name, choices), value in zip(allowed.items(), (objective, gradient, read), strict=True):
        if value not in choices:
            raise ValueError(f'{name} must be one of {choices}, got {value!r}')
    return gradient == 'chunk' or read == 'anchor'


def _wide(*arrays: jax.Array) -> jnp.dtype:
    """The dtype of states, decays and triangular systems."""
    return jnp.promote_types(jnp.result_type(*arrays), jnp.float32)


def _decay(log_decay: jax.Array | None, k: jax.Array) -> jax.Array:
    """(B, T, H[, D_k]) a_t, ones when None."""
    return jnp.ones(k.shape[:3], _wide(k)) if log_decay is None else jnp.exp(log_decay.astype(_wide(k)))


def _segment_count(segment_ids: jax.Array) -> jax.Array:
    """(B, T) segments that began in this call up to each token. Ids may return, so the ids themselves don't tell segments apart."""
    return jnp.cumsum(jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0))), axis=1)


def _start(state, initial, batch: int, memory: tuple[int, int, int], dtype) -> tuple[jax.Array, jax.Array]:
    """The (B, H, D_k, D_v) running memory to start from, and the (1, H, D_k, D_v) memory of new segments."""
    fresh = jnp.zeros((1, *memory), dtype) if initial is None else initial.astype(dtype)[None]
    running = state.running if isinstance(state, MemoryState) else state
    return (jnp.broadcast_to(fresh, (batch, *memory)) if running is None else running.astype(dtype)), fresh


# Token by token


def _outer(key: jax.Array, value: jax.Array) -> jax.Array:
    return key[..., :, None] * value[..., None, :]


def _recall(memory: jax.Array, key: jax.Array) -> jax.Array:
    return jnp.einsum('bhkv,bhk->bhv', memory, key, precision=_HIGHEST)


def _recurrent(
    write: Callable[..., jax.Array], q, k, v, gates: tuple[jax.Array, ...], state, initial, segment_ids, *, grid=None, read='running'
):  # fmt: skip
    """Scan `write(memory, anchor, key, value, *gates)` over tokens; `grid` is the chunk size where there is one."""
    dtype, batch = _wide(q, k, v), q.shape[0]
    memory, fresh = _start(state, initial, batch, (*k.shape[2:], v.shape[3]), dtype)
    anchor, position = (state.anchor.astype(dtype), state.position) if grid and state is not None else (memory, jnp.zeros(batch, jnp.int32))
    count = jnp.zeros(q.shape[:2], jnp.int32) if segment_ids is None else _segment_count(segment_ids)
    begins = jnp.diff(count, axis=1, prepend=0) > 0

    def step(carry, token):
        memory, anchor, position = carry
        query, key, value, begin, *gates = token
        anchor = memory if grid is None else jnp.where((position % grid == 0)[:, None, None, None], memory, anchor)
        memory, anchor = (jnp.where(begin[:, None, None, None], fresh, part) for part in (memory, anchor))
        memory = write(memory, anchor, key, value, *gates)
        return (memory, anchor, position + 1), _recall(memory if read == 'running' else anchor, query)

    tokens = (*(x.astype(dtype) for x in (q, k, v)), begins, *(gate.astype(dtype) for gate in gates))
    tokens = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), tokens)
    (memory, anchor, position), y = jax.lax.scan(step, (memory, anchor, position), tokens)
    y = jnp.moveaxis(y, 0, 1).astype(q.dtype)
    if grid is None:
        return y, memory
    return y, MemoryState(memory, jnp.where((position % grid == 0)[:, None, None, None], memory, anchor), position)


# All chunks at once


def _chunked(rule: _Rule, q, k, v, state, initial, segment_ids, chunk_size: int, *, grid: bool = False):
    """The chunk-parallel form of `rule`."""
    dtype, (batch, time) = _wide(q, k, v), q.shape[:2]
    phase = state.position % chunk_size if grid and state is not None else None
    running, fresh = _start(state, initial, batch, (*k.shape[2:], v.shape[3]), dtype)
    anchor = None if phase is None else jnp.where((phase == 0)[:, None, None, None], running, state.anchor.astype(dtype))
    tokens, groups = _tokens(rule, q, k, v, segment_ids, phase, chunk_size, dtype)

    def group(carry, tokens):
        running, anchor = carry
        running, starts, y = _run_chunks(rule, tokens, running, anchor, fresh, jnp.result_type(q, k, v))
        return (running, None if anchor is None else running), (y.astype(q.dtype), starts if grid else None)

    if groups == 1:
        (last, _), (y, starts) = group((running, anchor), tokens)
    else:
        pieces = jax.tree.map(lambda x: x.reshape(groups, -1, *x.shape[1:]), tokens)
        (last, _), out = jax.lax.scan(jax.checkpoint(group, prevent_cse=False), (running, anchor), pieces)
        y, starts = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), out)
    y = _from_chunks(y, phase, time)
    if not grid:
        return y, last
    begin = jnp.zeros(batch, jnp.int32) if phase is None else state.position
    starts = starts if phase is None else starts.at[0].set(anchor)
    return y, MemoryState(last, _open_anchor(starts, last, fresh, tokens, begin % chunk_size + time, chunk_size), begin + time)


def _tokens(rule: _Rule, q, k, v, segment_ids, phase, chunk_size: int, dtype) -> tuple[_Tokens, int]:
    """Cut the inputs into chunks, and say into how many groups of equal size the chunks go."""
    batch, time, heads, dim = q.shape
    size = min(chunk_size, time) if phase is None else chunk_size
    if rule.log_decay is not None and rule.log_decay.ndim == 4:
        size = 1 << (size - 1).bit_length()
    # A row whose open chunk holds `phase` tokens is shifted right by as many, so that all rows lie on one grid.
    count = -(-(time + (0 if phase is None else chunk_size - 1)) // size)
    groups = 1
    if jax.default_backend() == 'cpu':
        groups = -(-count // max(1, _GROUP_ELEMENTS // (batch * size * heads * max(dim, v.shape[3]))))
    length = groups * -(-count // groups) * size
    split = lambda x: _to_chunks(_align(x, phase, length), size)
    widen = lambda x: None if x is None else split(x.astype(dtype))
    # Sums of a clipped -inf stay finite, so that masked ones contribute 0 and not NaN.
    log_decay = None if rule.log_decay is None else jnp.maximum(widen(rule.log_decay), _LOG_ZERO)
    tokens = _Tokens(split(q), split(k), split(v), log_decay, widen(rule.rate), widen(rule.erase), None, None)
    if segment_ids is None:
        return tokens, groups
    begun = _to_chunks(_align(_segment_count(segment_ids), phase, length, edge=True)[..., None], size)
    entering = jnp.concatenate([jnp.zeros_like(begun[:1, ..., -1:]), begun[:-1, ..., -1:]])
    return tokens._replace(count=begun, entering=entering), groups


def _run_chunks(rule: _Rule, tokens: _Tokens, running, anchor, fresh, dtype):
    """Write and read consecutive chunks.

    Args:
        rule: its options; its gates are those of `tokens`.
        tokens: in chunks.
        running: (B, H, D_k, D_v) memory at the first chunk's start.
        anchor: the same of the first chunk's anchor; None when it equals `running`.
        fresh: (1, H, D_k, D_v) memory of new segments.
        dtype: of the reads' operands.

    Returns:
        The last memory, the memories (N, B, H, D_k, D_v) chunks start from, and y (N, B, H, C, D_v).
    """
    segments = None
    if tokens.count is not None:
        segments = _Segments(tokens.count[..., :, None] == tokens.count[..., None, :], tokens.count == tokens.entering)
    if tokens.log_decay is not None and tokens.log_decay.ndim == 5:
        chunks, u, w = _channel_chunks(tokens.q, tokens.k, tokens.log_decay, segments), tokens.v.astype(fresh.dtype), None
    else:
        chunks, u, w = _scalar_chunks(rule, tokens, fresh, segments, None if anchor is None else anchor - running)
    last, starts = _scan_states(chunks, u, w, running, fresh)
    read = starts.at[0].set(anchor) if rule.read == 'anchor' and anchor is not None else starts
    return last, starts, _read(chunks, u, w, read, fresh, dtype)


def _align(x: jax.Array, phase: jax.Array | None, length: int, *, edge: bool = False) -> jax.Array:
    """Pad (B, T, ...) to `length` tokens, row b after phase[b] of padding; zeros, or the nearest token's with `edge`."""
    time = x.shape[1]
    if phase is None:
        widths = [(0, length - time if axis == 1 else 0) for axis in range(x.ndim)]
        return jnp.pad(x, widths, mode='edge' if edge else 'constant')
    source = jnp.arange(length)[None] - phase[:, None]
    shape = source.shape + (1,) * (x.ndim - 2)
    shifted = jnp.take_along_axis(x, jnp.clip(source, 0, time - 1).reshape(shape), axis=1)
    inside = ((source >= 0) & (source < time)).reshape(shape)
    return shifted if edge else jnp.where(inside, shifted, jnp.zeros((), x.dtype))


def _to_chunks(x: jax.Array, size: int) -> jax.Array:
    """(B, N C, H, ...) to (N, B, H, C, ...)."""
    x = x.reshape(x.shape[0], -1, size, *x.shape[2:])
    return jnp.transpose(x, (1, 0, 3, 2, *range(4, x.ndim)))


def _from_chunks(y: jax.Array, phase: jax.Array | None, time: int) -> jax.Array:
    """(N, B, H, C, D) to (B, T, H, D), without the padding of `_align`."""
    y = jnp.transpose(y, (1, 0, 3, 2, 4))
    y = y.reshape(y.shape[0], -1, *y.shape[3:])
    if phase is None:
        return y[:, :time]
    return jnp.take_along_axis(y, (jnp.arange(time)[None] + phase[:, None])[..., None, None], axis=1)


def _products(log_decay: jax.Array | None, segments: _Segments | None, shape: tuple[int, ...], dtype):
    """Decay products within the chunk and within the token's segment.

    Returns:
        (..., C, C) A_tj, strictly lower A_{t-1,j}, and (..., C) products from the chunk's or segment's first token to t, and to t - 1.
    """
    if log_decay is None:
        log_decay = jnp.zeros((shape[0], 1, 1, shape[3]), dtype)
    decays = chunk_decays(log_decay)
    if segments is None:
        return decays.spans, decays.spans_before, decays.kept, decays.kept_before
    earlier = jnp.tril(segments.same, -1).astype(dtype)[:, :, 0]
    log_decay = jnp.broadcast_to(log_decay, (*earlier.shape[:2], *log_decay.shape[2:]))
    before = jnp.einsum('nbtj,nbhj->nbht', earlier, log_decay, precision=_HIGHEST)
    spans, spans_before = (jnp.where(segments.same, part, 0.0) for part in (decays.spans, decays.spans_before))
    return spans, spans_before, jnp.exp(before + log_decay), jnp.exp(before)


def _divide(segments: _Segments | None, share: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """Divide each token's (..., C) share of an earlier state between the chunk's start state and the initial state."""
    if segments is None:
        return share, None
    return jnp.where(segments.carried, share, 0.0), jnp.where(segments.carried, 0.0, share)


def _scalar_chunks(rule: _Rule, tokens: _Tokens, fresh, segments, anchor_offset):
    """Chunks with one decay a head, and their net writes R = U - W S_0.

    Args:
        rule, tokens: as for `_run_chunks`.
        fresh: (1, H, D_k, D_v) memory of new segments.
        segments: or None.
        anchor_offset: (B, H, D_k, D_v) anchor minus running memory at the start of the first chunk; None for zero.

    Returns:
        The `_Chunks`, U (N, B, H, C, D_v) and W (N, B, H, C, D_k) or None.
    """
    q, k, v, log_decay, rate, erase, *_ = tokens
    dtype, wide_k = fresh.dtype, k.astype(fresh.dtype)
    spans, spans_before, kept, before = _products(log_decay, segments, k.shape[:4], dtype)
    keep, fresh_keep = (None if x is None else x[..., -1:, None] for x in _divide(segments, kept))
    share = kept if rule.read == 'running' else jnp.ones_like(kept)
    reads, fresh_reads = (None if x is None else x[..., None] * q for x in _divide(segments, share))
    scores = None if rule.read == 'anchor' else spans * jnp.einsum('...tk,...jk->...tj', q, k, preferred_element_type=dtype)
    chunks = _Chunks(reads, fresh_reads, scores, spans[..., -1, :, None] * wide_k, keep, fresh_keep)
    if erase is None:
        return chunks, v.astype(dtype), None
    gram = jnp.einsum('...tk,...jk->...tj', k, k, precision=_HIGHEST, preferred_element_type=dtype)
    carried, begun = _divide(segments, erase * before + (rate if rule.anchored else 0.0))
    rows = rate[..., None] * v
    if begun is not None:
        rows -= begun[..., None] * _matmul(wide_k, fresh[None])
    if rule.anchored and anchor_offset is not None:
        anchored_rate = _divide(segments, rate)[0][0]
        rows = rows.at[0].add(-anchored_rate[..., None] * _matmul(wide_k[0], anchor_offset))
    solved = _solve(erase[..., None] * spans_before * gram, jnp.concatenate([rows, carried[..., None] * wide_k], -1))
    return chunks, solved[..., : v.shape[-1]], solved[..., v.shape[-1] :]


def _matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision=_HIGHEST)


@jax.custom_vjp
def _solve(strict: jax.Array, rows: jax.Array) -> jax.Array:
    """(I + strict)^-1 rows. The derivative is written out because it needs no product of two inverses."""
    return _matmul(invert_unit_lower(strict), rows)


def _solve_forward(strict, rows):
    inverse = invert_unit_lower(strict)
    solved = _matmul(inverse, rows)
    return solved, (inverse, solved)


def _solve_backward(saved, cotangent):
    inverse, solved = saved
    rows = _matmul(inverse.mT, cotangent)
    return -jnp.tril(_matmul(rows, solved.mT), -1), rows


_solve.defvjp(_solve_forward, _solve_backward)


def _channel_chunks(q, k, log_decay, segments) -> _Chunks:
    """Chunks with a decay (N, B, H, C, D_k) for each key channel; C a power of two.

    Scores of a block are those of its halves and those across its middle, where what is kept up to the middle multiplies the keys and
    what is kept from there on the queries. All exponents are sums of log decays: none is positive and none a difference of large numbers.
    """
    *outer, size, dim = q.shape
    blocks = lambda x, width: x.reshape(*outer, size // (2 * width), 2, width, x.shape[-1])
    upto, after, width = log_decay, jnp.zeros_like(log_decay), 1
    scores = jnp.sum(q * k, -1, dtype=log_decay.dtype)[..., None]
    while width < size:
        upto, after = blocks(upto, width), blocks(after, width)
        q_half = (blocks(q, width)[..., 1, :, :] * jnp.exp(upto[..., 1, :, :])).astype(q.dtype)
        k_half = (blocks(k, width)[..., 0, :, :] * jnp.exp(after[..., 0, :, :])).astype(k.dtype)
        across = jnp.einsum('...tk,...jk->...tj', q_half, k_half, preferred_element_type=log_decay.dtype)
        halves = blocks(scores, width)
        first = jnp.concatenate([halves[..., 0, :, :], jnp.zeros_like(across)], -1)
        scores = jnp.concatenate([first, jnp.concatenate([across, halves[..., 1, :, :]], -1)], -2)
        totals = upto[..., -1:, :]
        upto = jnp.concatenate([upto[..., 0, :, :], upto[..., 1, :, :] + totals[..., 0, :, :]], -2)
        after = jnp.concatenate([after[..., 0, :, :] + totals[..., 1, :, :], after[..., 1, :, :]], -2)
        width *= 2
    scores, upto, after = (x.reshape(*outer, size, -1) for x in (scores, upto, after))
    if segments is not None:
        scores = jnp.where(segments.same, scores, 0.0)
        upto = jnp.einsum('nbtj,nbhjk->nbhtk', jnp.tril(segments.same).astype(upto.dtype)[:, :, 0], log_decay, precision=_HIGHEST)
        after = jnp.where(segments.same[..., -1, :, None], after, -jnp.inf)
    kept, tails = jnp.exp(upto), jnp.exp(after) * k
    if segments is None:
        return _Chunks(kept * q, None, scores, tails, kept[..., -1, :, None], None)
    shares = [jnp.where(mask[..., None], kept, 0.0) for mask in (segments.carried, ~segments.carried)]
    return _Chunks(shares[0] * q, shares[1] * q, scores, tails, shares[0][..., -1, :, None], shares[1][..., -1, :, None])


def _scan_states(chunks: _Chunks, u, w, running, fresh) -> tuple[jax.Array, jax.Array]:
    """The last state (B, H, D_k, D_v) and the states (N, B, H, D_k, D_v) that chunks start from."""
    added = _matmul(chunks.tails.mT, u)
    if chunks.fresh_keep is not None:
        added += chunks.fresh_keep * fresh[None]
    erased = None if w is None else _matmul(chunks.tails.mT, w)

    def step(memory, chunk):
        keep, added, erased = chunk
        after = keep * memory + added
        return (after if erased is None else after - _matmul(erased, memory)), memory

    return jax.lax.scan(step, running, (chunks.keep, added, erased))


def _read(chunks: _Chunks, u, w, starts, fresh, dtype) -> jax.Array:
    """(N, B, H, C, D_v) outputs; matrix products take operands in `dtype`, the inputs' own, and accumulate in the state's."""
    product = lambda a, b: jnp.matmul(a.astype(dtype), b.astype(dtype), preferred_element_type=u.dtype)
    y = product(chunks.reads, starts)
    if chunks.fresh_reads is not None:
        y += product(chunks.fresh_reads, fresh[None])
    if chunks.scores is not None:
        y += product(chunks.scores, u if w is None else u - product(w, starts))
    return y


def _open_anchor(starts, last, fresh, tokens: _Tokens, end, chunk_size: int) -> jax.Array:
    """The state (B, H, D_k, D_v) at the start of the chunk that holds each row's next token, `end` (B,) tokens from the first chunk's start."""
    row = jnp.arange(last.shape[0])
    index = jnp.minimum(end // chunk_size, starts.shape[0] - 1)
    anchor = starts[index, row]
    if tokens.count is not None:
        carried = tokens.count[index, row, :, -1] == tokens.entering[index, row, :, -1]
        anchor = jnp.where(carried[:, :, None, None], anchor, fresh)
    return jnp.where((end % chunk_size == 0)[:, None, None, None], last, anchor)
