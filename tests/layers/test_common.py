"""Norm, gate, short convolution and key normalisation against reference implementations; documents never mix."""

import jax
import jax.numpy as jnp
import numpy as np

from nested_jax.layers.common import Projection, RMSNorm, ShortConvolution, l2_normalize, split_heads


def test_norm_and_gate_match_the_reference(x64, golden):
    data = golden('rmsnorm_gated')
    normed = RMSNorm(1e-5).apply({'params': {'scale': data['weight']}}, data['x'])
    assert normed.dtype == jnp.float64
    np.testing.assert_allclose(normed, data['y_plain'], rtol=0, atol=1e-9)
    # As MemoryBlock.output does it.
    np.testing.assert_allclose(normed * jax.nn.silu(data['z']), data['y_norm_before_gate'], rtol=0, atol=1e-9)
    gated = RMSNorm(1e-5).apply({'params': {'scale': data['weight']}}, data['x'] * jax.nn.silu(data['z']))  # as Mamba-2 does it
    np.testing.assert_allclose(gated, data['y_gate_before_norm'], rtol=0, atol=1e-9)


def test_norm_is_computed_in_float32_and_returns_its_inputs_dtype():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 64)) * 300, jnp.bfloat16)
    variables = {'params': {'scale': jnp.ones(64)}}
    y = RMSNorm().apply(variables, x)
    assert y.dtype == jnp.bfloat16
    expected = RMSNorm().apply(variables, x.astype(jnp.float32)).astype(jnp.bfloat16)
    np.testing.assert_array_equal(y.astype(jnp.float32), expected.astype(jnp.float32))


def _convolve(data, x=None, state=None, segment_ids=None):
    run = lambda x, state, ids: ShortConvolution().apply({'params': {'kernel': data['weight'].T}}, x, state, ids)
    return jax.jit(run)(data['x'] if x is None else x, state, segment_ids)


def test_short_convolution_matches_the_reference(x64, golden):
    data = golden('short_conv')
    expected = jax.nn.silu(data['y'] - data['bias'][None, None])
    y, state = _convolve(data)
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-9)
    np.testing.assert_array_equal(state, data['x'][:, -3:])
    zero = {**data, 'x': data['x'] * 0}
    np.testing.assert_array_equal(_convolve(zero)[0], 0 * expected)
    params = {'kernel': data['weight'].T, 'bias': data['bias']}
    biased, _ = ShortConvolution(use_bias=True).apply({'params': params}, data['x'], None, None)
    np.testing.assert_allclose(biased, data['y_silu'], rtol=0, atol=1e-9)
    linear, _ = ShortConvolution(use_bias=True, activate=False).apply({'params': params}, data['x'], None, None)
    np.testing.assert_allclose(linear, data['y'], rtol=0, atol=1e-9)


def test_short_convolution_streams(x64, golden):
    data = golden('short_conv')
    expected = _convolve(data)[0]
    for sizes in ([1] * 40, [2, 38], [3, 1, 36], [20, 20]):
        state, done, parts = jnp.zeros((2, 3, 12)), 0, []
        for size in sizes:
            y, state = _convolve(data, data['x'][:, done : done + size], state)
            parts.append(y)
            done += size
        np.testing.assert_allclose(jnp.concatenate(parts, 1), expected, rtol=0, atol=1e-12)


def test_short_convolution_keeps_documents_apart(x64, golden):
    data = golden('short_conv')
    lengths = [1, 2, 7, 1, 1, 28]
    ids = jnp.asarray(np.repeat(np.array([[1, 2, 3, 4, 5, 6]] * 2, np.int32), lengths, axis=1))
    y, state = _convolve(data, segment_ids=ids)
    ends = np.cumsum(lengths)
    for start, stop in zip([0, *ends[:-1]], ends, strict=True):
        np.testing.assert_allclose(y[:, start:stop], _convolve(data, data['x'][:, start:stop])[0], rtol=0, atol=1e-12, err_msg=str(start))
    np.testing.assert_array_equal(state, data['x'][:, -3:])
    # The last document's inputs only are handed on.
    short = jnp.asarray(np.repeat(np.array([[1, 2]] * 2, np.int32), [38, 2], axis=1))
    np.testing.assert_array_equal(_convolve(data, segment_ids=short)[1], data['x'][:, -3:].at[:, 0].set(0))


def test_l2_normalize_has_unit_norms_and_finite_derivatives_at_zero():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 8)), jnp.bfloat16)
    y = l2_normalize(x)
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(jnp.linalg.norm(y, axis=-1), 1, atol=1e-5)
    np.testing.assert_array_equal(l2_normalize(jnp.zeros((2, 8))), 0)
    assert np.isfinite(jax.grad(lambda x: l2_normalize(x).sum())(jnp.zeros((2, 8)))).all()
    np.testing.assert_allclose(l2_normalize(100.0 * x.astype(jnp.float32)), y, atol=1e-5)


def test_projection_keeps_leading_axes_and_computes_in_its_dtype():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 4, 5)), jnp.float32)
    layer = Projection(7, jnp.dtype('bfloat16'))
    variables = layer.init(jax.random.key(0), x)
    assert variables['params']['kernel'].dtype == jnp.float32
    y = layer.apply(variables, x)
    assert y.shape == (2, 3, 4, 7) and y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype(jnp.float32), x @ variables['params']['kernel'][None, None], atol=0.05)


def test_split_heads_puts_a_heads_channels_together():
    np.testing.assert_array_equal(split_heads(jnp.arange(6)[None, None], 2)[0, 0], [[0, 1, 2], [3, 4, 5]])
