"""The curved-valley experiment: its landscape, its methods against a plain loop, its comparisons, and a small run."""

import json
import math

import jax
import numpy as np
import pytest

from experiments import curvature_toy
from nested_jax.evaluation.rows import read_rows

SMALL = ['--k', '10', '--a', '1', '--omega', '2', '--rates', '1e-3', '1e-2', '--rates-a-decade', '2', '--steps', '800']


def gradient(position: np.ndarray, k: float, a: float, omega: float) -> np.ndarray:
    r, theta = position
    gap = r - theta + a * math.sin(omega * r)
    return np.array([2 * r + 2 * k * gap * (1 + a * omega * math.cos(omega * r)), -2 * k * gap])


def steps_to_arrive(layout: str, erased, written, k=10.0, a=1.0, omega=2.0, rate=0.004, limit=10_000) -> int | None:
    """A loop in numpy; `erased` is the factor c(|g|^2) of what is taken off the momentum, `written` what an implicit step solves."""
    position, momentum, held = np.array([-3.5, 2.0]), np.zeros(2), 0
    for step in range(1, limit + 1):
        g = gradient(position, k, a, omega)
        overlap = g * (g @ momentum) if layout == 'column' else (g @ g) * momentum
        momentum = written(0.9 * momentum - erased(g @ g) * overlap + g, g, layout)
        position = position - rate * momentum
        r, theta = position
        held = held + 1 if r**2 + k * (r - theta + a * math.sin(omega * r)) ** 2 < 1e-6 else 0
        if held == 10:
            return step - 9
    return None


def explicit(momentum, g, layout):
    return momentum


def implicit(momentum, g, layout):
    outer = np.outer(g, g) if layout == 'column' else (g @ g) * np.eye(2)
    return np.linalg.solve(np.eye(2) + 0.004 * outer, momentum)


RULES = {
    'heavy-ball': (lambda squared: 0.0, explicit),
    'clipped': (lambda squared: min(0.004, 0.9 / squared), explicit),
    'normalised': (lambda squared: 0.004 / squared, explicit),
    'normalised-half': (lambda squared: 0.5 / squared, explicit),
    'proximal': (lambda squared: 0.0, implicit),
}


@pytest.mark.parametrize('setting', [(10.0, 1.0, 2.0), (3.0, 0.25, 1.0), (30.0, 2.0, 3.0)])
def test_gradient_and_minimum_of_the_landscape(x64, setting):
    """The gradient is right, and zero at the origin alone: its second part is zero in the valley only, and there the first is 2 r."""
    for position in np.random.default_rng(0).normal(size=(20, 2)) * 3:
        found = jax.grad(curvature_toy.height)(position, np.array(setting))
        np.testing.assert_allclose(found, gradient(position, *setting), rtol=1e-12, atol=1e-12)
        assert curvature_toy.height(position, np.array(setting)) > 0
        _, a, omega = setting
        r = position[0]
        in_valley = np.array([r, r + a * np.sin(omega * r)])
        np.testing.assert_allclose(jax.grad(curvature_toy.height)(in_valley, np.array(setting)), [2 * r, 0], atol=1e-12)
    assert curvature_toy.height(np.zeros(2), np.array(setting)) == 0


@pytest.mark.parametrize('layout', curvature_toy.LAYOUTS)
@pytest.mark.parametrize('method', RULES)
def test_steps_at_the_reproduction_s_setting_are_those_of_a_plain_loop(x64, method, layout):
    measured = curvature_toy.reproduce(method, layout, 5000)
    expected = steps_to_arrive(layout, *RULES[method])
    assert measured['reproduction']['steps'] == expected is not None
    if layout == 'column' and method in curvature_toy.PUBLISHED:
        assert measured['reproduction']['published'] == expected
    assert measured['path'][0] == [-3.5, 2.0] and len(measured['path']) == 1 + curvature_toy.PATH_STEPS


def test_a_race_counts_the_steps_of_its_paths_and_tells_slow_from_diverged(x64):
    rates, limit = np.array([1e-5, 0.001, 0.004, 0.2]), 3000
    steps, diverged = curvature_toy.race('heavy-ball', 'column', np.array([[10.0, 1.0, 2.0]]), rates, limit)
    traced = [curvature_toy.arrival(curvature_toy.trace('heavy-ball', 'column', (10.0, 1.0, 2.0), rate, limit)[1]) for rate in rates[:3]]
    assert steps[0].tolist() == [*traced, math.inf] and traced[0] == math.inf and traced[2] == 670
    assert diverged.tolist() == [[False, False, False, True]]


def test_the_printed_form_diverges_where_a_steep_gradient_meets_the_rate(x64):
    metrics = curvature_toy.reproduce('printed', 'column', 1000)
    assert metrics['reproduction']['steps'] is None and len(metrics['path']) < 10
    json.dumps(metrics, allow_nan=False)


@pytest.mark.parametrize(('below', 'expected'), [(range(3, 13), 4), ([*range(9), *range(20, 30)], 21), (range(9), math.inf)])
def test_arrival_is_the_first_of_ten_steps_below_the_tolerance(below, expected):
    heights = np.ones(40)
    heights[list(below)] = 1e-7
    assert curvature_toy.arrival(heights) == expected


def test_comparison_of_known_steps():
    steps = np.array([[50.0, 100, np.inf], [30, np.inf, np.inf], [np.inf, 9, np.inf]])
    baseline = np.array([[100.0, 100, np.inf], [20, 40, np.inf], [7, np.inf, np.inf]])
    found = curvature_toy.compare(steps, baseline, seed=0)
    counts = {name: found[name] for name in ('faster', 'slower', 'equal', 'only_method', 'only_baseline', 'neither')}
    assert counts == dict(faster=1, slower=1, equal=1, only_method=1, only_baseline=2, neither=3)
    assert found['ratios'] == [0.75, 1.5, None] and found['median'] == 1.125 and found['interval'] == [0.75, 1.5]
    assert (found['landscapes_faster'], found['landscapes_slower']) == (1, 1)


def test_comparison_without_a_shared_rate_has_no_ratio():
    found = curvature_toy.compare(np.array([[np.inf, 3.0]]), np.array([[3.0, np.inf]]), seed=0)
    assert found['ratios'] == [None] and found['median'] is None and found['interval'] is None


def test_a_run_stores_a_row_for_each_method_and_draws(tmp_path, capsys):
    results = tmp_path / 'rows.jsonl'
    assert curvature_toy.main([*SMALL, '--layouts', 'column', '--results', str(results)]) == 0
    rows = read_rows(results)
    assert [row['model'] for row in rows] == list(curvature_toy.METHODS) and len({row['config_digest'] for row in rows}) == 1
    (heavy_ball, clipped) = (row['metrics'] for row in rows if row['model'] in ('heavy-ball', 'clipped'))
    assert heavy_ball['reproduction'] == dict(setting=[10, 1, 2], learning_rate=0.004, steps=670, published=670)
    shared = [pair for pair in zip(clipped['steps'][0], heavy_ball['steps'][0], strict=True) if None not in pair]
    assert len(heavy_ball['steps'][0]) == 3 and len(shared) >= 1
    assert clipped['at_equal_rates']['ratios'] == [np.median([mine / other for mine, other in shared])] != [1.0]
    assert heavy_ball['at_best_rates']['equal'] == 1 and heavy_ball['at_equal_rates']['median'] == 1
    assert '670, published 670' in capsys.readouterr().out
    picture = results.with_suffix('.png')
    assert picture.read_bytes()[:4] == b'\x89PNG' and 10_000 < picture.stat().st_size < 200_000


def test_smoke_run_races_every_method_and_stores_nothing(tmp_path, capsys):
    assert curvature_toy.main(['--smoke', '--layouts', 'row', '--results', str(tmp_path / 'rows.jsonl')]) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [tuple(line.split()[:2]) for line in lines] == [('row', method) for method in curvature_toy.METHODS]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    'arguments', [['--k', '-1'], ['--rates', '1', '0.1'], ['--rates-a-decade', '0'], ['--steps', '9'], ['--layouts', 'x'], ['--seed', '-1']]
)
def test_wrong_input_exits_with_2_and_names_the_argument(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        curvature_toy.main(arguments)
    assert stop.value.code == 2
    assert arguments[0].strip('-').replace('-', '_') in capsys.readouterr().err.replace('-', '_')
