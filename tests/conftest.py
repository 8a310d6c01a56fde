"""Settings every test runs under: eight simulated devices, no implicit rank promotion, warnings as errors (pyproject.toml)."""

import os
import pathlib

# Before the first import of jax, which reads it once.
os.environ.setdefault('JAX_NUM_CPU_DEVICES', '8')

import jax
import pytest

jax.config.update('jax_numpy_rank_promotion', 'raise')


@pytest.fixture
def x64():
    """Run the test in float64."""
    jax.config.update('jax_enable_x64', True)
    yield
    jax.config.update('jax_enable_x64', False)


@pytest.fixture
def shared_data() -> pathlib.Path:
    """Folder of golden vectors and small data sets; skips where it is absent."""
    folder = pathlib.Path(os.environ.get('NESTED_JAX_SHARED', '../shared')) / 'data'
    if not folder.is_dir():
        pytest.skip(f'no data at {folder}: set NESTED_JAX_SHARED')
    return folder
