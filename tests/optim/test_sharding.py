"""On eight devices: the updates of one, nothing gathered, and state that stays where it was put."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nested_jax.optim import (
    BlockSpec,
    MatrixSpec,
    adagrad_as_memory,
    adam_as_memory,
    by_level,
    deep_momentum,
    delta_gradient_descent,
    delta_momentum,
    feature_momentum,
    m3,
    muon,
    nested,
    orthogonalize,
    preconditioned_momentum,
    scale_by_deep_momentum,
    state_shardings,
)
from nested_jax.optim.orthogonalize import orthogonalize_tree
from nested_jax.optim.sharding import Layout, route

AXIS_TYPES = {'explicit': jax.sharding.AxisType.Explicit, 'auto': jax.sharding.AxisType.Auto}
SHAPES = {'qkv': (8, 16, 48), 'up': (8, 16, 32), 'down': (8, 32, 16), 'embedding': (32, 16), 'bias': (16,)}
SPECS = {
    'qkv': (None, 'data', 'model'),
    'up': (None, 'data', 'model'),
    'down': (None, 'model', 'data'),
    'embedding': ('model', 'data'),
    'bias': ('model',),
}
ORTHOGONAL = {
    'muon': muon,
    'm3': functools.partial(m3, periods=(2,)),
    'by_level': lambda rate, **told: by_level(muon(rate, **told), lambda path: 1 if path == 'bias' else 3),
}
WIDTHS = {name: shape[-1] for name, shape in SHAPES.items()}
DELTA = {
    'delta_momentum': functools.partial(delta_momentum, erase_rate=optax.linear_schedule(0.1, 0.0, 10)),
    'delta_momentum_normalised': functools.partial(delta_momentum, form='normalised'),
    'delta_momentum_proximal': functools.partial(delta_momentum, form='proximal'),
    'preconditioned_momentum': preconditioned_momentum,
    'preconditioned_momentum_given': lambda rate, **told: preconditioned_momentum(rate, 0.9, given(WIDTHS), **told),
    'feature_momentum': lambda rate, **told: feature_momentum(rate, 0.5, 0.9, given(WIDTHS), **told),
}
ELEMENTWISE = {'deep_momentum': deep_momentum, 'adam_as_memory': adam_as_memory, 'adagrad_as_memory': adagrad_as_memory}


def some(names, *fast):
    """Parameters of a test, those that are not fast marked as slow."""
    return [name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in names]


def given(widths):
    """A preconditioner of each leaf."""
    return {name: np.random.default_rng(1).normal(size=(width, width)).astype(np.float32) for name, width in widths.items()}


def fused(path, leaf):
    return BlockSpec(-1, (16, 16, 16)) if path == 'qkv' else 'matrix' if len(leaf.shape) == 3 else 'adam'


def make_mesh(kind):
    return jax.make_mesh((2, 4), ('data', 'model'), axis_types=(AXIS_TYPES[kind],) * 2)


SHARDINGS = {name: jax.NamedSharding(make_mesh('auto'), jax.P(*spec)) for name, spec in SPECS.items()}


def make_params(mesh, dtype=jnp.float32):
    """Parameters on one device and on the mesh, and the shardings there."""
    draw = np.random.default_rng(0).normal
    params = {name: jnp.asarray(draw(size=shape), dtype) for name, shape in SHAPES.items()}
    shardings = {name: jax.NamedSharding(mesh, jax.P(*spec)) for name, spec in SPECS.items()}
    return params, jax.tree.map(jax.device_put, params, shardings), shardings


def make_optimizer(name, shardings=None):
    if name in ELEMENTWISE:
        return ELEMENTWISE[name](0.1)
    return ORTHOGONAL[name](0.1, labels=fused, shardings=shardings) if name in ORTHOGONAL else DELTA[name](0.1, shardings=shardings)


def three_steps(optimizer, params):
    step, state = jax.jit(optimizer.update), optimizer.init(params)
    for _ in range(3):
        updates, state = step(params, state, params)
        params = jax.jit(optax.apply_updates)(params, updates)
    return updates, state


@pytest.mark.parametrize('kind', AXIS_TYPES)
@pytest.mark.parametrize(('dtype', 'tolerance'), [(jnp.float32, 1e-4), (jnp.float64, 1e-9)])
@pytest.mark.parametrize('name', some(ORTHOGONAL | DELTA | ELEMENTWISE, 'muon', 'm3'))
def test_updates_are_those_of_one_device(name, dtype, tolerance, kind):
    with jax.enable_x64(dtype == jnp.float64):
        mesh = make_mesh(kind)
        alone, sharded, shardings = make_params(mesh, dtype)
        expected, _ = three_steps(make_optimizer(name), alone)
        with jax.set_mesh(mesh):
            updates, state = three_steps(make_optimizer(name, None if kind == 'explicit' else shardings), sharded)
        for leaf, update in updates.items():
            assert update.sharding.is_equivalent_to(shardings[leaf], update.ndim)
            assert np.abs(update - expected[leaf]).max() <= tolerance * np.abs(expected[leaf]).max()
        for path, leaf in jax.tree_util.tree_leaves_with_path(state):
            name = next((key.key for key in path if isinstance(key, jax.tree_util.DictKey) and key.key in SHAPES), None)
            assert leaf.shape != SHAPES.get(name) or leaf.sharding.is_equivalent_to(shardings[name], leaf.ndim)


def collectives(optimizer, params, **extra):
    """Those of a compiled update, with the entries of their largest results."""
    text = jax.jit(optimizer.update).lower(params, optimizer.init(params), params, **extra).compile().as_text()
    found = re.findall(r'= (\(?\w+\[.*?) (all-\w[a-z-]*|collective-permute|reduce-scatter)(?:-start)?\(', text)
    entries = lambda result: max(int(np.prod([int(n) for n in dims.split(',') if n])) for dims in re.findall(r'\[([\d,]*)\]', result))
    return {name: max(entries(result) for result, other in found if other == name) for _, name in found}


@pytest.mark.parametrize('kind', AXIS_TYPES)
@pytest.mark.parametrize('name', some(ORTHOGONAL, 'muon', 'm3'))
def test_nothing_is_gathered(name, kind):
    """Fused axes that are sharded move their blocks by permutes, stacks by all-to-alls."""
    mesh = make_mesh(kind)
    _, params, shardings = make_params(mesh)
    optimizer = make_optimizer(name, None if kind == 'explicit' else shardings)
    with jax.set_mesh(mesh):
        assert set(collectives(optimizer, params)) == {'all-to-all', 'collective-permute'}


@pytest.mark.parametrize('kind', AXIS_TYPES)
@pytest.mark.parametrize('name', some([*ELEMENTWISE, 'nested'], 'deep_momentum'))
def test_no_stack_is_gathered_by_the_others(name, kind):
    """On an Auto mesh deep momentum gathers the first layer of its memory, a quarter of the smallest stack here."""
    mesh = make_mesh(kind)
    _, params, shardings = make_params(mesh)
    told = None if kind == 'explicit' else shardings
    slow = nested(muon(0.1, labels=fused, shardings=told), optax.sgd(0.1), lambda path: 2 * (path == 'up'))
    with jax.set_mesh(mesh):
        found = collectives(slow if name == 'nested' else make_optimizer(name), params)
    assert found.get('all-gather', 0) <= (1024 if (name, kind) == ('deep_momentum', 'auto') else 0)


@pytest.mark.parametrize('kind', AXIS_TYPES)
@pytest.mark.parametrize(('dtype', 'tolerance'), [(jnp.float32, 1e-4), (jnp.float64, 1e-9)])
@pytest.mark.parametrize(
    ('shape', 'spec', 'samples', 'gathered'),
    [
        ((8, 16, 32), (None, 'data', 'model'), 24, 0),
        pytest.param((8, 16, 32), (None, 'data', 'model'), 6, 0, marks=pytest.mark.slow),
        pytest.param((2, 6, 20), ('data', None, 'model'), 8, 0, marks=pytest.mark.slow),
        pytest.param((3, 4, 12), (None, 'data', 'model'), 10, 3 * 10 * 4, marks=pytest.mark.slow),
        ((16, 24), ('data', 'model'), 6, 6 * 16),
    ],
)
def test_exact_delta_gradient_descent_gathers_no_more_than_samples(shape, spec, samples, gathered, dtype, tolerance, kind):
    """And those of layers only that no mesh axis can be dealt out over."""
    with jax.enable_x64(dtype == jnp.float64):
        mesh, draw = make_mesh(kind), np.random.default_rng(0).normal
        sharding = jax.NamedSharding(mesh, jax.P(*spec))
        alone, inputs = jnp.asarray(draw(size=shape), dtype), jnp.asarray(draw(size=(*shape[:-2], samples, shape[-2])), dtype)
        reference = delta_gradient_descent(0.5)
        expected, _ = reference.update(alone, reference.init(alone), alone, inputs=inputs)
        optimizer = delta_gradient_descent(0.5, shardings=None if kind == 'explicit' else sharding)
        with jax.set_mesh(mesh):
            params = jax.device_put(alone, sharding)
            inputs = jax.device_put(inputs, jax.NamedSharding(mesh, jax.P(*[None] * (len(shape) - 2), 'data')))
            found = collectives(optimizer, params, inputs=inputs)
            updates, _ = jax.jit(optimizer.update)(params, optimizer.init(params), params, inputs=inputs)
        assert set(found) <= {'all-to-all', 'collective-permute', 'all-gather'} and found.get('all-gather', 0) == gathered
        assert updates.sharding.is_equivalent_to(sharding, len(shape))
        assert np.abs(updates - expected).max() <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize('kind', AXIS_TYPES)
def test_what_deep_momentum_reads_is_orthogonalised_without_gathering_it(kind):
    """By its sigma on Explicit meshes, by what is chained to it on Auto ones."""
    mesh = make_mesh(kind)
    alone, params, shardings = ({name: tree[name] for name in ('qkv', 'up', 'down')} for tree in make_params(mesh))
    optimizer = deep_momentum(0.1, 0, sigma=orthogonalize)
    expected, _ = three_steps(optimizer, alone)
    if kind == 'auto':
        orthogonal = optax.stateless(lambda updates, params: orthogonalize_tree(updates, shardings=shardings))
        optimizer = optax.chain(scale_by_deep_momentum(0), orthogonal, optax.scale(-0.1))
    with jax.set_mesh(mesh):
        assert 'all-gather' not in collectives(optimizer, params)
        updates, _ = three_steps(optimizer, params)
    for name, update in updates.items():
        assert update.sharding.is_equivalent_to(shardings[name], update.ndim)
        assert np.abs(update - expected[name]).max() <= 1e-4 * np.abs(expected[name]).max()


# (shape, how it is split), each axis by what divides it: stacks that are dealt out, and what no device has a share of.
ODD = {
    'stack': ((8, 16, 32), (None, 'data', 'model')),
    'wide': ((3, 4, 12), (None, 'data', 'model')),
    'tall': ((3, 12, 4), (None, 'model', 'data')),
    'matrix': ((4, 12), ('data', 'model')),
    'rows': ((8, 20), (('data', 'model'), None)),
    'columns': ((20, 8), (None, ('data', 'model'))),
    'layers': ((2, 6, 20), ('data', None, 'model')),
    'vector': ((16,), ('model',)),
}


@pytest.mark.parametrize('kind', some(AXIS_TYPES, 'auto'))
@pytest.mark.parametrize('shape', some(ODD, 'stack', 'wide', 'matrix', 'vector'))
@pytest.mark.parametrize(
    'name',
    some([*DELTA, 'muon', 'm3', 'muon_svd'], 'delta_momentum', 'delta_momentum_proximal', 'preconditioned_momentum', 'muon', 'muon_svd'),
)
def test_nothing_is_gathered_of_odd_shapes_either(name, shape, kind):
    """What does not divide is padded, what is summed up over devices are products of a matrix' short sides or of preconditioners."""
    if len(ODD[shape][0]) < 2 and name not in DELTA:
        pytest.skip('no matrix')
    mesh, (size, spec) = make_mesh(kind), ODD[shape]
    sharding = {'w': jax.NamedSharding(mesh, jax.P(*spec))}
    alone = {'w': jnp.asarray(np.random.default_rng(0).normal(size=size), jnp.float32)}
    told = dict(shardings=None if kind == 'explicit' else sharding)
    matrices = {'muon': muon, 'm3': ORTHOGONAL['m3'], 'muon_svd': functools.partial(muon, method='svd')}
    make = {
        **DELTA,
        **{name: functools.partial(matrix, labels='matrix') for name, matrix in matrices.items()},
        'preconditioned_momentum_given': lambda rate, **told: preconditioned_momentum(rate, 0.9, given({'w': size[-1]}), **told),
        'feature_momentum': lambda rate, **told: feature_momentum(rate, 0.5, 0.9, given({'w': size[-1]}), **told),
    }[name]
    params = jax.tree.map(jax.device_put, alone, sharding)
    with jax.set_mesh(mesh):
        found = collectives(make(0.1, **told), params)
        updates, _ = three_steps(make(0.1, **told), params)
    assert set(found) <= {'all-to-all', 'collective-permute', 'all-reduce'}
    *batch, rows, width = (1, *size) if len(size) == 1 else size
    summed = width**2 if 'preconditioned' in name else 1 if 'svd' in name else min(rows, width) ** 2
    assert found.get('all-reduce', 0) <= np.prod([*batch, summed], dtype=int)
    assert updates['w'].sharding.is_equivalent_to(sharding['w'], len(size))
    expected, _ = three_steps(make(0.1), alone)
    assert np.abs(updates['w'] - expected['w']).max() <= 1e-4 * np.abs(expected['w']).max()


@pytest.mark.parametrize('kind', AXIS_TYPES)
@pytest.mark.parametrize(
    'spec', [('data', 'model', None), ('data', None, 'model'), (None, 'data', 'model'), (None, None, ('data', 'model'))]
)
def test_axes_that_are_flattened_into_one_are_not_gathered(spec, kind):
    """(embed, heads, head_dim) as one matrix, split along any of them."""
    mesh = make_mesh(kind)
    sharding = {'w': jax.NamedSharding(mesh, jax.P(*spec))}
    alone = {'w': jnp.asarray(np.random.default_rng(0).normal(size=(16, 8, 8)), jnp.float32)}
    make = lambda shardings: muon(0.1, labels=lambda path, leaf: MatrixSpec(inputs=0, outputs=(1, 2)), shardings=shardings)
    params, optimizer = jax.tree.map(jax.device_put, alone, sharding), make(None if kind == 'explicit' else sharding)
    with jax.set_mesh(mesh):
        assert set(collectives(optimizer, params)) == {'all-to-all', 'all-reduce'}
        updates, _ = three_steps(optimizer, params)
    expected, _ = three_steps(make(None), alone)
    assert updates['w'].sharding.is_equivalent_to(sharding['w'], 3)
    assert np.abs(updates['w'] - expected['w']).max() <= 1e-4 * np.abs(expected['w']).max()


@pytest.mark.parametrize('kind', AXIS_TYPES)
@pytest.mark.parametrize('shape', [(8, 16, 48), (16, 48)])
def test_blocks_that_cut_across_devices_are_not_gathered(shape, kind):
    """Grouped query, key and value of 30, 9 and 9 columns, of which four devices have 12 each."""
    mesh = make_mesh(kind)
    sharding = {'w': jax.NamedSharding(mesh, jax.P(*[None] * (len(shape) - 2), 'data', 'model'))}
    alone = {'w': jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)}
    make = lambda shardings: muon(0.1, labels=lambda path, leaf: BlockSpec(-1, (30, 9, 9)), shardings=shardings)
    params, optimizer = jax.tree.map(jax.device_put, alone, sharding), make(None if kind == 'explicit' else sharding)
    with jax.set_mesh(mesh):
        assert set(collectives(optimizer, params)) <= {'all-to-all', 'all-reduce', 'collective-permute'}
        updates, _ = three_steps(optimizer, params)
    expected, _ = three_steps(make(None), alone)
    assert np.abs(updates['w'] - expected['w']).max() <= 1e-4 * np.abs(expected['w']).max()


@pytest.mark.parametrize('name', ['muon', 'm3', 'delta_momentum', 'preconditioned_momentum', 'preconditioned_momentum_given'])
def test_shardings_that_are_not_told_are_asked_for(name):
    """In a program for an Auto mesh; elsewhere they are known, or there is nothing to know."""
    mesh = make_mesh('auto')
    alone, params, shardings = make_params(mesh)
    optimizer = make_optimizer(name)
    message = r'an array of shape \(.* on an Auto mesh of 8 devices is not told, .* give its NamedSharding as `shardings`, or NamedSharding'
    with pytest.warns(UserWarning, match=message) as caught:
        jax.jit(optimizer.update).lower(params, optimizer.init(params), params)
    shapes = {shape for shape in SHAPES.values() if len(shape) == 3 or (len(shape) == 2 and name not in ORTHOGONAL)}
    assert {shape for shape in SHAPES.values() for warning in caught if f'shape {shape} on' in str(warning.message)} == shapes
    jax.jit(optimizer.update).lower(alone, optimizer.init(alone), alone)
    whole = jax.tree.map(lambda _: jax.NamedSharding(mesh, jax.P()), shardings)
    jax.jit(make_optimizer(name, whole).update).lower(params, optimizer.init(params), params)


@pytest.mark.parametrize(
    ('shape', 'names', 'along', 'padded', 'expected'),
    [
        ((8, 4, 8), ((), ('a',), ('b',)), -1, (8, 4, 8), [(('b',), ('a',), ()), (('b', 'a'), (), ())]),
        ((2, 4, 8), ((), ('a',), ('b',)), -1, (2, 4, 8), [(('a',), (), ('b',))]),
        ((3, 4, 8), ((), ('a',), ('b',)), -1, (3, 4, 8), [((), (), ('b', 'a'))]),
        ((3, 4, 12), ((), ('a',), ('b',)), -1, (3, 4, 16), [((), (), ('b', 'a'))]),
        ((3, 4, 12), ((), ('a',), ('b',)), -2, (3, 8, 12), [((), ('a', 'b'), ())]),
        ((3, 4, 12), ((), ('a',), ('b',)), None, (8, 4, 12), [(('b',), ('a',), ()), (('b', 'a'), (), ())]),
        ((2, 4, 8, 8), (('a',), (), (), ('b',)), -1, (2, 4, 8, 8), [(('a',), ('b',), (), ())]),
        ((2, 3, 8, 8), (('a',), (), (), ('b',)), None, (8, 3, 8, 8), [(('a', 'b'), (), (), ())]),
        ((8, 5, 8), ((), ('a',), ('b',)), -1, (8, 6, 8), [(('b',), ('a',), ()), (('b', 'a'), (), ())]),
        ((4, 12), ((), ('b',)), -1, (4, 12), []),
    ],
)
def test_mesh_axes_move_one_at_a_time(shape, names, along, padded, expected):
    """What does not divide is padded, and no mesh axis is lost on the way."""
    mesh = jax.sharding.AbstractMesh((2, 4), ('a', 'b'), axis_types=(AXIS_TYPES['auto'],) * 2)
    reached, moves = route(Layout(mesh, names), shape, along)
    assert reached == padded
    assert [move.names for move in moves] == [names, *expected]
    assert all(sorted(sum(move.names, ())) == sorted(sum(names, ())) for move in moves)


@pytest.mark.parametrize(
    'optimizer',
    [
        muon(0.1, shardings=SHARDINGS),
        m3(0.1, shardings=SHARDINGS),
        optax.adamw(0.1),
        by_level(optax.adamw(0.1), lambda path: 1 + (path == 'up')),
        nested(optax.adamw(0.1), optax.sgd(0.1), lambda path: 2 * (path == 'up')),
        optax.adafactor(0.1, min_dim_size_to_factor=4),
        deep_momentum(0.1, 8),
    ],
    ids=['muon', 'm3', 'adamw', 'by_level', 'nested', 'adafactor', 'deep_momentum'],
)
def test_state_shardings_are_kept_by_init_and_update(optimizer):
    _, params, shardings = make_params(make_mesh('auto'))
    placed = state_shardings(optimizer, params, shardings)
    state = jax.jit(optimizer.init, out_shardings=placed)(params)
    assert jax.tree.structure(state) == jax.tree.structure(placed)
    _, after = jax.jit(optimizer.update, out_shardings=(shardings, placed))(params, state, params)
    jax.tree.map(lambda leaf, sharding: leaf.sharding.is_equivalent_to(sharding, leaf.ndim) or pytest.fail(str(sharding)), after, placed)
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        name = path[-1].key if path and isinstance(path[-1], jax.tree_util.DictKey) else None
        if leaf.shape == SHAPES.get(name):
            assert leaf.sharding.is_equivalent_to(shardings[name], leaf.ndim)


def test_state_of_another_shape_is_spread_over_the_mesh():
    """What leading axes do not keep, the first axis it divides takes."""
    shapes = {'rows': (8, 16), 'square': (8, 48, 48), 'small': (8, 3), 'none': (3,), 'count': ()}
    memory = optax.GradientTransformation(
        lambda params: {'w': {name: jnp.zeros(shape) for name, shape in shapes.items()}, 'other': jnp.zeros(16)}, lambda *_: None
    )
    sharding = jax.NamedSharding(make_mesh('auto'), jax.P('data', None, 'model'))
    placed = state_shardings(memory, {'w': jax.ShapeDtypeStruct((8, 16, 48), jnp.float32)}, {'w': sharding})
    specs = {name: tuple(filter(None, place.spec)) for name, place in placed['w'].items()}
    assert specs == {'rows': ('data',), 'square': ('data', 'model'), 'small': ('data',), 'none': (), 'count': ()}
    assert placed['other'].spec == jax.P()


def test_state_shardings_of_parameters_in_a_list():
    """Their indices are also those of the transformations in a chain."""
    mesh = make_mesh('auto')
    specs = [jax.P('data', None), jax.P(None, 'model')]
    params = [jax.ShapeDtypeStruct((4, 4), jnp.float32)] * 2
    chain = optax.chain(optax.trace(0.9), optax.scale_by_adam())
    shardings = state_shardings(chain, params, [jax.NamedSharding(mesh, spec) for spec in specs])
    for moment in (shardings[0].trace, shardings[1].mu, shardings[1].nu):
        assert [sharding.spec for sharding in moment] == specs
