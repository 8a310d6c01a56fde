"""The table and the figure of policies over configurations."""

import pytest

from experiments.seal_arc_tables import arc_table, draw_arc


def row(seed: int, tasks: int = 8, algorithm: str = 'rest-em', rate: float = 1e-3, **changes) -> dict:
    def arm(mean: float) -> dict:
        return dict(vote=[mean, mean - 0.1, mean + 0.1], above_constant=[mean - 0.5, mean - 0.6, mean - 0.4])

    split = dict(tasks=[4, 4], arms={'best constant': arm(0.5), f'{algorithm}, round 1': arm(0.4 + 0.01 * seed)})
    update = dict(algorithm=algorithm, learning_rate=rate)
    config = dict(rounds=1, seed=seed, outer=[update], table=dict(learner='a', tasks=list(range(tasks)))) | changes
    return dict(seed=seed, config=config, metrics=dict(splits={'one kind': split, 'all kinds': split}))


def test_intervals_are_over_tasks_for_one_seed_and_over_seeds_for_more():
    lines = arc_table([row(0)])
    assert lines[3] == '| rest-em, round 1 | 40.0 [30.0, 50.0] | -10.0 [-20.0, 0.0] | 40.0 [30.0, 50.0] | -10.0 [-20.0, 0.0] |'
    lines = arc_table([row(0), row(0), row(1), row(2)])
    assert 'n = 3' in lines[0] and lines[2].startswith('| best constant | 50.0 [40.0, 60.0] |'), 'what no seed changes is over tasks'
    assert lines[3].startswith('| rest-em, round 1 | 41.0 [38.5, 43.5] |')
    assert arc_table([]) == []


def test_configurations_are_not_mixed():
    with pytest.raises(ValueError, match='rounds is 1 and 2'):
        arc_table([row(0), row(1, rounds=2)])
    with pytest.raises(ValueError, match='learning_rate is 0.001 and 0.01'):
        arc_table([row(0), row(0, algorithm='grpo'), row(1, rate=1e-2)])


def test_rows_of_other_algorithms_are_more_arms_of_the_same_seeds(tmp_path):
    """Whatever learning rate they have of their own; of an arm that fewer seeds have it is said how many."""
    rows = [row(0), row(1), row(0, algorithm='dr-grpo', rate=1e-2), row(1, algorithm='dr-grpo', rate=1e-2)]
    lines = arc_table(rows)
    assert lines[:4] == arc_table(rows[:2]) and lines[4] == lines[3].replace('rest-em', 'dr-grpo')
    assert arc_table(rows[:3])[4].startswith('| dr-grpo, round 1 (n = 1) | 40.0 [30.0, 50.0] |')
    draw_arc(rows[:3], tmp_path / 'arms.png')


def test_rows_of_few_tasks_stand_apart_from_those_of_many(tmp_path):
    lines = arc_table([row(0, tasks=4), row(0), row(1), row(2, tasks=4)])
    heads = [line for line in lines if 'expected vote' in line]
    assert ['(n = 2), 8 tasks' in heads[0], '(n = 2), 4 tasks' in heads[1], lines[4]] == [True, True, '']
    assert lines[:4] == arc_table([row(0), row(1)]) and lines[5:] == arc_table([row(0, tasks=4), row(2, tasks=4)])
    draw_arc([row(0, tasks=4), row(0), row(1)], tmp_path / 'mixed.png')
    draw_arc([row(0), row(1)], tmp_path / 'whole.png')
    assert (tmp_path / 'mixed.png').read_bytes() == (tmp_path / 'whole.png').read_bytes()


def test_the_figure(tmp_path):
    draw_arc([row(0), row(1)], tmp_path / 'arms.png')
    assert (tmp_path / 'arms.png').stat().st_size > 10_000
