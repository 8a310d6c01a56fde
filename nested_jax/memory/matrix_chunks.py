"""The chunk-parallel form of the rules of `matrix.py`.

All of them have one form,

    S_t = a_t S_{t-1} - erase_t k_t (k_t^T S_{t-1}) + rate_t k_t u_t^T

with u_t = v_t, or v_t - A^T k_t where gradients are taken at the anchor A, the state a chunk starts from. So one chunk-parallel
algorithm serves them all. Within a chunk the net writes r_t = rate_t u_t - erase_t S_{t-1}^T k_t are affine in the chunk's start state S_0,

    R = U - W S_0,    (I + tril(erase_t A_{t-1,j} k_t.k_j, -1)) [U W] = [rate V, erase a_{t-1} K]

with A_tj = prod_{j<i<=t} a_i (the WY form of arXiv:2412.06464v3), hence so is the chunk's last state. U, W and the state's transition
are computed for all chunks at once; a scan over chunks then only multiplies a state by a matrix; the reads are again computed for all
chunks at once.

The rule of `dplr.py` removes along a key of its own, S_t = diag(a_t) S_{t-1} + b_t (m_t^T S_{t-1}) + k_t v_t^T with a decay for each
channel, so it has two net writes a token: the rows p_t = S_{t-1}^T m_t, of the same affine form, along b, and the values along k. It goes
through the same scan and the same reads with twice as many writes.

Einsum letters: b batch, n chunks, h head, t, i, j tokens of a chunk, k key dim, v value dim.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from nested_jax.memory import grid
from nested_jax.memory.chunk import chunk_decays
from nested_jax.memory.triangular import solve_unit_lower

# On CPU, chunks go in groups of about this many key elements, rematerialised one by one: the working set stays in the
# cache, so that the cost of a token does not grow with the length.
_GROUP_ELEMENTS = 2**18
_LOG_ZERO = -1e4  # exp of it is exactly zero
_HIGHEST = jax.lax.Precision.HIGHEST


class Rule(NamedTuple):
    """The recurrence of the module's header, with gates (B, T, H)."""

    log_decay: jax.Array | None  # log a_t, or (B, T, H, D_k) per channel where `erase` is None; None where a_t = 1
    rate: jax.Array | None = None  # None where rate_t = 1
    erase: jax.Array | None = None  # None where nothing is erased along k
    anchored: bool = False  # u_t = v_t - A^T k_t
    read: str = 'running'
    removal: tuple[jax.Array, jax.Array] | None = None  # m_t and b_t, (B, T, H, D_k); needs a decay per channel


class _Tokens(NamedTuple):
    """Inputs in chunks."""

    q: jax.Array  # (N, B, H, C, D_k)
    k: jax.Array
    v: jax.Array  # (N, B, H, C, D_v)
    log_decay: jax.Array | None  # (N, B, H, C[, D_k]), as the gates below
    rate: jax.Array | None
    erase: jax.Array | None
    removal: tuple[jax.Array, jax.Array] | None  # (N, B, H, C, D_k)
    count: jax.Array | None  # (N, B, 1, C) segments begun up to each token
    entering: jax.Array | None  # (N, B, 1, 1) segments begun before the chunk


class _Segments(NamedTuple):
    """Where the tokens of each chunk began."""

    same: jax.Array  # (N, B, 1, C, C) two tokens are of one segment
    carried: jax.Array  # (N, B, 1, C) the token's segment began before its chunk


class _Chunks(NamedTuple):
    """What reads and writes of all chunks need besides the net writes; 'fresh' for segments that began inside the chunk.

    There are R net writes: C, or 2 C with removals, those of a token along b and along k one after the other.
    """

    reads: jax.Array  # (N, B, H, C, D_k) queries times what is left of the chunk's start state
    fresh_reads: jax.Array | None  # the same of the initial state
    scores: jax.Array | None  # (N, B, H, C, R) A_tj q_t.k_j; None where reads see the anchor only
    tails: jax.Array  # (N, B, H, R, D_k) keys times what is left of their write at the chunk's end
    keep: jax.Array  # (N, B, H, 1 or D_k, 1) what is left of the start state at the chunk's end
    fresh_keep: jax.Array | None


def run_rule(
    rule: Rule,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    running: jax.Array,
    fresh: jax.Array,
    count: jax.Array | None,
    chunk_size: int,
    opened: tuple[jax.Array, jax.Array] | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Write and read all tokens of a call.

    Args:
        rule: the recurrence and its gates.
        q, k, v: (B, T, H, D); q and k may have one head for all.
        running: (B, H, D_k, D_v) memory before the first token, in the dtype to compute in.
        fresh: (1, H, D_k, D_v) memory new segments start from.
        count: (B, T) segments begun in this call up to each token; None for none.
        chunk_size: tokens of a chunk.
        opened: the (B, H, D_k, D_v) anchor of the chunk open before the call and the (B,) number of its tokens, below chunk_size.
            None where the first token begins a chunk, or chunks are no part of the result.

    Returns:
        (B, T, H, D_v) y in q's dtype, the last memory and, where a chunk is open after the last token, its anchor (B, H, D_k, D_v).
    """
    phase = None if opened is None else opened[1]
    anchor = None if opened is None else grid.where_rows(phase == 0, running, opened[0])
    tokens, groups = _tokens(rule, q, k, v, count, phase, chunk_size, running.dtype)

    def group(carry, tokens):
        running, anchor = carry
        running, starts, y = _run_chunks(rule, tokens, running, anchor, fresh, jnp.result_type(q, k, v))
        return (running, None if anchor is None else running), (y.astype(q.dtype), starts)

    if groups == 1:
        (last, _), (y, starts) = group((running, anchor), tokens)
    else:
        pieces = jax.tree.map(lambda x: x.reshape(groups, -1, *x.shape[1:]), tokens)
        (last, _), out = jax.lax.scan(jax.checkpoint(group, prevent_cse=False), (running, anchor), pieces)
        y, starts = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), out)
    starts = starts if anchor is None else starts.at[0].set(anchor)
    end = q.shape[1] + (jnp.zeros(q.shape[0], jnp.int32) if phase is None else phase)
    return grid.from_chunks(y, phase, q.shape[1]), last, _open_anchor(starts, fresh, tokens, end // chunk_size)


def _tokens(rule: Rule, q, k, v, count, phase, chunk_size: int, dtype) -> tuple[_Tokens, int]:
    """Cut the inputs into chunks, and say into how many groups of equal size the chunks go."""
    batch, time, heads, _ = v.shape
    size = min(chunk_size, time) if phase is None else chunk_size
    if rule.log_decay is not None and rule.log_decay.ndim == 4:
        size = 1 << (size - 1).bit_length()
    # A row whose open chunk holds `phase` tokens is shifted right by as many, so that all rows lie on one grid.
    chunks = -(-(time + (0 if phase is None else chunk_size - 1)) // size)
    groups = 1
    if jax.default_backend() == 'cpu':
        groups = -(-chunks // max(1, _GROUP_ELEMENTS // (batch * size * heads * max(k.shape[3], v.shape[3]))))
    length = groups * -(-chunks // groups) * size
    split = lambda x: grid.to_chunks(grid.align(x, phase, length), size)
    widen = lambda x: None if x is None else split(x.astype(dtype))
    # Sums of a clipped -inf stay finite, so that masked ones contribute 0 and not NaN.
    log_decay = None if rule.log_decay is None else jnp.maximum(widen(rule.log_decay), _LOG_ZERO)
    removal = None if rule.removal is None else tuple(map(widen, rule.removal))
    tokens = _Tokens(split(q), split(k), split(v), log_decay, widen(rule.rate), widen(rule.erase), removal, None, None)
    if count is None:
        return tokens, groups
    begun = grid.to_chunks(grid.align(count, phase, length, edge=True)[..., None], size)
    entering = jnp.concatenate([jnp.zeros_like(begun[:1, ..., -1:]), begun[:-1, ..., -1:]])
    return tokens._replace(count=begun, entering=entering), groups


def _run_chunks(rule: Rule, tokens: _Tokens, running, anchor, fresh, dtype):
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
    if tokens.removal is not None:
        chunks, u, w = _removal_chunks(tokens, fresh, segments)
    elif tokens.log_decay is not None and tokens.log_decay.ndim == 5:
        chunks, u, w = _channel_chunks(tokens.q, tokens.k, tokens.log_decay, segments), tokens.v.astype(fresh.dtype), None
    else:
        chunks, u, w = _scalar_chunks(rule, tokens, fresh, segments, None if anchor is None else anchor - running)
    last, starts = _scan_states(chunks, u, w, running, fresh)
    read = starts.at[0].set(anchor) if rule.read == 'anchor' and anchor is not None else starts
    return last, starts, _read(chunks, u, w, read, fresh, dtype)


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
    """Divide each token's (..., C[, D_k]) share of an earlier state between the chunk's start state and the initial state."""
    if segments is None:
        return share, None
    carried = jnp.expand_dims(segments.carried, range(4, share.ndim))
    return jnp.where(carried, share, 0.0), jnp.where(carried, 0.0, share)


def _scalar_chunks(rule: Rule, tokens: _Tokens, fresh, segments, anchor_offset):
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
    solved = solve_unit_lower(erase[..., None] * spans_before * gram, jnp.concatenate([rows, carried[..., None] * wide_k], -1))
    return chunks, solved[..., : v.shape[-1]], solved[..., v.shape[-1] :]


def _matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision=_HIGHEST)


def _channel_chunks(q, k, log_decay, segments) -> _Chunks:
    """Chunks with a decay (N, B, H, C, D_k) for each key channel; C a power of two."""
    products = jnp.einsum('...k,...k->...', q, k, preferred_element_type=log_decay.dtype)[..., None, None]
    scores, upto, after = _channel_scores(q, k, log_decay, products)
    if segments is not None:
        scores = jnp.where(segments.same, scores, 0.0)
        upto = _segment_sums(jnp.tril(segments.same), log_decay)
    return _channel_reads(q, k, scores, upto, after, segments)


def _removal_chunks(tokens: _Tokens, fresh, segments):
    """Chunks of the rule with removals; the net writes are the rows p_t = S_{t-1}^T m_t along b and the values along k.

    A token is two steps: m reads what the tokens before it left and b is written, the memory having decayed; k is written and q reads. So

        P = carried M S_0 + begun M fresh + tril(M B^T, -1) P + tril(M K^T, -1) V

    where M, carried and begun, is times what is left before each token of the chunk's start state and of the initial state, and the
    products are times what is left between the two tokens.

    Returns:
        As `_scalar_chunks`.
    """
    (m, b), log_decay = tokens.removal, tokens.log_decay
    q, k, v = (x.astype(fresh.dtype) for x in (tokens.q, tokens.k, tokens.v))
    steps = lambda first, second: jnp.stack([first, second], -2).reshape(*first.shape[:-2], -1, first.shape[-1])
    writes, none = steps(b, k), jnp.zeros_like(log_decay)
    products = [jnp.einsum('...k,...k->...', q, x, precision=_HIGHEST) for x in (b, k)]
    products = jnp.stack([jnp.zeros_like(products[0])] * 2 + products, -1).reshape(*products[0].shape, 2, 2)
    scores, upto, after = _channel_scores(steps(m, q), writes, steps(none, log_decay), products, _HIGHEST)
    (of_m, of_q), (before, upto) = ((x[..., 0::2, :], x[..., 1::2, :]) for x in (scores, upto))
    if segments is not None:
        same = jnp.repeat(segments.same, 2, -1)
        of_m, of_q = jnp.where(same, of_m, 0.0), jnp.where(same, of_q, 0.0)
        before, upto = (_segment_sums(jnp.tril(segments.same, diagonal), log_decay) for diagonal in (-1, 0))
    carried, begun = _divide(segments, jnp.exp(before))
    rows = _matmul(of_m[..., 1::2], v)
    if begun is not None:
        rows += _matmul(begun * m, fresh[None])
    solved = solve_unit_lower(-of_m[..., 0::2], jnp.concatenate([rows, -carried * m], -1))
    p, w = solved[..., : v.shape[-1]], solved[..., v.shape[-1] :]
    return _channel_reads(q, writes, of_q, upto, after, segments), steps(p, v), steps(w, jnp.zeros_like(w))


def _channel_scores(reads, writes, upto, scores, precision=None) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Products of each step's row with those written by it and by earlier steps, times what is left in between.

    Those of a block are those of its halves and those across its middle, where what is kept up to the middle multiplies the writes and
    what is kept from there on the reads. All exponents are sums of log decays: none is positive and none a difference of large numbers.

    Args:
        reads, writes: (..., R, D_k) rows of R steps, a power of two.
        upto: (..., R, D_k) sums of log decays from the start of each token, which is one or two steps, to what its steps read.
        scores: (..., C, R / C, R / C) the products within each token. Nothing decays after a write within a token.
        precision: of the products.

    Returns:
        (..., R, R) products, zero for later steps, and the sums of log decays (..., R, D_k) from the chunk's start up to each read, and
        after each write to the chunk's end.
    """
    *outer, size, dim = reads.shape
    after, dtype, width = jnp.zeros_like(upto), upto.dtype, scores.shape[-1]
    halves = lambda x, last: jnp.unstack(x.reshape(*outer, -1, 2, width, last), axis=len(outer) + 1)
    while width < size:
        (_, read), (written, _), scored = halves(reads, dim), halves(writes, dim), halves(scores, width)
        (upto_first, upto_second), (after_first, after_second) = halves(upto, dim), halves(after, dim)
        read = (read * jnp.exp(upto_second)).astype(reads.dtype)
        written = (written * jnp.exp(after_first)).astype(writes.dtype)
        across = jnp.einsum('...tk,...jk->...tj', read, written, precision=precision, preferred_element_type=dtype)
        above = jnp.concatenate([scored[0], jnp.zeros_like(across)], -1)
        scores = jnp.concatenate([above, jnp.concatenate([across, scored[1]], -1)], -2)
        upto = jnp.concatenate([upto_first, upto_second + upto_first[..., -1:, :]], -2)
        after = jnp.concatenate([after_first + upto_second[..., -1:, :], after_second], -2)
        width *= 2
    return tuple(x.reshape(*outer, size, -1) for x in (scores, upto, after))


def _segment_sums(mask, log_decay) -> jax.Array:
    """Sums of log decays over the tokens that `mask` (N, B, 1, C, C) gives each token, (N, B, H, C, D_k)."""
    return jnp.einsum('nbtj,nbhjk->nbhtk', mask.astype(log_decay.dtype)[:, :, 0], log_decay, precision=_HIGHEST)


def _channel_reads(q, writes, scores, upto, after, segments) -> _Chunks:
    """The `_Chunks` of writes (N, B, H, R, D_k), given the sums of log decays up to each token and after each write."""
    if segments is not None:
        last = jnp.repeat(segments.same[..., -1, :, None], writes.shape[-2] // q.shape[-2], -2)
        after = jnp.where(last, after, -jnp.inf)
    kept = _divide(segments, jnp.exp(upto))
    reads, fresh_reads = (None if x is None else x * q for x in kept)
    keep, fresh_keep = (None if x is None else x[..., -1, :, None] for x in kept)
    return _Chunks(reads, fresh_reads, scores, jnp.exp(after) * writes, keep, fresh_keep)


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


def _open_anchor(starts, fresh, tokens: _Tokens, chunk) -> jax.Array:
    """The anchor (B, H, D_k, D_v) of chunk (B,) of each row, or of the last one."""
    row, chunk = jnp.arange(starts.shape[1]), jnp.minimum(chunk, starts.shape[0] - 1)
    anchor = starts[chunk, row]
    if tokens.count is None:
        return anchor
    carried = tokens.count[chunk, row, 0, -1] == tokens.entering[chunk, row, 0, -1]
    return grid.where_rows(carried, anchor, fresh)
