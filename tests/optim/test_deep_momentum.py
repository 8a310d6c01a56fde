"""Deep momentum: ten steps against numpy, heavy ball and Muon as exact cases, boundedness, the size and place of its state."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nested_jax.optim import orthogonalize, scale_by_muon
from nested_jax.optim.deep_momentum import DeepMemory, deep_momentum, scale_by_deep_momentum

slow = functools.partial(pytest.param, marks=pytest.mark.slow)
SHAPES = {'w': (6, 3), 'stacked': (2, 4, 3), 'vector': (3,)}


def make_gradients(steps=10, shapes=SHAPES, dtype=None, scale=1.0):
    draw = np.random.default_rng(0).normal
    return {name: jnp.asarray(scale * draw(size=(steps, *shape)), dtype) for name, shape in shapes.items()}


def run(optimizer, gradients, params=None):
    """(updates of every step, last state)."""
    params = params or jax.tree.map(lambda leaf: jnp.zeros_like(leaf[0]), gradients)
    step = lambda state, gradient: optimizer.update(gradient, state, params)[::-1]
    return jax.jit(lambda gradients: jax.lax.scan(step, optimizer.init(params), gradients)[::-1])(gradients)


def newton_schulz(x):
    a, b, c = 3.4445, -4.7750, 2.0315
    x = x / (jnp.linalg.norm(x, axis=(-2, -1), keepdims=True) + 1e-8)
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def rms(rows):
    return np.sqrt(np.mean([row @ row for row in rows]))


def numpy_reference(gradients, first, decay, rate, objective, linear):
    """One matrix, row by row: first is W_1 transposed, (hidden, width), and v is W_2 transposed, (width, hidden)."""
    w0 = np.array(first).T
    w, v, trace = w0.copy(), np.zeros(w0.T.shape), np.zeros(gradients[0].shape)
    size = w.shape[0]
    features = lambda row: np.tanh(w @ row) / np.sqrt(size)
    for u in gradients:
        scale = rms(u)
        keys = u / scale
        read = np.stack([v @ features(key) for key in keys]) * scale + linear * trace
        error = {'dot': -u, 'l2': read - u, 'huber': np.tanh(read - u)}[objective]
        local = error / max(scale, rms(error)) / len(u)
        v_gradient = sum(np.outer(row, features(key)) for row, key in zip(local, keys, strict=True))
        w_gradient = sum(
            np.outer((v.T @ row) * (1 - np.tanh(w @ key) ** 2) / np.sqrt(size), key) for row, key in zip(local, keys, strict=True)
        )
        hidden_energy = np.mean([features(key) @ features(key) for key in keys])
        output_energy = np.sum(v**2) / size
        w = w0 + decay * (w - w0) - rate / (1 + rate * output_energy) * w_gradient
        v = decay * v - rate / (1 + rate * hidden_energy) * v_gradient
        trace = decay * trace - rate * error
        yield np.stack([v @ features(key) for key in keys]) * scale + linear * trace


@pytest.mark.parametrize(
    ('objective', 'linear', 'hidden_size'),
    [
        ('dot', True, 8),
        ('l2', False, 3),
        *(slow(*options) for options in (('l2', True, 2), ('dot', False, 8), ('huber', True, 8))),
    ],
)
def test_against_numpy(x64, objective, linear, hidden_size):
    every = (objective, linear) == ('dot', True)
    gradients = make_gradients(shapes=SHAPES if every else {'w': SHAPES['w']})
    loss = (lambda prediction, gradient: jnp.sum(jnp.log(jnp.cosh(prediction - gradient)))) if objective == 'huber' else objective
    optimizer = scale_by_deep_momentum(hidden_size, 0.8, 0.3, loss, linear=linear, seed=3)
    start = optimizer.init(jax.tree.map(lambda leaf: leaf[0], gradients)).memory
    updates, _ = run(optimizer, gradients)
    for name, leaf in gradients.items():
        matrices = np.asarray(leaf).reshape(10, -1, *((1, 3) if name == 'vector' else leaf.shape[-2:]))
        actual = np.asarray(updates[name]).reshape(matrices.shape)
        firsts = np.asarray(start[name].first).reshape(matrices.shape[1], 3, -1)
        assert firsts.shape[-1] == min(hidden_size, max(matrices.shape[-2] // 2, 1))
        for index, first in enumerate(firsts):
            expected = np.stack(list(numpy_reference(matrices[:, index], first, 0.8, 0.3, objective, linear)))
            np.testing.assert_allclose(actual[:, index], expected, rtol=1e-9, atol=1e-11, err_msg=name)


def test_linear_memory_is_heavy_ball_to_the_bit():
    """Identity 5."""
    gradients = make_gradients(5, dtype=jnp.float32)
    optimizer, reference = scale_by_deep_momentum(0, 0.9), optax.trace(0.9)
    params = jax.tree.map(lambda leaf: leaf[0], gradients)
    state, expected_state = optimizer.init(params), reference.init(params)
    for step in range(5):
        gradient = jax.tree.map(lambda leaf, step=step: leaf[step], gradients)
        updates, state = optimizer.update(gradient, state)
        expected, expected_state = reference.update(gradient, expected_state)
        jax.tree.map(np.testing.assert_array_equal, updates, expected)


def test_linear_memory_with_the_l2_objective_is_a_moving_average(x64):
    gradients = make_gradients()
    updates, _ = run(scale_by_deep_momentum(0, 1.0, 0.1, 'l2'), gradients)
    expected, _ = run(optax.ema(0.9, debias=False), gradients)
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-10, atol=1e-13), updates, expected)


def test_linear_memory_under_newton_schulz_is_muon(x64):
    """Identity 5, against optax's Muon without Nesterov: its average and our sum differ by a factor, which the iteration removes."""
    gradients = {'w': make_gradients(5, {'w': (3, 6)})['w']}
    updates, _ = run(scale_by_deep_momentum(0, 0.95, sigma=newton_schulz), gradients)
    dimensions = {'w': optax.contrib.MuonDimensionNumbers()}
    expected, _ = run(optax.contrib.scale_by_muon(beta=0.95, nesterov=False, weight_dimension_numbers=dimensions), gradients)
    np.testing.assert_allclose(updates['w'], expected['w'], rtol=1e-6, atol=1e-8)


def test_linear_memory_under_orthogonalize_is_our_muon(x64):
    gradients = {'w': make_gradients(10, {'w': (2, 3, 6)})['w']}
    updates, _ = run(scale_by_deep_momentum(0, 0.95, sigma=orthogonalize), gradients)
    expected, _ = run(scale_by_muon(0.95, nesterov=False, bias_correction=False, scaling=None), gradients)
    np.testing.assert_allclose(updates['w'], expected['w'], rtol=1e-9, atol=1e-12)


def test_memory_follows_the_gradient_it_has_seen():
    """With the L2 objective, and nothing but the network, gradients from a line are learned and others are not."""
    draw = np.random.default_rng(1).normal
    direction = np.array([1.0, -1.0, 1.0]) / np.sqrt(3)
    seen = {'w': jnp.asarray(draw(size=(300, 16, 1)) * direction, jnp.float32)}
    optimizer = scale_by_deep_momentum(8, 0.999, 1.0, 'l2', linear=False)
    updates, state = run(optimizer, seen)
    error = lambda update, gradient: float(jnp.linalg.norm(update - gradient) / jnp.linalg.norm(gradient))
    assert error(updates['w'][0], seen['w'][0]) > 0.5
    assert error(updates['w'][-1], seen['w'][-1]) < 0.2
    across = {'w': jnp.asarray(draw(size=(16, 1)) * np.array([1.0, 1.0, 0.0]), jnp.float32)}
    assert error(optimizer.update(across, state)[0]['w'], across['w']) > 0.5


@pytest.mark.parametrize(
    ('objective', 'scale'),
    [('dot', 1e8), ('l2', 1e-8), *(slow(*options) for options in (('dot', 1e-8), ('l2', 1e8)))],
)
def test_bounded_and_equivariant_to_scale(objective, scale):
    optimizer = scale_by_deep_momentum(8, 0.9, objective=objective)
    unit, _ = run(optimizer, make_gradients(300, {'w': (6, 3)}, jnp.float32))
    scaled, state = run(optimizer, make_gradients(300, {'w': (6, 3)}, jnp.float32, scale))
    for name, leaf in unit.items():
        assert float(jnp.abs(leaf).max()) < 100
        np.testing.assert_allclose(scaled[name][:5] / scale, leaf[:5], rtol=1e-3, atol=1e-4)
        assert jnp.isfinite(scaled[name]).all()
    assert max(float(jnp.abs(leaf).max()) for memory in state.memory.values() for leaf in (memory.first, memory.second)) < 100


def test_bounded_when_the_gradient_shrinks():
    """What was written at scale 1 is a large error once the gradients are small."""
    gradients = jax.tree.map(
        lambda leaf: leaf * jnp.where(jnp.arange(200) < 100, 1.0, 1e-12)[:, None, None], {'w': make_gradients(200)['w']}
    )
    updates, state = run(scale_by_deep_momentum(8, 0.9, 0.5, 'l2'), gradients)
    assert float(jnp.abs(updates['w'][-1]).max()) < 1e-3
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(state.memory)) < 100


@pytest.mark.parametrize(
    'options',
    [{}, *(slow(options) for options in ({'objective': 'l2', 'write_rate': 0.1}, {'linear': False}))],
)
def test_trains(options):
    draw = np.random.default_rng(0).normal
    x, target = jnp.asarray(draw(size=(32, 6)), jnp.float32), jnp.asarray(draw(size=(6, 3)), jnp.float32)
    loss = lambda w: jnp.mean((x @ (w - target)) ** 2)
    optimizer = deep_momentum(0.05, 8, **options)

    def step(carry, _):
        w, state = carry
        updates, state = optimizer.update(jax.grad(loss)(w), state, w)
        return (optax.apply_updates(w, updates), state), None

    start = jnp.zeros((6, 3))
    (w, _), _ = jax.jit(lambda w: jax.lax.scan(step, (w, optimizer.init(w)), length=300))(start)
    assert loss(w) < 1e-2 * loss(start)


def test_state_grows_with_the_width_and_not_with_the_parameters_squared():
    count = lambda shape, **options: sum(
        leaf.size
        for leaf in jax.tree.leaves(jax.eval_shape(scale_by_deep_momentum(**options).init, jax.ShapeDtypeStruct(shape, jnp.float32)).memory)
    )
    assert count((4096, 1024), linear=False) == 2 * 1024 * 64
    assert count((4096, 1024)) == 4096 * 1024 + 2 * 1024 * 64
    assert count((24, 4096, 1024), linear=False) == 24 * 2 * 1024 * 64
    assert count((4, 1024), linear=False) == 4 * 1024
    assert count((1024,), linear=False) == 2 * 1024
    assert count((), linear=False) == 2


def test_first_layer_returns_to_its_initial_value():
    optimizer = scale_by_deep_momentum(4, 0.5)
    gradients = {'w': jnp.concatenate([make_gradients(5, dtype=jnp.float32)['w'], jnp.zeros((40, 6, 3))])}
    start = optimizer.init({'w': jnp.zeros((6, 3))}).memory['w']
    end = run(optimizer, gradients)[1].memory['w']
    assert float(jnp.abs(start.first).max()) > 0.1
    np.testing.assert_allclose(end.first, start.first, atol=1e-6)
    np.testing.assert_allclose(end.second, 0, atol=1e-6)


def test_seed_and_alias():
    gradients = make_gradients(3, {'w': (6, 3)}, jnp.float32)
    direction = run(scale_by_deep_momentum(8), gradients)[0]['w']
    schedule = lambda count: 0.1 / (1 + count)
    params = {'w': jnp.ones((6, 3))}
    for decayed in (True, False):
        optimizer = deep_momentum(schedule, 8, weight_decay=0.5, weight_decay_mask={'w': decayed})
        expected = -(direction + 0.5 * decayed) * (0.1 / (1 + np.arange(3)))[:, None, None]
        np.testing.assert_allclose(run(optimizer, gradients, params)[0]['w'], expected, rtol=1e-5, atol=1e-6)
    assert float(jnp.abs(run(scale_by_deep_momentum(8, seed=1), gradients)[0]['w'] - direction).max()) > 1e-4


@pytest.mark.parametrize(('dtype', 'mu_dtype'), [(jnp.bfloat16, None), (jnp.float32, jnp.bfloat16)])
def test_dtypes(dtype, mu_dtype):
    params = {'w': jnp.ones((4, 2), dtype), 'b': jnp.ones(2, dtype)}
    optimizer = deep_momentum(0.1, 4, mu_dtype=mu_dtype)
    state = optimizer.init(params)
    updates, after = jax.jit(optimizer.update)(params, state, params)
    assert jax.tree.map(jax.typeof, after) == jax.tree.map(jax.typeof, state)
    assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype(dtype)}
    assert {leaf.dtype for leaf in jax.tree.leaves(optax.tree.get(state, 'memory'))} == {jnp.dtype(mu_dtype or jnp.float32)}
    still = jax.tree.map(jnp.zeros_like, params)
    rest, after = jax.jit(optimizer.update)(still, state, params)
    assert all(float(jnp.abs(leaf).max()) == 0 for leaf in jax.tree.leaves(rest))
    first = [optax.tree.get(tree, 'memory')['w'].first for tree in (state, after)]
    np.testing.assert_array_equal(*[leaf.astype(jnp.float32) for leaf in first])  # the initial value is where decay leads


@pytest.mark.parametrize('axis_type', [jax.sharding.AxisType.Explicit, slow(jax.sharding.AxisType.Auto)])
def test_sharded_matrices(axis_type):
    mesh = jax.make_mesh((2, 2), ('data', 'model'), axis_types=(axis_type,) * 2)
    sharding = jax.sharding.NamedSharding(mesh, jax.P('data', 'model'))
    params = {'w': jnp.asarray(np.random.default_rng(0).normal(size=(4, 6)), jnp.float32)}
    optimizer = deep_momentum(0.1, 4)
    expected, _ = optimizer.update(params, optimizer.init(params), params)
    with jax.set_mesh(mesh):
        params = jax.device_put(params, sharding)
        state = jax.jit(optimizer.init)(params)
        updates, after = jax.jit(optimizer.update)(params, state, params)
        outside = optimizer.init(params)
    np.testing.assert_allclose(updates['w'], expected['w'], rtol=1e-4, atol=1e-6)
    if axis_type == jax.sharding.AxisType.Explicit:
        assert jax.tree.map(jax.typeof, after) == jax.tree.map(jax.typeof, state) == jax.tree.map(jax.typeof, outside)
        memory = optax.tree.get(state, 'memory')['w']
        specs = DeepMemory(*(jax.typeof(leaf).sharding.spec for leaf in memory))
        assert specs == (jax.P('data', 'model'), jax.P('model', None), jax.P(None, 'model'))


@pytest.mark.parametrize(
    ('make', 'message'),
    [
        (lambda: deep_momentum(0.1, -1), 'hidden_size is -1, allowed is an integer of at least 0'),
        (lambda: deep_momentum(0.1, 0, linear=False), 'hidden_size is 0, allowed is an integer of at least 1'),
        (lambda: deep_momentum(0.1, 2.5), 'hidden_size is 2.5'),
        (lambda: deep_momentum(0.1, decay=2), 'decay is 2, allowed is a number from 0 to 1'),
        (lambda: deep_momentum(0.1, write_rate=-1), 'write_rate is -1, allowed is a number of at least 0'),
        (lambda: deep_momentum(0.1, objective='mse'), "objective is 'mse', allowed is one of 'dot', 'l2'"),
        (lambda: deep_momentum(0.1).init({'w': jnp.zeros(2, jnp.complex64)}), 'parameter w has dtype complex64'),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
