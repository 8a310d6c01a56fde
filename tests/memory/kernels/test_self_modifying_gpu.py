"""GPU kernels of self-modifying memories: their programs of tiles, interpreted, lowered for CUDA, and on a GPU where there is one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from nested_jax.memory.kernels import hopper_tiles as tiles
from nested_jax.memory.kernels import self_modifying as kernels
from nested_jax.memory.kernels import self_modifying_gpu
from nested_jax.memory.self_modifying import Inputs, Memories, Rule, self_modifying

BATCH, LENGTH, HEADS, SIZE = 2, 150, 2, tiles.TILE  # the last chunk is not complete
BASE = dict(kind='matrix', gradient='token', decay_to='init', chunk_size=SIZE, projection_chunk_size=SIZE)
RULES = {
    'hope-linear': {},
    'no-dgd': dict(dgd='none', decay_to='zero', gradient='chunk', read='anchor'),
    'matrix-momentum': dict(gradient='chunk'),
    'hope': dict(kind='mlp', gradient='chunk'),
}
MOMENTUM = 'matrix-momentum', 'hope'
SMALL = pytest.mark.parametrize(
    'name', [pytest.param(name, marks=() if name == 'hope-linear' else pytest.mark.exhaustive) for name in RULES]
)
INTERPRETED = (
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(plgpu, 'InterpretGPUParams'), reason='jax before 0.11 has no public interpreter of GPU kernels'),
)
ON_GPU = pytest.mark.gpu, pytest.mark.skipif(jax.default_backend() != 'gpu', reason='no GPU')


@pytest.fixture(params=[pytest.param('interpreted', marks=INTERPRETED), pytest.param('gpu', marks=ON_GPU)])
def somewhere(request, monkeypatch):
    """Where kernels can run."""
    if request.param == 'interpreted':
        monkeypatch.setattr(plgpu, 'kernel', functools.partial(plgpu.kernel, interpret=plgpu.InterpretGPUParams()))


def arguments(name: str):
    """The rule, inputs, scales and learned memories."""
    rng, rule = np.random.default_rng(0), Rule(**(BASE | RULES[name]))
    rows, gates = (BATCH, LENGTH, HEADS, SIZE), (BATCH, LENGTH, HEADS)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    unit = lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True)
    momentum = normal(*gates) if name in MOMENTUM else None
    inputs = Inputs(unit(normal(*rows)), unit(normal(*rows)), normal(*rows), normal(*gates), normal(*gates) - 2, momentum)
    scale = jnp.asarray([1.0, 3.0])
    if rule.kind == 'matrix':
        return rule, (inputs, scale, Memories(0.1 * normal(HEADS, SIZE, 3 * SIZE + 2), None, None))
    layers = normal(HEADS, SIZE, 5 * SIZE) / 8, 0.1 * normal(HEADS, 3, SIZE, SIZE), 0.1 * normal(HEADS, 2, SIZE, 1)
    return rule, (inputs, scale, Memories(*layers))


def run(rule: Rule, given, implementation: str, segment_ids=None):
    """Outputs, the last memories, and the gradients of a function of both."""

    def loss(given):
        y, state = self_modifying(*given, rule=rule, implementation=implementation, segment_ids=segment_ids)
        weight = jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)
        return jnp.sum(weight * y) + sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(state[:2])), (y, state[:2])

    with jax.default_matmul_precision('highest'):
        gradients, results = jax.jit(jax.grad(loss, has_aux=True))(given)
    return results, gradients


def close(got, expected, tolerance: float = 2e-4):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * max(float(jnp.abs(b).max()), 1e-6))


class Exactly:
    """Products of tiles as they are meant, without shared memory: counted, and the parts of bfloat16 checked to be enough."""

    def __init__(self):
        self.count = 0

    def __call__(self, a: tiles.Tile, b: tiles.Tile, a_axis: int = 1, b_axis: int = 0) -> jax.Array:
        self.count += 1
        for tile in (a, b):
            assert not tile.exact or bool(jnp.all(tile.array == tile.array.astype(jnp.bfloat16).astype(jnp.float32)))
        return jax.lax.dot_general(a.array, b.array, (((a_axis,), (b_axis,)), ((), ())), precision='highest')


def place(x: jax.Array) -> tiles.Tile:
    """An argument of a program as a tile."""
    return tiles.Tile(lambda: jnp.broadcast_to(x, (SIZE, SIZE)), frozenset(axis for axis in (0, 1) if x.shape[axis] > 1))


def check_program(function, *given, products: int | None = None):
    """The program on tiles gives what the function does."""
    expected, multiply = jax.tree.leaves(function(*given)), Exactly()
    found = tiles.evaluate(tiles.trace(function, *given), [place(x) for x in jax.tree.leaves(given)], multiply)
    for tile, array in zip(found, expected, strict=True):
        shape = array.shape if array.ndim == 2 else (1, 1)
        whole = jnp.broadcast_to(array.reshape(shape), (SIZE, SIZE))
        np.testing.assert_allclose(tile.array, whole, rtol=1e-5, atol=1e-5 * max(1.0, float(jnp.abs(whole).max())))
    assert products is None or multiply.count == products


@pytest.fixture
def unlaid(monkeypatch):
    """Registers have no layout outside of a kernel."""
    iota = lambda dtype, shape, axis, layout: jax.lax.broadcasted_iota(dtype, shape, axis)
    monkeypatch.setattr(plgpu, 'broadcasted_iota', iota)


def test_programs_of_tiles(unlaid):
    normal = lambda seed, *shape: jax.random.normal(jax.random.key(seed), shape)
    a, b, column, row = normal(0, SIZE, SIZE), normal(1, SIZE, SIZE), normal(2, SIZE, 1), normal(3, 1, SIZE)
    # The transposed product is the product of both in turn, and what nothing needs is left out.
    check_program(lambda a, b: ((a @ b).T, jnp.exp(a), [a @ a, b @ b][0].T), a, b, products=2)
    check_program(lambda a, b: (a.T, b.T @ a, jnp.where(a > b, a, 0.0) @ b.T), a, b, products=5)
    check_program(lambda a: (a.sum(1, keepdims=True), a.sum(0, keepdims=True), a.sum()), a, products=4)
    check_program(lambda a, column: (column * a, (column * a).sum(0)[None], column.sum(), column.T), a, column)
    check_program(lambda a, row: (row + a, row.sum(1, keepdims=True), row[:, 3:4], a[:, :1], a[5:6]), a, row)
    check_program(lambda column: (jnp.full((SIZE, SIZE), 2.0).sum(0, keepdims=True) * column, column**-2, jax.nn.softplus(column)), column)
    check_program(lambda row: jax.grad(lambda row: jnp.sum(jnp.tanh(row) ** 2 / (1 + row * row)))(row), row)
    with pytest.raises(NotImplementedError, match=r'cumsum of \[\(64, 64\)\]'):
        check_program(lambda a: jnp.cumsum(a, 0), a)


@pytest.mark.parametrize('backwards', [False, pytest.param(True, marks=pytest.mark.slow)])
@SMALL
def test_a_chunk_on_tiles(name, backwards, unlaid):
    """The very chunk of the TPU's kernels, and its derivative."""
    rule, (_, _, initial) = arguments(name)
    normal = lambda seed, *shape: jax.random.normal(jax.random.key(seed), shape)
    start = kernels._apart(rule, jax.tree.map(lambda x: x[0], initial), SIZE)
    memory = tuple(normal(i, *x.shape) / 8 for i, x in enumerate(start * (1 + (name in MOMENTUM))))
    q, k, v = (x / jnp.linalg.norm(x, axis=1, keepdims=True) for x in (normal(seed, SIZE, SIZE) for seed in range(3)))
    rows = *(normal(seed, 1, SIZE) for seed in range(4)), jnp.zeros((1, SIZE)), jnp.ones((1, SIZE))
    chunk = functools.partial(kernels._chunk_of_rows, rule)
    if backwards:
        check_program(lambda *given: jax.vjp(chunk, *given[:-1])[1](given[-1]), memory, start, q, k, v, rows, (memory, q))
    else:
        check_program(chunk, memory, start, q, k, v, rows)


@pytest.mark.usefixtures('somewhere')
def test_products_within_products():
    """A factor that is a product of products is made before shared memory is filled with the other."""
    a, b = (jax.random.normal(jax.random.key(seed), (1, 1, SIZE, SIZE)) / 8 for seed in range(2))
    function = lambda a, b: a @ (b @ (b @ (a @ b)))
    program = tiles.trace(function, a[0, 0], b[0, 0])

    def kernel(a, b, result, scratch):
        given = [self_modifying_gpu._load(ref, 0, 0) for ref in (a, b)]
        result[0, 0] = tiles.evaluate(program, given, tiles.Multiplier(scratch))[0].array

    (got,) = self_modifying_gpu._call(kernel, [a])(a, b)
    with jax.default_matmul_precision('highest'):
        close(got, function(a, b))


@pytest.mark.usefixtures('somewhere')
@pytest.mark.parametrize('documents', [False, True])
@SMALL
def test_equals_the_plain_form_with_gradients(name, documents):
    rule, given = arguments(name)
    segment_ids = jnp.asarray([[0] * SIZE + [1] * (LENGTH - SIZE), [2] * LENGTH]) if documents else None
    close(run(rule, given, 'pallas_gpu', segment_ids), run(rule, given, 'jax', segment_ids))


@pytest.mark.usefixtures('somewhere')
def test_tokens_that_write_nothing():
    rule, (inputs, scale, initial) = arguments('hope-linear')
    never = jnp.full_like(inputs.eta, -jnp.inf)
    given = inputs._replace(eta=never, alpha=never), scale, initial
    (got, gradients), (expected, twin) = run(rule, given, 'pallas_gpu'), run(rule, given, 'jax')
    close((got, gradients[0].query, gradients[2]), (expected, twin[0].query, twin[2]))


@pytest.mark.slow
def test_lowers_for_cuda():
    rule, given = arguments('hope-linear')
    assert lowered(lambda given: self_modifying(*given, rule=rule, implementation='pallas_gpu')[0], given) == 1


@pytest.mark.exhaustive
@pytest.mark.parametrize('name', RULES)
def test_derivatives_lower_for_cuda(name):
    """Forward and backward, two kernels."""
    rule, given = arguments(name)
    assert lowered(jax.grad(lambda given: jnp.sum(self_modifying(*given, rule=rule, implementation='pallas_gpu')[0])), given) == 2


def lowered(function, given) -> int:
    """Kernels in the function's program."""
    return jax.jit(function).trace(given).lower(lowering_platforms=('cuda',)).as_text().count('custom_call @mosaic_gpu')


@pytest.mark.parametrize('changes', [dict(projection_chunk_size=16), dict(adaptive_query=True), dict(chunk_size=16)], ids=str)
def test_what_they_do_not_take(changes):
    rule, (inputs, scale, initial) = arguments('hope-linear')
    assert kernels.fits('gpu', rule, initial)
    with pytest.raises(ValueError, match="allowed with implementation='pallas_gpu' is one chunk size, heads and hidden layers of 64"):
        self_modifying(inputs, scale, initial, rule=Rule(**(BASE | changes)), implementation='pallas_gpu')
    half = jax.tree.map(lambda x: x[..., : SIZE // 2], inputs._replace(eta=None, alpha=None))._replace(eta=inputs.eta, alpha=inputs.alpha)
    narrow = Memories(initial.first[:, : SIZE // 2, : 3 * SIZE // 2 + 2], None, None)
    with pytest.raises(ValueError, match='with heads of 32, allowed'):
        self_modifying(half, scale, narrow, rule=rule, implementation='pallas_gpu')
