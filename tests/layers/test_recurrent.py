"""How the mixers that read token by token start, and which parts of them are float32."""

import jax
import jax.numpy as jnp
import numpy as np

from nested_jax.config import LevelConfig, ModelConfig
from nested_jax.layers.common import Context
from nested_jax.layers.lstm import LSTM
from nested_jax.layers.srwm import SelfReferentialMatrix


def _start(layer, mixer: str):
    config = ModelConfig(mixer=mixer, num_layers=1, width=64, num_heads=2, head_dim=32, levels=(LevelConfig(1, 1),), dtype='bfloat16')
    rows = jnp.ones((2, 3, 64), jnp.bfloat16)
    (y, state), variables = jax.jit(lambda key: layer(config).init_with_output(key, rows, None, Context(None, None, True)))(
        jax.random.key(0)
    )
    assert y.dtype == jnp.bfloat16 and all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state))
    return variables['params']


def test_lstm_starts_with_open_forget_gates_and_orthogonal_recurrence():
    params = _start(LSTM, 'lstm')
    np.testing.assert_array_equal(params['gate_bias'].sum(1), [0, 64, 0, 0])
    for part in np.split(np.asarray(params['recurrent_kernel']), 4, axis=1):
        np.testing.assert_allclose(part.T @ part, np.eye(64), atol=1e-5)
    np.testing.assert_allclose(params['input']['kernel'].std(), 64**-0.5, rtol=0.05)


def test_srwm_starts_as_the_public_implementation():
    """Normal entries of variance 1 / d, those of the queries a hundredth as large, those of the rates around -1."""
    params = _start(SelfReferentialMatrix, 'srwm')
    for name in ('output', 'query', 'key', 'rate'):
        leaf = params[f'initial_{name}']
        assert leaf.shape == (2, 32, 4 if name == 'rate' else 32)
        np.testing.assert_allclose(leaf.mean(), -1.0 if name == 'rate' else 0.0, atol=0.05)
        np.testing.assert_allclose(leaf.std(), (0.01 if name == 'query' else 1) * 32**-0.5, rtol=0.15)
    assert set(params) == {'initial_output', 'initial_query', 'initial_key', 'initial_rate', 'output'}
