"""An LSTM as token mixer: the reference for state tracking, not parallel over tokens."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from nested_jax.config import ModelConfig
from nested_jax.layers.common import Context, Projection
from nested_jax.memory.lstm import GATES, LSTMState, lstm


class LSTM(nn.Module):
    """Token mixer: one LSTM of the model's width, whose hidden states are the output.

    Here it sits in the same block as every mixer, between a norm and a residual and before a SwiGLU, where the LSTMs of the formal-language
    literature are stacked alone. Gates and states are float32. The forget bias starts at 1.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array, state: LSTMState | None, context: Context) -> tuple[jax.Array, LSTMState]:
        """(B, T, width) -> (B, T, width), and the state after the call's last token."""
        width, dtype = self.config.width, jnp.dtype(self.config.dtype)
        bias = self.param('gate_bias', _gate_bias, (GATES, width))
        recurrent = self.param('recurrent_kernel', _orthogonal, (width, GATES * width))
        rows = Projection(GATES * width, dtype, name='input')(x).astype(jnp.promote_types(dtype, jnp.float32))
        valid = None if context.update else jnp.zeros(x.shape[:2], bool)
        y, after = lstm(rows + bias.reshape(1, 1, -1), recurrent, state=state, segment_ids=context.segment_ids, valid=valid)
        return y.astype(dtype), after if context.update else state


def _gate_bias(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Zeros, and ones at the forget gate (Jozefowicz et al., 2015)."""
    del key
    return jnp.zeros(shape).at[1].set(1.0)


def _orthogonal(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """One orthogonal matrix for each gate."""
    draw = nn.initializers.orthogonal()
    return jnp.concatenate([draw(part, (shape[0], shape[1] // GATES)) for part in jax.random.split(key, GATES)], 1)
