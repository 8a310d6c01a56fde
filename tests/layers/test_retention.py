"""Retention: decays against a public implementation, positions of documents, and the layer's equations written out."""

import jax.numpy as jnp
import numpy as np

from nested_jax.config import LevelConfig, MemoryConfig, ModelConfig
from nested_jax.layers.retention import Retention, _document_positions, log_gamma
from tests.layers.transcriptions import rms_norm, run_layer, silu


def test_decays_match_the_reference(x64, golden):
    """The recurrence itself is compared in tests/memory/test_matrix.py."""
    np.testing.assert_allclose(jnp.exp(log_gamma(2)), golden('retention')['gamma'], rtol=1e-14)
    np.testing.assert_allclose(-jnp.expm1(log_gamma(16)), 2.0 ** -np.arange(5, 21), rtol=1e-14)


def test_positions_are_those_of_the_document():
    before = jnp.array([7, 0], jnp.int32)
    np.testing.assert_array_equal(_document_positions(before, 3, None), [[7, 8, 9], [0, 1, 2]])
    ids = jnp.array([[0, 0, 1, 1, 1, 2], [0, 1, 2, 3, 3, 3]])
    np.testing.assert_array_equal(_document_positions(before, 6, ids), [[7, 8, 0, 1, 2, 0], [0, 0, 0, 0, 1, 2]])


def test_the_layer_is_its_equations(x64):
    """Eq. (3) and (5) to (8) of arXiv:2307.08621, with one complex number for each pair of rotated channels."""
    config = ModelConfig(
        mixer='retention', num_layers=1, width=16, num_heads=2, head_dim=8, levels=(LevelConfig(1, 1),), dtype='float64',
        memory=MemoryConfig(chunk_size=4, projection_chunk_size=4),
    )  # fmt: skip
    params, x, y, state = run_layer(Retention(config), width=16)
    block = params['block']
    query, key, value, gate = ((x @ block[name]['kernel']).reshape(2, 13, 2, -1) for name in ('query', 'key', 'value', 'gate'))
    assert query.shape[-1] == 8 and value.shape[-1] == gate.shape[-1] == 16
    distance = np.arange(13)[:, None] - np.arange(13)
    turned = np.exp(1j * distance[..., None] * 10_000.0 ** (-np.arange(4) / 4))
    pairs = lambda rows: rows[..., :4] + 1j * rows[..., 4:]
    scores = np.einsum('bthk,bshk,tsk->bhts', pairs(query), pairs(key).conj(), turned).real
    decays = np.where(distance >= 0, (1 - 2.0 ** -np.array([5, 6]))[:, None, None] ** np.maximum(distance, 0), 0)
    reads = np.einsum('bhts,bshv->bthv', scores * decays / np.sqrt(8), value)
    expected = (rms_norm(reads, block['norm']['scale']) * silu(gate)).reshape(2, 13, -1) @ block['output_projection']['kernel']
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-11)
    np.testing.assert_array_equal(state.position, [13, 13])
