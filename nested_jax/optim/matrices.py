"""Parameters seen as matrices, and what the optimizers share: dtypes, quotients and roots at zero, one stable solve.

A matrix is laid out as a kernel of flax, (..., in, out), the transpose of the paper's W; leading axes are a batch of matrices. A vector
is one row (1, out), the weight of a constant input, and a scalar is (1, 1).
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike

from nested_jax.optim.sharding import run_in_auto_mode

PyTree = Any
Mask = PyTree | Callable[[optax.Params], PyTree] | None


def as_matrix(leaf: jax.Array) -> jax.Array:
    """The leaf as (..., in, out)."""
    return leaf if leaf.ndim >= 2 else leaf.reshape(1, -1)


def matrix_shape(leaf: jax.Array | jax.ShapeDtypeStruct) -> tuple[int, ...]:
    """The shape of `as_matrix(leaf)`."""
    return leaf.shape if len(leaf.shape) >= 2 else (1, math.prod(leaf.shape))


def working_dtype(leaf: jax.Array | jax.ShapeDtypeStruct) -> jnp.dtype:
    """The dtype an optimizer computes in: the leaf's, and float32 at least."""
    return jnp.promote_types(leaf.dtype, jnp.float32)


def widened(x: jax.Array) -> jax.Array:
    """The array in its working dtype."""
    return x.astype(working_dtype(x))


def zeros_for(params: PyTree, mu_dtype: DTypeLike | None = None) -> PyTree:
    """Zeros shaped and sharded like the parameters, in `mu_dtype` or the working dtype."""
    return jax.tree.map(lambda leaf: jnp.zeros_like(leaf, dtype=mu_dtype or working_dtype(leaf)), params)


def map_step(
    function: Callable[..., tuple], updates: PyTree, state: PyTree, *trees: PyTree, scalars: tuple = (), layouts: list | None = None
) -> tuple[PyTree, PyTree]:
    """(updates, state) of a `function` from a leaf's update, state and more to the new two, laid out as the old ones on any mesh.

    Numbers that may be traced are `scalars`, its last arguments: on an Explicit mesh a function may not close over them. With `layouts`,
    one for each leaf or None, it is given its own as the keyword argument `layout`.
    """
    leaves, structure = jax.tree.flatten(updates)
    rows = zip(leaves, *map(structure.flatten_up_to, (state, *trees)), strict=True)
    steps = [function] * len(leaves) if layouts is None else [functools.partial(function, layout=layout) for layout in layouts]
    pairs = [run_in_auto_mode(step, (*row, *scalars), like=row[:2]) for step, row in zip(steps, rows, strict=True)]
    return tuple(structure.unflatten([pair[column] for pair in pairs]) for column in (0, 1))


def at_step(rate: optax.ScalarOrSchedule, count: jax.Array) -> ArrayLike:
    """The value of a constant or a schedule at this step."""
    return rate(count) if callable(rate) else rate


def with_learning_rate(
    direction: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: ArrayLike,
    weight_decay_mask: Mask,
) -> optax.GradientTransformationExtraArgs:
    """The direction with decoupled weight decay, times the negative learning rate, in the parameters' dtypes."""
    decayed = optax.add_decayed_weights(weight_decay, weight_decay_mask)
    cast = optax.stateless(lambda updates, params: optax.tree.cast_like(updates, params))
    return optax.chain(direction, decayed, optax.scale_by_learning_rate(learning_rate), cast)


def root(x: jax.Array) -> jax.Array:
    """The square root, whose derivative at zero is zero here."""
    return jnp.where(x > 0, jnp.sqrt(jnp.where(x > 0, x, 1)), 0)


def root_mean_square(x: jax.Array) -> jax.Array:
    """Over the last two axes, which are kept."""
    return root(jnp.mean(jnp.square(x), (-2, -1), keepdims=True))


def divide(numerator: jax.Array, denominator: jax.Array) -> jax.Array:
    """The quotient, and zero where the denominator is zero, derivatives too."""
    safe = jnp.where(denominator > 0, denominator, 1)
    return jnp.where(denominator > 0, numerator / safe, 0)


@jax.custom_jvp
def resolvent(keys: jax.Array, values: jax.Array, rate: ArrayLike) -> jax.Array:
    r"""The implicit delta rule :math:`(I + \eta K^\top K)^{-1} V`.

    One QR decomposition of the identity stacked on :math:`\sqrt\eta K`, on the smaller side of K, and no matrix squared: its orthonormal
    columns are the factors of the result, so the map is a contraction for keys of any size, in any precision.

    Args:
        keys: K, shape (..., n, d).
        values: V, shape (..., d, e).
        rate: eta, a scalar of at least 0.

    Returns:
        Array of the shape of `values`.
    """
    return _resolve(keys, rate)(values)


@resolvent.defjvp
def _resolvent_jvp(primals, tangents):
    (keys, values, rate), (keys_dot, values_dot, rate_dot) = primals, tangents
    solve = _resolve(keys, rate)
    result = solve(values)
    read = keys @ result
    moved = rate_dot * (keys.mT @ read) + rate * (keys_dot.mT @ read + keys.mT @ (keys_dot @ result))
    return result, solve(values_dot - moved)


def _resolve(keys: jax.Array, rate: ArrayLike) -> Callable[[jax.Array], jax.Array]:
    rows, width = keys.shape[-2:]
    scaled = jnp.sqrt(jnp.asarray(rate, keys.dtype)) * (keys if rows >= width else keys.mT)
    size = scaled.shape[-1]
    identity = jnp.broadcast_to(jnp.eye(size, dtype=keys.dtype), (*keys.shape[:-2], size, size))
    factor = jnp.linalg.qr(jnp.concatenate([identity, scaled], -2))[0]
    if rows >= width:
        return lambda values: factor[..., :size, :] @ (factor[..., :size, :].mT @ values)
    return lambda values: values - factor[..., size:, :] @ (factor[..., size:, :].mT @ values)
