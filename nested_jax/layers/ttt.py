"""TTT layers: a model for each head that learns every mini-batch of the sequence it reads (arXiv:2407.04620)."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from nested_jax.config import ModelConfig
from nested_jax.layers.attention import rotate
from nested_jax.layers.common import Context, Projection, ShortConvolution, split_heads
from nested_jax.memory import grid
from nested_jax.memory.ttt import Layer, Norm, TTTState, Weights, ttt, ttt_initial_state

_BASE_RATES = {'matrix': 1.0, 'mlp': 0.1}  # TTT-Linear and TTT-MLP, Sec. 2.7
_INITIAL_SCALE = 0.02


class TTTLayerState(NamedTuple):
    """What one layer carries from call to call."""

    memory: TTTState
    convolution: tuple[jax.Array, ...]  # inputs of q's and k's convolutions, (B, 3, H * D)


class TTT(nn.Module):
    """Token mixer in the Mamba backbone of the paper: q and k share a projection and have a convolution each, a gate follows.

    `config.memory.kind` chooses TTT-Linear ('matrix') or TTT-MLP ('mlp'), whose hidden layer is four times as wide as a head unless
    `hidden_dim` says otherwise; `config.memory.chunk_size` is the mini-batch's size.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array, state: TTTLayerState | None, context: Context) -> tuple[jax.Array, TTTLayerState]:
        """(B, T, width) -> (B, T, width), and the state after the call's last token."""
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        inner = config.num_heads * config.head_dim
        (query, key, value), convolution = self._rows(x, None if state is None else state.convolution, context)
        initial = self._initial()
        before = None
        if state is not None:
            before = grid.where_rows(context.position == 0, ttt_initial_state(initial, x.shape[0]), state.memory)
        rate = self._rate(x)
        y, memory = ttt(
            query, key, value, rate if context.update else jnp.zeros_like(rate), self._token_scale(),
            norm=self._inner_norm(), initial=initial, state=before, segment_ids=context.segment_ids,
        )  # fmt: skip
        norm = nn.LayerNorm(config.norm_epsilon, dtype=dtype, use_fast_variance=False, name='norm')
        y = norm(y.reshape(*x.shape[:2], inner)) * jax.nn.gelu(Projection(inner, dtype, name='gate')(x))
        y = Projection(config.width, dtype, scale=(2 * config.num_layers) ** -0.5, name='output')(y)
        return y, TTTLayerState(memory, convolution) if context.update else state

    def _rows(self, x: jax.Array, before: tuple[jax.Array, ...] | None, context: Context):
        """q, k and v (B, T, H, D), q and k rotated by their places in the mini-batch, and the convolutions' states."""
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        shared, value = (Projection(config.num_heads * config.head_dim, dtype, name=name)(x) for name in ('key', 'value'))
        done = [
            ShortConvolution(use_bias=True, activate=False, name=f'{name}_convolution')(shared, last, context.segment_ids)
            for name, last in zip(('query', 'key'), before or (None, None), strict=True)
        ]
        place = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
        if context.position is not None:
            place += context.position[:, None]
        turn = lambda rows: rotate(split_heads(rows, config.num_heads), place % config.memory.chunk_size, config.attention.rope_theta)
        query, key = (turn(rows) for rows, _ in done)
        return (query, key, split_heads(value, config.num_heads)), tuple(last for _, last in done)

    def _rate(self, x: jax.Array) -> jax.Array:
        """eta_j (B, T, H): the base rate times sigmoid(w_h . x_j + b_h) / D."""
        config = self.config
        wide = jnp.promote_types(jnp.dtype(config.dtype), jnp.float32)
        logits = Projection(config.num_heads, wide, scale=_INITIAL_SCALE * config.width**0.5, name='gate_logits')(x)
        bias = self.param('gate_bias', nn.initializers.zeros, (1, config.num_heads))
        return _BASE_RATES[config.memory.kind] / config.head_dim * jax.nn.sigmoid(logits + bias[None])

    def _token_scale(self) -> jax.Array:
        """s_i (C,): 1 / i plus what is learned, at least 0."""
        size = self.config.memory.chunk_size
        learned = self.param('token_offset', nn.initializers.zeros, (size,))
        return jnp.maximum(1 / jnp.arange(1, size + 1, dtype=learned.dtype) + learned, 0.0)

    def _inner_norm(self) -> Norm:
        shape = self.config.num_heads, self.config.head_dim
        return Norm(
            self.param('inner_norm_scale', nn.initializers.ones, shape), self.param('inner_norm_shift', nn.initializers.zeros, shape)
        )

    def _initial(self) -> Weights:
        """W_0 and b_0; the last layer of TTT-MLP starts smaller by the square root of the number of residual branches."""
        config, heads, width = self.config, self.config.num_heads, self.config.head_dim
        zeros, small = nn.initializers.zeros, nn.initializers.normal(_INITIAL_SCALE)
        if config.memory.kind == 'matrix':
            kernel = self.param('initial_memory', small, (heads, width, width))
            return (Layer(kernel, self.param('initial_bias', zeros, (heads, 1, width))),)
        hidden = config.memory.hidden_dim or 4 * width
        smaller = nn.initializers.normal(_INITIAL_SCALE * (2 * config.num_layers) ** -0.5)
        first = Layer(
            self.param('initial_memory_in', small, (heads, width, hidden)), self.param('initial_bias_in', zeros, (heads, 1, hidden))
        )
        kernel = self.param('initial_memory_out', smaller, (heads, hidden, width))
        return first, Layer(kernel, self.param('initial_bias_out', zeros, (heads, 1, width)))
