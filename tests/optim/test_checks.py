"""Refusals of arguments and parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nested_jax.optim.checks import check_choice, check_decay, check_integer, check_range, check_real


@pytest.mark.parametrize('value', [0, 1, 0.5, np.float32(0.5), np.asarray(0.5), jnp.asarray(2.0), lambda count: 2.0])
def test_numbers_in_range_arrays_and_schedules_pass(value):
    check_range('decay', value, 0, 1)


@pytest.mark.parametrize('value', [-0.1, 1.1, np.float32(1.5), float('nan'), None, 'x'])
def test_numbers_out_of_range_do_not(value):
    with pytest.raises(ValueError, match='decay is .*, allowed is a number from 0 to 1'):
        check_range('decay', value, 0, 1)
    with pytest.raises(ValueError, match='decay is .*, allowed is a number of at least 0 and below 1'):
        check_decay('decay', value)


def test_one_side_may_be_open():
    check_range('rate', 1e9, 0)
    check_decay('b1', 0)
    with pytest.raises(ValueError, match='rate is -1, allowed is a number of at least 0'):
        check_range('rate', -1, 0)
    with pytest.raises(ValueError, match='b1 is 1, allowed is a number of at least 0 and below 1'):
        check_decay('b1', 1)


@pytest.mark.parametrize('value', [0, 1.0, True, '1', None])
def test_integers(value):
    check_integer('steps', 1, 1)
    with pytest.raises(ValueError, match='steps is .*, allowed is an integer of at least 1'):
        check_integer('steps', value, 1)


def test_choices():
    check_choice('form', None, ('a', None))
    with pytest.raises(ValueError, match="form is 'b', allowed is one of 'a', None"):
        check_choice('form', 'b', ('a', None))


def test_parameters_are_real():
    check_real({'a': jnp.ones(2, jnp.bfloat16), 'b': jax.ShapeDtypeStruct((2,), jnp.float64), 'none': None})
    with pytest.raises(ValueError, match='parameter a/b has dtype complex64, allowed are real floating-point dtypes: see optax'):
        check_real({'a': {'b': jnp.ones(2, jnp.complex64)}})
    with pytest.raises(ValueError, match='parameter a has dtype int32, allowed are real floating-point dtypes$'):
        check_real({'a': jnp.ones(2, jnp.int32)})
