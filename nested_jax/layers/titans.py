"""Titans' long-term memory module: an MLP memory with momentum and a forget gate (Eq. 9-14, arXiv:2501.00663v1)."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from nested_jax.config import ModelConfig
from nested_jax.layers.common import Context
from nested_jax.layers.memory_block import MemoryBlock, MemoryInputs, initial_mlp, log_retention
from nested_jax.memory import grid
from nested_jax.memory.mlp import MLPState, MLPWeights, mlp_initial_state, mlp_memory

TITANS_GATES = ('alpha', 'eta', 'momentum')


class TitansState(NamedTuple):
    """What one layer carries from call to call."""

    memory: MLPState
    convolution: tuple[jax.Array, ...]  # inputs of q's, k's and v's convolutions, (B, 3, H * D)


class Titans(nn.Module):
    """Token mixer: plain gradient descent with momentum on |f(k) - v|^2, gradients at the chunk's start, no DGD.

    `has_output=False` returns what the heads read, (B, T, H, D), for layers that have their own gate and output projection.
    """

    config: ModelConfig
    has_output: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, state: TitansState | None, context: Context) -> tuple[jax.Array, TitansState]:
        """(B, T, width) -> (B, T, width), and the state after the call's last token."""
        block = MemoryBlock(self.config, gates=TITANS_GATES, gated=self.has_output, name='block')
        inputs = block.inputs(x, None if state is None else state.convolution, context)
        initial = initial_mlp(self, self.config)
        before = None
        if state is not None:
            before = grid.where_rows(context.position == 0, mlp_initial_state(initial, x.shape[0], momentum=True), state.memory)
        y, after = write_and_read(self.config, inputs, initial, before, context.update, segment_ids=context.segment_ids)
        if self.has_output:
            y = block.output(y, inputs.output_gate)
        return y, TitansState(after, inputs.convolution) if context.update else state


def write_and_read(
    config: ModelConfig, inputs: MemoryInputs, initial: MLPWeights, state: MLPState | None, update: bool, **options
) -> tuple[jax.Array, MLPState]:
    """Write a call's tokens into the memory and read their queries from it.

    Without erasure the steps of one chunk add up, so eta is at most 1 / chunk_size; (1 - momentum) of it enters the
    momentum, which then adds it up to eta again. Damping keeps these steps from overshooting at weights of any size.

    Args:
        config: its `memory` is used.
        inputs: with the gates `TITANS_GATES`.
        initial: the weights a document starts from.
        state: before the call; None starts new documents.
        update: False to read only.
        **options: further arguments of `mlp_memory`.

    Returns:
        What was read, (B, T, H, D), and the memory's state after the call.
    """
    memory, shape = config.memory, inputs.key.shape[:2]
    log_momentum = jax.nn.log_sigmoid(inputs.gates['momentum'])
    strength = jax.nn.sigmoid(inputs.gates['eta'])
    return mlp_memory(
        inputs.query, inputs.key, inputs.value, strength * -jnp.expm1(log_momentum) / memory.chunk_size,
        log_retention(inputs.gates['alpha'], inputs.retention_scale), log_momentum, damping=strength,
        initial=initial, state=state, valid=None if update else jnp.zeros(shape, bool), chunk_size=memory.chunk_size,
        dgd='none', read=memory.read, decay_to=memory.decay_to, residual=False, **options,
    )  # fmt: skip
