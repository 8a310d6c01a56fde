"""The checks of SEAL's benchmarks: candidates together and alone agree, and one that learns otherwise is told."""

import numpy as np
import pytest

from experiments import seal_world
from nested_jax.data.tasks.biographies import END, World
from nested_jax.seal.buckets import Candidate, buckets
from scripts.benchmarks import seal, seal_published
from scripts.benchmarks.timing import Settings

SMOKE = Settings(repeats=1, smoke=True)


@pytest.mark.slow
def test_candidates_together_are_those_alone_and_a_leak_is_found():
    world = World()
    texts = seal_world.write_texts(world, 2, 'train', 0)
    candidates = [Candidate(((END, *text.passage),), 3e-3, 2, seed) for seed, text in enumerate(texts)]
    layout = lambda at_most: [batch for _, batch in buckets(candidates, at_most=at_most, shape=(1, 32))]
    one, together = layout(1), layout(4)
    together = [batch._replace(**{name: getattr(batch, name)[:2] for name in batch._fields}) for batch in together]
    (error,) = seal.check_together(world, one, [together])
    assert error < 1e-9
    leaking = [together[0]._replace(learning_rate=together[0].learning_rate * np.array([1, 1 + 3e-5], np.float32))]
    with pytest.raises(RuntimeError, match='2 candidates together and alone differ by .* in float64'):
        seal.check_together(world, one, [leaking])


def test_the_difference_is_that_of_the_worst_candidate():
    base = dict(a=np.ones((2, 3, 4)), b=np.full((2, 5), 1e-3))
    other = dict(a=base['a'], b=base['b'] * np.array([[1.0], [1.01]]))
    assert seal.difference(other, base) == pytest.approx(0.01) and seal.difference(base, base) == 0


@pytest.mark.slow
def test_published_shapes_have_a_small_form():
    (row,) = seal_published.published_shapes(SMOKE)
    assert row['tokens'] == 24 and row['candidates'] == 2 and row['real_share'] == pytest.approx(21 / 36)
    assert row['ratio'] == pytest.approx(row['seconds_alone'] / row['seconds_per_candidate'])
    assert row['loss_gap'] < 1e-2 and row['evaluation_seconds_per_candidate'] > 0


@pytest.mark.slow
def test_a_candidate_that_its_company_changes_is_told(monkeypatch):
    make = seal_published.make_inner_loop

    def leaking(*args):
        loop = make(*args)
        return lambda params, batch: (found := loop(params, batch))._replace(loss=found.loss * batch.seed.shape[0])

    monkeypatch.setattr(seal_published, 'make_inner_loop', leaking)
    with pytest.raises(RuntimeError, match="a candidate's loss in company is .*, alone"):
        next(seal_published.published_shapes(SMOKE))


def test_published_shapes_need_an_accelerator(capsys):
    assert list(seal_published.published_shapes(Settings(repeats=1))) == [] and 'no accelerator' in capsys.readouterr().out
