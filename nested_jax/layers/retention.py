"""Retention, the token mixer of RetNet: a decay that is fixed for each head, and rotary positions (Sec. 2, arXiv:2307.08621)."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from nested_jax.config import ModelConfig
from nested_jax.layers.attention import rotate
from nested_jax.layers.common import Context
from nested_jax.layers.memory_block import HeadBlock
from nested_jax.memory.matrix import linear_attention


class RetentionState(NamedTuple):
    """What one layer carries from call to call."""

    memory: jax.Array  # (B, H, D, 2 D) float32
    position: jax.Array  # (B,) int32 tokens of the document so far


class Retention(nn.Module):
    """Token mixer: S = gamma S + k v^T, y = S^T q D^-1/2, with q and k rotated and values twice as wide; then a gated norm.

    gamma = 1 - 2^(-5 - h) for head h = 0, 1, ...
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array, state: RetentionState | None, context: Context) -> tuple[jax.Array, RetentionState]:
        """(B, T, width) -> (B, T, width), and the state after the call's last token."""
        config = self.config
        block = HeadBlock(config, value_dim=2 * config.head_dim, name='block')
        query, key, value = block.rows(x)
        before = jnp.zeros(x.shape[0], jnp.int32) if state is None else state.position
        position = _document_positions(before, x.shape[1], context.segment_ids)
        query, key = (rotate(rows, position, config.attention.rope_theta) for rows in (query, key))
        log_decay = jnp.broadcast_to(log_gamma(config.num_heads)[None, None], key.shape[:3])
        if not context.update:
            key, log_decay = jnp.zeros_like(key), None
        y, memory = linear_attention(
            config.head_dim**-0.5 * query, key, value, log_decay,
            state=None if state is None else state.memory, segment_ids=context.segment_ids, chunk_size=config.memory.chunk_size,
        )  # fmt: skip
        return block.output(y, block.output_gate(x)), RetentionState(memory, position[:, -1] + 1) if context.update else state


def log_gamma(num_heads: int) -> jax.Array:
    """(H,) logs of the heads' decays (Eq. 8, arXiv:2307.08621)."""
    return jnp.log1p(-(2.0 ** (-5.0 - jnp.arange(num_heads))))


def _document_positions(before: jax.Array, length: int, segment_ids: jax.Array | None) -> jax.Array:
    """(B, T) position of each token in its document; (B,) tokens of the first one were read before the call."""
    step = jnp.arange(length, dtype=jnp.int32)[None]
    if segment_ids is None:
        return before[:, None] + step
    begins = jnp.diff(segment_ids, axis=1, prepend=segment_ids[:, :1]) != 0
    start = jax.lax.cummax(jnp.where(begins, step, -before[:, None]), axis=1)
    return step - start
