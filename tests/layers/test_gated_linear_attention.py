"""Gated linear attention: the layer's equations written out. The recurrence is compared in tests/memory/test_matrix.py."""

import numpy as np

from nested_jax.config import LevelConfig, MemoryConfig, ModelConfig
from nested_jax.layers.gated_linear_attention import GatedLinearAttention
from tests.layers.transcriptions import rms_norm, run_layer, silu


def test_the_layer_is_its_equations(x64):
    """Sec. 4.1 and 4.4 of arXiv:2312.06635: decays of rank 16 with temperature 16, keys half as wide as values."""
    config = ModelConfig(
        mixer='gated-linear-attention', num_layers=1, width=32, num_heads=2, head_dim=8, levels=(LevelConfig(1, 1),), dtype='float64',
        memory=MemoryConfig(chunk_size=4, projection_chunk_size=4),
    )  # fmt: skip
    params, x, y, state = run_layer(GatedLinearAttention(config), width=32)
    block = params['block']
    query, key, value, gate = ((x @ block[name]['kernel']).reshape(2, 13, 2, -1) for name in ('query', 'key', 'value', 'gate'))
    assert key.shape[-1] == 4 and value.shape[-1] == 8 and params['gate_down']['kernel'].shape == (32, 16)
    logits = x @ params['gate_down']['kernel'] @ params['gate_up']['kernel'] + params['gate_bias'][0]
    kept = ((1 / (1 + np.exp(-logits))) ** (1 / 16)).reshape(2, 13, 2, 4)
    memory, reads = np.zeros((2, 2, 4, 8)), []
    for t in range(13):
        memory = kept[:, t, :, :, None] * memory + key[:, t, :, :, None] * value[:, t, :, None]
        reads.append(np.einsum('bhkv,bhk->bhv', memory, query[:, t]) / 2)
    gated = rms_norm(np.stack(reads, 1), block['norm']['scale']) * silu(gate)
    np.testing.assert_allclose(y, gated.reshape(2, 13, -1) @ block['output_projection']['kernel'], rtol=0, atol=1e-11)
    np.testing.assert_allclose(state.memory, memory, rtol=0, atol=1e-11)
