"""Memories written between steps: optax gradient transformations."""

from nested_jax.optim.levels import by_level
from nested_jax.optim.m3 import m3, scale_by_m3
from nested_jax.optim.matrix_specs import BlockSpec, MatrixSpec
from nested_jax.optim.muon import muon, scale_by_muon
from nested_jax.optim.orthogonalize import orthogonalize
from nested_jax.optim.sharding import state_shardings

__all__ = ['BlockSpec', 'MatrixSpec', 'by_level', 'm3', 'muon', 'orthogonalize', 'scale_by_m3', 'scale_by_muon', 'state_shardings']
