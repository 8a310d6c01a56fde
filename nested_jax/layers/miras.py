"""Miras' three models, one objective and one retention each: Moneta, Yaad and Memora (arXiv:2504.13173v1)."""

from typing import NamedTuple

import flax.linen as nn
import jax

from nested_jax.config import ModelConfig
from nested_jax.layers.common import Context
from nested_jax.layers.memory_block import MemoryBlock, initial_mlp, log_retention
from nested_jax.memory.deep import DeepState, DeepTokens, deep_memory

_RULES = {
    'moneta': dict(objective='lp', retention='lq'),
    'yaad': dict(objective='huber', retention='l2'),
    'memora': dict(objective='l2', retention='kl'),
}


class MirasState(NamedTuple):
    """What one layer carries from call to call."""

    memory: DeepState
    convolution: tuple[jax.Array, ...]  # inputs of q's, k's and v's convolutions, (B, 3, H * D)


class Miras(nn.Module):
    """Token mixer: an MLP memory of normalised outputs, written by one gradient step a token; `config.mixer` names the rule.

    Without erasure the steps of one chunk add up, so eta is at most 1 / chunk_size, and damped. Ours are, beside the readings of
    `nested_jax.memory.deep`: gates that are scalars of each head and token where the paper has channels, from projections of low rank;
    a hidden layer as wide as the head (or `memory.hidden_dim`), not four times; and the learned scale of the memory's norm.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array, state: MirasState | None, context: Context) -> tuple[jax.Array, MirasState]:
        """(B, T, width) -> (B, T, width), and the state after the call's last token."""
        options, rule = self.config.memory, _RULES[self.config.mixer]
        gates = ('alpha', 'eta', 'threshold') if rule['objective'] == 'huber' else ('alpha', 'eta')
        block = MemoryBlock(self.config, gates=gates, name='block')
        inputs = block.inputs(x, None if state is None else state.convolution, context)
        written = 1.0 if context.update else 0.0  # eta = 0 and alpha = 1 write nothing
        strength = written * jax.nn.sigmoid(inputs.gates['eta'])
        tokens = DeepTokens(
            inputs.query, inputs.key, inputs.value, strength / options.chunk_size,
            written * log_retention(inputs.gates['alpha'], inputs.retention_scale), strength,
            jax.nn.softplus(inputs.gates['threshold']) if 'threshold' in gates else None,
        )  # fmt: skip
        scale = self.param('memory_scale', nn.initializers.ones, (self.config.num_heads, self.config.head_dim))
        y, memory = deep_memory(
            tokens, scale, initial_mlp(self, self.config), **rule, decay_to=options.decay_to, chunk_size=options.chunk_size,
            state=None if state is None else state.memory, position=context.position, segment_ids=context.segment_ids,
        )  # fmt: skip
        return block.output(y, inputs.output_gate), MirasState(memory, inputs.convolution) if context.update else state
