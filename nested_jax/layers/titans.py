"""Titans' long-term memory module: an MLP memory with momentum and a forget gate (Eq. 9-14, arXiv:2501.00663v1)."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from nested_jax.config import ModelConfig
from nested_jax.layers.common import Context
from nested_jax.layers.memory_block import MemoryBlock, initial_mlp, log_retention
from nested_jax.memory import grid
from nested_jax.memory.mlp import MLPState, mlp_initial_state, mlp_memory


class TitansState(NamedTuple):
    """What one layer carries from call to call."""

    memory: MLPState
    convolution: tuple[jax.Array, ...]  # inputs of q's, k's and v's convolutions, (B, 3, H * D)


class Titans(nn.Module):
    """Token mixer: plain gradient descent with momentum on |f(k) - v|^2, gradients at the chunk's start, no DGD.

    Without erasure the steps of one chunk add up, so eta is at most 1 / chunk_size; (1 - momentum) of it enters the
    momentum, which then adds it up to eta again. Damping keeps these steps from overshooting at weights of any size.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array, state: TitansState | None, context: Context) -> tuple[jax.Array, TitansState]:
        """(B, T, width) -> (B, T, width), and the state after the call's last token."""
        options = self.config.memory
        block = MemoryBlock(self.config, gates=('alpha', 'eta', 'momentum'), name='block')
        inputs = block.inputs(x, None if state is None else state.convolution, context)
        log_momentum = jax.nn.log_sigmoid(inputs.gates['momentum'])
        initial = initial_mlp(self, self.config)
        before = None
        if state is not None:
            start = mlp_initial_state(initial, x.shape[0], momentum=True)
            before = grid.where_rows(context.position == 0, start, state.memory)
        strength = jax.nn.sigmoid(inputs.gates['eta'])
        y, after = mlp_memory(
            inputs.query, inputs.key, inputs.value, strength * -jnp.expm1(log_momentum) / options.chunk_size,
            log_retention(inputs.gates['alpha'], inputs.retention_scale), log_momentum, damping=strength,
            initial=initial, state=before, segment_ids=context.segment_ids,
            valid=None if context.update else jnp.zeros(x.shape[:2], bool),
            chunk_size=options.chunk_size, dgd='none', read=options.read, decay_to=options.decay_to, residual=False,
        )  # fmt: skip
        return block.output(y, inputs.output_gate), TitansState(after, inputs.convolution) if context.update else state
