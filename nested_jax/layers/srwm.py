"""Self-referential weight matrices as token mixer (arXiv:2202.05780v2): not parallel over tokens."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from nested_jax.config import ModelConfig
from nested_jax.layers.common import Context, Projection, split_heads
from nested_jax.memory import grid
from nested_jax.memory.srwm import RATES, srwm


class SRWMState(NamedTuple):
    """What one layer carries from call to call."""

    memory: jax.Array  # (B, H, D, 3 D + 4) float32; zeros before the first token, when W_0 stands in


class SelfReferentialMatrix(nn.Module):
    """Token mixer: each head's slice of the row is the input of one matrix that writes itself; no projection but the output's.

    Inputs are read as they are, and W_0 is drawn, as in the authors' code for formal languages (IDSIA/fwp-formal-lang): queries start
    near zero, and rates around minus the sum of the inputs.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array, state: SRWMState | None, context: Context) -> tuple[jax.Array, SRWMState]:
        """(B, T, width) -> (B, T, width), and the state after the call's last token."""
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        initial = self._initial()
        before = None
        if state is not None:
            start = jnp.broadcast_to(initial[None], state.memory.shape).astype(state.memory.dtype)
            before = grid.where_rows(context.position == 0, start, state.memory)
        y, memory = srwm(
            split_heads(x, config.num_heads), initial, state=before, segment_ids=context.segment_ids,
            valid=None if context.update else jnp.zeros(x.shape[:2], bool), chunk_size=config.memory.chunk_size,
        )  # fmt: skip
        y = y.astype(dtype).reshape(*x.shape[:2], -1)
        y = Projection(config.width, dtype, scale=(2 * config.num_layers) ** -0.5, name='output')(y)
        return y, SRWMState(memory) if context.update else state

    def _initial(self) -> jax.Array:
        """(H, D, 3 D + 4) W_0."""
        heads, width = self.config.num_heads, self.config.head_dim
        draw, scales = nn.initializers.normal(width**-0.5), {'output': 1.0, 'query': 0.01, 'key': 1.0}
        parts = [
            self.param(f'initial_{name}', lambda key, shape, scale=scale: scale * draw(key, shape), (heads, width, width))
            for name, scale in scales.items()
        ]
        rates = self.param('initial_rate', lambda key, shape: draw(key, shape) - 1, (heads, width, RATES))
        return jnp.concatenate([*parts, rates], -1)
