"""Collectives are counted with the loops they stand in, and memory is what the arrays take."""

import jax
import jax.numpy as jnp
import pytest

from nested_jax.training.compiled import Collective, collectives, matrix_flops, report


@pytest.fixture
def split():
    mesh = jax.make_mesh((8,), ('a',), axis_types=(jax.sharding.AxisType.Auto,))
    return lambda *names: jax.NamedSharding(mesh, jax.P(*names))


def test_loops_are_multiplied_out(split):
    def program(x, w):
        body = lambda x, _: (jax.lax.with_sharding_constraint(jnp.tanh(x @ w), split(None, 'a')), None)
        twice = lambda x, _: (jax.lax.scan(body, x, length=5)[0], None)
        return jax.lax.scan(twice, x, length=3)[0]

    x = jax.ShapeDtypeStruct((16, 32), jnp.float32, sharding=split(None, 'a'))
    w = jax.ShapeDtypeStruct((32, 32), jnp.float32, sharding=split(None, 'a'))
    compiled = jax.jit(program, donate_argnums=0, out_shardings=split(None, 'a')).lower(x, w).compile()
    assert collectives(compiled.as_text()) == [Collective('all-gather', (('f32', (16, 32)),), 15)]
    found = report(compiled)
    assert found['collectives'] == {'all-gather': dict(count=15, bytes=15 * 16 * 32 * 4)}
    memory = found['memory']
    assert memory['arguments'] == (16 + 32) * 32 * 4 // 8 and memory['results'] == 0 and memory['temporaries'] >= 16 * 32 * 4
    assert memory['total'] == memory['arguments'] + memory['temporaries']


def test_matrix_products_are_counted_through_loops_and_gradients():
    def loss(w, x):
        return jnp.sum(jax.lax.scan(jax.checkpoint(lambda x, _: (jnp.tanh(x @ w), None)), x, length=6)[0])

    forward, backward = 2 * 4 * 8 * 8, 2 * 2 * 4 * 8 * 8
    shapes = jax.ShapeDtypeStruct((8, 8), jnp.float32), jax.ShapeDtypeStruct((4, 8), jnp.float32)
    assert matrix_flops(jax.jit(loss).trace(*shapes).jaxpr) == 6 * forward
    assert matrix_flops(jax.jit(jax.grad(loss)).trace(*shapes).jaxpr) == 6 * (2 * forward + backward)
    either = lambda flag, x: jax.lax.cond(flag, lambda x: x @ x, lambda x: x @ x @ x, x)
    assert matrix_flops(jax.jit(either).trace(jax.ShapeDtypeStruct((), bool), shapes[0]).jaxpr) == 2 * 2 * 8**3


def test_flops_count_loops_by_their_length_and_the_dearest_branch():
    product = lambda x: x @ x
    loop = lambda x: jax.lax.scan(lambda carry, _: (product(carry), None), x, length=5)[0]
    either = lambda x: jax.lax.cond(x[0, 0] > 0, loop, product, x)
    count = lambda function, shape=(4, 4): matrix_flops(jax.make_jaxpr(function)(jnp.ones(shape)))
    assert [count(product), count(loop), count(either), count(jax.jit(jax.vmap(product)), (3, 4, 4))] == [128, 640, 640, 384]
    assert matrix_flops(jax.make_jaxpr(either)(jnp.ones((4, 4))), min) == 128
    assert count(lambda x: jnp.linalg.qr(x)[0], (6, 4)) == pytest.approx(4 * 6 * 16 - 4 / 3 * 64)


def test_flops_that_no_result_needs_do_not_count():
    """A product that is dropped, in a loop and in a branch too, and the half of a gradient that is not asked for."""
    count = lambda function: matrix_flops(jax.make_jaxpr(function)(jnp.ones((4, 4))))
    body = lambda carry, _: ((carry[0] @ carry[0], carry[1] @ carry[1]), None)
    loop = lambda x: jax.lax.scan(body, (x, x), length=5)[0][0]
    assert count(lambda x: (x @ x, x + 1)[1]) == 0 and count(loop) == 640
    assert count(lambda x: jax.lax.cond(x[0, 0] > 0, lambda: (x @ x, x), lambda: (x, x))[1]) == 0
    both = lambda x, w: jax.vjp(jnp.matmul, x, w)[1](x)
    assert count(lambda x: both(x, x)) == 256 and count(lambda x: both(x, x)[0]) == 128


def test_kernels_and_halves_of_a_tpus_collectives_count_once():
    text = """HloModule m

%sum (a: f32[], b: f32[]) -> f32[] {
  ROOT %c = f32[] add(%a, %b)
}

%fused (p: f32[8,4]) -> f32[2,4] {
  ROOT %r = f32[2,4]{1,0:T(8,128)} reduce-scatter(%p), dimensions={0}, to_apply=%sum
}

%unused (p: f32[8]) -> f32[8] {
  ROOT %r = f32[8]{0} all-to-all(%p)
}

%all-reduce-scatter.1 (p: f32[8]) -> f32[1] {
  %a = f32[8]{0} all-reduce(%p), channel_id=5, to_apply=%sum
  ROOT %d = f32[1]{0} dynamic-slice(%a, %i), dynamic_slice_sizes={1}
}

%half.1 (p: f32[3]) -> f32[6] {
  ROOT %g = f32[6]{0} all-gather(%p), channel_id=6, dimensions={0}
}

%half.2 (p: f32[3]) -> f32[6] {
  ROOT %g.2 = f32[6]{0} all-gather(%p), channel_id=6, dimensions={0}
}

%async_collective_fusion.3 (p: f32[3]) -> f32[6] {
  ROOT %g.3 = f32[6]{0} all-gather(%p), channel_id=7, dimensions={0}
}

%async_collective_fusion.4 (p: f32[3]) -> f32[6] {
  ROOT %g.4 = f32[6]{0} all-gather(%p), channel_id=7, dimensions={0}
}

%async_collective_fusion.5 (p: f32[5]) -> f32[10] {
  ROOT %g.5 = f32[10]{0} all-gather(%p), channel_id=8, dimensions={0}
}

%begin (p: f32[5]) -> f32[10] {
  ROOT %g.6 = f32[10]{0} all-gather(%p), channel_id=8, dimensions={0}
}

%until (p: (s32[], f32[8,4])) -> pred[] {
  %n = s32[]{:T(128)} constant(9)
  ROOT %l = pred[] compare(%i, %n), direction=LT
}

%body (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %s = f32[2,4]{1,0} fusion(%p), kind=kCustom, calls=%fused
  ROOT %t = (s32[], f32[8,4]) tuple(%i, %s)
}

%other (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %s.1 = f32[6]{0} fusion(%p), kind=kCustom, calls=%half.1
  %s.2 = f32[6]{0} fusion(%p), kind=kCustom, calls=%half.2
  %s.4 = f32[6]{0} fusion(%p), kind=kCustom, calls=%async_collective_fusion.4
  %s.5 = f32[10]{0} fusion(%p), kind=kCustom, calls=%async_collective_fusion.5
  %s.3 = f32[1]{0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %t = (s32[], f32[8,4]) tuple(%i, %s)
}

ENTRY %main (x: bf16[4]) -> bf16[16] {
  %w = (s32[], f32[8,4]) while(%t), condition=%until, body=%body, backend_config={"known_trip_count":{"n":"7"}}
  %v = (s32[], f32[8,4]) while(%t), condition=%until, body=%other
  %s.6 = f32[6]{0} fusion(%p), kind=kCustom, calls=%async_collective_fusion.3
  %s.7 = f32[10]{0} fusion(%p), kind=kCustom, calls=%begin
  %g = (bf16[4]{0}, bf16[16]{0}) all-gather-start(%x), channel_id=5, dimensions={0}
  ROOT %d = bf16[16]{0} all-gather-done(%g)
}
"""
    found = collectives(text)
    expected = [
        Collective('reduce-scatter', (('f32', (2, 4)),), 7),
        Collective('reduce-scatter', (('f32', (8,)),), 9),
        Collective('all-gather', (('f32', (6,)),), 9),
        Collective('all-gather', (('f32', (6,)),), 1),
        Collective('all-gather', (('f32', (10,)),), 1),
        Collective('all-gather', (('bf16', (16,)),), 1),
    ]
    assert sorted(map(str, found)) == sorted(map(str, expected))
    assert [each.num_bytes for each in expected] == [32, 32, 24, 24, 40, 32]
