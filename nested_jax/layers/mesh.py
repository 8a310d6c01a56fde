"""What layers ask of the mesh of `jax.set_mesh`: which of its axes XLA splits arrays over, and which are split by hand."""

import math

import jax
from jax.sharding import AxisType

# Mesh axes that the rows of a batch are split over, outermost first.
BATCH_AXES = ('replica', 'data', 'fsdp')
SEQUENCE_AXIS = 'sequence'  # that stretches of sequences are split over, by hand


def axis_size(name: str, kind: AxisType) -> int:
    """Devices along an axis where the mesh has it, of this kind; else 1."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    return mesh.shape[name] if kinds.get(name) == kind else 1


def batch_axes(batch_size: int) -> tuple[str, ...]:
    """Axes that XLA splits the rows of a batch over; none where they do not divide it."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    names = tuple(name for name in BATCH_AXES if kinds.get(name) == AxisType.Auto)
    return () if batch_size % math.prod(mesh.shape[name] for name in names) else names
