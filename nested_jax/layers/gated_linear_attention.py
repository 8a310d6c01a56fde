"""Gated linear attention (GLA): a decay for each token and key channel (Sec. 4, arXiv:2312.06635)."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from nested_jax.config import ModelConfig
from nested_jax.layers.common import Context, Projection, split_heads
from nested_jax.layers.memory_block import HeadBlock
from nested_jax.memory.matrix import linear_attention

_GATE_RANK = 16
_GATE_TEMPERATURE = 16.0  # slows forgetting down: half open gates keep 0.5^(1/16) = 96 % a token


class GatedLinearAttentionState(NamedTuple):
    """What one layer carries from call to call."""

    memory: jax.Array  # (B, H, D / 2, D) float32


class GatedLinearAttention(nn.Module):
    """Token mixer: S = diag(a) S + k v^T, y = S^T q D_k^-1/2, a = sigmoid(x W_1 W_2 + b)^(1/16), D_k = D / 2; then a gated norm."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self, x: jax.Array, state: GatedLinearAttentionState | None, context: Context
    ) -> tuple[jax.Array, GatedLinearAttentionState]:
        """(B, T, width) -> (B, T, width), and the state after the call's last token."""
        config = self.config
        key_dim = config.head_dim // 2
        block = HeadBlock(config, key_dim=key_dim, name='block')
        query, key, value = block.rows(x)
        log_decay = self._log_decay(x, config.num_heads * key_dim)
        if not context.update:
            key, log_decay = jnp.zeros_like(key), None
        y, memory = linear_attention(
            key_dim**-0.5 * query, key, value, log_decay,
            state=None if state is None else state.memory, segment_ids=context.segment_ids, chunk_size=config.memory.chunk_size,
        )  # fmt: skip
        return block.output(y, block.output_gate(x)), GatedLinearAttentionState(memory) if context.update else state

    def _log_decay(self, x: jax.Array, channels: int) -> jax.Array:
        """(B, T, width) -> (B, T, H, D_k)."""
        wide = jnp.promote_types(self.config.dtype, jnp.float32)
        logits = Projection(channels, wide, name='gate_up')(Projection(_GATE_RANK, wide, name='gate_down')(x))
        logits += self.param('gate_bias', nn.initializers.zeros, (1, channels))[None]
        return split_heads(jax.nn.log_sigmoid(logits) / _GATE_TEMPERATURE, self.config.num_heads)
