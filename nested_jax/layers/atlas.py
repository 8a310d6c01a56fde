"""Atlas: an MLP memory of polynomial features, written for a window of tokens by an orthogonalised momentum (arXiv:2505.23735v1)."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from nested_jax.config import ModelConfig
from nested_jax.layers.common import Context, l2_normalize
from nested_jax.layers.memory_block import MemoryBlock, initial_mlp, log_retention
from nested_jax.memory.omega import OmegaGates, OmegaMemories, OmegaState, OmegaTokens, omega_memory, polynomial_features
from nested_jax.optim.orthogonalize import orthogonalize


class AtlasState(NamedTuple):
    """What one layer carries from call to call; the first three are `OmegaState`."""

    memories: OmegaMemories
    recent: OmegaTokens
    opened: tuple[jax.Array, OmegaTokens, OmegaGates]
    convolution: tuple[jax.Array, ...]  # inputs of q's, k's and v's convolutions, (B, 3, H * D)


class Atlas(nn.Module):
    """Token mixer: the Omega rule over `memory.window` tokens, with Muon's five Newton-Schulz iterations on its momentum.

    The source is secondary; the readings of `nested_jax.memory.omega` and the gates, scalars of each head and token, are ours.
    The steps of one chunk add up, so eta is at most 1 / chunk_size: a chunk moves each singular value by at most about one.
    Values have norm one, as no gradient's size tells these steps how far a target is.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array, state: AtlasState | None, context: Context) -> tuple[jax.Array, AtlasState]:
        """(B, T, width) -> (B, T, width), and the state after the call's last token."""
        options = self.config.memory
        block = MemoryBlock(self.config, gates=('alpha', 'eta', 'momentum', 'gamma'), name='block')
        inputs = block.inputs(x, None if state is None else state.convolution, context)
        written = 1.0 if context.update else 0.0
        rate = {name: written * jax.nn.sigmoid(inputs.gates[name]) for name in ('eta', 'gamma')}
        log_momentum = written * jax.nn.log_sigmoid(inputs.gates['momentum'])
        gates = OmegaGates(
            rate['eta'] / options.chunk_size, -jnp.expm1(log_momentum) / options.window,
            written * log_retention(inputs.gates['alpha'], inputs.retention_scale), log_momentum,
        )  # fmt: skip
        query, key = polynomial_features(inputs.query), polynomial_features(inputs.key)
        y, after = omega_memory(
            query, OmegaTokens(key, l2_normalize(inputs.value), rate['gamma']), gates, initial_mlp(self, self.config, key.shape[-1]),
            orthogonalize=_orthogonalize, window=options.window, decay_to=options.decay_to, chunk_size=options.chunk_size,
            state=None if state is None else OmegaState(*state[:3]), position=context.position, segment_ids=context.segment_ids,
        )  # fmt: skip
        return block.output(y, inputs.output_gate), AtlasState(*after, inputs.convolution) if context.update else state


def _orthogonalize(x: jax.Array) -> jax.Array:
    """Matrices are whole on a device: sequences and heads are what a mesh splits."""
    return orthogonalize(x, sharding=jax.NamedSharding(jax.typeof(x).sharding.mesh, jax.P()))
