"""One chunk of writes to a linear layer, in closed form.

Every memory of this package is made of linear layers y = x W that are written, token by token, by

    S_t = beta_t S_{t-1} - eta_t x_t^T e_t                                        (momentum, optional)
    W_t = alpha_t W_{t-1} - epsilon_t x_t^T (x_t W_{t-1}) + S_t                   (DGD: epsilon_t > 0)

(Eq. 88 and 90, arXiv:2512.24695v1, transposed; momentum as in Eq. 9-10, arXiv:2501.00663v1). Each write has rank one, so
with the rows e_t known the state at any token of the chunk is a sum over the chunk's rows:

    W_t = a_t W_0 + f_t S_0 - sum_j D_tj eta_j x_j^T e_j - sum_j A_tj epsilon_j x_j^T p_j,    p_j = x_j W_{j-1}

and the rows p solve one unit lower triangular system. Nothing here loops over tokens.

A null token leaves W and S as they are. With momentum, eta = 0 and alpha = 1 are not enough, for S would be added again: the last
term is push_t S_t, and a null token has push = 0, beta = 1, eta = 0, epsilon = 0 and alpha = 1. As beta and alpha are passed as
logs these are all zeros: zero padding is inert.

Einsum letters: t, j, i tokens of the chunk; leading axes (batch, head, ...) are '...'. All arrays are float32 or wider.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from nested_jax.memory.products import inner, outer, product
from nested_jax.memory.rows import scale_rows
from nested_jax.memory.triangular import invert_unit_lower, solve_unit_lower

# exp(-1e4) is exactly zero, and sums of it stay finite: a retention of zero may be given as a log of -inf.
_LOG_ZERO = -1e4
_HIGHEST = jax.lax.Precision.HIGHEST


class ChunkDecays(NamedTuple):
    """What is left at token t of something present at the chunk's start, or written at token j.

    The momentum fields are None without momentum. What is left before token t is derived where it is used, to keep the arrays that
    a scan over chunks carries small.
    """

    kept: jax.Array  # (..., C)    a_t = prod_{i<=t} alpha_i
    spans: jax.Array  # (..., C, C) A_tj = prod_{j<i<=t} alpha_i, lower triangular, 1 on the diagonal
    momentum_kept: jax.Array | None  # (..., C)    prod_{i<=t} beta_i
    momentum_spans: jax.Array | None  # (..., C, C) N_tj = prod_{j<i<=t} beta_i
    pushed: jax.Array | None  # (..., C)    f_t: share of the starting momentum in W_t
    push_spans: jax.Array  # (..., C, C) D_tj = sum_i A_ti N_ij; A without momentum

    @property
    def kept_before(self) -> jax.Array:
        """(..., C) a_{t-1}, first 1."""
        return _shift(self.kept, -1, 1.0)

    @property
    def spans_before(self) -> jax.Array:
        """(..., C, C) A_{t-1,j}, strictly lower triangular."""
        return _shift(self.spans, -2, 0.0)

    @property
    def pushed_before(self) -> jax.Array:
        """(..., C) f_{t-1}, first 0."""
        return _shift(self.pushed, -1, 0.0)

    @property
    def push_spans_before(self) -> jax.Array:
        """(..., C, C) D_{t-1,j}, strictly lower triangular."""
        return _shift(self.push_spans, -2, 0.0)


class LayerWrites(NamedTuple):
    """The rank-one writes of one chunk to one layer."""

    inputs: jax.Array  # (..., C, D_in)  x_t
    pushes: jax.Array  # (..., C, D_out) eta_t e_t; without momentum and with DGD eta_t e_t + epsilon_t p_t
    erasures: jax.Array | None  # (..., C, D_out) epsilon_t p_t; None without DGD or momentum


@jax.custom_vjp
def _spans(log_factor: jax.Array) -> jax.Array:
    """Lower triangular products prod_{j<i<=t} of exp(log_factor), (..., C) -> (..., C, C).

    The exponents are summed by a product with a triangle of ones instead of taking differences of a running sum, which
    would lose all digits once a factor near zero has been met. The derivative is written out because it needs the products
    alone, and sums along rows: XLA's sum along columns took up to a quarter of the delta rule's time on an H100.
    """
    ones = jnp.ones((log_factor.shape[-1],) * 2, bool)
    lower = jnp.tril(ones)
    rows = jnp.where(lower, log_factor[..., None, :], 0.0)
    exponents = jnp.matmul(rows, jnp.tril(ones, -1).astype(rows.dtype), precision=_HIGHEST)
    return jnp.where(lower, jnp.exp(jnp.where(lower, exponents, 0.0)), 0.0)


def _spans_backward(spans: jax.Array, cotangent: jax.Array) -> tuple[jax.Array]:
    ones = jnp.ones(spans.shape[-2:], bool)
    later = jnp.matmul(jnp.triu(ones).astype(spans.dtype), cotangent * spans, precision=_HIGHEST)  # sums over the tokens from i on
    return (jnp.sum(jnp.where(jnp.tril(ones, -1), later, 0.0), -1),)


_spans.defvjp(lambda log_factor: (_spans(log_factor),) * 2, _spans_backward)


def _shift(rows: jax.Array, axis: int, first: float) -> jax.Array:
    """Move entries one token later along a negative `axis`; the first becomes `first`."""
    widths = [(0, 0)] * rows.ndim
    widths[axis] = (1, 0)
    padded = jnp.pad(rows, widths, constant_values=first)
    return jax.lax.slice_in_dim(padded, 0, rows.shape[axis], axis=axis)


def decay_products(log_factor: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Products of exp(log_factor) from the chunk's first token to t, and from the token after j to t.

    Args:
        log_factor: (..., C), -inf allowed.

    Returns:
        (..., C), and lower triangular (..., C, C) with 1 on the diagonal.
    """
    log_factor = jnp.maximum(log_factor, _LOG_ZERO)
    spans = _spans(log_factor)
    return jnp.exp(log_factor[..., :1]) * spans[..., :, 0], spans


def chunk_decays(
    log_alpha: jax.Array,
    log_momentum: jax.Array | None = None,
    push: jax.Array | None = None,
    *,
    momentum: tuple[jax.Array, jax.Array] | None = None,
) -> ChunkDecays:
    """Products of retention and momentum between all pairs of tokens of a chunk.

    Args:
        log_alpha: (..., C) log of the retention of each token, -inf allowed.
        log_momentum: (..., C) log of the momentum of each token, or None.
        push: (..., C) factor on S_t in W_t: 1 for a token, 0 for a null token. None for all ones; of no effect without momentum.
        momentum: `decay_products(log_momentum)` instead of `log_momentum`, if they are known.

    Returns:
        The `ChunkDecays`, in the arguments' dtype.
    """
    kept, spans = decay_products(log_alpha)
    momentum = momentum if log_momentum is None else decay_products(log_momentum)
    if momentum is None:
        return ChunkDecays(kept, spans, None, None, None, spans)
    momentum_kept, momentum_spans = momentum
    pushing = spans if push is None else spans * push[..., None, :]
    pushed = jnp.einsum('...ti,...i->...t', pushing, momentum_kept, precision=_HIGHEST)
    push_spans = product(pushing, momentum_spans, _HIGHEST)
    return ChunkDecays(kept, spans, momentum_kept, momentum_spans, pushed, push_spans)


def overlaps(rows: jax.Array, inputs: jax.Array) -> jax.Array:
    """Inner products (..., C, C) of all pairs of rows: between inputs, or between queries and inputs, both (..., C, D_in)."""
    return inner(rows, inputs, _HIGHEST)


def erasure_inverse(decays: ChunkDecays, gram: jax.Array, erase: jax.Array) -> jax.Array:
    """Inverse of the triangular system of a chunk's erasures; layers with the same inputs and rates share it.

    Args:
        decays: of the chunk.
        gram: (..., C, C) `overlaps(inputs, inputs)`.
        erase: (..., C) DGD rates epsilon_t.

    Returns:
        (..., C, C) inverse of I + tril(epsilon_t A_{t-1,j} x_t.x_j, -1).
    """
    return invert_unit_lower(_erasure_system(decays, erase, gram))


def _erasure_system(decays: ChunkDecays, erase: jax.Array, gram: jax.Array) -> jax.Array:
    """The triangular system of a chunk's erasures without its unit diagonal, (..., C, C)."""
    return scale_rows(decays.spans_before * gram, erase)


def layer_writes(
    decays: ChunkDecays,
    inputs: jax.Array,
    error: jax.Array,
    rate: jax.Array,
    weight: jax.Array,
    momentum: jax.Array | None = None,
    *,
    erase: jax.Array | None = None,
    inverse: jax.Array | None = None,
    gram: jax.Array | None = None,
    outputs: jax.Array | None = None,
    rest: jax.Array | None = None,
) -> LayerWrites:
    """Solve one chunk's writes to one layer.

    Args:
        decays: of the chunk.
        inputs: (..., C, D_in) rows x_t.
        error: (..., C, D_out) rows e_t: the objective's gradient with respect to x_t W.
        rate: (..., C) learning rates eta_t.
        weight: (..., D_in, D_out) W at the chunk's start.
        momentum: (..., D_in, D_out) S at the chunk's start, or None.
        erase: (..., C) DGD rates epsilon_t, or None for plain gradient descent.
        inverse: the matching `erasure_inverse` if it is known; the system is solved here when None.
        gram: `overlaps(inputs, inputs)`, computed here when None.
        outputs: (..., C, D_out) rows x_t W of the chunk's starting weight, computed here when None.
        rest: (..., D_in, D_out) what retention decays to, zero when None.

    Returns:
        The chunk's `LayerWrites`.
    """
    pushes = scale_rows(error, rate)
    if erase is None:
        return LayerWrites(inputs, pushes, None)
    gram = overlaps(inputs, inputs) if gram is None else gram
    outputs = product(inputs, weight) if outputs is None else outputs
    seen = _start(decays.kept_before, outputs, None if rest is None else product(inputs, _like(rest, weight)))
    if momentum is None:
        # Pushes and erasures decay alike, so the system is solved for their sums.
        return LayerWrites(inputs, _solve_erasures(decays, pushes + scale_rows(seen, erase), erase, gram, inverse), None)
    seen += scale_rows(product(inputs, momentum), decays.pushed_before)
    seen += product(-decays.push_spans_before * gram, pushes)
    return LayerWrites(inputs, pushes, _solve_erasures(decays, scale_rows(seen, erase), erase, gram, inverse))


def _solve_erasures(decays: ChunkDecays, rows: jax.Array, erase: jax.Array, gram: jax.Array, inverse: jax.Array | None) -> jax.Array:
    """The system's solution for `rows`, by its inverse if that is known."""
    if inverse is None:
        return solve_unit_lower(_erasure_system(decays, erase, gram), rows)
    return product(inverse, rows, _HIGHEST)


def weight_after(
    decays: ChunkDecays,
    writes: LayerWrites,
    weight: jax.Array,
    momentum: jax.Array | None = None,
    *,
    rest: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """The layer's weight and momentum after the chunk's last token.

    Args:
        decays, weight, momentum, rest: as given to `layer_writes`.
        writes: its result.

    Returns:
        (..., D_in, D_out) weight, and the momentum of the same shape or None.
    """
    rows = scale_rows(writes.pushes, decays.push_spans[..., -1, :])
    if writes.erasures is not None:
        rows += scale_rows(writes.erasures, decays.spans[..., -1, :])
    downhill = -writes.inputs  # subtracting the products would negate the whole weight's derivative, not these few rows
    new_weight = _start(decays.kept[..., -1:], weight, rest) + outer(downhill, rows)
    if momentum is None:
        return new_weight, None
    new_weight += _start(decays.pushed[..., -1:], momentum, None)
    pushed = outer(downhill, scale_rows(writes.pushes, decays.momentum_spans[..., -1, :]))
    return new_weight, _start(decays.momentum_kept[..., -1:], momentum, None) + pushed


def read_running(
    decays: ChunkDecays,
    writes: LayerWrites,
    queries: jax.Array,
    weight: jax.Array,
    momentum: jax.Array | None = None,
    *,
    overlap: jax.Array | None = None,
    rest: jax.Array | None = None,
) -> jax.Array:
    """Rows q_t W_t: each query reads the weight that holds its own token's write.

    Args:
        decays, weight, momentum, rest: as given to `layer_writes`.
        writes: its result.
        queries: (..., C, D_in) rows q_t.
        overlap: `overlaps(queries, writes.inputs)`, computed here when None.

    Returns:
        (..., C, D_out).
    """
    overlap = overlaps(queries, writes.inputs) if overlap is None else overlap
    rows = _start(decays.kept, product(queries, weight), None if rest is None else product(queries, _like(rest, weight)))
    if momentum is not None:
        rows += scale_rows(product(queries, momentum), decays.pushed)
    if writes.erasures is None:
        return rows - product(decays.push_spans * overlap, writes.pushes)
    return rows - product(decays.push_spans * overlap, writes.pushes) - product(decays.spans * overlap, writes.erasures)


def _like(rest: jax.Array, weight: jax.Array) -> jax.Array:
    """`rest`, which sequences may share, once for each of them."""
    return jnp.broadcast_to(rest, weight.shape)


def _start(kept: jax.Array, value: jax.Array, rest: jax.Array | None) -> jax.Array:
    """What retention leaves of the rows `value` when they decay to `rest` (zero when None)."""
    return scale_rows(value, kept) if rest is None else rest + scale_rows(value - rest, kept)
