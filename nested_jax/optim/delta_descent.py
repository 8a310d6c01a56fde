"""Delta gradient descent (DGD) for the linear layers of ordinary networks (Eq. 55-57, arXiv:2512.24695v1).

A layer y = W x is asked to answer its input with the negative gradient of its output, u = -dL/dy, and to stay close to what it was:

    W+ = argmin 1/2 |W x - u|^2 + 1/(2 eta) |W - W_t|^2  =  W (I - eta' x x') - eta' dL/dy x',   eta' = eta / (1 + eta |x|^2).

So gradient descent that also forgets along its input. The printed eta / (1 + eta) is the case |x| = 1; the signs of the paper's appendix
C disagree with Eq. (57), which is the one that minimises Eq. (56). For a batch, rows of X, there are two forms:

    exact   W+ = (W - eta G)(I + eta A)^-1,  A the sum or mean of x x'     `delta_gradient_descent`, whose update takes the inputs
    cheap   W+ = W - eta (G + W A) / (1 + eta trace A)                     `with_delta` around the layer, then exact=False

`with_inputs` captures the inputs of a function's products for the one, `delta_products` puts `with_delta` under them for the other.

They agree for one sample. Adding up the one-sample rule over a batch does not work: inputs that repeat overshoot. The exact form takes
the inputs of the step that it updates in: under `optax.MultiSteps` or `by_level` the last step's, and not those of the summed gradients.

On two CPU cores the cheap form took 0.98 to 1.07 times the processor time of a training step of a vision transformer of width 48 with
1,024 tokens, in three runs, and 1.03 to 1.05 at width 512 with 2,048; the exact form 3.0 to 4.2, and 5.1 to 6.5 times
(`scripts/bench.py --suite optim`). Samples are along one axis there, as `delta_dense` of nested_jax/layers has them. Behind several axes
XLA on CPU writes the sum of gradient and output transposed, one number at a time: 40 % more of the smaller step. Without `jax.jit` the
backward products are computed twice.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jax.typing import ArrayLike

from nested_jax.optim.checks import check_choice, check_range, check_real
from nested_jax.optim.matrices import (
    Mask,
    at_step,
    resolvent,
    widened,
    with_learning_rate,
    working_dtype,
)
from nested_jax.optim.sharding import in_layout, layout_of, run_in_auto_mode, whole_matrices

PyTree = Any
Dense = Callable[[jax.Array, jax.Array], jax.Array]
REDUCTIONS = ('mean', 'sum')


class DeltaGradientDescentState(NamedTuple):
    """State of `scale_by_delta_gradient_descent`."""

    count: jax.Array  # shape=(), dtype=int32


def scale_by_delta_gradient_descent(
    learning_rate: optax.ScalarOrSchedule, reduction: str = 'mean', *, exact: bool = True, shardings: PyTree | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""The direction of delta gradient descent, to be multiplied by the negative of the same learning rate.

    For a kernel W (in, out) with gradient G and inputs X (n, in), and c = 1 / n for a mean and 1 for a sum,

    .. math::
      D = (I + \eta c X^\top X)^{-1} (G + c X^\top X W), \qquad W - \eta D = (I + \eta c X^\top X)^{-1} (W - \eta G),

    the minimum of Eq. (56) summed or averaged over the batch, with the targets :math:`u = -\partial L / \partial y` held fixed.

    Cost for n samples: two products of 2 * n * in * out operations, a QR decomposition of an (in + n, min(in, n)) matrix and two products
    with its factor. It is the reference; `with_delta` is the form for large layers.

    Args:
        learning_rate: eta, a constant or a schedule.
        reduction: how the loss adds up samples: 'mean' or 'sum'.
        exact: compute the direction from the layers' inputs. If False, gradients are taken for directions, as `with_delta` makes them.
        shardings: of the parameters, a NamedSharding for each, on Auto meshes, as for `orthogonalize`. Kernels go by all-to-alls to devices
            that have all rows of theirs, and each device gets all samples of its layers: those of layers that no mesh axis divides, such as
            a single one, are gathered, and nothing else.

    Returns:
        A transformation whose `update` takes `inputs` if `exact`, a pytree like the parameters: (..., in) for a kernel (in, out),
        (layers, ..., in) for (layers, in, out), None where the gradient is taken as it is, such as for biases.

    Raises:
        ValueError: if an argument is not allowed; at `init`, on parameters that are not real; at `update`, if inputs or parameters are
            missing or do not fit.

    Examples:
        >>> import jax.numpy as jnp
        >>> optimizer, w = scale_by_delta_gradient_descent(1.0), jnp.ones((1, 1))
        >>> updates, _ = optimizer.update(jnp.zeros((1, 1)), optimizer.init(w), w, inputs=jnp.array([[1.0]]))
        >>> print(f'{float(updates[0, 0]):.3f}')  # eta' = 1/2
        0.500

    References:
        Behrouz et al., `Nested Learning <https://arxiv.org/abs/2512.24695>`_, 2025, section 4.5
    """
    check_range('learning_rate', learning_rate, 0)
    check_choice('reduction', reduction, REDUCTIONS)

    def init_fn(params):
        check_real(params)
        return DeltaGradientDescentState(jnp.zeros((), jnp.int32))

    def update_fn(updates, state, params=None, *, inputs=None, **extra_args):
        del extra_args
        if exact:
            if params is None or inputs is None:
                missing = 'params' if params is None else 'inputs'
                raise ValueError(f'{missing} is None, allowed is a pytree like the updates; exact=False takes neither')
            step = functools.partial(_direction, rate=at_step(learning_rate, state.count), reduction=reduction)
            told = () if shardings is None else (jax.tree.broadcast(shardings, updates),)
            updates = jax.tree.map(step, updates, params, inputs, *told, is_leaf=lambda leaf: isinstance(leaf, optax.MaskedNode))
        return updates, DeltaGradientDescentState(optax.safe_increment(state.count))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def delta_gradient_descent(
    learning_rate: optax.ScalarOrSchedule,
    reduction: str = 'mean',
    weight_decay: ArrayLike = 0.0,
    weight_decay_mask: Mask = None,
    *,
    exact: bool = True,
    shardings: PyTree | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Delta gradient descent: exact with `update(..., inputs=)`, cheap on layers under `with_delta`. It has no state but a step count.

    Args:
        learning_rate: eta, a constant or a schedule; the same as given to `with_delta` for the cheap form.
        reduction: how the loss adds up samples: 'mean' or 'sum'.
        weight_decay: decoupled, times the learning rate.
        weight_decay_mask: tree of booleans, or a function of the parameters to one: where weight decay acts.
        exact: the form, see `scale_by_delta_gradient_descent`. With False, layers that are not under `with_delta` get gradient descent.
        shardings: of the parameters, on Auto meshes; see `scale_by_delta_gradient_descent`.

    Returns:
        The optimizer.

    Raises:
        ValueError: as `scale_by_delta_gradient_descent`; with `exact`, `update` needs `inputs`.

    Examples:
        >>> import jax, jax.numpy as jnp, optax
        >>> x, w = jnp.eye(3), jnp.ones((3, 2))
        >>> optimizer, dense = delta_gradient_descent(0.5, exact=False), with_delta(jnp.matmul, 0.5)
        >>> loss = lambda w: jnp.mean(jnp.sum(dense(x, w) ** 2, -1))
        >>> updates, _ = optimizer.update(jax.grad(loss)(w), optimizer.init(w), w)
        >>> w = optax.apply_updates(w, updates)

    References:
        Behrouz et al., `Nested Learning <https://arxiv.org/abs/2512.24695>`_, 2025, section 4.5
    """
    direction = scale_by_delta_gradient_descent(learning_rate, reduction, exact=exact, shardings=shardings)
    return with_learning_rate(direction, learning_rate, weight_decay, weight_decay_mask)


def with_delta(dense: Dense, learning_rate: ArrayLike, reduction: str = 'mean') -> Dense:
    r"""A linear layer whose weight's gradient is the cheap form's direction; its output and its input's gradient stay as they are.

    On the way back, the weight's product :math:`X^\top g` is taken with the output y added to the output's gradient:

    .. math::
      \bar W = \frac{X^\top (g + c y)}{1 + \eta c \lVert X \rVert_F^2} = \frac{G + A W}{1 + \eta \, \mathrm{tr} A}, \qquad A = c X^\top X

    with c = 1 / n for a loss that is a mean over the n samples, 1 for a sum. The trace bounds the largest eigenvalue of A, so eta times
    it stays below 1 and a step never overshoots; where inputs fill many dimensions it is loose, and steps shorter than the exact form's.

    That holds for one call with the whole batch. Directions of several calls add up, and so may overshoot: under a `jax.vmap` over
    samples, with one weight used k times, and for a convolution, whose weight sees each input once for each of its taps.

    Cost: no product, once compiled; one addition over the output, which is kept for it, and one sum of squares over the input. The module
    says what that takes. Reverse mode only.

    Args:
        dense: a function of the input (..., in) and a weight to the output, linear in the weight, that uses each entry of the input once
            for each output: a product. No bias.
        learning_rate: eta, a number or a traced scalar; the optimizer's at this step.
        reduction: how the loss adds up samples: 'mean' or 'sum'.

    Returns:
        The function, with the same arguments.

    Raises:
        ValueError: if an argument is not allowed; when called, if input or weight is not real.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> dense = with_delta(jnp.matmul, 1.0)
        >>> x, w = jnp.array([[2.0]]), jnp.array([[3.0]])
        >>> print(jax.grad(lambda w: dense(x, w).sum())(w))  # 2 * (1 + 6) / (1 + 4)
        [[2.8]]

    References:
        Behrouz et al., `Nested Learning <https://arxiv.org/abs/2512.24695>`_, 2025, section 4.5
    """
    check_range('learning_rate', learning_rate, 0)
    check_choice('reduction', reduction, REDUCTIONS)

    @jax.custom_vjp
    def apply(x, weight, rate):
        return dense(x, weight)

    def forward(x, weight, rate):
        output, backward = jax.vjp(dense, x, weight)
        return output, (backward, x, output, rate)

    def backward(residuals, gradient):
        backward, x, output, rate = residuals
        share = _share(math.prod(x.shape[:-1]), reduction)
        energy = share * jnp.sum(jnp.square(widened(x)))
        # Of each call one result is used: compiled, they are the two products of the layer's own backward pass.
        weight_bar = backward(gradient + jnp.asarray(share, output.dtype) * output)[1]
        return backward(gradient)[0], weight_bar / (1 + rate * energy).astype(weight_bar.dtype), jnp.zeros_like(rate)

    apply.defvjp(forward, backward)
    return lambda x, weight: apply(*_real(x, weight), jnp.asarray(learning_rate, working_dtype(x)))


def _real(x: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    check_real(dict(input=x, weight=weight))
    return x, weight


def _share(samples: int, reduction: str) -> float:
    return 1.0 if reduction == 'sum' else 1 / max(samples, 1)


def _direction(
    gradient: jax.Array,
    kernel: jax.Array,
    x: jax.Array | None,
    sharding: NamedSharding | None = None,
    *,
    rate: ArrayLike,
    reduction: str,
) -> jax.Array:
    if x is None or isinstance(gradient, optax.MaskedNode):
        return gradient
    *batch, width, _ = kernel.shape if kernel.ndim >= 2 else (None, None)
    if kernel.ndim < 2 or x.shape[-1] != width or list(x.shape[: len(batch)]) != batch or x.ndim <= len(batch):
        raise ValueError(f'inputs has shape {x.shape}, allowed for a kernel (..., in, out) of shape {kernel.shape} is (..., samples, in)')
    layout, samples = layout_of(kernel, sharding), math.prod(x.shape[len(batch) : -1])
    share = _share(samples, reduction)

    def solve(gradient, kernel, x, rate):
        keys = whole_matrices(x.reshape(*batch, samples, width), layout).astype(working_dtype(kernel))
        drive = lambda gradient, kernel: gradient.astype(keys.dtype) + share * (keys.mT @ (keys @ kernel.astype(keys.dtype)))
        direction = lambda gradient, kernel: resolvent(keys, drive(gradient, kernel), share * jnp.asarray(rate, keys.dtype))
        return in_layout(direction, (gradient, kernel), layout, -1).astype(gradient.dtype)

    return run_in_auto_mode(solve, (gradient, kernel, x, rate), like=gradient)
