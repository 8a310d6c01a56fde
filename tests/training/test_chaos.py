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


def run(folder, texts):
    """One process of the run, on one device; called in processes of its own, and here to read what a finished run left."""
    config = dataclasses.replace(TRAIN, output=str(folder))
    settings = dict(model=as_dict(MODEL), train=as_dict(config))
    console = rich.console.Console(file=io.StringIO(), width=200)
    result = loop.train(config, MODEL, open_dataset(texts), settings, devices=jax.devices()[:1], console=console)
    print('resumed from', result.resumed_from, 'rejected', list(result.rejected))
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
    program = 'import sys; sys.path.insert(0, sys.argv[1]); import test_chaos; test_chaos.run(*sys.argv[2:])'
    command = [sys.executable, '-c', program, str(pathlib.Path(__file__).parent)]

    def launched(folder, plan='', kill_s=None):
        environment = os.environ | cache | dict(NESTED_JAX_FAULTS=plan, JAX_PLATFORMS='cpu', PYTHONPATH=str(ROOT))
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        process = subprocess.Popen([*command, str(folder), str(texts)], cwd=ROOT, env=environment, **pipes)
        try:
            said, complained = process.communicate(timeout=kill_s or 300)
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


def assert_ends_as(unbroken, folder, texts):
    raw = lambda x: np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x)
    state = run(folder, texts).state
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(raw(a), raw(b)), state, unbroken[1])
    without_speed = lambda path: [line | dict(tokens_per_second=0) for line in read_metrics(path / 'metrics.jsonl')]
    assert without_speed(folder) == without_speed(unbroken[0])


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
    assert spent.restarts == 3 and 2 <= spent.wasted_steps <= 7 + 10 + 10
    assert_ends_as(unbroken, tmp_path, texts)


def plans(rng):
    """Two rounds of every way to end, in random order and at random steps."""
    saved = lambda: rng.randrange(EVERY, TRAIN.steps, EVERY)
    kinds = [lambda: f'kill@{rng.randrange(2, TRAIN.steps)}', lambda: f'disk_full@{saved()}/{rng.choice(SAVE_PHASES[:3])}']
    kinds += [lambda phase=phase: f'kill@{saved()}/{phase}' for phase in SAVE_PHASES]
    made = [make() for make in kinds for _ in range(2)]
    rng.shuffle(made)
    return made


@pytest.mark.exhaustive
def test_random_kills_for_two_minutes(launch, unbroken, texts, tmp_path):
    """Faults by plan and by the clock; a fault whose step lies behind lets the run finish, which ends the test early."""
    rng = random.Random(0)
    began, codes, made = time.monotonic(), [], plans(rng)
    slow_steps = 'sleep@1-40=0.1'
    assert launch(tmp_path, 'flip_bit@10/renamed=99,kill@13')[0] == -9
    while made and time.monotonic() - began < 120 and 0 not in codes:
        codes.append(launch(tmp_path, f'{slow_steps},{made.pop()}', kill_s=rng.uniform(4, 15))[0])
    code, _, complained = launch(tmp_path)
    print(codes)
    assert code == 0, complained
    assert set(codes) <= {0, 1, -9} and report(tmp_path).restarts >= 1
    assert_ends_as(unbroken, tmp_path, texts)
