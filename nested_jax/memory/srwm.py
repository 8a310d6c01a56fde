"""Self-referential weight matrix: one matrix that gives outputs, keys, queries and learning rates, and writes all of itself.

With phi the softmax over the input dimension and W_t of (d_out + 2 d_in + 4) rows, Eq. (5) to (8), arXiv:2202.05780v2, read

    y_t, q_t, k_t, beta_t = W_{t-1} x_t
    vbar_t = W_{t-1} phi(k_t),    v_t = W_{t-1} phi(q_t)
    W_t = W_{t-1} + sigmoid(beta_t) (v_t - vbar_t) (x) phi(k_t)

where the four entries of beta_t are the learning rates of the rows that give y, q, k and beta. Eq. (5) has phi(x_t) for x_t; the authors'
public code has both, and for formal languages reads x_t as it is: phi is left to the caller there. What is written depends on the matrix
through two softmaxes, so there is no chunk-parallel form: tokens are read one after another.

Nothing bounds W: a write multiplies it by I + beta (phi(q) - phi(k)) phi(k)^T, whose norm may be above one, and rates do not fall as W
grows.

Einsum letters: b batch, h head, i input dim, o rows of W. As everywhere in this package a matrix is stored transposed.
"""

import jax
import jax.numpy as jnp

from nested_jax.memory import grid

RATES = 4  # the learning rates of y, q, k and beta themselves
_HIGHEST = jax.lax.Precision.HIGHEST


def srwm(
    x: jax.Array,
    initial: jax.Array,
    *,
    state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    valid: jax.Array | None = None,
    chunk_size: int = 32,
) -> tuple[jax.Array, jax.Array]:
    """The recurrence of the module's header for several heads.

    Args:
        x: (B, T, H, D_in) inputs, used as they are.
        initial: (H, D_in, D_out + 2 D_in + 4) W_0, what a sequence and each segment start from; its columns give y, q, k and beta.
        state: (B, H, D_in, D_out + 2 D_in + 4) what an earlier call returned, or None to start from `initial`.
        segment_ids: (B, T) integers; the matrix restarts from `initial` at each token whose id differs from the token's before. The first
            token of a call continues `state`.
        valid: (B, T) bool, False for tokens that read and write nothing. Default all write.
        chunk_size: tokens between two states that the backward pass keeps; does not change the result.

    Returns:
        (B, T, H, D_out) y and the last state, in float32 (float64 for float64 inputs).

    Raises:
        ValueError: for shapes that don't fit one another or a chunk_size below 1.
    """
    _check(x, initial, state, segment_ids, valid, chunk_size)
    batch, length, _, dim = x.shape
    dtype = jnp.promote_types(jnp.result_type(x, initial), jnp.float32)
    initial = initial.astype(dtype)[None]
    state = jnp.broadcast_to(initial, (batch, *initial.shape[1:])) if state is None else state.astype(dtype)

    def step(matrix: jax.Array, token: tuple) -> tuple[jax.Array, jax.Array]:
        inputs, begins, writes = token
        matrix = grid.where_rows(begins, initial, matrix)
        output, changed = _write(matrix, inputs.astype(dtype), dim)
        return grid.where_rows(writes, changed, matrix), output

    def chunk(matrix: jax.Array, tokens: tuple) -> tuple[jax.Array, jax.Array]:
        return jax.lax.scan(step, matrix, tokens)

    begins = jnp.zeros((batch, length), bool)
    if segment_ids is not None:
        begins = begins.at[:, 1:].set(segment_ids[:, 1:] != segment_ids[:, :-1])
    writes = jnp.ones((batch, length), bool) if valid is None else valid
    laid = grid.lay_out((x, begins, writes), min(chunk_size, length))  # padding is not valid
    by_token = jax.tree.map(lambda rows: jnp.moveaxis(rows, 2, 1), laid.chunks)
    state, y = jax.lax.scan(jax.checkpoint(chunk), state, by_token)
    return grid.gather_outputs(laid, jnp.moveaxis(y, 1, 2), length), state


def _write(matrix: jax.Array, inputs: jax.Array, dim: int) -> tuple[jax.Array, jax.Array]:
    """Output and changed matrix of one token, (B, H, D_in, O) and (B, H, D_in) -> (B, H, D_out) and (B, H, D_in, O)."""
    width = matrix.shape[-1] - 2 * dim - RATES
    output, query, key, rates = jnp.split(_read(matrix, inputs), (width, width + dim, width + 2 * dim), axis=-1)
    query, key = jax.nn.softmax(query), jax.nn.softmax(key)
    columns = jnp.repeat(jax.nn.sigmoid(rates), jnp.array([width, dim, dim, RATES]), axis=-1, total_repeat_length=matrix.shape[-1])
    # v - vbar in one product.
    change = columns * _read(matrix, query - key)
    return output, matrix + key[..., :, None] * change[..., None, :]


def _read(matrix: jax.Array, inputs: jax.Array) -> jax.Array:
    return jnp.einsum('bhio,bhi->bho', matrix, inputs, precision=_HIGHEST)


def _check(x, initial, state, segment_ids, valid, chunk_size) -> None:
    if x.ndim != 4 or x.shape[1] < 1:
        raise ValueError(f'x must be (batch, time >= 1, heads, dim), got {x.shape}')
    rows, (heads, dim) = x.shape[:2], x.shape[2:]
    if initial.ndim != 3 or initial.shape[:2] != (heads, dim) or initial.shape[2] <= 2 * dim + RATES:
        raise ValueError(f'initial must be {(heads, dim)} and more than {2 * dim + RATES} columns, got {initial.shape}')
    expected = {'state': (state, (rows[0], *initial.shape)), 'segment_ids': (segment_ids, rows), 'valid': (valid, rows)}
    for name, (array, shape) in expected.items():
        if array is not None and array.shape != shape:
            raise ValueError(f'{name} must have shape {shape}, got {array.shape}')
    if chunk_size < 1:
        raise ValueError(f'chunk_size must be an integer of at least 1, got {chunk_size!r}')
