"""Comba: the gated delta rule with a weaker removal key and a corrected query (arXiv:2506.02475)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from nested_jax.config import ModelConfig
from nested_jax.layers.common import Context
from nested_jax.layers.gated_delta_rule import GatedDeltaRuleState
from nested_jax.layers.kernels import delta_rule_form
from nested_jax.layers.memory_block import MemoryBlock, log_retention
from nested_jax.memory.matrix import delta_rule

_LARGE_WIDTH = 2048


class Comba(nn.Module):
    """Token mixer: S' = e^g S, S = S' + beta k (v - S'^T p)^T, y = S^T (q - d p), p = b k, with |q| = |k| = 1.

    The feedback b = sigmoid(logit) and the correction d are learned for each head; what surrounds the memory is the gated delta rule's,
    but for the sigmoid of the output gate. The public implementations normalise p, and so erase with |p| = 1 whatever b is, and normalise
    the corrected query; here both are as in the equations. d starts at 1, and at 0.02 below a width of 2048, where the authors found a
    small one to work better.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array, state: GatedDeltaRuleState | None, context: Context) -> tuple[jax.Array, GatedDeltaRuleState]:
        """(B, T, width) -> (B, T, width), and the state after the call's last token."""
        block = MemoryBlock(self.config, gates=('alpha', 'eta'), name='block')
        inputs = block.inputs(x, None if state is None else state.convolution, context)
        log_alpha = log_retention(inputs.gates['alpha'], inputs.retention_scale)
        beta = jax.nn.sigmoid(inputs.gates['eta'])
        feedback, correction = self._feedback()
        erase = feedback[None, None] * beta
        if not context.update:
            log_alpha, beta, erase = jnp.zeros_like(log_alpha), jnp.zeros_like(beta), jnp.zeros_like(erase)
        y, memory = delta_rule(
            inputs.query - (correction * feedback)[None, None, :, None] * inputs.key, inputs.key, inputs.value, beta, log_alpha,
            erase=erase, state=None if state is None else state.memory, segment_ids=context.segment_ids,
            **delta_rule_form(self.config.memory.chunk_size, inputs.key, inputs.value),
        )  # fmt: skip
        rows = block.norm(y).astype(inputs.output_gate.dtype) * jax.nn.sigmoid(inputs.output_gate)
        y = block.output_projection(rows.reshape(*x.shape[:2], -1))
        return y, (GatedDeltaRuleState(memory, inputs.convolution) if context.update else state)

    def _feedback(self) -> tuple[jax.Array, jax.Array]:
        """b and d, (H,) float32."""
        heads, correction = (self.config.num_heads,), 1.0 if self.config.width >= _LARGE_WIDTH else 0.02
        logit = self.param('feedback_logit', nn.initializers.ones, heads)
        return jax.nn.sigmoid(logit), self.param('output_correction', nn.initializers.constant(correction), heads)
