"""Matrix memories: linear attention, the (gated) delta rule and delta gradient descent (DGD).

A memory is a matrix S, (D_k, D_v), that is written once a token and read as y_t = S_t^T q_t. Each rule comes in a chunk-parallel form
(`matrix_chunks.py`) and as a token-by-token twin `<name>_reference` that spells out its equation. The functions below the rules serve
`dplr.py` too.

Einsum letters: b batch, h head, k key dim, v value dim.
"""

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nested_jax.memory.grid import where_rows
from nested_jax.memory.matrix_chunks import Rule, run_rule


class MemoryState(NamedTuple):
    """State of a memory with a chunk grid."""

    running: jax.Array  # (B, H, D_k, D_v) the memory after the last token
    anchor: jax.Array  # (B, H, D_k, D_v) the memory at the start of the open chunk
    position: jax.Array  # (B,) int32 tokens since the start; the open chunk holds position % chunk_size of them


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
        q, k: (B, T, H or 1, D_k) queries and keys, used as they are; one head is shared by all.
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
    chunk_size = check_arguments(q, k, v, {}, state, initial, segment_ids, chunk_size, grid=False)
    check_decay(log_decay, k, v)
    if q.shape[1] == 1:
        return linear_attention_reference(q, k, v, log_decay, state=state, initial=initial, segment_ids=segment_ids)
    if log_decay is not None and log_decay.ndim == 4:
        q, k = (jnp.broadcast_to(x, log_decay.shape) for x in (q, k))
    rule = Rule(log_decay)
    return run_chunks(rule, q, k, v, state, initial, segment_ids, chunk_size)


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
    check_arguments(q, k, v, {}, state, initial, segment_ids, chunk_size, grid=False)
    check_decay(log_decay, k, v)

    def write(memory, anchor, key, value, decay):
        return decay[..., None] * memory + outer(key, value)

    decay = decay_factors(log_decay, k)
    gates = (decay if decay.ndim == 4 else decay[..., None],)
    return run_tokens(write, q, k, v, gates, state, initial, segment_ids)


def delta_rule(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    beta: jax.Array,
    log_decay: jax.Array | None = None,
    *,
    erase: jax.Array | None = None,
    state: jax.Array | None = None,
    initial: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    chunk_size: int = 64,
    implementation: str = 'jax',
) -> tuple[jax.Array, jax.Array]:
    """(Gated) delta rule: S' = e^{g_t} S_{t-1}, S_t = S' + k_t (beta_t v_t - erase_t S'^T k_t)^T, y_t = S_t^T q_t.

    Eq. (10), arXiv:2412.06464v3, with erase = beta; with erase = b beta it is the rule of Comba for removal keys b k (arXiv:2506.02475).

    Args:
        q, k: (B, T, H or 1, D_k) queries and keys, used as they are; stable for |k| = 1 and beta in (0, 2).
        v: (B, T, H, D_v) values.
        beta: (B, T, H) writing strengths.
        log_decay: (B, T, H) g_t <= 0, -inf allowed; None for no decay.
        erase: (B, T, H) erasing strengths, beta when None; stable in (0, 2).
        state, initial, segment_ids, chunk_size: as in `linear_attention`.
        implementation: 'jax', or 'pallas_tpu' or 'pallas_gpu' for the kernels of `kernels/delta_rule.py`, which take segment_ids where
            `initial` is None, and the dtypes and sizes said there.

    Returns:
        (B, T, H, D_v) y in q's dtype, and the last state in float32 (float64 for float64 inputs).

    Raises:
        ValueError: for shapes that don't fit one another, a chunk_size below 1, an unknown implementation or what it does not take.
    """
    gates = {'beta': beta, 'log_decay': log_decay, 'erase': erase}
    size = check_arguments(q, k, v, gates, state, initial, segment_ids, chunk_size, grid=False)
    platform = _choose(implementation, None if initial is None else segment_ids)
    if platform is not None:
        common = dict(erase=erase, state=state, initial=initial, chunk_size=size, platform=platform)
        return _kernels().delta_rule(q, k, v, beta, _forget_segments(log_decay, beta, segment_ids), **common)
    if q.shape[1] == 1:
        return delta_rule_reference(q, k, v, beta, log_decay, erase=erase, state=state, initial=initial, segment_ids=segment_ids)
    beta, erase = (gate.astype(_wide(q, k, v)) for gate in (beta, beta if erase is None else erase))
    rule = Rule(log_decay, beta, erase if log_decay is None else erase * decay_factors(log_decay, k))
    return run_chunks(rule, q, k, v, state, initial, segment_ids, size)


def delta_rule_reference(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    beta: jax.Array,
    log_decay: jax.Array | None = None,
    *,
    erase: jax.Array | None = None,
    state: jax.Array | None = None,
    initial: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    chunk_size: int = 64,
) -> tuple[jax.Array, jax.Array]:
    """Token-by-token twin of `delta_rule`: same arguments, results and errors."""
    gates = {'beta': beta, 'log_decay': log_decay, 'erase': erase}
    check_arguments(q, k, v, gates, state, initial, segment_ids, chunk_size, grid=False)

    def write(memory, anchor, key, value, beta, decay, erase):
        memory = decay[..., None] * memory
        return memory + outer(key, beta * value - erase * recall(memory, key))

    gates = (beta[..., None], decay_factors(log_decay, k)[..., None], (beta if erase is None else erase)[..., None])
    return run_tokens(write, q, k, v, gates, state, initial, segment_ids)


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
    implementation: str = 'jax',
) -> tuple[jax.Array, jax.Array | MemoryState]:
    """Delta gradient descent: S_t = (alpha_t I - eta_t k_t k_t^T) S_{t-1} - eta_t grad_t.

    Eq. (88), arXiv:2512.24695v1, transposed; with gradient='chunk' its Eq. (92) and (93), with the sign of (92) corrected.

    Args:
        q, k: (B, T, H or 1, D_k) queries and keys, used as they are. For |k| = 1, 'l2' and 'token' it is stable for eta <= (1 + alpha) / 2.
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
        implementation: as in `delta_rule`; kernels take gradient='token' and read='running' only, and no segment_ids.

    Returns:
        (B, T, H, D_v) y in q's dtype, and the last state in float32 (float64 for float64 inputs): a `MemoryState` with
        gradient='chunk' or read='anchor', otherwise the running memory (B, H, D_k, D_v).

    Raises:
        ValueError: for an unknown option, shapes that don't fit one another, a chunk_size below 1 or what the implementation does not take.
    """
    grid = _check_options(objective, gradient, read)
    platform = _choose(implementation, segment_ids)
    if platform is not None:
        if grid:
            raise ValueError(f"implementation {implementation!r} takes gradient='token' and read='running', got {gradient!r} and {read!r}")
        common = dict(objective=objective, state=state, initial=initial, chunk_size=chunk_size, platform=platform)
        return _kernels().delta_gradient_descent(q, k, v, eta, log_alpha, **common)
    chunk_size = check_arguments(q, k, v, {'eta': eta, 'log_alpha': log_alpha}, state, initial, segment_ids, chunk_size, grid=grid)
    if q.shape[1] == 1:
        options = dict(objective=objective, gradient=gradient, read=read, chunk_size=chunk_size)
        common = dict(state=state, initial=initial, segment_ids=segment_ids)
        return delta_gradient_descent_reference(q, k, v, eta, log_alpha, **options, **common)
    eta = eta.astype(_wide(q, k, v))
    anchored = (objective, gradient) == ('l2', 'chunk')
    erase = 2 * eta if (objective, gradient) == ('l2', 'token') else eta
    return run_chunks(Rule(log_alpha, eta, erase, anchored, read), q, k, v, state, initial, segment_ids, chunk_size, grid=grid)


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
    chunk_size = check_arguments(q, k, v, {'eta': eta, 'log_alpha': log_alpha}, state, initial, segment_ids, chunk_size, grid=grid)

    def write(memory, anchor, key, value, eta, alpha):
        error = -value if objective == 'dot' else recall(memory if gradient == 'token' else anchor, key) - value
        retained = alpha[..., None] * memory - eta[..., None] * outer(key, recall(memory, key))
        return retained - eta[..., None] * outer(key, error)

    gates = (eta[..., None], decay_factors(log_alpha, k)[..., None])
    return run_tokens(write, q, k, v, gates, state, initial, segment_ids, grid=chunk_size if grid else None, read=read)


# Arguments


def check_arguments(q, k, v, gates: dict[str, Any], state, initial, segment_ids, chunk_size, *, grid: bool) -> int:
    """Raise ValueError for arguments that don't fit one another; return chunk_size as an int."""
    if q.ndim != 4 or q.shape[1] < 1:
        raise ValueError(f'q must be (batch, time >= 1, heads, dim), got {q.shape}')
    if k.shape != q.shape:
        raise ValueError(f"k must have q's shape {q.shape}, got {k.shape}")
    if v.ndim != 4 or v.shape[:2] != q.shape[:2] or q.shape[2] not in (1, v.shape[2]):
        raise ValueError(f'v must be {q.shape[:3]} and a value dim, got {v.shape}')
    batch, time, heads, _ = v.shape
    memory = _memory_shape(k, v)
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


def check_decay(log_decay: jax.Array | None, k: jax.Array, v: jax.Array) -> None:
    """Raise ValueError unless there is a decay for each head or each key channel, or None."""
    per_channel = (*v.shape[:3], k.shape[3])
    if log_decay is not None and log_decay.shape not in (v.shape[:3], per_channel):
        raise ValueError(f'log_decay must have shape {v.shape[:3]} or {per_channel}, got {log_decay.shape}')


def _check_options(objective: str, gradient: str, read: str) -> bool:
    """Raise ValueError for an unknown option; return whether they make the chunk grid part of the result."""
    allowed = {'objective': ('l2', 'dot'), 'gradient': ('token', 'chunk'), 'read': ('running', 'anchor')}
    for (name, choices), value in zip(allowed.items(), (objective, gradient, read), strict=True):
        if value not in choices:
            raise ValueError(f'{name} must be one of {choices}, got {value!r}')
    return gradient == 'chunk' or read == 'anchor'


def _choose(implementation: str, segment_ids: jax.Array | None) -> str | None:
    """The platform of the implementation's kernels, None without; ValueError for an unknown one, or for segments with kernels."""
    platforms = {'jax': None, 'pallas_tpu': 'tpu', 'pallas_gpu': 'gpu'}
    if implementation not in platforms:
        raise ValueError(f'implementation must be one of {tuple(platforms)}, got {implementation!r}')
    if implementation != 'jax' and segment_ids is not None:
        raise ValueError(f'segment_ids must be None with implementation {implementation!r}, got an array')
    return platforms[implementation]


def _forget_segments(log_decay: jax.Array | None, beta: jax.Array, segment_ids: jax.Array | None) -> jax.Array | None:
    """(B, T, H) decays under which the delta rule forgets all at each segment's first token: it decays before it erases."""
    if segment_ids is None:
        return log_decay
    begins = jnp.diff(_segment_count(segment_ids), axis=1, prepend=0) > 0
    return jnp.where(begins[..., None], -jnp.inf, jnp.zeros(beta.shape, jnp.float32) if log_decay is None else log_decay)


def _kernels():
    """Imported on first use: the kernels check their arguments with this module, and most programs need no Pallas."""
    from nested_jax.memory.kernels import delta_rule as kernels

    return kernels


def _wide(*arrays: jax.Array) -> jnp.dtype:
    """The dtype of states, decays and triangular systems."""
    return jnp.promote_types(jnp.result_type(*arrays), jnp.float32)


def decay_factors(log_decay: jax.Array | None, k: jax.Array) -> jax.Array:
    """(B, T, H[, D_k]) a_t, ones when None."""
    return jnp.ones(k.shape[:3], _wide(k)) if log_decay is None else jnp.exp(log_decay.astype(_wide(k)))


def _segment_count(segment_ids: jax.Array) -> jax.Array:
    """(B, T) segments that began in this call up to each token. Ids may return, so the ids themselves don't tell segments apart."""
    return jnp.cumsum(jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0))), axis=1)


def _memory_shape(k: jax.Array, v: jax.Array) -> tuple[int, int, int]:
    return v.shape[2], k.shape[3], v.shape[3]


def _start(state, initial, batch: int, memory: tuple[int, int, int], dtype) -> tuple[jax.Array, jax.Array]:
    """The (B, H, D_k, D_v) running memory to start from, and the (1, H, D_k, D_v) memory of new segments."""
    fresh = jnp.zeros((1, *memory), dtype) if initial is None else initial.astype(dtype)[None]
    running = state.running if isinstance(state, MemoryState) else state
    return (jnp.broadcast_to(fresh, (batch, *memory)) if running is None else running.astype(dtype)), fresh


def run_chunks(rule: Rule, q, k, v, state, initial, segment_ids, chunk_size: int, *, grid: bool = False):
    """Run `rule` in chunks, from and to this module's states."""
    running, fresh = _start(state, initial, q.shape[0], _memory_shape(k, v), _wide(q, k, v))
    count = None if segment_ids is None else _segment_count(segment_ids)
    if not grid:
        y, last, _ = run_rule(rule, q, k, v, running, fresh, count, chunk_size)
        return y, last
    position = jnp.zeros(q.shape[0], jnp.int32) if state is None else state.position
    opened = None if state is None else (state.anchor.astype(running.dtype), position % chunk_size)
    y, last, anchor = run_rule(rule, q, k, v, running, fresh, count, chunk_size, opened)
    ended = position + q.shape[1]
    return y, MemoryState(last, where_rows(ended % chunk_size == 0, last, anchor), ended)


# Token by token


def outer(key: jax.Array, value: jax.Array) -> jax.Array:
    """(..., D_k) and (..., D_v) -> (..., D_k, D_v)."""
    return key[..., :, None] * value[..., None, :]


def recall(memory: jax.Array, key: jax.Array) -> jax.Array:
    """S^T k, (B, H, D_k, D_v) and (B, H, D_k) -> (B, H, D_v)."""
    return jnp.einsum('bhkv,bhk->bhv', memory, key, precision=jax.lax.Precision.HIGHEST)


def run_tokens(
    write: Callable[..., jax.Array], q, k, v, gates: tuple[jax.Array, ...], state, initial, segment_ids, *, grid=None, read='running'
):  # fmt: skip
    """Scan `write(memory, anchor, key, value, *gates)` over tokens; `grid` is the chunk size where there is one."""
    dtype, batch = _wide(q, k, v), q.shape[0]
    memory, fresh = _start(state, initial, batch, _memory_shape(k, v), dtype)
    anchor, position = (state.anchor.astype(dtype), state.position) if grid and state is not None else (memory, jnp.zeros(batch, jnp.int32))
    count = jnp.zeros(q.shape[:2], jnp.int32) if segment_ids is None else _segment_count(segment_ids)
    begins = jnp.diff(count, axis=1, prepend=0) > 0

    def step(carry, token):
        memory, anchor, position = carry
        query, key, value, begin, *gates = token
        anchor = memory if grid is None else where_rows(position % grid == 0, memory, anchor)
        memory, anchor = (where_rows(begin, fresh, part) for part in (memory, anchor))
        memory = write(memory, anchor, key, value, *gates)
        return (memory, anchor, position + 1), recall(memory if read == 'running' else anchor, query)

    tokens = (*(x.astype(dtype) for x in (q, k, v)), begins, *(gate.astype(dtype) for gate in gates))
    tokens = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), tokens)
    (memory, anchor, position), y = jax.lax.scan(step, (memory, anchor, position), tokens)
    y = jnp.moveaxis(y, 0, 1).astype(q.dtype)
    if grid is None:
        return y, memory
    return y, MemoryState(memory, where_rows(position % grid == 0, memory, anchor), position)
