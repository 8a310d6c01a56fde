"""Refusals of arguments and parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nested_jax.optim.checks import as_integer, check_choice, check_decay, check_range, check_real


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


@pytest.mark.parametrize('value', [0, 1.0, True, '1', None, np.float32(2), np.bool_(True), np.array([1, 2]), jnp.asarray(1.0)])
def test_what_is_no_integer(value):
    with pytest.raises(ValueError, match='steps is .*, allowed is an integer of at least 1'):
        as_integer('steps', value, 1)


@pytest.mark.parametrize('value', [3, np.int32(3), np.array(3), jnp.asarray(3, jnp.uint8)])
def test_integers_of_any_library_become_ints(value):
    assert type(as_integer('steps', value, 3)) is int and as_integer('steps', value, 3) == 3
    with pytest.raises(ValueError, match='steps is .*3.*, allowed is an integer of at least 4'):
        as_integer('steps', value, 4)


def test_traced_integers_are_refused_with_what_to_do():
    message = r"steps is a traced value, allowed is an integer of at least 1 .*static_args=\('steps',\) of optax.inject_hyperparams"
    with pytest.raises(ValueError, match=message):
        jax.jit(lambda value: as_integer('steps', value, 1))(3)


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
