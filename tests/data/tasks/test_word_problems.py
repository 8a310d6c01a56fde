"""Word problems: the groups' axioms, products, and the stored tables and samples."""

import json
import lzma

import numpy as np
import pytest

from nested_jax.data.tasks import WordProblem
from nested_jax.data.tasks.word_problems import GROUPS, multiplication_table


@pytest.mark.parametrize('group', GROUPS)
def test_tables_are_of_groups(group):
    table = multiplication_table(group)
    elements = np.arange(len(table))
    assert len(table) == {'S5': 120, 'A5': 60, 'Z60': 60}[group]
    np.testing.assert_array_equal(np.sort(table, 0), np.broadcast_to(elements[:, None], table.shape))
    np.testing.assert_array_equal(np.sort(table, 1), np.broadcast_to(elements, table.shape))
    a, b, c = np.random.default_rng(0).integers(0, len(table), (3, 500))
    np.testing.assert_array_equal(table[table[a, b], c], table[a, table[b, c]])
    np.testing.assert_array_equal(table[0], elements)
    assert (table == table.T).all() == (group == 'Z60')


@pytest.mark.parametrize('group', GROUPS)
@pytest.mark.parametrize('length', [2, 16, 33])
def test_solver_agrees(group, length):
    task = WordProblem(group, length)
    batch = task.batch(0, 20, split='test')
    assert batch['tokens'].shape == (20, length) and batch['weights'].all()
    for row in range(20):
        np.testing.assert_array_equal(task.solve(batch['tokens'][row])[0], batch['targets'][row])


def test_elements_are_uniform():
    tokens = WordProblem('A5', 64).batch(0, 200)['tokens']
    counts, expected = np.bincount(tokens.ravel(), minlength=60), tokens.size / 60
    assert len(counts) == 60 and (abs(counts - expected) < 6 * expected**0.5).all()


def test_baselines():
    scores = WordProblem('A5', 16).baselines(count=400)
    assert abs(scores['majority'].positions - 1 / 60) < 0.01
    # Right at the first element, and by chance at the others.
    assert abs(scores['copy'].positions - (1 / 16 + 15 / 16 / 60)) < 0.01
    assert scores['copy'].sequences == 0


def test_wrong_arguments():
    with pytest.raises(ValueError, match="group='S4'; allowed: S5, A5, Z60"):
        WordProblem('S4')
    with pytest.raises(ValueError, match='length=1; allowed: an integer of at least 2'):
        WordProblem(length=1)


def test_stored_samples(shared_data, read_samples):
    tables = json.loads(lzma.decompress((shared_data / 'word_problems/group_tables.json.xz').read_bytes()))
    for group in GROUPS:
        np.testing.assert_array_equal(multiplication_table(group), tables[group])
        task = WordProblem(group)
        [(_, samples)] = read_samples(f'word_problems/{group}_*')
        assert len(samples) == 800
        for sample in samples:
            np.testing.assert_array_equal(task.solve(sample['input'])[0], sample['target'])
