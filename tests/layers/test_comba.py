"""Comba's layer against a token-by-token transcription of its equations."""

import jax
import jax.numpy as jnp
import numpy as np

from nested_jax.config import LevelConfig, ModelConfig
from nested_jax.layers.comba import Comba
from nested_jax.layers.common import Context
from nested_jax.layers.memory_block import MemoryBlock


def test_layer_equals_its_equations(x64):
    """S' = e^g S, S = S' + beta k (v - S'^T p)^T, o = S^T (q - d p), p = sigmoid(b) k (arXiv:2506.02475), norm and sigmoid gate.

    What comes before the memory is the gated delta rule's, tested in test_memory_layers.py.
    """
    config = ModelConfig(mixer='comba', num_layers=1, width=12, num_heads=2, head_dim=6, levels=(LevelConfig(1, 1),), dtype='float64')
    model, context, rng = Comba(config), Context(None, None, True), np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 9, 12)))
    shapes = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, None, context), x)['params']
    params = jax.tree.map(lambda leaf: 0.5 * rng.normal(size=leaf.shape), shapes)
    y, state = jax.jit(lambda params, x: model.apply({'params': params}, x, None, context))(params, x)

    block = MemoryBlock(config, gates=('alpha', 'eta'))
    inputs = jax.jit(lambda params, x: block.apply({'params': params}, x, None, context, method='inputs'))(params['block'], x)
    q, k, v, alpha, eta, gate, scale = map(
        np.asarray, (*inputs[:3], inputs.gates['alpha'], inputs.gates['eta'], inputs.output_gate, inputs.retention_scale)
    )
    sigmoid = lambda z: 1 / (1 + np.exp(-z))
    p = sigmoid(params['feedback_logit'])[:, None] * k
    query, decay, beta = q - params['output_correction'][:, None] * p, np.exp(-scale * np.logaddexp(0, alpha)), sigmoid(eta)
    memory, rows = np.zeros((2, 2, 6, 6)), []
    for t in range(9):
        memory = decay[:, t, :, None, None] * memory
        error = v[:, t] - np.einsum('bhk,bhkv->bhv', p[:, t], memory)
        memory = memory + beta[:, t, :, None, None] * k[:, t, ..., None] * error[..., None, :]
        rows.append(np.einsum('bhk,bhkv->bhv', query[:, t], memory))
    rows = np.stack(rows, 1)
    rows = rows / np.sqrt((rows**2).mean(-1, keepdims=True) + 1e-6) * params['block']['norm']['scale'] * sigmoid(gate)
    np.testing.assert_allclose(state.memory, memory, rtol=0, atol=1e-12)
    np.testing.assert_allclose(y, rows.reshape(2, 9, 12) @ params['block']['output_projection']['kernel'], rtol=0, atol=1e-11)
