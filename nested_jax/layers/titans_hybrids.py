"""Titans' memory beside, or in front of, softmax attention in a sliding window: Sec. 4.2 and 4.3, arXiv:2501.00663v1.

The paper puts persistent tokens P in front of the sequence for both branches. For attention they are keys and values that every query sees.
For the memory, which is recurrent, they would be written once before a document's first token: all they could do is move the weights
that the document starts from, and those are learned already (`initial_memory_*`). So P goes to attention alone.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from nested_jax.config import ModelConfig
from nested_jax.layers.attention import Attention, AttentionState
from nested_jax.layers.common import Context, Projection, RMSNorm
from nested_jax.layers.titans import Titans, TitansState
from nested_jax.memory.mlp import MLPState


class HybridState(NamedTuple):
    """What one layer carries from call to call."""

    memory: MLPState
    convolution: tuple[jax.Array, ...]  # inputs of the convolutions of the memory's q, k and v, (B, 3, H * D)
    attention: AttentionState


class MemoryAsGate(nn.Module):
    """Token mixer MAG: o = norm(SWA*([P; x])) * silu(norm(M(x))), then the output projection. Eq. (26)-(28), arXiv:2501.00663v1.

    The paper leaves the gating open, but for norms with learned vectors and a non-linearity: here the memory, through SiLU, gates
    attention, and this takes the place of the linear output gate that the memory has where it is alone. Norms are per head.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array, state: HybridState | None, context: Context) -> tuple[jax.Array, HybridState]:
        """(B, T, width) -> (B, T, width), and the state after the call's last token."""
        config = self.config
        memory, attention = _split(state)
        read, memory = Titans(config, has_output=False, name='memory')(x, memory, context)
        y, attention = Attention(config, has_output=False, name='attention')(x, attention, context)
        y = RMSNorm(config.norm_epsilon, name='heads_norm_attention')(y)
        y *= jax.nn.silu(RMSNorm(config.norm_epsilon, name='heads_norm_memory')(read))
        output = Projection(config.width, jnp.dtype(config.dtype), scale=(2 * config.num_layers) ** -0.5, name='output')
        return output(y.reshape(*x.shape[:2], -1)), HybridState(*memory, attention)


class MemoryAsLayer(nn.Module):
    """Token mixer MAL: o = SWA*(norm(M(x))), the memory with its own output gate and projection. Eq. (29)-(31), arXiv:2501.00663v1.

    The paper's P passes through the memory and is seen in the window's first tokens only; here, as in MAG, every query sees it.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array, state: HybridState | None, context: Context) -> tuple[jax.Array, HybridState]:
        """(B, T, width) -> (B, T, width), and the state after the call's last token."""
        memory, attention = _split(state)
        y, memory = Titans(self.config, name='memory')(x, memory, context)
        y = RMSNorm(self.config.norm_epsilon, name='norm')(y)
        y, attention = Attention(self.config, name='attention')(y, attention, context)
        return y, HybridState(*memory, attention)


def _split(state: HybridState | None) -> tuple[TitansState | None, AttentionState | None]:
    if state is None:
        return None, None
    return TitansState(state.memory, state.convolution), state.attention
