"""Identities 21 to 27 of the Continuum Memory System, against an explicit loop over Eq. (71), arXiv:2512.24695v1."""

import functools
import math

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest

from nested_jax.memory import continuum

WIDTH = 3
PERIODS = [((2, 4), 'sequential'), ((2, 4, 8), 'sequential'), ((2, 4, 8), 'nested'), ((2, 4, 6), 'nested'), ((3, 3), 'sequential')]
pytestmark = pytest.mark.usefixtures('x64')


def make_levels(count, seed=0):
    draw = np.random.default_rng(seed).normal
    return tuple({'up': jnp.asarray(draw(size=(WIDTH, 4))), 'down': jnp.asarray(draw(size=(4, WIDTH)))} for _ in range(count))


def make_tokens(length, seed=1):
    draw = np.random.default_rng(seed).normal
    return jnp.asarray(draw(size=(length, WIDTH))), jnp.asarray(draw(size=(length, WIDTH)))


def chunk_loss(weights, carry, chunk):
    """A recurrent model whose carry depends on the weights, as a model's state does."""
    loss, outputs = jnp.zeros(()), []
    for x, y in zip(*chunk, strict=True):
        levels = [lambda row, w=w: row + 0.5 * jnp.tanh(row @ w['up']) @ w['down'] for w in weights]
        outputs.append(continuum.chain(levels, 0.5 * carry + x))
        carry = 0.3 * jnp.tanh(outputs[-1])
        loss += 0.5 * jnp.sum((outputs[-1] - y) ** 2)
    return loss, (carry, jnp.stack(outputs))


@functools.partial(jax.jit, static_argnames=('periods', 'variant', 'bptt'))
def run(initial, tokens, periods, variant='sequential', rate=0.02, **kwargs):
    """(state, carry, losses (chunks,), (outputs (tokens, WIDTH), weights at each chunk's start))."""
    schedule = continuum.make_schedule(periods, variant)
    chunks = jax.tree.map(lambda leaf: leaf.reshape(-1, periods[0], *leaf.shape[1:]), tokens)
    state = continuum.init_state(initial, schedule)
    options = dict(initial=initial, schedule=schedule, learning_rates=rate, **kwargs)
    recorded = lambda weights, carry, chunk: ((loss := chunk_loss(weights, carry, chunk))[0], (loss[1][0], (loss[1][1], weights)))
    state, carry, (losses, (rows, weights)) = continuum.scan_chunks(recorded, state, jnp.zeros(WIDTH), chunks, **options)
    return state, carry, losses, (rows.reshape(-1, WIDTH), weights)


chunk_gradient = jax.jit(jax.value_and_grad(chunk_loss, has_aux=True))


def loop(initial, tokens, periods, variant='sequential', rate=0.02, bptt=None):
    """Eq. (71) to the letter: after token i, a level with i = 0 mod period subtracts the gradients since its last update."""
    rates, constant = jnp.broadcast_to(jnp.asarray(rate), len(periods)), jax.lax.stop_gradient
    weights, pending, updates = list(initial), [[] for _ in periods], [0] * len(periods)
    carry, losses, rows = jnp.zeros(WIDTH), [], []
    for number, end in enumerate(range(periods[0], len(tokens[0]) + 1, periods[0])):
        if bptt is not None and number % bptt == 0:
            shift = jax.tree.map(lambda weight, start: constant(weight - start), tuple(weights), tuple(initial))
            weights = list(jax.tree.map(jnp.add, tuple(initial), shift))
            pending = constant(pending)
        chunk = jax.tree.map(lambda leaf, part=slice(end - periods[0], end): leaf[part], tokens)
        (loss, (carry, row)), gradients = chunk_gradient(tuple(weights), carry, chunk)
        losses.append(loss)
        rows.append(row)
        for level, period in enumerate(periods):
            pending[level].append(gradients[level])
            if end % period == 0:
                for gradient in pending[level]:
                    weights[level] = jax.tree.map(lambda w, g, rate=rates[level]: w - rate * g, weights[level], gradient)
                pending[level], updates[level] = [], updates[level] + 1
                slower = periods[level + 1 : level + 2]
                if variant == 'nested' and slower and updates[level] % math.ceil(slower[0] / period) == 0:
                    weights[level] = initial[level]
    return tuple(weights), carry, jnp.stack(losses), jnp.concatenate(rows)


def assert_close(actual, expected, tolerance=1e-10):
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol=tolerance, atol=tolerance), actual, expected)


@pytest.mark.parametrize('periods, variant', PERIODS)
def test_scan_equals_loop(periods, variant):
    initial, tokens = make_levels(len(periods)), make_tokens(24)
    state, carry, losses, (rows, _) = run(initial, tokens, periods, variant)
    assert_close((state.weights, carry, losses, rows), loop(initial, tokens, periods, variant))


def test_rates_of_each_level():
    initial, tokens, rates = make_levels(2), make_tokens(12), jnp.array([0.03, 0.005])
    assert_close(run(initial, tokens, (2, 4), rate=rates)[0].weights, loop(initial, tokens, (2, 4), rate=rates)[0])


def test_period_of_one_token_is_online_gradient_descent():
    inputs, targets = make_tokens(7)
    start = np.random.default_rng(2).normal(size=(WIDTH, WIDTH))

    def linear_loss(weights, carry, chunk):
        x, y = chunk
        return 0.5 * jnp.sum((x @ weights[0] - y) ** 2), (carry, None)

    initial, schedule = (jnp.asarray(start),), continuum.make_schedule((1,))
    options = dict(initial=initial, schedule=schedule, learning_rates=0.1)
    chunks = (inputs[:, None], targets[:, None])
    state, _, _ = continuum.scan_chunks(linear_loss, continuum.init_state(initial, schedule), None, chunks, **options)
    expected = start
    for x, y in zip(np.asarray(inputs), np.asarray(targets), strict=True):
        expected = expected - 0.1 * np.outer(x, x @ expected - y)
    assert_close(state.weights[0], expected)


def test_chunk_update_is_the_large_batch_step():
    initial, tokens = make_levels(1), make_tokens(6)
    _, gradient = chunk_gradient(initial, jnp.zeros(WIDTH), tokens)
    expected = jax.tree.map(lambda weight, grad: weight - 0.02 * grad, initial, gradient)
    assert_close(run(initial, tokens, (6,))[0].weights, expected)


def test_levels_of_equal_period_are_one_gradient_descent():
    initial, tokens = make_levels(2), make_tokens(12)
    joint = lambda weights, carry, chunk: chunk_loss(weights[0], carry, chunk)
    schedule = continuum.make_schedule((3,))
    chunks = jax.tree.map(lambda leaf: leaf.reshape(4, 3, WIDTH), tokens)
    state = continuum.init_state((initial,), schedule)
    options = dict(initial=(initial,), schedule=schedule, learning_rates=0.02)
    state, _, _ = continuum.scan_chunks(joint, state, jnp.zeros(WIDTH), chunks, **options)
    assert_close(run(initial, tokens, (3, 3))[0].weights, state.weights[0], 1e-14)


def test_without_learning_the_chain_is_static():
    initial, tokens = make_levels(2), make_tokens(8)
    # Bit for bit where compilers optimise as they do for users.
    optimised = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 3})
    state, _, _, (rows, _) = optimised(lambda *args: run.__wrapped__(*args, (2, 4), rate=0.0))(initial, tokens)
    static = optimised(chunk_loss)(initial, jnp.zeros(WIDTH), tokens)[1][1]
    np.testing.assert_array_equal(rows, static)
    jax.tree.map(np.testing.assert_array_equal, state.weights, initial)
    distances = [jnp.abs(run(initial, tokens, (2, 4), rate=rate)[3][0] - static).max() for rate in (1e-5, 1e-6)]
    assert 9.9 < distances[0] / distances[1] < 10.1


def test_updates_fall_on_the_periods():
    periods, initial = (2, 4, 6), make_levels(3)
    state, _, _, (_, weights) = run(initial, make_tokens(14), periods)
    for level, (period, updates) in enumerate(zip(periods, (7, 3, 2), strict=True)):  # of fourteen tokens, the rest is pending
        history = jax.tree.map(lambda before, after: jnp.concatenate([before, after[None]]), weights[level], state.weights[level])
        changes = np.stack([(leaf[1:] != leaf[:-1]).any((1, 2)) for leaf in jax.tree.leaves(history)])
        np.testing.assert_array_equal(changes, np.broadcast_to(2 * np.arange(1, 8) % period == 0, changes.shape))
        np.testing.assert_array_equal(changes.sum(1), updates)


@pytest.mark.parametrize('periods', [(2, 4, 8), (3, 6, 18), (4, 4, 12), (5,)])
def test_period_times_frequency_is_the_same_for_every_level(periods):
    """Identity 23: f_l is the number of updates while the slowest level takes one, and C_l f_l = max C."""
    initial, schedule = tuple(jnp.zeros(()) for _ in periods), continuum.make_schedule(periods)
    state, options = continuum.init_state(initial, schedule), dict(initial=initial, schedule=schedule, learning_rates=1.0)
    for _ in range(3):
        frequencies = np.zeros(len(periods), int)
        for _ in range(periods[-1] // schedule.chunk_size):
            before, state = state.weights, continuum.write(state, tuple(jnp.ones(()) for _ in periods), **options)
            frequencies += np.array([bool(new != old) for new, old in zip(state.weights, before, strict=True)])
        assert frequencies[-1] == 1
        np.testing.assert_array_equal(np.array(periods) * frequencies, periods[-1])


def test_cadence_survives_calls():
    initial, tokens, schedule = make_levels(3), make_tokens(14), continuum.make_schedule((2, 4, 6))
    options = dict(initial=initial, schedule=schedule, learning_rates=0.02)
    call = jax.jit(functools.partial(continuum.scan_chunks, chunk_loss, **options))
    state, carry = continuum.init_state(initial, schedule), jnp.zeros(WIDTH)
    for end in range(2, 15, 2):
        state, carry, _ = call(state, carry, jax.tree.map(lambda leaf, end=end: leaf[None, end - 2 : end], tokens))
    assert_close((state, carry), run(initial, tokens, (2, 4, 6))[:2], 1e-13)


def test_no_target_reaches_its_own_chunk():
    initial, (inputs, targets) = make_levels(2), make_tokens(8)
    jacobian = jax.jacobian(lambda targets: run(initial, (inputs, targets), (2, 4))[3][0])(targets)
    reaches = np.abs(np.asarray(jacobian)).max((1, 3)) > 0
    chunk = np.arange(8) // 2
    np.testing.assert_array_equal(reaches, chunk[:, None] > chunk[None])


@pytest.mark.parametrize('periods', [(2, 4, 8), (2, 4, 6), (2, 6, 12)])
def test_nested_returns_to_the_initial_weights(periods):
    initial, tokens = make_levels(3), make_tokens(24)
    for variant in ('nested', 'sequential'):
        _, _, _, (_, weights) = run(initial, tokens, periods, variant)
        for level, period in enumerate(periods):
            same = jax.tree.map(lambda now, first: (now == first[None]).all((1, 2)), weights[level], initial[level])
            read = 2 * np.arange(12)  # tokens before each chunk
            if variant == 'nested' and level < 2:
                read %= period * math.ceil(periods[level + 1] / period)
            np.testing.assert_array_equal(np.stack(jax.tree.leaves(same)).all(0), read < period)


def test_aggregate():
    levels = [lambda x: 2 * x, lambda x: x + 1, lambda x: -x]
    x = jnp.arange(6.0).reshape(2, 3)
    for chosen, level in enumerate(levels):
        np.testing.assert_array_equal(continuum.aggregate(levels, x, jnp.eye(3)[chosen]), level(x))
    np.testing.assert_array_equal(continuum.aggregate(levels, x), 2 * x + 1)
    np.testing.assert_array_equal(continuum.chain(levels, x), -(2 * x + 1))
    with pytest.raises(ValueError, match=r'weights has shape \(2,\)'):
        continuum.aggregate(levels, x, jnp.ones(2))


@pytest.mark.parametrize('periods, variant', PERIODS[:3])
def test_meta_gradient_equals_finite_differences(periods, variant):
    """Of every level's initial weights and rate, over at least three updates of each level."""
    initial, tokens, rates = make_levels(len(periods)), make_tokens(4 * periods[-1]), jnp.full(len(periods), 0.02)

    outer = jax.jit(lambda initial, rates: run(initial, tokens, periods, variant, rates)[2].sum())
    gradient = jax.jit(jax.grad(outer, (0, 1)))(initial, rates)
    assert all(jnp.abs(leaf).max() > 1e-3 for leaf in jax.tree.leaves(gradient))
    flat, rebuild = jax.flatten_util.ravel_pytree((initial, rates))
    expected, _ = jax.flatten_util.ravel_pytree(gradient)
    step = 1e-6
    for place in range(0, flat.size, 3):
        ends = [outer(*rebuild(flat.at[place].add(sign * step))) for sign in (1, -1)]
        np.testing.assert_allclose((ends[0] - ends[1]) / (2 * step), expected[place], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('periods, variant, bptt', [((2, 4), 'sequential', b) for b in (None, 1, 2)] + [((2, 4, 4), 'nested', 3)])
def test_truncation_equals_explicit_stop_gradients(periods, variant, bptt):
    initial, tokens = make_levels(len(periods)), make_tokens(12)
    losses = lambda function: lambda initial, rate: function(initial, tokens, periods, variant, rate, bptt=bptt)[2].sum()
    actual = jax.jit(jax.value_and_grad(losses(run), (0, 1)))(initial, 0.02)
    assert_close(actual, jax.jit(jax.value_and_grad(losses(loop), (0, 1)))(initial, 0.02))
    assert (actual[1][1] == 0) == (bptt == 1)


def test_truncation_keeps_every_bit():
    initial, tokens = make_levels(2), make_tokens(16)
    full, cut = (run(initial, tokens, (2, 4), bptt=bptt) for bptt in (None, 2))
    jax.tree.map(np.testing.assert_array_equal, full, cut)


def test_one_chunk_bptt_builds_no_second_derivative():
    """Its outer gradient is the plain sum of the chunks' gradients: two passes a chunk fewer."""
    initial, tokens = make_levels(2), make_tokens(16)

    def flops(bptt):
        outer = lambda initial: run(initial, tokens, (2, 4), bptt=bptt)[2].sum()
        return jax.jit(jax.grad(outer)).lower(initial).compile().cost_analysis()['flops']

    assert flops(1) < 0.8 * flops(2)


def test_zero_inner_gradients_leave_outer_gradients_finite():
    initial, (inputs, targets) = make_levels(2), make_tokens(8)
    silent = lambda weights, carry, chunk: ((loss := chunk_loss(weights, carry, chunk))[0] * 0.0, loss[1])
    schedule = continuum.make_schedule((2, 4))
    chunks = jax.tree.map(lambda leaf: leaf.reshape(4, 2, WIDTH), (inputs, targets))

    def outer(initial, rate, loss):
        options = dict(initial=initial, schedule=schedule, learning_rates=rate)
        state = continuum.init_state(initial, schedule)
        _, _, (_, rows) = continuum.scan_chunks(loss, state, jnp.zeros(WIDTH), chunks, **options)
        return jnp.sum(rows**2)

    gradient = jax.jit(jax.grad(functools.partial(outer, loss=silent), (0, 1)))(initial, 0.1)
    static = jax.jit(jax.grad(lambda initial: jnp.sum(chunk_loss(initial, jnp.zeros(WIDTH), (inputs, targets))[1][1] ** 2)))(initial)
    assert_close(gradient, (static, jnp.zeros(())))
    zeros = jax.tree.map(jnp.zeros_like, initial)
    assert all(
        jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.jit(jax.grad(functools.partial(outer, loss=chunk_loss)))(zeros, 0.1))
    )


@pytest.mark.parametrize('bptt', [None, 1])
def test_quadratic_closed_form(bptt):
    """Losses a/2 (w - c)^2: each step contracts by 1 - rate a, and so does the gradient that goes back through it."""
    curvature, centre, rate, start = np.array([1.0, 2.0, 0.5, 3.0]), np.array([0.3, -1.0, 2.0, 0.7]), 0.1, 0.4
    loss = lambda weights, carry, chunk: (0.5 * chunk[0] * (weights[0] - chunk[1]) ** 2, (carry, None))
    schedule = continuum.make_schedule((1,))

    def outer(start):
        state, options = continuum.init_state((start,), schedule), dict(initial=(start,), schedule=schedule, learning_rates=rate)
        return continuum.scan_chunks(loss, state, None, (jnp.asarray(curvature), jnp.asarray(centre)), bptt=bptt, **options)[2][0].sum()

    expected, weight, slope = 0.0, start, 1.0
    for a, c in zip(curvature, centre, strict=True):
        expected += a * (weight - c) * slope
        weight, slope = weight - rate * a * (weight - c), slope * (1 - rate * a if bptt is None else 1.0)
    np.testing.assert_allclose(jax.jit(jax.grad(outer))(start), expected, rtol=1e-12)


def test_restarts_begin_a_document():
    initial, tokens, periods = make_levels(2), make_tokens(20), (2, 4)
    restarts = jnp.arange(10) == 5  # in the middle of a period of the slower level
    state, _, losses, _ = run(initial, tokens, periods, restarts=restarts)
    schedule = continuum.make_schedule(periods)
    chunks = jax.tree.map(lambda leaf: leaf[10:].reshape(5, 2, WIDTH), tokens)
    carry = run(initial, jax.tree.map(lambda leaf: leaf[:10], tokens), periods)[1]
    options = dict(initial=initial, schedule=schedule, learning_rates=0.02)
    read = jax.jit(functools.partial(continuum.scan_chunks, chunk_loss, **options))
    alone = read(continuum.init_state(initial, schedule), carry, chunks)
    assert_close((state, losses[5:]), (alone[0], alone[2][0]), 1e-13)


def test_rows_of_a_batch_are_independent():
    initial, tokens = make_levels(2), make_tokens(16)
    rows = jax.tree.map(lambda leaf: leaf.reshape(2, 8, WIDTH), tokens)
    together = jax.jit(jax.vmap(lambda tokens: run(initial, tokens, (2, 4))))(rows)
    for row in range(2):
        alone = run(initial, jax.tree.map(lambda leaf, row=row: leaf[row], rows), (2, 4))
        assert_close(jax.tree.map(lambda leaf, row=row: leaf[row], together), alone, 1e-13)


@pytest.mark.parametrize('periods', [(), (0,), (4, 2), (2, 3)])
def test_periods_are_checked(periods):
    with pytest.raises(ValueError, match='periods is .*, allowed are ascending multiples of the first'):
        continuum.make_schedule(periods)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="variant is 'random'"):
        continuum.make_schedule((2,), 'random')
    with pytest.raises(ValueError, match='initial has 1 levels, allowed is 2'):
        continuum.init_state(make_levels(1), continuum.make_schedule((2, 4)))
    with pytest.raises(ValueError, match='bptt is 0'):
        run(make_levels(1), make_tokens(4), (2,), bptt=0)
