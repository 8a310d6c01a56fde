"""R1 and R2: cut anywhere and taken up again, a run is the run that was not cut, whatever the optimizer and the model, dropout included.

An epoch is five steps: cuts lie after its first step, inside and at its end, and off the periods of levels and of M3.
"""

import dataclasses
import functools
import hashlib
import io
import math
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rich.console

from nested_jax.config import LevelConfig, ModelConfig, as_dict
from nested_jax.data import open_dataset
from nested_jax.data.pipelines import rows_per_epoch
from nested_jax.training.config import TrainConfig
from nested_jax.training.loop import train
from nested_jax.training.metrics import read_metrics
from tests.models.small_models import small

pytestmark = pytest.mark.usefixtures('compilations_on_disk')
ROOT = pathlib.Path(__file__).parents[2]
PERIODS = (1, 2, 5)
STEPS = 20  # twice their least common multiple
TRAIN = TrainConfig(
    steps=STEPS, batch_size=4, sequence_length=16, learning_rate=1e-2, warmup_steps=2, log_every=3, eval_every=100, eval_tokens=128,
    checkpoint_every=1, keep=STEPS,
)  # fmt: skip
SLOW = {'m3': 3}  # steps between two updates of its slow momentum


def model(kind, dropout=0.0):
    """A Transformer of one block with one level or several, or a small model of a family whose blocks write memories, with several."""
    levels = tuple(LevelConfig(8, period * TRAIN.tokens_per_step) for period in (PERIODS if kind != 'plain' else (1,)))
    if kind in ('plain', 'levels'):
        sizes = dict(num_layers=1, width=8, num_heads=1, head_dim=8, max_length=16)
        return ModelConfig('attention', levels=levels, dropout=dropout, **sizes)
    return small(kind, levels=levels, vocab_size=ModelConfig.vocab_size, dropout=dropout)


def run(folder, texts, name, kind, dropout=0.0):
    """(a digest of the last state, the step gone on from); called here, and in processes of its own, which print it."""
    config = dataclasses.replace(TRAIN, output=str(folder), optimizer=name, slow_period=SLOW.get(name, TRAIN.slow_period))
    shape = model(kind, float(dropout))
    settings = dict(model=as_dict(shape), train=as_dict(config))
    console = rich.console.Console(file=io.StringIO(), width=200)
    result = train(config, shape, open_dataset(texts), settings, devices=jax.devices()[:1], console=console)
    raw = lambda x: np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x).tobytes()
    return hashlib.sha256(b''.join(map(raw, jax.tree.leaves(result.state)))).hexdigest(), result.resumed_from


def run_in_a_process(folder, texts, name, kind, cache, first='', dropout=0.0, **variables):
    """The same, in a process that does what `first` says before anything else."""
    program = f'{first}\nimport sys; sys.path.insert(0, sys.argv[1]); import test_resume; print(*test_resume.run(*sys.argv[2:]))'
    command = [sys.executable, '-c', program, str(pathlib.Path(__file__).parent), str(folder), str(texts), name, kind, str(dropout)]
    own = dict(JAX_COMPILATION_CACHE_DIR=str(cache), JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS='0', JAX_PLATFORMS='cpu') | variables
    done = subprocess.run(command, cwd=ROOT, env=os.environ | own | dict(PYTHONPATH=str(ROOT)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    digest, step = done.stdout.split()[-2:]
    return digest, int(step)


def history(folder):
    return [line | dict(tokens_per_second=0) for line in read_metrics(folder / 'metrics.jsonl')]


def cut_copy(whole, folder, cut):
    """The folder of a run that was killed after step `cut`, or a little later: lines it wrote after its last checkpoint are there."""
    shutil.copytree(whole, folder)
    for path in (folder / 'checkpoints').iterdir():
        if int(path.name) > cut:
            shutil.rmtree(path)
    return folder


@pytest.fixture(scope='module')
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp('texts')
    for number in range(40):
        (folder / f'{number:02d}.txt').write_text(f'text {number:02d}.' + '.' * (number % 2))
    rows = rows_per_epoch(open_dataset(folder).train, length=TRAIN.sequence_length, grid=model('levels').grid)
    assert rows == 5 * TRAIN.batch_size
    return folder


CUTS = (1, 5, 8, 13, 19)


# R1's grid by pairs: each optimizer with one level, several and memories, and each optimizer and each of these with dropout and without.
# AdamW with levels alone is in the default suite, test_loop.py. Memories are written by gradients inside the forward pass, too.
CUT = [
    ('adamw', 'plain', 0.1, 13), ('muon', 'plain', 0.0, 5), ('muon', 'levels', 0.1, 13), ('m3', 'plain', 0.1, 1), ('m3', 'levels', 0.0, 13),
    ('adamw', 'hope', 0.0, 13), ('adamw', 'hope-linear', 0.1, 13), ('muon', 'hope-linear', 0.0, 8), ('m3', 'hope-linear', 0.1, 8),
]  # fmt: skip
MEMORIES = ('hope', 'hope-linear')


@pytest.mark.slow
@pytest.mark.parametrize(('name', 'kind', 'dropout', 'cut'), CUT)
def test_cut_runs_end_with_the_same_bits(texts, tmp_path, name, kind, dropout, cut):
    whole, first = run(tmp_path / 'whole', texts, name, kind, dropout)
    assert first == 0 and len(history(tmp_path / 'whole')) == 8
    folder = cut_copy(tmp_path / 'whole', tmp_path / 'cut', cut)
    assert run(folder, texts, name, kind, dropout) == (whole, cut)
    assert history(folder) == history(tmp_path / 'whole')


@pytest.mark.exhaustive
@pytest.mark.parametrize('dropout', [0.0, 0.1])
@pytest.mark.parametrize('kind', ['plain', 'levels', *MEMORIES])
@pytest.mark.parametrize('name', ['adamw', 'muon', 'm3'])
def test_new_processes_end_with_the_same_bits(texts, tmp_path, name, kind, dropout):
    start = functools.partial(run_in_a_process, texts=texts, name=name, kind=kind, dropout=dropout, cache=tmp_path / 'cache')
    whole, _ = start(tmp_path / 'whole')
    for cut in CUTS:
        folder = cut_copy(tmp_path / 'whole', tmp_path / f'{cut}', cut)
        assert start(folder) == (whole, cut)
        assert history(folder) == history(tmp_path / 'whole')


@pytest.mark.parametrize(
    ('name', 'periods'),
    [
        pytest.param('adamw', (1, 2), marks=pytest.mark.slow),
        *(pytest.param(name, PERIODS, marks=pytest.mark.exhaustive) for name in ('adamw', 'm3')),
    ],
)
def test_gone_on_with_from_every_step(texts, tmp_path, monkeypatch, name, periods):
    """R2: sums and counters of slow levels that a checkpoint forgot would show at some step of their periods."""
    twice = 2 * math.lcm(*periods)
    monkeypatch.setitem(globals(), 'PERIODS', periods)
    monkeypatch.setitem(globals(), 'TRAIN', dataclasses.replace(TRAIN, steps=twice + 1, keep=twice + 1))
    whole, _ = run(tmp_path / 'whole', texts, name, 'levels')
    for cut in range(1, twice + 1):
        folder = cut_copy(tmp_path / 'whole', tmp_path / f'{cut}', cut)
        assert run(folder, texts, name, 'levels') == (whole, cut)
        assert history(folder) == history(tmp_path / 'whole')


# For XLA's pool of threads, its products of matrices, and libraries that use OpenMP. XLA optimizes as it does outside of tests.
ONE_THREAD = dict(NPROC='1', XLA_FLAGS='--xla_cpu_multi_thread_eigen=false', OMP_NUM_THREADS='1', JAX_NUM_CPU_DEVICES='1')


@pytest.mark.skipif(not hasattr(os, 'sched_setaffinity'), reason='no way to keep a process on one core')
@pytest.mark.parametrize(
    'kind',
    [pytest.param(kind, marks=pytest.mark.slow if kind == 'plain' else pytest.mark.exhaustive) for kind in ('plain', 'levels', *MEMORIES)],
)
def test_one_thread_gives_the_same_bits_again(texts, tmp_path, kind):
    """R8. Nothing is shared: each process compiles for itself. With as many threads as there are, losses are the same to roundings."""
    alone = f'import os; os.sched_setaffinity(0, {{{min(os.sched_getaffinity(0))}}})'
    start = lambda name, *how, **variables: run_in_a_process(
        tmp_path / name, texts, 'adamw', kind, tmp_path / f'{name}-cache', *how, **variables
    )
    assert start('once', alone, **ONE_THREAD) == start('again', alone, **ONE_THREAD)
    assert history(tmp_path / 'once') == history(tmp_path / 'again')
    start('threads', JAX_NUM_CPU_DEVICES='1')
    of = lambda name: [line['loss'] for line in history(tmp_path / name) if 'loss' in line]
    np.testing.assert_allclose(of('threads'), of('once'), rtol=1e-5)  # other roundings at most
