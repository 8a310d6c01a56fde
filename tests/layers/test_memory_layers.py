"""The memories' layers: a public Gated DeltaNet layer rebuilt, gates, and what the block around a memory does."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from nested_jax.config import LevelConfig, ModelConfig
from nested_jax.layers.common import Context
from nested_jax.layers.gated_delta_rule import GatedDeltaRule
from nested_jax.layers.memory_block import MemoryBlock, log_retention
from nested_jax.layers.titans import Titans

fast_jit = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})


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
    y, _ = fast_jit(lambda x: layer.apply({'params': {'block': block}}, x, None, Context(None, None, True)))(jnp.asarray(data['x']))
    assert float(np.abs(data['y_float32']).max()) > 0.01
    np.testing.assert_allclose(y, data['y_float32'], rtol=0, atol=2e-5 * np.abs(data['y_float32']).max())


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
    inputs = fast_jit(run)(variables, x)
    assert inputs.query.dtype == inputs.key.dtype == jnp.float64
    np.testing.assert_allclose(jnp.linalg.norm(inputs.key, axis=-1), 1, atol=1e-3)
    assert (inputs.retention_scale >= 1).all() and (inputs.retention_scale <= 16).all()


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
    gates = fast_jit(functools.partial(run, config=_config()))(variables, x).gates
    np.testing.assert_allclose(jnp.stack([gates['alpha'], gates['eta']], 2), expected, rtol=0, atol=1e-12)
    small = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), (variables, x))
    gates = fast_jit(functools.partial(run, config=_config(dtype='bfloat16')))(*small).gates
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
    run = fast_jit(lambda variables, x: layer.apply(variables, x, None, context)[0])
    swapped = jnp.concatenate([x[:, 8:16], x[:, :8], x[:, 16:]], 1)
    np.testing.assert_allclose(run(still, x)[:, 19], run(still, swapped)[:, 19], rtol=0, atol=1e-12)
    assert float(jnp.abs(run(variables, x)[:, 19] - run(variables, swapped)[:, 19]).max()) > 1e-9
