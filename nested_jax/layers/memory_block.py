"""What surrounds every written memory: projections, short convolutions, normalised keys, gates, and the gated output norm."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from nested_jax.config import ModelConfig
from nested_jax.layers.common import Context, Projection, RMSNorm, ShortConvolution, l2_normalize, split_heads
from nested_jax.memory.mlp import MLPWeights


class MemoryInputs(NamedTuple):
    """What a memory reads and is written from; all (B, T, H, ...)."""

    query: jax.Array  # (B, T, H, D) float32, |q| = 1
    key: jax.Array  # (B, T, H, D) float32, |k| = 1
    value: jax.Array  # (B, T, H, D)
    gates: dict[str, jax.Array]  # name -> (B, T, H) float32 logits
    retention_scale: jax.Array | None  # (H,) float32 rates of forgetting; None without a gate 'alpha'
    output_gate: jax.Array | None  # (B, T, H, D)
    convolution: tuple[jax.Array, ...]  # the convolutions' states after the call


class HeadBlock(nn.Module):
    """The projections before a memory, and after it a norm of each head's reads, a swish gate and the output projection."""

    config: ModelConfig
    key_dim: int | None = None  # of a head, as below; None: config.head_dim
    value_dim: int | None = None
    gated: bool = True  # False: no gate after the norm

    def setup(self):
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        keys, values = (config.num_heads * (dim or config.head_dim) for dim in (self.key_dim, self.value_dim))
        self.query, self.key, self.value, self.gate = (Projection(inner, dtype) for inner in (keys, keys, values, values))
        self.norm = RMSNorm(config.norm_epsilon)
        self.output_projection = Projection(config.width, dtype, scale=(2 * config.num_layers) ** -0.5)

    def rows(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(B, T, width) -> queries, keys and values, (B, T, H, D)."""
        query, key, value = (split_heads(project(x), self.config.num_heads) for project in (self.query, self.key, self.value))
        return query, key, value

    def output_gate(self, x: jax.Array) -> jax.Array | None:
        """(B, T, width) -> (B, T, H, D); None where there is none."""
        return split_heads(self.gate(x), self.config.num_heads) if self.gated else None

    def output(self, y: jax.Array, gate: jax.Array | None) -> jax.Array:
        """(B, T, H, D) of the memory and of the output gate -> (B, T, width)."""
        rows = self.norm(y).astype(self.config.dtype)
        rows = rows if gate is None else rows * jax.nn.silu(gate)
        return self.output_projection(rows.reshape(*rows.shape[:2], -1))


class MemoryBlock(HeadBlock):
    """A `HeadBlock` with short convolutions, normalised queries and keys, and gates.

    `gates` names the data-dependent scalars of each token and head: 'alpha' (retention), 'eta' (learning rate),
    'momentum'.
    """

    gates: tuple[str, ...] = ()

    def setup(self):
        super().setup()
        heads, wide = self.config.num_heads, jnp.promote_types(self.config.dtype, jnp.float32)
        self.convolutions = [ShortConvolution(name=f'{name}_convolution') for name in ('query', 'key', 'value')]
        self.gate_logits = Projection(len(self.gates) * heads, wide)
        self.gate_bias = self.param('gate_bias', gate_bias(self.gates), (len(self.gates), heads))
        self.retention_log_scale = self.param('retention_log_scale', retention_log_scale, (heads,)) if 'alpha' in self.gates else None

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
            {name: logits[:, :, i] for i, name in enumerate(self.gates)},
            None if self.retention_log_scale is None else jnp.exp(self.retention_log_scale),
            self.output_gate(x), tuple(state for _, state in done),
        )  # fmt: skip

    def queries(self, x: jax.Array, convolution: jax.Array | None, context: Context) -> tuple[jax.Array, jax.Array]:
        """(B, T, width) and the state of the queries' convolution -> queries as `inputs` makes them, and the state."""
        rows, state = self.convolutions[0](self.query(x), convolution, context.segment_ids)
        return l2_normalize(split_heads(rows, self.config.num_heads)), state


def log_retention(logits: jax.Array, scale: jax.Array) -> jax.Array:
    """log alpha = -scale * softplus(logits), (B, T, H) and (H,) -> (B, T, H): in (0, 1) by construction, exact near both ends."""
    return -scale[None, None] * jax.nn.softplus(logits)


def initial_mlp(layer: nn.Module, config: ModelConfig, inputs: int | None = None) -> MLPWeights:
    """The learned initial state of an MLP memory, declared as two parameters of `layer`; `inputs` is the head's width when None."""
    heads, width = config.num_heads, config.head_dim
    inputs, hidden = inputs or width, config.memory.hidden_dim or width
    w_in = layer.param('initial_memory_in', nn.initializers.normal(inputs**-0.5), (heads, inputs, hidden))
    return MLPWeights(w_in, layer.param('initial_memory_out', nn.initializers.normal(0.02), (heads, hidden, width)))


def retention_log_scale(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """log of U(1, 16), the spread of time scales of Mamba-2 and Gated DeltaNet."""
    return jnp.log(jax.random.uniform(key, shape, minval=1.0, maxval=16.0))


def gate_bias(gates: tuple[str, ...]):
    """Retention starts with steps log-uniform in [1e-3, 1e-1]; learning rate and momentum start at one half."""

    def initialize(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        step = jnp.exp(jax.random.uniform(key, shape, minval=jnp.log(1e-3), maxval=jnp.log(1e-1)))
        inverse_softplus = step + jnp.log(-jnp.expm1(-step))
        is_alpha = jnp.asarray([name == 'alpha' for name in gates])[:, None]
        return jnp.where(is_alpha, inverse_softplus, 0.0)

    return initialize
