"""Where parameters, optimizer state and batches lie on a mesh of devices.

One frozen dataclass says which mesh axes each logical axis of `nested_jax.models.axes` is split over. XLA does the rest: what the rules
do not say is propagated. On a mesh of Explicit axes that holds for the model alone, whose products over split axes would each have to name
the layout of their result: what goes into the step and comes out of it, gradients and the optimizer have their layout in their types.

The mesh axes, outermost first:
    replica, data   copies of the parameters, each with its share of the batch; several TPU slices are replicas of each other
    fsdp            a share of the batch, and of every parameter, which is gathered when it is used
    sequence        a stretch of each sequence, by hand (`nested_jax.layers.sequence`); whole parameters and optimizer state
    tensor          a share of the heads, of the hidden units and of the vocabulary
"""

import dataclasses
import math
from typing import Any

import jax
import numpy as np
import optax
from jax.experimental.mesh_utils import create_device_mesh, create_hybrid_device_mesh
from jax.sharding import AxisType, Mesh, NamedSharding

from nested_jax.layers.mesh import BATCH_AXES
from nested_jax.models.axes import Axes, logical_axes
from nested_jax.optim.sharding import state_shardings
from nested_jax.training.mesh_sizes import MESH_AXES, batch_shares, count_slices
from nested_jax.training.state import TrainState

PyTree = Any
Names = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class ShardingRules:
    """Logical axis -> the mesh axes it is split over.

    An axis that its mesh axes do not divide stays whole. `spread` names mesh axes that a matrix is split over in any case: where no
    logical axis takes them, the first other named axis they divide does (so memories are split by head), else the first unnamed one,
    else the matrix is whole on each of them. 'layers' are never spread over, since a scan would gather the stack at every step, nor are
    vectors, which are a thousandth of the bytes and would be a collective each.

    Raises:
        ValueError: for a mesh axis that does not exist, or twice in one field.
    """

    embed: Names = ()
    heads: Names = ()
    mlp: Names = ()
    vocab: Names = ()
    layers: Names = ()
    batch: Names = ()
    spread: Names = ()

    def __post_init__(self):
        for field in dataclasses.fields(self):
            names = getattr(self, field.name)
            if len(set(names)) != len(names) or not set(names) <= set(MESH_AXES):
                raise ValueError(f'rules.{field.name} is {names!r}, allowed are some of {MESH_AXES}, each once')

    def spec(self, axes: Axes, shape: tuple[int, ...], sizes: dict[str, int]) -> jax.P:
        """Mesh axes of one parameter.

        Args:
            axes: logical name of each axis, None for axes no rule splits.
            shape: of the parameter.
            sizes: mesh axis -> devices along it.

        Raises:
            ValueError: for a mesh axis that the mesh lacks, or that two axes of the parameter would be split over.
        """
        wanted = [getattr(self, axis) if axis else () for axis in axes]
        self._check(axes, wanted, sizes)
        if sum(axis != 'layers' for axis in axes) < 2:
            wanted = [tuple(name for name in names if name not in self.spread) for names in wanted]
            return jax.P(*(names or None for names in _that_divide(wanted, shape, sizes)))
        placed = _that_divide(wanted, shape, sizes)
        order = sorted((axis for axis, name in enumerate(axes) if name != 'layers'), key=lambda axis: axes[axis] is None)
        for name in self.spread:
            divides = lambda axis, name=name: shape[axis] % _product((*placed[axis], name), sizes) == 0
            target = next(filter(divides, order), None)
            if target is not None and not any(name in names for names in placed):
                placed[target] = (*placed[target], name)
        return jax.P(*(names or None for names in placed))

    def _check(self, axes: Axes, wanted: list[Names], sizes: dict[str, int]) -> None:
        taken = [name for names in wanted for name in names]
        for name in (*taken, *self.spread):
            if name not in sizes:
                raise ValueError(f'the rules name a mesh axis {name!r}, allowed are those of the mesh, {tuple(sizes)}')
            if taken.count(name) > 1:
                raise ValueError(f'two of the axes {axes} would be split over {name!r}, allowed is one axis of an array for each mesh axis')


def _product(names: Names, sizes: dict[str, int]) -> int:
    return math.prod(sizes[name] for name in names)


def _that_divide(wanted: list[Names], shape: tuple[int, ...], sizes: dict[str, int]) -> list[Names]:
    return [names if size % _product(names, sizes) == 0 else () for names, size in zip(wanted, shape, strict=True)]


def recipe(mesh_axes: Names) -> ShardingRules:
    """The rules for a mesh with these axes: data parallel, FSDP, tensor parallel, combined, and with sequences split or not.

    FSDP splits the model's width, tensor parallelism what lies across it: columns of the projections into a block, rows of those out
    of it, so that a block has one sum over `tensor` for its mixer and one for each level.

    Raises:
        ValueError: for an axis no recipe knows.
    """
    unknown = [name for name in mesh_axes if name not in MESH_AXES]
    if unknown:
        raise ValueError(f'the mesh has an axis {unknown[0]!r}, allowed are {", ".join(MESH_AXES)}')
    only = lambda *names: tuple(name for name in names if name in mesh_axes)
    fsdp, tensor = only('fsdp'), only('tensor')
    return ShardingRules(embed=fsdp, heads=tensor, mlp=tensor, vocab=tensor, batch=only(*BATCH_AXES), spread=fsdp)


def make_mesh(sizes: dict[str, int], devices: list, explicit: bool = False) -> Mesh:
    """A mesh in the order of `MESH_AXES`: what communicates most lies innermost, slices lie along `replica`.

    Args:
        sizes: mesh axis -> devices along it; `replica` a multiple of the slices.
        devices: as many as the product of the sizes.
        explicit: whether types of arrays say where they lie.
    """
    names, slices = tuple(name for name in MESH_AXES if name in sizes), count_slices(devices)
    shape = tuple(sizes[name] for name in names)
    # Not jax.make_mesh, which splits the axes of a TPU's torus on a v5e only: a v6e of 16 x 16 could not be 8 x 16 x 2.
    if slices == 1:
        grid = create_device_mesh(shape, devices, allow_split_physical_axes=True)
    else:  # the first axis is replica
        within, between = (shape[0] // slices, *shape[1:]), (slices, *[1] * (len(shape) - 1))
        grid = create_hybrid_device_mesh(within, between, devices, allow_split_physical_axes=True)
    return Mesh(grid, names, axis_types=(AxisType.Explicit if explicit else AxisType.Auto,) * len(names))


@dataclasses.dataclass(frozen=True)
class Placement:
    """A mesh and the rules on it."""

    mesh: Mesh
    rules: ShardingRules

    @classmethod
    def on(cls, mesh: Mesh) -> 'Placement':
        """The recipe for the mesh's axes."""
        return cls(mesh, recipe(mesh.axis_names))

    @property
    def replicated(self) -> NamedSharding:
        """Of what every device holds whole."""
        return NamedSharding(self.mesh, jax.P())

    @property
    def rows(self) -> NamedSharding:
        """Of a batch (B, ...)."""
        return NamedSharding(self.mesh, jax.P(self.rules.batch or None))

    @property
    def num_shares(self) -> int:
        """Devices that have rows of their own: a batch has to be a multiple of it."""
        return batch_shares(dict(self.mesh.shape))

    def place(self, rows: dict[str, np.ndarray], batch_size: int) -> dict[str, jax.Array]:
        """Global arrays (B, ...) of the rows that each process holds (`process_rows`), arrays (rows, ...) in host memory.

        Args:
            rows: of this process.
            batch_size: B.
        """
        whole = lambda local: (batch_size, *local.shape[1:])
        return {name: jax.make_array_from_process_local_data(self.rows, local, whole(local)) for name, local in rows.items()}

    def params(self, params: PyTree) -> PyTree:
        """A NamedSharding for each parameter of a `LanguageModel`, arrays or shapes."""
        sizes = dict(self.mesh.shape)
        place = lambda leaf, axes: NamedSharding(self.mesh, self.rules.spec(axes, leaf.shape, sizes))
        return jax.tree.map(place, params, logical_axes(params))

    def state(self, optimizer: optax.GradientTransformation, params: PyTree) -> TrainState:
        """A NamedSharding for each leaf of the state; the optimizer's lie where the parameters they belong to do.

        Args:
            optimizer: any.
            params: arrays or shapes.
        """
        shardings = self.params(params)
        return TrainState(self.replicated, shardings, state_shardings(optimizer, params, shardings), self.replicated)


def process_rows(sharding: NamedSharding, batch_size: int, process: int) -> tuple[np.ndarray, np.ndarray]:
    """The rows of a batch that one process's devices hold.

    Args:
        sharding: of the batch's rows.
        batch_size: of the global batch.
        process: its index.

    Returns:
        The rows, ascending, and which of them (bool) no process of a lower index holds too: those are its to count.
    """
    owner, held = np.full(batch_size, np.iinfo(np.int64).max), np.zeros(batch_size, bool)
    for device, (rows,) in sharding.devices_indices_map((batch_size,)).items():
        owner[rows] = np.minimum(owner[rows], device.process_index)
        held[rows] |= device.process_index == process
    return np.flatnonzero(held), owner[held] == process
