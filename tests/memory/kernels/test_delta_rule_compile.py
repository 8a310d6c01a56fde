"""The TPU kernels of the delta rule lower for TPU, and compile for one that is not there."""

import jax
import jax.numpy as jnp
import pytest

from nested_jax.memory.kernels import delta_rule as kernels
from tests.memory.kernels.v5e import NEEDS_LIBTPU, one_chip

BATCH, TIME, HEADS = 2, 1000, 4


def forward(q, k, v, beta, log_decay, state, chunk_size):
    return kernels.delta_rule(q, k, v, beta, log_decay, state=state, chunk_size=chunk_size)


def backward(*args):
    *args, chunk_size = args

    def loss(args):
        y, last = forward(*args, chunk_size)
        return jnp.sum(y.astype(jnp.float32)) + jnp.sum(last)

    return jax.grad(loss)(args)


def shapes(dim: int, dtype, sharding=None) -> list[jax.ShapeDtypeStruct]:
    rows = (BATCH, TIME, HEADS)
    tokens = [jax.ShapeDtypeStruct((*rows, dim), dtype, sharding=sharding)] * 3
    others = [rows, rows, (BATCH, HEADS, dim, dim)]
    return tokens + [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding) for shape in others]


@pytest.mark.parametrize(('function', 'count'), [(forward, 1), (backward, 2)])
def test_lowers_for_tpu(function, count):
    traced = jax.jit(function, static_argnums=6).trace(*shapes(64, jnp.bfloat16), 64)
    assert traced.lower(lowering_platforms=('tpu',)).as_text().count('@tpu_custom_call') == count


@pytest.mark.exhaustive
@NEEDS_LIBTPU
@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize('chunk_size', [64, 128])
@pytest.mark.parametrize('dim', [64, 128])
@pytest.mark.parametrize(('function', 'count'), [(forward, 1), (backward, 2)])
def test_compiles_for_v5e(function, count, dim, chunk_size, dtype, monkeypatch):
    args = shapes(dim, dtype, one_chip(monkeypatch))
    compiled = jax.jit(function, static_argnums=6).lower(*args, chunk_size).compile()
    assert compiled.as_text().count('tpu_custom_call') == count
