"""Linear attention with the feature map elu + 1 and its normaliser (Sec. 3.2 to 3.4, arXiv:2006.16236)."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from nested_jax.config import ModelConfig
from nested_jax.layers.common import Context, Projection, split_heads
from nested_jax.memory.matrix import linear_attention


class LinearAttentionState(NamedTuple):
    """What one layer carries from call to call."""

    memory: jax.Array  # (B, H, D, D + 1) float32; the last column is z, the sum of the keys


class LinearAttention(nn.Module):
    """Token mixer: S = S + phi(k) v^T, z = z + phi(k), y = S^T phi(q) / (z . phi(q)), phi = elu + 1.

    No positions, norm or gate: y is a mean of the values, and all that it knows of their order is which came before.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array, state: LinearAttentionState | None, context: Context) -> tuple[jax.Array, LinearAttentionState]:
        """(B, T, width) -> (B, T, width), and the state after the call's last token."""
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        inner = config.num_heads * config.head_dim
        rows = {name: split_heads(Projection(inner, dtype, name=name)(x), config.num_heads) for name in ('query', 'key', 'value')}
        query, key = (_features(rows[name]) for name in ('query', 'key'))
        y, memory = normalized_linear_attention(
            query, key if context.update else jnp.zeros_like(key), rows['value'],
            state=None if state is None else state.memory, segment_ids=context.segment_ids, chunk_size=config.memory.chunk_size,
        )  # fmt: skip
        output = Projection(config.width, dtype, scale=(2 * config.num_layers) ** -0.5, name='output')
        return output(y.reshape(*x.shape[:2], -1)), LinearAttentionState(memory) if context.update else state


def normalized_linear_attention(query: jax.Array, key: jax.Array, value: jax.Array, **options) -> tuple[jax.Array, jax.Array]:
    """`linear_attention` whose scores q.k of a token add up to one: a column of ones beside the values adds them up.

    Args:
        query, key: (B, T, H, D_k), not negative.
        value: (B, T, H, D_v).
        **options: of `linear_attention`; a state is (B, H, D_k, D_v + 1).

    Returns:
        (B, T, H, D_v) y in the query's dtype, zero before any token was written, and the last state.
    """
    ones = jnp.ones((*value.shape[:-1], 1), value.dtype)
    sums, memory = linear_attention(query, key, jnp.concatenate([value, ones], -1), **options)
    return sums[..., :-1] / (sums[..., -1:] + 1e-10), memory


def _features(x: jax.Array) -> jax.Array:
    """elu(x) + 1, positive, in float32 or wider: sums of many of them divide one another."""
    return jax.nn.elu(x.astype(jnp.promote_types(x.dtype, jnp.float32))) + 1
