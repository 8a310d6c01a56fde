"""Where the axes of a mesh lie on an array, how they are moved without gathering it, and where state belongs."""

import dataclasses
import functools
import itertools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding

PyTree = Any
Names = tuple[str, ...]


def state_shardings(optimizer: optax.GradientTransformation, params: PyTree, param_shardings: PyTree) -> PyTree:
    """Shardings for an optimizer's state, whatever the shapes in it: for `out_shardings` of `init` and `update`, or to restore into.

    State that belongs to a parameter has that parameter's path as a part of its own.

    - In the parameter's shape it is split as the parameter is.
    - In another shape, such as a factored moment or the weights of a memory, leading axes that agree keep their mesh axes, so that the
      state of stacked layers stays with its layer. Each mesh axis that is left goes to the first of the other axes that it divides.
    - State of no parameter, such as a step count, is replicated.

    The second is for memory. What an update multiplies whole, a learned preconditioner or the weights of `deep_momentum`, it then gathers;
    left where `init` puts it on an Explicit mesh, with few or none of its axes split, it does not.

    Args:
        optimizer: any.
        params: arrays or `jax.ShapeDtypeStruct`.
        param_shardings: a NamedSharding for each parameter, all on one mesh.

    Returns:
        A pytree like the state, with a NamedSharding for each array.

    Examples:
        >>> import jax, optax
        >>> mesh = jax.make_mesh((1,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
        >>> params = {'w': jax.ShapeDtypeStruct((4, 2), 'float32')}
        >>> shardings = state_shardings(optax.adam(0.1), params, {'w': jax.NamedSharding(mesh, jax.P(None, 'data'))})
        >>> shardings[0].mu['w'].spec, shardings[0].count.spec
        (P(None, 'data'), P())
    """
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
    paths, leaves = zip(*jax.tree_util.tree_leaves_with_path(abstract), strict=True)
    owners = dict(zip(paths, zip(leaves, jax.tree.leaves(param_shardings), strict=True), strict=True))
    mesh = jax.tree.leaves(param_shardings)[0].mesh

    def place(path, leaf):
        # Indices of a chain or a list look alike: of equally long paths the one whose parameter fits, then the one further inside.
        rank = lambda name: (len(name), owners[name][0].shape == leaf.shape, _position(path, name))
        owner = max((name for name in owners if _position(path, name) >= 0), key=rank, default=None)
        return NamedSharding(mesh, jax.P() if owner is None or not leaf.shape else _state_spec(leaf.shape, *owners[owner]))

    return jax.tree_util.tree_map_with_path(place, jax.eval_shape(optimizer.init, abstract))


@dataclasses.dataclass(frozen=True)
class Layout:
    """The mesh axes each axis of an array is split over."""

    mesh: Mesh | AbstractMesh
    names: tuple[Names, ...]

    def pieces(self, names: Names) -> int:
        """Into how many parts mesh axes split an array's axis."""
        return math.prod(self.mesh.shape[name] for name in names)

    def moved(self, name: str, source: int, target: int) -> 'Layout':
        """The layout after a mesh axis has gone from one axis of the array to another."""
        names = list(self.names)
        names[source] = tuple(other for other in names[source] if other != name)
        names[target] = (*names[target], name)
        return dataclasses.replace(self, names=tuple(names))

    def transposed(self, order: Sequence[int]) -> 'Layout':
        """The layout after `jnp.transpose(x, order)`."""
        return dataclasses.replace(self, names=tuple(self.names[axis] for axis in order))

    def stacked(self) -> 'Layout':
        """The layout after `jnp.stack`, whose new axis is not split."""
        return dataclasses.replace(self, names=((), *self.names))


def layout_of(x: jax.Array, sharding: NamedSharding | None = None) -> Layout | None:
    """The layout of `x`, None if nothing is split: from its type on Explicit mesh axes, else from `sharding`, or its own if not traced.

    Warns of a matrix in a program for an Auto mesh whose sharding is not told: only XLA knows it there, and gathers what it has to.
    """
    typed = jax.typeof(x).sharding
    if any(typed.spec):
        sharding = typed
    elif sharding is None and not isinstance(x, jax.core.Tracer):
        sharding = x.sharding if isinstance(x, jax.Array) and isinstance(x.sharding, NamedSharding) else None
    elif sharding is None and x.ndim >= 2 and AxisType.Auto in typed.mesh.axis_types and typed.mesh.size > 1:
        warnings.warn(
            f'the sharding of an array of shape {x.shape} on an Auto mesh of {typed.mesh.size} devices is not told, and XLA gathers it '
            f'if its last two axes are split: give its NamedSharding as `shardings`, or NamedSharding(mesh, P()) if they are not',
            stacklevel=2,
        )
    return None if sharding is None or not any(sharding.spec) else Layout(sharding.mesh, _names(sharding.spec, x.ndim))


def layouts_of(tree: PyTree, shardings: PyTree | None) -> list[Layout | None]:
    """The layout of each leaf; `shardings` is None or a pytree of NamedSharding that is a prefix of `tree`."""
    if shardings is None:
        return list(map(layout_of, jax.tree.leaves(tree)))
    laid = jax.tree.map(lambda sharding, part: jax.tree.map(lambda x: (layout_of(x, sharding),), part), shardings, tree)
    return [layout for (layout,) in jax.tree.structure(tree).flatten_up_to(laid)]


def run_in_auto_mode(function: Callable, arguments: tuple, like: PyTree) -> Any:
    """`function(*arguments)` with the mesh axes that are Explicit made Auto inside; results are laid out as the arrays of `like`."""
    typed = [jax.typeof(x).sharding for x in jax.tree.leaves(arguments)]
    mesh = next((sharding.mesh for sharding in typed if any(sharding.spec) and AxisType.Explicit in sharding.mesh.axis_types), None)
    if mesh is None:
        return function(*arguments)
    specs = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, like)
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.sharding.auto_axes(function, out_sharding=specs)(*arguments)


def placed_like(leaf: jax.Array, x: jax.Array, *axes: int | None) -> jax.Array:
    """State (..., i, j) of a leaf (..., in, out) on an Explicit mesh: its batch split as the leaf's, i and j as axis -2 or -1, or not."""
    if isinstance(leaf, jax.ShapeDtypeStruct) or AxisType.Explicit not in jax.typeof(leaf).sharding.mesh.axis_types:
        return x
    sharding = jax.typeof(leaf).sharding
    spec = (None, None, *sharding.spec)[-max(leaf.ndim, 2) :]
    split = jax.P(*spec[:-2], *(None if axis is None else spec[axis] for axis in axes))
    return jax.sharding.reshard(x, NamedSharding(sharding.mesh, split))


def constrain(x: jax.Array, layout: Layout) -> jax.Array:
    """`x` laid out as told; inside of Auto mode."""
    mesh = layout.mesh if isinstance(layout.mesh, Mesh) else jax.sharding.get_abstract_mesh()
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, jax.P(*layout.names)))


def in_layout(function: Callable, arrays: Sequence[jax.Array], layout: Layout | None, along: int | None) -> jax.Array:
    """`function(*arrays)` with matrices split as `route` says, and the result laid out as they were; inside of Auto mode.

    Args:
        function: of arrays to one of their shape. Zeros behind the rows, the columns or the batch give zeros there and change nothing.
        arrays: of one shape (..., m, n), all in `layout`.
        layout: None to call the function as it is.
        along: the axis partial products are summed up over, -2 or -1; None for a function that needs matrices whole.
    """
    if layout is not None and along is None and arrays[0].ndim == 2:
        return in_layout(function, [x[None] for x in arrays], layout.stacked(), along)[0]
    there, back = moves(layout, arrays[0].shape, along)
    return back(function(*map(there, arrays)))


def whole_matrices(x: jax.Array, layout: Layout | None) -> jax.Array:
    """Matrices (..., n, in) whole, where `in_layout` along -1 puts the ones (..., in, out) of a layout that they belong to; in Auto mode.

    How they are split before is not asked: XLA moves them, for one mesh axis at a time.
    """
    if layout is None:
        return x
    _, steps = route(layout, (*x.shape[:-2], x.shape[-1], 1), -1)
    for step in steps:
        x = constrain(x, dataclasses.replace(layout, names=(*step.names[:-2], jax.P.UNCONSTRAINED, jax.P.UNCONSTRAINED)))
    return constrain(x, dataclasses.replace(layout, names=(*steps[-1].names[:-2], (), ())))


def moves(layout: Layout | None, shape: tuple[int, ...], along: int | None, *, batch: bool = True) -> tuple[Callable, Callable]:
    """Functions that move an array of `shape` along its `route`, and back; inside of Auto mode. They do nothing if `layout` is None."""
    if layout is None:
        return (lambda x: x), (lambda x: x)
    padded, steps = route(layout, shape, along, batch=batch)

    def there(x):
        x = jnp.pad(x, [(0, large - size) for large, size in zip(padded, shape, strict=True)])
        return functools.reduce(constrain, steps, x)

    def back(x):
        return jax.lax.slice(functools.reduce(constrain, reversed(steps), x), (0,) * len(shape), shape)

    return there, back


def route(layout: Layout, shape: tuple[int, ...], along: int | None, *, batch: bool = True) -> tuple[tuple[int, ...], list[Layout]]:
    """A padded shape, and layouts that lead, one mesh axis at a time, from `layout` to one that `along` does not split across.

    A mesh axis goes from a matrix axis to the first batch axis it divides, else to the axis `along`, which zeros are put behind until it
    divides, or to the first batch axis if matrices must be whole. One at a time, because each such move is an all-to-all; two at once make
    XLA gather.

    Args:
        layout: of an array of shape (..., m, n), with a batch axis if `along` is None.
        shape: of the array.
        along: the matrix axis that may be split, -2 or -1, or None.
        batch: whether batch axes may be split more than they are.

    Returns:
        The shape, and the layouts in order, the first being `layout`.
    """
    last, rest, steps = len(shape) - 1, 0 if along is None else along % len(shape), [layout]
    for source in (last, last - 1):
        for name in reversed(layout.names[source]):
            names = steps[-1].names
            fits = (axis for axis in range(last - 1 if batch else 0) if shape[axis] % layout.pieces((*names[axis], name)) == 0)
            target = next(fits, rest)
            if target != source:
                steps.append(steps[-1].moved(name, source, target))
    pieces = [max(layout.pieces(step.names[axis]) for step in steps) for axis in range(len(shape))]
    return tuple(-(-size // piece) * piece for size, piece in zip(shape, pieces, strict=True)), steps


def _names(spec: jax.P, ndim: int) -> tuple[Names, ...]:
    entries = [() if entry is None else entry if isinstance(entry, tuple) else (entry,) for entry in spec]
    return (*entries, *[()] * (ndim - len(entries)))


def _position(path: tuple, part: tuple) -> int:
    """Where `part` begins in `path` for the last time, or -1."""
    starts = range(len(path) - len(part), -1, -1)
    return next((start for start in starts if path[start : start + len(part)] == part), -1)


def _state_spec(shape: tuple[int, ...], param: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.P:
    if shape == param.shape:
        return sharding.spec
    sizes, names = sharding.mesh.shape, _names(sharding.spec, param.ndim)
    equal = [ours == theirs for ours, theirs in zip(shape, param.shape, strict=False)]
    kept = equal.index(False) if False in equal else len(equal)
    placed = [*names[:kept], *[()] * (len(shape) - kept)]
    for name in itertools.chain.from_iterable(names[kept:]):
        divides = lambda axis, name=name: shape[axis] % math.prod(sizes[other] for other in (*placed[axis], name)) == 0
        target = next(filter(divides, range(kept, len(shape))), None)
        if target is not None:
            placed[target] = (*placed[target], name)
    return jax.P(*placed)
