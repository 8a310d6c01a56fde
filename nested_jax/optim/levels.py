"""A period for each level of the parameters: the Continuum Memory System across steps (Eq. 71, arXiv:2512.24695v1).

The inner optimizer's state (moments, step count) advances with its updates and not in between. A parameter of period 1 is updated as by
the inner optimizer alone, to the bit. Parameters of one period share one inner optimizer, so one that looks across parameters (clipping
by global norm, for one) sees those of its own period only: chain it before `by_level` to have it see all.

Weight decay is applied once an update. A schedule inside counts a level's own updates: give a function of the period, and pass its
schedules through `stretch`, to have them follow the global step. Extra arguments of `update` that reach it are those of the step that
updates: the inputs that delta gradient descent takes, for one, and not the sum of a period's.

The inner update runs under one `jax.lax.cond` for each period above 1: the steps in between cost an addition, whatever the optimizer
does (Newton-Schulz, say). That is lost under a `jax.vmap` over states, whose counts may differ: it computes every update every step.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from nested_jax.optim.checks import as_integer
from nested_jax.optim.matrices import zeros_for

PyTree = Any
Inner = optax.GradientTransformation | Callable[[int], optax.GradientTransformation]


@dataclasses.dataclass(frozen=True)
class Level:
    """A period and the name of one of several inner optimizers; a leaf of a pytree of periods.

    Examples:
        The slow one every 16,384 tokens of batches of 2,048:

        >>> several = {'sgd': optax.sgd(0.5), 'adam': optax.adam(1e-3)}
        >>> optimizer = by_level(several, {'fast': Level(1, 'sgd'), 'slow': Level(steps_of(16384, 2048), 'adam')})
        >>> sorted(optimizer.init({'fast': jnp.ones(2), 'slow': jnp.ones(2)}).inner_states)
        ['adam_every_8', 'sgd_every_1']
    """

    period: int
    optimizer: str


Periods = PyTree | Callable[[str], int | Level]


class LevelState(NamedTuple):
    """State of the parameters that are updated every n-th step."""

    count: jax.Array  # shape=(), dtype=int32: steps since the last update
    sums: optax.Updates  # of the gradients since the last update; shaped like the parameters, float32 at least
    inner_state: optax.OptState  # advances once an update


def by_level(inner: Inner | Mapping[str, Inner], periods: Periods, *, average: bool = False) -> optax.GradientTransformationExtraArgs:
    r"""Update each level of the parameters at its own frequency, with any optimizer.

    A parameter of period :math:`n` keeps still for :math:`n - 1` steps while its gradients are summed, and every :math:`n`-th step takes
    one update of the inner optimizer with the sum. With gradient descent that is Eq. (71):

    .. math::
      \theta_{i+1} = \theta_i - \begin{cases}
        \eta \sum_{t=i-n+1}^{i} \nabla L_t & \text{if } i \equiv 0 \bmod n \\
        0 & \text{otherwise} \end{cases}

    The module's docstring says what the inner optimizer sees, and when.

    Args:
        inner: the optimizer, or a function from a level's period to its optimizer; or several by name, for periods given as `Level`.
        periods: steps between two updates: a pytree of integers that is a prefix of the parameters', or a function of a parameter's path,
            such as 'blocks/channel/level_1/up'. `optax.tree.map_params` needs the pytree. `Level(period, name)` in place of an integer
            chooses among several optimizers. For a period in tokens, `steps_of` gives the steps.
        average: hand on the mean of a period's gradients, not their sum.

    Returns:
        The transformation. Its state is optax's for `partition`, under the keys 'every_<n>' or '<name>_every_<n>', with a `LevelState`
        for n above 1.

    Raises:
        ValueError: at `init`, if a period is not an integer of at least 1, or no optimizer has the name.

    Examples:
        >>> import jax.numpy as jnp, optax
        >>> optimizer = by_level(optax.sgd(0.5), {'fast': 1, 'slow': 2})
        >>> params = {'fast': jnp.ones(()), 'slow': jnp.ones(())}
        >>> state = optimizer.init(params)
        >>> for _ in range(2):
        ...     updates, state = optimizer.update(params, state, params)
        ...     print(float(updates['fast']), float(updates['slow']))
        -0.5 0.0
        -0.5 -1.0

    References:
        Behrouz et al., `Nested Learning <https://arxiv.org/abs/2512.24695>`_, 2025, section 7.1
    """
    inners = inner if isinstance(inner, Mapping) else {None: inner}

    def partitioned(tree):
        levels = _periods_of(tree, periods, inners)
        transforms = {_label(level): _transform(level, inners, average) for level in jax.tree.leaves(levels)}
        return optax.partition(transforms, jax.tree.map(_label, levels))

    def init_fn(params):
        return partitioned(params).init(params)

    def update_fn(updates, state, params=None, **extra_args):
        return partitioned(updates).update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def summed(inner: optax.GradientTransformation, period: int, *, average: bool = False) -> optax.GradientTransformationExtraArgs:
    """Hand `inner` the sum, or the average, of every `period` gradients, with zero updates in between.

    `optax.MultiSteps` gives the same numbers, and runs the inner optimizer at every step.

    Args:
        inner: the optimizer.
        period: steps between two updates; 1 returns `inner` itself.
        average: divide the sum by the period.

    Returns:
        The transformation, with a `LevelState` where the period is above 1.
    """
    inner = optax.with_extra_args_support(inner)
    if period == 1:
        return inner

    def init_fn(params):
        return LevelState(jnp.zeros((), jnp.int32), zeros_for(params), inner.init(params))

    def update_fn(updates, state, params=None, **extra_args):
        sums = jax.tree.map(lambda total, gradient: total + gradient.astype(total.dtype), state.sums, updates)

        def step(sums, inner_state):
            share = 1 / period if average else 1
            gradients = jax.tree.map(lambda total, gradient: (share * total).astype(gradient.dtype), sums, updates)
            new_updates, inner_state = inner.update(gradients, inner_state, params, **extra_args)
            return new_updates, LevelState(jnp.zeros_like(state.count), jax.tree.map(jnp.zeros_like, sums), inner_state)

        def wait(sums, inner_state):
            like = jax.eval_shape(step, sums, inner_state)[0]
            zeros = jax.tree.map(lambda gradient, out: jnp.zeros_like(gradient, dtype=out.dtype), updates, like)
            return zeros, LevelState(state.count + 1, sums, inner_state)

        return jax.lax.cond(state.count == period - 1, step, wait, sums, state.inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def stretch(schedule: optax.ScalarOrSchedule, period: int) -> optax.ScalarOrSchedule:
    """A schedule of a level's updates that follows one of global steps.

    The k-th update of a level, counted from 0, falls on global step k * period + period - 1.

    Args:
        schedule: of global steps, or a constant.
        period: steps between two updates of the level.

    Examples:
        >>> stretch(lambda step: step, 4)(0), stretch(lambda step: step, 4)(1), stretch(0.1, 4)
        (3, 7, 0.1)
    """
    if not callable(schedule):
        return schedule
    return lambda count: schedule(count * period + period - 1)


def steps_of(period: int, tokens_per_step: int) -> int:
    """Steps that make up a period given in tokens, rounded up: a period within one step is a step.

    Args:
        period: tokens between two updates of a level.
        tokens_per_step: of the whole batch.

    Raises:
        ValueError: if either is not an integer of at least 1.

    Examples:
        >>> steps_of(512, 2048), steps_of(16384, 2048), steps_of(5000, 2048)
        (1, 8, 3)
    """
    return -(-as_integer('period', period, 1) // as_integer('tokens_per_step', tokens_per_step, 1))


def _transform(level: int | Level, inners: Mapping[str | None, Inner], average: bool) -> optax.GradientTransformation:
    inner, period = inners[_name(level)], _steps(level)
    return summed(inner(period) if callable(inner) else inner, period, average=average)


def _steps(level: int | Level) -> int:
    return level.period if isinstance(level, Level) else level


def _name(level: int | Level) -> str | None:
    return level.optimizer if isinstance(level, Level) else None


def _label(level: int | Level) -> str:
    return f'{level.optimizer}_every_{level.period}' if isinstance(level, Level) else f'every_{level}'


def _periods_of(tree: PyTree, periods: Periods, inners: Mapping[str | None, Inner]) -> PyTree:
    """The period of each leaf. Of a tree without leaves, such as the placeholder of `optax.tree.map_params`, the periods as given."""
    if callable(periods):
        named = lambda path, _: periods(jax.tree_util.keystr(path, simple=True, separator='/'))
        return _checked(jax.tree_util.tree_map_with_path(named, tree), inners)
    _checked(periods, inners)
    if not jax.tree.leaves(tree):
        return periods
    # One for each leaf: masks inside the inner optimizer are trees like the parameters, and would not fit a subtree masked as one.
    return jax.tree.map(lambda period, part: jax.tree.map(lambda _: period, part), periods, tree)


def _checked(levels: PyTree, inners: Mapping[str | None, Inner]) -> PyTree:
    for path, level in jax.tree_util.tree_leaves_with_path(levels):
        where = jax.tree_util.keystr(path)
        as_integer(f'periods at {where}', _steps(level), 1)
        if _name(level) not in inners:
            allowed = 'an integer, for the one optimizer' if None in inners else f'a Level with one of {sorted(inners)}'
            raise ValueError(f'periods at {where} is {level!r}, allowed is {allowed}')
    return levels
