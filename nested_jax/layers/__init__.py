"""Thin flax.linen layers over the memories."""
