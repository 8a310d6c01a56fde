r"""Adam and AdaGrad derived as optimal associative memories (appendix B, Eq. 101-105, arXiv:2512.24695v1).

A memory m maps, element by element, each gradient so far to a target P that stands for their size:

.. math::
  \tilde L(m) = \sum_i w_i (m g_i - P)^2 + \lambda m^2, \qquad m^* = \frac{M P}{H + \lambda}, \quad
  M = \sum_i w_i g_i, \quad H = \sum_i w_i g_i^2

and the parameters move by :math:`-\eta m^*`. What P and the weights are decides the optimizer: P the root of H is Adam or AdaGrad, P = H
is gradient descent with momentum. Here g is the gradient; with the paper's g, its negative, the sign of Eq. (103) is a plus.

The paper's weights do not decay (M <- M + beta_1 g), so the literal sums are AdaGrad's; Adam takes exponential averages, and two
different ones, so its objective weighs the square of m g_i and its product with P apart: see `memory_loss`. With bias correction, P the
root of :math:`H + \epsilon_{root}`, and both epsilons in the penalty, :math:`\lambda = \epsilon_{root} + \epsilon P`, it is optax's Adam:

.. math::
  m^* = \frac{M P}{H + \lambda} = \frac{M P}{P^2 + \epsilon P} = \frac{M}{\sqrt{H + \epsilon_{root}} + \epsilon}
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike

from nested_jax.optim.checks import check_choice, check_decay, check_range, check_real
from nested_jax.optim.matrices import (
    Mask,
    divide,
    map_step,
    root,
    widened,
    with_learning_rate,
    working_dtype,
    zeros_for,
)

PyTree = Any
Target = Callable[[jax.Array], jax.Array]


class AdamMemoryState(NamedTuple):
    """State of `scale_by_adam_as_memory`; two memories of one frequency, so one level."""

    count: jax.Array  # shape=(), dtype=int32
    mu: optax.Updates  # M before bias correction; shaped like the parameters, dtype=mu_dtype or float32 at least
    nu: optax.Updates  # H before bias correction; shaped like the parameters, float32 at least


class AdagradMemoryState(NamedTuple):
    """State of `scale_by_adagrad_as_memory`."""

    sum_of_squares: optax.Updates  # H; shaped like the parameters, float32 at least


def memory_loss(
    memory: jax.Array,
    gradients: jax.Array,
    target: jax.Array,
    penalty: ArrayLike,
    first_weights: jax.Array,
    second_weights: jax.Array,
) -> jax.Array:
    r"""The inner objective, Eq. (101), with a weight for each gradient.

    .. math::
      \sum_i b_i (m g_i)^2 - 2 a_i (m g_i) P + a_i P^2 + \lambda m^2,

    summed over the elements, which is :math:`\sum_i w_i (m g_i - P)^2 + \lambda m^2` where :math:`a = b = w`.

    Args:
        memory: m, any shape.
        gradients: g, shape (steps, ...).
        target: P, the shape of `memory`.
        penalty: lambda, a scalar or the shape of `memory`.
        first_weights: a, shape (steps,).
        second_weights: b, shape (steps,).

    Returns:
        Scalar.
    """
    first = jnp.tensordot(first_weights, gradients, 1)
    second = jnp.tensordot(second_weights, jnp.square(gradients), 1)
    return jnp.sum(second * memory**2 - 2 * first * memory * target + first_weights.sum() * target**2 + penalty * memory**2)


def optimal_memory(first: jax.Array, second: jax.Array, target: jax.Array, penalty: ArrayLike) -> jax.Array:
    """The minimum of `memory_loss`, Eq. (102): M P / (H + lambda), and zero where the denominator is zero or has overflowed.

    Args:
        first: M, the weighted sum of the gradients.
        second: H, the weighted sum of their squares.
        target: P.
        penalty: lambda, at least 0.

    Examples:
        >>> import jax.numpy as jnp
        >>> print(optimal_memory(jnp.array([1.0, 0.0]), jnp.array([4.0, 0.0]), jnp.array([2.0, 0.0]), 0.0))
        [0.5 0. ]
    """
    # The product of M and P leaves the range of floating point long before their quotients do.
    denominator = second + penalty
    return first * jnp.where(jnp.isinf(denominator), 0, divide(target, denominator))


TARGETS: dict[str, Target] = {'root': root, 'square': lambda second: second}


def scale_by_adam_as_memory(
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    eps_root: ArrayLike = 0.0,
    mu_dtype: DTypeLike | None = None,
    *,
    target: str | Target = 'root',
) -> optax.GradientTransformation:
    """Adam as the optimal memory of its gradients: equal to `optax.scale_by_adam`, by the derivation in the module's docstring.

    Gradients through it are finite where the gradients are zero, unlike those of `optax.adam`.

    Args:
        b1: decay of M, at least 0 and below 1.
        b2: decay of H, at least 0 and below 1.
        eps: outside of the root.
        eps_root: inside of the root.
        mu_dtype: of M; by default the parameters', and float32 at least.
        target: P as a function of H + eps_root, or 'root', Eq. (105), or 'square', H itself: momentum, Eq. (104).

    Returns:
        The transformation.

    Raises:
        ValueError: if a number is not allowed, or, at `init`, on parameters that are not real.

    Examples:
        >>> import jax.numpy as jnp
        >>> optimizer = scale_by_adam_as_memory()
        >>> gradient = jnp.array([4.0, -4.0, 0.0])
        >>> print(optimizer.update(gradient, optimizer.init(gradient))[0].round(4))
        [ 1. -1.  0.]

    References:
        Behrouz et al., `Nested Learning <https://arxiv.org/abs/2512.24695>`_, 2025, appendix B
    """
    _check_adam(b1, b2, eps, eps_root, target)
    read = functools.partial(_read, target=TARGETS.get(target, target), eps=eps, eps_root=eps_root)

    def init_fn(params):
        check_real(params)
        return AdamMemoryState(jnp.zeros((), jnp.int32), zeros_for(params, mu_dtype), zeros_for(params))

    def update_fn(updates, state, params=None):
        del params
        count = optax.safe_increment(state.count)
        gradients = jax.tree.map(widened, updates)
        mu = optax.tree.update_moment(gradients, state.mu, b1, 1)
        nu = optax.tree.update_moment_per_elem_norm(gradients, state.nu, b2, 2)
        corrected = optax.tree.bias_correction(mu, b1, count), optax.tree.bias_correction(nu, b2, count)
        new_updates = jax.tree.map(read, updates, *corrected)
        return new_updates, AdamMemoryState(count, optax.tree.cast_like(mu, state.mu), optax.tree.cast_like(nu, state.nu))

    return optax.GradientTransformation(init_fn, update_fn)


def adam_as_memory(
    learning_rate: optax.ScalarOrSchedule,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    eps_root: ArrayLike = 0.0,
    weight_decay: ArrayLike = 0.0,
    weight_decay_mask: Mask = None,
    mu_dtype: DTypeLike | None = None,
    *,
    target: str | Target = 'root',
) -> optax.GradientTransformationExtraArgs:
    """Adam as the optimal memory of its gradients: equal to `optax.adamw`, see `scale_by_adam_as_memory` for the derivation.

    Args:
        learning_rate: a constant or a schedule.
        b1: decay of M, at least 0 and below 1.
        b2: decay of H, at least 0 and below 1.
        eps: outside of the root.
        eps_root: inside of the root.
        weight_decay: decoupled, times the learning rate.
        weight_decay_mask: tree of booleans, or a function of the parameters to one: where weight decay acts.
        mu_dtype: of M; by default the parameters', and float32 at least.
        target: P as a function of H + eps_root, 'root' or 'square'. A function needs `static_args` of `optax.inject_hyperparams`.

    Returns:
        The optimizer.

    Examples:
        >>> import jax, jax.numpy as jnp, optax
        >>> loss = lambda w: jnp.sum(w**2)
        >>> optimizer, w = adam_as_memory(0.1), jnp.ones(3)
        >>> state = optimizer.init(w)
        >>> for _ in range(50):
        ...     updates, state = optimizer.update(jax.grad(loss)(w), state, w)
        ...     w = optax.apply_updates(w, updates)
        >>> bool(loss(w) < 0.1)
        True

    References:
        Behrouz et al., `Nested Learning <https://arxiv.org/abs/2512.24695>`_, 2025, appendix B
    """
    direction = scale_by_adam_as_memory(b1, b2, eps, eps_root, mu_dtype, target=target)
    return with_learning_rate(direction, learning_rate, weight_decay, weight_decay_mask)


def scale_by_adagrad_as_memory(initial_accumulator_value: ArrayLike = 0.1, eps: ArrayLike = 1e-7) -> optax.GradientTransformation:
    r"""AdaGrad as the optimal memory of its gradients: equal to `optax.scale_by_rss`.

    M is the present gradient alone, H the sum of all squares on top of an initial value, P the root of :math:`H + \epsilon` and
    :math:`\lambda = \epsilon`, which makes :math:`m^* = g / \sqrt{H + \epsilon}`: epsilon sits inside of the root.

    Args:
        initial_accumulator_value: of H, at least 0.
        eps: at least 0.

    Returns:
        The transformation.

    Raises:
        ValueError: if a number is not allowed, or, at `init`, on parameters that are not real.

    Examples:
        >>> import jax.numpy as jnp
        >>> optimizer = scale_by_adagrad_as_memory(0.0)
        >>> gradient = jnp.array([4.0, -4.0, 0.0])
        >>> print(optimizer.update(gradient, optimizer.init(gradient))[0].round(4))
        [ 1. -1.  0.]

    References:
        Behrouz et al., `Nested Learning <https://arxiv.org/abs/2512.24695>`_, 2025, appendix B
    """
    check_range('initial_accumulator_value', initial_accumulator_value, 0)
    check_range('eps', eps, 0)

    def init_fn(params):
        check_real(params)
        start = lambda leaf: jnp.full_like(leaf, initial_accumulator_value, dtype=working_dtype(leaf))
        return AdagradMemoryState(jax.tree.map(start, params))

    def update_fn(updates, state, params=None):
        del params

        def step(gradient, total, eps):
            first = widened(gradient)
            second = total + jnp.square(first)
            return optimal_memory(first, second, root(second + eps), eps).astype(gradient.dtype), second

        updates, totals = map_step(step, updates, state.sum_of_squares, scalars=(eps,))
        return updates, AdagradMemoryState(totals)

    return optax.GradientTransformation(init_fn, update_fn)


def adagrad_as_memory(
    learning_rate: optax.ScalarOrSchedule,
    initial_accumulator_value: ArrayLike = 0.1,
    eps: ArrayLike = 1e-7,
    weight_decay: ArrayLike = 0.0,
    weight_decay_mask: Mask = None,
) -> optax.GradientTransformationExtraArgs:
    """AdaGrad as the optimal memory of its gradients: equal to `optax.adagrad`, see `scale_by_adagrad_as_memory` for the derivation.

    Args:
        learning_rate: a constant or a schedule.
        initial_accumulator_value: of the sum of squares, at least 0.
        eps: inside of the root.
        weight_decay: decoupled, times the learning rate.
        weight_decay_mask: tree of booleans, or a function of the parameters to one: where weight decay acts.

    Returns:
        The optimizer.

    Examples:
        >>> import jax, jax.numpy as jnp, optax
        >>> loss = lambda w: jnp.sum(w**2)
        >>> optimizer, w = adagrad_as_memory(1.0), jnp.ones(3)
        >>> state = optimizer.init(w)
        >>> for _ in range(50):
        ...     updates, state = optimizer.update(jax.grad(loss)(w), state, w)
        ...     w = optax.apply_updates(w, updates)
        >>> bool(loss(w) < 0.1)
        True

    References:
        Behrouz et al., `Nested Learning <https://arxiv.org/abs/2512.24695>`_, 2025, appendix B
    """
    direction = scale_by_adagrad_as_memory(initial_accumulator_value, eps)
    return with_learning_rate(direction, learning_rate, weight_decay, weight_decay_mask)


def _check_adam(b1: Any, b2: Any, eps: Any, eps_root: Any, target: str | Target) -> None:
    check_decay('b1', b1)
    check_decay('b2', b2)
    check_range('eps', eps, 0)
    check_range('eps_root', eps_root, 0)
    if not callable(target):
        check_choice('target', target, tuple(TARGETS))


def _read(gradient: jax.Array, first: jax.Array, second: jax.Array, *, target: Target, eps: Any, eps_root: Any) -> jax.Array:
    penalty = eps_root + eps * root(second + eps_root)
    return optimal_memory(first, second, target(second + eps_root), penalty).astype(gradient.dtype)
