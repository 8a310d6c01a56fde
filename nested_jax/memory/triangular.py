"""Unit lower triangular systems: what the tokens of a chunk owe to one another."""

import math

import jax
import jax.numpy as jnp

from nested_jax.memory.products import inner, outer

_HIGHEST = jax.lax.Precision.HIGHEST
_BLOCK = 8  # rows inverted by masks; measured on CPU against 1, 4 and 16


@jax.custom_vjp
def invert_unit_lower(strict: jax.Array) -> jax.Array:
    """Inverse of I + `strict`, by doubling the blocks that are inverted.

    It needs no powers of `strict`, which overflow with correlated keys, and no LAPACK, whose batched triangular solve is slower
    on CPU, and with which hope-tiny's step could wait for ever on two cores (jaxlib 0.10.2).

    Args:
        strict: (..., C, C) strictly lower triangular, float32 or float64.

    Returns:
        (..., C, C) unit lower triangular inverse.
    """
    size = strict.shape[-1]
    if size <= _BLOCK:
        return _invert_block(strict)
    padded = _BLOCK * 2 ** math.ceil(math.log2(size / _BLOCK))
    strict = jnp.pad(strict, [(0, 0)] * (strict.ndim - 2) + [(0, padded - size)] * 2)
    block, inverses = _BLOCK, _invert_block(_blocks(strict, _BLOCK, 0))
    while block < padded:
        inverses = _join(inverses, _blocks(strict, block, 1))
        block *= 2
    return inverses[..., 0, :size, :size]


def _blocks(matrix: jax.Array, block: int, below: int) -> jax.Array:
    """Its diagonal blocks (`below` is 0), or those below every second one of them (1): (..., number, block, block)."""
    corners = [(start + below * block, start) for start in range(0, matrix.shape[-1], (1 + below) * block)]
    return jnp.stack([matrix[..., row : row + block, column : column + block] for row, column in corners], axis=-3)


def _join(inverses: jax.Array, below: jax.Array) -> jax.Array:
    """Inverses of the blocks ((A, 0), (L, B)), twice as large: ((A^-1, 0), (-B^-1 L A^-1, B^-1))."""
    upper, lower = inverses[..., 0::2, :, :], inverses[..., 1::2, :, :]
    corner = -jnp.matmul(lower, jnp.matmul(below, upper, precision=_HIGHEST), precision=_HIGHEST)
    rows = jnp.concatenate([upper, jnp.zeros_like(upper)], axis=-1), jnp.concatenate([corner, lower], axis=-1)
    return jnp.concatenate(rows, axis=-2)


def _invert_block(strict: jax.Array) -> jax.Array:
    """The same within a small matrix, whose halves are masks: products of fewer than `_BLOCK` rows are slow."""
    size = strict.shape[-1]
    row = jnp.arange(size)
    inverse = jnp.broadcast_to(jnp.eye(size, dtype=strict.dtype), strict.shape)
    block = 1
    while block < size:
        pair, half = row // (2 * block), row // block % 2
        below = (pair[:, None] == pair[None]) & (half[:, None] == 1) & (half[None] == 0)
        corner = jnp.matmul(jnp.where(below, strict, 0.0), inverse, precision=_HIGHEST)
        inverse -= jnp.matmul(inverse, corner, precision=_HIGHEST)
        block *= 2
    return inverse


def _invert_forward(strict: jax.Array) -> tuple[jax.Array, jax.Array]:
    inverse = invert_unit_lower(strict)
    return inverse, inverse


def _invert_backward(inverse: jax.Array, cotangent: jax.Array) -> tuple[jax.Array]:
    return (-jnp.tril(inner(outer(inverse, cotangent, _HIGHEST), inverse, _HIGHEST), -1),)


invert_unit_lower.defvjp(_invert_forward, _invert_backward)


@jax.custom_vjp
def solve_unit_lower(strict: jax.Array, rows: jax.Array) -> jax.Array:
    """(I + `strict`)^-1 `rows`. The derivative is written out because it needs no product of two inverses.

    Args:
        strict: (..., C, C) strictly lower triangular, float32 or float64; the inverse is computed in its dtype.
        rows: (..., C, D); products are computed in its dtype.

    Returns:
        (..., C, D) in the dtype of `rows`.
    """
    return _solve_forward(strict, rows)[0]


def _solve_forward(strict: jax.Array, rows: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
    inverse = invert_unit_lower(strict).astype(rows.dtype)
    solved = jnp.matmul(inverse, rows, precision=_HIGHEST)
    return solved, (inverse, solved, jnp.zeros((), strict.dtype))


def _solve_backward(saved: tuple[jax.Array, jax.Array, jax.Array], cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
    inverse, solved, like = saved
    rows = outer(inverse, cotangent, _HIGHEST)
    return -jnp.tril(inner(rows, solved, _HIGHEST), -1).astype(like.dtype), rows


solve_unit_lower.defvjp(_solve_forward, _solve_backward)
