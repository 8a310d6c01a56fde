"""A second opinion: the tests that optax ships for its contributed optimizers, run as they are with ours in their places.

`test_contract.py` holds our own checks. Here the module of optax's tests is executed with two of its definitions exchanged, the list of
optimizers and the function that finds one by name, before its class of tests is made from them.
"""

import ast
import functools
import importlib.util
import pathlib
import types
import unittest

import optax
import pytest

from nested_jax import optim

STEPS = 30_000  # of optax's tests of convergence
# name -> factory with what optax's tests set, a learning rate, and the one at which it comes to their minima in 30,000 steps. Arguments
# that stand for a shape cannot be injected, and optax's list of those has not ours.
OURS = {
    'muon': (optim.muon, 1e-2),
    # Orthogonalised steps do not shrink: at a constant rate they circle the minimum at a distance of 0.25, so the rate goes down.
    'm3': (lambda learning_rate: optim.m3(optax.linear_schedule(learning_rate, 0.0, STEPS)), 1e-2),
    'by_level': (lambda learning_rate: optim.by_level(optim.muon(learning_rate), 2), 1e-2),
    'delta_momentum': (functools.partial(optim.delta_momentum, form='proximal'), 1e-3),
    'delta_momentum_normalised': (functools.partial(optim.delta_momentum, form='normalised'), 1e-3),
    'preconditioned_momentum': (optim.preconditioned_momentum, 3e-4),
    'feature_momentum': (optim.feature_momentum, 3e-4),
    'deep_momentum': (lambda learning_rate: optim.deep_momentum(learning_rate), 3e-4),
    'delta_gradient_descent': (functools.partial(optim.delta_gradient_descent, exact=False), 1e-3),
    'adam_as_memory': (optim.adam_as_memory, 1e-2),
    'adagrad_as_memory': (optim.adagrad_as_memory, 1.0),
}
EXCHANGED = ('_MAIN_OPTIMIZERS_UNDER_TEST', '_ALL_OPTIMIZERS_UNDER_TEST', '_get_opt_factory')
SHIPPED = pathlib.Path(importlib.util.find_spec('optax.contrib').origin).parent / '_common_test.py'
pytestmark = pytest.mark.slow
if not SHIPPED.exists():
    pytest.skip('this release of optax comes without its tests', allow_module_level=True)


def optax_tests() -> type[unittest.TestCase]:
    """optax's class of tests for the optimizers above."""
    body = ast.parse(SHIPPED.read_text()).body
    place = next(index for index, node in enumerate(body) if isinstance(node, ast.ClassDef))
    exchange = ast.parse('\n'.join(f'{name} = exchanged[{name!r}]' for name in EXCHANGED)).body
    entries = [dict(opt_name=name, opt_kwargs=dict(learning_rate=rate), wrapper_name=None) for name, (_, rate) in OURS.items()]
    alone = tuple(entry | dict(wrapper_kwargs=None) for entry in entries)
    module = types.ModuleType('optax_common_test')
    vars(module)['exchanged'] = dict(zip(EXCHANGED, (alone, alone, lambda name: OURS[name][0]), strict=True))
    exec(compile(ast.Module([*body[:place], *exchange, body[place]], []), str(SHIPPED), 'exec'), vars(module))
    return module.ContribTest


TestOptaxContract = optax_tests()
