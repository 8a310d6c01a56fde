"""What a checkpoint holds, for tests that compare those of two runs."""

import pathlib
import warnings

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp


def stored_arrays(checkpoint: pathlib.Path) -> dict[str, bytes]:
    """Every array's name and bytes."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # that it lay on other devices, as orbax's own note of it says
        tree = ocp.load(checkpoint / 'state')
    raw = lambda leaf: jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
    return {jax.tree_util.keystr(path): np.asarray(raw(leaf)).tobytes() for path, leaf in jax.tree.leaves_with_path(tree)}
