"""What TPU kernels compute a chunk of a memory with: functions of arrays of two axes, in float32.

Gates are rows (1, C) or columns (C, 1) of a chunk's tokens; t, j tokens.
"""

import jax
import jax.numpy as jnp

# exp(-1e4) is exactly zero, and sums of it stay finite.
LOG_ZERO = -1e4


def indices(size: int) -> tuple[jax.Array, jax.Array]:
    """(C, C) number of the row and of the column."""
    return tuple(jax.lax.broadcasted_iota(jnp.int32, (size, size), axis) for axis in (0, 1))


def as_column(row: jax.Array) -> jax.Array:
    """(1, C) -> (C, 1)."""
    number, column = indices(row.shape[1])
    return jnp.sum(jnp.where(number == column, row, 0.0), 1, keepdims=True)


def as_row(column: jax.Array) -> jax.Array:
    """(C, 1) -> (1, C)."""
    row, number = indices(column.shape[0])
    return jnp.sum(jnp.where(row == number, column, 0.0), 0, keepdims=True)


def sums(log_decay: jax.Array, mask: jax.Array) -> jax.Array:
    """(C, 1) sum of the row `log_decay` over the tokens that each row of the (C, C) mask gives."""
    return jnp.sum(jnp.where(mask, log_decay, 0.0), 1, keepdims=True)


def spans(log_decay: jax.Array, mask: jax.Array) -> jax.Array:
    """(C, C) products over the tokens after j that `mask` gives t; sums are no differences, which would lose all digits."""
    row, column = indices(mask.shape[0])
    exponents = dot(jnp.where(mask, log_decay, 0.0), (row > column).astype(jnp.float32), 1, 0)
    return jnp.where(mask, jnp.exp(jnp.where(mask, exponents, 0.0)), 0.0)


def dot(a: jax.Array, b: jax.Array, a_axis: int, b_axis: int) -> jax.Array:
    """Product of two matrices that sums over these axes, in full float32."""
    dimensions = (((a_axis,), (b_axis,)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


@jax.custom_vjp
def invert(strict: jax.Array) -> jax.Array:
    """(I + `strict`)^-1 of a strictly lower triangular matrix.

    By diagonal blocks of 1, 2, 4, ... rows: with both halves inverted, X <- X - X L X for the block L below the diagonal.
    """
    row, column = indices(strict.shape[0])
    inverse = (row == column).astype(jnp.float32)
    for level in range((strict.shape[0] - 1).bit_length()):
        below = (row >> level == (column >> level) + 1) & (row >> level + 1 == column >> level + 1)
        inverse -= dot(inverse, dot(jnp.where(below, strict, 0.0), inverse, 1, 0), 1, 0)
    return inverse


def _invert_forward(strict: jax.Array) -> tuple[jax.Array, jax.Array]:
    inverse = invert(strict)
    return inverse, inverse


def _invert_backward(inverse: jax.Array, cotangent: jax.Array) -> tuple[jax.Array]:
    row, column = indices(inverse.shape[0])
    return (jnp.where(column < row, -dot(dot(inverse, cotangent, 0, 0), inverse, 1, 1), 0.0),)


invert.defvjp(_invert_forward, _invert_backward)
