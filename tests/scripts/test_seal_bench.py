"""The check of scripts/benchmarks/seal.py: candidates together and alone agree, and one that learns a little more is told."""

import numpy as np
import pytest

from experiments import seal_world
from nested_jax.data.tasks.biographies import END, World
from nested_jax.seal.buckets import Candidate, buckets
from scripts.benchmarks import seal


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
