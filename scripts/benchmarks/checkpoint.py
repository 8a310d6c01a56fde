"""What saving costs: the share of a run's time in which a checkpoint keeps it from the next step, at the default interval."""

import pathlib
import tempfile

import jax
import numpy as np
import optax

from nested_jax.models import LanguageModel
from nested_jax.models.presets import preset
from nested_jax.training.checkpoints import Checkpoints
from nested_jax.training.config import TrainConfig
from scripts.benchmarks.timing import Settings, measure, num_parameters, train_step

LIMIT = 0.02  # of the time, that saving may take


def blocked_share(settings: Settings):
    """A save of parameters and AdamW's state, digests, flush and removal of an old one included, against the steps between two saves.

    What comes back is compared with what went in. The folder is a temporary one: TMPDIR says on which disk.
    """
    train = TrainConfig()
    for name in ('transformer-tiny',) if settings.smoke else ('hope-linear-tiny', 'transformer-tiny'):
        config, length = preset(name), 64 if settings.smoke else train.sequence_length
        step = train_step(config, train.batch_size, length)
        steps = measure(step.run, settings.repeats)
        params = jax.jit(LanguageModel(config).init)(jax.random.key(0), np.zeros((1, 16), np.int32))['params']
        state = dict(params=params, optimizer=optax.adamw(1e-3).init(params))
        with tempfile.TemporaryDirectory() as folder:
            checkpoints, counter = Checkpoints(pathlib.Path(folder), train.keep), iter(range(1, 10**6))
            saves = measure(lambda: checkpoints.save(next(counter), state, config={}, data={}), settings.repeats)  # noqa: B023
            back = checkpoints.restore(state).state
        jax.tree.map(np.testing.assert_array_equal, back, state)
        between = train.checkpoint_every * steps.median
        yield dict(
            what='saving', model=name, batch=train.batch_size, length=length, parameters=num_parameters(params),
            mib=sum(leaf.nbytes for leaf in jax.tree.leaves(state)) / 2**20, every=train.checkpoint_every, step_s=steps.median,
            save_s=saves.median, fastest_save_s=saves.fastest, slowest_save_s=saves.slowest,
            blocked_share=saves.median / (between + saves.median), limit=LIMIT,
        )  # fmt: skip


PARTS = (blocked_share,)
