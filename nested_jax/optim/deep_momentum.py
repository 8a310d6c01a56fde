r"""Deep momentum gradient descent (DMGD): momentum as a network that is trained on the gradients (Eq. 50, 52, arXiv:2512.24695v1).

With u the current gradient, each of whose rows is a key,

.. math::
  m \leftarrow \alpha m - \eta \nabla_m \tilde L(m; u), \qquad \text{update} = \sigma(m(u)), \qquad
  m(u) = T + s \, W_2^\top \tanh(W_1^\top \bar u) / \sqrt h, \qquad \bar u = u / s,

where s is the root mean square norm of the rows, so that the step keeps the gradient's scale. The objective is 'dot',
:math:`-\langle m(u), u \rangle`, or 'l2', :math:`\frac12 \lVert m(u) - u \rVert^2`.

The linear part T takes no key (it is "value-less": its read is itself). With the dot product it is written as
:math:`T \leftarrow \alpha T + \eta u`: alone it is heavy ball, and with a Newton-Schulz iteration as sigma Muon without Nesterov. The two
layers add a function of the current gradient, learned from the past ones; a multiple of u there would be Nesterov's step.

Readings of the paper: Eq. (50) prints a value of ones, Eq. (52) the identity. Under the latter a linear memory collects the sum of the
gradients, which is the read that fits the weights; a network's read has the weights' shape if the value is the gradient, as here. The
sign follows optax: the memory holds the step before its negative learning rate.

What keeps it bounded: keys of unit size, errors of at most unit size, tanh, and for each layer a rate :math:`\eta / (1 + \eta \kappa)` with
its curvature :math:`\kappa`, the mean squared norm of the hidden layer or the squared norm of W_2 over h. The first layer decays towards
its initial value and not to zero, where two layers would stay for ever.

State: one memory for each matrix, 2 * out * h numbers with h = min(hidden_size, in / 2) and at least 1. That is 512 * out bytes at
h = 64 in float32, and no more than the matrix has from two rows on. The linear part adds in * out. Under an Explicit mesh the memory's
long axis is sharded as the leaf's last. Time: 12 * in * out * h operations a step, with 'l2' 14.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike

from nested_jax.optim.checks import as_integer, check_choice, check_range, check_real
from nested_jax.optim.matrices import (
    Mask,
    as_matrix,
    divide,
    map_step,
    matrix_shape,
    root,
    widened,
    with_learning_rate,
    working_dtype,
)
from nested_jax.optim.sharding import placed_like

PyTree = Any
Objective = Callable[[jax.Array, jax.Array], jax.Array]

HIDDEN_SIZE = 64
OBJECTIVES: dict[str, Objective] = {
    'dot': lambda prediction, gradient: -jnp.sum(prediction * gradient),
    'l2': lambda prediction, gradient: 0.5 * jnp.sum(jnp.square(prediction - gradient)),
}


class DeepMemory(NamedTuple):
    """The memory of one leaf (..., in, out); dtype=mu_dtype or float32 at least."""

    trace: jax.Array | None  # the linear part, shaped like the leaf; None without it
    first: jax.Array | None  # shape=(..., out, hidden); None where hidden is 0
    second: jax.Array | None  # shape=(..., hidden, out); None where hidden is 0


class DeepMomentumState(NamedTuple):
    """State of `scale_by_deep_momentum`."""

    seed: jax.Array  # shape=(), dtype=uint32: of the first layers' initial values, towards which they decay
    memory: PyTree  # a DeepMemory for each leaf of the parameters


def scale_by_deep_momentum(
    hidden_size: int | None = None,
    decay: ArrayLike = 0.9,
    write_rate: ArrayLike = 1.0,
    objective: str | Objective = 'dot',
    sigma: Callable[[jax.Array], jax.Array] | None = None,
    mu_dtype: DTypeLike | None = None,
    *,
    linear: bool = True,
    seed: int = 0,
) -> optax.GradientTransformation:
    """Momentum kept in a memory that each step is written by gradient descent and then read: see the module's docstring.

    Args:
        hidden_size: h at most, by default 64; 0 leaves the linear part alone.
        decay: alpha, from 0 to 1.
        write_rate: eta. With 'l2' the linear part is stable up to 1 + decay, and averages only for a small rate, such as 0.1.
        objective: 'dot', 'l2', or a function of (prediction, gradient) to a scalar, summed over both arrays' elements.
        sigma: applied to what is read, arrays (..., in, out); by default nothing. `orthogonalize` gathers nothing on Explicit meshes; on
            Auto ones chain `orthogonalize_tree` (nested_jax.optim.orthogonalize) with the parameters' `shardings` in its place.
        mu_dtype: of the memory; by default the parameters', and float32 at least.
        linear: keep the linear part, which is what averages over steps.
        seed: of the first layers' initial values.

    Returns:
        The transformation. A vector is one row, a scalar a row of one.

    Raises:
        ValueError: if an argument is not allowed, or, at `init`, on parameters that are not real.

    Examples:
        >>> import jax.numpy as jnp
        >>> optimizer = scale_by_deep_momentum(hidden_size=0, decay=0.5)
        >>> _, state = optimizer.update(jnp.ones(2), optimizer.init(jnp.ones(2)))
        >>> print(optimizer.update(jnp.ones(2), state)[0])
        [1.5 1.5]

    References:
        Behrouz et al., `Nested Learning <https://arxiv.org/abs/2512.24695>`_, 2025, Eq. (50), (52)
    """
    hidden = HIDDEN_SIZE if hidden_size is None else as_integer('hidden_size', hidden_size, 0 if linear else 1)
    _check(decay, write_rate, objective)
    step = functools.partial(_step, loss=OBJECTIVES.get(objective, objective))

    def init_fn(params):
        check_real(params)
        memory = jax.tree.map(lambda leaf: _initial_memory(leaf, hidden, mu_dtype or working_dtype(leaf), linear, seed), params)
        return DeepMomentumState(jnp.asarray(seed, jnp.uint32), memory)

    def update_fn(updates, state, params=None):
        del params
        read, memory = map_step(step, updates, state.memory, scalars=(state.seed, decay, write_rate))
        applied = lambda leaf: leaf if sigma is None else sigma(as_matrix(leaf)).reshape(leaf.shape)
        updates = jax.tree.map(lambda leaf, gradient: applied(leaf).astype(gradient.dtype), read, updates)
        return updates, DeepMomentumState(state.seed, memory)

    return optax.GradientTransformation(init_fn, update_fn)


def deep_momentum(
    learning_rate: optax.ScalarOrSchedule,
    hidden_size: int | None = None,
    decay: ArrayLike = 0.9,
    write_rate: ArrayLike = 1.0,
    objective: str | Objective = 'dot',
    sigma: Callable[[jax.Array], jax.Array] | None = None,
    weight_decay: ArrayLike = 0.0,
    weight_decay_mask: Mask = None,
    mu_dtype: DTypeLike | None = None,
    *,
    linear: bool = True,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Deep momentum gradient descent (DMGD): the module's docstring has the equations, the state's size and the cost.

    Args:
        learning_rate: a constant or a schedule.
        hidden_size: of the memory's hidden layer, at most, by default 64; 0 for heavy ball.
        decay: alpha, from 0 to 1.
        write_rate: the inner learning rate.
        objective: 'dot', 'l2', or a function of (prediction, gradient) to a scalar.
        sigma: applied to what is read, arrays (..., in, out); by default nothing.
        weight_decay: decoupled, times the learning rate.
        weight_decay_mask: tree of booleans, or a function of the parameters to one: where weight decay acts.
        mu_dtype: of the memory; by default the parameters', and float32 at least.
        linear: keep the linear part of the memory.
        seed: of the memory's initial values.

    Returns:
        The optimizer. `optax.inject_hyperparams` takes every number for one that may vary: name `hidden_size` in its `static_args`
        where it is given.

    Examples:
        >>> import jax, jax.numpy as jnp, optax
        >>> loss = lambda w: jnp.sum(w**2)
        >>> optimizer, w = deep_momentum(0.01), jnp.ones((4, 3))
        >>> state = optimizer.init(w)
        >>> for _ in range(50):
        ...     updates, state = optimizer.update(jax.grad(loss)(w), state, w)
        ...     w = optax.apply_updates(w, updates)
        >>> bool(loss(w) < 1)
        True

    References:
        Behrouz et al., `Nested Learning <https://arxiv.org/abs/2512.24695>`_, 2025, Eq. (50), (52)
    """
    direction = scale_by_deep_momentum(hidden_size, decay, write_rate, objective, sigma, mu_dtype, linear=linear, seed=seed)
    return with_learning_rate(direction, learning_rate, weight_decay, weight_decay_mask)


def _check(decay: Any, write_rate: Any, objective: str | Objective) -> None:
    check_range('decay', decay, 0, 1)
    check_range('write_rate', write_rate, 0)
    if not callable(objective):
        check_choice('objective', objective, tuple(OBJECTIVES))


def _initial_memory(leaf: jax.Array, hidden_size: int, dtype: DTypeLike, linear: bool, seed: int) -> DeepMemory:
    *batch, rows, width = matrix_shape(leaf)
    hidden = min(hidden_size, max(rows // 2, 1))
    trace = jnp.zeros_like(leaf, dtype=dtype) if linear else None
    if not hidden:
        return DeepMemory(trace, None, None)
    # Drawn in the working dtype, as at every write, and only then rounded.
    first = _first_layer((*batch, width, hidden), working_dtype(leaf), seed).astype(dtype)
    second = jnp.zeros((*batch, hidden, width), dtype)
    return DeepMemory(trace, placed_like(leaf, first, -1, None), placed_like(leaf, second, None, -1))


def _first_layer(shape: tuple[int, ...], dtype: DTypeLike, seed: ArrayLike) -> jax.Array:
    # Keys have norm 1: features of unit variance.
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def _step(gradient: jax.Array, memory: DeepMemory, seed: jax.Array, decay: Any, rate: Any, *, loss: Objective) -> tuple:
    """What is read, in the working dtype, and the memory."""
    keys = as_matrix(widened(gradient))
    old = jax.tree.map(lambda leaf: as_matrix(leaf.astype(keys.dtype)), memory)
    new = _write(old, keys, seed, loss=loss, decay=decay, rate=rate)
    read = _read(new, *_unit_keys(keys)).reshape(gradient.shape)
    kept = jax.tree.map(lambda leaf, old: leaf.reshape(old.shape).astype(old.dtype), new, memory)
    return read, kept


def _unit_keys(keys: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rows scaled to a root mean square norm of 1, and the scale."""
    scale = _row_norm(keys)
    return divide(keys, scale), scale


def _row_norm(matrix: jax.Array) -> jax.Array:
    return root(jnp.sum(jnp.square(matrix), (-2, -1), keepdims=True) / max(matrix.shape[-2], 1))


def _network(first: jax.Array, second: jax.Array, keys: jax.Array) -> tuple[jax.Array, jax.Array]:
    hidden = jnp.tanh(keys @ first) / jnp.sqrt(jnp.asarray(first.shape[-1], keys.dtype))
    return hidden @ second, hidden


def _read(memory: DeepMemory, keys: jax.Array, scale: jax.Array) -> jax.Array:
    linear = 0 if memory.trace is None else memory.trace
    return linear if memory.first is None else linear + scale * _network(memory.first, memory.second, keys)[0]


def _write(memory: DeepMemory, gradient: jax.Array, seed: jax.Array, *, loss: Objective, decay: Any, rate: Any) -> DeepMemory:
    keys, scale = _unit_keys(gradient)
    error = jax.grad(loss)(_read(memory, keys, scale), gradient)
    trace = None if memory.trace is None else decay * memory.trace - rate * error
    if memory.first is None:
        return DeepMemory(trace, None, None)
    rows, size = keys.shape[-2], memory.first.shape[-1]
    _, backward, hidden = jax.vjp(lambda first, second: _network(first, second, keys), memory.first, memory.second, has_aux=True)
    first_grad, second_grad = backward(divide(error, jnp.maximum(scale, _row_norm(error))) / max(rows, 1))
    initial = _first_layer(memory.first.shape, memory.first.dtype, seed)
    curvature = lambda matrix, count: jnp.sum(jnp.square(matrix), (-2, -1), keepdims=True) / count
    first_rate = rate / (1 + rate * curvature(memory.second, size))
    second_rate = rate / (1 + rate * curvature(hidden, max(rows, 1)))
    first = initial + decay * (memory.first - initial) - first_rate * first_grad
    return DeepMemory(trace, first, decay * memory.second - second_rate * second_grad)
