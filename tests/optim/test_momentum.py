"""Momentum as a memory: ten steps against numpy in the paper's layout, exact special cases, stability, optax's machinery."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nested_jax.optim.momentum import (
    delta_momentum,
    feature_momentum,
    preconditioned_momentum,
    scale_by_delta_momentum,
    scale_by_feature_momentum,
    scale_by_learned_preconditioner,
    scale_by_preconditioned_momentum,
)

FORMS = ('printed', 'normalised', 'proximal')
SHAPES = {'tall': (5, 3), 'stacked': (2, 2, 3), 'vector': (3,)}
OPTIMIZERS = {
    **{form: functools.partial(delta_momentum, form=form) for form in FORMS},
    'preconditioned': preconditioned_momentum,
    'feature': feature_momentum,
}
COMPLEX = 'parameter w has dtype complex64, allowed are real floating-point dtypes: see optax.contrib.split_real_and_imaginary'


def make_gradients(steps=10, shapes=SHAPES, scale=1.0):
    draw = np.random.default_rng(0).normal
    return {name: jnp.asarray(scale * draw(size=(steps, *shape))) for name, shape in shapes.items()}


def run(optimizer, gradients, params=None):
    """The updates of every step, stacked."""
    params = params or jax.tree.map(lambda leaf: jnp.zeros_like(leaf[0]), gradients)
    step = lambda state, gradient: optimizer.update(gradient, state, params)[::-1]
    return jax.jit(lambda gradients: jax.lax.scan(step, optimizer.init(params), gradients)[1])(gradients)


def in_paper_layout(leaf):
    """Batches of (out, in)."""
    leaf = np.asarray(leaf, np.float64)
    return np.swapaxes(leaf.reshape(-1, *((1,) * (2 - leaf.ndim)), *leaf.shape)[0] if leaf.ndim < 2 else leaf, -1, -2)


def paper_delta(gradients, rate, decay, form, matrix=None):
    """m holds the negative step without the learning rate: m(alpha I - eta g'g) - P g, in (out, in)."""
    m = np.zeros_like(in_paper_layout(gradients[0]))
    for gradient in gradients:
        g = in_paper_layout(gradient)
        transposed = np.swapaxes(g, -1, -2)
        identity = np.eye(g.shape[-1])
        pg = g if matrix is None else np.asarray(matrix) @ g
        if form == 'printed':
            m = m @ (decay * identity - rate * transposed @ g) - pg
        elif form == 'normalised':
            m = m @ (decay * identity - rate * transposed @ g / np.trace(transposed @ g, axis1=-2, axis2=-1)[..., None, None]) - pg
        else:
            m = (decay * m - pg) @ np.linalg.inv(identity + rate * transposed @ g)
        yield np.swapaxes(-m, -1, -2).reshape(gradient.shape)


@pytest.mark.parametrize('form', FORMS)
def test_delta_momentum_against_numpy(x64, form):
    gradients = make_gradients()
    updates = run(scale_by_delta_momentum(0.05, 0.8, form=form), gradients)
    for name, leaf in gradients.items():
        expected = np.stack(list(paper_delta(np.asarray(leaf), 0.05, 0.8, form)))
        np.testing.assert_allclose(updates[name], expected, rtol=1e-11, atol=1e-12, err_msg=name)


@pytest.mark.parametrize('form', FORMS)
def test_delta_momentum_with_a_preconditioner_against_numpy(x64, form):
    gradients = make_gradients(shapes={'a': (4, 3), 'b': (2, 5, 3)})
    matrix = jnp.asarray(np.random.default_rng(1).normal(size=(3, 3)))
    updates = run(scale_by_delta_momentum(0.05, 0.8, {'a': matrix, 'b': None}, form=form), gradients)
    for name, chosen in (('a', matrix), ('b', None)):
        expected = np.stack(list(paper_delta(np.asarray(gradients[name]), 0.05, 0.8, form, chosen)))
        np.testing.assert_allclose(updates[name], expected, rtol=1e-11, atol=1e-12)


def test_printed_form_is_the_gradient_step_of_its_objective(x64):
    """Identity 4: with m = -eta * trace, the gradient of 1/2 |m g' + P|^2, with decay."""
    g, matrix, trace = (jnp.asarray(leaf) for leaf in np.random.default_rng(2).normal(size=(3, 4, 4)))
    optimizer, eta, decay = scale_by_delta_momentum(0.3, 0.9, matrix), 0.3, 0.9
    state = optimizer.init(trace)._replace(trace=trace)
    objective = lambda m: 0.5 * jnp.sum((m @ g.T + matrix) ** 2)  # in (out, in); G is its transpose
    m = -eta * trace.T
    expected = decay * m - eta * jax.grad(objective)(m)
    np.testing.assert_allclose(-eta * optimizer.update(g.T, state)[0], expected.T, rtol=1e-12)


def test_proximal_form_is_the_minimum_of_its_objective(x64):
    g, matrix, trace = (jnp.asarray(leaf) for leaf in np.random.default_rng(2).normal(size=(3, 4, 4)))
    eta, decay = 0.3, 0.9
    optimizer = scale_by_delta_momentum(eta, decay, matrix, form='proximal')
    state = optimizer.init(trace)._replace(trace=trace)
    m = -eta * optimizer.update(g.T, state)[0].T
    objective = lambda m: 0.5 * jnp.sum((m @ g.T + matrix) ** 2) + jnp.sum((m + decay * eta * trace.T) ** 2) / (2 * eta)
    np.testing.assert_allclose(jax.grad(objective)(m), 0, atol=1e-12)


def test_proximal_rate_on_a_gradient_of_rank_one(x64):
    gradient = jnp.outer(jnp.arange(1.0, 5), jnp.arange(1.0, 4))
    trace = jnp.asarray(np.random.default_rng(3).normal(size=(4, 3)))
    optimizer = scale_by_delta_momentum(0.2, 1.0, form='proximal')
    state = optimizer.init(trace)._replace(trace=trace)
    rate = 0.2 / (1 + 0.2 * jnp.sum(gradient**2))
    expected = trace - rate * gradient @ gradient.T @ trace + rate / 0.2 * gradient
    np.testing.assert_allclose(optimizer.update(gradient, state)[0], expected, rtol=1e-11)


HEAVY_BALL = {
    **{form: scale_by_delta_momentum(0.0, 0.9, form=form) for form in FORMS},
    'preconditioned': scale_by_preconditioned_momentum(None, 0.9),
    'function': scale_by_preconditioned_momentum(lambda gradient: gradient, 0.9),
    'feature': scale_by_feature_momentum(lambda gradient: gradient, 0.9),
}


@pytest.mark.parametrize('name', HEAVY_BALL)
def test_heavy_ball_to_the_bit(name):
    """Identities 3 and 4: no erasure, P the identity, phi the identity."""
    gradients = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), make_gradients())
    optimizer, reference, params = HEAVY_BALL[name], optax.trace(0.9), jax.tree.map(lambda leaf: leaf[0], gradients)
    state, expected_state = optimizer.init(params), reference.init(params)
    for step in range(5):
        gradient = jax.tree.map(lambda leaf, step=step: leaf[step], gradients)
        updates, state = optimizer.update(gradient, state)
        expected, expected_state = reference.update(gradient, expected_state)
        jax.tree.map(np.testing.assert_array_equal, updates, expected)


@pytest.mark.parametrize(('form', 'rate'), [('normalised', 1.9), ('proximal', 1e-3), ('proximal', 1.0), ('proximal', 1e6)])
def test_bounded_on_large_gradients(form, rate):
    """Bounded by what is written over 1 - decay; the normalised form needs rate <= 1 + decay."""
    gradients = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), make_gradients(100, scale=1e3))
    updates = run(scale_by_delta_momentum(rate, 0.9, form=form), gradients)
    for name, leaf in updates.items():
        largest = float(jnp.max(jnp.linalg.norm(leaf.reshape(100, -1), axis=1)))
        # Each singular value s of the gradient is written as s / (1 + rate s^2), at most 1 / (2 sqrt(rate)).
        singular_values = {'tall': 3, 'stacked': 2 * 2, 'vector': 1}[name]
        written = jnp.linalg.norm(gradients[name].reshape(100, -1), axis=1).max() if form == 'normalised' else 0
        bound = 10 * (written if form == 'normalised' else np.sqrt(singular_values) / (2 * np.sqrt(rate)))
        assert largest <= bound * 1.001


def test_normalised_form_does_not_diverge_by_a_schedule():
    """A constant rate above 1 + decay is refused."""
    gradients = jax.tree.map(lambda leaf: jnp.repeat(leaf[:1], 50, 0), make_gradients(1))  # always the same
    too_fast, limit = (scale_by_delta_momentum(rate, 0.9, form='normalised') for rate in (optax.constant_schedule(3.0), 1.9))
    jax.tree.map(np.testing.assert_array_equal, run(too_fast, gradients), run(limit, gradients))


@pytest.mark.parametrize('scale', [1e-25, 1e13, 1e25])
def test_normalised_form_does_not_depend_on_the_scale(scale):
    """Where squares of float32 vanish or overflow, too."""
    gradients = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), make_gradients(5))
    optimizer = scale_by_delta_momentum(1.0, form='normalised')
    expected, scaled = run(optimizer, gradients), run(optimizer, jax.tree.map(lambda leaf: scale * leaf, gradients))
    jax.tree.map(lambda s, e: np.testing.assert_allclose(s / scale, e, rtol=1e-4, atol=1e-5), scaled, expected)


def test_printed_form_is_stable_up_to_its_condition_and_not_beyond():
    gradient = {'w': jnp.ones((200, 2, 2))}  # squared spectral norm 4
    norm = lambda rate: float(jnp.abs(run(scale_by_delta_momentum(rate, 0.9), gradient)['w'][-1]).max())
    assert norm(1.85 / 4) < 20
    assert norm(1.95 / 4) > 20
    large = {'w': 1e3 * jnp.ones((60, 2, 2))}
    assert not np.isfinite(run(scale_by_delta_momentum(1e-3, 0.9), large)['w'][-1]).all()


def test_learned_preconditioner_against_numpy(x64):
    gradients = make_gradients()
    updates = run(scale_by_learned_preconditioner(0.3, 0.8), gradients)
    for name, leaf in gradients.items():
        p = np.eye(in_paper_layout(leaf[0]).shape[-2])
        for step, gradient in enumerate(leaf):
            g = in_paper_layout(gradient)
            target = np.sign(g) * np.sqrt((g**2).mean((-2, -1), keepdims=True))
            error = (p @ g - target) @ np.swapaxes(g, -1, -2) / (g**2).sum((-2, -1), keepdims=True)
            p = np.eye(p.shape[-1]) + 0.8 * (p - np.eye(p.shape[-1])) - 0.3 * error
            np.testing.assert_allclose(updates[name][step], np.swapaxes(p @ g, -1, -2).reshape(gradient.shape), rtol=1e-10, atol=1e-12)


def test_learned_preconditioner_stays_near_the_identity():
    """Within 2 rate / (1 - decay), though gradients vanish in some directions for a long time and then return."""
    draw, length = np.random.default_rng(0).normal, 400
    sizes = np.where(np.arange(length)[:, None, None] < 300, np.array([1.0, 1e-6, 1e-12]), 1.0)
    gradients = {'w': jnp.asarray(draw(size=(length, 5, 3)) * sizes * 1e3, jnp.float32)}
    updates = run(scale_by_learned_preconditioner(0.1, 0.9), gradients)['w']
    ratio = jnp.linalg.norm(updates, axis=(1, 2)) / jnp.linalg.norm(gradients['w'], axis=(1, 2))
    assert float(ratio.max()) <= 1 + 2 * 0.1 / (1 - 0.9)


def test_preconditioned_momentum_against_numpy(x64):
    gradients = make_gradients(shapes={'tall': (5, 3), 'vector': (3,)})
    learned = run(scale_by_learned_preconditioner(0.3), gradients)
    updates = run(scale_by_preconditioned_momentum(scale_by_learned_preconditioner(0.3), 0.7), gradients)
    scaled = run(scale_by_preconditioned_momentum(lambda gradient: 2 * gradient, 0.7), gradients)
    for name in gradients:
        weights = np.tril(0.7 ** (np.arange(10)[:, None] - np.arange(10)[None, :]).clip(0))
        np.testing.assert_allclose(updates[name], np.tensordot(weights, learned[name], 1), rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(scaled[name], np.tensordot(weights, 2 * np.asarray(gradients[name]), 1), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize('kind', ['array', 'function', 'learned'])
@pytest.mark.parametrize('optimizer', ['preconditioned', 'delta', 'feature'])
def test_every_preconditioner_in_every_momentum_against_numpy(x64, optimizer, kind):
    """Ten steps. Learned ones are transformations, which stand in front of the delta rule."""
    gradients, matrix = np.asarray(make_gradients(shapes={'w': (4, 3)})['w']), np.random.default_rng(1).normal(size=(3, 3))
    seen = np.sign(gradients) * np.sqrt(np.abs(gradients)) if optimizer == 'feature' else gradients
    learner = scale_by_learned_preconditioner(0.3, 0.8)
    learned = np.asarray(run(learner, {'w': jnp.asarray(seen)})['w'])
    written = {'array': seen @ matrix.T, 'function': np.tanh(seen), 'learned': learned}[kind]
    preconditioner = {'array': {'w': jnp.asarray(matrix)}, 'function': jnp.tanh, 'learned': learner}[kind]
    make = {
        'preconditioned': lambda p: scale_by_preconditioned_momentum(p, 0.7),
        'delta': lambda p: (
            optax.chain(p, scale_by_delta_momentum(0.05, 0.7)) if kind == 'learned' else scale_by_delta_momentum(0.05, 0.7, p)
        ),
        'feature': lambda p: scale_by_feature_momentum(0.5, 0.7, p),
    }[optimizer]
    updates = run(make(preconditioner), {'w': jnp.asarray(gradients)})['w']
    m = np.zeros((4, 3))
    for step in range(10):
        key = {'delta': learned[step] if kind == 'learned' else seen[step]}.get(optimizer, np.zeros((4, 3)))
        m = 0.7 * m - 0.05 * key @ key.T @ m + written[step]
        np.testing.assert_allclose(updates[step], m, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize('form', FORMS)
def test_ten_steps_of_the_delta_optimizer_in_numpy(x64, form):
    """With schedules of both rates, decay and a mask: the masked leaf gets heavy ball."""
    gradients = make_gradients(shapes={'w': (5, 3), 'v': (2, 3)})
    params = {'w': jnp.full((5, 3), 2.0), 'v': jnp.full((2, 3), 3.0)}
    rate, erase = lambda count: 0.1 / (1 + count), lambda count: 0.02 * (count + 1)
    optimizer = delta_momentum(rate, 0.8, erase, weight_decay=0.3, form=form, mask={'w': True, 'v': False})
    updates = run(optimizer, gradients, params)
    m, heavy = np.zeros((3, 5)), np.zeros((2, 3))
    for step in range(10):
        g, eta = np.asarray(gradients['w'][step]).T, erase(step)
        size = np.trace(g.T @ g) if form == 'normalised' else 1.0
        kept = {'proximal': 0.8 * m - g}.get(form, m @ (0.8 * np.eye(5) - eta * g.T @ g / size) - g)
        m = kept @ np.linalg.inv(np.eye(5) + eta * g.T @ g) if form == 'proximal' else kept
        heavy = 0.8 * heavy + np.asarray(gradients['v'][step])
        np.testing.assert_allclose(updates['w'][step], rate(step) * (m.T - 0.3 * 2.0), rtol=1e-10, atol=1e-13)
        np.testing.assert_allclose(updates['v'][step], -rate(step) * (heavy + 0.3 * 3.0), rtol=1e-11)


@pytest.mark.parametrize('feature', [0.0, 0.5, 1.0, 'cube'])
def test_feature_momentum_against_numpy(x64, feature):
    gradients = make_gradients()
    phi = (lambda g: g**3) if feature == 'cube' else (lambda g: np.sign(g) * np.abs(g) ** feature)
    matrix = jnp.diag(jnp.array([1.0, 2.0, 3.0]))
    preconditioner = {'tall': matrix, 'stacked': None, 'vector': matrix}
    optimizer = scale_by_feature_momentum(phi if feature == 'cube' else feature, 0.7, preconditioner)
    updates = run(optimizer, gradients)
    for name, leaf in gradients.items():
        m = 0.0
        for step, gradient in enumerate(np.asarray(leaf)):
            written = phi(gradient) * (np.array([1.0, 2.0, 3.0]) if preconditioner[name] is not None else 1.0)
            m = 0.7 * m + written
            np.testing.assert_allclose(updates[name][step], m, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_aliases_scale_decay_and_follow_schedules(x64, name):
    gradients = make_gradients(3, {'w': (3, 2), 'v': (3, 2)})
    params = {'w': jnp.ones((3, 2)), 'v': jnp.ones((3, 2))}
    make = functools.partial(OPTIMIZERS[name], **({'erase_rate': 0.1} if name in FORMS else {}))
    constant = run(make(0.1), gradients, params)
    varied = run(make(lambda count: 0.1 / (1 + count), weight_decay=0.5, weight_decay_mask={'w': True, 'v': False}), gradients, params)
    for leaf in params:
        expected = (constant[leaf] - 0.1 * 0.5 * (leaf == 'w')) / (1 + np.arange(3))[:, None, None]
        np.testing.assert_allclose(varied[leaf], expected, rtol=1e-12)


def test_erase_rate_follows_the_learning_rate_and_its_schedule(x64):
    gradients = make_gradients(4, {'w': (3, 2)})
    np.testing.assert_array_equal(run(delta_momentum(0.1), gradients)['w'], run(delta_momentum(0.1, erase_rate=0.1), gradients)['w'])
    scheduled = run(scale_by_delta_momentum(lambda count: 0.1 * (count == 1)), gradients)['w']
    w = np.asarray(gradients['w'])
    second = 0.9 * w[0] - 0.1 * w[1] @ w[1].T @ w[0] + w[1]
    np.testing.assert_allclose(scheduled[:3], [w[0], second, 0.9 * second + w[2]], rtol=1e-12)


def test_mask_leaves_the_others_to_heavy_ball(x64):
    gradients = make_gradients(5)
    mask = lambda params: jax.tree.map(lambda leaf: leaf.ndim == 2, params)
    masked, delta, plain = (
        run(optimizer, gradients) for optimizer in (delta_momentum(0.1, mask=mask), delta_momentum(0.1), optax.sgd(0.1, 0.9))
    )
    for name in gradients:
        np.testing.assert_allclose(masked[name], (delta if len(SHAPES[name]) == 2 else plain)[name], rtol=1e-12)
    tree = jax.tree.map(lambda leaf: leaf.ndim == 3, gradients)
    jax.tree.map(np.testing.assert_array_equal, run(delta_momentum(0.1, mask=tree), gradients), masked)


@pytest.mark.parametrize('axis_type', [jax.sharding.AxisType.Explicit, jax.sharding.AxisType.Auto])
def test_proximal_form_on_sharded_matrices(axis_type):
    mesh = jax.make_mesh((2, 2), ('data', 'model'), axis_types=(axis_type,) * 2)
    sharding = jax.sharding.NamedSharding(mesh, jax.P('data', 'model'))
    params = {'w': jnp.asarray(np.random.default_rng(0).normal(size=(4, 6)), jnp.float32)}
    told = None if axis_type == jax.sharding.AxisType.Explicit else {'w': sharding}
    optimizer = delta_momentum(0.1, erase_rate=optax.linear_schedule(0.1, 0.0, 10), form='proximal', shardings=told)
    expected, _ = optimizer.update(params, optimizer.init(params), params)
    with jax.set_mesh(mesh):
        params = jax.device_put(params, sharding)
        state = jax.jit(optimizer.init)(params)
        updates, after = jax.jit(optimizer.update)(params, state, params)
    np.testing.assert_allclose(updates['w'], expected['w'], rtol=1e-4, atol=1e-6)
    if axis_type == jax.sharding.AxisType.Explicit:
        assert updates['w'].sharding.is_equivalent_to(sharding, 2)
        assert jax.tree.map(jax.typeof, after) == jax.tree.map(jax.typeof, state)


@pytest.mark.parametrize(
    ('make', 'message'),
    [
        (lambda: delta_momentum(0.1, 1.5), 'decay is 1.5, allowed is a number from 0 to 1'),
        (lambda: delta_momentum(-0.1), 'erase_rate is -0.1, allowed is a number of at least 0'),
        (lambda: delta_momentum(0.1, erase_rate=2.0, form='normalised'), 'erase_rate is 2.0, allowed is a number from 0 to 1.9'),
        (lambda: delta_momentum(0.1, form='exact'), "form is 'exact', allowed is one of 'printed', 'normalised', 'proximal'"),
        (lambda: preconditioned_momentum(0.1, -1), 'decay is -1'),
        (lambda: scale_by_learned_preconditioner(2.1), 'rate is 2.1, allowed is a number from 0 to 2'),
        (lambda: scale_by_learned_preconditioner(decay=-1), 'decay is -1'),
        (lambda: feature_momentum(0.1, 2.0), 'feature is 2.0, allowed is a number from 0 to 1'),
        (lambda: feature_momentum(0.1, lambda g: g[:1]).init(jnp.zeros(3)), 'feature maps shape'),
        (lambda: delta_momentum(0.1, preconditioner=jnp.eye(3)).init(jnp.zeros((3, 2))), r'preconditioner has shape \(3, 3\)'),
        *[(lambda make=make: make(0.1).init({'w': jnp.zeros(2, jnp.complex64)}), COMPLEX) for make in OPTIMIZERS.values()],
        (lambda: preconditioned_momentum(0.1, preconditioner=jnp.eye(2)).init({'w': jnp.zeros(2, jnp.complex64)}), COMPLEX),
        (lambda: feature_momentum(0.1, jnp.tanh).init({'w': jnp.zeros(2, jnp.complex64)}), COMPLEX),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
