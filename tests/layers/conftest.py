"""Golden vectors of public reference implementations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest


@pytest.fixture
def golden(shared_data):
    """Loads the numeric arrays of one file, in float64 if enabled."""

    def load(name: str) -> dict[str, jax.Array]:
        with np.load(shared_data / 'golden' / f'{name}.npz') as arrays:
            return {key: jnp.asarray(arrays[key], float) for key in arrays if np.issubdtype(arrays[key].dtype, np.number)}

    return load
