"""The report on a compiled step, for simulated devices in place of a TPU's: of a preset's step, and of a program XLA complains about."""

import importlib
import os
import sys
import types

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from nested_jax.evaluation.rows import read_rows
from nested_jax.models import LanguageModel, preset
from nested_jax.training.compiled import REMATERIALISED

SIZES = dict(preset='transformer-tiny', batch_size=8, sequence_length=64, dtype='float32', mesh='fsdp=4,tensor=2')


@pytest.fixture(scope='module')
def script():
    """The module, without the variables that it sets for a process of its own."""
    before = dict(os.environ)
    module = importlib.import_module('scripts.compile_for_tpu')
    for name in [name for name, value in os.environ.items() if before.get(name) != value]:
        del os.environ[name]
        os.environ.update({name: before[name]} if name in before else {})
    return module


@pytest.fixture
def compiled_anew():
    """XLA says nothing of a program that is read from a folder."""
    before = jax.config.jax_enable_compilation_cache
    for value in (False, before):
        jax.config.update('jax_enable_compilation_cache', value)
        compilation_cache.reset_cache()
        if not value:
            yield


@pytest.fixture
def compile_for(script, tmp_path, monkeypatch):
    """Calls the script's main for eight simulated devices: (exit code, rows)."""

    def called(**changes):
        options = [f'--{name.replace("_", "-")}={value}' for name, value in (SIZES | changes).items()]
        monkeypatch.setattr(sys, 'argv', ['compile_for_tpu.py', *options, f'--results={tmp_path / "rows.jsonl"}'])
        monkeypatch.setattr(script.topologies, 'get_topology_desc', lambda **_: types.SimpleNamespace(devices=jax.devices()))
        return script.main(), read_rows(tmp_path / 'rows.jsonl')

    return called


def count(name):
    """Parameters of a preset."""
    model = LanguageModel(preset(name))
    return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 64), jnp.int32))))


def test_report_of_a_presets_step_for_eight_devices(compile_for, capfd):
    code, (row,) = compile_for()
    metrics, said = row['metrics'], capfd.readouterr().out
    assert code == 0 and row['hardware'] == 'compiled for 8 x cpu, not run' and row['config']['mesh'] == dict(fsdp=4, tensor=2)
    memory, moved = metrics['memory'], metrics['collectives']
    assert memory['total'] == memory['arguments'] + memory['results'] + memory['temporaries'] and memory['temporaries'] > 0
    # A share of float32 parameters and AdamW's two moments, and little that every device has whole.
    num_parameters = count(SIZES['preset'])
    assert 12 * num_parameters / 8 < memory['arguments'] < 1.1 * 12 * num_parameters / 8 + 8 * 64 * 16
    assert {'all-gather', 'all-reduce'} <= set(moved) and all(sums['count'] > 0 < sums['bytes'] for sums in moved.values())
    tokens, matrices = 8 * 64, num_parameters - 256 * preset(SIZES['preset']).width  # the embedding is looked up
    assert metrics['chips'] == 8 and 8 * metrics['matrix_flops_per_chip'] > 6 * matrices * tokens
    assert metrics['full_rematerialisations'] == 0 and 'full rematerialisations: 0' in said
    assert all(kind in said for kind in moved)


def test_what_cannot_be_compiled_is_said_and_leaves_no_row(compile_for, capsys):
    for changes, message in (
        (dict(mesh='fsdp=4'), "mesh is 'fsdp=4', 4 devices"),
        (dict(batch_size=6), 'batch_size is 6'),
        (dict(preset='transformer-nano'), 'transformer-nano'),
    ):
        assert compile_for(**changes) == (2, [])
        assert message in capsys.readouterr().err


def test_arrays_made_whole_on_every_device_are_counted(script, compiled_anew, capfd):
    mesh = jax.make_mesh((4, 2), ('a', 'b'), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    split = lambda *names: jax.NamedSharding(mesh, jax.P(*names))

    def moved(x):
        x = jax.lax.with_sharding_constraint(jnp.sin(x), split(None, 'a', 'b'))
        return jax.lax.with_sharding_constraint(jnp.cos(x), split(('a', 'b'), None, None))

    def complaints(program, *names):
        x = jax.ShapeDtypeStruct((16, 16, 16), jnp.float32, sharding=split(*names))
        with script.logged() as log:
            jax.jit(program).lower(x).compile()
        return sum(REMATERIALISED in line for line in log)

    assert complaints(moved, None, 'a', 'b') == 1
    assert complaints(lambda x: (moved(x), moved(2 * x)), None, 'a', 'b') == 2
    assert complaints(jnp.sin, None, 'a', 'b') == 0
    assert REMATERIALISED in capfd.readouterr().err  # what was kept is let through
