"""The delta rules on NVIDIA GPUs: products over all chunks by XLA in bfloat16, and the states between chunks by a Mosaic GPU kernel.

The rule is that of `delta_rule.py`, S_t = a_t S_{t-1} + k_t (rate_t v_t - erase_t S_{t-1}^T k_t)^T. What decays and triangular systems are
computed from is float32, the systems are solved in float32, and what multiplies rows of tokens is rounded to their bfloat16.
"""

import jax
import jax.numpy as jnp

from nested_jax.memory.chunk import chunk_decays
from nested_jax.memory.kernels.chunk_scan import chunk_scan
from nested_jax.memory.triangular import solve_unit_lower


def memory(q: jax.Array, k: jax.Array, v: jax.Array, gates: jax.Array, state: jax.Array, interpret: bool) -> tuple[jax.Array, jax.Array]:
    """Write and read whole chunks.

    Args:
        q, k: (B, H, N C, D_k), rounded to bfloat16.
        v: (B, H, N C, D_v) bfloat16.
        gates: (B, H, N, 3, C) float32 rate, erase and log decay.
        state: (B, H, D_k, D_v) float32.
        interpret: run the kernel step by step on any platform.

    Returns:
        (B, H, N C, D_v) y in q's dtype and the last state (B, H, D_k, D_v) in float32.
    """
    rate, erase, log_decay = jnp.moveaxis(gates, 3, 0)
    dtype = q.dtype
    q, k, v = (x.reshape(*rate.shape, x.shape[-1]).astype(v.dtype) for x in (q, k, v))
    decays = chunk_decays(log_decay)
    scaled = lambda factor, x: (factor[..., None] * x).astype(x.dtype)
    system = erase[..., None] * decays.spans_before * _inner(k, k)
    rows = jnp.concatenate([scaled(rate, v), scaled(-erase * decays.kept_before, k)], -1)
    u, w = jnp.split(solve_unit_lower(system, rows), [v.shape[-1]], -1)
    keep = jnp.broadcast_to(decays.kept[..., -1:], (*rate.shape[:3], k.shape[-1]))
    starts, written, last = chunk_scan(w, scaled(decays.spans[..., -1, :], k), u, keep, state, interpret)
    scores = (decays.spans * _inner(q, k)).astype(q.dtype)
    y = scaled(decays.kept, q) @ starts + scores @ written
    return y.reshape(*y.shape[:2], -1, y.shape[-1]).astype(dtype), last


@jax.custom_vjp
def _inner(rows: jax.Array, inputs: jax.Array) -> jax.Array:
    """Inner products (..., C, C) of all pairs of rows in float32; its derivative multiplies in the rows' dtype."""
    return jnp.einsum('...td,...jd->...tj', rows, inputs, preferred_element_type=jnp.float32)


def _inner_backward(factors: tuple[jax.Array, jax.Array], cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
    rows, inputs = factors
    cotangent = cotangent.astype(rows.dtype)
    return cotangent @ inputs, cotangent.mT @ rows


_inner.defvjp(lambda rows, inputs: (_inner(rows, inputs), (rows, inputs)), _inner_backward)
