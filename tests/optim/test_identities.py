"""Identities 1, 2, 3, 7 and 9 of the equations, in float64, where no file of one optimizer has them.

The others stand with what they are about: 4 in `test_momentum.py`, 5 in `test_deep_momentum.py`, 6 in `test_orthogonalize.py`, 8 in
`test_m3.py`, 25 in `test_levels.py`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nested_jax.optim import (
    adagrad_as_memory,
    delta_gradient_descent,
    preconditioned_momentum,
    scale_by_deep_momentum,
    scale_by_delta_momentum,
    scale_by_feature_momentum,
    scale_by_m3,
    scale_by_preconditioned_momentum,
)
from nested_jax.optim.as_memory import memory_loss, optimal_memory
from nested_jax.optim.deep_momentum import deep_momentum

STEPS = 10
pytestmark = pytest.mark.usefixtures('x64')


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def quadratic(seed=5):
    """A loss of a (4, 3) matrix, with a minimum that ten steps at a rate of 0.1 come nearer to."""
    x, y = draw(20, 4, seed=seed), draw(20, 3, seed=seed + 1)
    return lambda w: 0.5 * jnp.mean(jnp.sum((x @ w - y) ** 2, -1))


def trajectory(optimizer, loss, start):
    """(parameters after each step, gradients that led there): the gradients depend on the steps before."""

    def step(carry, _):
        w, state = carry
        gradient = jax.grad(loss)(w)
        updates, state = optimizer.update(gradient, state, w)
        w = optax.apply_updates(w, updates)
        return (w, state), (w, gradient)

    return jax.jit(lambda w: jax.lax.scan(step, (w, optimizer.init(w)), length=STEPS)[1])(jnp.asarray(start))


def delta_step(eta, w, x, surprise):
    """A step of delta gradient descent on one sample, in the paper's layout: W of (out, in), x and the surprise column vectors."""
    optimizer, kernel = delta_gradient_descent(eta, 'sum'), jnp.asarray(w.T)
    updates, _ = optimizer.update(jnp.asarray(np.outer(x, surprise)), optimizer.init(kernel), kernel, inputs=jnp.asarray(x[None]))
    return np.asarray(kernel + updates).T


@pytest.mark.parametrize('shape', [(1, 1), (3, 5), (5, 3), (1, 6), (6, 1)])
@pytest.mark.parametrize('norm', [1.0, 0.03, 40.0])
def test_delta_gradient_descent_solves_the_normal_equations(shape, norm):
    """Identity 1, in (out, in): W+ (x x' + I/eta) = u x' + W/eta, whatever the norm of x; at norm 1 the rate is eta / (1 + eta)."""
    w, x, u, eta = draw(*shape), draw(shape[1], seed=1), draw(shape[0], seed=2), 0.7
    x *= norm / np.linalg.norm(x)
    expected = np.linalg.solve(np.outer(x, x) + np.eye(shape[1]) / eta, (np.outer(u, x) + w / eta).T).T
    actual = delta_step(eta, w, x, -u)
    np.testing.assert_allclose(actual, expected, rtol=1e-10, atol=1e-12)
    if norm == 1.0:
        printed = w @ (np.eye(shape[1]) - eta / (1 + eta) * np.outer(x, x)) + eta / (1 + eta) * np.outer(u, x)
        np.testing.assert_allclose(actual, printed, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize('eta', [1.0, 0.1, 1e-4])
def test_delta_gradient_descent_is_gradient_descent_with_decay_but_for_the_square_of_the_rate(eta):
    """Identity 2: what is left of W - eta (g x' + W x x') is eta^2 |x|^2 / (1 + eta |x|^2) (g x' + W x x'), exactly."""
    w, x, surprise = draw(3, 5), draw(5, seed=1), draw(3, seed=2)
    slope = np.outer(surprise, x) + w @ np.outer(x, x)
    left = delta_step(eta, w, x, surprise) - (w - eta * slope)
    np.testing.assert_allclose(left / eta**2, x @ x / (1 + eta * x @ x) * slope, rtol=1e-9 if eta > 1e-3 else 1e-6)


def test_inputs_across_the_rows_of_the_weight_are_not_forgotten():
    """Identity 2: where W x = 0 the step is that of gradient descent, at the rate eta / (1 + eta |x|^2)."""
    x, surprise, eta = draw(5, seed=1), draw(3, seed=2), 0.8
    w = draw(3, 5) @ (np.eye(5) - np.outer(x, x) / (x @ x))
    np.testing.assert_allclose(w @ x, 0, atol=1e-14)
    expected = w - eta / (1 + eta * x @ x) * np.outer(surprise, x)
    np.testing.assert_allclose(delta_step(eta, w, x, surprise), expected, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(delta_step(eta, w, x, 0 * surprise), w, rtol=1e-12, atol=1e-13)


MEMORIES = {
    'preconditioned': lambda rate, decay: preconditioned_momentum(rate, decay, None),
    'deep, linear': lambda rate, decay: deep_momentum(rate, 0, decay, objective='dot'),
}


@pytest.mark.parametrize('decay', [0.0, 0.9, 1.0])
@pytest.mark.parametrize('name', MEMORIES)
def test_momentum_as_a_memory_walks_as_gradient_descent_with_momentum(name, decay):
    """Identity 3, on the parameters of a trajectory."""
    loss, start = quadratic(), draw(4, 3)
    walked, _ = trajectory(MEMORIES[name](0.1, decay), loss, start)
    expected, _ = trajectory(optax.sgd(0.1, momentum=decay), loss, start)
    np.testing.assert_allclose(walked, expected, rtol=1e-13)


@pytest.mark.parametrize('name', MEMORIES)
def test_without_decay_momentum_follows_the_regularized_leader(name):
    """Identity 3, Eq. (1)-(3) and (34): after t steps m = -eta sum g = argmin <m, sum g> + |m|^2 / (2 eta), and W has moved by all m."""
    eta, start = 0.05, draw(4, 3)
    walked, gradients = trajectory(MEMORIES[name](eta, 1.0), quadratic(), start)
    m = np.diff(np.concatenate([start[None], walked]), axis=0)
    leaders = np.cumsum(gradients, 0)
    np.testing.assert_allclose(m, -eta * leaders, rtol=1e-11, atol=1e-14)
    for step in range(STEPS):
        objective = lambda memory, step=step: jnp.vdot(memory, leaders[step]) + jnp.sum(memory**2) / (2 * eta)
        np.testing.assert_allclose(jax.grad(objective)(jnp.asarray(m[step])), 0, atol=1e-12)
    ages = np.arange(STEPS, 0, -1.0)
    np.testing.assert_allclose(walked[-1], start - eta * np.tensordot(ages, gradients, 1), rtol=1e-12)


def test_moving_averages_without_bias_correction_are_adam_without_it():
    """Identity 7: m* of exponential averages that start at zero, with P the root of H, is optax's Adam less its two corrections."""
    gradients, b1, b2, eps = draw(STEPS, 3, 2), 0.9, 0.99, 1e-3
    adam = optax.scale_by_adam(b1, b2, eps=0.0, eps_root=0.0)
    state = adam.init(jnp.zeros((3, 2)))
    for count, gradient in enumerate(gradients, 1):
        corrected, state = adam.update(jnp.asarray(gradient), state)
        bare = corrected * (1 - b1**count) / np.sqrt(1 - b2**count)
        np.testing.assert_allclose(optimal_memory(state.mu, state.nu, jnp.sqrt(state.nu), 0.0), bare, rtol=1e-11)
        regularised = optimal_memory(state.mu, state.nu, jnp.sqrt(state.nu), eps * jnp.sqrt(state.nu))
        np.testing.assert_allclose(regularised, state.mu / (jnp.sqrt(state.nu) + eps), rtol=1e-11)


def test_in_one_dimension_the_matrix_memory_is_adagrad():
    """Identity 7, Eq. (106)-(111) with a parameter of one entry, where g g' is g^2 and the root of a matrix a root.

    The step of the latest gradient is AdaGrad's; that of the sum of gradients, which the paper prints, minimises the printed objective.
    """
    gradients = draw(STEPS, 1)
    ours, theirs = (make(0.3, initial_accumulator_value=0.0, eps=0.0) for make in (adagrad_as_memory, optax.adagrad))
    state, their_state = ours.init(jnp.ones(())), theirs.init(jnp.ones(()))
    for count, gradient in enumerate(gradients, 1):
        outer = gradients[:count].T @ gradients[:count]
        values, vectors = np.linalg.eigh(outer)
        inverse_root = vectors @ np.diag(values**-0.5) @ vectors.T
        update, state = ours.update(jnp.asarray(gradient[0]), state, jnp.ones(()))
        expected, their_state = theirs.update(jnp.asarray(gradient[0]), their_state)
        np.testing.assert_allclose(update, -0.3 * (inverse_root @ gradient)[0], rtol=1e-12)
        np.testing.assert_allclose(update, expected, rtol=1e-12)
        printed = (inverse_root @ gradients[:count].sum(0))[0]
        slope = jax.grad(memory_loss)(printed, jnp.asarray(gradients[:count, 0]), np.sqrt(outer[0, 0]), 0.0, np.ones(count), np.ones(count))
        np.testing.assert_allclose(slope, 0, atol=1e-12)


AVERAGES = {
    'm3': functools.partial(scale_by_m3, 0.9, None, periods=(), ns_steps=0, bias_correction=False),
    'preconditioned': functools.partial(scale_by_preconditioned_momentum, lambda gradient: 0.1 * gradient, 0.9),
    'feature': functools.partial(scale_by_feature_momentum, lambda gradient: 0.1 * gradient, 0.9),
    'delta': functools.partial(scale_by_delta_momentum, 0.0, 0.9, lambda gradient: 0.1 * gradient),
    'deep, l2': functools.partial(scale_by_deep_momentum, 0, 1.0, 0.1, 'l2'),
}


@pytest.mark.parametrize('name', AVERAGES)
def test_mass_of_the_latest_gradients(name):
    """Identity 9: a decay of 0.9 gives half of the weight to the last 7 gradients and 99 % to the last 44, and not to 6 and 43."""
    optimizer, steps = AVERAGES[name](), 60
    gradients = jnp.eye(steps)[:, None, :]  # each of a direction of its own, in which its weight can be read
    step = lambda state, gradient: optimizer.update(gradient, state)[::-1]
    weights = jax.jit(lambda state: jax.lax.scan(step, state, gradients)[1][-1, 0])(optimizer.init(gradients[0]))
    mass = np.cumsum(weights[::-1])
    np.testing.assert_allclose(mass, 1 - 0.9 ** np.arange(1, steps + 1), rtol=1e-12)
    assert mass[5] < 0.5 < mass[6] and mass[42] < 0.99 < mass[43]
