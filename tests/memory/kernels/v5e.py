"""Ahead-of-time compilation for a TPU that is not there."""

import importlib.util

import jax
import numpy as np
import pytest
from jax.experimental import topologies

NEEDS_LIBTPU = pytest.mark.skipif(
    importlib.util.find_spec('libtpu') is None, reason='needs libtpu, in an environment of its own: pip install jax[tpu]'
)


def one_chip(monkeypatch) -> jax.sharding.NamedSharding:
    """Where arguments of a program for one chip of a v5e lie."""
    monkeypatch.setenv('TPU_SKIP_MDS_QUERY', '1')
    devices = topologies.get_topology_desc(platform='tpu', topology_name='v5e:2x2').devices
    mesh = jax.sharding.Mesh(np.array(devices)[:1], ('data',))
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
