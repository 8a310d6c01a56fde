"""Checks of arguments and parameters, before any device work. All raise a `ValueError` with the name, the value and what is allowed."""

import math
import numbers
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

PyTree = Any


def check_range(name: str, value: Any, low: float, high: float = math.inf) -> None:
    """Refuses what is not a number from `low` to `high`. Arrays and schedules pass: their values may not be known yet."""
    if not (callable(value) or _is_array(value)) and not (isinstance(value, numbers.Real) and low <= value <= high):
        allowed = f'a number of at least {low}' if high == math.inf else f'a number from {low} to {high}'
        raise ValueError(f'{name} is {value!r}, allowed is {allowed}')


def check_decay(name: str, value: Any) -> None:
    """Refuses what is not a decay that averages, at least 0 and below 1. Arrays pass."""
    if not _is_array(value) and not (isinstance(value, numbers.Real) and 0 <= value < 1):
        raise ValueError(f'{name} is {value!r}, allowed is a number of at least 0 and below 1')


def as_integer(name: str, value: Any, low: int) -> int:
    """The value as an int. Refuses what is not an integer of at least `low`; what is traced is not known, and refused too."""
    if isinstance(value, jax.core.Tracer):
        raise ValueError(
            f'{name} is a traced value, allowed is an integer of at least {low} that is known when the program is compiled: name it '
            f"in static_args=('{name}',) of optax.inject_hyperparams, or in static_argnames of jax.jit"
        )
    try:
        number = None if isinstance(value, bool | np.bool_) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < low:
        raise ValueError(f'{name} is {value!r}, allowed is an integer of at least {low}')
    return number


def check_choice(name: str, value: Any, choices: tuple[str | None, ...]) -> None:
    """Refuses what is not one of the choices."""
    if value not in choices:
        raise ValueError(f'{name} is {value!r}, allowed is one of {", ".join(map(repr, choices))}')


def check_real(params: PyTree) -> None:
    """Refuses complex parameters, and integers."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            name = jax.tree_util.keystr(path, simple=True, separator='/')
            advice = ': see optax.contrib.split_real_and_imaginary' if jnp.issubdtype(leaf.dtype, jnp.complexfloating) else ''
            raise ValueError(f'parameter {name} has dtype {leaf.dtype}, allowed are real floating-point dtypes{advice}')


def _is_array(value: Any) -> bool:
    return isinstance(value, jax.Array | np.ndarray)
