"""Mamba-1: a selective state space between a short convolution and a gate (Sec. 3.4, arXiv:2312.00752v2)."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from nested_jax.config import ModelConfig
from nested_jax.layers.common import Context, Projection, ShortConvolution
from nested_jax.memory.selective import selective_scan

# As published; Samba keeps them (Sec. 2.1, arXiv:2406.07522v2).
_STATE_SIZE = 16
_EXPANSION = 2  # channels for each unit of the model's width
_WIDTH_OF_A_STEP = 16  # the steps' projection has rank width / 16, rounded up


class MambaState(NamedTuple):
    """What one layer carries from call to call."""

    memory: jax.Array  # (B, N, D) float32
    convolution: jax.Array  # (B, 3, D) inputs of the convolution


class Mamba(nn.Module):
    """Token mixer: h = e^{-dt rate} h + dt x b, y = c h + skip x, gated by silu(z); dt, b and c are projections of x."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array, state: MambaState | None, context: Context) -> tuple[jax.Array, MambaState]:
        """(B, T, width) -> (B, T, width), and the state after the call's last token."""
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        channels = _EXPANSION * config.width
        rows, gate = (Projection(channels, dtype, name=name)(x) for name in ('value', 'gate'))
        convolve = ShortConvolution(use_bias=True, name='value_convolution')
        rows, convolution = convolve(rows, None if state is None else state.convolution, context.segment_ids)
        step, key, query = self._selection(rows)
        if not context.update:
            step = jnp.zeros_like(step)
        log_rates = self.param('retention_log_rates', _log_rates, (_STATE_SIZE, channels))
        y, memory = selective_scan(
            rows, step, jnp.exp(log_rates), key, query, state=None if state is None else state.memory,
            segment_ids=context.segment_ids, chunk_size=config.memory.chunk_size,
        )  # fmt: skip
        skip = self.param('skip', nn.initializers.ones, (channels,))
        y = (y + rows * skip[None, None]).astype(dtype) * jax.nn.silu(gate)
        y = Projection(config.width, dtype, scale=(2 * config.num_layers) ** -0.5, name='output')(y)
        return y, MambaState(memory, convolution) if context.update else state

    def _selection(self, rows: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Steps (B, T, D), keys and queries (B, T, N), all float32."""
        wide, rank = jnp.promote_types(rows.dtype, jnp.float32), -(-self.config.width // _WIDTH_OF_A_STEP)
        selected = Projection(rank + 2 * _STATE_SIZE, wide, name='selection')(rows)
        step, key, query = jnp.split(selected, (rank, rank + _STATE_SIZE), axis=-1)
        # The published initial kernel is uniform within rank^-1/2: this is its variance.
        logits = Projection(rows.shape[-1], wide, scale=3**-0.5, name='gate_step')(step)
        return jax.nn.softplus(logits + self.param('step_bias', _step_bias, rows.shape[-1:])[None, None]), key, query


def _log_rates(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Rates 1, 2, ..., N in every channel (S4D-Real, Sec. 3.6)."""
    del key
    return jnp.broadcast_to(jnp.log(jnp.arange(1.0, shape[0] + 1))[:, None], shape)


def _step_bias(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Steps log-uniform in [1e-3, 1e-1]."""
    step = jnp.exp(jax.random.uniform(key, shape, minval=jnp.log(1e-3), maxval=jnp.log(1e-1)))
    return step + jnp.log(-jnp.expm1(-step))
