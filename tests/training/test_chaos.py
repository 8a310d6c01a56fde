"""Chaos: a run that is killed, whose checkpoint loses a bit and whose disk is full ends as the run that was left alone, bit for bit."""

import dataclasses
import io
import os
import pathlib
import random
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rich.console

from nested_jax.config import LevelConfig, ModelConfig, as_dict
from nested_jax.data import open_dataset
from nested_jax.training import loop
from nested_jax.training.checkpoints import Checkpoints
from nested_jax.training.config import TrainConfig
from nested_jax.training.faults import SAVE_PHASES
from nested_jax.training.goodput import summary
from nested_jax.training.metrics import read_metrics

ROOT = pathlib.Path(__file__).parents[2]
EVERY = 5
# Periods of 1, 2 and 7 steps: the slow one is in the middle of a period at most checkpoints.
MODEL = ModelConfig(
    'attention', num_layers=1, width=8, num_heads=1, head_dim=8, levels=tuple(LevelConfig(8, n * 64) for n in (1, 2, 7)), max_length=16
)
TRAIN = TrainConfig(
    steps=40, batch_size=4, sequence_length=16, warmup_steps=2, log_every=1, eval_every=100, eval_tokens=128, checkpoint_every=EVERY, keep=3
)


def run(folder, texts, steps=TRAIN.steps, began=None):
    """One process of the run, on one device; called in processes of its own, and here to read what a finished run left."""
    config = dataclasses.replace(TRAIN, steps=int(steps), output=str(folder))
    settings = dict(model=as_dict(MODEL), train=as_dict(config))
    console, data = rich.console.Console(file=io.StringIO(), width=200), open_dataset(texts)
    result = loop.train(config, MODEL, data, settings, devices=jax.devices()[:1], console=console, began=began)
    print('ended at', time.time(), 'resumed from', result.resumed_from, 'rejected', list(result.rejected))
    return result


@pytest.fixture(scope='module')
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp('texts')
    for number in range(40):
        (folder / f'{number}.txt').write_text(f'document {number} ' * 12)
    return folder


@pytest.fixture(scope='module')
def launch(texts, tmp_path_factory):
    """Starts a process of the run under a plan of faults; it dies of SIGKILL after `kill_s` where that is given."""
    cache = dict(JAX_COMPILATION_CACHE_DIR=str(tmp_path_factory.mktemp('cache')), JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS='0')
    program = 'import time, sys; began = time.monotonic(); print("began at", time.time(), flush=True); sys.path.insert(0, sys.argv[1])\n'
    program += 'import test_chaos; test_chaos.run(*sys.argv[2:], began=began)'
    command = [sys.executable, '-c', program, str(pathlib.Path(__file__).parent)]

    def launched(folder, plan='', kill_s=None, steps=TRAIN.steps):
        environment = os.environ | cache | dict(NESTED_JAX_FAULTS=plan, JAX_PLATFORMS='cpu', PYTHONPATH=str(ROOT))
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        process = subprocess.Popen([*command, str(folder), str(texts), str(steps)], cwd=ROOT, env=environment, **pipes)
        try:
            said, complained = process.communicate(timeout=kill_s or 900)
        except subprocess.TimeoutExpired:
            process.kill()
            said, complained = process.communicate()
        return process.returncode, said, complained

    return launched


@pytest.fixture(scope='module')
def unbroken(launch, texts, tmp_path_factory):
    folder = tmp_path_factory.mktemp('unbroken')
    code, _, complained = launch(folder)
    assert code == 0, complained
    return folder, run(folder, texts).state


def assert_ends_as(unbroken, folder, texts, steps=TRAIN.steps):
    raw = lambda x: np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x)
    state = run(folder, texts, steps).state
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(raw(a), raw(b)), state, unbroken[1])
    without_speed = lambda path: [line | dict(tokens_per_second=0) for line in read_metrics(path / 'metrics.jsonl')]
    assert without_speed(folder) == without_speed(unbroken[0])


def moment(what, said):
    """When a process began or ended its part of the run, by what it said."""
    return float(said.partition(f'{what} at ')[2].split()[0])


def report(folder):
    spent = summary(folder)
    print(spent)
    assert spent.productive_s + sum(spent.badput_s.values()) == pytest.approx(spent.total_s, rel=0.02)
    return spent


@pytest.mark.slow
def test_kill_flipped_bit_and_full_disk(launch, unbroken, texts, tmp_path):
    assert launch(tmp_path, 'flip_bit@10/renamed=777,kill@13')[0] == -9
    code, said, complained = launch(tmp_path, 'disk_full@20/arrays')  # goes on from 5: the checkpoint of 10 is damaged
    assert code == 1 and 'step 20 could not be saved' in complained and 'the newest checkpoint is that of step 15' in complained
    assert launch(tmp_path, 'kill@35/manifest')[0] == -9
    code, said, complained = launch(tmp_path)
    assert code == 0 and 'resumed from 30' in said, complained
    spent = report(tmp_path)
    # Kept are 5 steps of 12, 15 of up to 25, 30 of up to 40: a save's end is waited for before the next. A line a second: the last ones
    # of a process may be missing.
    assert spent.errors == {'SaveError': 1} and '1 x SaveError' in str(spent)
    assert spent.restarts == 3 and 2 <= spent.wasted_steps <= 7 + 10 + 10
    assert_ends_as(unbroken, tmp_path, texts)


@pytest.mark.slow
def test_seconds_add_up_over_a_kill_and_a_slow_save(launch, tmp_path):
    """F4. A hundred short steps, of which the two since the last checkpoint are done again; the second takes long enough for a line."""
    _, began, _ = launch(tmp_path, 'sleep@1-100=0.05,sleep@40/save=4,sleep@62=1.1,kill@63', steps=100)
    code, ended, complained = launch(tmp_path, 'sleep@1-100=0.05', steps=100)
    assert code == 0 and 'resumed from 60' in ended, complained
    spent = report(tmp_path)
    assert spent.total_s == pytest.approx(moment('ended', ended) - moment('began', began), rel=0.02)  # imports included
    assert (spent.restarts, spent.wasted_steps) == (1, 2)
    assert spent.badput_s['save'] >= 4 and spent.badput_s['wasted'] >= 2 * 0.05 + 1.1 and spent.productive_s >= 100 * 0.05


def newest(folder):
    """Step of the newest checkpoint."""
    return max((int(path.name) for path in folder.glob('checkpoints/*') if path.name.isdigit()), default=0)


def ending(rng, kind, step):
    """A plan that ends a process at about a step, one second after the other: (plan, seconds after which it is killed)."""
    saved = max(step // EVERY, 1) * EVERY
    if kind == 'kill':
        kind = rng.choice(('step', 'clock', *SAVE_PHASES))
    if kind == 'clock':
        return '', rng.uniform(2, 25)  # wherever it is then, reading and compiling included
    return {
        'flip': f'flip_bit@{saved}/renamed={rng.randrange(10_000)},kill@{saved + EVERY}/save',
        'disk': f'disk_full@{saved}/{rng.choice(SAVE_PHASES[:3])}',
        'step': f'kill@{step}',
    }.get(kind, f'kill@{saved}/{kind}'), None


@pytest.mark.slow
@pytest.mark.parametrize(('minutes', 'apart_s'), [(1, 12), pytest.param(10, 50, marks=pytest.mark.exhaustive)])
def test_random_kills(launch, texts, tmp_path, record_property, minutes, apart_s):
    """Steps take a second each, so that the run lasts as long as it says and more. Its second and third end are a flipped bit and a full
    disk, all others SIGKILL: before a step, as the first, in any phase of a save, or by the clock.
    """
    rng, steps, codes = random.Random(minutes), 60 * minutes, []
    whole = tmp_path / 'whole'
    assert launch(whole, steps=steps)[0] == 0
    unbroken = whole, run(whole, texts, steps).state
    folder, began = tmp_path / 'run', time.time()
    while 0 not in codes:
        kind = {0: 'step', 1: 'flip', 2: 'disk'}.get(len(codes), 'kill')
        plan, kill_s = ending(rng, kind, newest(folder) + EVERY + round(apart_s * rng.uniform(0.5, 1.5)))
        codes.append(launch(folder, f'sleep@1-{steps}=1' + ',' * bool(plan) + plan, kill_s, steps)[0])
        assert kind != 'flip' or 'is damaged' in Checkpoints(folder / 'checkpoints').verify(newest(folder))
    lasted, spent = time.time() - began, report(folder)
    print(codes, f'{lasted:.1f} s')
    told = dataclasses.asdict(spent) | dict(goodput=spent.goodput, lasted_s=lasted, kills=codes.count(-9), full_disks=codes.count(1))
    record_property('chaos', told)
    assert spent.total_s == pytest.approx(lasted, rel=0.02)
    assert lasted >= 60 * minutes and 0 < spent.restarts < len(codes)  # one that is killed before it has read a checkpoint leaves no line
    assert codes.count(1) == 1 and codes.count(-9) >= minutes / 2 and set(codes) == {0, 1, -9}
    assert_ends_as(unbroken, folder, texts, steps)
