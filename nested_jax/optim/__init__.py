"""Memories written between steps: optax gradient transformations."""

from nested_jax.optim.as_memory import adagrad_as_memory, adam_as_memory, scale_by_adagrad_as_memory, scale_by_adam_as_memory
from nested_jax.optim.deep_momentum import deep_momentum, scale_by_deep_momentum
from nested_jax.optim.delta_descent import delta_gradient_descent, scale_by_delta_gradient_descent, with_delta
from nested_jax.optim.delta_products import delta_products, with_inputs
from nested_jax.optim.levels import Level, by_level, steps_of
from nested_jax.optim.m3 import m3, scale_by_m3
from nested_jax.optim.matrix_specs import BlockSpec, MatrixSpec
from nested_jax.optim.momentum import (
    delta_momentum,
    feature_momentum,
    preconditioned_momentum,
    scale_by_delta_momentum,
    scale_by_feature_momentum,
    scale_by_learned_preconditioner,
    scale_by_preconditioned_momentum,
)
from nested_jax.optim.muon import muon, scale_by_muon
from nested_jax.optim.nested import nested
from nested_jax.optim.orthogonalize import orthogonalize
from nested_jax.optim.sharding import state_shardings

__all__ = [
    'BlockSpec',
    'Level',
    'MatrixSpec',
    'adagrad_as_memory',
    'adam_as_memory',
    'by_level',
    'deep_momentum',
    'delta_gradient_descent',
    'delta_momentum',
    'delta_products',
    'feature_momentum',
    'm3',
    'muon',
    'nested',
    'orthogonalize',
    'preconditioned_momentum',
    'scale_by_adagrad_as_memory',
    'scale_by_adam_as_memory',
    'scale_by_deep_momentum',
    'scale_by_delta_gradient_descent',
    'scale_by_delta_momentum',
    'scale_by_feature_momentum',
    'scale_by_learned_preconditioner',
    'scale_by_m3',
    'scale_by_muon',
    'scale_by_preconditioned_momentum',
    'state_shardings',
    'steps_of',
    'with_delta',
    'with_inputs',
]
