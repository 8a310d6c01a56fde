"""Mamba-2: a public implementation's whole layer rebuilt from its parameters, and initial values."""

import jax
import jax.numpy as jnp
import numpy as np

from nested_jax.config import LevelConfig, MemoryConfig, ModelConfig, StateSpaceConfig
from nested_jax.layers.mamba2 import Mamba2
from tests.layers.transcriptions import CONTEXT

CONFIG = ModelConfig(
    mixer='mamba2', num_layers=1, width=32, num_heads=2, head_dim=16, levels=(LevelConfig(1, 1),), dtype='float64', norm_epsilon=1e-5,
    memory=MemoryConfig(chunk_size=32, projection_chunk_size=32), state_space=StateSpaceConfig(state_dim=16, head_dim=16),
)  # fmt: skip


def test_the_layer_matches_the_reference(x64, golden):
    """Its fused projection gives z, x, B, C and dt in this order, its convolution takes x, B and C."""
    data = golden('layer_mamba2_hf')
    gate, value, key, query, step = jnp.split(data['param.in_proj.weight'], [64, 128, 144, 160])
    taps, bias = data['param.conv1d.weight'][:, 0], data['param.conv1d.bias']
    convolution = lambda start, stop: {'kernel': taps[start:stop].T, 'bias': bias[start:stop]}
    params = {
        'gate': {'kernel': gate.T}, 'value': {'kernel': value.T}, 'shared_key': {'kernel': key.T}, 'shared_query': {'kernel': query.T},
        'value_convolution': convolution(0, 64), 'shared_key_convolution': convolution(64, 80),
        'shared_query_convolution': convolution(80, 96), 'gate_logits': {'kernel': step.T}, 'gate_bias': data['param.dt_bias'][None],
        'retention_log_scale': data['param.A_log'], 'skip': data['param.D'], 'norm': {'scale': data['param.norm.weight']},
        'output': {'kernel': data['param.out_proj.weight'].T},
    }  # fmt: skip
    y, _ = jax.jit(lambda x: Mamba2(CONFIG).apply({'params': params}, x, None, CONTEXT))(data['x'])
    largest = np.abs(data['y_float32']).max()
    assert float(largest) > 0.01
    np.testing.assert_allclose(y, data['y_float32'], rtol=0, atol=2e-5 * largest)


def test_initial_values_are_the_published_ones():
    """A in (1, 16), steps in (1e-3, 1e-1), a skip of one (Sec. 9 and the code of arXiv:2405.21060)."""
    wide = StateSpaceConfig(state_dim=4, head_dim=1)
    config = ModelConfig(mixer='mamba2', num_layers=1, width=64, num_heads=1, head_dim=1, levels=(LevelConfig(1, 1),), state_space=wide)
    params = jax.jit(lambda x: Mamba2(config).init(jax.random.key(0), x, None, CONTEXT))(jnp.zeros((1, 2, 64)))['params']
    scale, step = np.exp(params['retention_log_scale']), np.log1p(np.exp(params['gate_bias'][0]))
    assert scale.shape == step.shape == (128,)
    assert 1 <= scale.min() < 2 and 14 < scale.max() <= 16
    assert 0.99e-3 < step.min() < 2e-3 and 0.05 < step.max() < 0.101
    np.testing.assert_array_equal(params['skip'], 1)
    assert np.abs(params['value_convolution']['bias']).max() <= 0.5 and np.abs(params['value_convolution']['bias']).mean() > 0.1
