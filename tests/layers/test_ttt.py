"""TTT layers: the official implementation's layer rebuilt from its parameters, and the initial values."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nested_jax.config import LevelConfig, MemoryConfig, ModelConfig
from nested_jax.layers.common import Context, ShortConvolution
from nested_jax.layers.ttt import TTT


def _config(model: str, **overrides) -> ModelConfig:
    memory = MemoryConfig(kind='matrix' if model == 'linear' else 'mlp')
    options = dict(mixer='ttt', num_layers=2, width=32, num_heads=2, head_dim=16, levels=(LevelConfig(1, 1),), memory=memory)
    return ModelConfig(**(options | overrides))


def _half_split(rows, axis: int):
    """Channels of each head reordered, so that rotary pairs (2 i, 2 i + 1) become (i, i + D / 2)."""
    rows = np.moveaxis(np.asarray(rows), axis, 0)
    heads = rows.reshape(-1, 8, 2, *rows.shape[1:])
    return np.moveaxis(heads.swapaxes(1, 2).reshape(rows.shape), 0, axis)


def _parameters(data, model: str) -> dict:
    """The official layer's parameters under our names, and with our order of the channels of a head."""
    kernel = lambda name: {'kernel': _half_split(data[f'param.{name}.weight'], 0).T}
    params = {
        'key': kernel('k_proj'), 'value': kernel('v_proj'), 'gate': kernel('g_proj'),
        'output': {'kernel': _half_split(data['param.o_proj.weight'], 1).T},
        'gate_logits': {'kernel': data['param.learnable_ttt_lr_weight'][:, 0].T}, 'gate_bias': data['param.learnable_ttt_lr_bias'].T,
        'token_offset': data['param.learnable_token_idx'],
        'inner_norm_scale': _half_split(data['param.ttt_norm_weight'], 1), 'inner_norm_shift': _half_split(data['param.ttt_norm_bias'], 1),
        'norm': {'scale': _half_split(data['param.post_norm.weight'], 0), 'bias': _half_split(data['param.post_norm.bias'], 0)},
    }  # fmt: skip
    first, bias = _half_split(data['param.W1'], 1), data['param.b1']
    if model == 'linear':
        return params | {'initial_memory': _half_split(first, 2), 'initial_bias': _half_split(bias, 2)}
    last, last_bias = _half_split(data['param.W2'], 2), _half_split(data['param.b2'], 2)
    return params | {'initial_memory_in': first, 'initial_bias_in': bias, 'initial_memory_out': last, 'initial_bias_out': last_bias}


@pytest.mark.parametrize('model', ['linear', 'mlp'])
def test_layer_matches_the_official_implementation(x64, golden, model):
    """The golden layer has separate projections of q and k and no convolutions: they take the convolutions' places here."""
    data = jax.tree.map(np.asarray, golden(f'ttt_{model}_layer'))
    params = jax.tree.map(jnp.asarray, _parameters(data, model))

    def project(next_fun, args, kwargs, context):
        if not isinstance(context.module, ShortConvolution):
            return next_fun(*args, **kwargs)
        weight = data[f'param.{context.module.name[0]}_proj.weight']
        return jnp.asarray(data['x']) @ _half_split(weight, 0).T[None], None

    def run(x):
        with nn.intercept_methods(project):
            return TTT(_config(model, dtype='float64')).apply({'params': params}, x, None, Context(None, None, True))[0]

    y = jax.jit(run)(jnp.asarray(data['x']))
    assert float(data['base_lr']) == (1.0 if model == 'linear' else 0.1)
    assert np.sqrt(np.mean((y - data['y']) ** 2) / np.mean(data['y'] ** 2)) < 1e-9


@pytest.mark.slow
def test_initial_values_and_precision():
    """Those of the official implementation; memories and rates are float32 whatever the activations are."""
    layer, context = TTT(_config('mlp', dtype='bfloat16', width=64, head_dim=32)), Context(None, None, True)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 64)), jnp.bfloat16)
    (y, state), variables = jax.jit(lambda x: layer.init_with_output(jax.random.key(0), x, None, context))(x)
    params = variables['params']
    assert y.dtype == state.convolution[0].dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(state.memory)} == {jnp.dtype('float32'), jnp.dtype('int32')}
    assert params['initial_memory_in'].shape == (2, 32, 128)
    for name, deviation in {'initial_memory_in': 0.02, 'initial_memory_out': 0.01}.items():
        np.testing.assert_allclose(params[name].std(), deviation, rtol=0.05, err_msg=name)
    np.testing.assert_allclose(params['gate_logits']['kernel'].std(), 0.02, rtol=0.25)
    assert not any(params[name].any() for name in ('initial_bias_in', 'initial_bias_out', 'gate_bias', 'token_offset', 'inner_norm_shift'))
