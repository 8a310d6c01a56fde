"""Deep linear attention: an MLP memory written by the dot product with its values (DLA, arXiv:2505.23735v1)."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from nested_jax.config import ModelConfig
from nested_jax.layers.common import Context, l2_normalize
from nested_jax.layers.memory_block import MemoryBlock, initial_mlp, log_retention
from nested_jax.memory import grid
from nested_jax.memory.mlp import MLPState, mlp_initial_state, mlp_memory


class DeepLinearAttentionState(NamedTuple):
    """What one layer carries from call to call."""

    memory: MLPState
    convolution: tuple[jax.Array, ...]  # inputs of q's, k's and v's convolutions, (B, 3, H * D)


class DeepLinearAttention(nn.Module):
    """Token mixer: gradient descent on -M(k).v with a forget gate; with a linear M this is gated linear attention.

    The source is secondary; what it leaves open is ours. Each layer's gradient is proportional to the other layer's weights or
    outputs, so plain steps would grow exponentially where a linear memory grows by addition. Here |v| = 1, so that a damped step is at
    most half of eta whatever the weights are, and eta is at most 1 - alpha: a layer is a weighted mean of its start and its steps.
    The presets let retention decay to the learned initial weights: at zero weights the gradients of both layers vanish, for good.
    """

    config: ModelConfig

    @nn.compact
    def __call__(
        self, x: jax.Array, state: DeepLinearAttentionState | None, context: Context
    ) -> tuple[jax.Array, DeepLinearAttentionState]:
        """(B, T, width) -> (B, T, width), and the state after the call's last token."""
        options = self.config.memory
        block = MemoryBlock(self.config, gates=('alpha', 'eta'), name='block')
        inputs = block.inputs(x, None if state is None else state.convolution, context)
        initial = initial_mlp(self, self.config)
        before = None
        if state is not None:
            start = mlp_initial_state(initial, x.shape[0], momentum=False)
            before = grid.where_rows(context.position == 0, start, state.memory)
        strength = jax.nn.sigmoid(inputs.gates['eta'])
        log_alpha = log_retention(inputs.gates['alpha'], inputs.retention_scale)
        y, after = mlp_memory(
            inputs.query, inputs.key, l2_normalize(inputs.value).astype(inputs.value.dtype),
            strength * -jnp.expm1(log_alpha), log_alpha, damping=strength,
            initial=initial, state=before, segment_ids=context.segment_ids,
            valid=None if context.update else jnp.zeros(x.shape[:2], bool),
            chunk_size=options.chunk_size, dgd='none', read=options.read, decay_to=options.decay_to, residual=False, objective='dot',
        )  # fmt: skip
        state = DeepLinearAttentionState(after, inputs.convolution) if context.update else state
        return block.output(y, inputs.output_gate), state
