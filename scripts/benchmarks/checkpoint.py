"""What saving costs: the share of a run's time in which a checkpoint keeps it from the next step, at the default interval."""

import pathlib
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
import optax

from nested_jax.models import LanguageModel
from nested_jax.models.presets import preset
from nested_jax.training.checkpoints import Checkpoints
from nested_jax.training.config import TrainConfig
from scripts.benchmarks.timing import Settings, measure, num_parameters, train_step

LIMIT = 0.02  # of the time, that saving may take


class Save(NamedTuple):
    """One save, and the steps that ran while it was written."""

    blocked_s: float  # until `save` returned
    written_s: float  # until the checkpoint was there and older ones gone, and the step in hand at an end
    steps: int  # done in between


def blocked_share(settings: Settings):
    """A save of parameters and AdamW's state against the steps between two saves: `blocked` is what keeps the run from its next step,
    `cost` also that the steps are slower while the thread writes: the seconds from the beginning of a save to the end of its thread, less
    those that so many steps take otherwise.

    What comes back is compared with what went in. The folder is a temporary one: TMPDIR says on which disk.
    """
    train = TrainConfig()
    for name in ('transformer-tiny',) if settings.smoke else ('hope-linear-tiny', 'transformer-tiny'):
        config, length = preset(name), 64 if settings.smoke else train.sequence_length
        step = train_step(config, train.batch_size, length)
        params = jax.jit(LanguageModel(config).init)(jax.random.key(0), np.zeros((1, 16), np.int32))['params']
        state = dict(params=params, optimizer=optax.adamw(1e-3).init(params))
        steps = measure(step.run, settings.repeats)
        saves = timed_saves(state, step.run, settings.repeats, train.keep)
        between = train.checkpoint_every * steps.median
        blocked = statistics.median(save.blocked_s for save in saves)
        cost = max(statistics.median(save.written_s - save.steps * steps.median for save in saves), 0.0)
        yield dict(
            what='saving', model=name, batch=train.batch_size, length=length, parameters=num_parameters(params),
            mib=sum(leaf.nbytes for leaf in jax.tree.leaves(state)) / 2**20, every=train.checkpoint_every, step_s=steps.median,
            blocked_s=blocked, fastest_blocked_s=min(saves).blocked_s, slowest_blocked_s=max(saves).blocked_s,
            written_s=statistics.median(save.written_s for save in saves), cost_s=cost,
            blocked_share=blocked / (between + blocked), cost_share=cost / (between + cost), limit=LIMIT,
        )  # fmt: skip


def timed_saves(state: dict, run_step: Callable[[], object], repeats: int, keep: int) -> list[Save]:
    """Saves one after the other, each with steps until it is written, after one that is not counted."""
    saves, written = [], threading.Event()
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(pathlib.Path(folder), keep, saved=lambda step: written.set())
        for number in range(1, repeats + 2):
            written.clear()
            begun, count = time.perf_counter(), 0
            checkpoints.save(number, state, config={}, data={})
            blocked = time.perf_counter() - begun
            while not written.is_set():
                run_step()
                count += 1
            checkpoints.wait()
            saves.append(Save(blocked, time.perf_counter() - begun, count))
        back = checkpoints.restore(state).state
    jax.tree.map(np.testing.assert_array_equal, back, state)
    return saves[1:]


PARTS = (blocked_share,)
