"""Dropout of what a layer adds to the residual stream (section 5.4, arXiv:1706.03762).

A mask is a function of its key and of the row, the position and the channel in the whole batch: devices that share the batch or its
sequences draw each its part of what one device draws, and a block that is computed again draws the same.
"""

import jax
import jax.numpy as jnp

from nested_jax.layers import sequence


def dropout(x: jax.Array, key: jax.Array | None, rate: float) -> jax.Array:
    """A share of the values set to zero and the others divided by 1 - rate, so that their expectation stays.

    Args:
        x: (B, T, width), inside of `sequence.split` one stretch of the sequences.
        key: () typed key of this place alone; None, as in evaluation, drops nothing.
        rate: share to drop, in [0, 1).

    Returns:
        As `x`.
    """
    if key is None:
        return x
    batch, length, width = x.shape
    positions = jnp.arange(length) + (sequence.first_token(length) if sequence.is_split() else 0)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, positions)
    # A float32 probability also where JAX's default is float64: the masks are the same.
    draw = lambda key: jax.random.bernoulli(key, jnp.float32(1 - rate), (batch, width))
    return jnp.where(jax.vmap(draw, out_axes=1)(keys), x / (1 - rate), 0)


def split_key(key: jax.Array | None, count: int) -> tuple[jax.Array | None, ...]:
    """So many keys of one, or as many times None."""
    return (None,) * count if key is None else tuple(jax.random.split(key, count))
