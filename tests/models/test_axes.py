"""Logical axes of every preset, and lowering of the largest ones for 256 simulated devices."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType

from nested_jax.models.axes import gather_width, logical_axes, split_rows
from nested_jax.models.language_model import LanguageModel
from nested_jax.models.presets import preset, preset_names
from tests.models.small_models import CORE

LARGEST = [
    pytest.param(name, marks=pytest.mark.slow if name.removesuffix('-1.3b') in CORE else pytest.mark.exhaustive)
    for name in preset_names()
    if name.endswith('-1.3b')
]


def shapes(name: str):
    model = LanguageModel(preset(name))
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 16), jnp.int32))['params']


@pytest.mark.parametrize('name', [name for name in preset_names() if name.endswith(('-tiny', '-1.3b'))])
def test_every_parameter_has_axes(name):
    params = shapes(name)
    axes = logical_axes(params)
    for leaf, names in zip(jax.tree.leaves(params), jax.tree.leaves(axes, is_leaf=lambda x: isinstance(x, tuple)), strict=True):
        assert len(names) == leaf.ndim
        # What every rule set will split must divide evenly over eight chips.
        for size, axis in zip(leaf.shape, names, strict=True):
            if name.endswith('-1.3b') and axis in ('embed', 'heads', 'mlp', 'vocab'):
                assert size % 8 == 0, (axis, leaf.shape)


def test_unknown_parameter_is_named():
    with pytest.raises(ValueError, match='blocks/mixer/mystery'):
        logical_axes({'blocks': {'mixer': {'mystery': jnp.zeros((2, 3))}}})
    with pytest.raises(ValueError, match='one axis for each'):
        logical_axes({'embedding': jnp.zeros(3)})


def make_mesh(kind):
    return jax.make_mesh((2, 2, 2), ('data', 'fsdp', 'tensor'), axis_types=(kind,) * 3)


def layout(function, shape, mesh):
    """How a compiled program lays out what `function` makes of a replicated array."""
    with jax.set_mesh(mesh):
        whole = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=jax.NamedSharding(mesh, jax.P()))
        return jax.jit(function).lower(whole).compile().output_shardings


def test_rows_are_split_on_a_mesh_and_tables_are_whole():
    mesh = make_mesh(AxisType.Auto)
    same = lambda found, spec, ndim: found.is_equivalent_to(jax.NamedSharding(mesh, spec), ndim)
    assert same(layout(split_rows, (8, 3, 5), mesh), jax.P(('data', 'fsdp')), 3)
    assert same(layout(split_rows, (6, 3, 5), mesh), jax.P(), 3)  # 6 rows for 4 devices
    assert same(layout(gather_width, (8, 6), mesh), jax.P('tensor'), 2)
    assert same(layout(gather_width, (7, 6), mesh), jax.P(), 2)


def test_nothing_is_placed_without_a_mesh_or_on_an_explicit_one():
    x = jnp.ones((8, 3))
    assert split_rows(x) is x and gather_width(x) is x
    with jax.set_mesh(make_mesh(AxisType.Explicit)):
        assert split_rows(x) is x and gather_width(x) is x


LOWER = """
import json, sys, time
import jax
from nested_jax.models.presets import preset
from nested_jax.training.config import TrainConfig
from nested_jax.training.mesh_sizes import choose_mesh
from nested_jax.training.sharding import Placement, make_mesh
from scripts.compile_for_tpu import trace_step

begun = time.process_time()  # other processes' work is none of the program's
config = preset(sys.argv[1], dtype='bfloat16', remat='block')
sizes = choose_mesh(sys.argv[2], config, 256)
lowered = trace_step(config, TrainConfig(batch_size=128, sequence_length=4096), Placement.on(make_mesh(sizes, jax.devices()))).lower()
text = lowered.as_text()
report = {'seconds': time.process_time() - begun, 'lines': text.count(chr(10)), 'partitions': 'num_partitions = 256' in text}
print(json.dumps(report))
"""
MESH = 'data=4,fsdp=16,tensor=4'


@pytest.mark.parametrize(
    ('name', 'mesh'),
    [
        *(pytest.param(param.values[0], MESH, marks=param.marks) for param in LARGEST),
        pytest.param('hope-1.3b', 'data=4,fsdp=16,sequence=4', marks=pytest.mark.slow),
    ],
)
def test_largest_presets_lower_for_256_devices(name, mesh):
    """The trainer's own step, its rules and its optimizer."""
    environment = {'JAX_NUM_CPU_DEVICES': '256', 'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': '.', 'PATH': '/usr/bin:/bin'}
    done = subprocess.run(
        [sys.executable, '-c', LOWER, name, mesh], capture_output=True, text=True, env=environment, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report['partitions'] and report['seconds'] < 60
    # One program of a few thousand lines whatever the number of layers and chunks: 4,096 tokens are 256 chunks.
    assert report['lines'] < 20_000
