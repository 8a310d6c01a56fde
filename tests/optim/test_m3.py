"""M3 against numpy; Muon and Adam as its special cases (identity 8)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nested_jax.optim import m3, muon, scale_by_m3
from nested_jax.optim.m3 import M3State

STEPS = 10


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def run(optimizer, gradients):
    """(updates of each step, state after each step), compiled and scanned; parameters stay at zero."""
    params = jax.tree.map(lambda leaf: jnp.zeros_like(leaf[0]), gradients)

    def step(state, gradient):
        updates, state = optimizer.update(gradient, state, params)
        return state, (updates, state)

    return jax.jit(lambda gradients: jax.lax.scan(step, optimizer.init(params), gradients)[1])(gradients)


def newton_schulz(x, steps=5, method='quintic'):
    if steps == 0:
        return x
    if method in ('svd', 'polar_express'):  # of which the second has converged to the first after the steps taken here
        u, _, vt = np.linalg.svd(x, full_matrices=False)
        return u @ vt
    x = x / np.sqrt((x**2).sum())
    a, b, c = {'quintic': (3.4445, -4.7750, 2.0315), 'cubic': (1.5, -0.5, 0.0)}[method]
    for _ in range(steps):
        x = a * x + b * (x @ x.T) @ x + c * (x @ x.T) @ (x @ x.T) @ x
    return x


FACTORS = {
    'jordan': lambda u: u * np.sqrt(max(1, u.shape[1] / u.shape[0])),
    'moonshot': lambda u: u * 0.2 * np.sqrt(max(u.shape)),
    'rms': lambda u: 0.2 * u / np.sqrt((u**2).mean()),
    None: lambda u: u,
}


def reference(
    gradients, b1=0.95, b2=0.999, b3=(0.9,), alpha=(0.1,), eps=1e-8, periods=(3,), corrected=True, literal=False, ns_steps=5,
    nesterov=False, scaling=None, method='quintic',
):  # fmt: skip
    """Algorithm 1 in numpy: sums of exactly the previous f gradients, O2 = 0 in block 0."""
    keep = lambda b: 1 if literal else b
    add = lambda b: b if literal else 1 - b
    m1, v = np.zeros_like(gradients[0]), np.zeros_like(gradients[0])
    m2, o2 = [np.zeros_like(m1) for _ in periods], [np.zeros_like(m1) for _ in periods]
    updates = []
    for t, g in enumerate(gradients):
        for s, f in enumerate(periods):
            if t > 0 and t % f == 0:
                m2[s] = keep(b3[s]) * m2[s] + add(b3[s]) * gradients[t - f : t].sum(0)
                o2[s] = newton_schulz(m2[s], ns_steps, method)
        m1, v = keep(b1) * m1 + add(b1) * g, keep(b2 or 0) * v + add(b2 or 0) * g**2
        c1, c2 = (1 - b1 ** (t + 1), 1 - (b2 or 0) ** (t + 1)) if corrected and not literal else (1, 1)
        ahead = b1 * m1 / (1 - b1 ** (t + 2) if corrected else 1) + (1 - b1) * g / c1 if nesterov else m1 / c1
        numerator = newton_schulz(ahead, ns_steps, method) + sum(a * o for a, o in zip(alpha, o2, strict=True))
        updates.append(FACTORS[scaling](numerator / (np.sqrt(v / c2) + eps) if b2 else numerator))
    return np.stack(updates)


@pytest.mark.parametrize('shape', [(3, 5), (5, 3)])
@pytest.mark.parametrize(
    'arguments',
    [
        {},
        {'corrected': False},
        {'literal': True},
        {'b2': None},
        {'periods': (1,), 'b3': (0.5,), 'alpha': (2.0,)},
        {'periods': (2, 5), 'b3': (0.8, 0.5), 'alpha': (0.3, 0.7)},
        {'periods': (2, 5), 'b3': (0.8, 0.5), 'alpha': (0.3, 0.7), 'literal': True},
        {'periods': (), 'b3': (), 'alpha': ()},
        {'ns_steps': 0, 'alpha': (0.5,)},
        {'b1': 0.5, 'b2': 0.9, 'eps': 0.1},
        {'nesterov': True},
        {'nesterov': True, 'corrected': False, 'b2': None},
        {'nesterov': True, 'ns_steps': 0},
        {'scaling': 'jordan', 'b2': None},
        {'scaling': 'moonshot'},
        {'scaling': 'rms'},
        {'scaling': 'rms', 'literal': True},
        {'method': 'svd'},
        {'method': 'cubic'},
        {'method': 'polar_express', 'ns_steps': 14},
    ],
)
def test_ten_steps_in_numpy(x64, arguments, shape):
    gradients = draw(STEPS, *shape)
    arguments = {'periods': (3,), **arguments}
    ours = {('bias_correction' if name == 'corrected' else name): value for name, value in arguments.items()}
    updates, _ = run(scale_by_m3(**ours), jnp.asarray(gradients))
    np.testing.assert_allclose(updates, reference(gradients, **arguments), rtol=1e-9, atol=1e-10)


def adamw(gradients, params, rate, decay, b1=0.9, b2=0.999, eps=1e-8):
    """Updates of AdamW in numpy; parameters stay where they are."""
    m, v, updates = 0.0, 0.0, []
    for t, g in enumerate(gradients):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        direction = m / (1 - b1 ** (t + 1)) / (np.sqrt(v / (1 - b2 ** (t + 1))) + eps)
        updates.append(-rate(t) * (direction + decay * params))
    return np.stack(updates)


@pytest.mark.parametrize('literal', [False, True])
def test_ten_steps_of_the_optimizer_in_numpy(x64, literal):
    """M3 with decay for the matrix, AdamW with rates of its own for the rest, both after schedules; what the mask names does not decay."""
    gradients = {'kernel': draw(STEPS, 3, 5), 'other': draw(STEPS, 5, 3, seed=1), 'bias': draw(STEPS, 5, seed=2)}
    params = {'kernel': draw(3, 5, seed=3), 'other': draw(5, 3, seed=4), 'bias': draw(5, seed=5)}
    rate, adam_rate = lambda count: 0.1 / (1 + count), lambda count: 0.01 * (count + 1)
    optimizer = m3(
        rate, 0.9, 0.99, 0.8, 0.5, 1e-3, 0.2, {'kernel': True, 'other': False, 'bias': True}, periods=(3,), literal=literal,
        adam_learning_rate=adam_rate, adam_b1=0.7, adam_b2=0.95, adam_eps=1e-4, adam_weight_decay=0.3,
    )  # fmt: skip
    step = lambda state, gradient: optimizer.update(gradient, state, params)[::-1]
    updates = jax.jit(lambda gradients: jax.lax.scan(step, optimizer.init(params), gradients)[1])(gradients)
    for name, decay in (('kernel', 0.2), ('other', 0.0)):
        direction = reference(gradients[name], 0.9, 0.99, (0.8,), (0.5,), 1e-3, literal=literal)
        expected = -np.stack([rate(t) * (direction[t] + decay * params[name]) for t in range(STEPS)])
        np.testing.assert_allclose(updates[name], expected, rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(updates['bias'], adamw(gradients['bias'], params['bias'], adam_rate, 0.3, 0.7, 0.95, 1e-4), rtol=1e-11)


def test_without_slow_scale_and_second_moment_it_is_muon():
    gradients = {'w': jnp.asarray(draw(STEPS, 4, 6), jnp.float32), 'b': jnp.asarray(draw(STEPS, 3), jnp.float32)}
    expected, _ = run(muon(0.1, nesterov=False, weight_decay=0.1), gradients)
    for arguments in ({'periods': ()}, {'alpha': 0.0}, {'periods': (STEPS + 1,)}):
        actual, _ = run(m3(0.1, b2=None, scaling='jordan', weight_decay=0.1, **arguments), gradients)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-6, atol=1e-8), actual, expected)


def test_without_slow_scale_and_iterations_it_is_adam(x64):
    gradients = {'w': jnp.asarray(draw(STEPS, 4, 6)), 'b': jnp.asarray(draw(STEPS, 3))}
    actual, _ = run(m3(0.1, 0.9, 0.99, alpha=0.0, eps=1e-6, ns_steps=0, adam_b2=0.99, adam_eps=1e-6), gradients)
    expected, _ = run(optax.adam(0.1, 0.9, 0.99, 1e-6), gradients)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-12), actual, expected)


def test_slow_direction_is_zero_in_the_first_block_and_constant_in_each():
    _, states = run(scale_by_m3(periods=(3, 4)), jnp.asarray(draw(13, 3, 5), jnp.float32))
    for period, slow in zip((3, 4), states.slow, strict=True):
        blocks = np.asarray(slow.direction)
        assert not blocks[:period].any()
        changed = (blocks[1:] != blocks[:-1]).any((1, 2))
        np.testing.assert_array_equal(changed, np.arange(1, 13) % period == 0)


@pytest.mark.parametrize('literal', [False, True])
def test_a_block_of_equal_gradients_is_summed(x64, literal):
    """M2 = beta3 f g as printed, (1 - beta3) f g as a moving average."""
    g = draw(3, 5)
    _, states = run(scale_by_m3(periods=4, b3=0.75, literal=literal), jnp.asarray(np.broadcast_to(g, (4, 3, 5))))
    np.testing.assert_allclose(states.slow[0].mu[-1], (0.75 if literal else 0.25) * 4 * g, rtol=1e-12)


def test_literal_steps_shrink_with_the_root_of_time(x64):
    """Equal gradients: the numerator is constant once orthogonalised, V grows linearly."""
    g = jnp.asarray(np.broadcast_to(draw(3, 5), (16, 3, 5)))
    updates, _ = run(scale_by_m3(periods=(), literal=True, eps=0.0), g)
    expected = updates[:1] / jnp.sqrt(jnp.arange(1.0, 17.0))[:, None, None]
    np.testing.assert_allclose(updates, expected, rtol=1e-9)


def test_slow_iterations_run_once_a_period():
    """They stand under a cond of their own; a step in between runs those of the fast momentum alone."""
    params = jnp.ones((3, 5))
    optimizer = scale_by_m3(periods=(3,))
    jaxpr = jax.make_jaxpr(lambda state: optimizer.update(params, state))(optimizer.init(params)).jaxpr
    inside = lambda jaxpr: sum(equation.primitive.name == 'scan' for equation in jaxpr.eqns)
    (cond,) = [equation for equation in jaxpr.eqns if equation.primitive.name == 'cond']
    assert inside(jaxpr) == 1
    assert sorted(inside(branch.jaxpr) for branch in cond.params['branches']) == [0, 1]


def test_firing_never_recompiles():
    params, optimizer = jnp.ones((3, 5)), m3(0.1, periods=(2, 3))
    step, state = jax.jit(optimizer.update), optimizer.init(params)
    for _ in range(7):
        _, state = step(params, state, params)
    assert step._cache_size() == 1


def test_state_saved_within_a_block_continues_to_the_bit():
    gradients = draw(8, 3, 5).astype(np.float32)
    optimizer = m3(0.1, periods=(3,))
    step = jax.jit(optimizer.update)

    def advance(state, steps):
        for number in steps:
            updates, state = step(gradients[number], state, gradients[0])
        return updates, state

    state = optimizer.init(gradients[0])
    expected = advance(state, range(8))
    restored = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), advance(state, range(4))[1])
    jax.tree.map(np.testing.assert_array_equal, advance(restored, range(4, 8)), expected)


def test_compiled_equals_operation_by_operation():
    optimizer, params = m3(0.1, periods=(2,)), jnp.asarray(draw(3, 5), jnp.float32)
    state = compiled_state = optimizer.init(params)
    for _ in range(3):
        updates, state = optimizer.update(params, state, params)
        compiled, compiled_state = jax.jit(optimizer.update)(params, compiled_state, params)
        np.testing.assert_allclose(updates, compiled, rtol=1e-4, atol=1e-6)


def test_mu_dtype_is_that_of_momentum_and_slow_direction_alone():
    params = {'w': jnp.asarray(draw(3, 5), jnp.bfloat16)}
    optimizer = scale_by_m3(periods=(2,), mu_dtype=jnp.bfloat16)
    _, state = optimizer.update(params, optimizer.init(params), params)
    assert isinstance(state, M3State)
    dtypes = {leaf.dtype.name for leaf in jax.tree.leaves((state.mu, state.slow[0].direction))}
    assert dtypes == {'bfloat16'}
    assert {leaf.dtype.name for leaf in jax.tree.leaves((state.nu, state.slow[0].mu))} == {'float32'}


def test_entries_without_gradient_stay_but_for_the_printed_algorithm():
    """Orthogonalising fills them in."""
    gradients = jnp.asarray(draw(2, 3, 5), jnp.float32).at[:, 1, 2].set(0.0)
    first = lambda literal: run(scale_by_m3(literal=literal), gradients)[0][0]
    assert first(False)[1, 2] == 0.0 and jnp.abs(first(False)).max() < 1e3
    assert jnp.abs(first(True)[1, 2]) > 1e5


def test_small_gradients_of_16_bits_are_averaged_in_float32():
    """0.999 + 0.001 would be lost in bfloat16."""
    gradients = jnp.full((STEPS, 3, 5), 1.0, jnp.bfloat16)
    _, states = run(scale_by_m3(periods=(STEPS,), bias_correction=False), gradients)
    np.testing.assert_allclose(states.nu[-1], 1 - 0.999**STEPS, rtol=1e-5)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ({'b1': 1.0}, 'b1 is 1.0, allowed is a number of at least 0 and below 1'),
        ({'b2': -0.1}, 'b2 is -0.1, allowed is a number of at least 0 and below 1'),
        ({'b3': 1.5}, 'b3 is 1.5, allowed is a number of at least 0 and below 1'),
        ({'alpha': -1.0}, 'alpha is -1.0, allowed is a number of at least 0'),
        ({'eps': -1.0}, 'eps is -1.0, allowed is a number of at least 0'),
        ({'periods': (0,)}, 'periods is 0, allowed is an integer of at least 1'),
        ({'periods': 2.5}, 'periods is 2.5, allowed is an integer of at least 1'),
        ({'periods': (2, 3), 'b3': (0.5,)}, r'b3 is \(0.5,\), allowed is one number, or one for each of the 2 periods'),
        ({'ns_steps': '5'}, "ns_steps is '5', allowed is an integer of at least 0"),
        ({'literal': True, 'nesterov': True}, 'nesterov is True, allowed with literal is False'),
    ],
)
def test_arguments_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        scale_by_m3(**arguments)


def test_without_epsilon_meta_gradients_are_finite_at_zero():
    optimizer = scale_by_m3(eps=0.0, periods=(2,))
    norm = lambda g: jnp.sum(jnp.square(optimizer.update(g, optimizer.init(g))[0]))
    assert jnp.isfinite(jax.grad(norm)(jnp.zeros((2, 3)))).all()
