r"""Momentum as an associative memory: preconditioned, delta-rule and feature-map momentum (Eq. 38-51, arXiv:2512.24695v1).

The paper's memory m holds the negative step, learning rate included: W <- W + m. Here, as everywhere in optax, the trace is -m / eta, and
the learning rate multiplies what is read: the same for a constant rate. G is a gradient laid out as a flax kernel, (..., in, out), the
transpose of the paper's, so the paper's m g' g is G G' M here and its P g is G P'. See `matrices` for leaves of other ranks.

Delta momentum, with erase rate :math:`\eta` and decay :math:`\alpha`, has three forms:

.. math::
  \text{printed} \quad & M \leftarrow (\alpha I - \eta G G^\top) M + G P^\top \\
  \text{normalised} \quad & M \leftarrow (\alpha I - \eta G G^\top / \lVert G \rVert_F^2) M + G P^\top \\
  \text{proximal} \quad & M \leftarrow (I + \eta G G^\top)^{-1} (\alpha M + G P^\top)

- The first is Eq. (49) with the rate on the erased part too, which the printed equation lacks: the gradient step on
  :math:`\frac12 \lVert m g^\top + P \rVert^2` with decay. It is stable while :math:`\eta \lVert G \rVert_2^2 \le 1 + \alpha`, and
  diverges on larger gradients.
- The second is stable for :math:`\eta \le 1 + \alpha`, whatever the gradient.
- The third minimises :math:`\frac12 \lVert m g^\top + P \rVert^2 + \frac1{2\eta} \lVert m - \alpha m_t \rVert^2`, and is stable for every
  rate; on a gradient of rank one its rate is :math:`\eta / (1 + \eta \lVert G \rVert^2)`.

A step costs, beside heavy ball, two products of 2 * in * out * min(in, out) operations for an (in, out) matrix; the proximal form adds
the QR decomposition of an (in + out, min(in, out)) matrix.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike

from nested_jax.optim.checks import check_choice, check_range, check_real
from nested_jax.optim.matrices import (
    Mask,
    as_matrix,
    at_step,
    divide,
    map_step,
    matrix_shape,
    resolvent,
    root_mean_square,
    widened,
    with_learning_rate,
    working_dtype,
    zeros_for,
)
from nested_jax.optim.orthogonalize import normalized
from nested_jax.optim.sharding import Layout, in_layout, layouts_of, moves, placed_like, run_in_auto_mode

PyTree = Any
Preconditioner = Callable[[jax.Array], jax.Array] | PyTree | None
FORMS = ('printed', 'normalised', 'proximal')


class DeltaMomentumState(NamedTuple):
    """State of `scale_by_delta_momentum`."""

    count: jax.Array  # shape=(), dtype=int32
    trace: optax.Updates  # shaped like the parameters, dtype=mu_dtype or float32 at least


class PreconditionedMomentumState(NamedTuple):
    """State of `scale_by_preconditioned_momentum`."""

    trace: optax.Updates  # shaped like the parameters, dtype=mu_dtype or float32 at least


class LearnedPreconditionerState(NamedTuple):
    """State of `scale_by_learned_preconditioner`."""

    preconditioner: optax.Updates  # a matrix (..., out, out) for each leaf (..., in, out), dtype=mu_dtype or float32 at least


def scale_by_delta_momentum(
    erase_rate: optax.ScalarOrSchedule = 1e-3,
    decay: ArrayLike = 0.9,
    preconditioner: Preconditioner = None,
    mu_dtype: DTypeLike | None = None,
    *,
    form: str = 'printed',
    shardings: PyTree | None = None,
) -> optax.GradientTransformation:
    """Momentum written by the delta rule: it forgets along the current gradient before it adds it.

    The module's docstring has the forms, their stability and their cost. Rate 0 is heavy ball in each. A vector is one row, so what it
    erases is the scalar rate times its squared norm.

    Args:
        erase_rate: eta, a constant or a schedule. The paper's is the learning rate. Of the normalised form at most 1 + decay, which holds
            what a schedule says too.
        decay: alpha, from 0 to 1.
        preconditioner: P of the written part, as in `scale_by_preconditioned_momentum`.
        mu_dtype: of the trace; by default the parameters', and float32 at least.
        form: 'printed', 'normalised' or 'proximal'.
        shardings: of the parameters, a NamedSharding for each, on Auto meshes, as for `orthogonalize`: nothing is gathered on the way.

    Returns:
        The transformation.

    Raises:
        ValueError: if a rate, the form or the preconditioner's shape is not allowed, or, at `init`, on parameters that are not real.

    Examples:
        >>> import jax.numpy as jnp
        >>> optimizer = scale_by_delta_momentum(erase_rate=0.1, decay=1.0)
        >>> gradient = jnp.array([[2.0], [0.0]])
        >>> _, state = optimizer.update(gradient, optimizer.init(gradient))
        >>> print(optimizer.update(gradient, state)[0])  # 2 - 0.1 * 4 * 2 + 2
        [[3.2]
         [0. ]]

    References:
        Behrouz et al., `Nested Learning <https://arxiv.org/abs/2512.24695>`_, 2025, Eq. (48)-(49)
    """
    check_range('erase_rate', erase_rate, 0, 1 + decay if form == 'normalised' and isinstance(decay, int | float) else float('inf'))
    check_range('decay', decay, 0, 1)
    check_choice('form', form, FORMS)

    def init_fn(params):
        check_real(params)
        _check_preconditioner(preconditioner, params)
        return DeltaMomentumState(jnp.zeros((), jnp.int32), zeros_for(params, mu_dtype))

    def update_fn(updates, state, params=None):
        del params
        step, scalars = functools.partial(_delta_step, form=form), (at_step(erase_rate, state.count), decay)
        layouts, written = layouts_of(updates, shardings), _precondition(preconditioner, updates, shardings)
        updates, trace = map_step(step, updates, state.trace, written, scalars=scalars, layouts=layouts)
        return updates, DeltaMomentumState(optax.safe_increment(state.count), trace)

    return optax.GradientTransformation(init_fn, update_fn)


def delta_momentum(
    learning_rate: optax.ScalarOrSchedule,
    decay: ArrayLike = 0.9,
    erase_rate: optax.ScalarOrSchedule | None = None,
    preconditioner: Preconditioner = None,
    weight_decay: ArrayLike = 0.0,
    weight_decay_mask: Mask = None,
    mu_dtype: DTypeLike | None = None,
    *,
    form: str = 'printed',
    mask: Mask = None,
    shardings: PyTree | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Gradient descent with delta-rule momentum: the module's docstring has the equations and their stability.

    Args:
        learning_rate: a constant or a schedule. It scales what is read from the momentum, a schedule also what was written long ago.
        decay: alpha, from 0 to 1.
        erase_rate: eta of the erased part; by default the learning rate, as printed.
        preconditioner: P of the written part, as in `scale_by_preconditioned_momentum`.
        weight_decay: decoupled, times the learning rate.
        weight_decay_mask: tree of booleans, or a function of the parameters to one: where weight decay acts.
        mu_dtype: of the trace; by default the parameters', and float32 at least.
        form: 'printed', 'normalised' or 'proximal'.
        mask: tree of booleans, or a function of the parameters to one: the leaves that are matrices. The others get heavy ball. Stacked
            biases (layers, out) look like a matrix, and need it.
        shardings: of the parameters, on Auto meshes, as in `scale_by_delta_momentum`.

    Returns:
        The optimizer.

    Examples:
        >>> import jax, jax.numpy as jnp, optax
        >>> loss = lambda w: jnp.sum(w**2)
        >>> optimizer, w = delta_momentum(0.1, form='proximal'), jnp.ones((2, 3))
        >>> state = optimizer.init(w)
        >>> for _ in range(50):
        ...     updates, state = optimizer.update(jax.grad(loss)(w), state, w)
        ...     w = optax.apply_updates(w, updates)
        >>> bool(loss(w) < 1e-2)
        True

    References:
        Behrouz et al., `Nested Learning <https://arxiv.org/abs/2512.24695>`_, 2025, Eq. (48)-(49)
    """
    rate = learning_rate if erase_rate is None else erase_rate
    direction = scale_by_delta_momentum(rate, decay, preconditioner, mu_dtype, form=form, shardings=shardings)
    if mask is not None:
        plain = scale_by_preconditioned_momentum(None, decay, mu_dtype)
        direction = optax.partition({'matrix': direction, 'other': plain}, _labels(mask))
    return with_learning_rate(direction, learning_rate, weight_decay, weight_decay_mask)


def scale_by_preconditioned_momentum(
    preconditioner: Preconditioner | optax.GradientTransformation = None,
    decay: ArrayLike = 0.9,
    mu_dtype: DTypeLike | None = None,
    *,
    shardings: PyTree | None = None,
) -> optax.GradientTransformation:
    r"""Momentum of preconditioned gradients, :math:`m \leftarrow \alpha m + P g`: Eq. (47) with the decay its text speaks of.

    Args:
        preconditioner: P. None for the identity; a function of a leaf's gradient; a pytree of arrays (..., out, out), a prefix of the
            parameters', None where P is the identity; or a transformation, such as `scale_by_learned_preconditioner`.
        decay: alpha, from 0 to 1.
        mu_dtype: of the trace; by default the parameters', and float32 at least.
        shardings: of the parameters, on Auto meshes, as in `scale_by_delta_momentum`; only arrays as P need them.

    Returns:
        The transformation; without P it is `optax.trace`.

    Raises:
        ValueError: if the decay or the preconditioner's shape is not allowed, or, at `init`, on parameters that are not real.

    Examples:
        >>> import jax.numpy as jnp
        >>> optimizer = scale_by_preconditioned_momentum(jnp.diag(jnp.array([1.0, 10.0])))
        >>> gradient = jnp.ones((1, 2))
        >>> print(optimizer.update(gradient, optimizer.init(gradient))[0])
        [[ 1. 10.]]

    References:
        Behrouz et al., `Nested Learning <https://arxiv.org/abs/2512.24695>`_, 2025, Eq. (38)-(41), (46)-(47)
    """
    check_range('decay', decay, 0, 1)
    if isinstance(preconditioner, optax.GradientTransformation):
        return optax.chain(preconditioner, scale_by_preconditioned_momentum(None, decay, mu_dtype))

    def init_fn(params):
        check_real(params)
        _check_preconditioner(preconditioner, params)
        return PreconditionedMomentumState(zeros_for(params, mu_dtype))

    def update_fn(updates, state, params=None):
        del params

        def step(gradient, trace, written, decay):
            dtype = working_dtype(gradient)
            moved = written.astype(dtype) + decay * trace.astype(dtype)
            return moved.astype(gradient.dtype), moved.astype(trace.dtype)

        updates, trace = map_step(step, updates, state.trace, _precondition(preconditioner, updates, shardings), scalars=(decay,))
        return updates, PreconditionedMomentumState(trace)

    return optax.GradientTransformation(init_fn, update_fn)


def preconditioned_momentum(
    learning_rate: optax.ScalarOrSchedule,
    decay: ArrayLike = 0.9,
    preconditioner: Preconditioner | optax.GradientTransformation | Literal['learned'] = 'learned',
    weight_decay: ArrayLike = 0.0,
    weight_decay_mask: Mask = None,
    mu_dtype: DTypeLike | None = None,
    *,
    shardings: PyTree | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Gradient descent with preconditioned momentum: see `scale_by_preconditioned_momentum`.

    Args:
        learning_rate: a constant or a schedule.
        decay: alpha, from 0 to 1.
        preconditioner: P, as in `scale_by_preconditioned_momentum`, or 'learned' for `scale_by_learned_preconditioner`.
        weight_decay: decoupled, times the learning rate.
        weight_decay_mask: tree of booleans, or a function of the parameters to one: where weight decay acts.
        mu_dtype: of the trace; by default the parameters', and float32 at least.
        shardings: of the parameters, on Auto meshes, as in `scale_by_delta_momentum`.

    Returns:
        The optimizer.

    Examples:
        >>> import jax, jax.numpy as jnp, optax
        >>> loss = lambda w: jnp.sum(w**2)
        >>> optimizer, w = preconditioned_momentum(0.01), jnp.ones((2, 3))
        >>> state = optimizer.init(w)
        >>> for _ in range(50):
        ...     updates, state = optimizer.update(jax.grad(loss)(w), state, w)
        ...     w = optax.apply_updates(w, updates)
        >>> bool(loss(w) < 1)
        True

    References:
        Behrouz et al., `Nested Learning <https://arxiv.org/abs/2512.24695>`_, 2025, Eq. (38)-(41), (46)-(47)
    """
    if isinstance(preconditioner, str):
        check_choice('preconditioner', preconditioner, ('learned',))
        preconditioner = scale_by_learned_preconditioner(mu_dtype=mu_dtype, shardings=shardings)
    direction = scale_by_preconditioned_momentum(preconditioner, decay, mu_dtype, shardings=shardings)
    return with_learning_rate(direction, learning_rate, weight_decay, weight_decay_mask)


def equalised(gradient: jax.Array) -> jax.Array:
    """The signs of a gradient (..., in, out) times its root mean square: every entry alike, the norm no larger."""
    return jnp.sign(gradient) * root_mean_square(gradient)


def scale_by_learned_preconditioner(
    rate: ArrayLike = 0.1,
    decay: ArrayLike = 0.9,
    target: Callable[[jax.Array], jax.Array] = equalised,
    mu_dtype: DTypeLike | None = None,
    *,
    shardings: PyTree | None = None,
) -> optax.GradientTransformation:
    r"""A preconditioner that is itself a memory, written by gradient descent: Eq. (41).

    The paper leaves the inner objective open. Here the memory P maps the gradient to what the step should be, a target :math:`\hat g`,
    and decays towards the identity, from which it starts:

    .. math::
      \tilde L(P; g, \hat g) = \tfrac12 \lVert P g - \hat g \rVert_F^2, \qquad
      P \leftarrow I + \beta (P - I) - \frac{\zeta}{\lVert g \rVert_F^2} (P g - \hat g) g^\top

    It is read after it is written. For a target no longer than g and :math:`\zeta \le 2 \beta` it stays within
    :math:`2 \zeta / (1 - \beta)` of the identity. Scale a target of fixed size, such as Newton-Schulz's, to g's, or P grows as g vanishes.

    It holds out * out numbers for each matrix (in, out): mask leaves with a wide output, such as a language model's head.

    Args:
        rate: zeta, from 0 to 2.
        decay: beta, from 0 to 1.
        target: a function from a leaf's gradient, (..., in, out) in float32 at least, to an array of the same shape.
        mu_dtype: of P; by default the parameters', and float32 at least.
        shardings: of the parameters, on Auto meshes, as in `scale_by_delta_momentum`.

    Returns:
        The transformation.

    Raises:
        ValueError: if a number is not allowed, or, at `init`, on parameters that are not real.

    Examples:
        >>> import jax.numpy as jnp
        >>> optimizer, gradient = scale_by_learned_preconditioner(rate=1.0), jnp.array([[7.0, -1.0]])
        >>> print(optimizer.update(gradient, optimizer.init(gradient))[0].round(4))
        [[ 5. -5.]]

    References:
        Behrouz et al., `Nested Learning <https://arxiv.org/abs/2512.24695>`_, 2025, Eq. (40)-(41)
    """
    check_range('rate', rate, 0, 2)
    check_range('decay', decay, 0, 1)

    def init_fn(params):
        check_real(params)
        identity = lambda leaf: placed_like(leaf, _identity(leaf, mu_dtype or working_dtype(leaf)), None, None)
        return LearnedPreconditionerState(jax.tree.map(identity, params))

    def update_fn(updates, state, params=None):
        del params
        step, layouts = functools.partial(_learn, target=target), layouts_of(updates, shardings)
        updates, preconditioner = map_step(step, updates, state.preconditioner, scalars=(rate, decay), layouts=layouts)
        return updates, LearnedPreconditionerState(preconditioner)

    return optax.GradientTransformation(init_fn, update_fn)


def scale_by_feature_momentum(
    feature: Callable[[jax.Array], jax.Array] | float = 0.5,
    decay: ArrayLike = 0.9,
    preconditioner: Preconditioner | optax.GradientTransformation = None,
    mu_dtype: DTypeLike | None = None,
    *,
    shardings: PyTree | None = None,
) -> optax.GradientTransformation:
    r"""Momentum over a feature map of the gradients, :math:`m \leftarrow \alpha m + P \phi(g)`: Eq. (51).

    Args:
        feature: phi, a function from a leaf's gradient to an array of its shape; or a number p from 0 to 1 for the elementwise
            :math:`\mathrm{sign}(g) |g|^p`, between the sign of the gradient (0) and the gradient (1).
        decay: alpha, from 0 to 1.
        preconditioner: P, as in `scale_by_preconditioned_momentum`.
        mu_dtype: of the trace; by default the parameters', and float32 at least.
        shardings: of the parameters, as in `scale_by_preconditioned_momentum`.

    Returns:
        The transformation; with the identity as phi and no P it is `optax.trace`.

    Raises:
        ValueError: if a number is not allowed, or, at `init`, if phi changes the shape or parameters are not real.

    Examples:
        >>> import jax.numpy as jnp
        >>> optimizer = scale_by_feature_momentum(0.5)
        >>> gradient = jnp.array([-4.0, 0.0, 9.0])
        >>> print(optimizer.update(gradient, optimizer.init(gradient))[0])
        [-2.  0.  3.]

    References:
        Behrouz et al., `Nested Learning <https://arxiv.org/abs/2512.24695>`_, 2025, Eq. (51)
    """
    check_range('feature', feature, 0, 1)
    phi = feature if callable(feature) else lambda gradient: _signed_power(gradient, feature)

    def init_fn(params):
        check_real(params)
        jax.tree.map(lambda leaf: _check_feature(phi, leaf), params)
        return optax.EmptyState()

    mapped = optax.GradientTransformation(init_fn, lambda updates, state, params=None: (jax.tree.map(phi, updates), state))
    return optax.chain(mapped, scale_by_preconditioned_momentum(preconditioner, decay, mu_dtype, shardings=shardings))


def feature_momentum(
    learning_rate: optax.ScalarOrSchedule,
    feature: Callable[[jax.Array], jax.Array] | float = 0.5,
    decay: ArrayLike = 0.9,
    preconditioner: Preconditioner | optax.GradientTransformation = None,
    weight_decay: ArrayLike = 0.0,
    weight_decay_mask: Mask = None,
    mu_dtype: DTypeLike | None = None,
    *,
    shardings: PyTree | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Gradient descent with feature-map momentum: see `scale_by_feature_momentum`.

    Args:
        learning_rate: a constant or a schedule.
        feature: phi, a function, or the power p of the elementwise sign(g) |g|^p.
        decay: alpha, from 0 to 1.
        preconditioner: P, as in `scale_by_preconditioned_momentum`.
        weight_decay: decoupled, times the learning rate.
        weight_decay_mask: tree of booleans, or a function of the parameters to one: where weight decay acts.
        mu_dtype: of the trace; by default the parameters', and float32 at least.
        shardings: of the parameters, as in `scale_by_preconditioned_momentum`.

    Returns:
        The optimizer.

    Examples:
        >>> import jax, jax.numpy as jnp, optax
        >>> loss = lambda w: jnp.sum(w**2)
        >>> optimizer, w = feature_momentum(0.01, jnp.tanh), jnp.ones((2, 3))
        >>> state = optimizer.init(w)
        >>> for _ in range(50):
        ...     updates, state = optimizer.update(jax.grad(loss)(w), state, w)
        ...     w = optax.apply_updates(w, updates)
        >>> bool(loss(w) < 1)
        True

    References:
        Behrouz et al., `Nested Learning <https://arxiv.org/abs/2512.24695>`_, 2025, Eq. (51)
    """
    direction = scale_by_feature_momentum(feature, decay, preconditioner, mu_dtype, shardings=shardings)
    return with_learning_rate(direction, learning_rate, weight_decay, weight_decay_mask)


def _delta_step(
    gradient: jax.Array, trace: jax.Array, written: jax.Array, rate: Any, decay: Any, *, form: str, layout: Layout | None
) -> tuple:
    dtype = working_dtype(gradient)
    rate, decay = jnp.asarray(rate, dtype), jnp.asarray(decay, dtype)
    if form == 'normalised':  # where it erases once and again what there is, it grows
        rate = jnp.minimum(rate, 1 + decay)

    def moved(key, memory, value):
        kept = decay * memory + value
        return resolvent(key.mT, kept, rate) if form == 'proximal' else kept - rate * _erased(key, memory, form)

    matrices = [as_matrix(leaf.astype(dtype)) for leaf in (gradient, trace, written)]
    along = None if form == 'proximal' else -1 if _is_wide(matrices[0]) else -2
    moved = in_layout(moved, matrices, _of_matrix(layout, gradient), along).reshape(gradient.shape)
    return moved.astype(gradient.dtype), moved.astype(trace.dtype)


def _of_matrix(layout: Layout | None, leaf: jax.Array) -> Layout | None:
    """The layout of `as_matrix(leaf)`."""
    return layout.stacked() if layout is not None and leaf.ndim == 1 else layout


def _is_wide(matrix: jax.Array) -> bool:
    return matrix.shape[-1] > matrix.shape[-2]


def _erased(key: jax.Array, memory: jax.Array, form: str) -> jax.Array:
    key = normalized(key) if form == 'normalised' else key
    return (key @ key.mT) @ memory if _is_wide(key) else key @ (key.mT @ memory)


def _precondition(preconditioner: Preconditioner, gradients: PyTree, shardings: PyTree | None) -> PyTree:
    if preconditioner is None:
        return gradients
    if callable(preconditioner):
        return jax.tree.map(preconditioner, gradients)
    leaves, structure = jax.tree.flatten(gradients)
    chosen = lambda matrix, part: jax.tree.map(lambda _: (matrix,), part)
    matrices = structure.flatten_up_to(jax.tree.map(chosen, preconditioner, gradients, is_leaf=lambda leaf: leaf is None))
    return structure.unflatten(list(map(_apply_matrix, leaves, matrices, layouts_of(gradients, shardings))))


def _apply_matrix(gradient: jax.Array, preconditioner: tuple[jax.Array | None], layout: Layout | None) -> jax.Array:
    """P g for a tuple of P or None, by whole rows of the gradient: products of split ones would be summed up over devices."""
    (matrix,) = preconditioner
    if matrix is None:
        return gradient
    key = widened(gradient)

    def product(key, memory):
        there, back = moves(_of_matrix(layout, key), matrix_shape(key), -2, batch=False)
        return back(there(as_matrix(key)) @ memory.mT).reshape(key.shape)

    return run_in_auto_mode(product, (key, matrix.astype(key.dtype)), like=key)


def _learn(
    gradient: jax.Array,
    preconditioner: jax.Array,
    rate: Any,
    decay: Any,
    *,
    target: Callable[[jax.Array], jax.Array],
    layout: Layout | None,
) -> tuple:
    """A step of the learned preconditioner; rows of the gradient are whole on a device, and what they say of P is summed up."""
    dtype = working_dtype(gradient)
    matrix, memory, identity = as_matrix(gradient.astype(dtype)), preconditioner.astype(dtype), _identity(gradient, dtype)
    there, back = moves(_of_matrix(layout, gradient), matrix.shape, -2, batch=False)
    key = there(matrix)
    error = key @ memory.mT - there(target(matrix))
    gradient_step = divide(error.mT @ key, jnp.sum(jnp.square(key), (-2, -1), keepdims=True))
    memory = identity + jnp.asarray(decay, dtype) * (memory - identity) - jnp.asarray(rate, dtype) * gradient_step
    return back(key @ memory.mT).reshape(gradient.shape).astype(gradient.dtype), memory.astype(preconditioner.dtype)


def _check_preconditioner(preconditioner: Preconditioner, params: PyTree) -> None:
    if preconditioner is None or callable(preconditioner):
        return

    def check(matrix, part):
        for leaf in jax.tree.leaves(part):
            width = matrix_shape(leaf)[-1]
            if matrix is not None and jnp.shape(matrix)[-2:] != (width, width):
                raise ValueError(f'preconditioner has shape {jnp.shape(matrix)}, allowed is (..., {width}, {width}) for shape {leaf.shape}')

    jax.tree.map(check, preconditioner, params, is_leaf=lambda leaf: leaf is None)


def _check_feature(phi: Callable, leaf: jax.Array) -> None:
    shape = jax.eval_shape(phi, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)).shape
    if shape != leaf.shape:
        raise ValueError(f'feature maps shape {leaf.shape} to {shape}, allowed is a map that keeps the shape')


def _signed_power(gradient: jax.Array, power: ArrayLike) -> jax.Array:
    # The derivative of a root at zero is infinite; there the map is constant here.
    nonzero = gradient != 0
    return jnp.where(nonzero, jnp.sign(gradient) * jnp.abs(jnp.where(nonzero, gradient, 1)) ** power, 0).astype(gradient.dtype)


def _identity(leaf: jax.Array, dtype: DTypeLike) -> jax.Array:
    *batch, _, width = matrix_shape(leaf)
    return jnp.broadcast_to(jnp.eye(width, dtype=dtype), (*batch, width, width))


def _labels(mask: Mask) -> Mask:
    label = lambda tree: jax.tree.map(lambda chosen: 'matrix' if chosen else 'other', tree)
    return (lambda params: label(mask(params))) if callable(mask) else label(mask)
