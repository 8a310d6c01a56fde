"""Parts every layer is made of: projections, norms, the short convolution, and what a call tells its token mixer.

Einsum letters: b batch, t time, h head, d channel.
"""

import dataclasses
import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from nested_jax.memory.rows import normalize, scale_rows, square_norms

CONVOLUTION_WIDTH = 4


def _convolution_initializer(key: jax.Array, shape: tuple[int, ...], dtype=jnp.float32) -> jax.Array:
    """Uniform within 1 / sqrt(width), the default of the public implementations."""
    return jax.random.uniform(key, shape, dtype, -1.0, 1.0) / jnp.sqrt(float(shape[0]))


def _bias_initializer(key: jax.Array, shape: tuple[int, ...], dtype=jnp.float32) -> jax.Array:
    """As the kernel's."""
    return _convolution_initializer(key, (CONVOLUTION_WIDTH, *shape), dtype)[0]


@functools.partial(jax.tree_util.register_dataclass, data_fields=['position', 'segment_ids'], meta_fields=['update'])
@dataclasses.dataclass(frozen=True)
class Context:
    """What one call of the model tells every token mixer."""

    position: jax.Array | None  # (B,) int32 tokens of the document read before this call; None: none
    segment_ids: jax.Array | None  # (B, T) int32 documents begun in this call up to each token; None: the call goes on with one
    update: bool  # False: memories are read, and the state comes back as it was given


class Projection(nn.Module):
    """Linear map over the last axis, (..., D_in) -> (..., features), without bias unless `use_bias`.

    Leading axes are flattened into one: XLA's CPU backward pass of a 2-D product is a quarter faster. Where the call has a collection
    'lora' with an adapter for this layer, `a` (D_in, R) and `b` (R, features), their product is added to the kernel (`seal/lora.py`).
    """

    features: int
    dtype: jnp.dtype
    scale: float = 1.0  # of the initial standard deviation 1 / sqrt(D_in)
    initializer: Callable | None = None  # in its place
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        initializer = self.initializer or nn.initializers.variance_scaling(self.scale**2, 'fan_in', 'normal')
        kernel = self.param('kernel', initializer, (x.shape[-1], self.features))
        flat = x.reshape(-1, x.shape[-1]).astype(self.dtype)
        y = flat @ kernel.astype(self.dtype)
        if self.has_variable('lora', 'a'):
            a, b = (self.get_variable('lora', name).astype(self.dtype) for name in ('a', 'b'))
            y += (flat @ a) @ b
        if self.use_bias:
            bias = self.param('bias', nn.initializers.zeros, (self.features,))
            y += jnp.broadcast_to(bias.astype(self.dtype), y.shape)
        return y.reshape(*x.shape[:-1], self.features)


class RMSNorm(nn.Module):
    """x / rms(x) times a learned scale over the last axis, computed in float32, (..., D) -> (..., D) in x's dtype."""

    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param('scale', nn.initializers.ones, (x.shape[-1],))
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        rows = scale_rows(wide, jax.lax.rsqrt(square_norms(wide) / x.shape[-1] + self.epsilon))
        return (rows * jnp.broadcast_to(scale, x.shape)).astype(x.dtype)


class ShortConvolution(nn.Module):
    """Causal depthwise convolution of width 4 and SiLU, (B, T, D) -> (B, T, D); never reaches across documents."""

    use_bias: bool = False
    activate: bool = True  # False: no SiLU

    @nn.compact
    def __call__(
        self, x: jax.Array, state: jax.Array | None, segment_ids: jax.Array | None, lengths: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """`state` holds the three inputs before this call, (B, 3, D), zeros or None at a document's start; returned anew.

        With `lengths`, (B,), a row ends there and what follows is padding; not together with `segment_ids`.
        """
        kernel = self.param('kernel', _convolution_initializer, (CONVOLUTION_WIDTH, x.shape[-1])).astype(x.dtype)
        before = CONVOLUTION_WIDTH - 1
        if state is None:
            state = jnp.zeros((x.shape[0], before, x.shape[-1]), x.dtype)
        window = jnp.concatenate([state.astype(x.dtype), x], 1)
        if segment_ids is not None:
            ids = jnp.concatenate([jnp.broadcast_to(segment_ids[:, :1], (x.shape[0], before)), segment_ids], 1)
        y = jnp.zeros_like(x)
        for tap in range(CONVOLUTION_WIDTH):
            shifted = window[:, tap : tap + x.shape[1]]
            if segment_ids is not None:
                shifted = jnp.where((ids[:, tap : tap + x.shape[1]] == segment_ids)[..., None], shifted, 0)
            y += shifted * jnp.broadcast_to(kernel[tap], x.shape)
        if self.use_bias:
            bias = self.param('bias', _bias_initializer, (x.shape[-1],)).astype(x.dtype)
            y += jnp.broadcast_to(bias, x.shape)
        if lengths is None:
            new_state = window[:, x.shape[1] :]
        else:
            new_state = jnp.take_along_axis(window, (lengths[:, None] + jnp.arange(before)[None])[:, :, None], axis=1)
        if segment_ids is not None:
            new_state = jnp.where((ids[:, x.shape[1] :] == segment_ids[:, -1:])[..., None], new_state, 0)
        return jax.nn.silu(y) if self.activate else y, new_state


def l2_normalize(x: jax.Array) -> jax.Array:
    """x / |x| over the last axis, in float32 or wider; zero stays zero, with finite derivatives."""
    return normalize(x.astype(jnp.promote_types(x.dtype, jnp.float32)))


def split_heads(x: jax.Array, num_heads: int) -> jax.Array:
    """(B, T, H * D) -> (B, T, H, D)."""
    return x.reshape(*x.shape[:-1], num_heads, -1)
