"""Delta gradient descent for the linear layers of a flax.linen model without changing its code: interceptors of their methods.

Linear layers are `nn.Dense` and our own `Projection`. All else keeps its own gradient: `nn.DenseGeneral`, `nn.Einsum`, `nn.Embed`,
convolutions, a `Projection` with a LoRA adapter, and kernels that a model multiplies by itself, such as the head of `LanguageModel`.
For those, and for functions that are no modules, see `nested_jax.optim.delta_products`, which goes by products and not by layers.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from nested_jax.layers.common import Projection
from nested_jax.optim.delta_descent import with_delta

PyTree = Any
COLLECTION = 'delta_inputs'


def delta_dense(learning_rate: ArrayLike, reduction: str = 'mean') -> Callable:
    """Put `nested_jax.optim.with_delta` under every linear layer inside the context; biases keep their own gradient.

    A layer's samples are flattened into one axis, as `with_delta` likes them and `Projection` does by itself: on an Explicit mesh, none
    of their axes can be sharded behind one that is not.

    Args:
        learning_rate: eta, a number or a traced scalar.
        reduction: how the loss adds up samples: 'mean' or 'sum'.

    Returns:
        An interceptor.

    Examples:
        >>> import flax.linen as nn, jax, jax.numpy as jnp
        >>> model, x = nn.Dense(2), jnp.ones((4, 3))
        >>> variables = model.init(jax.random.key(0), x)
        >>> with nn.intercept_methods(delta_dense(0.1)):
        ...     gradients = jax.grad(lambda variables: model.apply(variables, x).mean())(variables)
    """

    def interceptor(next_fun, args, kwargs, context):
        if not _is_linear(context) or context.module.is_initializing():
            return next_fun(*args, **kwargs)
        (x,) = (*args, *kwargs.values())
        return _linear(context.module, x, lambda dense: with_delta(dense, learning_rate, reduction))

    return interceptor


def capture_inputs(next_fun: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
    """Interceptor that keeps the input of every linear layer in the collection 'delta_inputs', for the exact form.

    A lifted transformation (`nn.scan`, `nn.vmap`) passes on the collections it names only: name this one there.
    """
    if _is_linear(context):
        (x,) = (*args, *kwargs.values())
        context.module.sow(COLLECTION, 'kernel', x)
    return next_fun(*args, **kwargs)


def inputs_for(params: PyTree, captured: PyTree) -> PyTree:
    """What `delta_gradient_descent` takes as `inputs`: the captured input of each kernel, None for every other leaf.

    Args:
        params: the model's parameters.
        captured: the collection 'delta_inputs' of `model.apply(..., mutable='delta_inputs')`.

    Raises:
        ValueError: if a layer was called more than once: its inputs then have no single shape; or if an input has no parameter, as when
            the two are nested differently.
    """
    if extra := _names(captured) - _names(params):
        raise ValueError(f'captured holds {sorted(extra)}, allowed are inputs of parameters: {sorted(_names(params))}')

    def find(path, _):
        node = captured
        for key in path:
            node = node.get(key.key) if isinstance(node, Mapping) else None
        if node is not None and len(node) > 1:
            name = jax.tree_util.keystr(path, simple=True, separator='/')
            raise ValueError(f'captured at {name!r} has {len(node)} calls, allowed is one')
        return node[0] if node else None

    return jax.tree_util.tree_map_with_path(find, params)


def _names(tree: PyTree) -> set[str]:
    """Paths of dictionary keys."""
    keys = lambda path: [key for key in path if isinstance(key, jax.tree_util.DictKey)]
    return {jax.tree_util.keystr(keys(path), simple=True, separator='/') for path, _ in jax.tree_util.tree_leaves_with_path(tree)}


def _is_linear(context: nn.module.InterceptorContext) -> bool:
    module = context.module
    linear = isinstance(module, nn.Dense) or isinstance(module, Projection) and not module.has_variable('lora', 'a')
    return linear and context.method_name == '__call__'


def _linear(module: nn.Dense | Projection, inputs: jax.Array, wrap: Callable) -> jax.Array:
    """What the layer computes, with its product wrapped."""
    read = lambda name: module.get_variable('params', name)
    product, operands = _product(module, inputs, read('kernel'), read('bias') if module.use_bias else None)
    rows, kernel, bias = operands
    output = wrap(product)(rows.reshape(-1, rows.shape[-1]), kernel)
    output = output if bias is None else output + bias[None]
    return output.reshape(*inputs.shape[:-1], kernel.shape[-1])


def _product(module: nn.Dense | Projection, *operands: jax.Array | None) -> tuple[Callable, Sequence[jax.Array | None]]:
    """The layer's product of rows and a kernel, and its operands in the dtype that it computes in."""
    if isinstance(module, Projection):
        return jnp.matmul, [operand if operand is None else operand.astype(module.dtype) for operand in operands]
    dot_general = module.dot_general_cls() if module.dot_general_cls else module.dot_general or jax.lax.dot_general
    product = lambda rows, kernel: dot_general(rows, kernel, (((1,), (0,)), ((), ())), precision=module.precision)
    return product, module.promote_dtype(*operands, dtype=module.dtype)
