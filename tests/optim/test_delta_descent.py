"""Delta gradient descent against the minimum of Eq. (56), its batch forms, and what adding up the one-sample rule would do."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nested_jax.optim.delta_descent import delta_gradient_descent, scale_by_delta_gradient_descent, with_delta


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def squared_error(target):
    return lambda y: 0.5 * jnp.sum((y - target) ** 2, -1)


def minimum(w, x, u, eta, weights):
    """argmin over W of sum_i c_i/2 |W x_i - u_i|^2 + 1/(2 eta) |W - w|^2 in the paper's layout, by least squares; all in numpy."""
    w, x, u = (np.asarray(leaf, np.float64) for leaf in (w, x, u))
    rows = np.concatenate([np.sqrt(weights)[:, None] * x, np.eye(x.shape[1]) / np.sqrt(eta)])
    values = np.concatenate([np.sqrt(weights)[:, None] * u, w / np.sqrt(eta)])
    return np.linalg.lstsq(rows, values, rcond=None)[0]


def step(optimizer, loss, w, **extra):
    updates, _ = optimizer.update(jax.grad(loss)(w), optimizer.init(w), w, **extra)
    return optax.apply_updates(w, updates)


@pytest.mark.parametrize(
    ('norm', 'eta'),
    [
        (1.0, 1.0),
        (30.0, 100.0),
        *(pytest.param(norm, eta, marks=pytest.mark.slow) for norm, eta in ((1.0, 0.01), (0.1, 0.01), (0.1, 100.0), (30.0, 0.01))),
    ],
)
def test_one_sample_is_the_minimum(x64, norm, eta):
    """Identity 1, for both forms."""
    w, x, target = draw(5, 3), draw(1, 5, seed=1), draw(1, 3, seed=2)
    x = norm * x / jnp.linalg.norm(x)
    loss = lambda y: squared_error(target)(y).mean()
    expected = minimum(w, x, -(x @ w - target), eta, np.ones(1))
    optimizer = delta_gradient_descent(eta)
    exact = step(optimizer, lambda w: loss(x @ w), w, inputs=x)
    cheap = step(delta_gradient_descent(eta, exact=False), lambda w: loss(with_delta(jnp.matmul, eta)(x, w)), w)
    np.testing.assert_allclose(exact, expected, rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(cheap, expected, rtol=1e-9, atol=1e-11)
    rate = eta / (1 + eta * norm**2)
    printed = w - rate * x.T @ x @ w - rate * x.T @ (x @ w - target)
    np.testing.assert_allclose(exact, printed, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize('reduction', ['mean', 'sum'])
@pytest.mark.parametrize('samples', [2, 12])
def test_exact_form_of_a_batch_is_the_minimum(x64, reduction, samples):
    """More and fewer samples than inputs; the loss is not the memory's, so u is whatever its gradient says."""
    w, x, target = draw(5, 3), draw(samples, 5, seed=1), draw(samples, 3, seed=2)
    reduce = getattr(jnp, reduction)
    loss = lambda y: jnp.sum(jnp.logaddexp(0.0, -y * target), -1)
    surprise = jax.grad(lambda y: loss(y).sum())(x @ w)
    weights = np.full(samples, 1 / samples if reduction == 'mean' else 1.0)
    new = step(delta_gradient_descent(0.7, reduction), lambda w: reduce(loss(x @ w)), w, inputs=x)
    np.testing.assert_allclose(new, minimum(w, x, -surprise, 0.7, weights), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize('reduction', ['mean', 'sum'])
def test_cheap_form_against_its_equation(x64, reduction):
    w, x, target = draw(5, 3), draw(2, 4, 5, seed=1), draw(2, 4, 3, seed=2)
    loss = lambda y: getattr(jnp, reduction)(squared_error(target)(y))
    gradients = jax.grad(lambda x, w: loss(with_delta(jnp.matmul, 0.3, reduction)(x, w)), (0, 1))(x, w)
    plain = jax.grad(lambda x, w: loss(x @ w), (0, 1))(x, w)
    rows = np.asarray(x).reshape(8, 5)
    a = rows.T @ rows * (1 / 8 if reduction == 'mean' else 1)
    np.testing.assert_allclose(gradients[1], (plain[1] + a @ w) / (1 + 0.3 * np.trace(a)), rtol=1e-11)
    np.testing.assert_array_equal(gradients[0], plain[0])
    np.testing.assert_array_equal(with_delta(jnp.matmul, 0.3)(x, w), x @ w)


@pytest.mark.parametrize('reduction', ['mean', 'sum'])
def test_ten_steps_against_numpy(x64, reduction):
    w, x, target = draw(5, 3), draw(10, 6, 5, seed=1), draw(10, 6, 3, seed=2)
    schedule = lambda count: 0.5 / (1 + count)
    optimizer, share = delta_gradient_descent(schedule, reduction, weight_decay=0.1), 1 / 6 if reduction == 'mean' else 1.0
    state, exact, expected = optimizer.init(w), w, np.asarray(w)
    update = jax.jit(optimizer.update)
    for number in range(10):
        eta, rows = schedule(number), np.asarray(x[number])
        gradient = share * rows.T @ (rows @ exact - np.asarray(target[number]))
        updates, state = update(gradient, state, exact, inputs=x[number])
        exact = optax.apply_updates(exact, updates)
        gradient = share * rows.T @ (rows @ expected - np.asarray(target[number]))
        expected = np.linalg.inv(np.eye(5) + eta * share * rows.T @ rows) @ (expected - eta * gradient) - eta * 0.1 * expected
        np.testing.assert_allclose(exact, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize('reduction', ['mean', 'sum'])
def test_ten_steps_of_the_cheap_form_against_numpy(x64, reduction):
    w, x, target = draw(5, 3), draw(10, 6, 5, seed=1), draw(10, 6, 3, seed=2)
    schedule, share = lambda count: 0.5 / (1 + count), 1 / 6 if reduction == 'mean' else 1.0
    optimizer = delta_gradient_descent(schedule, reduction, weight_decay=0.1, exact=False)
    state, cheap, expected = optimizer.init(w), w, np.asarray(w)
    for number in range(10):
        eta, rows, wanted = schedule(number), np.asarray(x[number]), np.asarray(target[number])
        dense = with_delta(jnp.matmul, eta, reduction)
        loss = lambda w, dense=dense, number=number: 0.5 * share * jnp.sum((dense(x[number], w) - target[number]) ** 2)
        updates, state = optimizer.update(jax.grad(loss)(cheap), state, cheap)
        cheap = optax.apply_updates(cheap, updates)
        gradient = share * rows.T @ (rows @ expected - wanted)
        direction = (gradient + share * rows.T @ rows @ expected) / (1 + eta * share * (rows**2).sum())
        expected = expected - eta * (direction + 0.1 * expected)
        np.testing.assert_allclose(cheap, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize('reduction', ['mean', 'sum'])
def test_equal_inputs_do_not_overshoot(x64, reduction):
    """64 equal inputs with eta = 15: the added-up one-sample rule multiplies W by -59 along the input, ours by something in [0, 1]."""
    x = jnp.tile(jnp.array([[0.6, 0.8]]), (64, 1))
    along, across, eta = x[:1].T, jnp.array([[0.8], [-0.6]]), 15.0
    added = along - eta / (1 + eta) * x.T @ x @ along
    np.testing.assert_allclose(along.T @ added, -59, rtol=1e-12)
    still = lambda y: 0.0 * y.sum()
    for direction, factor in ((along, 1 / (1 + eta * (64 if reduction == 'sum' else 1))), (across, 1.0)):
        exact = step(delta_gradient_descent(eta, reduction), lambda w: still(x @ w), direction, inputs=x)
        optimizer = delta_gradient_descent(eta, reduction, exact=False)
        cheap = step(optimizer, lambda w: still(with_delta(jnp.matmul, eta, reduction)(x, w)), direction)
        np.testing.assert_allclose(exact, factor * direction, rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(cheap, factor * direction, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize('eta', [1e-3, 1.0, 1e3])
def test_never_diverges_and_answers_half_the_target(x64, eta):
    """It erases once as delta rule and once as squared error, so the fixed point is X W = target / 2; at eta = 1e3 it is far."""
    x, target = 10 * draw(4, 5, seed=1), draw(4, 3, seed=2)
    optimizer = delta_gradient_descent(eta)
    loss = lambda w: squared_error(target)(x @ w).mean()
    last = jax.jit(lambda w: jax.lax.fori_loop(0, 5000, lambda _, w: step(optimizer, loss, w, inputs=x), w))(draw(5, 3))
    assert float(jnp.abs(last).max()) < 10
    if eta <= 1:
        np.testing.assert_allclose(x @ last, target / 2, atol=1e-6)


@pytest.mark.parametrize('eta', [1e-3, 1.0, 1e3])
def test_forgetting_never_overshoots(x64, eta):
    x, start = 10 * draw(4, 5, seed=1), draw(5, 3)
    exact = step(delta_gradient_descent(eta), lambda w: 0 * w.sum(), start, inputs=x)
    cheap = step(delta_gradient_descent(eta, exact=False), lambda w: 0 * with_delta(jnp.matmul, eta)(x, w).sum(), start)
    for kept in (exact, cheap):
        quotients = jnp.sum(kept * start) / jnp.sum(start**2), jnp.linalg.norm(kept) / jnp.linalg.norm(start)
        assert all(0 < quotient <= 1 for quotient in quotients)


def test_tends_to_gradient_descent(x64):
    """Identity 2: direction -> G + A W as eta -> 0, and nothing is forgotten along inputs that the weight does not answer."""
    x, w = draw(4, 5, seed=1), draw(5, 3)
    optimizer = scale_by_delta_gradient_descent(1e-9)
    direction, _ = optimizer.update(jnp.ones_like(w), optimizer.init(w), w, inputs=x)
    np.testing.assert_allclose(direction, 1 + x.T @ x @ w / 4, rtol=1e-7)
    silent = w - jnp.linalg.pinv(x) @ x @ w
    new = step(delta_gradient_descent(0.3), lambda w: 0 * w.sum(), silent, inputs=x)
    np.testing.assert_allclose(new, silent, atol=1e-12)


def test_leaves_without_inputs_masks_and_stacks(x64):
    params = {'stack': draw(2, 5, 3), 'bias': draw(3), 'none': None}
    gradients = jax.tree.map(jnp.ones_like, params)
    inputs = {'stack': draw(2, 7, 4, 5, seed=1), 'bias': None, 'none': None}
    optimizer = delta_gradient_descent(0.4)
    updates, _ = optimizer.update(gradients, optimizer.init(params), params, inputs=inputs)
    np.testing.assert_array_equal(updates['bias'], -0.4 * jnp.ones(3))
    for layer in range(2):
        alone, _ = optimizer.update(
            gradients['stack'][layer], optimizer.init(params['bias']), params['stack'][layer], inputs=inputs['stack'][layer].reshape(28, 5)
        )
        np.testing.assert_allclose(updates['stack'][layer], alone, rtol=1e-11)
    masked = optax.masked(optimizer, {'stack': True, 'bias': False, 'none': False})
    partly, _ = masked.update(gradients, masked.init(params), params, inputs=inputs)
    np.testing.assert_array_equal(partly['stack'], updates['stack'])
    np.testing.assert_array_equal(partly['bias'], jnp.ones(3))
    carried = delta_gradient_descent(0.4, exact=False)
    plain, _ = carried.update(gradients, carried.init(params), params)
    jax.tree.map(np.testing.assert_array_equal, plain, jax.tree.map(lambda leaf: -0.4 * leaf, gradients))


def test_with_delta_takes_any_linear_layer(x64):
    """An einsum over heads, under vmap, in bfloat16."""
    x, w = draw(2, 4, 5), draw(5, 2, 3, seed=1)
    dense = with_delta(lambda x, w: jnp.einsum('bti,iho->btho', x, w), 0.3, 'sum')
    gradient = jax.grad(lambda w: dense(x, w).sum())(w)
    rows = np.asarray(x).reshape(8, 5)
    a = rows.T @ rows
    expected = (rows.sum(0)[:, None] * np.ones(6) + a @ np.asarray(w).reshape(5, 6)) / (1 + 0.3 * np.trace(a))
    np.testing.assert_allclose(gradient, expected.reshape(5, 2, 3), rtol=1e-11)
    per_row = jax.vmap(jax.grad(lambda w, x: dense(x[None], w).sum()), (None, 0))(w, x)
    np.testing.assert_allclose(per_row[1], jax.grad(lambda w: dense(x[1:], w).sum())(w), rtol=1e-11)
    low = jax.grad(lambda w: with_delta(jnp.matmul, 0.3)(x.astype(jnp.bfloat16), w).sum().astype(jnp.float32))(
        jnp.ones((5, 3), jnp.bfloat16)
    )
    assert low.dtype == jnp.bfloat16 and bool(jnp.isfinite(low).all())


def test_cheap_form_adds_no_product():
    """The backward pass of a compiled step has as many products as without it."""
    x, w1, w2 = jnp.ones((8, 5)), jnp.ones((5, 4)), jnp.ones((4, 3))

    def count(dense):
        loss = lambda w1, w2: jnp.mean(dense(jax.nn.relu(dense(x, w1)), w2) ** 2)
        return jax.jit(jax.grad(loss, (0, 1))).lower(w1, w2).compile().as_text().count(' dot(')

    assert count(with_delta(jnp.matmul, 0.1)) == count(jnp.matmul) == 5


def test_meta_gradients_are_finite_at_zero():
    def outer(scale, rate):
        x, w = scale * jnp.ones((4, 5)), scale * jnp.ones((5, 3))
        exact = step(delta_gradient_descent(rate), lambda w: (x @ w).sum(), w, inputs=x)
        cheap = step(delta_gradient_descent(rate, exact=False), lambda w: with_delta(jnp.matmul, rate)(x, w).sum(), w)
        return (exact + cheap).sum()

    for rate in (0.0, 0.1):
        assert all(jnp.isfinite(leaf) for leaf in jax.grad(outer, (0, 1))(0.0, rate))


def test_optax_machinery():
    params = {'w': jnp.ones((3, 2), jnp.bfloat16), 'masked': optax.MaskedNode()}
    inputs = {'w': jnp.ones((4, 3), jnp.bfloat16), 'masked': None}
    optimizer = delta_gradient_descent(0.1)
    state = optimizer.init(jax.eval_shape(lambda: params))
    updates, after = jax.jit(optimizer.update)(params, state, params, inputs=inputs, unknown=1)
    assert updates['w'].dtype == jnp.bfloat16
    assert jax.tree.map(jax.typeof, state) == jax.tree.map(jax.typeof, after)
    injected = optax.inject_hyperparams(delta_gradient_descent)(learning_rate=0.1)
    hyper, _ = injected.update(params, injected.init(params), params, inputs=inputs)
    np.testing.assert_allclose(hyper['w'].astype(jnp.float32), updates['w'].astype(jnp.float32), rtol=1e-2)
    multi = optax.MultiSteps(optimizer, 2)
    multi_state = multi.init(params)
    for _ in range(2):
        last, multi_state = multi.update(params, multi_state, params, inputs=inputs)
    np.testing.assert_array_equal(last['w'], updates['w'])
    batch = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), params)
    vmapped = jax.vmap(lambda g, s, p: optimizer.update(g, s, p, inputs=inputs)[0])(batch, jax.vmap(optimizer.init)(batch), batch)
    np.testing.assert_allclose(vmapped['w'][0].astype(jnp.float32), updates['w'].astype(jnp.float32), rtol=1e-2)


@pytest.mark.parametrize(
    ('make', 'message'),
    [
        (lambda: delta_gradient_descent(-0.1), 'learning_rate is -0.1, allowed is a number of at least 0'),
        (lambda: delta_gradient_descent(0.1, 'max'), "reduction is 'max', allowed is one of 'mean', 'sum'"),
        (lambda: with_delta(jnp.matmul, -0.1), 'learning_rate is -0.1'),
        (lambda: with_delta(jnp.matmul, 0.1, 'max'), "reduction is 'max'"),
        (lambda: with_delta(jnp.matmul, 0.1)(jnp.ones((2, 2)) * 1j, jnp.ones((2, 2))), 'parameter input has dtype complex64'),
        (lambda: delta_gradient_descent(0.1).init({'w': jnp.zeros((2, 2), jnp.complex64)}), 'parameter w has dtype complex64'),
        (lambda: update(jnp.ones((3, 2)), None, jnp.ones((4, 3))), 'params is None, allowed is a pytree like the updates'),
        (lambda: update(jnp.ones((3, 2)), jnp.ones((3, 2)), None), 'inputs is None, allowed is a pytree like the updates'),
        (lambda: update(jnp.ones((3, 2)), jnp.ones((3, 2)), jnp.ones((4, 2))), r'inputs has shape \(4, 2\), allowed for a kernel'),
        (lambda: update(jnp.ones((5, 3, 2)), jnp.ones((5, 3, 2)), jnp.ones((4, 3))), r'inputs has shape \(4, 3\)'),
        (lambda: update(jnp.ones(2), jnp.ones(2), jnp.ones((4, 2))), r'inputs has shape \(4, 2\)'),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def update(gradient, params, inputs):
    optimizer = scale_by_delta_gradient_descent(0.1)
    return optimizer.update(gradient, optimizer.init(gradient), params, inputs=inputs)
