"""Kernels chosen around a program: the TPU's give plain JAX's losses and gradients, the GPU's are asked for where they can do the call."""

import contextlib
import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from nested_jax.config import LevelConfig, MemoryConfig, as_dict
from nested_jax.layers.kernels import attention_implementation, use_kernels
from nested_jax.memory.kernels import delta_rule_gpu
from nested_jax.memory.kernels.chunk_scan import chunk_scan_reference
from nested_jax.models import LanguageModel, preset
from nested_jax.models.loss import model_loss
from nested_jax.training.config import TrainConfig, check_kernels

SIZES = dict(num_layers=1, width=16, num_heads=2, head_dim=8, levels=(LevelConfig(16, 512),), vocab_size=32)
CHUNKED = MemoryConfig(kind='matrix', chunk_size=16, projection_chunk_size=16)


def inputs(name: str, length: int = 40, **options):
    """A model, random parameters, tokens and the documents they are of."""
    model = LanguageModel(preset(name, **(SIZES | dict(scan_layers=True) | options)))
    tokens = jax.random.randint(jax.random.key(1), (2, length), 0, 32)
    params = jax.jit(model.init)(jax.random.key(0), tokens[:, :2])['params']
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    moved = [leaf + 0.1 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    segment_ids = jnp.asarray([[0] * 19 + [1] * (length - 19), [0] * length])
    return model, jax.tree.unflatten(tree, moved), tokens, segment_ids


def lowered_for_tpu(model, params, tokens) -> str:
    run = lambda params: model.apply({'params': params}, tokens, method='hidden')[0]
    return jax.jit(run).trace(params).lower(lowering_platforms=('tpu',)).as_text()


@pytest.mark.parametrize(
    'name',
    [
        'gated-deltanet-tiny',
        pytest.param('hope-linear-tiny', marks=pytest.mark.slow),
        pytest.param('deltanet-tiny', marks=pytest.mark.exhaustive),
    ],
)
@pytest.mark.parametrize('documents', [True, pytest.param(False, marks=pytest.mark.exhaustive)])
def test_tpu_kernels_give_the_plain_loss_and_gradients(name, documents):
    model, params, tokens, segment_ids = inputs(name, **({} if name == 'hope-linear-tiny' else dict(memory=CHUNKED)))
    if name == 'hope-linear-tiny':  # whose documents start on its grid
        segment_ids = jnp.asarray([[0] * 16 + [1] * 24, [0] * 40])
    loss = lambda params: model_loss(model, params, tokens, tokens, segment_ids if documents else None)[0] / tokens.size
    value = jax.jit(jax.value_and_grad(loss))
    expected = value(params)
    with use_kernels('tpu'), pltpu.force_tpu_interpret_mode():
        assert 'pallas_call' in str(jax.make_jaxpr(loss)(params))
        got = value(params)  # the same jitted function: the choice is part of its key
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * float(jnp.abs(b).max()))


@pytest.mark.parametrize(
    ('name', 'count'),
    [('gated-deltanet-tiny', 1), ('comba-tiny', 1), ('hope-linear-tiny', 1), pytest.param('hope-tiny', 1, marks=pytest.mark.slow)],
)
def test_tpu_kernels_are_in_the_program_of_layers_that_have_one(name, count):
    options = {} if 'hope' in name else dict(memory=CHUNKED)
    model, params, tokens, _ = inputs(name, **options)
    assert '@tpu_custom_call' not in lowered_for_tpu(model, params, tokens)
    with use_kernels('tpu'):
        assert lowered_for_tpu(model, params, tokens).count('@tpu_custom_call') == count


@pytest.mark.parametrize(
    'changes',
    [dict(memory=dataclasses.replace(CHUNKED, chunk_size=8, projection_chunk_size=8)), dict(memory=CHUNKED, dtype='float16')],
    ids=['chunk', 'dtype'],
)
def test_calls_a_kernel_cannot_do_are_plain(changes):
    model, params, tokens, _ = inputs('gated-deltanet-tiny', **changes)
    with use_kernels('tpu'):
        assert '@tpu_custom_call' not in lowered_for_tpu(model, params, tokens)


def test_cudnn_is_asked_for_one_document_in_half_precision(monkeypatch):
    model, params, tokens, segment_ids = inputs('transformer-tiny', length=64, dtype='bfloat16')
    attention, asked = jax.nn.dot_product_attention, []

    def record(*args, implementation=None, **options):
        asked.append(implementation)
        return attention(*args, **options)

    monkeypatch.setattr(jax.nn, 'dot_product_attention', record)  # without a GPU there is no cuDNN to lower for
    with use_kernels('gpu'):
        for ids in (None, segment_ids):
            jax.eval_shape(lambda ids=ids: model.apply({'params': params}, tokens, segment_ids=ids)[0])
        assert attention_implementation(jnp.dtype('float32')) == 'xla'
    assert list(dict.fromkeys(asked)) == ['cudnn', None]


def test_choices():
    with pytest.raises(ValueError, match="kernels is 'triton', allowed is one of plain, gpu, gpu_unverified, tpu"), use_kernels('triton'):
        pass
    with use_kernels('gpu'), contextlib.suppress(KeyError), use_kernels('plain'):
        raise KeyError
    assert attention_implementation(jnp.dtype('bfloat16')) == 'xla'


def test_of_a_run():
    assert 'kernels' not in as_dict(TrainConfig()) and as_dict(TrainConfig(kernels='tpu'))['kernels'] == 'tpu'
    with pytest.raises(ValueError, match="train.kernels is 'cuda', allowed is one of .'plain', 'gpu', 'gpu_unverified', 'tpu'."):
        TrainConfig(kernels='cuda')
    for name in ('tpu', 'gpu_unverified'):
        check_kernels(TrainConfig(kernels=name), 1)
        with pytest.raises(ValueError, match=f"train.kernels is '{name}', allowed on 8 devices is .* plain or gpu$"):
            check_kernels(TrainConfig(kernels=name), 8)
    check_kernels(TrainConfig(kernels='gpu'), 8)


@pytest.mark.parametrize(
    ('name', 'heads', 'capability', 'count'),
    [('gated-deltanet-tiny', 64, '9.0', 1), ('comba-tiny', 64, '9.0', 1), ('deltanet-tiny', 32, '9.0', 0), ('deltanet-tiny', 64, '8.0', 0)],
)
def test_gpu_kernel_is_in_the_program_of_layers_that_fit_it(name, heads, capability, count, monkeypatch):
    monkeypatch.setattr(jax, 'devices', lambda: [types.SimpleNamespace(compute_capability=capability)])
    model, params, tokens, _ = inputs(name, width=2 * heads, head_dim=heads, dtype='bfloat16')
    run = lambda params: model.apply({'params': params}, tokens, method='hidden')[0]
    with use_kernels('gpu'):
        lowered = jax.jit(run).trace(params).lower(lowering_platforms=('cuda',)).as_text()
    assert lowered.count('custom_call @mosaic_gpu') == count


def test_gpu_kernel_gives_the_plain_loss_and_gradients(monkeypatch):
    monkeypatch.setattr(jax, 'devices', lambda: [types.SimpleNamespace()])
    scanned = []
    monkeypatch.setattr(delta_rule_gpu, 'chunk_scan', lambda *given: scanned.append(given) or chunk_scan_reference(*given[:-1]))
    model, params, tokens, segment_ids = inputs('gated-deltanet-tiny', length=80, width=128, head_dim=64, dtype='bfloat16')
    wide, *_ = inputs('gated-deltanet-tiny', length=80, width=128, head_dim=64)
    loss = lambda params, model: model_loss(model, params, tokens, tokens, segment_ids)[0] / tokens.size
    value = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    expected = value(params, wide)
    with use_kernels('gpu'):
        got = value(params, model)
    assert scanned
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=5e-2, atol=5e-2 * float(jnp.abs(b).max()))
