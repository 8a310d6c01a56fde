"""Softmax attention against reference implementations: rotary positions, grouped queries, windows, documents, streams."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nested_jax.config import AttentionConfig, LevelConfig, ModelConfig, RopeScaling
from nested_jax.layers.attention import Attention, rotary_frequencies, rotate
from nested_jax.layers.common import Context

SOFTMAX = 2e-6  # jax.nn.dot_product_attention takes the softmax in float32 whatever its inputs' dtype


def test_rotary_positions_match_the_reference(x64, golden):
    data = golden('rotary')
    position = jnp.broadcast_to(jnp.arange(40)[None], (2, 40))
    np.testing.assert_allclose(rotate(data['q'], position, 10_000.0), data['y_half'], rtol=0, atol=1e-9)
    single = rotate(data['q'].astype(jnp.float32), position, 10_000.0)
    assert single.dtype == jnp.float32
    np.testing.assert_allclose(single, data['y_half'], rtol=0, atol=1e-5)


def test_rotary_scores_depend_on_distance_only(x64, golden):
    q, position = golden('rotary')['q'], jnp.arange(40)[None] + jnp.array([[0], [1000]])
    near, far = rotate(q, position, 10_000.0), rotate(q, position + 777, 10_000.0)
    scores = lambda x: jnp.einsum('bthd,bshd->bhts', x, x)
    np.testing.assert_allclose(scores(near), scores(far), rtol=0, atol=1e-9)


def _config(**attention) -> ModelConfig:
    return ModelConfig(
        mixer='attention', num_layers=1, width=64, num_heads=4, head_dim=16, levels=(LevelConfig(1, 1),), vocab_size=2,
        max_length=64, dtype='float64', attention=AttentionConfig(num_kv_heads=2, **attention),
    )  # fmt: skip


def _golden_layer(data, tokens=None, **attention):
    """A layer whose projections hand on the golden q, k and v, given unrotated, and its output heads."""
    unrotate = lambda x: rotate(x, -jnp.broadcast_to(jnp.arange(48)[None], (2, 48)), 10_000.0).reshape(2, 48, -1)
    x = jnp.concatenate([unrotate(data['q']), unrotate(data['k']), data['v'].reshape(2, 48, -1)], -1)
    eye = jnp.eye(x.shape[-1])
    kernels = {'query': eye[:, :64], 'key': eye[:, 64:96], 'value': eye[:, 96:], 'output': jnp.eye(64)}
    variables = {'params': {name: {'kernel': kernel} for name, kernel in kernels.items()}}
    layer = Attention(_config(**attention))
    if tokens is not None:  # they are of the model's width, here that of x
        variables['params'] |= {'persistent_tokens': tokens, 'output': {'kernel': jnp.eye(64, 128)}}
        layer = Attention(dataclasses.replace(_config(**attention), width=128))
    return x, jax.jit(lambda x, state, context: layer.apply(variables, x, state, context))


@pytest.mark.parametrize(('window', 'name'), [(None, 'o_full'), (16, 'o_w16')])
def test_attention_matches_the_reference(x64, golden, window, name):
    data = golden('attention_swa')
    x, layer = _golden_layer(data, window=window)
    expected = data[name].reshape(2, 48, -1)
    plain, _ = layer(x, None, Context(None, None, True))
    np.testing.assert_allclose(plain, expected, rtol=0, atol=SOFTMAX)
    masked, state = layer(x[:, :40], None, Context(None, jnp.zeros((2, 40), jnp.int32), True))
    np.testing.assert_allclose(masked, expected[:, :40], rtol=0, atol=SOFTMAX)
    assert state.key.shape[1] == (window or 64)
    rest, _ = layer(x[:, 40:], state, Context(jnp.full(2, 40, jnp.int32), jnp.zeros((2, 8), jnp.int32), True))
    np.testing.assert_allclose(rest, expected[:, 40:], rtol=0, atol=SOFTMAX)


@pytest.mark.parametrize('window', [None, 7])
def test_blocks_of_queries_change_nothing(x64, golden, window):
    x, _ = _golden_layer(golden('attention_swa'))
    variables = jax.jit(Attention(_config()).init)(jax.random.key(0), x, None, Context(None, None, True))

    def run(query_block):
        layer = Attention(_config(window=window, query_block=query_block))
        read = lambda x: layer.apply(variables, x, None, Context(None, None, True))[0]
        return jax.jit(lambda x: (read(x), jax.grad(lambda x: jnp.sum(read(x) ** 2))(x)))(x)

    for blocks, whole in zip(run(10), run(None), strict=True):
        np.testing.assert_allclose(blocks, whole, rtol=0, atol=1e-5)


def test_persistent_tokens_are_seen_by_every_query(x64, golden):
    """A token whose key and value are zero adds 1 to the softmax's denominator; blocks, masks and streams agree."""
    data = golden('attention_swa')
    x, layer = _golden_layer(data, window=16, num_persistent=2, tokens=jnp.zeros((2, 128)))
    q, k, y = (np.asarray(data[name]) for name in ('q', 'k', 'o_w16'))
    scores = np.einsum('btgrd,bsgd->btgrs', q.reshape(2, 48, 2, 2, 16), k) / 4
    distance = np.arange(48)[:, None] - np.arange(48)[None]
    weights = np.where(((distance >= 0) & (distance < 16))[None, :, None, None], np.exp(scores), 0.0).sum(-1)
    expected = y.reshape(2, 48, 2, 2, 16) * (weights / (weights + 2))[..., None]
    whole, _ = layer(x, None, Context(None, None, True))
    np.testing.assert_allclose(whole[..., :64], expected.reshape(2, 48, -1), rtol=0, atol=1e-9)


@pytest.mark.slow
def test_persistent_tokens_have_no_position(x64, golden):
    """A token that sees itself and them reads the same wherever it stands; blocks of queries and streams agree."""
    data, rng = golden('attention_swa'), np.random.default_rng(0)
    tokens = jnp.asarray(rng.normal(size=(3, 128)))
    x, _ = _golden_layer(data)
    forms = [dict(window=7), dict(window=7, query_block=10)]
    whole, blocks = (
        _golden_layer(data, num_persistent=3, tokens=tokens, **form)[1](x, None, Context(None, None, True))[0] for form in forms
    )
    np.testing.assert_allclose(blocks, whole, rtol=0, atol=1e-12)
    layer = _golden_layer(data, window=7, num_persistent=3, tokens=tokens)[1]
    head, state = layer(x[:, :20], None, Context(None, jnp.zeros((2, 20), jnp.int32), True))
    tail, _ = layer(x[:, 20:], state, Context(jnp.full(2, 20, jnp.int32), None, True))
    np.testing.assert_allclose(jnp.concatenate([head, tail], 1), whole, rtol=0, atol=1e-12)
    alone = jax.tree.map(jnp.zeros_like, state)
    near, far = (layer(x[:, 20:21], alone, Context(jnp.full(2, at, jnp.int32), None, True))[0] for at in (0, 1000))
    np.testing.assert_allclose(near, far, rtol=0, atol=1e-12)


def test_documents_do_not_see_one_another(x64, golden):
    data = golden('attention_swa')
    x, layer = _golden_layer(data)
    ids = jnp.asarray(np.repeat(np.array([[4, 9]] * 2, np.int32), [20, 28], axis=1))
    packed, _ = layer(x, None, Context(None, ids, True))
    first, _ = layer(x[:, :20], None, Context(None, None, True))
    second, _ = layer(x[:, 20:], None, Context(None, None, True))
    np.testing.assert_allclose(packed, jnp.concatenate([first, second], 1), rtol=0, atol=SOFTMAX)


def test_max_length_bounds_what_is_seen_and_kept(x64, golden):
    x, _ = _golden_layer(golden('attention_swa'))
    short = dataclasses.replace(_config(), max_length=16)
    layer = Attention(short)
    variables = jax.tree.map(lambda p: p.astype(jnp.float64), layer.init(jax.random.key(0), x, None, Context(None, None, True)))
    run = jax.jit(lambda x: layer.apply(variables, x, None, Context(None, None, True)))
    y, state = run(x)
    assert state.key.shape[1] == 16 and bool(state.filled.all())
    changed, _ = run(x.at[:, 10].add(1.0))
    moved = np.abs(np.asarray(changed - y)).max((0, 2)) > 1e-12
    np.testing.assert_array_equal(moved, (np.arange(48) >= 10) & (np.arange(48) < 26))


def test_llama3_scaling_gives_the_published_frequencies():
    """Llama 3.2: heads of 64, theta 5e5, factor 32 (8 for heads of 128 below: only where the limits fall is known)."""
    scaling = RopeScaling(32.0, 1.0, 4.0, 8192)
    raw, scaled = (rotary_frequencies(64, 5e5, s, 'float64') for s in (None, scaling))
    np.testing.assert_allclose(rotary_frequencies(64, 5e5, scaling), scaled, rtol=5e-7)
    known = {0: 1.0, 1: 0.663601238, 14: 3.21144599e-3, 15: 1.29054793e-3, 16: 4.29556797e-4, 17: 9.7082878e-5, 18: 1.94616382e-5}
    for i, value in {**known, 31: 9.41830673e-8}.items():
        np.testing.assert_allclose(scaled[i], value, rtol=2e-7, err_msg=str(i))
    np.testing.assert_allclose(raw[15:18], [2.13111954e-3, 1.41421356e-3, 9.3847387e-4], rtol=2e-7)
    for dim, kept, blended in ((64, 15, 18), (128, 29, 35)):
        raw, scaled = (rotary_frequencies(dim, 5e5, s) for s in (None, scaling))
        np.testing.assert_array_equal(scaled[:kept], raw[:kept])
        assert (raw[kept:blended] / 32 < scaled[kept:blended]).all() and (scaled[kept:blended] < raw[kept:blended]).all()
        np.testing.assert_array_equal(scaled[blended:], raw[blended:] / 32)


def test_scaling_reaches_the_rotation(x64, golden):
    q, position = golden('rotary')['q'], jnp.full((2, 40), 3000)
    scaling = RopeScaling(8.0, 1.0, 4.0, 128)
    half = q.shape[-1] // 2
    angle = 3000 * rotary_frequencies(2 * half, 1e4, scaling, 'float64')
    turned = (np.asarray(q[..., :half]) + 1j * np.asarray(q[..., half:])) * np.exp(1j * angle)
    y = np.asarray(rotate(q, position, 1e4, scaling))
    np.testing.assert_allclose(y, np.concatenate([turned.real, turned.imag], -1), rtol=0, atol=1e-9)


@pytest.mark.parametrize('persistent', [None, 3])
def test_norms_and_biases_of_pretrained_models(x64, persistent):
    """Normed heads do not change when their projection is scaled; a bias of q, k and v acts as a constant input does."""
    config = _config(qk_norm=True, qkv_bias=True, num_persistent=persistent)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 12, 64)))
    params = Attention(config).init(jax.random.key(0), x, None, Context(None, None, True))['params']
    assert params['query_norm']['scale'].shape == params['key_norm']['scale'].shape == (16,)
    assert {name: params[name]['bias'].shape for name in ('query', 'key', 'value')} == dict(query=(64,), key=(32,), value=(32,))
    assert 'bias' not in params['output']
    params = jax.tree.map(lambda leaf: leaf + 0.1, params)
    run = jax.jit(lambda params, config=config: Attention(config).apply({'params': params}, x, None, Context(None, None, True))[0])
    scaled = {name: jax.tree.map(lambda leaf: 3 * leaf, params[name]) if name in ('query', 'key') else params[name] for name in params}
    np.testing.assert_allclose(run(scaled), run(params), rtol=0, atol=1e-5)  # but for the norm's epsilon
    without = {name: jax.tree.map(jnp.zeros_like, part) if name.endswith('_norm') else part for name, part in params.items()}
    assert np.abs(run(without) - run(params)).max() > 1e-2
    for name in ('query', 'key', 'value'):
        shifted = {**params, name: {**params[name], 'bias': jnp.zeros_like(params[name]['bias'])}}
        assert np.abs(run(shifted) - run(params)).max() > 1e-3, name
