"""The reward table: rows that are read as they were written, tasks done once, learners not mixed."""

import json

import numpy as np
import pytest

from experiments import seal_arc_rewards
from nested_jax.evaluation.rows import read_rows

PARAMS = {'w': np.ones(3, np.float32)}
VOTES = np.random.default_rng(0).integers(2, size=512)


class Solver:
    """Has 512 made-up marks."""

    asked: list[str] = []

    def __init__(self, model):
        self.model = model

    def rewards(self, params, task, edits, seed):
        """Votes rotated by the task's number."""
        Solver.asked.append(task.name)
        votes = np.roll(VOTES, seed)
        return np.stack([votes, 1 - votes, votes / 4], -1).astype(float)

    def base(self, params, task):
        """Right."""
        return np.array([1.0, 0.0, 0.25])


@pytest.fixture
def build(tmp_path, monkeypatch):
    monkeypatch.setattr(seal_arc_rewards, 'Solver', Solver)
    monkeypatch.setattr(Solver, 'asked', [])
    return lambda tasks, params=PARAMS: seal_arc_rewards.build_table(params, range(tasks), 4, 0, tmp_path / 'table.jsonl')


def read(path, tasks: int) -> seal_arc_rewards.Table:
    return seal_arc_rewards.as_table(seal_arc_rewards.task_rows(path, 4, 0, tasks))


def test_rows_are_added_once_and_read_as_they_were(build, tmp_path):
    path = tmp_path / 'table.jsonl'
    build(2)
    build(3)
    assert Solver.asked == list(seal_arc_rewards.HELD_OUT[:3]) and len(read_rows(path)) == 3
    table = read(path, 8)
    assert table.indices == (0, 1, 2) and table.measures.shape == (3, 512, 3)
    np.testing.assert_array_equal(table.measures[2], Solver(None).rewards(None, seal_arc_rewards.draw_task(2, 'fill'), (), 2))
    np.testing.assert_array_equal(table.base, [[1.0, 0.0, 0.25]] * 3)
    assert read(path, 2).indices == (0, 1)


def test_learners_are_not_mixed(build, tmp_path):
    path = tmp_path / 'table.jsonl'
    build(1)
    with pytest.raises(ValueError, match='table is .* rows of learner .*allowed is rows of learner'):
        build(2, {'w': np.zeros(3, np.float32)})
    row = read_rows(path)[0]
    assert seal_arc_rewards.task_rows(path, 5, 0, 8) == seal_arc_rewards.task_rows(path, 4, 1, 8) == {}
    other = row['config'] | dict(task=1)
    row |= dict(config=other, config_digest=seal_arc_rewards.config_digest(other), metrics=row['metrics'] | dict(learner='b'))
    with open(path, 'a') as file:
        file.write(json.dumps(row) + '\n')
    with pytest.raises(seal_arc_rewards.TableError, match='2 learners'):
        read(path, 8)


def test_fewest_tasks_of_both_splits():
    seal_arc_rewards.check_splits(range(seal_arc_rewards.LEAST))
    for short in (range(seal_arc_rewards.LEAST - 1), range(8, 16)):
        with pytest.raises(seal_arc_rewards.TableError, match='tasks is 8 with .*allowed is'):
            seal_arc_rewards.check_splits(short)


@pytest.mark.parametrize('content', ['{', '[]', '{"config_digest": "a"}', '{"config_digest": "a", "experiment": "race"}'])
def test_files_of_other_content_are_named(tmp_path, content):
    (tmp_path / 'rows.jsonl').write_text(content)
    with pytest.raises(seal_arc_rewards.TableError, match=r'table is .*rows.jsonl.*allowed is a file of rows that --build-table made'):
        seal_arc_rewards.task_rows(tmp_path / 'rows.jsonl', 4, 0, 8)
