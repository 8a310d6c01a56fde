"""The memories' layers: a public Gated DeltaNet layer rebuilt, gates, and what the block around a memory does."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nested_jax.config import LevelConfig, MemoryConfig, ModelConfig
from nested_jax.layers.common import Context, l2_normalize
from nested_jax.layers.gated_delta_rule import GatedDeltaRule
from nested_jax.layers.memory_block import MemoryBlock, log_retention
from nested_jax.layers.titans import Titans
from tests.layers.transcriptions import CONTEXT, convolve, rms_norm, run_layer


def _config(**overrides) -> ModelConfig:
    options = dict(mixer='gated-delta-rule', num_layers=1, width=32, num_heads=4, head_dim=16, levels=(LevelConfig(1, 1),), dtype='float64')
    return ModelConfig(**(options | overrides))


def test_gated_delta_rule_layer_matches_the_reference(x64, golden):
    """Qwen3-Next's layer: queries scaled by D^-1/2, which the norm after the read undoes up to its epsilon, and grouped values."""
    data = jax.tree.map(np.asarray, golden('layer_gated_deltanet_qwen3next_hf'))
    fused = data['param.in_proj_qkvz.weight'].reshape(2, -1, 32)  # a group: one q, one k, two v, two z heads of 16
    split = lambda start, stop: fused[:, start:stop].reshape(2, -1, 16, 32)
    repeat = lambda heads: np.repeat(heads, 2, axis=1)
    kernel = lambda heads: {'kernel': jnp.asarray(heads.reshape(-1, 32).T)}
    gates = data['param.in_proj_ba.weight'].reshape(2, 2, 2, 32)  # group, (b, a), value head of the group
    convolution = data['param.conv1d.weight'][:, 0]
    conv = {'query': convolution[:32], 'key': convolution[32:64], 'value': convolution[64:]}
    conv = {name: rows if name == 'value' else repeat(rows.reshape(2, 1, 16, 4)).reshape(-1, 4) for name, rows in conv.items()}
    block = {
        'query': kernel(repeat(split(0, 16))), 'key': kernel(repeat(split(16, 32))),
        'value': kernel(split(32, 64)), 'gate': kernel(split(64, 96)),
        'gate_logits': {'kernel': jnp.asarray(np.stack([gates[:, 1].reshape(4, 32), gates[:, 0].reshape(4, 32)]).reshape(8, 32).T)},
        'gate_bias': jnp.asarray(np.stack([data['param.dt_bias'], np.zeros(4)])),
        'retention_log_scale': jnp.asarray(data['param.A_log']),
        'norm': {'scale': jnp.asarray(data['param.norm.weight'])},
        'output_projection': {'kernel': jnp.asarray(data['param.out_proj.weight'].T)},
    }  # fmt: skip
    block |= {f'{name}_convolution': {'kernel': jnp.asarray(rows.T)} for name, rows in conv.items()}
    # y / D^1/2 normed with epsilon 1e-6 is y normed with D times it.
    layer = GatedDeltaRule(_config(norm_epsilon=16e-6))
    y, _ = jax.jit(lambda x: layer.apply({'params': {'block': block}}, x, None, Context(None, None, True)))(jnp.asarray(data['x']))
    assert float(np.abs(data['y_float32']).max()) > 0.01
    np.testing.assert_allclose(y, data['y_float32'], rtol=0, atol=2e-5 * np.abs(data['y_float32']).max())


def _olmo_block(data: dict) -> dict:
    """Its keys are of width 12 and its values of 24; ours of 24 both, of which the keys leave half at zero."""
    heads = lambda rows, width: rows.reshape(2, width, -1)
    widen = lambda rows: np.pad(heads(rows, 12), ((0, 0), (0, 12), (0, 0))).reshape(48, -1)
    kernel = lambda rows: {'kernel': jnp.asarray(rows.T)}
    projections, convolution = {name: data[f'param.{name}_proj.weight'] for name in 'qkvgabo'}, data['param.conv1d.weight'][:, 0]
    return {
        'query': kernel(widen(projections['q'])), 'key': kernel(widen(projections['k'])),
        'value': kernel(projections['v']), 'gate': kernel(projections['g']),
        'query_convolution': kernel(widen(convolution[:24])), 'key_convolution': kernel(widen(convolution[24:48])),
        'value_convolution': kernel(convolution[48:]),
        'gate_logits': kernel(np.concatenate([projections['a'], projections['b']])),
        'gate_bias': jnp.asarray(np.stack([data['param.dt_bias'], np.zeros(2)])),
        'retention_log_scale': jnp.asarray(data['param.A_log']),
        'norm': {'scale': jnp.asarray(data['param.o_norm.weight'])},
        'output_projection': kernel(projections['o']),
    }  # fmt: skip


def test_negative_eigenvalues_match_the_reference(x64, golden):
    """OLMo-hybrid's layer, whose beta is twice a sigmoid, whose queries have a scale of 12^-1/2 and whose norm an epsilon of 1e-5."""
    data = jax.tree.map(np.asarray, golden('layer_gated_deltanet_olmo_hf'))
    block, largest = _olmo_block(data), np.abs(data['y_float32']).max()
    assert float(largest) > 0.01
    for negative in (True, False):
        memory = MemoryConfig(negative_eigenvalues=negative, chunk_size=32, projection_chunk_size=32)
        layer = GatedDeltaRule(_config(num_heads=2, head_dim=24, norm_epsilon=12e-5, memory=memory))
        y, _ = jax.jit(lambda x, layer=layer: layer.apply({'params': {'block': block}}, x, None, CONTEXT))(jnp.asarray(data['x']))
        error = np.abs(y - data['y_float32']).max() / largest
        assert error < 2e-5 if negative else error > 0.05


@pytest.mark.parametrize('negative', [False, True])
def test_deltanet_is_its_equations(x64, negative):
    """Eq. (1) of arXiv:2406.06484v5 written out, from its own convolutions and norms to the output projection."""
    memory = MemoryConfig(negative_eigenvalues=negative, chunk_size=4, projection_chunk_size=4)
    layer = GatedDeltaRule(_config(mixer='delta-rule', num_heads=2, head_dim=8, memory=memory), gated=False)
    params, x, y, state = run_layer(layer, width=32)
    block = params['block']
    assert set(block) == {
        *('query', 'key', 'value', 'query_convolution', 'key_convolution', 'value_convolution'),
        *('gate_logits', 'gate_bias', 'norm', 'output_projection'),
    }
    rows = {name: convolve(x @ block[name]['kernel'], block[f'{name}_convolution']['kernel']) for name in ('query', 'key', 'value')}
    query, key, value = (rows[name].reshape(*x.shape[:2], 2, 8) for name in ('query', 'key', 'value'))
    query, key = (rows / np.sqrt((rows**2).sum(-1, keepdims=True) + 1e-6) for rows in (query, key))
    beta = (1 + negative) / (1 + np.exp(-(x @ block['gate_logits']['kernel'] + block['gate_bias'][0])))
    memory, reads = np.zeros((x.shape[0], 2, 8, 8)), []
    for t in range(x.shape[1]):
        error = value[:, t] - np.einsum('bhkv,bhk->bhv', memory, key[:, t])
        memory = memory + beta[:, t, :, None, None] * key[:, t, :, :, None] * error[:, :, None]
        reads.append(np.einsum('bhkv,bhk->bhv', memory, query[:, t]))
    expected = rms_norm(np.stack(reads, 1), block['norm']['scale']).reshape(*x.shape[:2], -1) @ block['output_projection']['kernel']
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-11)
    np.testing.assert_allclose(state.memory, memory, rtol=0, atol=1e-11)


def test_retention_is_between_zero_and_one_and_exact_near_one():
    logits = jnp.array([-100.0, -20.0, 0.0, 50.0])[None, :, None]
    log_alpha = log_retention(logits, jnp.array([1.0, 16.0]))
    assert (log_alpha <= 0).all() and np.isfinite(log_alpha).all()
    np.testing.assert_allclose(log_alpha[0, :3, 1], -16 * np.log1p(np.exp(np.array([-100.0, -20.0, 0.0]))), rtol=1e-5, atol=1e-30)


def test_keys_and_queries_have_unit_norm_whatever_the_rows_scale(x64):
    block = MemoryBlock(_config(), gates=('alpha', 'eta'))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 9, 32)))
    run = lambda variables, x: block.apply(variables, x, None, Context(None, None, True), method='inputs')
    variables = jax.jit(lambda x: block.init(jax.random.key(0), x, None, Context(None, None, True), method='inputs'))(x)
    run = jax.jit(run)
    inputs = run(variables, x)
    assert inputs.query.dtype == inputs.key.dtype == jnp.float64
    # Norms are those of 1e-6 + |x|^2.
    for scale, tolerance in ((1, 1e-3), (1e3, 1e-9), (1e6, 1e-12)):
        scaled = run(variables, scale * x)
        for rows in (scaled.query, scaled.key):
            np.testing.assert_allclose(jnp.linalg.norm(rows, axis=-1), 1, rtol=0, atol=tolerance, err_msg=str(scale))
    assert (inputs.retention_scale >= 1).all() and (inputs.retention_scale <= 16).all()


def test_normalised_rows_do_not_depend_on_their_scale(x64):
    """Identity 20."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 9, 4, 8)))
    np.testing.assert_allclose(l2_normalize(1e6 * x), l2_normalize(1e3 * x), rtol=1e-11)


def test_gates_are_computed_in_float32_and_in_float64_for_float64(x64):
    block, rng = MemoryBlock(_config(), gates=('alpha', 'eta')), np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 5, 32)))
    shapes = jax.eval_shape(lambda x: block.init(jax.random.key(0), x, None, Context(None, None, True), method='inputs'), x)
    variables = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), shapes)
    run = lambda variables, x, config: MemoryBlock(config, gates=('alpha', 'eta')).apply(
        variables, x, None, Context(None, None, True), method='inputs'
    )
    kernel, bias = variables['params']['gate_logits']['kernel'], variables['params']['gate_bias']
    expected = (x @ kernel[None]).reshape(2, 5, 2, 4) + bias[None, None]
    gates = jax.jit(functools.partial(run, config=_config()))(variables, x).gates
    np.testing.assert_allclose(jnp.stack([gates['alpha'], gates['eta']], 2), expected, rtol=0, atol=1e-12)
    small = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), (variables, x))
    gates = jax.jit(functools.partial(run, config=_config(dtype='bfloat16')))(*small).gates
    np.testing.assert_allclose(jnp.stack([gates['alpha'], gates['eta']], 2), expected, rtol=0, atol=1e-4)


def test_titans_without_a_step_reads_its_initial_memory(x64):
    """eta near 0 and alpha near 1: the layer is static, the order of tokens beyond the convolutions of no effect."""
    config = _config(mixer='titans')
    layer, context = Titans(config), Context(None, None, True)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 20, 32)))
    variables = jax.jit(lambda x: layer.init(jax.random.key(0), x, None, context))(x)
    variables = jax.tree.map(lambda p: p.astype(jnp.float64), variables)
    block = variables['params']['block']
    still = jnp.array([[-1e4], [-1e4], [0.0]]) * jnp.ones((3, 4))  # alpha, eta, momentum
    still = {'params': {**variables['params'], 'block': {**block, 'gate_bias': still}}}
    run = jax.jit(lambda variables, x: layer.apply(variables, x, None, context)[0])
    swapped = jnp.concatenate([x[:, 8:16], x[:, :8], x[:, 16:]], 1)
    np.testing.assert_allclose(run(still, x)[:, 19], run(still, swapped)[:, 19], rtol=0, atol=1e-12)
    assert float(jnp.abs(run(variables, x)[:, 19] - run(variables, swapped)[:, 19]).max()) > 1e-9
