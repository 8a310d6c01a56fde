"""Training in lanes: a lane is the run that it would be alone, and the checkpoint kept is the one that scores best."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import fitting
from experiments.fitting import Phase, fit_one, lane, make_fit
from nested_jax.training.config import TrainConfig
from nested_jax.training.state import step_key

TRAIN = TrainConfig(steps=6, batch_size=4, sequence_length=5, learning_rate=0.02, warmup_steps=2)


class Lookup(nn.Module):
    """The smallest model: a table, which compiles in no time."""

    def setup(self):
        self.table = self.param('table', nn.initializers.normal(1.0), (4, 8))
        self.kernel = self.param('head', nn.initializers.lecun_normal(), (8, 4))

    def __call__(self, tokens):
        return self.hidden(tokens)[0] @ self.kernel, None

    def hidden(self, tokens, *, segment_ids=None):
        return self.table[tokens], None

    def head(self, params):
        return params['head']


MODEL = Lookup()


@pytest.fixture(autouse=True)
def short_calls(monkeypatch):
    monkeypatch.setattr(fitting, 'STEPS_A_CALL', 2)


def draw(data, state) -> dict:
    tokens = jax.random.randint(step_key(state), (4, 5), 0, 4)
    return dict(tokens=tokens, targets=(tokens + data.astype(int)) % 4, weights=jnp.ones((4, 5)))


def test_lanes_are_the_runs_that_they_would_be_alone():
    """Of the same seed, data and learning rate, whatever the configuration's rate is."""
    shift = jnp.array([1, 2])
    together = make_fit(MODEL, TRAIN, draw)([3, 4], (0.02, 0.05), shift)
    assert together.loss.shape == (2, 2) and np.unique(together.loss).size == 4
    assert (together.step == TRAIN.steps).all() and (together.score == 0).all()
    fit_alone = make_fit(MODEL, dataclasses.replace(TRAIN, learning_rate=0.05), draw)
    for index, alone in {(0, 0): fit_alone([3], (0.02,), shift[:1]), (1, 1): fit_alone([4], data=shift[1:])}.items():
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), lane(together, *index), lane(alone, 0, 0))


def test_the_checkpoint_with_the_best_score_is_kept_of_equals_the_latest():
    """The score sees no step: the logits of the right answers stand in, which only rise."""
    number = lambda params: jnp.trace(params['table'] @ params['head'])
    signs = jnp.array([0.0, 0.5, -0.5])
    kept = make_fit(MODEL, TRAIN, draw, lambda params, sign: sign * number(params), 2)([5, 5, 5], data=signs)
    assert kept.step[0, 0] == 6 and kept.score[0, 0] == 0
    assert kept.step[:, 0].tolist() == [6, 6, 2]
    for index in (1, 2):
        np.testing.assert_allclose(kept.score[index, 0], signs[index] * number(lane(kept.params, index, 0)), rtol=1e-5)


def test_phases_are_read_one_after_another():
    """A run on the same data in two phases is the run on it in one, and another second phase makes another run."""
    whole, same, other = (
        make_fit(MODEL, TRAIN, draw)([3], data=data)
        for data in (
            jnp.array([1]),
            [Phase(3, jnp.array([1])), Phase(6, jnp.array([1]))],
            [Phase(3, jnp.array([1])), Phase(6, jnp.array([2]))],
        )
    )
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), same.params, whole.params)
    assert abs(other.loss - whole.loss) > 0.01


def test_one_run():
    params = dict(table=jnp.ones((1, 1, 3)))
    fitted = fitting.Fitted(params, jnp.full((1, 1), 0.5), jnp.zeros((1, 1)), jnp.zeros((1, 1), jnp.int32))
    found, loss = fit_one(lambda seeds: fitted if seeds == [7] else None, 7)
    assert found['table'].shape == (3,) and loss == 0.5
