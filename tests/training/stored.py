"""What a checkpoint holds, for tests that compare those of two runs."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp


def stored_arrays(checkpoint: pathlib.Path) -> dict[str, bytes]:
    """Every array's name and bytes, whatever devices it lay on."""
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    told = ocp.metadata(checkpoint / 'state').metadata
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), told)
    raw = lambda leaf: jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
    leaves = jax.tree.leaves_with_path(ocp.load(checkpoint / 'state', like))
    return {jax.tree_util.keystr(path): np.asarray(raw(leaf)).tobytes() for path, leaf in leaves}
