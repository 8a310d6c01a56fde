"""Mamba-2, a state space model with one decay for each token and head (Sec. 7, arXiv:2405.21060)."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from nested_jax.config import ModelConfig
from nested_jax.layers.common import Context, Projection, RMSNorm, ShortConvolution, split_heads
from nested_jax.layers.memory_block import gate_bias, log_retention, retention_log_scale
from nested_jax.memory.matrix import linear_attention


class Mamba2State(NamedTuple):
    """What one layer carries from call to call."""

    memory: jax.Array  # (B, H, N, P) float32
    convolution: tuple[jax.Array, ...]  # inputs of C's, B's and x's convolutions, (B, 3, N), (B, 3, N) and (B, 3, H * P)


class Mamba2(nn.Module):
    """Token mixer: S = e^{A dt} S + B (dt x)^T, y = S^T C + D x, then RMSNorm(y silu(z)) over all heads; `config.state_space` sizes it.

    All heads share one B and one C. In this code's words C is the query, B the key and x the value. A published Mamba-2 has such
    mixers only; ours alternates them with MLPs as all families do, so that models of one size have equal depth.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array, state: Mamba2State | None, context: Context) -> tuple[jax.Array, Mamba2State]:
        """(B, T, width) -> (B, T, width), and the state after the call's last token."""
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        inner, heads = config.state_space.expand * config.width, config.state_space_heads
        query, key, value, convolution = self._rows(x, state, context)
        value = split_heads(value, heads)
        step, log_decay = self._step(x, heads)
        if not context.update:
            step, log_decay = jnp.zeros_like(step), None
        y, memory = linear_attention(
            query, key, (step[..., None] * value).astype(dtype), log_decay,
            state=None if state is None else state.memory, segment_ids=context.segment_ids, chunk_size=config.memory.chunk_size,
        )  # fmt: skip
        skip = self.param('skip', nn.initializers.ones, (heads,)).astype(dtype)
        y = (y + skip[None, None, :, None] * value).reshape(*x.shape[:2], inner)
        y = RMSNorm(config.norm_epsilon, name='norm')(y * jax.nn.silu(Projection(inner, dtype, name='gate')(x)))
        output = Projection(config.width, dtype, scale=(2 * config.num_layers) ** -0.5, name='output')
        return output(y), Mamba2State(memory, convolution) if context.update else state

    def _rows(self, x: jax.Array, state: Mamba2State | None, context: Context):
        """C and B (B, T, 1, N), x (B, T, H * P), and the convolutions' states."""
        sizes = self.config.state_space
        dims = {'shared_query': sizes.state_dim, 'shared_key': sizes.state_dim, 'value': sizes.expand * self.config.width}
        before = (None,) * 3 if state is None else state.convolution
        rows, after = [], []
        for (name, dim), inputs in zip(dims.items(), before, strict=True):
            projected = Projection(dim, jnp.dtype(self.config.dtype), name=name)(x)
            convolve = ShortConvolution(use_bias=True, name=f'{name}_convolution')
            row, inputs = convolve(projected, inputs, context.segment_ids)
            rows.append(row)
            after.append(inputs)
        return rows[0][:, :, None], rows[1][:, :, None], rows[2], tuple(after)

    def _step(self, x: jax.Array, heads: int) -> tuple[jax.Array, jax.Array]:
        """dt = softplus(x W + b) and A dt, (B, T, H) float32."""
        logits = Projection(heads, jnp.promote_types(self.config.dtype, jnp.float32), name='gate_logits')(x)
        logits += self.param('gate_bias', gate_bias(('alpha',)), (1, heads))[None]
        scale = jnp.exp(self.param('retention_log_scale', retention_log_scale, (heads,)))
        return jax.nn.softplus(logits), log_retention(logits, scale)
