"""Accelerator kernels behind the functions of `nested_jax.memory`, each with a plain-JAX twin there."""
