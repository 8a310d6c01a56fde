"""`by_level` against optax's own optimizers and `MultiSteps` (identity 25)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nested_jax.optim.levels import Level, LevelState, by_level, steps_of, stretch

PERIODS = {'fast': 1, 'middle': 2, 'slow': 3}
INNER = {
    'sgd': functools.partial(optax.sgd, momentum=0.9),
    'adamw': functools.partial(optax.adamw, weight_decay=0.1, mask=lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params)),
}


def make_params(dtype=jnp.float32):
    draw = np.random.default_rng(0).normal
    return {name: {'w': jnp.asarray(draw(size=(3, 2)), dtype), 'b': jnp.asarray(draw(size=2), dtype)} for name in PERIODS}


def make_gradients(steps, params):
    draw = np.random.default_rng(1).normal
    return jax.tree.map(lambda leaf: jnp.asarray(draw(size=(steps, *leaf.shape)), leaf.dtype), params)


def run(optimizer, params, gradients):
    """(parameters after each step, last state), compiled and scanned."""

    def step(carry, gradient):
        params, state = carry
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    scan = jax.jit(lambda params: jax.lax.scan(step, (params, optimizer.init(params)), gradients))
    (_, state), history = scan(params)
    return history, state


def assert_equal(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


@pytest.mark.parametrize('name', INNER)
def test_equals_multi_steps_of_each_level(x64, name):
    """Identity 25."""
    inner, params = INNER[name](0.1), make_params(jnp.float64)
    gradients = make_gradients(7, params)
    history, _ = run(by_level(inner, PERIODS), params, gradients)
    for level, period in PERIODS.items():
        reference = optax.MultiSteps(inner, period, use_grad_mean=False, accumulator_dtype=jnp.float64).gradient_transformation()
        expected, _ = run(reference, params[level], gradients[level])
        jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-12, atol=1e-14), history[level], expected)
        moves = [(leaf[1:] != leaf[:-1]).any(tuple(range(1, leaf.ndim))) for leaf in jax.tree.leaves(history[level])]
        for moved in moves:
            np.testing.assert_array_equal(moved, np.arange(2, 8) % period == 0)


@pytest.mark.parametrize('name', INNER)
@pytest.mark.parametrize('periods', [1, {'fast': 1, 'middle': 1, 'slow': 1}, lambda path: 1])
def test_period_one_is_the_inner_optimizer_to_the_bit(name, periods):
    inner, params = INNER[name](0.1), make_params()
    gradients = make_gradients(4, params)
    assert_equal(run(by_level(inner, periods), params, gradients)[0], run(inner, params, gradients)[0])


def test_period_one_among_others_is_the_inner_optimizer_to_the_bit():
    """Operation by operation: compiled into another program, the same arithmetic may be contracted differently."""
    inner, params = INNER['adamw'](0.1), make_params()
    optimizer, alone = by_level(inner, PERIODS), params['fast']
    state, alone_state = optimizer.init(params), inner.init(alone)
    for _ in range(3):
        updates, state = optimizer.update(params, state, params)
        expected, alone_state = inner.update(alone, alone_state, alone)
        assert_equal(updates['fast'], expected)
        params, alone = optax.apply_updates(params, updates), optax.apply_updates(alone, expected)


def test_gradient_descent_takes_the_sum(x64):
    params = make_params(jnp.float64)
    gradients = make_gradients(6, params)
    history, _ = run(by_level(optax.sgd(0.1), 3), params, gradients)
    for before, gradient, after in zip(*map(jax.tree.leaves, (params, gradients, history)), strict=True):
        np.testing.assert_array_equal(after[1], before)
        np.testing.assert_allclose(after[2], before - 0.1 * gradient[:3].sum(0), rtol=1e-12)
        np.testing.assert_allclose(after[5], before - 0.1 * gradient.sum(0), rtol=1e-12)


@pytest.mark.parametrize('average', [False, True])
def test_ten_steps_against_numpy(x64, average):
    """Of heavy ball, each level at its period: what is left over when the steps end stays unused."""
    params = make_params(jnp.float64)
    gradients = make_gradients(10, params)
    history, _ = run(by_level(optax.sgd(0.1, momentum=0.9), PERIODS, average=average), params, gradients)
    for name, period in PERIODS.items():
        for leaf, gradient, found in zip(*(jax.tree.leaves(tree[name]) for tree in (params, gradients, history)), strict=True):
            value, trace, total = np.array(leaf), np.zeros(leaf.shape), np.zeros(leaf.shape)
            for step, each in enumerate(np.asarray(gradient), 1):
                total = total + each
                if step % period == 0:
                    trace = 0.9 * trace + total / (period if average else 1)
                    value, total = value - 0.1 * trace, 0 * total
                np.testing.assert_allclose(found[step - 1], value, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize('name', INNER)
def test_average_equals_multi_steps(x64, name):
    inner, params = INNER[name](0.1), make_params(jnp.float64)
    gradients = make_gradients(7, params)
    history, _ = run(by_level(inner, PERIODS, average=True), params, gradients)
    for level, period in PERIODS.items():
        expected, _ = run(
            optax.MultiSteps(inner, period, accumulator_dtype=jnp.float64).gradient_transformation(), params[level], gradients[level]
        )
        jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-12, atol=1e-14), history[level], expected)


@pytest.mark.parametrize('by_path', [False, True])
def test_an_optimizer_for_each_group(by_path):
    """Two groups of one period, and one optimizer at two periods, one of them given in tokens."""
    params = make_params()
    gradients = make_gradients(7, params)
    several = {'sgd': optax.sgd(0.1, 0.9), 'adam': lambda period: optax.adam(0.01 * period)}
    levels = {'fast': Level(2, 'sgd'), 'middle': Level(2, 'adam'), 'slow': Level(steps_of(5000, 2048), 'adam')}
    optimizer = by_level(several, (lambda path: levels[path.split('/')[0]]) if by_path else levels)
    assert sorted(optimizer.init(params).inner_states) == ['adam_every_2', 'adam_every_3', 'sgd_every_2']
    history, _ = run(optimizer, params, gradients)
    for name, inner, period in (('fast', optax.sgd(0.1, 0.9), 2), ('middle', optax.adam(0.02), 2), ('slow', optax.adam(0.03), 3)):
        expected, _ = run(by_level(inner, period), params[name], gradients[name])
        jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-6), history[name], expected)


@pytest.mark.parametrize(
    ('inner', 'periods', 'message'),
    [
        (
            {'sgd': optax.sgd(0.1)},
            Level(2, 'adam'),
            r"periods at  is Level\(period=2, optimizer='adam'\), allowed is a Level with one of \['sgd'\]",
        ),
        ({'sgd': optax.sgd(0.1)}, 2, 'periods at  is 2, allowed is a Level'),
        (optax.sgd(0.1), Level(2, 'sgd'), 'allowed is an integer, for the one optimizer'),
        ({'sgd': optax.sgd(0.1)}, Level(0, 'sgd'), 'periods at  is 0, allowed is an integer of at least 1'),
    ],
)
def test_levels_and_optimizers_must_fit(inner, periods, message):
    with pytest.raises(ValueError, match=message):
        by_level(inner, periods).init(jnp.zeros(()))


def test_periods_by_path_by_prefix_and_by_tree_agree():
    params = make_params()
    gradients = make_gradients(6, params)
    tree = {level: {'w': period, 'b': period} for level, period in PERIODS.items()}
    paths = lambda path: PERIODS[path.split('/')[0]]
    histories = [run(by_level(optax.adam(0.1), periods), params, gradients)[0] for periods in (PERIODS, tree, paths)]
    assert_equal(histories[1], histories[0])
    assert_equal(histories[2], histories[0])


def test_inner_state_advances_once_an_update():
    params = make_params()
    _, state = run(by_level(optax.adam(0.1), PERIODS), params, make_gradients(7, params))
    counts = lambda name: sorted(int(count) for _, count in optax.tree.get_all_with_path(state.inner_states[name], 'count'))
    assert counts('every_1') == [7]
    assert counts('every_3') == [1, 2]  # one gradient waiting, two updates done


def test_stretched_schedule_follows_the_global_step():
    """With unit gradients and learning rate = global step, an update says on which step it fell."""
    params = {'fast': jnp.zeros(()), 'slow': jnp.zeros(())}
    make_inner = lambda period: optax.sgd(stretch(lambda step: jnp.asarray(step, jnp.float32), period))
    optimizer = by_level(make_inner, {'fast': 1, 'slow': 3})
    history, _ = run(optimizer, params, jax.tree.map(lambda leaf: jnp.ones(6), params))
    np.testing.assert_array_equal(-jnp.diff(history['fast'], prepend=0.0), [0, 1, 2, 3, 4, 5])
    np.testing.assert_array_equal(-jnp.diff(history['slow'], prepend=0.0), [0, 0, 3 * 2, 0, 0, 3 * 5])
    assert stretch(0.1, 3) == 0.1


def test_a_level_runs_when_it_is_due_and_one_program_does_all_steps():
    ran = {period: [] for period in PERIODS.values()}

    def inner(period):
        def update(updates, state, params=None):
            jax.debug.callback(ran[period].append, state)
            return updates, state + 1

        return optax.GradientTransformation(lambda params: jnp.zeros((), jnp.int32), update)

    params = make_params()
    optimizer = by_level(inner, PERIODS)
    step, state = jax.jit(optimizer.update), optimizer.init(params)
    for _ in range(7):
        _, state = step(params, state, params)
    jax.effects_barrier()
    assert {period: [int(count) for count in counts] for period, counts in ran.items()} == {1: [*range(7)], 2: [0, 1, 2], 3: [0, 1]}
    assert step._cache_size() == 1


def test_state_saved_between_updates_continues_to_the_bit():
    params = make_params()
    gradients = make_gradients(7, params)
    optimizer = by_level(optax.adamw(0.1), PERIODS)
    step = jax.jit(optimizer.update)

    def advance(params, state, steps):
        for number in steps:
            updates, state = step(jax.tree.map(lambda leaf, number=number: leaf[number], gradients), state, params)
            params = optax.apply_updates(params, updates)
        return params, state

    whole = advance(params, optimizer.init(params), range(7))
    halfway = advance(params, optimizer.init(params), range(4))
    leaves, structure = jax.tree.flatten(halfway)
    restored = jax.tree.unflatten(structure, [jnp.asarray(np.asarray(leaf)) for leaf in leaves])
    assert_equal(advance(*restored, range(4, 7)), whole)


def test_state_keeps_its_type_and_updates_that_of_the_parameters():
    for dtype in (jnp.float16, jnp.bfloat16, jnp.float32):
        params, optimizer = make_params(dtype), by_level(optax.adamw(0.1), PERIODS)
        state = optimizer.init(params)
        updates, after = jax.jit(optimizer.update)(params, state, params)
        assert jax.tree.map(jax.typeof, state) == jax.tree.map(jax.typeof, after)
        assert jax.tree.map(lambda leaf: leaf.dtype, updates) == jax.tree.map(lambda leaf: leaf.dtype, params)
        slow = state.inner_states['every_3'].inner_state
        assert isinstance(slow, LevelState)
        assert {leaf.dtype for leaf in jax.tree.leaves(slow.sums)} == {jnp.dtype('float32')}


def test_bfloat16_gradients_are_summed_in_float32():
    params = {'w': jnp.zeros((), jnp.bfloat16)}
    gradients = {'w': jnp.full((257,), 1.0, jnp.bfloat16)}  # 256 + 1 is 256 in bfloat16
    _, state = run(by_level(optax.sgd(1.0), 300), params, gradients)
    assert float(state.inner_states['every_300'].inner_state.sums['w']) == 257.0


def test_works_inside_and_outside_of_masks():
    params = make_params()
    gradients = make_gradients(6, params)
    mask = {'fast': True, 'middle': {'w': True, 'b': False}, 'slow': {'w': True, 'b': False}}
    outside, _ = run(optax.masked(by_level(optax.sgd(0.1), PERIODS), mask), params, gradients)
    inside, _ = run(by_level(optax.masked(optax.sgd(0.1), mask), PERIODS), params, gradients)
    plain, _ = run(by_level(optax.sgd(0.1), PERIODS), params, gradients)
    for level in ('middle', 'slow'):
        np.testing.assert_allclose(outside[level]['w'], plain[level]['w'], rtol=1e-6)
        np.testing.assert_allclose(inside[level]['w'], plain[level]['w'], rtol=1e-6)


def test_sees_all_parameters_when_clipped_in_front():
    params = make_params()
    gradients = jax.tree.map(lambda leaf: 100 * leaf, make_gradients(3, params))
    history, _ = run(
        optax.chain(optax.clip_by_global_norm(1.0), by_level(optax.sgd(1.0), {'fast': 1, 'middle': 1, 'slow': 3})), params, gradients
    )
    norms = jnp.sqrt(sum(jnp.sum(leaf**2, tuple(range(1, leaf.ndim))) for leaf in jax.tree.leaves(gradients)))
    expected = params['slow']['b'] - (gradients['slow']['b'] / norms[:, None]).sum(0)
    np.testing.assert_allclose(history['slow']['b'][-1], expected, rtol=1e-5)


def test_optax_machinery():
    """Abstract parameters, `map_params`, unknown extra arguments, vmap and injected hyper-parameters."""
    params, optimizer = make_params(), by_level(optax.adam(0.1), PERIODS)
    state = optimizer.init(params)
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
    assert jax.tree.map(jax.typeof, optimizer.init(abstract)) == jax.tree.map(jax.typeof, state)
    shifted = optax.tree.map_params(optimizer, lambda leaf: leaf + 1, state)
    assert int(optax.tree.get(shifted.inner_states['every_2'].inner_state.inner_state, 'count')) == 0
    assert float(shifted.inner_states['every_2'].inner_state.sums['middle']['b'][0]) == 1
    optimizer.update(params, state, params, unknown=1)
    batch = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), params)
    updates, _ = jax.vmap(optimizer.update)(batch, jax.vmap(optimizer.init)(batch), batch)
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a[0], e, rtol=1e-6), updates, optimizer.update(params, state, params)[0])
    injected = optax.inject_hyperparams(lambda learning_rate: by_level(optax.sgd(learning_rate), PERIODS))(learning_rate=0.1)
    gradients = make_gradients(3, params)
    assert_equal(run(injected, params, gradients)[0], run(by_level(optax.sgd(0.1), PERIODS), params, gradients)[0])


def test_state_is_sharded_like_the_parameters():
    mesh = jax.make_mesh((8,), ('data',), axis_types=(jax.sharding.AxisType.Explicit,))
    params = {'fast': jnp.ones((16, 2)), 'slow': jnp.ones((16, 2))}
    sharding = jax.sharding.NamedSharding(mesh, jax.P('data', None))
    optimizer = by_level(optax.adamw(0.1), {'fast': 1, 'slow': 3})
    with jax.set_mesh(mesh):
        params = jax.device_put(params, sharding)
        state = optimizer.init(params)
        updates, after = jax.jit(optimizer.update)(params, state, params)
    matrices = [leaf for leaf in jax.tree.leaves((state, after, updates)) if leaf.ndim == 2]
    assert len(matrices) == 12
    assert all(leaf.sharding.is_equivalent_to(sharding, 2) for leaf in matrices)


def test_gradient_through_zero_gradients_is_finite():
    params, optimizer = make_params(), by_level(optax.sgd(0.1), PERIODS)

    def outer(scale):
        gradients = jax.tree.map(lambda leaf: 0.0 * scale * leaf, make_gradients(6, params))
        return sum(jnp.sum(leaf[-1] ** 2) for leaf in jax.tree.leaves(run(optimizer, params, gradients)[0]))

    assert jnp.isfinite(jax.grad(outer)(1.0))


@pytest.mark.parametrize('period', [0, -1, 1.5, True, '2'])
def test_periods_are_checked(period):
    with pytest.raises(ValueError, match=r"periods at \['slow'\] is .*, allowed is an integer of at least 1"):
        by_level(optax.sgd(0.1), {'fast': 1, 'slow': period}).init({'fast': jnp.zeros(()), 'slow': jnp.zeros(())})


@pytest.mark.parametrize('tokens_per_step', [256, 1024, 4096])
def test_periods_in_tokens_are_kept_whatever_the_batch(x64, tokens_per_step):
    """Levels of 512, 2,048 and 16,384 tokens: each has taken an update for every period that is over, of the whole sum of gradients."""
    tokens = {'fast': 512, 'middle': 2048, 'slow': 16384}
    params, steps = make_params(jnp.float64), 2 * 16384 // tokens_per_step
    periods = {name: steps_of(period, tokens_per_step) for name, period in tokens.items()}
    gradients = make_gradients(steps, params)
    history, state = run(by_level(optax.sgd(0.1), periods), params, gradients)
    for name, period in tokens.items():
        every = max(period // tokens_per_step, 1)
        path = np.concatenate([params[name]['b'][None], history[name]['b']])
        moved = (path[1:] != path[:-1]).any(1)
        np.testing.assert_array_equal(moved, (np.arange(1, steps + 1) * tokens_per_step) % max(period, tokens_per_step) == 0)
        assert moved.sum() == steps * tokens_per_step // max(period, tokens_per_step)
        whole = np.asarray(gradients[name]['b']).reshape(-1, every, 2).sum(1)
        np.testing.assert_allclose(path[every::every], path[0] - 0.1 * np.cumsum(whole, 0), rtol=1e-11)


def test_a_period_that_steps_do_not_divide_is_rounded_up_to_steps():
    """5,000 tokens of batches of 2,048 are three steps, after 6,144 tokens: never before the period is over."""
    params = {'slow': jnp.zeros(())}
    history, _ = run(by_level(optax.sgd(1.0), {'slow': steps_of(5000, 2048)}), params, {'slow': jnp.ones(7)})
    np.testing.assert_array_equal(history['slow'], [0, 0, -3, -3, -3, -6, -6])


def test_steps_of_a_period_in_tokens():
    assert [steps_of(period, 2048) for period in (16, 2048, 2049, 16384)] == [1, 1, 2, 8]
    with pytest.raises(ValueError, match='tokens_per_step is 0'):
        steps_of(16, 0)
