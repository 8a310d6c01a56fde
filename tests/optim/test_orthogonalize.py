"""Newton-Schulz against numpy, its invariances (identity 6), derivatives, and where the data lies on a mesh."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nested_jax.optim.orthogonalize import METHODS, orthogonalize, orthogonalize_tree

# Operation by operation, most of the time would go into compiling single operations.
compiled = jax.jit(orthogonalize, static_argnames=('method', 'steps'))

STEPS = {'quintic': 5, 'cubic': 40, 'polar_express': 10, 'svd': 1}
TABLES = {'quintic': [(3.4445, -4.7750, 2.0315)] * 5, 'cubic': [(1.5, -0.5, 0.0)] * 40}
SHARDED = {'explicit': jax.sharding.AxisType.Explicit, 'auto': jax.sharding.AxisType.Auto}


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def polar(x):
    u, _, vt = np.linalg.svd(x, full_matrices=False)
    return u @ vt


def newton_schulz(x, table):
    """X <- a X + b (X X^T) X + c (X X^T)^2 X on one matrix, from the equation."""
    x = x / np.sqrt((x**2).sum())
    for a, b, c in table:
        x = a * x + b * (x @ x.T) @ x + c * (x @ x.T) @ (x @ x.T) @ x
    return x


@pytest.mark.parametrize('shape', [(4, 6), (6, 4), (1, 3), (1, 1)])
@pytest.mark.parametrize('method', TABLES)
def test_iterations_are_those_of_the_equation(x64, method, shape):
    x = draw(*shape)
    actual = compiled(jnp.asarray(x), method=method, steps=len(TABLES[method]))
    np.testing.assert_allclose(actual, newton_schulz(x, TABLES[method]), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize('shape', [(5, 5), (2, 3, 7, 4)])
@pytest.mark.parametrize('method', ['cubic', 'polar_express', 'svd'])
def test_converges_to_the_polar_factor(x64, method, shape):
    x = draw(*shape)
    np.testing.assert_allclose(compiled(jnp.asarray(x), method=method, steps=STEPS[method]), polar(x), atol=1e-9)


def test_polar_express_covers_the_interval_it_is_made_for():
    """Five steps bring singular values from 0.001 on to 1 +- 0.13; the quintic does not."""
    left, right = polar(draw(8, 8)), polar(draw(8, 8, seed=1))
    singular = np.geomspace(2e-3, 1.0, 8)  # above 0.001 also after the division by the Frobenius norm
    spread = lambda method: np.linalg.svd(compiled(jnp.asarray(left * singular @ right, jnp.float32), method=method))[1]
    assert 0.87 < spread('polar_express').min() and spread('polar_express').max() < 1.13
    assert spread('quintic').min() < 0.75


def test_first_cubic_step_is_the_papers_gradient_step(x64):
    """Eq. (44), arXiv:2512.24695v1: O - zeta (O - g + 2 O (O^T O - I)) from O = g with zeta = 1/4."""
    g = draw(3, 5)
    g /= np.linalg.norm(g)
    expected = g - 0.25 * (g - g + 2 * g @ (g.T @ g - np.eye(5)))
    np.testing.assert_allclose(compiled(jnp.asarray(g), method='cubic', steps=1), expected, rtol=1e-12)


@pytest.mark.parametrize('method', METHODS)
def test_scale_does_not_matter(method):
    x = jnp.asarray(draw(4, 6), jnp.float32)
    for scale in (1e-30, 1e-3, 1e30):
        actual = compiled(scale * x, method=method, steps=STEPS[method])
        np.testing.assert_allclose(actual, compiled(x, method=method, steps=STEPS[method]), atol=2e-5)


@pytest.mark.parametrize('method', METHODS)
def test_transposing_commutes(method):
    x = jnp.asarray(draw(2, 4, 6), jnp.float32)
    np.testing.assert_array_equal(compiled(x.mT, method=method), compiled(x, method=method).mT)


@pytest.mark.parametrize('method', METHODS)
def test_a_stack_is_orthogonalised_matrix_by_matrix(method):
    x = jnp.asarray(draw(2, 3, 4, 6), jnp.float32).at[1, 1].set(0.0)
    stacked = compiled(x, method=method)
    for index in np.ndindex(2, 3):
        np.testing.assert_allclose(stacked[index], compiled(x[index], method=method), atol=2e-6)
    mapped = jax.jit(jax.vmap(lambda matrix: orthogonalize(matrix, method=method)))(x[0])
    np.testing.assert_allclose(mapped, stacked[0], atol=2e-6)


@pytest.mark.parametrize('method', METHODS)
def test_zero_gives_zero_with_finite_derivatives(method):
    zero = jnp.zeros((2, 3))
    assert not compiled(zero, method=method).any()
    gradient = jax.grad(lambda x: jnp.sum(orthogonalize(x, method=method) * jnp.arange(6.0).reshape(2, 3)))
    assert jnp.isfinite(jax.jit(gradient)(zero)).all()
    assert jnp.isfinite(jax.jit(jax.jacfwd(gradient))(zero)).all()
    assert compiled(jnp.zeros((0, 3)), method=method).shape == (0, 3)


@pytest.mark.parametrize('shape', [(3, 5), (4, 4)])
@pytest.mark.parametrize('method', METHODS)
def test_derivatives_are_those_of_finite_differences(x64, method, shape):
    x, direction, weights = (jnp.asarray(draw(*shape, seed=seed)) for seed in range(3))
    loss = jax.jit(lambda x: jnp.sum(weights * orthogonalize(x, method=method, steps=STEPS[method])))
    step = 1e-6
    numeric = (loss(x + step * direction) - loss(x - step * direction)) / (2 * step)
    np.testing.assert_allclose(jnp.sum(jax.grad(loss)(x) * direction), numeric, rtol=1e-6)


def test_exact_derivatives_survive_equal_singular_values(x64):
    """At the identity the first is W, the antisymmetric part, and the second W^2 - W S - S W with S the symmetric one."""
    direction = jnp.asarray(draw(3, 3))
    turn, rest = (direction - direction.T) / 2, (direction + direction.T) / 2
    first = lambda x: jax.jvp(lambda x: compiled(x, method='svd'), (x,), (direction,))[1]
    tangent, second = jax.jvp(first, (jnp.eye(3),), (direction,))
    np.testing.assert_allclose(tangent, turn, atol=1e-12)
    np.testing.assert_allclose(second, turn @ turn - turn @ rest - rest @ turn, atol=1e-12)


@pytest.mark.parametrize('shape', [(3, 5), (4, 4), (5, 2)])
def test_exact_second_derivatives_are_those_of_finite_differences(x64, shape):
    x, direction, weights = (jnp.asarray(draw(*shape, seed=seed)) for seed in range(3))
    slope = jax.jit(jax.grad(lambda x: jnp.sum(weights * orthogonalize(x, method='svd'))))
    step = 1e-5
    numeric = (slope(x + step * direction) - slope(x - step * direction)) / (2 * step)
    np.testing.assert_allclose(jax.jvp(slope, (x,), (direction,))[1], numeric, rtol=1e-6, atol=1e-8)


def test_exact_derivatives_where_rank_is_missing_are_finite(x64):
    x = jnp.asarray(np.outer(draw(3), draw(5, seed=1)))
    weights = jnp.asarray(draw(3, 5, seed=2))
    slope = jax.grad(lambda x: jnp.sum(weights * orthogonalize(x, method='svd')))
    inside = jax.jvp(slope, (x,), (x,))[1]  # along x its polar factor stands still, and its slope goes with 1 / |x|
    np.testing.assert_allclose(inside, -slope(x), atol=1e-12)
    assert jnp.isfinite(jax.jit(jax.jacfwd(slope))(x)).all()


def test_exact_factor_leaves_missing_rank_at_zero():
    low_rank = jnp.asarray(np.outer(draw(4), draw(6)), jnp.float32)
    singular = np.linalg.svd(compiled(low_rank, method='svd'))[1]
    np.testing.assert_allclose(singular, [1, 0, 0, 0], atol=1e-6)


@pytest.mark.parametrize('dtype', [jnp.float16, jnp.bfloat16])
def test_16_bit_matrices_accumulate_in_float32(dtype):
    x = jnp.asarray(draw(32, 512), dtype)
    actual = compiled(x, method='polar_express', steps=8)
    assert actual.dtype == dtype
    products = re.findall(r'preferred_element_type=(\w+)', str(jax.make_jaxpr(orthogonalize)(x)))
    assert products == ['float32'] * 3
    np.testing.assert_allclose(actual.astype(jnp.float32), polar(np.asarray(x, np.float64)), atol=0.02)


def test_steps_are_scanned():
    sizes = [len(str(jax.make_jaxpr(lambda x, steps=steps: orthogonalize(x, steps=steps))(jnp.ones((3, 4))))) for steps in (2, 30)]
    assert abs(sizes[0] - sizes[1]) < 20


def test_leaves_of_equal_shape_share_one_iteration():
    tree = {'a': jnp.asarray(draw(4, 6), jnp.float32), 'b': {'c': jnp.asarray(draw(6, 4, seed=1), jnp.float32), 'd': None}}
    actual = jax.jit(orthogonalize_tree)(tree)
    for leaf, expected in zip(jax.tree.leaves(actual), jax.tree.leaves(tree), strict=True):
        np.testing.assert_allclose(leaf, compiled(expected), atol=2e-6)
    assert str(jax.make_jaxpr(orthogonalize_tree)(tree)).count('scan[') == 1
    assert orthogonalize_tree({}) == {}


def test_large_matrices_of_a_stack_are_looped_over_on_one_cpu(monkeypatch):
    """The same numbers and derivatives, without a product over the stack."""
    x = jnp.asarray(draw(2, 256, 257), jnp.float32).at[1].set(0.0)
    products_of_stacks = lambda run: re.findall(r'f32\[2,\d+,\d+\]\S* dot\(', run.lower(x).compile().as_text())
    results = []
    for devices, expected in (1, 0), (8, 3):
        monkeypatch.setattr(jax, 'device_count', lambda devices=devices: devices)
        run = lambda x: orthogonalize(x, steps=1)
        assert len(products_of_stacks(jax.jit(run))) == expected
        results.append(jax.jit(lambda x, run=run: jax.vjp(run, x)[1](x)[0] + run(x))(x))
    np.testing.assert_allclose(*results, rtol=1e-4, atol=1e-6)


def test_large_leaves_are_not_stacked_on_a_cpu():
    leaves = [jnp.asarray(draw(*shape, seed=seed), jnp.float32) for seed, shape in enumerate([(256, 257), (257, 256)])]
    run = jax.jit(lambda leaves: orthogonalize_tree(leaves, steps=1))
    assert not re.findall(r'f32\[2,\d+,\d+\]', run.lower(leaves).compile().as_text())
    for actual, leaf in zip(run(leaves), leaves, strict=True):
        np.testing.assert_allclose(actual, compiled(leaf, steps=1), atol=2e-6)


@pytest.mark.parametrize('steps', [1, 2, 3, 5, 7])
@pytest.mark.parametrize('shape', [(4, 8), (3, 2, 30)])
def test_wide_matrices_take_the_same_steps_on_their_gram_matrix(x64, shape, steps):
    x = jnp.asarray(draw(*shape)).at[..., 0, :].set(0.0)
    expected = np.stack([newton_schulz(matrix, TABLES['quintic'][:1] * steps) for matrix in np.asarray(x).reshape(-1, *shape[-2:])])
    np.testing.assert_allclose(compiled(x, steps=steps), expected.reshape(shape), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(('smallest', 'rank'), [(1e-2, 32), (1e-4, 32), (1e-8, 32), (1e-1, 8)])
def test_the_gram_matrix_costs_no_precision(smallest, rank):
    """Small singular values, which it squares; steps one by one are off by up to 1.1e-5 here."""
    singular = np.geomspace(1.0, smallest, 32) * (np.arange(32) < rank)
    x = (polar(draw(32, 32)) * singular @ polar(draw(32, 96, seed=1))).astype(np.float32)
    expected = newton_schulz(x.astype(np.float64), TABLES['quintic'])
    assert np.linalg.norm(compiled(jnp.asarray(x)) - expected) < 2e-5 * np.linalg.norm(expected)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ({'x': jnp.ones(3)}, r'x has shape \(3,\)'),
        ({'x': jnp.ones((2, 2), jnp.complex64)}, 'complex64, allowed are real matrices'),
        ({'x': jnp.ones((2, 2), jnp.int32)}, 'int32, allowed are real matrices'),
        ({'x': jnp.eye(2), 'method': 'quartic'}, "method is 'quartic', allowed is one of 'quintic', 'cubic', 'polar_express', 'svd'"),
        ({'x': jnp.eye(2), 'steps': 0}, 'steps is 0, allowed is an integer of at least 1'),
        ({'x': jnp.eye(2), 'steps': 2.0}, 'steps is 2.0, allowed is an integer of at least 1'),
        ({'x': jnp.eye(2), 'steps': True}, 'steps is True, allowed is an integer of at least 1'),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        orthogonalize(**arguments)


def collectives(function, *arguments):
    """Names and element counts of a compiled program's collectives."""
    text = jax.jit(function).lower(*arguments).compile().as_text()
    found = re.findall(r'= (\(?\w+\[.*?) (all-\w[a-z-]*|collective-permute|reduce-scatter)\(', text)
    elements = lambda result: max(int(np.prod([int(n) for n in dims.split(',') if n])) for dims in re.findall(r'\[([\d,]*)\]', result))
    return [(name, elements(result)) for result, name in found]


@pytest.fixture(params=SHARDED)
def place(request):
    """Function that puts an array on a 2 x 4 mesh, and the keyword argument the sharding is told with."""
    mesh = jax.make_mesh((2, 4), ('data', 'model'), axis_types=(SHARDED[request.param],) * 2)
    told = request.param == 'auto'

    def put(x, *spec):
        sharding = jax.sharding.NamedSharding(mesh, jax.P(*spec))
        return jax.device_put(jnp.asarray(x, jnp.float32), sharding), sharding if told else None

    return put


@pytest.mark.parametrize(
    ('shape', 'spec'),
    [((8, 16, 32), (None, 'data', 'model')), ((8, 32, 16), (None, 'data', 'model')), ((8, 16, 32), (None, ('data', 'model')))],
)
def test_a_stack_moves_by_all_to_alls_only(place, shape, spec):
    x, sharding = place(draw(*shape), *spec)
    run = lambda x: orthogonalize(x, sharding=sharding)
    assert {name for name, _ in collectives(run, x)} == {'all-to-all'}
    actual = jax.jit(run)(x)
    assert actual.sharding.is_equivalent_to(x.sharding, 3)
    np.testing.assert_allclose(actual, compiled(np.asarray(x)), atol=2e-6)


@pytest.mark.parametrize('shape', [(16, 32), (3, 32, 16), (4, 16, 32)])
def test_what_is_left_is_split_along_the_longer_side(place, shape):
    """Only the products of short sides are summed over devices; nothing is gathered."""
    x, sharding = place(draw(*shape), *[None] * (len(shape) - 2), 'data', 'model')
    run = lambda x: orthogonalize(x, sharding=sharding)
    found = collectives(run, x)
    assert {name for name, _ in found} == {'all-to-all', 'all-reduce'}
    assert max(size for name, size in found if name == 'all-reduce') <= x.size // 2
    np.testing.assert_allclose(jax.jit(run)(x), compiled(np.asarray(x)), atol=2e-6)


@pytest.mark.parametrize(('shape', 'split'), [((3, 4, 12), 16), ((5, 10, 4), 16), ((8, 20), 24)])
def test_what_divides_nothing_is_padded(place, shape, split):
    """With zeros behind the longer side, which stay zero: nothing is gathered, and every device has its share."""
    x, sharding = place(draw(*shape), *[None] * (len(shape) - 2), 'data', 'model')
    run = lambda x: orthogonalize(x, sharding=sharding)
    found = collectives(run, x)
    assert {name for name, _ in found} == {'all-to-all', 'all-reduce', 'collective-permute'}
    rows = min(shape[-2:])
    assert max(size for name, size in found if name == 'all-reduce') <= np.prod(shape[:-2], dtype=int) * rows**2
    assert f'f32[{",".join(map(str, (*shape[:-2], rows, split // 8)))}]' in jax.jit(run).lower(x).compile().as_text()
    np.testing.assert_allclose(jax.jit(run)(x), compiled(np.asarray(x)), atol=2e-6)


@pytest.mark.parametrize('shape', [(8, 16, 32), (3, 12, 4), (2, 3, 4, 8), (4, 12)])
def test_whole_matrices_are_dealt_out_to_devices(place, shape):
    """What the exact form needs: all-to-alls, on a batch that zeros make up to the devices. A matrix by itself is on one."""
    x, sharding = place(draw(*shape), *[None] * (len(shape) - 2), 'data', 'model')
    run = lambda x: orthogonalize(x, method='svd', sharding=sharding)
    assert {name for name, _ in collectives(run, x)} == {'all-to-all'}
    actual = jax.jit(run)(x)
    assert actual.sharding.is_equivalent_to(x.sharding, x.ndim)
    np.testing.assert_allclose(actual, compiled(np.asarray(x), method='svd'), atol=2e-6)


def test_a_sharding_that_is_not_told_is_asked_for():
    """XLA gathers here. Operation by operation the array knows."""
    mesh = jax.make_mesh((2, 4), ('data', 'model'), axis_types=(SHARDED['auto'],) * 2)
    x = jax.device_put(jnp.asarray(draw(4, 12), jnp.float32), jax.NamedSharding(mesh, jax.P('data', 'model')))
    with pytest.warns(
        UserWarning, match=r'shape \(4, 12\) on an Auto mesh of 8 devices is not told, and XLA gathers it if its last two axes'
    ):
        assert 'all-gather' in {name for name, _ in collectives(orthogonalize, x)}
    np.testing.assert_allclose(orthogonalize(x), compiled(np.asarray(x)), atol=2e-6)
    whole = jax.NamedSharding(mesh, jax.P())
    np.testing.assert_allclose(jax.jit(lambda x: orthogonalize(x, sharding=whole))(x), compiled(np.asarray(x)), atol=2e-6)


def test_leaves_are_stacked_and_the_stack_moves(place):
    leaves, shardings = zip(*(place(draw(16, 32, seed=seed), 'data', 'model') for seed in range(8)), strict=True)
    run = lambda leaves: orthogonalize_tree(leaves, shardings=shardings if shardings[0] else None)
    assert {name for name, _ in collectives(run, leaves)} == {'all-to-all'}
    for actual, leaf in zip(jax.jit(run)(leaves), leaves, strict=True):
        assert actual.sharding.is_equivalent_to(leaf.sharding, 2)
        np.testing.assert_allclose(actual, compiled(np.asarray(leaf)), atol=2e-6)


def test_explicit_meshes_keep_types_under_vmap_grad_and_outside_of_jit():
    mesh = jax.make_mesh((2, 4), ('data', 'model'), axis_types=(SHARDED['explicit'],) * 2)
    x = jax.device_put(jnp.asarray(draw(3, 8, 16), jnp.float32), jax.NamedSharding(mesh, jax.P(None, 'data', 'model')))
    assert jax.typeof(orthogonalize(x)) == jax.typeof(x)
    assert jax.typeof(jax.jit(jax.vmap(orthogonalize))(x)) == jax.typeof(x)
    assert jax.typeof(jax.jit(jax.grad(lambda x: jnp.sum(compiled(x) ** 3)))(x)) == jax.typeof(x)
