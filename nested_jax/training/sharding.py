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
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental.mesh_utils import create_device_mesh, create_hybrid_device_mesh
from jax.sharding import AxisType, Mesh, NamedSharding

from nested_jax.config import ModelConfig
from nested_jax.layers import sequence
from nested_jax.layers.mesh import BATCH_AXES
from nested_jax.models.axes import Axes, logical_axes
from nested_jax.models.language_model import LanguageModel
from nested_jax.optim.sharding import state_shardings
from nested_jax.training.state import TrainState

PyTree = Any
Names = tuple[str, ...]
MESH_AXES = (*BATCH_AXES, sequence.AXIS, 'tensor')
# Bytes of float32 parameters, gradients and AdamW's two moments that every device may hold whole.
_REPLICATED_BYTES = 2**30


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


def parse_axes(text: str) -> dict[str, int]:
    """'data=2,fsdp=4' -> {'data': 2, 'fsdp': 4}.

    Raises:
        ValueError: for another form, or an axis that does not exist or comes twice.
    """
    sizes = {}
    for part in text.split(','):
        name, _, size = part.strip().partition('=')
        if name not in MESH_AXES or name in sizes or not size.isdecimal() or int(size) < 1:
            raise ValueError(f'mesh is {text!r}, allowed is axis=size,..., each axis once, of {", ".join(MESH_AXES)}')
        sizes[name] = int(size)
    return sizes


def parse_mesh(text: str, num_devices: int) -> dict[str, int]:
    """The same for so many devices.

    Raises:
        ValueError: see `parse_axes`, and for sizes whose product is not `num_devices`.
    """
    sizes = parse_axes(text)
    if math.prod(sizes.values()) != num_devices:
        raise ValueError(f'mesh is {text!r}, {math.prod(sizes.values())} devices, allowed are sizes whose product is {num_devices}')
    return sizes


def choose_mesh(text: str | None, config: ModelConfig, num_devices: int, num_slices: int = 1) -> dict[str, int]:
    """The sizes a command line asks for, or a default: the devices of each slice on one axis.

    That is `data` while parameters, gradients and AdamW's moments fit every device whole in 1 GiB, else `fsdp`: gathering parameters
    costs more than it saves while they are small.

    Args:
        text: as `parse_mesh` takes it, or None.
        config: of the model.
        num_devices: that share the work.
        num_slices: that these make up, see `count_slices`.

    Raises:
        ValueError: for a text that does not fit the devices, their slices or the model's heads.
    """
    if text is not None:
        sizes = parse_mesh(text, num_devices)
        check_mesh(config, sizes)
        if sizes.get('replica', 1) % num_slices:
            allowed = f'a multiple of the {num_slices} slices'
            raise ValueError(f'mesh is {text!r}, with replica={sizes.get("replica", 1)}, allowed is {allowed}')
        return sizes
    if num_slices > 1:
        return {'replica': num_slices} | choose_mesh(None, config, num_devices // num_slices)
    if num_devices == 1:
        return {'data': 1}
    init = lambda: LanguageModel(config).init(jax.random.key(0), jnp.zeros((1, config.grid), jnp.int32))
    num_parameters = sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(init)))
    return {'data' if 16 * num_parameters <= _REPLICATED_BYTES else 'fsdp': num_devices}


def check_mesh(config: ModelConfig, sizes: dict[str, int]) -> None:
    """Raises ValueError unless `tensor` divides the heads, since a head is never cut, and the model's sequences can be split.

    States that are handed on have all heads, which `tensor` would split.
    """
    tensor, stretches = sizes.get('tensor', 1), sizes.get(sequence.AXIS, 1)
    if stretches > 1 and config.in_sequence is not None:
        raise ValueError(f'mesh has sequence={stretches}, allowed is 1 where levels are updated within a sequence')
    if stretches > 1 and tensor > 1 and set(config.unit) != {'attention'}:
        raise ValueError(f'mesh has sequence={stretches} and tensor={tensor}, allowed is one of them, except for attention alone')
    heads = {'num_heads': config.num_heads, 'attention.num_kv_heads': config.num_kv_heads}
    if 'mamba2' in config.unit:
        heads['state_space heads'] = config.state_space_heads
    for name, count in heads.items():
        if count % tensor:
            raise ValueError(f'mesh has tensor={tensor}, allowed is a divisor of {name}={count}')


def count_slices(devices: list) -> int:
    """TPU slices that the devices make up: within one they have a network of their own, between two a data centre's. 1 for others."""
    return len({getattr(device, 'slice_index', 0) for device in devices if device.platform == 'tpu'}) or 1


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


def batch_shares(sizes: dict[str, int]) -> int:
    """Shares a batch is split into on a mesh of these sizes."""
    return math.prod(size for name, size in sizes.items() if name in BATCH_AXES)


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
