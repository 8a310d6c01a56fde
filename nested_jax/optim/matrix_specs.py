"""Which parameters are matrices, and what each is made of: axes in and out, batch axes, fused blocks."""

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from nested_jax.optim.sharding import Layout, constrain, layouts_of, run_in_auto_mode

PyTree = Any
Axes = int | tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class BlockSpec:
    """An axis that several weights share, such as the outputs of a fused query, key and value projection.

    Attributes:
        axis: of the parameter; negative counts from the end, which also fits scanned layers.
        sizes: of the blocks along it, in order; they may differ.

    Examples:
        >>> grouped_query_attention = BlockSpec(axis=-1, sizes=(256, 64, 64))
        >>> four_heads = BlockSpec(axis=-1, sizes=(64,) * 4)
    """

    axis: int
    sizes: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class MatrixSpec:
    """The dimension numbers of a weight. Axes that are neither inputs nor outputs are batch: each index has a matrix of its own.

    Attributes:
        inputs: axis or axes summed over when the weight is applied; several are flattened into one.
        outputs: the other side of the matrix.
        blocks: fused axes, each split into its blocks before anything else.

    Examples:
        >>> attention_kernel = MatrixSpec(inputs=-3, outputs=(-2, -1))  # (embed, heads, head_dim) as one matrix
        >>> matrix_per_head = MatrixSpec(inputs=-3, outputs=-1)  # heads as batch
        >>> convolution = MatrixSpec(inputs=(0, 1, 2), outputs=3)
    """

    inputs: Axes = -2
    outputs: Axes = -1
    blocks: tuple[BlockSpec, ...] = ()


Label = str | BlockSpec | MatrixSpec  # a str is 'matrix' or 'adam'
Labels = PyTree | Callable[[str, Any], Label]

_NOT_A_MATRIX = re.compile(
    r'embed|norm|bias|conv|router|(^|_)(scale|head|classifier)$|(^|_)logits(_|$)|^(wte|wpe)$|^gate_(?!proj$|up_proj$)|_gate$|^initial'
)


def default_label(path: str, leaf: Any) -> str:
    """The rule for parameters nobody labelled.

    'adam' for leaves of fewer than two axes, for those with a size of 1 or 0 among the last two, and where a name on the path, in lower
    case,

    - contains 'embed', 'norm', 'bias', 'conv' or 'router',
    - is 'scale', 'head', 'logits' or 'classifier', or ends in one of these after an underscore,
    - is 'wte' or 'wpe',
    - begins with 'gate_', but for 'gate_proj' and 'gate_up_proj', which are projections of gated MLPs, or ends in '_gate',
    - begins with 'initial', as states that are learned.

    Everything else is 'matrix': the last two axes are inputs and outputs, the ones before are batch, as `flax.linen.scan` stacks layers.
    Kernels such as (embed, heads, head_dim) cannot be told from a stack and need a `MatrixSpec`.

    Args:
        path: names joined by '/', such as 'blocks/attention/query/kernel'.
        leaf: anything with a shape.

    Examples:
        >>> import numpy as np
        >>> default_label('blocks/mlp/up/kernel', np.zeros((12, 64, 256))), default_label('token_embedding', np.zeros((256, 64)))
        ('matrix', 'adam')
    """
    if len(leaf.shape) < 2 or min(leaf.shape[-2:]) <= 1 or any(_NOT_A_MATRIX.search(name) for name in path.lower().split('/')):
        return 'adam'
    return 'matrix'


def label_tree(params: PyTree, labels: Labels | None) -> PyTree:
    """'adam' or a checked `MatrixSpec` for each parameter.

    Args:
        params: anything with shapes; masked leaves stay masked.
        labels: None for `default_label`, a function of path and leaf, or a pytree of labels that is a prefix of the parameters'.

    Raises:
        ValueError: naming the parameter whose label is none, or does not fit its shape.
    """
    if not jax.tree.leaves(params):
        return params  # such as the placeholder of `optax.tree.map_params`
    if labels is None or callable(labels):
        chosen = jax.tree_util.tree_map_with_path(lambda path, leaf: (labels or default_label)(_name(path), leaf), params)
    else:
        chosen = jax.tree.map(lambda label, part: jax.tree.map(lambda _: label, part), labels, params)
    return jax.tree_util.tree_map_with_path(lambda path, label, leaf: _resolved(_name(path), label, leaf.shape), chosen, params)


def map_matrices(function: Callable, tree: PyTree, specs: PyTree, shardings: PyTree | None = None) -> PyTree:
    """Apply `function` to the list of all matrices in a pytree.

    Args:
        function: from a list of matrices, (..., inputs, outputs), and a list of their layouts or None to a list of matrices of the same
            shapes.
        tree: of arrays; may hold masked leaves.
        specs: `MatrixSpec` for each leaf.
        shardings: on Auto meshes a pytree of NamedSharding that is a prefix of `tree`, or None.

    Returns:
        The pytree of what the function returned, put together again.
    """
    leaves, structure = jax.tree.flatten(tree)
    specs = structure.flatten_up_to(specs)
    layouts = layouts_of(tree, shardings)

    def run(leaves):
        parts = [_matrices(*leaf) for leaf in zip(leaves, specs, layouts, strict=True)]
        matrices, matrix_layouts = zip(*itertools.chain.from_iterable(parts), strict=True)
        results = iter(function(list(matrices), list(matrix_layouts)))
        joined = lambda part, spec, leaf, layout: _joined([next(results) for _ in part], spec, leaf.shape, layout)
        return list(map(joined, parts, specs, leaves, layouts))

    return structure.unflatten(run_in_auto_mode(run, (leaves,), like=leaves)) if leaves else tree


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator='/')


def _resolved(name: str, label: Any, shape: tuple[int, ...]) -> str | MatrixSpec:
    if label == 'adam':
        return label
    spec = MatrixSpec() if label == 'matrix' else MatrixSpec(blocks=(label,)) if isinstance(label, BlockSpec) else label
    if not isinstance(spec, MatrixSpec):
        raise ValueError(f"label of parameter {name} is {label!r}, allowed are 'matrix', 'adam', a BlockSpec or a MatrixSpec")
    matrix_axes, block_axes = (*_tuple(spec.inputs), *_tuple(spec.outputs)), tuple(block.axis for block in spec.blocks)
    in_range = all(-len(shape) <= axis < len(shape) for axis in matrix_axes + block_axes)
    if not in_range or not all(len({axis % len(shape) for axis in axes}) == len(axes) for axes in (matrix_axes, block_axes)):
        raise ValueError(f'label of parameter {name} is {spec}, allowed are separate inputs and outputs among the axes of shape {shape}')
    for block in spec.blocks:
        if sum(block.sizes) != shape[block.axis] or min(block.sizes) < 1:
            raise ValueError(f'sizes of parameter {name} are {block.sizes}, allowed are block sizes that add up to {shape[block.axis]}')
    return spec


def _tuple(axes: Axes) -> tuple[int, ...]:
    return (axes,) if isinstance(axes, int) else tuple(axes)


def _order(spec: MatrixSpec, ndim: int) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Batch, input and output axes."""
    inputs, outputs = (tuple(axis % ndim for axis in _tuple(axes)) for axes in (spec.inputs, spec.outputs))
    return tuple(axis for axis in range(ndim) if axis not in inputs + outputs), inputs, outputs


def _matrices(x: jax.Array, spec: MatrixSpec, layout: Layout | None) -> list[tuple[jax.Array, Layout | None]]:
    """The matrices of a parameter, each (*batch, inputs, outputs), with their layouts."""
    return [_flat(part, spec, layout) for part in _split(x, spec.blocks)]


def _flat(x: jax.Array, spec: MatrixSpec, layout: Layout | None) -> tuple[jax.Array, Layout | None]:
    batch, inputs, outputs = _order(spec, x.ndim)
    for step in _merging(layout, spec, x.shape):
        x, layout = constrain(x, step), step
    if layout is not None:
        merged = [sum((layout.names[axis] for axis in axes), ()) for axes in (inputs, outputs)]
        layout = dataclasses.replace(layout, names=(*(layout.names[axis] for axis in batch), *merged))
    return x.transpose(batch + inputs + outputs).reshape(*(x.shape[axis] for axis in batch), *_sides(spec, x.shape)), layout


def _merging(layout: Layout | None, spec: MatrixSpec, shape: tuple[int, ...]) -> list[Layout]:
    """Layouts from `layout` on to one where of axes that are flattened into one the first alone is split, so that no part has to move."""
    steps = [] if layout is None else [layout]
    for first, *others in _order(spec, len(shape))[1:] if steps else ():
        for source in reversed(others):
            for name in reversed(layout.names[source]):
                if shape[first] % layout.pieces((*steps[-1].names[first], name)) == 0:
                    steps.append(steps[-1].moved(name, source, first))
    return steps if len(steps) > 1 else steps[1:]


def _sides(spec: MatrixSpec, shape: Sequence[int]) -> tuple[int, int]:
    _, inputs, outputs = _order(spec, len(shape))
    return math.prod(shape[axis] for axis in inputs), math.prod(shape[axis] for axis in outputs)


def _split(x: jax.Array, blocks: tuple[BlockSpec, ...]) -> list[jax.Array]:
    parts = [x]
    for block in blocks:
        ends = list(itertools.accumulate(block.sizes))[:-1]
        parts = [piece for part in parts for piece in jnp.split(part, ends, axis=block.axis)]
    return parts


def _joined(matrices: list[jax.Array], spec: MatrixSpec, shape: tuple[int, ...], layout: Layout | None) -> jax.Array:
    """The inverse of `_matrices`."""
    batch, inputs, outputs = _order(spec, len(shape))
    order = batch + inputs + outputs
    back = sorted(range(len(shape)), key=order.__getitem__)
    split = jax.eval_shape(lambda x: _split(x, spec.blocks), jax.ShapeDtypeStruct(shape, matrices[0].dtype))
    parts = []
    for x, part in zip(matrices, split, strict=True):
        x = x.reshape([part.shape[axis] for axis in order]).transpose(back)
        for step in reversed(_merging(layout, spec, part.shape)):
            x = constrain(x, step)
        parts.append(x)
    for block in reversed(spec.blocks):
        count = len(block.sizes)
        parts = [jnp.concatenate(parts[start : start + count], axis=block.axis) for start in range(0, len(parts), count)]
    return parts[0]
