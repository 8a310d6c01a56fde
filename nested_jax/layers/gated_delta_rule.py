"""The delta rule (DeltaNet, arXiv:2406.06484v5) and, with a decay for each token and head, the gated one (arXiv:2412.06464v3)."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from nested_jax.config import ModelConfig
from nested_jax.layers.common import Context
from nested_jax.layers.kernels import delta_rule_form
from nested_jax.layers.memory_block import MemoryBlock, log_retention
from nested_jax.memory.matrix import delta_rule


class GatedDeltaRuleState(NamedTuple):
    """What one layer carries from call to call."""

    memory: jax.Array  # (B, H, D, D) float32
    convolution: tuple[jax.Array, ...]  # inputs of q's, k's and v's convolutions, (B, 3, H * D)


class GatedDeltaRule(nn.Module):
    """Token mixer: S' = e^g S, S = S' + beta k (v - S'^T k)^T, y = S^T q, between short convolutions and a gated norm.

    beta is in (0, 1). With `config.memory.negative_eigenvalues` it is in (0, 2): the eigenvalue along the key, e^g (1 - beta), then
    reaches below zero and a token may flip what it reads (arXiv:2411.12537v5).
    """

    config: ModelConfig
    gated: bool = True  # False: DeltaNet, with g = 0 and no gate after the norm

    @nn.compact
    def __call__(self, x: jax.Array, state: GatedDeltaRuleState | None, context: Context) -> tuple[jax.Array, GatedDeltaRuleState]:
        """(B, T, width) -> (B, T, width), and the state after the call's last token."""
        block = MemoryBlock(self.config, gates=('alpha', 'eta') if self.gated else ('eta',), gated=self.gated, name='block')
        inputs = block.inputs(x, None if state is None else state.convolution, context)
        log_alpha = log_retention(inputs.gates['alpha'], inputs.retention_scale) if self.gated else None
        beta = (2.0 if self.config.memory.negative_eigenvalues else 1.0) * jax.nn.sigmoid(inputs.gates['eta'])
        if not context.update:
            log_alpha, beta = None, jnp.zeros_like(beta)
        y, memory = delta_rule(
            inputs.query, inputs.key, inputs.value, beta, log_alpha,
            state=None if state is None else state.memory, segment_ids=context.segment_ids,
            **delta_rule_form(self.config.memory.chunk_size, inputs.key, inputs.value),
        )  # fmt: skip
        return block.output(y, inputs.output_gate), (GatedDeltaRuleState(memory, inputs.convolution) if context.update else state)
