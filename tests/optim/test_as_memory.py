"""Adam and AdaGrad as memories: the closed form is the minimum of its objective, and equal to optax's step by step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nested_jax.optim.as_memory import (
    adagrad_as_memory,
    adam_as_memory,
    memory_loss,
    optimal_memory,
    scale_by_adagrad_as_memory,
    scale_by_adam_as_memory,
)

slow = functools.partial(pytest.param, marks=pytest.mark.slow)
SHAPES = {'w': (3, 2), 'b': (2,), 'scalar': ()}
STEPS = 10


def make_gradients(scale=1.0):
    draw = np.random.default_rng(0).normal
    return {name: jnp.asarray(scale * draw(size=(STEPS, *shape))) for name, shape in SHAPES.items()}


def run(optimizer, gradients):
    """The updates of every step from parameters of ones."""
    params = jax.tree.map(lambda leaf: jnp.ones_like(leaf[0]), gradients)
    step = lambda state, gradient: optimizer.update(gradient, state, params)[::-1]
    return jax.jit(lambda gradients: jax.lax.scan(step, optimizer.init(params), gradients)[1])(gradients)


def assert_close(actual, expected, rtol=1e-12, atol=1e-14):
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol=rtol, atol=atol), actual, expected)


def average_weights(decay, count):
    """Of the first `count` gradients in their exponential average with bias correction."""
    weights = decay ** np.arange(count - 1, -1, -1.0)
    return weights / weights.sum()


def numpy_minimum(gradients, target, penalty, first_weights, second_weights):
    """Elementwise Newton step of the objective from 0, from central differences of it: exact for a quadratic."""
    loss = lambda memory: np.array(memory_loss(jnp.asarray(memory), gradients, target, penalty, first_weights, second_weights))
    result, flat = np.zeros(target.shape), target.size
    for index in range(flat):
        unit = np.zeros(flat)
        unit[index] = 1.0
        unit = unit.reshape(target.shape)
        high, middle, low = loss(unit), loss(0 * unit), loss(-unit)
        result += unit * -(high - low) / 2 / (high - 2 * middle + low)
    return result


@pytest.mark.parametrize(('b1', 'b2'), [(1.0, 1.0), (0.9, 0.99)])
def test_closed_form_is_the_minimum(x64, b1, b2):
    """Identity 7."""
    gradients = make_gradients()['w']
    first, second = (jnp.asarray(average_weights(decay, STEPS)) for decay in (b1, b2))
    moments = jnp.tensordot(first, gradients, 1), jnp.tensordot(second, gradients**2, 1)
    for target in (jnp.sqrt(moments[1]), moments[1], jnp.full((3, 2), 0.7)):
        memory = optimal_memory(*moments, target, 0.3)
        np.testing.assert_allclose(memory, numpy_minimum(gradients, target, 0.3, first, second), rtol=1e-9, atol=1e-12)
        slope = jax.grad(memory_loss)(memory, gradients, target, 0.3, first, second)
        np.testing.assert_allclose(slope, 0, atol=1e-13)


def test_objective_is_the_printed_one_for_equal_weights(x64):
    gradients, memory, target = make_gradients()['w'], jnp.full((3, 2), 0.4), jnp.full((3, 2), 0.7)
    printed = sum(np.sum((np.asarray(memory) * g - 0.7) ** 2) for g in np.asarray(gradients)) + 0.3 * np.sum(np.asarray(memory) ** 2)
    np.testing.assert_allclose(memory_loss(memory, gradients, target, 0.3, jnp.ones(STEPS), jnp.ones(STEPS)), printed, rtol=1e-12)


@pytest.mark.parametrize(
    'options',
    [
        {},
        {'b2': 0.9, 'eps': 0.1, 'eps_root': 0.01},
        *(slow(options) for options in ({'b1': 0.0}, {'eps': 0.0})),
    ],
)
def test_equals_optax_adam(x64, options):
    gradients = make_gradients()
    assert_close(run(scale_by_adam_as_memory(**options), gradients), run(optax.scale_by_adam(**options), gradients))
    alias = run(adam_as_memory(0.1, weight_decay=0.2, **options), gradients)
    assert_close(alias, run(optax.adamw(0.1, weight_decay=0.2, **options), gradients))


@pytest.mark.parametrize('target', ['root', 'square'])
def test_ten_steps_of_adam_against_numpy(x64, target):
    """With weight decay on one leaf of three."""
    gradients, mask = make_gradients(), {'w': True, 'b': False, 'scalar': False}
    optimizer = adam_as_memory(0.1, 0.8, 0.9, 0.01, 0.02, 0.3, mask, target=target)
    updates = run(optimizer, gradients)
    for name, gradient in gradients.items():
        first = second = 0.0
        for step, each in enumerate(np.asarray(gradient), 1):
            first, second = 0.8 * first + 0.2 * each, 0.9 * second + 0.1 * each**2
            mean, square = first / (1 - 0.8**step), second / (1 - 0.9**step) + 0.02
            wanted = np.sqrt(square) if target == 'root' else square
            # Eq. (102): P M / (H + the penalty), which for the root is M / (sqrt(H + eps_root) + eps).
            direction = wanted * mean / (square + 0.01 * np.sqrt(square))
            np.testing.assert_allclose(updates[name][step - 1], -0.1 * (direction + 0.3 * mask[name]), rtol=1e-12, atol=1e-14)


def test_ten_steps_of_adagrad_against_numpy_with_weight_decay_on_one_leaf(x64):
    gradients, mask = make_gradients(), {'w': True, 'b': False, 'scalar': False}
    updates = run(adagrad_as_memory(0.1, 0.2, 0.05, 0.3, mask), gradients)
    for name, gradient in gradients.items():
        total = 0.2
        for step, each in enumerate(np.asarray(gradient)):
            total = total + each**2
            expected = -0.1 * (each / np.sqrt(total + 0.05) + 0.3 * mask[name])
            np.testing.assert_allclose(updates[name][step], expected, rtol=1e-12, atol=1e-14)


def test_each_step_of_adam_is_the_minimum_of_its_objective(x64):
    gradients, eps, eps_root = make_gradients()['w'], 0.1, 0.02
    updates = run(scale_by_adam_as_memory(0.9, 0.99, eps, eps_root), {'w': gradients})['w']
    for count in range(1, STEPS + 1):
        first, second = average_weights(0.9, count), average_weights(0.99, count)
        target = jnp.sqrt(jnp.tensordot(second, gradients[:count] ** 2, 1) + eps_root)
        expected = numpy_minimum(gradients[:count], target, eps_root + eps * target, first, second)
        np.testing.assert_allclose(updates[count - 1], expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize('options', [{}, {'initial_accumulator_value': 0.0, 'eps': 0.1}, slow({'eps': 0.0})])
def test_equals_optax_adagrad(x64, options):
    gradients = make_gradients()
    updates = run(scale_by_adagrad_as_memory(**options), gradients)
    assert_close(updates, run(optax.scale_by_rss(**options), gradients))
    assert_close(run(adagrad_as_memory(0.1, **options), gradients), run(optax.adagrad(0.1, **options), gradients))
    total, start = 0.0, options.get('initial_accumulator_value', 0.1)
    for step, gradient in enumerate(np.asarray(gradients['w'])):
        total = total + gradient**2
        expected = gradient / np.sqrt(total + start + options.get('eps', 1e-7))
        np.testing.assert_allclose(updates['w'][step], expected, rtol=1e-12)


def test_the_square_as_target_is_momentum(x64):
    """Eq. (104)."""
    gradients = make_gradients()
    for target in ('square', lambda second: second):
        assert_close(run(scale_by_adam_as_memory(eps=0.0, target=target), gradients), run(optax.ema(0.9), gradients))


@pytest.mark.parametrize('scale', [1e-30, 1e18, *(slow(scale) for scale in (1e-10, 1e10))])
def test_float32_sizes(scale):
    """Where squares underflow the step is zero, as optax's is but for the ratio to epsilon."""
    gradients = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), make_gradients(scale))
    assert_close(run(scale_by_adam_as_memory(), gradients), run(optax.scale_by_adam(), gradients), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize('scale', [1e-15, 1e15])
def test_the_square_as_target_in_float32(scale):
    """Where its product with the momentum has no place in float32."""
    gradients = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), make_gradients(scale))
    expected = run(optax.ema(0.9), gradients)
    assert_close(run(scale_by_adam_as_memory(eps=0.0, target='square'), gradients), expected, rtol=1e-4, atol=1e-6 * scale)


@pytest.mark.parametrize(('ours', 'reference'), [(adam_as_memory, optax.adam), (adagrad_as_memory, optax.adagrad)])
def test_survives_an_overflow_as_optax_does(ours, reference):
    gradients = {'w': jnp.array([[1.0], [3e20], [1.0], [1.0]], jnp.float32)}
    assert_close(run(ours(0.1), gradients), run(reference(0.1), gradients), rtol=1e-6)


OPTIMIZERS = {'adam': adam_as_memory, 'adagrad': adagrad_as_memory}


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_zero_gradients_give_finite_updates_and_meta_gradients(name):
    make = {'adam': adam_as_memory, 'adagrad': functools.partial(adagrad_as_memory, initial_accumulator_value=0.0, eps=0.0)}[name]

    def outer(scale, rate):
        updates = run(make(rate), jax.tree.map(lambda leaf: scale * leaf.astype(jnp.float32), make_gradients()))
        return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(updates))

    assert float(outer(0.0, 0.1)) == 0
    assert all(jnp.isfinite(leaf) for leaf in jax.grad(outer, (0, 1))(0.0, 0.1))


@pytest.mark.parametrize(
    ('make', 'message'),
    [
        (lambda: adam_as_memory(0.1, b1=1.1), 'b1 is 1.1, allowed is a number of at least 0 and below 1'),
        (lambda: adam_as_memory(0.1, b2=1.0), 'b2 is 1.0'),
        (lambda: adam_as_memory(0.1, eps=-1.0), 'eps is -1.0, allowed is a number of at least 0'),
        (lambda: adam_as_memory(0.1, eps_root=-1.0), 'eps_root is -1.0'),
        (lambda: adam_as_memory(0.1, target='cube'), "target is 'cube', allowed is one of 'root', 'square'"),
        (lambda: adagrad_as_memory(0.1, -1.0), 'initial_accumulator_value is -1.0'),
        (lambda: adagrad_as_memory(0.1, eps=-1.0), 'eps is -1.0'),
        *[
            (lambda make=make: make(0.1).init({'w': jnp.zeros(2, jnp.complex64)}), 'parameter w has dtype complex64')
            for make in OPTIMIZERS.values()
        ],
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
