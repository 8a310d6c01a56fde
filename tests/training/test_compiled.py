"""Collectives are counted with the loops they stand in, and memory is what the arrays take."""

import jax
import jax.numpy as jnp
import pytest

from nested_jax.training.compiled import Collective, collectives, report


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

%body (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %s = f32[2,4]{1,0} fusion(%p), kind=kCustom, calls=%fused
  ROOT %t = (s32[], f32[8,4]) tuple(%i, %s)
}

ENTRY %main (x: bf16[4]) -> bf16[16] {
  %w = (s32[], f32[8,4]) while(%t), condition=%sum, body=%body, backend_config={"known_trip_count":{"n":"7"}}
  %g = (bf16[4]{0}, bf16[16]{0}) all-gather-start(%x), dimensions={0}
  ROOT %d = bf16[16]{0} all-gather-done(%g)
}
"""
    found = collectives(text)
    assert Collective('reduce-scatter', (('f32', (2, 4)),), 7) in found
    assert Collective('all-gather', (('bf16', (16,)),), 1) in found
    assert len(found) == 2
    assert sum(each.runs * each.num_bytes for each in found) == 7 * 32 + 32
