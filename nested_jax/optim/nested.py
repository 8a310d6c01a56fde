r"""Nested levels across steps: parameters that start anew from an initial state which a slower level learns.

In the nested variant of the Continuum Memory System a level's initial state belongs to the next slower level, which learns it over its
own, longer context, and when that context is over the level returns to it (Eq. 72, arXiv:2512.24695v1):

.. math::
  \theta_0^{(s+1)} = \arg\min_\Phi \mathbb{E}_{T \sim C^{(s)}} \ell(\Theta, T; \Phi)

Here the initial state takes the gradients at the parameters as they are, which is first order: what happened to them since the last
restart counts as a constant that was added.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from nested_jax.optim.checks import as_integer

PyTree = Any


class NestedState(NamedTuple):
    """State of parameters of which some start anew."""

    count: jax.Array  # shape=(), dtype=int32: steps
    inner_state: optax.OptState
    initial: optax.Params  # of the parameters that start anew, float32 at least; `optax.MaskedNode` for the others
    initial_state: optax.OptState


def nested(
    inner: optax.GradientTransformation, initial: optax.GradientTransformation, restarts: PyTree | Callable[[str], int]
) -> optax.GradientTransformationExtraArgs:
    """Let parameters start anew, every so many steps, from an initial state that another optimizer learns.

    Args:
        inner: updates all parameters, learning rate included; its own state goes on.
        initial: updates the initial states of those that start anew, learning rate included; `by_level` gives it the slower period.
        restarts: steps between two restarts, 0 for parameters that never do: a pytree of integers that is a prefix of the parameters', or
            a function of a parameter's path, such as 'blocks/channel/level_1/up'.

    Returns:
        The transformation, whose update needs the parameters. A restart lands on the initial state but for the rounding of one addition
        in the parameters' dtype.

    Raises:
        ValueError: at `init`, if a number of steps is not an integer of at least 0; at `update`, without parameters.

    Examples:
        >>> optimizer = nested(optax.sgd(0.5), optax.sgd(0.0), 2)
        >>> params = jnp.ones(())
        >>> state = optimizer.init(params)
        >>> for _ in range(3):
        ...     updates, state = optimizer.update(jnp.ones(()), state, params)
        ...     params = optax.apply_updates(params, updates)
        ...     print(float(params))
        0.5
        1.0
        0.5

    References:
        Behrouz et al., `Nested Learning <https://arxiv.org/abs/2512.24695>`_, 2025, section 7.1
    """
    inner, initial = optax.with_extra_args_support(inner), optax.with_extra_args_support(initial)

    def init_fn(params):
        start = _masked(jax.tree.map(_copy, params), restarts)
        return NestedState(jnp.zeros((), jnp.int32), inner.init(params), start, initial.init(start))

    def update_fn(updates, state, params=None, **extra_args):
        if params is None:
            raise ValueError('params is None, allowed are the parameters, which start anew from where they are')
        count = optax.safe_increment(state.count)
        moves, initial_state = initial.update(_masked(updates, restarts), state.initial_state, state.initial, **extra_args)
        start = optax.apply_updates(state.initial, moves)
        updates, inner_state = inner.update(updates, state.inner_state, params, **extra_args)
        back = functools.partial(_back, count)
        updates = jax.tree.map(back, _restarts_of(updates, restarts), updates, params, start)
        return updates, NestedState(count, inner_state, start, initial_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _back(count: jax.Array, every: int, update: jax.Array, param: jax.Array, start: jax.Array | optax.MaskedNode) -> jax.Array:
    """The update of a leaf, or when it is due the way back to its initial state."""
    return jnp.where(count % every == 0, (start - param.astype(start.dtype)).astype(update.dtype), update) if every else update


def _copy(leaf: jax.Array) -> jax.Array:
    """Another buffer, for steps that donate parameters and state; of an abstract array zeros, as optax's states have."""
    dtype = jnp.promote_types(leaf.dtype, jnp.float32)
    return jnp.zeros_like(leaf, dtype) if isinstance(leaf, jax.ShapeDtypeStruct) else jnp.array(leaf, dtype)


def _masked(tree: PyTree, restarts: PyTree | Callable[[str], int]) -> PyTree:
    """The tree without what never starts anew."""
    return jax.tree.map(lambda every, leaf: leaf if every else optax.MaskedNode(), _restarts_of(tree, restarts), tree)


def _restarts_of(tree: PyTree, restarts: PyTree | Callable[[str], int]) -> PyTree:
    """Steps between two restarts of each leaf."""
    if callable(restarts):
        named = lambda path, _: restarts(jax.tree_util.keystr(path, simple=True, separator='/'))
        every = jax.tree_util.tree_map_with_path(named, tree)
    else:
        every = jax.tree.map(lambda steps, part: jax.tree.map(lambda _: steps, part), restarts, tree)
    for path, steps in jax.tree_util.tree_leaves_with_path(every):
        as_integer(f'restarts at {jax.tree_util.keystr(path)}', steps, 0)
    return every
