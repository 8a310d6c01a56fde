"""Associative recall: structure, the gaps' distribution, baselines, and the stored samples of the reference."""

import re

import numpy as np
import pytest

from nested_jax.data.tasks import MultiQueryRecall

SETTINGS = [dict(), dict(vocab_size=64, num_pairs=16), dict(vocab_size=34, num_pairs=16, random_fillers=False), dict(power=1.0)]


@pytest.mark.parametrize('setting', SETTINGS)
def test_pairs_come_first_and_each_key_once_more(setting):
    task = MultiQueryRecall(**setting)
    batch = task.batch(0, 50)
    shown, half = 2 * task.num_pairs, task.vocab_size // 2
    for row in range(50):
        tokens, targets, weights = (batch[name][row] for name in ('tokens', 'targets', 'weights'))
        keys, values = tokens[:shown:2], tokens[1:shown:2]
        assert len(set(keys)) == len(set(values)) == task.num_pairs
        assert keys.min() >= 1 and keys.max() < half <= values.min() and values.max() < task.vocab_size
        queries = np.flatnonzero(weights)
        assert sorted(tokens[queries]) == sorted(keys) and queries.min() >= shown and (queries % 2 == 0).all()
        np.testing.assert_array_equal(task.solve(tokens)[0], targets)
        np.testing.assert_array_equal(task.solve(tokens)[1], weights)
        rest = np.delete(tokens[shown:], queries - shown)
        assert not np.isin(rest, keys).any() and (task.random_fillers or not rest.any())


def test_fillers_are_uniform_over_what_is_no_key():
    task = MultiQueryRecall(vocab_size=12, length=40, num_pairs=2)
    keys = np.array([5, 2])
    counts = np.bincount(np.concatenate([task._fillers(np.random.default_rng(seed), keys) for seed in range(100)]), minlength=12)
    assert not counts[keys].any()
    assert (abs(np.delete(counts, keys) - 400) < 6 * 20).all()


@pytest.mark.parametrize('power', [0.01, 1.0])
def test_gaps_follow_the_power_law(power):
    task = MultiQueryRecall(num_pairs=1, length=34, power=power, random_fillers=False)
    places = task.batch(0, 3000)['weights'].argmax(1)
    counts = np.bincount((places - 2) // 2, minlength=16)
    expected = np.arange(1, 17) ** (power - 1)
    expected *= 3000 / expected.sum()
    assert (abs(counts - expected) < 6 * expected**0.5).all()


def test_baselines():
    scores = MultiQueryRecall(num_pairs=4).baselines(count=100)
    assert scores['last value'].positions == 0.25 and scores['last value'].sequences == 0
    assert scores['majority'].positions < 0.02 and scores['token'].positions < 0.02


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (dict(num_pairs=0), 'num_pairs=0; allowed: an integer of at least 1'),
        (dict(length=30), 'length=30; allowed: even, at least 32'),
        (dict(length=65), 'length=65; allowed: even'),
        (dict(vocab_size=17), 'vocab_size=17; allowed: at least 18'),
        (dict(power=1.5), 'power=1.5; allowed: 0 to 1'),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        MultiQueryRecall(**arguments)


def test_stored_samples(read_samples):
    files = read_samples('mqar_reference/*.jsonl.xz')
    assert len(files) == 6
    for name, samples in files:
        vocab_size, length, num_pairs = map(int, re.match(r'v(\d+)_L(\d+)_kv(\d+)', name).groups())
        task = MultiQueryRecall(vocab_size=vocab_size, length=length, num_pairs=num_pairs)
        assert len(samples) == 256
        for sample in samples:
            targets, weights = task.solve(np.array(sample['x']))
            np.testing.assert_array_equal(np.where(weights, targets, -100), sample['y'])
