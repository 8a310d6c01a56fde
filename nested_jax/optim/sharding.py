"""Where the axes of a mesh lie on an array, how they are moved without gathering it, and where state belongs."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
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

    def transposed(self, order: Sequence[int]) -> 'Layout':
        """The layout after `jnp.transpose(x, order)`."""
        return dataclasses.replace(self, names=tuple(self.names[axis] for axis in order))

    def stacked(self) -> 'Layout':
        """The layout after `jnp.stack`, whose new axis is not split."""
        return dataclasses.replace(self, names=((), *self.names))


def layout_of(x: jax.Array, sharding: NamedSharding | None = None) -> Layout | None:
    """The layout of `x`: from its type on Explicit mesh axes, else from `sharding`; None where nothing is split."""
    typed = jax.typeof(x).sharding
    sharding = typed if any(typed.spec) else sharding
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


def constrain(x: jax.Array, layout: Layout) -> jax.Array:
    """`x` laid out as told; inside of Auto mode."""
    mesh = layout.mesh if isinstance(layout.mesh, Mesh) else jax.sharding.get_abstract_mesh()
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, jax.P(*layout.names)))


def moves_to_batch(layout: Layout, shape: tuple[int, ...]) -> list[Layout]:
    """Layouts that lead, one mesh axis at a time, from `layout` to one whose matrices are whole on a device.

    A mesh axis goes from a matrix axis to the first batch axis it divides, else to the last axis, along which products of the form
    x x^T sum up partial products, else it stays. One at a time, because each such move is an all-to-all; two at once make XLA gather.

    Args:
        layout: of an array of shape (..., m, n), m <= n.
        shape: of the array.

    Returns:
        The layouts in order, the first being `layout` without what does not divide its axis.
    """
    sizes = dict(layout.mesh.shape)
    fits = lambda axis, names: shape[axis] % math.prod(sizes[name] for name in names) == 0
    names = [entry if fits(axis, entry) else () for axis, entry in enumerate(layout.names)]
    steps = [tuple(names)]
    last = len(shape) - 1
    for source in (last, last - 1):
        for name in reversed(names[source]):
            target = next((axis for axis in (*range(last - 1), last) if axis != source and fits(axis, (*names[axis], name))), None)
            if target is not None:
                names[source] = tuple(other for other in names[source] if other != name)
                names[target] = (*names[target], name)
                steps.append(tuple(names))
    return [dataclasses.replace(layout, names=step) for step in steps]


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
