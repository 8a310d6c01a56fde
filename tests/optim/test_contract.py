"""What optax expects of an optimizer, and what we add to it, for every optimizer of `nested_jax.optim`.

The checks up to `test_schedule_equals_constant` are those that optax's own tests make of its contributed optimizers.
"""

import doctest
import functools
import importlib
import inspect
import math
import pkgutil
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from orbax.checkpoint import v1 as ocp

import nested_jax.optim
from nested_jax.optim import (
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
    preconditioned_momentum,
    scale_by_learned_preconditioner,
)


class Case(NamedTuple):
    make: Callable[..., optax.GradientTransformation]  # of a learning rate, a number or a schedule
    learning_rate: float | None = 0.1  # that finds the minima of the targets below when it decays to zero; None if none does
    steps: int = 4000  # until it has


OPTIMIZERS = {
    'm3': Case(functools.partial(m3, periods=(3,)), 0.03),
    'by_level': Case(lambda learning_rate: by_level(muon(learning_rate), 2)),
    'delta_momentum': Case(functools.partial(delta_momentum, form='proximal'), 1e-3),
    'deep_momentum': Case(deep_momentum, 1e-4, 40_000),
}


def fixing(make, **arguments):
    """`optax.inject_hyperparams` takes functions for schedules and sizes for numbers that vary, so it must not see them."""
    return lambda learning_rate, mu_dtype=None: make(learning_rate, mu_dtype=mu_dtype, **arguments)


def are_matrices(params):
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


def exact_descent(learning_rate):
    """Exact delta gradient descent, which needs inputs: always the same, of every matrix."""
    optimizer = delta_gradient_descent(learning_rate)

    def inputs_of(leaf):
        shape = (*leaf.shape[:-2], 3, leaf.shape[-2])
        return jnp.sin(jnp.arange(math.prod(shape), dtype=leaf.dtype)).reshape(shape)

    def update(updates, state, params=None, **extra_args):
        inputs = jax.tree.map(lambda leaf: inputs_of(leaf) if leaf.ndim > 1 else None, updates)
        # Trees in a tuple, since of a single scalar they are None.
        (updates,), state = optimizer.update((updates,), state, (params,), inputs=(inputs,), **extra_args)
        return updates, state

    return optax.GradientTransformationExtraArgs(optimizer.init, update)


def log_cosh(prediction, gradient):
    return jnp.sum(jnp.log(jnp.cosh(prediction - gradient)))


VARIANTS = {
    'muon': Case(muon),
    'muon_rms': Case(functools.partial(muon, scaling='rms', nesterov=False, weight_decay=1e-4, adam_weight_decay=1e-4)),
    'm3_rms': Case(functools.partial(m3, periods=(2, 5), scaling='rms', method='polar_express')),
    'm3_literal': Case(functools.partial(m3, periods=(3,), literal=True), None),  # sums that never decay swing for ever
    'delta_momentum_printed': Case(delta_momentum, 1e-3),
    'delta_momentum_normalised': Case(functools.partial(delta_momentum, form='normalised'), 1e-3),
    'preconditioned_momentum': Case(preconditioned_momentum, 1e-4, 40_000),
    'nested': Case(lambda learning_rate: nested(muon(learning_rate), by_level(muon(learning_rate), 2), 2)),
    'feature_momentum': Case(feature_momentum, 1e-4, 40_000),
    'deep_momentum_l2': Case(functools.partial(deep_momentum, objective='l2', write_rate=0.1), 3e-3, 40_000),
    'delta_gradient_descent': Case(functools.partial(delta_gradient_descent, exact=False), 1e-3, 40_000),
    'delta_gradient_descent_exact': Case(exact_descent, None),  # inputs that never fade pull to zero
    'adam_as_memory': Case(adam_as_memory, 1e-3, 40_000),
    'adagrad_as_memory': Case(adagrad_as_memory, 1.0),
}
RARER = {
    'muon_plain': Case(functools.partial(muon, nesterov=False)),
    'muon_uncorrected': Case(functools.partial(muon, bias_correction=False)),
    'muon_moonshot': Case(functools.partial(muon, scaling='moonshot')),
    'muon_unscaled': Case(functools.partial(muon, scaling=None)),
    'muon_cubic': Case(functools.partial(muon, method='cubic')),
    'muon_exact': Case(functools.partial(muon, method='svd')),
    'm3_without_second_moment': Case(functools.partial(m3, b2=None, periods=(3,))),
    'm3_uncorrected': Case(functools.partial(m3, bias_correction=False, periods=(3,)), 0.03),
    'by_level_average': Case(lambda learning_rate: by_level(muon(learning_rate), 2, average=True)),
    'delta_momentum_preconditioned': Case(fixing(delta_momentum, preconditioner=jnp.tanh, form='proximal'), 1e-2),
    'delta_momentum_masked': Case(fixing(delta_momentum, mask=are_matrices), 1e-3),
    'preconditioned_momentum_given': Case(fixing(preconditioned_momentum, preconditioner=jnp.tanh), 1e-2),
    'preconditioned_momentum_identity': Case(functools.partial(preconditioned_momentum, preconditioner=None), 1e-3),
    'feature_momentum_function': Case(fixing(feature_momentum, feature=jnp.tanh), 1e-2),
    'feature_momentum_preconditioned': Case(fixing(feature_momentum, preconditioner=scale_by_learned_preconditioner()), 1e-4, 40_000),
    'deep_momentum_objective': Case(fixing(deep_momentum, objective=log_cosh, write_rate=0.1), 3e-3, 40_000),
    'deep_momentum_heavy_ball': Case(fixing(deep_momentum, hidden_size=0), 1e-3),
    'deep_momentum_network': Case(functools.partial(deep_momentum, linear=False), 1e-3, 40_000),
    'deep_momentum_sigma': Case(fixing(deep_momentum, sigma=jnp.tanh), 3e-3, 40_000),
    'adam_as_memory_square': Case(functools.partial(adam_as_memory, target='square'), 1e-3, 40_000),
}

DTYPES = [jnp.bfloat16, jnp.float64, *(pytest.param(dtype, marks=pytest.mark.slow) for dtype in (jnp.float16, jnp.float32))]


marked = lambda names, mark: [pytest.param(name, marks=mark) for name in names]


@pytest.fixture(params=[*OPTIMIZERS, *marked(VARIANTS, pytest.mark.slow), *marked(RARER, pytest.mark.exhaustive)])
def case(request):
    return (OPTIMIZERS | VARIANTS | RARER)[request.param]


def make_params(dtype=jnp.float32, seed=0):
    """A matrix, what is no matrix, and a leaf that is none."""
    draw = np.random.default_rng(seed).normal
    shapes = {'dense': {'kernel': (4, 6), 'bias': (6,)}, 'gain': ()}
    params = jax.tree.map(lambda shape: jnp.asarray(draw(size=shape), dtype), shapes, is_leaf=lambda leaf: isinstance(leaf, tuple))
    return {**params, 'absent': None}


def advance(optimizer, params, steps=4, state=None):
    """(parameters, updates, state) after some steps with drawn gradients, compiled and scanned."""

    def step(carry, seed):
        params, state = carry
        noise = jax.random.normal(jax.random.key(seed), (len(jax.tree.leaves(params)),))
        leaves, structure = jax.tree.flatten(params)
        gradients = structure.unflatten([leaf + number.astype(leaf.dtype) for leaf, number in zip(leaves, noise, strict=True)])
        updates, state = optimizer.update(gradients, state, params)
        return (optax.apply_updates(params, updates), state), updates

    scan = lambda params, state: jax.lax.scan(step, (params, state), jnp.arange(steps))
    (params, state), updates = jax.jit(scan)(params, optimizer.init(params) if state is None else state)
    return params, updates, state


def assert_close(actual, expected, rtol=1e-5, atol=1e-6):
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol=rtol, atol=atol), actual, expected)


def types(tree):
    return jax.tree.map(jax.typeof, tree)


def parabola():
    goal = jnp.array([1.0, -1.0, 1.0])
    return jnp.array([-1.0, 3.0, 1.0]), goal, lambda x: jnp.sum((x - goal) ** 2)


def rosenbrock():
    return jnp.zeros(2), jnp.ones(2), lambda x: (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2


def matrix_parabola():
    goal = jnp.array([[3.0, -2.0], [1.0, 4.0]])
    return jnp.zeros((2, 2)), goal, lambda x: jnp.sum((x - goal) ** 2)


def mixed():
    start, goal, loss = zip(parabola(), matrix_parabola(), strict=True)
    return start, goal, lambda pair: loss[0](pair[0]) + loss[1](pair[1])


@pytest.mark.parametrize(
    'target', [mixed, *(pytest.param(target, marks=pytest.mark.slow) for target in (parabola, rosenbrock, matrix_parabola))]
)
def test_finds_the_minimum(case, target):
    if case.learning_rate is None:
        pytest.skip('made for no minimum')
    start, goal, loss = target()
    optimizer = case.make(optax.linear_schedule(case.learning_rate, 0.0, case.steps))

    def step(carry, _):
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    (found, _), _ = jax.jit(lambda start: jax.lax.scan(step, (start, optimizer.init(start)), length=case.steps))(start)
    assert_close(found, goal, rtol=3e-2, atol=3e-2)


def test_unknown_extra_arguments_are_ignored_and_nothing_recompiles(case):
    params, optimizer = make_params(), case.make(0.1)
    step = jax.jit(lambda state: optimizer.update(params, state, params, an_argument_of_another_optimizer=1)[1])
    state = optimizer.init(params)
    for _ in range(3):
        state = step(state)
    assert step._cache_size() == 1


def test_map_params_finds_the_state_like_the_parameters(case):
    params, optimizer = make_params(), case.make(0.1)
    state = optimizer.init(params)
    assert jax.tree.structure(optax.tree.map_params(optimizer, lambda leaf: leaf, state)) == jax.tree.structure(state)
    shifted = optax.tree.map_params(optimizer, lambda leaf: leaf + 1, state)
    changed = [bool((old != new).any()) for old, new in zip(jax.tree.leaves(state), jax.tree.leaves(shifted), strict=True)]
    assert changed == [jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in jax.tree.leaves(state)]  # counts are not shifted


def test_injected_hyperparams_change_nothing(case, x64):
    """In float64: they come as arrays, and 1 - 0.999 in float32 is off by 5e-5 of itself."""
    injected = optax.inject_hyperparams(case.make)(learning_rate=0.1)
    (expected_params, _, expected), (params, _, state) = (advance(tx, make_params(jnp.float64)) for tx in (case.make(0.1), injected))
    assert_close(params, expected_params, rtol=1e-9, atol=1e-12)
    assert_close(state.inner_state, expected, rtol=1e-9, atol=1e-12)


# Arguments that stand for a shape, a period or a number of iterations.
INTEGERS = [(muon, 'ns_steps'), (m3, 'ns_steps'), (m3, 'periods'), (deep_momentum, 'hidden_size')]


@pytest.mark.parametrize(('make', 'name'), INTEGERS)
def test_integers_cannot_be_injected_and_say_so(make, name):
    params = make_params()
    given = dict(learning_rate=0.1) | {name: 3}
    injected = optax.inject_hyperparams(make)(**given)
    with pytest.raises(ValueError, match=rf'{name} is a traced value, .*static_args=\(\'{name}\',\) of optax.inject_hyperparams'):
        jax.jit(injected.update)(params, injected.init(params), params)
    static = optax.inject_hyperparams(make, static_args=(name,))(**given)
    assert_close(advance(static, params)[0], advance(make(**given), params)[0], rtol=1e-4)
    # Operation by operation the value is known.
    assert_close(
        injected.update(params, injected.init(params), params)[0], make(**given).update(params, make(**given).init(params), params)[0]
    )


@pytest.mark.parametrize('dtype', DTYPES)
def test_dtypes_and_types_are_stable(case, dtype):
    """Updates in the parameters' dtype; state of float32 at least, and of one type at `init`, after a step and through a cond."""
    with jax.enable_x64(dtype == jnp.float64):
        params, optimizer = make_params(dtype), case.make(0.1)
        state = optimizer.init(params)
        updates, after = jax.jit(optimizer.update)(params, state, params)
        assert types(after) == types(state)
        assert types(updates) == types(params)
        jax.jit(lambda yes: jax.lax.cond(yes, lambda: optimizer.update(params, state, params), lambda: (params, state)))(True)
        wide = jnp.promote_types(dtype, jnp.float32)
        floating = [leaf.dtype for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.floating)]
        assert all(jnp.promote_types(leaf, wide) == leaf for leaf in floating)


def test_mu_dtype_is_that_of_momentum(case):
    if 'mu_dtype' not in inspect.signature(case.make).parameters:
        pytest.skip('has no momentum of its own')
    params, optimizer = make_params(), case.make(0.1, mu_dtype=jnp.bfloat16)
    state = optimizer.init(params)
    updates, after = jax.eval_shape(optimizer.update, params, state, params)
    assert 'bfloat16' in {leaf.dtype.name for leaf in jax.tree.leaves(state)}
    same = lambda actual, expected: (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
    assert all(jax.tree.leaves(jax.tree.map(same, (updates, after), (params, state))))


@pytest.mark.parametrize('dtype', [jnp.bfloat16, pytest.param(jnp.float32, marks=pytest.mark.slow)])
def test_works_in_multi_steps(case, dtype):
    params = make_params(dtype)
    optimizer = optax.MultiSteps(case.make(0.1), every_k_schedule=4)
    updates, _ = jax.jit(optimizer.update)(params, optimizer.init(params), params)
    assert types(updates) == types(params)
    assert not any(leaf.any() for leaf in jax.tree.leaves(updates))


def test_schedule_equals_constant(case):
    constant, scheduled = (advance(case.make(rate), make_params())[0] for rate in (0.1, optax.constant_schedule(0.1)))
    assert_close(scheduled, constant)


def test_abstract_init(case):
    params, optimizer = make_params(), case.make(0.1)
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
    expected = types(optimizer.init(params))
    assert types(optimizer.init(abstract)) == expected
    assert types(jax.eval_shape(optimizer.init, abstract)) == expected


def test_vmap_of_init_and_update(case):
    optimizer, pair = case.make(0.1), [make_params(seed=seed) for seed in range(2)]
    batch = jax.tree.map(lambda *leaves: jnp.stack(leaves), *pair)
    step = lambda params, state: optimizer.update(params, state, params)
    updates, states = jax.jit(lambda batch: jax.vmap(step)(batch, jax.vmap(optimizer.init)(batch)))(batch)
    for index, params in enumerate(pair):
        expected = jax.jit(lambda params: step(params, optimizer.init(params)))(params)
        assert_close(jax.tree.map(lambda leaf, index=index: leaf[index], (updates, states)), expected, rtol=1e-4)


def test_works_under_a_mask(case):
    """Masked leaves pass through, the others are updated as if they were alone."""
    params = make_params()
    masked = optax.masked(case.make(0.1), {'dense': True, 'gain': False, 'absent': None})
    updates, _ = jax.jit(masked.update)(params, masked.init(params), params)
    alone = {'dense': params['dense']}
    expected, _ = jax.jit(case.make(0.1).update)(alone, case.make(0.1).init(alone), alone)
    assert_close(updates['dense'], expected['dense'], rtol=1e-4)
    np.testing.assert_array_equal(updates['gain'], params['gain'])


@pytest.mark.parametrize('params', [{}, {'a': None}, {'a': optax.MaskedNode(), 'b': jnp.ones((2, 2))}, jnp.ones(()), jnp.ones((0, 3))])
def test_odd_trees(case, params):
    optimizer = case.make(0.1)
    updates, state = jax.jit(optimizer.update)(params, optimizer.init(params), params)
    assert types(updates) == types(params)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves((updates, state)))


def test_state_can_be_donated(case):
    params, optimizer = make_params(), case.make(0.1)
    state = jax.tree.map(jnp.copy, optimizer.init(params))
    jax.jit(optimizer.update, donate_argnums=1)(params, state, params)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))


def test_state_comes_back_from_a_checkpoint(case, tmp_path):
    params, optimizer = make_params(), case.make(0.1)
    params, _, state = advance(optimizer, params)
    ocp.save(tmp_path / 'state', state)
    restored = ocp.load(tmp_path / 'state', jax.tree.map(ocp.arrays.to_shape_dtype_struct, state))
    assert_close(advance(optimizer, params, state=restored)[0], advance(optimizer, params, state=state)[0], rtol=0, atol=0)


def test_zero_gradients_give_finite_updates_and_meta_gradients(case):
    params = make_params()

    def outer(learning_rate, scale):
        optimizer = case.make(learning_rate)

        def step(carry, _):
            params, state = carry
            gradients = jax.tree.map(lambda leaf: scale * leaf, params)
            updates, state = optimizer.update(gradients, state, params)
            return (optax.apply_updates(params, updates), state), None

        (last, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), length=5)
        return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(last))

    value, gradients = jax.jit(jax.value_and_grad(outer, (0, 1)))(0.1, 0.0)
    assert jnp.isfinite(value) and all(map(jnp.isfinite, gradients))


def test_complex_parameters_are_refused(case):
    with pytest.raises(ValueError, match='parameter w has dtype complex64, allowed are real floating-point dtypes'):
        case.make(0.1).init({'w': jnp.ones((2, 2), jnp.complex64)})


def test_types_are_stable_on_an_explicit_mesh(case):
    """With every matrix axis sharded, where products of sharded axes are an error unless taken care of."""
    mesh = jax.make_mesh((2, 4), ('data', 'model'), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
    place = lambda x, *spec: jax.device_put(x, jax.NamedSharding(mesh, jax.P(*spec)))
    draw = np.random.default_rng(0).normal
    params = {'w': place(jnp.asarray(draw(size=(8, 16)), jnp.float16), 'data', 'model')}
    params['stack'] = place(jnp.asarray(draw(size=(2, 8, 16)), jnp.float16), None, 'data', 'model')
    params['bias'] = place(jnp.ones(8, jnp.float16), 'model')
    optimizer = case.make(0.1)
    with jax.set_mesh(mesh):
        state = optimizer.init(params)
        assert types(jax.jit(optimizer.init)(params)) == types(state)
        updates, after = jax.jit(optimizer.update)(params, state, params)
    assert types(after) == types(state)
    assert types(updates) == types(params)


@pytest.mark.parametrize('module', [module.name for module in pkgutil.iter_modules(nested_jax.optim.__path__)])
def test_examples_run(module):
    failures, _ = doctest.testmod(importlib.import_module(f'nested_jax.optim.{module}'))
    assert failures == 0


@pytest.mark.parametrize('name', nested_jax.optim.__all__)
def test_everything_public_has_an_example(name):
    assert any(test.examples for test in doctest.DocTestFinder(recurse=False).find(getattr(nested_jax.optim, name), name))


def test_updates_have_the_dtype_of_parameters_whatever_that_of_gradients(case):
    params, optimizer = make_params(jnp.bfloat16), case.make(0.1)
    gradients = optax.tree.cast(params, jnp.float32)
    updates = jax.eval_shape(optimizer.update, gradients, jax.eval_shape(optimizer.init, params), params)[0]
    assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype(jnp.bfloat16)}
