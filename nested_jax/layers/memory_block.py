"""What surrounds every written memory: projections, short convolutions, normalised keys, gates, and the gated output norm."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from nested_jax.config import ModelConfig
from nested_jax.layers.common import Context, Projection, RMSNorm, ShortConvolution, l2_normalize, split_heads


class MemoryInputs(NamedTuple):
    """What a memory reads and is written from; all (B, T, H, ...)."""

    query: jax.Array  # (B, T, H, D) float32, |q| = 1
    key: jax.Array  # (B, T, H, D) float32, |k| = 1
    value: jax.Array  # (B, T, H, D)
    gates: dict[str, jax.Array]  # name -> (B, T, H) float32 logits
    retention_scale: jax.Array  # (H,) float32 rates of forgetting
    output_gate: jax.Array | None  # (B, T, H, D); None where the block has no output
    convolution: tuple[jax.Array, ...]  # the convolutions' states after the call


class MemoryBlock(nn.Module):
    """The projections before and after a memory.

    `gates` names the data-dependent scalars of each token and head: 'alpha' (retention), 'eta' (learning rate),
    'momentum'. `has_output=False` leaves out the output's gate, norm and projection, for layers that have their own.
    """

    config: ModelConfig
    gates: tuple[str, ...]
    has_output: bool = True

    def setup(self):
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        inner = config.num_heads * config.head_dim
        self.query, self.key, self.value, self.gate = (Projection(inner, dtype) for _ in range(4))
        self.convolutions = [ShortConvolution(name=f'{name}_convolution') for name in ('query', 'key', 'value')]
        self.gate_logits = Projection(len(self.gates) * config.num_heads, jnp.promote_types(dtype, jnp.float32))
        self.gate_bias = self.param('gate_bias', _gate_bias(self.gates), (len(self.gates), config.num_heads))
        self.retention_log_scale = self.param('retention_log_scale', _retention_log_scale, (config.num_heads,))
        self.norm = RMSNorm(config.norm_epsilon)
        self.output_projection = Projection(config.width, dtype, scale=(2 * config.num_layers) ** -0.5)

    def inputs(
        self, x: jax.Array, convolution: tuple[jax.Array, ...] | None, context: Context, lengths: jax.Array | None = None
    ) -> MemoryInputs:
        """(B, T, width), the convolutions' states and, of padded rows, their lengths (B,) -> the memory's inputs."""
        before = (None,) * 3 if convolution is None else convolution
        rows = zip(self.convolutions, (self.query(x), self.key(x), self.value(x)), before, strict=True)
        done = [convolve(row, state, context.segment_ids, lengths) for convolve, row, state in rows]
        query, key, value = (split_heads(row, self.config.num_heads) for row, _ in done)
        logits = self.gate_logits(x).reshape(*x.shape[:2], len(self.gates), -1) + self.gate_bias[None, None]
        return MemoryInputs(
            l2_normalize(query), l2_normalize(key), value,
            {name: logits[:, :, i] for i, name in enumerate(self.gates)}, jnp.exp(self.retention_log_scale),
            split_heads(self.gate(x), self.config.num_heads) if self.has_output else None, tuple(state for _, state in done),
        )  # fmt: skip

    def queries(self, x: jax.Array, convolution: jax.Array | None, context: Context) -> tuple[jax.Array, jax.Array]:
        """(B, T, width) and the state of the queries' convolution -> queries as `inputs` makes them, and the state."""
        rows, state = self.convolutions[0](self.query(x), convolution, context.segment_ids)
        return l2_normalize(split_heads(rows, self.config.num_heads)), state

    def output(self, y: jax.Array, gate: jax.Array) -> jax.Array:
        """(B, T, H, D) of the memory and of the output gate -> (B, T, width)."""
        rows = self.norm(y).astype(gate.dtype) * jax.nn.silu(gate)
        return self.output_projection(rows.reshape(*rows.shape[:2], -1))


def log_retention(logits: jax.Array, scale: jax.Array) -> jax.Array:
    """log alpha = -scale * softplus(logits), (B, T, H) and (H,) -> (B, T, H): in (0, 1) by construction, exact near both ends."""
    return -scale[None, None] * jax.nn.softplus(logits)


def _retention_log_scale(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """log of U(1, 16), the spread of time scales of Mamba-2 and Gated DeltaNet."""
    return jnp.log(jax.random.uniform(key, shape, minval=1.0, maxval=16.0))


def _gate_bias(gates: tuple[str, ...]):
    """Retention starts with steps log-uniform in [1e-3, 1e-1]; learning rate and momentum start at one half."""

    def initialize(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        step = jnp.exp(jax.random.uniform(key, shape, minval=jnp.log(1e-3), maxval=jnp.log(1e-1)))
        inverse_softplus = step + jnp.log(-jnp.expm1(-step))
        is_alpha = jnp.asarray([name == 'alpha' for name in gates])[:, None]
        return jnp.where(is_alpha, inverse_softplus, 0.0)

    return initialize
