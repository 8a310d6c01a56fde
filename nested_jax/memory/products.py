"""The three products of small matrices, a b, a^T b and a b^T, whose derivatives are each other.

XLA's CPU backend takes 1.2 to 1.4 times as long for a^T b, of 32 pairs of 16 rows, as for laying a^T out and multiplying; left to itself
it merges the two.
Elsewhere these are plain products. They can be differentiated backwards only.
"""

import functools

import jax
import jax.numpy as jnp

Precision = jax.lax.Precision | None


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def product(rows: jax.Array, weight: jax.Array, precision: Precision = None) -> jax.Array:
    """Rows x W, (..., C, D) and (..., D, F) -> (..., C, F); the leading axes are equal."""
    return jnp.matmul(rows, weight, precision=precision)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def outer(inputs: jax.Array, rows: jax.Array, precision: Precision = None) -> jax.Array:
    """Sum over rows of the outer products x^T y, (..., C, D) and (..., C, F) -> (..., D, F); the leading axes are equal."""
    return jnp.matmul(_transposed(inputs), rows, precision=precision)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def inner(rows: jax.Array, inputs: jax.Array, precision: Precision = None) -> jax.Array:
    """Inner products x y^T of all pairs of rows, (..., C, D) and (..., J, D) -> (..., C, J); the leading axes are equal."""
    return jnp.einsum('...td,...jd->...tj', rows, inputs, precision=precision)


def _transposed(x: jax.Array) -> jax.Array:
    """x^T, laid out on CPU before it is multiplied."""
    return jax.lax.platform_dependent(x, cpu=lambda x: jax.lax.optimization_barrier(x.mT), default=lambda x: x.mT)


def _forward(function):
    return lambda a, b, precision: (function(a, b, precision), (a, b))


def _outer_forward(inputs: jax.Array, rows: jax.Array, precision: Precision) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """The sums with zero are no work once compiled. Without them, arguments being residuals, the derivative of a derivative takes for its
    first factor the number of the platform that `_transposed` asks for (jax 0.10.2).
    """
    return outer(inputs, rows, precision), (inputs + 0, rows + 0)


def _product_backward(precision: Precision, factors: tuple[jax.Array, jax.Array], cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
    rows, weight = factors
    return inner(cotangent, weight, precision), outer(rows, cotangent, precision)


def _outer_backward(precision: Precision, factors: tuple[jax.Array, jax.Array], cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
    inputs, rows = factors
    return inner(rows, cotangent, precision), product(inputs, cotangent, precision)


def _inner_backward(precision: Precision, factors: tuple[jax.Array, jax.Array], cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
    rows, inputs = factors
    return product(cotangent, inputs, precision), outer(cotangent, rows, precision)


product.defvjp(_forward(product), _product_backward)
outer.defvjp(_outer_forward, _outer_backward)
inner.defvjp(_forward(inner), _inner_backward)
