"""RWKV-7's time mix: a matrix memory with a decay for each channel, and removals along keys of their own (arXiv:2503.14456).

Departures from the published model: the channel mix is this package's SwiGLU instead of squared ReLUs with a token shift, so that all
families have one channel mixer; projections start from normal numbers of the size of the published orthogonal matrices; and every layer
has the value residual's parameters, of which the first layer makes no use.
"""

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from nested_jax.config import ModelConfig
from nested_jax.layers.common import Context, Projection, l2_normalize, split_heads
from nested_jax.memory.dplr import dplr

_SHIFTED = {'query': 0.2, 'decay': 0.9, 'key': 0.7, 'value': 0.7, 'rate': 0.9, 'gate': 0.2}  # and the powers their mixes start from
_NORM_EPSILON = 64e-5


class FirstValues(NamedTuple):
    """What each layer hands on to the next one for the value residual."""

    value: jax.Array  # (B, T, H * D) values of the first layer, compute dtype; not read by it
    layer: jax.Array  # () int32 number of the layer that gets this


class RWKV7State(NamedTuple):
    """What one layer carries from call to call."""

    memory: jax.Array  # (B, H, D, D) float32
    previous: jax.Array  # (B, 1, width) the last token's input


class LowRank(nn.Module):
    """activation(x A) B + bias over the last axis, (B, T, D) -> (B, T, features); A starts at zero, B orthogonal."""

    features: int
    rank: int
    dtype: jnp.dtype
    activation: Callable[[jax.Array], jax.Array] = lambda x: x
    bias: Callable | None = None  # initializer

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        inner = self.activation(Projection(self.rank, self.dtype, scale=0.0, name='down')(x))
        y = Projection(self.features, self.dtype, initializer=nn.initializers.orthogonal(0.1), name='up')(inner)
        if self.bias is None:
            return y
        return y + jnp.broadcast_to(self.param('bias', self.bias, (self.features,)).astype(y.dtype), y.shape)


class GroupNorm(nn.Module):
    """Each head's (x - mean) / deviation times a learned scale plus a learned bias, in float32, (B, T, H, D) -> the same."""

    scale_initializer: Callable

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (x.shape[2] * x.shape[3],)
        scale, bias = self.param('scale', self.scale_initializer, shape), self.param('bias', nn.initializers.zeros, shape)
        rows = jax.nn.standardize(x.astype(jnp.promote_types(x.dtype, jnp.float32)), epsilon=_NORM_EPSILON)
        return rows * scale.reshape(1, 1, *x.shape[2:]) + bias.reshape(1, 1, *x.shape[2:])


class RWKV7(nn.Module):
    """Token mixer: S_t = diag(w) S_{t-1} - (kappa a) (kappa^T S_{t-1}) + k v^T, y = S_t^T r, on rows mixed with the token before.

    With the sigmoids of low-rank maps w = exp(-e^{-1/2} sigmoid) and a = sigmoid, kappa = k * removal_scale normalised, and k scaled by
    1 + (a - 1) rate_mix. Values are drawn towards those of the first layer. After a norm of each head, (sum r k bonus) v is added and
    a gate multiplies.
    """

    config: ModelConfig

    @nn.compact
    def __call__(
        self, x: jax.Array, state: RWKV7State | None, context: Context, first: FirstValues
    ) -> tuple[jax.Array, RWKV7State, FirstValues]:
        """(B, T, width) -> (B, T, width), the state after the call's last token, and what the next layer gets as `first`."""
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        heads, channels = config.num_heads, config.num_heads * config.head_dim
        start = _Initial(config, first.layer)
        rows = self._shift(x, state, context, start)
        project = lambda name, scale: Projection(channels, dtype, scale=scale, name=name)(rows[name])
        query, key, value = project('query', 1.0), project('key', 0.1), project('value', 1.0)
        log_decay, rate, gate, value_gate = self._gates(rows, start)
        share = jnp.where(first.layer == 0, 0.0, jax.nn.sigmoid(value_gate)).astype(dtype)
        value += (first.value - value) * share
        first = FirstValues(jnp.where(first.layer == 0, value, first.value), first.layer + 1)
        constant = lambda name, initializer: jnp.broadcast_to(self.param(name, initializer, (channels,)), key.shape)
        kappa = split_heads(key * constant('removal_scale', start.removal_scale), heads)
        key *= 1 + (rate - 1) * constant('rate_mix', nn.initializers.constant(1.02))
        split = lambda x: split_heads(x, heads)
        bonus = jnp.sum(split(query * key * constant('bonus', nn.initializers.constant(-0.04))), -1, keepdims=True) * split(value)
        y, memory = self._remember(*map(split, (query, key.astype(dtype), value)), kappa, split(rate), split(log_decay), state, context)
        y = GroupNorm(start.norm_scale, name='group_norm')(y) + bonus
        y = y.reshape(*x.shape[:2], -1).astype(dtype) * gate
        y = Projection(config.width, dtype, scale=0.0, name='output_projection')(y)
        return y, (RWKV7State(memory, x[:, -1:]) if context.update else state), first

    def _shift(self, x: jax.Array, state: RWKV7State | None, context: Context, start: '_Initial') -> dict[str, jax.Array]:
        """Rows (B, T, width), each mixed with the row before it of the same document, for every projection."""
        last = jnp.zeros_like(x[:, :1]) if state is None else state.previous.astype(x.dtype)
        previous = jnp.concatenate([last, x[:, :-1]], 1)
        if context.segment_ids is not None:
            begins = jnp.pad(context.segment_ids[:, 1:] != context.segment_ids[:, :-1], ((0, 0), (1, 0)))
            previous = jnp.where(begins[..., None], 0, previous)
        mixes = self.param('shift_mix', start.shift_mix, (len(_SHIFTED), x.shape[-1])).astype(x.dtype)
        return {name: x + (previous - x) * jnp.broadcast_to(mix, x.shape) for name, mix in zip(_SHIFTED, mixes, strict=True)}

    def _gates(self, rows: dict[str, jax.Array], start: '_Initial') -> tuple[jax.Array, ...]:
        """(B, T, H * D): log decay and rate of removal, float32; the output gate; the value residual's logits."""
        dtype = jnp.dtype(self.config.dtype)
        wide = jnp.promote_types(dtype, jnp.float32)
        low_rank = lambda name, row, factor, dtype, activation, bias: LowRank(
            self.config.num_heads * self.config.head_dim, _rank(factor, self.config.width), dtype, activation, bias, name=f'{name}_gate'
        )(rows[row])
        identity = lambda x: x
        log_decay = -(jnp.e**-0.5) * jax.nn.sigmoid(low_rank('decay', 'decay', 2.5, wide, jnp.tanh, start.decay_bias))
        rate = jax.nn.sigmoid(low_rank('rate', 'rate', 2.5, wide, identity, start.rate_bias))
        gate = low_rank('output', 'gate', 5.0, dtype, jax.nn.sigmoid, None)
        return log_decay, rate, gate, low_rank('value', 'value', 1.7, dtype, identity, start.value_bias)

    def _remember(self, query, key, value, kappa, rate, log_decay, state, context) -> tuple[jax.Array, jax.Array]:
        """Reads (B, T, H, D) of the memory, and the memory after the last token."""
        kappa = l2_normalize(kappa)
        removed = kappa * rate
        if not context.update:
            key, removed, log_decay = (jnp.zeros_like(x) for x in (key, removed, log_decay))
        return dplr(
            query, key, value, -kappa, removed, log_decay,
            state=None if state is None else state.memory, segment_ids=context.segment_ids, chunk_size=self.config.memory.chunk_size,
        )  # fmt: skip


def _rank(factor: float, width: int) -> int:
    """factor sqrt(width) to the nearest multiple of 32; of 8 below a width of 512, where 32 would leave no low rank."""
    unit = 32 if width >= 512 else 8
    return max(unit, round(factor * width**0.5 / unit) * unit)


class _Initial:
    """Initial values of a layer's vectors, which depend on its depth: those of the authors' training code."""

    def __init__(self, config: ModelConfig, layer: jax.Array):
        self.depth = layer / max(config.num_layers - 1, 1)  # 0 to 1
        self.left = 1 - layer / config.num_layers  # 1 to almost 0
        zigzag = jnp.tile(jnp.linspace(-1.0, 1.0, config.head_dim), config.num_heads)
        self.zigzag = zigzag * jnp.abs(zigzag)
        self.line = jnp.linspace(-0.5, 0.5, zigzag.size)
        constant = lambda value: lambda key, shape: jnp.broadcast_to(value, shape).astype(jnp.float32)
        self.decay_bias = constant(6 * (self.line + 0.5) ** (1 + self.depth**0.3) - 5.5 + 2.5 * self.zigzag)
        self.rate_bias = constant(-0.19 + 0.3 * self.zigzag + 0.4 * self.line)
        self.value_bias = constant(0.73 - 0.4 * self.line)
        self.removal_scale = constant(0.71 - 0.1 * self.line)
        self.norm_scale = constant(((layer + 1) / config.num_layers) ** 0.7)

    def shift_mix(self, key: jax.Array, shape: tuple[int, int]) -> jax.Array:
        """Share of the token before: much for the first channels and the first layers."""
        channel = jnp.arange(shape[1]) / shape[1]
        return jnp.stack([1 - channel ** (power * self.left) for power in _SHIFTED.values()])
