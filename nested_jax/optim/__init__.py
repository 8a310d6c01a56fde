"""Memories written between steps: optax gradient transformations."""

from nested_jax.optim.levels import by_level

__all__ = ['by_level']
