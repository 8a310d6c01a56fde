"""MAC, MAG and MAL against their equations (Sec. 4, arXiv:2501.00663v1), written out token by token in numpy float64.

No reference implementation follows the paper here, so the transcription is ours; the memory's rates are those of `layers/titans.py`.
"""

import jax
import numpy as np
import pytest

from nested_jax.config import AttentionConfig, LevelConfig, MemoryConfig, ModelConfig
from nested_jax.layers.common import Context
from nested_jax.layers.titans_context import MemoryAsContext
from nested_jax.layers.titans_hybrids import MemoryAsGate, MemoryAsLayer
from nested_jax.models.presets import preset

HEADS, KV_HEADS, DIM, CHUNK, SEGMENT, WINDOW, LENGTH = 2, 1, 4, 2, 4, 3, 11
WIDTH, EPSILON, THETA = HEADS * DIM, 1e-6, 100.0
LAYERS = {'titans-mac': MemoryAsContext, 'titans-mag': MemoryAsGate, 'titans-mal': MemoryAsLayer}


def _config(mixer: str) -> ModelConfig:
    return ModelConfig(
        mixer=mixer, num_layers=1, width=WIDTH, num_heads=HEADS, head_dim=DIM, levels=(LevelConfig(1, 1),), dtype='float64',
        memory=MemoryConfig(dgd='none', chunk_size=CHUNK, projection_chunk_size=CHUNK, hidden_dim=5),
        attention=AttentionConfig(num_kv_heads=KV_HEADS, num_persistent=3, window=WINDOW, segment=SEGMENT, rope_theta=THETA),
    )  # fmt: skip


def _sigmoid(x):
    return 1 / (1 + np.exp(-x))


def _silu(x):
    return x * _sigmoid(x)


def _unit(x):
    return x / np.sqrt((x**2).sum(-1, keepdims=True) + 1e-6)


def _rms(x, scale):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + EPSILON) * scale


def _heads(x):
    return x.reshape(-1, DIM)


def _turn(x, position):
    """Rotary positions: channels i and i + D/2 are one complex number."""
    first, second = x[..., : DIM // 2], x[..., DIM // 2 :]
    turned = (first + 1j * second) * np.exp(1j * position * THETA ** (-np.arange(DIM // 2) / (DIM // 2)))
    return np.concatenate([turned.real, turned.imag], -1)


class _Convolution:
    """Width 4 over one token's rows at a time, then SiLU."""

    def __init__(self, kernel):
        self.kernel, self.last = kernel, [np.zeros(kernel.shape[1])] * 3

    def __call__(self, row):
        window = [*self.last, row]
        self.last = window[1:]
        return _silu(sum(tap * x for tap, x in zip(self.kernel, window, strict=True)))


class _Memory:
    """Eq. (8)-(15) for all heads, gradients at the chunk's start (Eq. 16-18), at the damped rates of the layer."""

    def __init__(self, block, initial):
        self.block, self.weights = block, [[w_in, w_out] for w_in, w_out in zip(*initial, strict=True)]
        self.convolution = {name: _Convolution(block[f'{name}_convolution']['kernel']) for name in ('query', 'key', 'value')}
        self.momentum, self.anchor, self.count = [[0.0, 0.0] for _ in self.weights], None, 0

    def rows(self, name, x):
        return _heads(self.convolution[name](x @ self.block[name]['kernel']))

    def write(self, x):
        """One token, (width,)."""
        if self.count % CHUNK == 0:
            self.anchor = [list(pair) for pair in self.weights]
        self.count += 1
        key, value = _unit(self.rows('key', x)), self.rows('value', x)
        logits = (x @ self.block['gate_logits']['kernel']).reshape(3, HEADS) + self.block['gate_bias']
        alpha = np.exp(-np.exp(self.block['retention_log_scale']) * np.log1p(np.exp(logits[0])))
        strength, beta = _sigmoid(logits[1]), _sigmoid(logits[2])
        for head in range(HEADS):
            w_in, w_out = self.anchor[head]
            z = key[head] @ w_in
            hidden, slope = _silu(z), _sigmoid(z) * (1 + z * (1 - _sigmoid(z)))
            error = hidden @ w_out - value[head]
            gradients = np.outer(key[head], (w_out @ error) * slope), np.outer(hidden, error)
            damping = 1 + strength[head] * (slope**2 * (w_out**2).sum(1)).sum(), 1 + strength[head] * (hidden**2).sum()
            rate = strength[head] * (1 - beta[head]) / CHUNK
            for layer in range(2):
                self.momentum[head][layer] = beta[head] * self.momentum[head][layer] - rate / damping[layer] * gradients[layer]
                self.weights[head][layer] = alpha[head] * self.weights[head][layer] + self.momentum[head][layer]

    @staticmethod
    def read(weights, query):
        return np.stack([_silu(q @ w_in) @ w_out for q, (w_in, w_out) in zip(query, weights, strict=True)])


def _softmax_read(query, position, persistent, seen):
    """One token's heads over persistent (key, value) without positions and seen (position, key, value)."""
    outputs = []
    for head, q in enumerate(query):
        group = head // (HEADS // KV_HEADS)
        scores = [q @ key[group] for key, _ in persistent] + [_turn(q, position) @ _turn(key[group], at) for at, key, _ in seen]
        values = [value[group] for _, value in persistent] + [value[group] for _, _, value in seen]
        weights = np.exp(np.array(scores) / np.sqrt(DIM))
        outputs.append((weights / weights.sum()) @ np.stack(values))
    return np.stack(outputs)


def _key_value(params, x):
    return _heads(x @ params['key']['kernel']), _heads(x @ params['value']['kernel'])


def _window_attention(params, x):
    """SWA*: each token sees P and the last WINDOW tokens, (T, width) -> (T, H, D)."""
    persistent = [_key_value(params, p) for p in params['persistent_tokens']]
    known, outputs = [], []
    for t, row in enumerate(x):
        known.append((t, *_key_value(params, row)))
        outputs.append(_softmax_read(_heads(row @ params['query']['kernel']), t, persistent, known[-WINDOW:]))
    return np.stack(outputs)


def _alone(params, x):
    """What the memory's heads read of each token, (T, width) -> (T, H, D)."""
    memory, outputs = _Memory(params['block'], (params['initial_memory_in'], params['initial_memory_out'])), []
    for row in x:
        memory.write(row)
        outputs.append(memory.read(memory.weights, _unit(memory.rows('query', row))))
    return np.stack(outputs)


def _gated(params, y, read):
    return _rms(y, params['heads_norm_attention']['scale']) * _silu(_rms(read, params['heads_norm_memory']['scale']))


def _mag(params, x):
    y = _gated(params, _window_attention(params['attention'], x), _alone(params['memory'], x))
    return y.reshape(len(x), -1) @ params['output']['kernel']


def _mal(params, x):
    block, read = params['memory']['block'], _alone(params['memory'], x)
    gate = (x @ block['gate']['kernel']).reshape(read.shape)
    y = (_rms(read, block['norm']['scale']) * _silu(gate)).reshape(len(x), -1) @ block['output_projection']['kernel']
    y = _window_attention(params['attention'], _rms(y, params['norm']['scale']))
    return y.reshape(len(x), -1) @ params['attention']['output']['kernel']


def _mac(params, x):
    memory = _Memory(params['block'], (params['initial_memory_in'], params['initial_memory_out']))
    query_of_segment = _Convolution(params['block']['query_convolution']['kernel'])
    persistent, outputs = [_key_value(params, p) for p in params['persistent_tokens']], []
    for t, row in enumerate(x):
        place = t % SEGMENT
        if place == 0:
            before, retrieved, known = [list(pair) for pair in memory.weights], [], []
        h = memory.read(before, _unit(_heads(query_of_segment(row @ params['block']['query']['kernel']))))
        h = _rms(h, params['heads_norm_read']['scale']).reshape(-1)
        retrieved.append((place - SEGMENT, *_key_value(params, h)))
        known.append((place, *_key_value(params, row)))
        y = _softmax_read(_heads(row @ params['query']['kernel']), place, persistent, retrieved + known)
        normed = _rms(y, params['heads_norm_attention']['scale']).reshape(-1)
        memory.write(normed)
        read = memory.read(memory.weights, _unit(memory.rows('query', normed)))
        outputs.append(_gated(params, y, read).reshape(-1) @ params['output']['kernel'])
    return np.stack(outputs)


@pytest.mark.parametrize(('mixer', 'equations'), [('titans-mac', _mac), ('titans-mag', _mag), ('titans-mal', _mal)])
def test_a_layer_is_its_equations(x64, mixer, equations):
    rng, layer, context = np.random.default_rng(0), LAYERS[mixer](_config(mixer)), Context(None, None, True)
    x = rng.normal(size=(2, LENGTH, WIDTH))
    shapes = jax.eval_shape(lambda x: layer.init(jax.random.key(0), x, None, context), x)['params']
    params = jax.tree.map(lambda leaf: 0.7 * rng.normal(size=leaf.shape), shapes)
    y, _ = jax.jit(lambda params, x: layer.apply({'params': params}, x, None, context))(params, x)
    expected = np.stack([equations(params, row) for row in x])
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ('field', 'changes'),
    [
        ('attention.segment', dict(attention=AttentionConfig())),
        ('attention.segment', dict(attention=AttentionConfig(segment=24))),
        ('attention.num_persistent', dict(attention=AttentionConfig(segment=32, num_persistent=0))),
        ('width', dict(width=64)),
    ],
)
def test_wrong_segments_are_named(field, changes):
    with pytest.raises(ValueError, match=field.replace('.', r'\.')):
        preset('titans-mac-tiny', **changes)
