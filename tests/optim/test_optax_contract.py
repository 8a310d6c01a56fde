"""A second opinion: the tests that optax ships for its contributed optimizers, run as they are with ours in their places.

`test_contract.py` holds our own checks. Here the module of optax's tests is executed with two of its definitions exchanged, the list of
optimizers and the function that finds one by name, before its class of tests is made from them.
"""

import ast
import functools
import importlib.util
import pathlib
import re
import types
import unittest

import jax
import jax.numpy as jnp
import optax
import pytest

from nested_jax import optim

STEPS = 30_000  # of optax's tests of convergence


def decayed(make, **arguments):
    """Steps that are orthogonalised, or divided by what shrinks as they do, circle the minimum at a constant rate: it goes down."""
    return lambda learning_rate: make(optax.linear_schedule(learning_rate, 0.0, STEPS), **arguments)


def fixing(make, **arguments):
    """`optax.inject_hyperparams` takes functions for schedules and sizes for numbers that vary, so it must not see them."""

    def factory(learning_rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
        return make(learning_rate, **arguments)

    return factory


def muon_every_two_steps(learning_rate, average=False):
    return optim.by_level(optim.muon(learning_rate), 2, average=average)


def nested_every_two_steps(learning_rate):
    return optim.nested(optim.muon(learning_rate), muon_every_two_steps(learning_rate), 2)


def are_matrices(params):
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


def log_cosh(prediction, gradient):
    return jnp.sum(jnp.log(jnp.cosh(prediction - gradient)))


# name -> factory with what optax's tests set, a learning rate, and the one at which it comes to their minima in 30,000 steps.
OURS = {
    'muon': (optim.muon, 1e-2),
    'm3': (decayed(optim.m3), 1e-2),
    'by_level': (fixing(muon_every_two_steps), 1e-2),
    'nested': (fixing(nested_every_two_steps), 1e-2),
    'delta_momentum': (functools.partial(optim.delta_momentum, form='proximal'), 1e-3),
    'preconditioned_momentum': (optim.preconditioned_momentum, 3e-4),
    'feature_momentum': (optim.feature_momentum, 3e-4),
    'deep_momentum': (optim.deep_momentum, 3e-4),
    'delta_gradient_descent': (functools.partial(optim.delta_gradient_descent, exact=False), 1e-3),
    'adam_as_memory': (optim.adam_as_memory, 1e-2),
    'adagrad_as_memory': (optim.adagrad_as_memory, 1.0),
}
BRANCHES = {
    'muon_plain': (functools.partial(optim.muon, nesterov=False), 3e-3),
    'muon_uncorrected': (functools.partial(optim.muon, bias_correction=False), 1e-2),
    'muon_moonshot': (functools.partial(optim.muon, scaling='moonshot'), 1e-2),
    'muon_rms': (functools.partial(optim.muon, scaling='rms'), 1e-2),
    'muon_unscaled': (functools.partial(optim.muon, scaling=None), 1e-2),
    'muon_cubic': (functools.partial(optim.muon, method='cubic'), 1e-2),
    'muon_polar_express': (functools.partial(optim.muon, method='polar_express'), 1e-2),
    'muon_exact': (functools.partial(optim.muon, method='svd'), 1e-2),
    'm3_three_scales': (decayed(optim.m3, periods=(2, 5)), 1e-2),
    'm3_without_second_moment': (decayed(optim.m3, b2=None, periods=(10,)), 1e-2),
    'm3_uncorrected': (decayed(optim.m3, bias_correction=False), 1e-2),
    'm3_rms': (decayed(optim.m3, scaling='rms'), 1e-2),
    'by_level_average': (fixing(muon_every_two_steps, average=True), 1e-2),
    'delta_momentum_printed': (optim.delta_momentum, 1e-3),
    'delta_momentum_normalised': (functools.partial(optim.delta_momentum, form='normalised'), 1e-3),
    'delta_momentum_preconditioned': (fixing(optim.delta_momentum, preconditioner=jnp.tanh, form='proximal'), 3e-3),
    'delta_momentum_masked': (fixing(optim.delta_momentum, mask=are_matrices), 1e-3),
    'preconditioned_momentum_given': (fixing(optim.preconditioned_momentum, preconditioner=jnp.tanh), 3e-3),
    'preconditioned_momentum_identity': (functools.partial(optim.preconditioned_momentum, preconditioner=None), 1e-4),
    'feature_momentum_function': (fixing(optim.feature_momentum, feature=jnp.tanh), 3e-3),
    'feature_momentum_preconditioned': (
        fixing(optim.feature_momentum, preconditioner=optim.scale_by_learned_preconditioner()), 3e-4
    ),
    'deep_momentum_l2': (functools.partial(optim.deep_momentum, objective='l2', write_rate=0.1), 3e-3),
    'deep_momentum_objective': (fixing(optim.deep_momentum, objective=log_cosh, write_rate=0.1), 3e-3),
    'deep_momentum_heavy_ball': (fixing(optim.deep_momentum, hidden_size=0), 3e-4),
    'deep_momentum_network': (functools.partial(optim.deep_momentum, linear=False), 3e-4),
    'deep_momentum_sigma': (fixing(optim.deep_momentum, sigma=jnp.tanh), 2e-3),
    'adam_as_memory_square': (functools.partial(optim.adam_as_memory, target='square'), 1e-3),
}  # fmt: skip
# Sums that never decay swing for ever: all of optax's tests but those of convergence.
SWINGING = {'m3_literal': (functools.partial(optim.m3, literal=True, periods=(3,)), 1e-2)}
EXCHANGED = ('_MAIN_OPTIMIZERS_UNDER_TEST', '_ALL_OPTIMIZERS_UNDER_TEST', '_get_opt_factory')
SHIPPED = pathlib.Path(importlib.util.find_spec('optax.contrib').origin).parent / '_common_test.py'
pytestmark = pytest.mark.slow
if not SHIPPED.exists():
    pytest.skip('this release of optax comes without its tests', allow_module_level=True)


def optax_tests(ours: dict, *, converging: bool = True) -> type[unittest.TestCase]:
    """optax's class of tests for these optimizers."""
    body = ast.parse(SHIPPED.read_text()).body
    place = next(index for index, node in enumerate(body) if isinstance(node, ast.ClassDef))
    exchange = ast.parse('\n'.join(f'{name} = exchanged[{name!r}]' for name in EXCHANGED)).body
    entries = [dict(opt_name=name, opt_kwargs=dict(learning_rate=rate), wrapper_name=None) for name, (_, rate) in ours.items()]
    alone = tuple(entry | dict(wrapper_kwargs=None) for entry in entries)
    module = types.ModuleType('optax_common_test')
    vars(module)['exchanged'] = dict(zip(EXCHANGED, (alone, alone, lambda name: ours[name][0]), strict=True))
    exec(compile(ast.Module([*body[:place], *exchange, body[place]], []), str(SHIPPED), 'exec'), vars(module))
    for name in [] if converging else [name for name in vars(module.ContribTest) if re.fullmatch(r'test_optimizers\d+', name)]:
        delattr(module.ContribTest, name)
    return module.ContribTest


TestOptaxContract = optax_tests(OURS)
TestOptaxContractOfBranches = pytest.mark.exhaustive(optax_tests(BRANCHES))
TestOptaxContractButForConvergence = optax_tests(SWINGING, converging=False)
