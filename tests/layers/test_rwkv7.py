"""RWKV-7's time mix: against a token-by-token transcription of the published layer, its ranks and its initial values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nested_jax.config import LevelConfig, ModelConfig
from nested_jax.layers.common import Context
from nested_jax.layers.rwkv7 import RWKV7, FirstValues, _rank

CONFIG = ModelConfig(
    mixer='rwkv7', num_layers=3, width=16, num_heads=2, head_dim=8, levels=(LevelConfig(1, 1),), dtype='float64'
)  # fmt: skip
HERE = Context(None, None, True)


def first_values(layer: int) -> FirstValues:
    rng = np.random.default_rng(7)
    return FirstValues(jnp.asarray(rng.normal(size=(2, 11, 16))), jnp.int32(layer))


def transcription(p, x, first):
    """fla/layers/rwkv7.py and its recurrence (fla bc3b101), in numpy, one token at a time."""
    sigmoid = lambda z: 1 / (1 + np.exp(-z))
    lora = lambda name, row, act: act(row @ p[name]['down']['kernel']) @ p[name]['up']['kernel'] + p[name].get('bias', 0)
    identity = lambda z: z
    delta = np.concatenate([np.zeros_like(x[:, :1]), x[:, :-1]], 1) - x
    xr, xw, xk, xv, xa, xg = (x + delta * mix for mix in p['shift_mix'])
    r, k, v = xr @ p['query']['kernel'], xk @ p['key']['kernel'], xv @ p['value']['kernel']
    w = np.exp(-0.6065306597126334 * sigmoid(lora('decay_gate', xw, np.tanh)))
    if first.layer > 0:
        v = v + (np.asarray(first.value) - v) * sigmoid(lora('value_gate', xv, identity))
    a, g = sigmoid(lora('rate_gate', xa, identity)), lora('output_gate', xg, sigmoid)
    heads = lambda z: z.reshape(*z.shape[:2], 2, 8)
    kk = heads(k * p['removal_scale'])
    kk = kk / np.sqrt((kk**2).sum(-1, keepdims=True) + 1e-6)
    r, w, k, vh, a = map(heads, (r, w, k * (1 + (a - 1) * p['rate_mix']), v, a))
    memory, reads = np.zeros((2, 2, 8, 8)), []
    for t in range(x.shape[1]):
        removed = np.einsum('bhk,bhkv->bhv', kk[:, t], memory)
        memory = w[:, t, ..., None] * memory - (kk * a)[:, t, ..., None] * removed[..., None, :] + k[:, t, ..., None] * vh[:, t, :, None]
        reads.append(np.einsum('bhk,bhkv->bhv', r[:, t], memory))
    y = np.stack(reads, 1)
    y = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 64e-5)
    y = y.reshape(x.shape) * p['group_norm']['scale'] + p['group_norm']['bias']
    y = y + ((r * k * p['bonus'].reshape(2, 8)).sum(-1, keepdims=True) * vh).reshape(x.shape)
    return (y * g) @ p['output_projection']['kernel'], memory, v


@pytest.mark.parametrize('layer', [0, pytest.param(2, marks=pytest.mark.slow)])
def test_layer_equals_its_transcription(x64, layer):
    model, rng = RWKV7(CONFIG), np.random.default_rng(0)
    x, first = rng.normal(size=(2, 11, 16)), first_values(layer)
    shapes = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, None, HERE, first), x)['params']
    params = jax.tree.map(lambda leaf: 0.5 * rng.normal(size=leaf.shape), shapes)
    y, state, handed_on = jax.jit(lambda p, x, first: model.apply({'params': p}, x, None, HERE, first))(params, jnp.asarray(x), first)
    expected, memory, value = transcription(params, x, first)
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-10 * np.abs(expected).max())
    np.testing.assert_allclose(state.memory, memory, rtol=0, atol=1e-10 * np.abs(memory).max())
    np.testing.assert_array_equal(state.previous, x[:, -1:])
    assert handed_on.layer == layer + 1
    np.testing.assert_allclose(handed_on.value, value if layer == 0 else first.value, rtol=0, atol=1e-12)


def test_ranks_are_multiples_of_32_and_of_8_where_that_is_too_much():
    assert [_rank(factor, 2048) for factor in (2.5, 1.7, 5.0)] == [128, 64, 224]
    assert [_rank(factor, 1024) for factor in (2.5, 1.7, 5.0)] == [64, 64, 160]
    assert [_rank(factor, 128) for factor in (2.5, 1.7, 5.0)] == [32, 16, 56]


def test_initial_values_follow_the_depth(x64):
    model = RWKV7(CONFIG)
    draw = jax.jit(
        lambda layer: model.init(jax.random.key(0), jnp.zeros((1, 2, 16)), None, HERE, FirstValues(jnp.zeros((1, 2, 16)), layer))
    )
    first, last = draw(0)['params'], draw(2)['params']
    n = np.arange(16)
    zigzag = ((n % 8) - 3.5) / 3.5
    www = lambda depth: -6 + 6 * (n / 15) ** (1 + depth**0.3) + 0.5 + 2.5 * zigzag * np.abs(zigzag)
    np.testing.assert_allclose(first['decay_gate']['bias'], www(0.0), atol=1e-5)
    np.testing.assert_allclose(last['decay_gate']['bias'], www(1.0), atol=1e-5)
    np.testing.assert_allclose(last['shift_mix'][1], 1 - (n / 16) ** (0.9 / 3), atol=1e-6)
    np.testing.assert_allclose(first['group_norm']['scale'], (1 / 3) ** 0.7, atol=1e-6)
    assert not last['output_projection']['kernel'].any() and not last['decay_gate']['down']['kernel'].any()
