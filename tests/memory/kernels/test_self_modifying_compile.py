"""The TPU kernels of self-modifying memories lower for TPU, and compile for one that is not there."""

import jax
import jax.numpy as jnp
import pytest

from nested_jax.memory.self_modifying import Inputs, Memories, Rule, self_modifying
from tests.memory.kernels.v5e import NEEDS_LIBTPU, one_chip

BATCH, TIME, HEADS = 2, 1000, 4


def forward(inputs, scale, initial, chunk_size):
    """Of the presets' memories: matrices with token-wise gradients, MLPs with momentum."""
    how = dict(kind='matrix', gradient='token') if initial.wide is None else dict(kind='mlp')
    rule = Rule(**how, decay_to='init', chunk_size=chunk_size, projection_chunk_size=chunk_size)
    return self_modifying(inputs, scale, initial, rule=rule, implementation='pallas_tpu')


def backward(*args):
    *args, chunk_size = args

    def loss(args):
        y, state = forward(*args, chunk_size)
        return jnp.sum(y) + sum(map(jnp.sum, jax.tree.leaves(state[:2])))

    return jax.grad(loss)(args)


def shapes(kind: str, dim: int, sharding=None):
    array = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)
    rows, gates = (BATCH, TIME, HEADS, dim), (BATCH, TIME, HEADS)
    inputs = Inputs(array(*rows), array(*rows), array(*rows), array(*gates), array(*gates), None)
    if kind == 'matrix':
        return inputs, array(HEADS), Memories(array(HEADS, dim, 3 * dim + 2), None, None)
    layers = array(HEADS, dim, 5 * dim), array(HEADS, 3, dim, dim), array(HEADS, 2, dim, 1)
    return inputs._replace(momentum=array(*gates)), array(HEADS), Memories(*layers)


@pytest.mark.parametrize('kind', ['matrix', 'mlp'])
@pytest.mark.parametrize(('function', 'count'), [(forward, 1), (backward, 2)])
def test_lowers_for_tpu(function, count, kind):
    traced = jax.jit(function, static_argnums=3).trace(*shapes(kind, 64), 64)
    assert traced.lower(lowering_platforms=('tpu',)).as_text().count('@tpu_custom_call') == count


@pytest.mark.exhaustive
@NEEDS_LIBTPU
@pytest.mark.parametrize('chunk_size', [16, 64])
@pytest.mark.parametrize('dim', [64, 128])
@pytest.mark.parametrize('kind', ['matrix', 'mlp'])
@pytest.mark.parametrize(('function', 'count'), [(forward, 1), (backward, 2)])
def test_compiles_for_v5e(function, count, kind, dim, chunk_size, monkeypatch):
    args = shapes(kind, dim, one_chip(monkeypatch))
    compiled = jax.jit(function, static_argnums=3).lower(*args, chunk_size).compile()
    assert compiled.as_text().count('tpu_custom_call') == count
