"""Normalised linear attention against a public implementation, and the layer as the mean it is."""

import jax
import jax.numpy as jnp
import numpy as np

from nested_jax.config import LevelConfig, MemoryConfig, ModelConfig
from nested_jax.layers.linear_attention import LinearAttention, normalized_linear_attention
from tests.layers.transcriptions import run_layer

CONFIG = ModelConfig(
    mixer='linear-attention', num_layers=1, width=16, num_heads=2, head_dim=8, levels=(LevelConfig(1, 1),), dtype='float64',
    memory=MemoryConfig(chunk_size=4, projection_chunk_size=4),
)  # fmt: skip


def test_normalised_linear_attention_matches_the_reference(x64, golden):
    """Outputs, last state and gradients; its features are positive already, and its scale of 16^-1/2 cancels down to its epsilon."""
    data = golden('linear_attn_normalized')

    @jax.jit
    def values_and_gradients(q, k, v):
        outputs, pull = jax.vjp(lambda *args: normalized_linear_attention(*args, chunk_size=32), q, k, v)
        return outputs, pull((data['do'], jnp.concatenate([data['dht'], jnp.zeros_like(data['dht'][..., :1])], -1)))

    (y, state), gradients = values_and_gradients(data['q'] / 4, data['k'], data['v'])
    gradients = (gradients[0] / 4, *gradients[1:])
    expected = (data['o'], data['ht'], data['dq'], data['dk'], data['dv'])
    for got, wanted in zip((y, state[..., :-1], *gradients), expected, strict=True):
        assert np.sqrt(np.mean((got - wanted) ** 2)) < 1e-9 * np.sqrt(np.mean(wanted**2))
    np.testing.assert_allclose(state[..., -1], data['k'].sum(1), rtol=1e-12)


def test_the_layer_is_its_equations(x64):
    """Eq. (9) of arXiv:2006.16236 written out: a mean of the values so far, weighted by phi(q).phi(k), phi = elu + 1."""
    params, x, y, _ = run_layer(LinearAttention(CONFIG), width=16)
    query, key, value = ((x @ params[name]['kernel']).reshape(2, 13, 2, 8) for name in ('query', 'key', 'value'))
    query, key = (np.where(rows > 0, rows + 1, np.exp(np.minimum(rows, 0))) for rows in (query, key))
    scores = np.tril(np.einsum('bthk,bshk->bhts', query, key))
    means = np.einsum('bhts,bshv->bthv', scores / scores.sum(-1, keepdims=True), value)
    np.testing.assert_allclose(y, means.reshape(2, 13, -1) @ params['output']['kernel'], rtol=0, atol=1e-9)


def test_reading_an_empty_memory_gives_zero_and_finite_gradients():
    rows = (jnp.ones((1, 3, 1, 2)), jnp.zeros((1, 3, 1, 2)), jnp.ones((1, 3, 1, 4)))
    read = lambda *rows: normalized_linear_attention(*rows)[0].sum()
    y, gradients = jax.jit(jax.value_and_grad(read, argnums=(0, 1, 2)))(*rows)
    assert y == 0 and all(np.isfinite(gradient).all() for gradient in gradients)
