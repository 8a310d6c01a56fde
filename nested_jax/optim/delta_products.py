"""Delta gradient descent for the products of any function without changing its code: the function is traced and run again.

A product counts where one operand is a leaf of the parameters, as it is, in another dtype, transposed or reshaped, and the other is not,
with no batch axes; so `x @ w`, `jnp.einsum`, `nn.Dense`, `nn.DenseGeneral` and the projections of flax's attention, under `jax.jit`,
`jax.checkpoint` and `jax.lax.scan` too. All else keeps its own gradient: convolutions, look-ups, experts of one stack, products with an
`out_sharding`, and those under `jax.vmap` over parameters, in other loops, in conditionals and in functions with derivatives of their own.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Jaxpr, JaxprEqn, Literal
from jax.typing import ArrayLike

from nested_jax.optim.checks import check_choice, check_range
from nested_jax.optim.delta_descent import REDUCTIONS, with_delta

PyTree = Any
Function = Callable[..., PyTree]  # of parameters and further arrays


class Kernel(NamedTuple):
    """Which leaf of the parameters a value is."""

    leaf: int
    as_it_is: bool  # not transposed, not reshaped


Found = list[tuple[int, jax.Array]]  # leaf, and the rows (samples, in) that it was multiplied by


def delta_products(function: Function, learning_rate: ArrayLike, reduction: str = 'mean') -> Function:
    """The function with `with_delta` under every product of activations and a parameter; its results stay as they are.

    The module says what a product is. Samples are flattened into one axis, as `with_delta` likes them. Reverse mode only.

    Args:
        function: of parameters, and of further arguments that are arrays.
        learning_rate: eta, a number or a traced scalar; the optimizer's at this step.
        reduction: how the loss adds up samples: 'mean' or 'sum'.

    Returns:
        A function with the same arguments; its gradient by the parameters is what `delta_gradient_descent(exact=False)` takes.

    Raises:
        ValueError: if an argument is not allowed.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> loss = lambda params, x: jnp.mean(jnp.tanh(x @ params['in']) @ params['out'])
        >>> params = {'in': jnp.ones((3, 4)), 'out': jnp.ones((4, 1))}
        >>> gradients = jax.grad(delta_products(loss, 0.1))(params, jnp.ones((2, 3)))
    """
    check_range('learning_rate', learning_rate, 0)
    check_choice('reduction', reduction, REDUCTIONS)
    return lambda *args, **kwargs: _run_again(function, _Delta(learning_rate, reduction), args, kwargs)[0]


def with_inputs(function: Function) -> Function:
    """The function with the inputs that the exact form of delta gradient descent takes as a second result.

    Kernels are leaves (in, out), or (layers, in, out) that a scan goes through, which are multiplied as they are. The module says what a
    product is.

    Args:
        function: of parameters, and of further arguments that are arrays.

    Returns:
        A function with the same arguments that returns a pair: what the function returns, and a pytree like the parameters for
        `delta_gradient_descent(...).update(..., inputs=)`: (samples, in) or (layers, samples, in) for a kernel, None for another leaf.
        Calling it raises ValueError where a kernel is in more than one product: its inputs then have no single shape.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> loss = lambda params, x: jnp.mean(x @ params['w']) + params['b']
        >>> params, x = {'w': jnp.ones((3, 2)), 'b': jnp.zeros(())}, jnp.ones((4, 5, 3))
        >>> gradients, inputs = jax.grad(with_inputs(loss), has_aux=True)(params, x)
        >>> inputs['w'].shape, inputs['b']
        ((20, 3), None)
    """

    def run(params, *args, **kwargs):
        output, found = _run_again(function, _Capture(), (params, *args), kwargs)
        paths, structure = jax.tree.flatten_with_path(params)
        inputs = [None] * len(paths)
        for leaf, rows in found:
            if inputs[leaf] is not None:
                name = jax.tree_util.keystr(paths[leaf][0], simple=True, separator='/')
                raise ValueError(f'params at {name!r} is in more than one product, allowed is one')
            inputs[leaf] = rows
        return output, structure.unflatten(inputs)

    return run


@dataclasses.dataclass(frozen=True)
class _Delta:
    """What becomes of a product for the cheap form."""

    learning_rate: ArrayLike
    reduction: str

    def __call__(self, product: Callable, rows: jax.Array, matrix: jax.Array, kernel: Kernel) -> tuple[jax.Array, Found]:
        return with_delta(product, self.learning_rate, self.reduction)(rows, matrix), []


class _Capture:
    """What becomes of a product for the exact form."""

    def __call__(self, product: Callable, rows: jax.Array, matrix: jax.Array, kernel: Kernel) -> tuple[jax.Array, Found]:
        return product(rows, matrix), [(kernel.leaf, rows)] if kernel.as_it_is else []


def _run_again(function: Function, replace: Callable, args: tuple, kwargs: dict) -> tuple[PyTree, Found]:
    """What the function returns, with its products replaced, and what that has found."""
    traced, shapes = jax.make_jaxpr(function, return_shape=True)(*args, **kwargs)
    leaves = len(jax.tree.leaves(args[0]))
    values = jax.tree.leaves((args, kwargs))
    kernels = [Kernel(leaf, True) if leaf < leaves else None for leaf in range(len(values))]
    outputs, found = _evaluate(replace, traced.jaxpr, traced.consts, values, kernels)
    return jax.tree.structure(shapes).unflatten(outputs), found


def _evaluate(
    replace: Callable, jaxpr: Jaxpr, consts: Sequence[jax.Array], values: Sequence[jax.Array], kernels: Sequence[Kernel | None]
) -> tuple[list[jax.Array], Found]:
    """Results of a jaxpr, whose arguments are kernels or are not."""
    known = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *values), strict=True))
    marks = dict(zip(jaxpr.invars, kernels, strict=True))
    read = lambda atom: atom.val if isinstance(atom, Literal) else known[atom]
    mark = lambda atom: None if isinstance(atom, Literal) else marks.get(atom)
    found = []
    for equation in jaxpr.eqns:
        operands, operand_marks = list(map(read, equation.invars)), list(map(mark, equation.invars))
        handler = _HANDLERS.get(equation.primitive.name) if any(operand_marks) else None
        with equation.ctx.manager:
            outputs, more, kept = (handler or _as_it_is)(replace, equation, operands, operand_marks)
        found += more
        known.update(zip(equation.outvars, outputs, strict=True))
        marks.update(zip(equation.outvars, [kept] * len(outputs), strict=True))
    return list(map(read, jaxpr.outvars)), found


# Handlers: operands and which of them are kernels -> results, what was found, and which kernel the results are.


def _as_it_is(replace: Callable, equation: JaxprEqn, operands: list, kernels: list) -> tuple[list, Found, Kernel | None]:
    outputs = equation.primitive.bind(*operands, **equation.primitive.get_bind_params(equation.params))
    return outputs if equation.primitive.multiple_results else [outputs], [], None


def _still_a_kernel(replace: Callable, equation: JaxprEqn, operands: list, kernels: list) -> tuple[list, Found, Kernel | None]:
    outputs, found, _ = _as_it_is(replace, equation, operands, kernels)
    as_it_is = equation.primitive.name == 'convert_element_type' and kernels[0].as_it_is
    return outputs, found, kernels[0]._replace(as_it_is=as_it_is)


def _dot_general(replace: Callable, equation: JaxprEqn, operands: list, kernels: list) -> tuple[list, Found, Kernel | None]:
    """The product as one of two matrices, rows (samples, in) and a kernel (in, out)."""
    params = dict(equation.params)
    contracted, batch = params.pop('dimension_numbers')
    if all(kernels) or batch[0] or not contracted[0] or params['out_sharding'] is not None:
        return _as_it_is(replace, equation, operands, kernels)
    right = 0 if kernels[0] else 1
    (x, weight), (x_axes, weight_axes) = (operands, contracted) if right else (operands[::-1], contracted[::-1])
    x_free, weight_free = ([axis for axis in range(y.ndim) if axis not in axes] for y, axes in ((x, x_axes), (weight, weight_axes)))
    width = math.prod(x.shape[axis] for axis in x_axes)
    rows = x.transpose(*x_free, *x_axes).reshape(-1, width)
    matrix = weight.transpose(*weight_axes, *weight_free).reshape(width, -1)
    product = functools.partial(jax.lax.dot_general, dimension_numbers=(((1,), (0,)), ((), ())), **params)
    kernel = kernels[right]
    kernel = kernel._replace(as_it_is=kernel.as_it_is and weight.ndim == 2 and tuple(weight_axes) == (0,))
    output, found = replace(product, rows, matrix, kernel)
    free = [x.shape[axis] for axis in x_free], [weight.shape[axis] for axis in weight_free]
    output = output.reshape(*free[0], *free[1])
    return [output if right else jnp.moveaxis(output, range(len(free[0])), range(-len(free[0]), 0))], found, None


def _call(replace: Callable, equation: JaxprEqn, operands: list, kernels: list) -> tuple[list, Found, Kernel | None]:
    inner = equation.params['jaxpr']
    return *_evaluate(replace, inner.jaxpr, inner.consts, operands, kernels), None


def _checkpoint(replace: Callable, equation: JaxprEqn, operands: list, kernels: list) -> tuple[list, Found, Kernel | None]:
    params, leaves = equation.params, []

    def run(*operands):
        outputs, found = _evaluate(replace, params['jaxpr'], (), operands, kernels)
        leaves[:] = [leaf for leaf, _ in found]
        return outputs, [rows for _, rows in found]

    outputs, rows = jax.checkpoint(run, prevent_cse=params['prevent_cse'], policy=params['policy'])(*operands)
    return outputs, list(zip(leaves, rows, strict=True)), None


def _scan(replace: Callable, equation: JaxprEqn, operands: list, kernels: list) -> tuple[list, Found, Kernel | None]:
    params, leaves = equation.params, []
    inner, constants, carried = params['jaxpr'], params['num_consts'], params['num_carry']
    begin = constants + carried
    kernels = [*kernels[:constants], *[None] * carried, *kernels[begin:]]

    def body(carry, xs):
        outputs, found = _evaluate(replace, inner.jaxpr, inner.consts, [*operands[:constants], *carry, *xs], kernels)
        leaves[:] = [leaf for leaf, _ in found]
        return outputs[:carried], (outputs[carried:], [rows for _, rows in found])

    how = {name: params[name] for name in ('length', 'reverse', 'unroll')}
    carry, (outputs, rows) = jax.lax.scan(body, operands[constants:begin], operands[begin:], **how)
    return [*carry, *outputs], list(zip(leaves, rows, strict=True)), None


_HANDLERS = {
    'dot_general': _dot_general, 'scan': _scan, 'jit': _call, 'checkpoint': _checkpoint, 'remat2': _checkpoint,
    **dict.fromkeys(('convert_element_type', 'transpose', 'reshape', 'squeeze'), _still_a_kernel),
}  # fmt: skip
