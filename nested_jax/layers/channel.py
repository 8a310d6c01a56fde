"""Channel mixers: SwiGLU MLPs, one for each level of a Continuum Memory System.

With one level and no update this is a Transformer's MLP.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from nested_jax.config import ModelConfig
from nested_jax.layers.common import Projection, RMSNorm
from nested_jax.layers.dropout import dropout, split_key
from nested_jax.memory.continuum import aggregate, chain


class SwiGLU(nn.Module):
    """down(silu(gate(norm(x))) * up(norm(x))), (B, T, width) -> (B, T, width) (arXiv:2002.05202v1)."""

    config: ModelConfig
    hidden_dim: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        rows = RMSNorm(config.norm_epsilon, name='norm')(x)
        gate, up = (Projection(self.hidden_dim, dtype, name=name)(rows) for name in ('gate', 'up'))
        return Projection(config.width, dtype, scale=(2 * config.num_layers) ** -0.5, name='down')(jax.nn.silu(gate) * up)


class ContinuumMLP(nn.Module):
    """The chain of Eq. 70 (or the sum of Eq. 74), arXiv:2512.24695v1, residual at every level, fastest level first."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """(B, T, width) -> (B, T, width), residual included; with a () key, of dropout, what is added to it is dropped in part."""
        levels = [SwiGLU(self.config, level.hidden_dim, name=f'level_{i}') for i, level in enumerate(self.config.levels)]
        rate = self.config.dropout
        if self.config.aggregation == 'sum':
            weights = self.param('aggregation', nn.initializers.ones, (len(levels),)).astype(x.dtype)
            return x + dropout(aggregate(levels, x, weights), key, rate)
        pairs = zip(levels, split_key(key, len(levels)), strict=True)
        return chain([lambda rows, level=level, own=own: rows + dropout(level(rows), own, rate) for level, own in pairs], x)
