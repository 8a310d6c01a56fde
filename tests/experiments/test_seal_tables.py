"""The table of SEAL's arms: seeds at their own budgets, and nothing mixed."""

import json

import pytest

from experiments.seal_tables import draw_seal, seal_table

ARMS = ('base', 'passage only', 'untrained self-edit', 'rest-em, round 1')


def row(seed: int, chosen: str = '0.01 x 32', **changes) -> dict:
    arms = lambda shift: {
        arm: dict(right=[place / 10 + shift, place / 10, 0.9], above_untrained=[0, 0, 0]) for place, arm in enumerate(ARMS)
    }
    sweep = {budget: {'passage only': 0.2, 'untrained self-edit': 0.3, 'oracle edit': 1.0} for budget in ('0.003 x 16', '0.01 x 32')}
    reported = {chosen: dict(arms=arms(0.01 * seed)), '0.003 x 16': dict(arms=arms(0.0))}
    return dict(
        model='transformer',
        seed=seed,
        config=dict(tests=4, seed=seed) | changes,
        metrics=dict(chosen=chosen, sweep=sweep, reported=reported),
    )


def test_seeds_are_means_with_intervals():
    lines = seal_table([row(0), row(1), row(2)])
    assert '0.01 x 32' in lines[0] and len(lines) == 2 + len(ARMS)
    assert lines[2] == '| base | 1.0 ± 2.5 (n = 3) | 0.0 ± 0.0 (n = 3) | 32.7 |'
    assert lines[3].startswith('| passage only | 11.0 ± 2.5')


def test_one_seed_has_the_interval_over_passages_and_the_latest_row_counts():
    lines = seal_table([row(0), row(0, chosen='0.003 x 16')])
    assert lines[2] == '| base | 0.0 [0.0, 90.0] (n = 1) | 0.0 [0.0, 90.0] (n = 1) | 32.7 |'
    assert seal_table([]) == []


def test_learners_have_tables_of_their_own():
    lines = seal_table([row(0), row(0, size=3) | dict(model='hope-linear')])
    assert len(lines) == 2 * (2 + len(ARMS)) + 1 and lines[6] == '' and 'hope-linear' in lines[7]
    lines = seal_table([row(0), row(0, reward='log_prob')])
    assert len(lines) == 2 * (2 + len(ARMS)) + 1 and 'rewarded by' not in lines[0] and 'rewarded by log_prob' in lines[7]


def test_configurations_are_not_mixed():
    with pytest.raises(ValueError, match='seeds of SEAL: tests is 4 and 8'):
        seal_table([row(0), row(1, tests=8)])


def test_the_figure(tmp_path):
    for index, rows in enumerate(([row(0)], [row(0), row(1)])):
        draw_seal(json.loads(json.dumps(rows)), tmp_path / f'{index}.png')
        assert (tmp_path / f'{index}.png').stat().st_size > 10_000
