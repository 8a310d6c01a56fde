"""What holds for every task: determinism, order independence, seeds, splits, batches, sources and scores."""

import dataclasses

import grain
import numpy as np
import pytest

from nested_jax.data import tasks
from nested_jax.data.tasks import FormalLanguage, Scores, score

TASKS = {
    'parity': FormalLanguage('parity'),
    'shuffle-2': FormalLanguage('shuffle-2'),
    'word-problem': tasks.WordProblem('A5', 2),
    'copying': tasks.mad.SelectiveCopying(vocab_size=6, length=8, num_copied=3),
    'memorization': tasks.mad.Memorization(vocab_size=61, length=4),
    'needles': tasks.Needles(600, 'multikey_1'),
    'babi': tasks.BabiHaystack(512, num_facts=1),
    'mqar': tasks.MultiQueryRecall(vocab_size=12, length=8, num_pairs=2, random_fillers=False),
}


def assert_same(one, two):
    assert one.keys() == two.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], two[name], err_msg=name)


@pytest.fixture(params=TASKS, name='task')
def _task(request):
    return TASKS[request.param]


def test_examples_do_not_depend_on_the_order_of_access(task):
    forwards = [task.example(index, seed=5) for index in range(6)]
    for index in reversed(range(6)):
        assert_same(task.example(index, seed=5), forwards[index])
    assert_same(
        dataclasses.replace(task).batch(2, 3, seed=5), {name: np.stack([row[name] for row in forwards[2:5]]) for name in forwards[0]}
    )


def test_seeds_splits_and_indices_tell_examples_apart(task):
    split, other = task.splits[:2]
    draws = [task.batch(0, 8, split=split, seed=0), task.batch(0, 8, split=split, seed=1), task.batch(8, 8, split=split, seed=0),
             task.batch(0, 8, split=other, seed=0)]  # fmt: skip
    assert len({batch['tokens'].tobytes() for batch in draws}) == 4


def test_tokens_and_targets_are_in_the_vocabulary_and_the_dtypes_are_kept(task):
    batch = task.batch(0, 64)
    assert {name: array.dtype.name for name, array in batch.items()} == dict(tokens='int32', targets='int32', weights='float32')
    for name in ('tokens', 'targets'):
        assert 0 <= batch[name].min() and batch[name].max() < task.vocab_size
    assert set(np.unique(batch['weights'])) <= {0, 1} and batch['weights'].any(1).all()


def test_training_shares_nothing_with_the_other_splits(task):
    """In tasks small enough that draws without the rule would meet."""
    deal = lambda split: [task.deal(index, split, seed=int(split == 'train'))[1] for index in range(400)]
    drawn = {split: {task.signature(one) for one in deal(split)} for split in task.splits}
    for one in task.splits:
        for two in task.splits:
            assert one == two or not drawn[one] & drawn[two]


def test_grain_reads_a_source(task):
    dataset = grain.MapDataset.source(task.source(10, seed=3)).batch(4)
    assert_same(dataset[1], task.batch(4, 4, seed=3))
    with pytest.raises(IndexError, match='index=10'):
        task.source(10)[10]


def test_large_seeds_and_indices(task):
    assert task.example(2**64 - 1, seed=2**32 - 1).keys() == {'tokens', 'targets', 'weights'}
    for arguments, message in [(dict(seed=2**32), 'seed=4294967296'), (dict(seed=-1), 'seed=-1'), (dict(split='tests'), "split='tests'")]:
        with pytest.raises(ValueError, match=message):
            task.example(0, **arguments)
    with pytest.raises(ValueError, match='index=-1'):
        task.example(-1)
    with pytest.raises(ValueError, match='count=0'):
        task.batch(0, 0)
    with pytest.raises(ValueError, match='size=0'):
        task.source(0)


def test_a_task_too_small_for_its_splits():
    task = tasks.mad.FuzzyInContextRecall(vocab_size=3, length=8, max_motif=1)  # one key, one value
    with pytest.raises(ValueError, match='too few different examples for one of this split'):
        task.batch(0, 1, split='validation'), task.batch(0, 1, split='test')


def test_scores():
    batch = dict(targets=np.array([[1, 2, 3], [4, 5, 6]]), weights=np.array([[1, 0, 1], [1, 1, 0]]))
    assert score(np.array([[1, 0, 3], [4, 0, 6]]), batch) == Scores(0.75, 0.5)
