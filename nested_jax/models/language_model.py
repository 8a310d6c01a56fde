"""The decoder-only language model all families share: pre-norm blocks of a token mixer and a channel mixer."""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from nested_jax.config import ModelConfig
from nested_jax.layers import sequence
from nested_jax.layers.atlas import Atlas
from nested_jax.layers.attention import Attention
from nested_jax.layers.channel import ContinuumMLP
from nested_jax.layers.comba import Comba
from nested_jax.layers.common import Context, RMSNorm
from nested_jax.layers.dla import DeepLinearAttention
from nested_jax.layers.dropout import dropout, split_key
from nested_jax.layers.gated_delta_rule import GatedDeltaRule
from nested_jax.layers.gated_linear_attention import GatedLinearAttention
from nested_jax.layers.linear_attention import LinearAttention
from nested_jax.layers.lstm import LSTM
from nested_jax.layers.mamba import Mamba
from nested_jax.layers.mamba2 import Mamba2
from nested_jax.layers.miras import Miras
from nested_jax.layers.retention import Retention
from nested_jax.layers.rwkv7 import RWKV7, FirstValues
from nested_jax.layers.self_modifying import SelfModifyingTitans
from nested_jax.layers.srwm import SelfReferentialMatrix
from nested_jax.layers.titans import Titans
from nested_jax.layers.titans_context import MemoryAsContext
from nested_jax.layers.titans_hybrids import MemoryAsGate, MemoryAsLayer
from nested_jax.layers.ttt import TTT
from nested_jax.models.axes import gather_width, split_rows

TOKEN_MIXERS = {
    'attention': Attention,
    'titans': Titans,
    'titans-mac': MemoryAsContext,
    'titans-mag': MemoryAsGate,
    'titans-mal': MemoryAsLayer,
    'gated-delta-rule': GatedDeltaRule,
    'self-modifying': SelfModifyingTitans,
    'linear-attention': LinearAttention,
    'retention': Retention,
    'gated-linear-attention': GatedLinearAttention,
    'delta-rule': functools.partial(GatedDeltaRule, gated=False),
    'mamba2': Mamba2,
    'ttt': TTT,
    'mamba': Mamba,
    'lstm': LSTM,
    'srwm': SelfReferentialMatrix,
    'dla': DeepLinearAttention,
    'moneta': Miras,
    'yaad': Miras,
    'memora': Miras,
    'atlas': Atlas,
    'rwkv7': RWKV7,
    'comba': Comba,
}
_REMAT_POLICIES = {'block': None, 'dots': jax.checkpoint_policies.dots_with_no_batch_dims_saveable}


class Rows(NamedTuple):
    """What a block hands on to the next one."""

    x: jax.Array  # (B, T, width)
    first: FirstValues | None  # of mixers with a value residual
    key: jax.Array | None = None  # () of the dropout from here on; None: nothing is dropped


class Block(nn.Module):
    """x + mixer(norm(x)), then the levels of the channel mixer, each with its own norm and residual."""

    config: ModelConfig

    @nn.compact
    def __call__(self, rows: Rows, state, context: Context) -> tuple[Rows, object]:
        """Rows and the mixer's state -> the same."""
        x, first, config = split_rows(rows.x), rows.first, self.config
        key, mixer_key, channel_key = split_key(rows.key, 3)
        mixer = TOKEN_MIXERS[config.mixer](config, name='mixer')
        normed = RMSNorm(config.norm_epsilon, name='mixer_norm')(x)
        if sequence.is_split() and config.mixer != 'attention':
            module, variables = mixer.unbind()
            call = lambda variables, *given: _mix(functools.partial(module.apply, variables), *given)
            mixed = sequence.pass_state(call, variables, Rows(normed, first), context.segment_ids)
        else:
            mixed, state = _mix(mixer, Rows(normed, first), state, context)
        x = split_rows(x + dropout(mixed.x, mixer_key, config.dropout))
        return Rows(split_rows(ContinuumMLP(config, name='channel')(x, channel_key)), mixed.first, key), state


def _mix(mixer: Callable, rows: Rows, state, context: Context) -> tuple[Rows, object]:
    """Rows of a token mixer's outputs, and its state after them."""
    if rows.first is None:
        y, state = mixer(rows.x, state, context)
        return Rows(y, None), state
    y, state, first = mixer(rows.x, state, context, rows.first)
    return Rows(y, first), state


class HybridBlock(nn.Module):
    """Blocks of different mixers one after another; their state is a dict of theirs, by mixer."""

    config: ModelConfig

    @nn.compact
    def __call__(self, rows: Rows, state: dict | None, context: Context) -> tuple[Rows, dict]:
        """Rows and the mixers' states -> the same."""
        states = {}
        for mixer in self.config.unit:
            block = Block(dataclasses.replace(self.config, mixer=mixer), name=mixer)
            rows, states[mixer] = block(rows, None if state is None else state[mixer], context)
        return rows, states


class LanguageModel(nn.Module):
    """A causal language model.

    Parameters of the blocks are stacked: every leaf under params['blocks'] has a leading axis of `num_layers`, or of as many hybrid
    blocks as make these. The state is a pytree whose leaves have a leading batch axis; all zeros is the state before the first token.
    """

    config: ModelConfig

    def setup(self):
        config = self.config
        block, length = Block if len(config.unit) == 1 else HybridBlock, config.num_layers // len(config.unit)
        if config.remat != 'none':
            block = nn.remat(block, policy=_REMAT_POLICIES[config.remat], prevent_cse=not config.scan_layers, static_argnums=())
        self.embedding = self.param('embedding', nn.initializers.normal(1.0), (config.vocab_size, config.width))
        self.blocks = nn.scan(
            block,
            variable_axes={'params': 0, 'lora': 0},
            split_rngs={'params': True},
            in_axes=(0, nn.broadcast),
            out_axes=0,
            length=length,
            unroll=1 if config.scan_layers or self.is_initializing() else length,  # a loop compiles sooner
            # Nothing is broadcast out of a block, and the check traces it once more; initial values are those that it has drawn before.
            check_constancy_invariants=self.is_initializing(),
        )(config)
        self.norm = RMSNorm(config.norm_epsilon)
        if not config.tie_embeddings:
            self.head_kernel = self.param('head', nn.initializers.lecun_normal(), (config.width, config.vocab_size))

    def __call__(self, tokens: jax.Array, state=None, *, segment_ids: jax.Array | None = None, update: bool = True):
        """Logits of the token after each token.

        Args:
            tokens: (B, T) int32.
            state: what an earlier call returned, or None before the first token.
            segment_ids: (B, T) int32 document of each token; memories start anew where it changes, within a call or from
                one call to the next. Where `config.grid` is above 1, documents must start on its multiples within a call.
            update: False to read the memories without writing them.

        Returns:
            (B, T, V) float32 logits, and the state after the last token.

        Raises:
            ValueError: for tokens or segment_ids of another shape or dtype.
        """
        hidden, state = self.hidden(tokens, state, segment_ids=segment_ids, update=update)
        kernel = self.embedding.T if self.config.tie_embeddings else self.head_kernel
        wide = jnp.promote_types(hidden.dtype, jnp.float32)
        flat = jnp.matmul(hidden.reshape(-1, hidden.shape[-1]), kernel.astype(hidden.dtype), preferred_element_type=wide)
        return flat.reshape(*tokens.shape, self.config.vocab_size), state

    def hidden(self, tokens: jax.Array, state=None, *, segment_ids: jax.Array | None = None, update: bool = True):
        """As a call, but returns the normed (B, T, width) rows that the head would read, in the compute dtype.

        Of a stretch of the sequence inside of `nested_jax.layers.sequence.split`, where there is no state to go on with. This is what is
        trained: with `rngs={'dropout': key}` in `apply` a share `config.dropout` of what is added to the residual stream is dropped.
        """
        _check_tokens(tokens, segment_ids)
        _check_state(tokens, state)
        state = self.init_state(tokens.shape[0]) if state is None and not update else state
        layers, context = open_state(state, segment_ids, update)
        key = self.make_rng('dropout') if self.config.dropout and self.has_rng('dropout') else None
        rows, layers = self.blocks(open_rows(self.config, self.embedding, tokens, key), layers, context)
        return self.norm(rows.x), close_state(state, layers, context, tokens, segment_ids)

    def head(self, params) -> jax.Array:
        """The (width, V) matrix from hidden rows to logits."""
        return params['embedding'].T if self.config.tie_embeddings else params['head']

    def init_state(self, batch_size: int):
        """The state before the first token.

        Args:
            batch_size: sequences read side by side.

        Returns:
            A pytree of zeros, every leaf with a leading axis of `batch_size`.
        """
        tokens = jax.ShapeDtypeStruct((batch_size, 1), jnp.int32)
        _, state = jax.eval_shape(lambda t: self.clone(parent=None).init_with_output(jax.random.key(0), t)[0], tokens)
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), state)


def _check_tokens(tokens: jax.Array, segment_ids: jax.Array | None) -> None:
    if tokens.ndim != 2 or tokens.shape[1] < 1 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(f'tokens is {tokens.dtype}{tokens.shape}, allowed is an integer array (batch, time >= 1)')
    if segment_ids is not None and (segment_ids.shape != tokens.shape or not jnp.issubdtype(segment_ids.dtype, jnp.integer)):
        raise ValueError(f'segment_ids is {segment_ids.dtype}{segment_ids.shape}, allowed are integers of shape {tokens.shape}')


def _check_state(tokens: jax.Array, state) -> None:
    if state is not None and state['position'].shape != tokens.shape[:1]:
        raise ValueError(f'state is of {state["position"].shape[0]} rows, allowed is that of tokens, {tokens.shape[0]}')


def open_rows(config: ModelConfig, embedding: jax.Array, tokens: jax.Array, key: jax.Array | None = None) -> Rows:
    """What the first block gets; with a () key, of dropout, embeddings are dropped in part."""
    key, own = split_key(key, 2)
    x = dropout(split_rows(jnp.take(gather_width(embedding), tokens, axis=0)).astype(config.dtype), own, config.dropout)
    if config.mixer != 'rwkv7':
        return Rows(x, None, key)
    first = FirstValues(jnp.zeros((*tokens.shape, config.num_heads * config.head_dim), x.dtype), jnp.zeros((), jnp.int32))
    return Rows(x, first, key)


def open_state(state, segment_ids: jax.Array | None, update: bool):
    """The layers' states, stacked in front, and the call's context; a document that ended before this call is forgotten."""
    if state is None:
        return None, Context(None, _documents(segment_ids), update)
    if segment_ids is not None:
        same = (segment_ids[:, 0] == state['segment_id']) | (segment_ids[:, 0] == 0)
        keep = lambda leaf: jnp.where(jnp.expand_dims(same, range(1, leaf.ndim)), leaf, jnp.zeros_like(leaf))
        state = jax.tree.map(keep, state)
    layers = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 1, 0), state['layers'])
    return layers, Context(state['position'], _documents(segment_ids), update)


def _documents(segment_ids: jax.Array | None) -> jax.Array | None:
    """(B, T) documents begun in this call up to each token: an id that comes back is another document."""
    if segment_ids is None:
        return None
    whole = sequence.gather(segment_ids)
    begun = jnp.cumsum(jnp.pad(whole[:, 1:] != whole[:, :-1], ((0, 0), (1, 0))), axis=1, dtype=jnp.int32)
    return sequence.stretch(begun, segment_ids.shape[1])


def close_state(state, layers, context: Context, tokens: jax.Array, segment_ids: jax.Array | None):
    """The state after a call."""
    if not context.update and state is not None:
        return state
    batch, length = tokens.shape
    position = jnp.full(batch, length, jnp.int32) if context.position is None else context.position + length
    segment_id = jnp.zeros(batch, jnp.int32) if state is None else state['segment_id']
    if segment_ids is not None:
        segment_id = segment_ids[:, -1].astype(jnp.int32)
    layers = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, 1), layers)
    return {'position': position, 'segment_id': segment_id, 'layers': layers}
