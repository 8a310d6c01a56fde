"""Diagonal plus low rank: a matrix memory with a decay for each key channel and a removal along keys of its own.

RWKV-7 (arXiv:2503.14456), Kimi Delta Attention (arXiv:2510.26692) and Comba with a removal key of its own (arXiv:2506.02475) are special
cases. The rule comes in a chunk-parallel form (`matrix_chunks.py`) and as a token-by-token twin, as those of `matrix.py` do.
"""

import jax

from nested_jax.memory.matrix import check_arguments, decay_factors, outer, recall, run_chunks, run_tokens
from nested_jax.memory.matrix_chunks import Rule


def dplr(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    a: jax.Array,
    b: jax.Array,
    log_decay: jax.Array,
    *,
    state: jax.Array | None = None,
    initial: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    chunk_size: int = 64,
) -> tuple[jax.Array, jax.Array]:
    """Diagonal-plus-low-rank rule: S_t = diag(e^{g_t}) S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T, y_t = S_t^T q_t.

    The removal reads the state before the decay. RWKV-7 (arXiv:2503.14456, transposed) has a = -kappa and b = kappa * rate;
    the delta rule with a decay for each channel has a = e^g * k and b = -beta * k, with keys beta * k for the write.

    Args:
        q, k: (B, T, H, D_k) queries and keys, used as they are.
        v: (B, T, H, D_v) values.
        a, b: (B, T, H, D_k) what a removal reads along, and what it writes along.
        log_decay: (B, T, H, D_k) g_t <= 0, -inf allowed.
        state: (B, H, D_k, D_v) a state returned earlier, or None to start from `initial`.
        initial: (H, D_k, D_v) where a sequence and each new segment start from, zeros when None.
        segment_ids: (B, T) integers; the state restarts from `initial` at each token whose id differs from the token's before.
            The first token of a call continues `state`.
        chunk_size: tokens computed in parallel, rounded up to a power of two; does not change the result.

    Returns:
        (B, T, H, D_v) y in q's dtype, and the last state in float32 (float64 for float64 inputs).

    Raises:
        ValueError: for shapes that don't fit one another or a chunk_size below 1.
    """
    chunk_size = _check(q, k, v, a, b, log_decay, state, initial, segment_ids, chunk_size)
    if q.shape[1] == 1:
        return dplr_reference(q, k, v, a, b, log_decay, state=state, initial=initial, segment_ids=segment_ids)
    return run_chunks(Rule(log_decay, removal=(a, b)), q, k, v, state, initial, segment_ids, chunk_size)


def dplr_reference(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    a: jax.Array,
    b: jax.Array,
    log_decay: jax.Array,
    *,
    state: jax.Array | None = None,
    initial: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    chunk_size: int = 64,
) -> tuple[jax.Array, jax.Array]:
    """Token-by-token twin of `dplr`: same arguments, results and errors."""
    _check(q, k, v, a, b, log_decay, state, initial, segment_ids, chunk_size)

    def write(memory, anchor, key, value, a, b, decay):
        return decay[..., None] * memory + outer(b, recall(memory, a)) + outer(key, value)

    return run_tokens(write, q, k, v, (a, b, decay_factors(log_decay, k)), state, initial, segment_ids)


def _check(q, k, v, a, b, log_decay, state, initial, segment_ids, chunk_size) -> int:
    """Raise ValueError for arguments that don't fit one another; return chunk_size as an int."""
    chunk_size = check_arguments(q, k, v, {}, state, initial, segment_ids, chunk_size, grid=False)
    expected = (*v.shape[:3], q.shape[3])
    for name, array in {'q': q, 'a': a, 'b': b, 'log_decay': log_decay}.items():
        if array.shape != expected:
            raise ValueError(f'{name} must have shape {expected}, got {array.shape}')
    return chunk_size
