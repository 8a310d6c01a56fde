"""Softmax attention with rotary positions, grouped queries and an optional window.

Its memory is the list of keys and values itself (Eq. 62, arXiv:2512.24695v1), here the last `capacity` of them. Persistent tokens
(Sec. 3.3, arXiv:2501.00663v1) are learned ones in front of every sequence, knowledge of the task, which every query sees whatever the
window. They have no position: a query's score with them is that of the unrotated rows, the same wherever in a document it stands.

Einsum letters: b batch, t queries, s keys, n persistent tokens, g key and value heads, r query heads of each, d channel.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from nested_jax.config import ModelConfig, RopeScaling
from nested_jax.layers import sequence
from nested_jax.layers.common import CONVOLUTION_WIDTH, Context, Projection, RMSNorm, ShortConvolution, split_heads
from nested_jax.layers.kernels import attention_implementation


class AttentionState(NamedTuple):
    """The last `capacity` tokens; all zeros means none."""

    key: jax.Array  # (B, S, H_kv, D) compute dtype, rotated
    value: jax.Array  # (B, S, H_kv, D) compute dtype
    position: jax.Array  # (B, S) int32
    segment_id: jax.Array  # (B, S) int32 documents, counted within the call; 0 in a state: that of its last token
    filled: jax.Array  # (B, S) bool
    convolution: tuple[jax.Array, ...] | None  # with short convolutions: inputs of q's, k's and v's


class Persistent(NamedTuple):
    """What a call's queries see of the persistent tokens."""

    scores: jax.Array  # (B, T, H, N) not scaled, float32 or wider
    value: jax.Array  # (N, H_kv, D)

    def part(self, start: int, end: int) -> 'Persistent':
        """That of some of the queries."""
        return self._replace(scores=self.scores[:, start:end])


def persistent_tokens(module: nn.Module, config: ModelConfig) -> jax.Array:
    """Declares the learned (N, width) tokens, of the size of normed rows, as a parameter of `module`."""
    return module.param('persistent_tokens', nn.initializers.normal(1.0), (config.attention.num_persistent, config.width))


def persistent_memory(query: jax.Array, key: jax.Array, value: jax.Array) -> Persistent:
    """Scores of unrotated queries (B, T, H, D) with persistent tokens' keys, and the values; both (N, H_kv, D)."""
    wide = jnp.promote_types(query.dtype, jnp.float32)
    scores = jnp.einsum('btgrd,ngd->btgrn', _group(query, key.shape[1]), key, preferred_element_type=wide)
    return Persistent(scores.reshape(*query.shape[:3], -1), value)


def attend(query: jax.Array, key: jax.Array, value: jax.Array, visible: jax.Array, persistent: Persistent | None) -> jax.Array:
    """Softmax attention over the visible keys and the persistent tokens, scaled by D^-1/2.

    Args:
        query: (B, T, H, D), rotated as the keys are.
        key, value: (B, S, H_kv, D).
        visible: (B or 1, T, S) bool.
        persistent: tokens every query sees besides.

    Returns:
        (B, T, H, D) in the dtype of the values.
    """
    if persistent is None:
        return jax.nn.dot_product_attention(query, key, value, mask=visible[:, None])
    wide, count = jnp.promote_types(query.dtype, jnp.float32), persistent.value.shape[0]
    scores = jnp.einsum('btgrd,bsgd->btgrs', _group(query, key.shape[2]), key, preferred_element_type=wide)
    scores = jnp.where(visible[:, :, None, None], scores, -jnp.inf)
    scores = jnp.concatenate([persistent.scores.reshape(*scores.shape[:4], count), scores], -1)
    weights = jax.nn.softmax(scores * query.shape[-1] ** -0.5, axis=-1).astype(value.dtype)
    y = jnp.einsum('btgrn,ngd->btgrd', weights[..., :count], persistent.value)
    y += jnp.einsum('btgrs,bsgd->btgrd', weights[..., count:], value)
    return y.reshape(query.shape)


def _group(query: jax.Array, kv_heads: int) -> jax.Array:
    """(B, T, H, D) -> (B, T, H_kv, H / H_kv, D)."""
    return query.reshape(*query.shape[:2], kv_heads, -1, query.shape[-1])


def rotary_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None = None, dtype: np.dtype | str = 'float32') -> np.ndarray:
    """Radians a token by which each pair of channels is turned.

    With Llama 3's scaling, wavelengths that a sequence of pre-training did not hold in full are stretched by `factor`, and those between
    the two limits in part (the published 3.1 and 3.2 models; Sec. 3.2, arXiv:2407.21783v3, has their theta alone).

    Computed on the host, with the roundings of the published implementations: at token 3,000 the last bit of a float32 frequency is worth
    1e-4 of the angle.

    Args:
        head_dim: D, even.
        theta: base of the wavelengths.
        scaling: None for none.
        dtype: 'float32' or 'float64'.

    Returns:
        (D / 2,) in `dtype`.
    """
    frequency = 1 / (theta ** (np.arange(0, head_dim, 2) / head_dim)).astype(dtype)
    if scaling is None:
        return frequency
    turns = scaling.original_max_length / (2 * np.pi / frequency)
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return (1 - kept) * frequency / scaling.factor + kept * frequency


def rotate(x: jax.Array, position: jax.Array, theta: float, scaling: RopeScaling | None = None) -> jax.Array:
    """Rotary position embedding, half-split pairing (Sec. 3.4, arXiv:2104.09864v5).

    Args:
        x: (B, T, H, D), D even.
        position: (B, T) int32.
        theta: base of the wavelengths.
        scaling: of the wavelengths, see `rotary_frequencies`.

    Returns:
        (B, T, H, D) in x's dtype.
    """
    frequency = rotary_frequencies(x.shape[-1], theta, scaling, jnp.promote_types(x.dtype, jnp.float32))
    angle = position[:, :, None, None] * jnp.asarray(frequency)[None, None, None]
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    first, second = jnp.split(x.astype(angle.dtype), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1).astype(x.dtype)


class Attention(nn.Module):
    """Token mixer; `config.attention` sets it.

    `has_output=False` returns what the heads read, (B, T, H, D), for layers that have their own gate and output projection.
    """

    config: ModelConfig
    has_output: bool = True

    @property
    def capacity(self) -> int:
        """Tokens a query sees at most, itself included."""
        return min(self.config.attention.window or self.config.max_length, self.config.max_length)

    @nn.compact
    def __call__(self, x: jax.Array, state: AttentionState | None, context: Context) -> tuple[jax.Array, AttentionState]:
        """(B, T, width) -> (B, T, width), and the state after the call's last token."""
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        heads = {'query': config.num_heads, 'key': config.num_kv_heads, 'value': config.num_kv_heads}
        bias = config.attention.qkv_bias
        projections = {name: Projection(n * config.head_dim, dtype, use_bias=bias, name=name) for name, n in heads.items()}
        norms = {}
        if config.attention.qk_norm:
            norms = {name: RMSNorm(config.norm_epsilon, name=f'{name}_norm') for name in ('query', 'key')}
        split = lambda name, rows: norms.get(name, lambda x: x)(split_heads(rows, heads[name]))
        rows = {name: project(x) for name, project in projections.items()}
        convolution, split_over = None, state is None and sequence.is_split()
        if config.attention.short_convolution:
            before = (None,) * 3 if state is None else state.convolution
            if split_over:
                before = (sequence.tokens_before(x, context.segment_ids, CONVOLUTION_WIDTH - 1) for x in rows.values())
            rows, convolution = _convolve(rows, before, context.segment_ids)
        query, key, value = (split(name, rows[name]) for name in heads)
        persistent = None
        if config.attention.num_persistent is not None:
            tokens = persistent_tokens(self, config)
            persistent = persistent_memory(query, *(split(name, projections[name](tokens)) for name in ('key', 'value')))
        position = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
        if context.position is not None:
            position += context.position[:, None]
        if split_over:
            position += sequence.first_token(x.shape[1])
        theta, scaling = config.attention.rope_theta, config.attention.rope_scaling
        query, key = (rotate(rows, position, theta, scaling) for rows in (query, key))
        segment_id = jnp.zeros(x.shape[:2], jnp.int32) if context.segment_ids is None else context.segment_ids
        new = AttentionState(key, value, position, segment_id, jnp.ones(x.shape[:2], bool), convolution)
        known = new if state is None else _append(state, new)
        if split_over:
            known = AttentionState(*sequence.gather(new[:-1]), convolution)
        y = self._attend(query, known, new, persistent, masked=state is not None or split_over or context.segment_ids is not None)
        if self.has_output:
            y = Projection(config.width, dtype, scale=(2 * config.num_layers) ** -0.5, name='output')(y.reshape(*x.shape[:2], -1))
        return y, _last(known, self.capacity) if context.update else state

    def _attend(
        self, query: jax.Array, known: AttentionState, new: AttentionState, persistent: Persistent | None, *, masked: bool
    ) -> jax.Array:
        if not masked:
            return self._attend_in_blocks(query, known.key, known.value, persistent)
        distance = new.position[:, :, None] - known.position[:, None]
        visible = (distance >= 0) & (distance < self.capacity) & (new.segment_id[:, :, None] == known.segment_id[:, None])
        visible &= known.filled[:, None]
        return attend(query, known.key, known.value, visible, persistent)

    def _attend_in_blocks(self, query: jax.Array, key: jax.Array, value: jax.Array, persistent: Persistent | None) -> jax.Array:
        """Causal attention of one document from its start; a block of queries skips the keys that none of them sees."""
        length, block = query.shape[1], self.config.attention.query_block or query.shape[1]
        window = (self.capacity - 1, 0) if length > self.capacity else None
        implementation = attention_implementation(query.dtype)

        @jax.checkpoint
        def attend_block(queries, keys, values, persistent, offset):
            distance = offset + jnp.arange(queries.shape[1])[:, None] - jnp.arange(keys.shape[1])[None]
            visible = (distance >= 0) & (distance < self.capacity)
            return attend(queries, keys, values, visible[None], persistent)

        if persistent is None and (block >= length or implementation != 'xla'):
            return jax.nn.dot_product_attention(query, key, value, is_causal=True, local_window_size=window, implementation=implementation)
        parts = []
        for start in range(0, length, block):
            end, first = min(start + block, length), max(start - self.capacity + 1, 0)
            seen = None if persistent is None else persistent.part(start, end)
            parts.append(attend_block(query[:, start:end], key[:, first:end], value[:, first:end], seen, start - first))
        return jnp.concatenate(parts, 1)


def _convolve(rows: dict[str, jax.Array], before: tuple, segment_ids: jax.Array | None) -> tuple[dict[str, jax.Array], tuple]:
    done = {
        name: ShortConvolution(name=f'{name}_convolution')(x, state, segment_ids)
        for (name, x), state in zip(rows.items(), before, strict=True)
    }
    return {name: y for name, (y, _) in done.items()}, tuple(state for _, state in done.values())


def _append(state: AttentionState, new: AttentionState) -> AttentionState:
    joined = [jnp.concatenate([a, b], 1) for a, b in zip(state[:-1], new[:-1], strict=True)]
    return AttentionState(*joined, new.convolution)


def _last(known: AttentionState, capacity: int) -> AttentionState:
    """The newest `capacity` tokens; fewer are filled up with empty places in front."""
    missing = max(capacity - known.key.shape[1], 0)

    def cut(x: jax.Array) -> jax.Array:
        return jnp.pad(x[:, -capacity:], [(0, 0), (missing, 0)] + [(0, 0)] * (x.ndim - 2))

    filled = known.filled & (known.segment_id == known.segment_id[:, -1:])
    known = known._replace(filled=filled, segment_id=jnp.zeros_like(known.segment_id))
    return AttentionState(*(cut(x) for x in known[:-1]), known.convolution)
