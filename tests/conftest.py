"""Settings every test runs under: eight simulated devices, no implicit rank promotion, warnings as errors (pyproject.toml)."""

import gc
import importlib.metadata
import os
import pathlib

# Before the first import of jax, which reads it once.
os.environ.setdefault('JAX_NUM_CPU_DEVICES', '8')
# Simulated devices wait for one another in XLA's threads: with as many as cores, a few collectives at a time can take all of them.
os.environ.setdefault('NPROC', '16')
# The tests compile much and compute little. Fusion emitters alone double the time; XLA of later releases has no other way, and no flag.
_flags = ['--xla_backend_optimization_level=0']
if importlib.metadata.version('jax').startswith('0.10.'):
    _flags += ['--xla_cpu_use_fusion_emitters=false', '--xla_cpu_parallel_codegen_split_count=1']
os.environ.setdefault('XLA_FLAGS', ' '.join(_flags))

# Tests run side by side get a core each: XLA's threads would only wait for one another on programs as small as these.
if os.environ.get('PYTEST_XDIST_WORKER') and hasattr(os, 'sched_setaffinity'):
    _cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {_cores[int(os.environ['PYTEST_XDIST_WORKER'].removeprefix('gw')) % len(_cores)]})

import jax
import pytest

jax.config.update('jax_numpy_rank_promotion', 'raise')


TESTS = pathlib.Path(__file__).parent
FIRST = ('scripts', 'test_readme.py', 'training', 'experiments', 'models')  # whose files start processes and train


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Tests of a file share what they compile, so they run on one worker, unless a mark names a smaller group; long groups come first."""
    items.sort(key=lambda item: next((turn for turn, name in enumerate(FIRST) if item.path.is_relative_to(TESTS / name)), len(FIRST)))
    for item in items:
        if item.get_closest_marker('xdist_group') is None:
            item.add_marker(pytest.mark.xdist_group(str(item.path)))


def pytest_collection_finish():
    """Modules and tests stay for good: garbage collections that pass over them, and come seldom, save a tenth where much is traced."""
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)


def pytest_runtest_teardown(item, nextitem):
    """Programs are kept as long as tests that share them follow: a process that holds those of all files runs out of memory maps."""
    group = lambda test: test.get_closest_marker('xdist_group').args
    if nextitem is None or group(nextitem) != group(item):
        jax.clear_caches()
        gc.collect()


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
