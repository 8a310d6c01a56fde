"""A linear memory as `chunk.py` writes it, for goldens and for what a deep memory becomes."""

import jax
import jax.numpy as jnp

from nested_jax.memory import chunk as chunks


def linear_memory(q, k, v, eta, log_alpha, log_momentum, weight, size: int, erase=None, error=jnp.subtract):
    """The linear memory x W written by `chunk.py`; arrays (..., T, D), gates (..., T), weight (..., D, D).

    `error` is the gradient of the objective with respect to what keys read, given that and the values.
    """

    def cut(x):
        return None if x is None else jnp.moveaxis(x.reshape(*x.shape[: eta.ndim - 1], -1, size, *x.shape[eta.ndim :]), eta.ndim - 1, 0)

    def step(carry, item):
        q, k, v, eta, log_alpha, log_momentum, erase = item
        decays = chunks.chunk_decays(log_alpha, log_momentum)
        writes = chunks.layer_writes(decays, k, error(k @ carry[0], v), eta, *carry, erase=erase)
        return chunks.weight_after(decays, writes, *carry), chunks.read_running(decays, writes, q, *carry)

    items = tuple(cut(x) for x in (q, k, v, eta, log_alpha, log_momentum, erase))
    last, y = jax.lax.scan(step, (weight, jnp.zeros_like(weight)), items)
    return jnp.moveaxis(y, 0, eta.ndim - 1).reshape(q.shape), last
