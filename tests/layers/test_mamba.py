"""The Mamba layer against its equations in numpy, and how it starts."""

import jax
import jax.numpy as jnp
import numpy as np

from nested_jax.config import LevelConfig, ModelConfig
from nested_jax.layers.common import Context
from nested_jax.layers.mamba import Mamba

WIDTH, CHANNELS, RANK = 20, 40, 2
CONTEXT = Context(None, None, True)


def _layer(dtype='float64') -> Mamba:
    return Mamba(ModelConfig(mixer='mamba', num_layers=1, width=WIDTH, num_heads=2, head_dim=10, levels=(LevelConfig(1, 1),), dtype=dtype))


def _silu(x):
    return x / (1 + np.exp(-x))


def _equations(p, x):
    """Sec. 3.4 and Algorithm 2, arXiv:2312.00752v2, for one sequence (T, width).

    The order of the parts and where biases are is as in the authors' mamba_simple.py; the paper's text was not at hand.
    """
    rows, z = x @ p['value']['kernel'], x @ p['gate']['kernel']
    padded = np.pad(rows, ((3, 0), (0, 0)))
    taps = sum(padded[tap : tap + len(x)] * p['value_convolution']['kernel'][tap] for tap in range(4))
    rows = _silu(taps + p['value_convolution']['bias'])
    step, b, c = np.split(rows @ p['selection']['kernel'], (RANK, RANK + 16), axis=1)
    dt = np.log1p(np.exp(step @ p['gate_step']['kernel'] + p['step_bias']))
    a, h, y = -np.exp(p['retention_log_rates'].T), np.zeros((CHANNELS, 16)), []
    for t in range(len(x)):
        h = np.exp(dt[t][:, None] * a) * h + (dt[t] * rows[t])[:, None] * b[t][None]
        y.append(h @ c[t] + p['skip'] * rows[t])
    return (np.array(y) * _silu(z)) @ p['output']['kernel'], h


def test_the_layer_is_that_of_the_equations(x64):
    rng, layer = np.random.default_rng(0), _layer()
    x = rng.normal(size=(2, 9, WIDTH))
    shapes = jax.eval_shape(lambda x: layer.init(jax.random.key(0), x, None, CONTEXT)['params'], x)
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape) / np.sqrt(leaf.shape[0] if len(leaf.shape) > 1 else 4), shapes)
    y, state = jax.jit(lambda params, x: layer.apply({'params': params}, x, None, CONTEXT))(params, x)
    for row in range(2):
        expected, memory = _equations(params, x[row])
        np.testing.assert_allclose(y[row], expected, rtol=0, atol=1e-12)
        np.testing.assert_allclose(state.memory[row], memory.T, rtol=0, atol=1e-12)


def test_it_starts_as_published():
    layer = _layer('bfloat16')
    init = jax.jit(lambda key: layer.init_with_output(key, jnp.ones((2, 5, WIDTH), jnp.bfloat16), None, CONTEXT))
    (y, state), variables = init(jax.random.key(0))
    params = variables['params']
    np.testing.assert_allclose(jnp.exp(params['retention_log_rates']), np.arange(1.0, 17)[:, None] * np.ones((1, CHANNELS)), rtol=1e-6)
    step = jax.nn.softplus(params['step_bias'])
    assert 0.9e-3 < float(step.min()) < 5e-3 and 0.02 < float(step.max()) < 0.11
    assert (params['skip'] == 1).all() and params['gate_step']['kernel'].shape == (RANK, CHANNELS)
    assert 0 < float(jnp.abs(params['value_convolution']['bias']).max()) <= 0.5
    assert y.dtype == state.convolution.dtype == jnp.bfloat16 and state.memory.dtype == jnp.float32
