"""The table and the figure of streams: the paper's row from its matrix, seeds at their own rates, and nothing mixed."""

import json

import numpy as np
import pytest

from experiments.seal_continual_tables import continual_table, draw_continual, forgotten_more, matched_table, published
from nested_jax.evaluation.continual import continual_metrics, gain_by_lag


def row(method: str, learner: str, seed: int, learned: float = 0.5, **changes) -> dict:
    found = lambda learned: dict(
        matrix=[[learned, 0.1], [0.25, learned]], before=[0.1, 0.1], known=[1.0, 0.5], turned_wrong=0.1,
        **continual_metrics(np.array([[learned, 0.1], [0.25, learned]]), np.array([0.1, 0.1]))._asdict(),
    )  # fmt: skip
    rates = {'0.002': found(learned / 2), '0.004': found(learned)}
    metrics = dict(chosen='0.002' if seed == 9 else '0.004', dev=rates, test=rates, update_flops=5e8, routed=None)
    config = dict(task=dict(name=method), length=2, edits='self-edit', seed=seed) | changes
    return dict(model=learner, seed=seed, config=config, metrics=metrics)


def test_the_papers_matrix_has_the_papers_metrics():
    matrix, before = published()
    told = continual_metrics(matrix, before)
    np.testing.assert_allclose((told.learning_accuracy, told.average_accuracy, told.backward_transfer), (0.415, 0.247, -0.191), atol=6e-4)
    gains = [0.107, 0.052, -0.026, -0.066, -0.069, -0.100, -0.124, -0.142]
    np.testing.assert_allclose(gain_by_lag(matrix, before), gains, atol=2e-3)
    assert continual_table([row('sequential', 'transformer', 0)])[-1].startswith('| sequential | Qwen2.5-7B, the paper | 41.5 | 24.7 |')


def test_a_line_is_a_method_and_a_learner_over_seeds():
    rows = [row('sequential', 'transformer', seed, learned) for seed, learned in ((0, 0.9), (0, 0.4), (1, 0.5), (2, 0.6))]
    lines = continual_table([*rows, row('joint', 'transformer', 1, 0.8), row('joint', 'transformer', 9, 0.8)])
    assert lines[0].startswith('| 2 self-edits one after another, % | learner | learned |') and len(lines) == 5
    cells = [cell.strip() for cell in lines[2].strip('|').split('|')]
    assert cells[:2] == ['sequential', 'transformer'] and cells[2] == '50.0 ± 24.8 (n = 3)'
    assert cells[4] == '25.0 ± 24.8 (n = 3)' and cells[5] == '-25.0 ± 24.8 (n = 3)' and cells[6] == '0.0 ± 0.0 (n = 3)'
    assert cells[7] == '10.0 ± 0.0 (n = 3)' and cells[8] == '50.0 ± 0.0 (n = 3)'
    assert cells[9] == '30.0 (n = 1)' and cells[10:] == ['0.004', '500']
    assert '0.002, 0.004' in lines[3]
    assert continual_table([]) == []


def test_forgetting_is_compared_at_equal_learning():
    run = lambda *points: dict(
        metrics=dict(test={str(index): dict(learning_accuracy=x, forgetting=y) for index, (x, y) in enumerate(points)})
    )
    adapters = run((0.2, 0.1), (0.6, 0.3))
    assert forgotten_more(run((0.5, 0.3), (0.1, 0.1)), adapters) == pytest.approx((50, 5))  # 0.25 there between 0.1 and 0.3
    assert forgotten_more(run((0.4, 0.3), (0.9, 0.8)), adapters) == pytest.approx((60, 20))
    assert forgotten_more(run((0.7, 0.3), (0.9, 0.8)), adapters) is None
    overshot = run((0.2, 0.1), (0.5, 0.2), (0.4, 0.9))  # of the two rates that learn 0.4 the lower counts
    assert forgotten_more(overshot, run((0.1, 0.0), (0.4, 0.1))) == pytest.approx((40, 100 * (0.1 + 0.2 / 3) - 10))

    rows = [row('sequential', learner, seed, 0.6) for learner in ('a', 'a, levels') for seed in (0, 1)]
    lines = matched_table([*rows, row('o-lora', 'a', 0)])
    assert lines[0] == '| forgotten by levels more than by adapters, points | a |'
    assert lines[2:] == ['| sequential | +0.0 ± 0.0 (n = 2) at 60 % |']
    assert matched_table(rows[:2]) == [] == matched_table([])


def test_configurations_are_not_mixed():
    with pytest.raises(ValueError, match='transformer, sequential: streams is 2 and 4'):
        continual_table([row('sequential', 'transformer', 0, streams=2), row('sequential', 'transformer', 1, streams=4)])


def test_the_figure(tmp_path):
    rows = [row(method, learner, seed) for method in ('sequential', 'ewc') for learner in ('a', 'a, levels') for seed in (0, 1)]
    for index, part in enumerate((rows, rows[:1])):
        draw_continual(json.loads(json.dumps(part)), tmp_path / f'{index}.png')
        assert (tmp_path / f'{index}.png').stat().st_size > 10_000
