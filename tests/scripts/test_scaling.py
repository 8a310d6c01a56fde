"""Curves of scripts/benchmarks/scaling.py: how they are climbed, fitted, checked and drawn; and each at its smallest sizes."""

import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scripts import bench
from scripts.benchmarks import memories, scaling, timing
from scripts.benchmarks.timing import Settings, TooLargeError

SETTINGS = Settings(repeats=1, smoke=True)


def test_fit_finds_the_exponent_and_its_interval():
    places = [1, 2, 4, 8, 16]
    noise = np.array([1.01, 0.99, 1.0, 1.01, 0.99])
    found = scaling.fit(places, 3 * np.array(places) ** 1.5 * noise)
    assert found['low'] < 1.5 < found['high'] and found['high'] - found['low'] < 0.05
    assert found['slope'] == pytest.approx(1.5, abs=0.01) and found['best_place'] == 1
    kinked = scaling.fit(places, [1, 1, 1, 4, 16])
    assert kinked['recent'] == pytest.approx(2) and kinked['slope'] < 1.5
    assert scaling.fit(places, [2 * place + 7 for place in places])['straight_r2'] == pytest.approx(1)


def test_a_curve_ends_before_points_that_take_too_long(capsys):
    begun = []

    def point(place: int) -> dict:
        begun.append(place)
        return dict(seconds=float(place**2))

    rows = list(scaling.climb('length', 'a', (1, 2, 4, 8, 16), point, Settings(1)))
    assert begun == [1, 2, 4, 8] and [row['place'] for row in rows] == begun  # 2 x 16^2 s is over the limit of 150 s
    assert 'left out from 16 on, which would take 512 s' in capsys.readouterr().out


def test_a_curve_ends_where_memory_does(capsys):
    def point(place: int) -> dict:
        if place > 2:
            raise TooLargeError('9.0 GiB')
        return dict(seconds=1.0)

    assert len(list(scaling.climb('length', 'a', (1, 2, 4, 8), point, SETTINGS, 0.5))) == 2
    assert 'left out from 4 on: 9.0 GiB' in capsys.readouterr().out


def test_no_run_begins_after_the_limit():
    calls = []
    found = timing.measure(lambda: calls.append(time.sleep(0.02)), 50, limit_s=0.05)
    assert 1 <= found.runs <= 3 and len(calls) == found.runs + 1 and found.fastest <= found.median <= found.slowest
    assert timing.measure(lambda: None, 4, limit_s=0.0).runs == 1 and timing.measure(lambda: None, 4).runs == 4


def test_programs_that_do_not_fit_are_not_run(monkeypatch):
    monkeypatch.setattr(timing, 'free_bytes', lambda: 1000)
    with pytest.raises(TooLargeError):
        timing.compile_timed(lambda x: jnp.sort(jnp.cos(x @ x.T).ravel()), jnp.ones((64, 64)))


def test_fits_need_three_points_of_every_cost():
    points = [dict(curve='a', model='m', place=place, seconds=2.0 * place, temporary_mib=0.0) for place in (1, 2, 4)]
    (row,) = scaling.fits(points)
    assert (row['what'], row['cost'], row['points']) == ('fit', 'seconds', 3) and row['slope'] == pytest.approx(1)
    assert list(scaling.fits(points[:2])) == []


def test_memories_that_differ_are_not_timed():
    form = lambda i: i['q']
    wrong = lambda i: i['q'].at[0, 3].add(0.01)
    inputs = memories.memory_inputs(1, 8, 2, 4)
    assert memories.disagreement('same', (form, form), inputs) == 0
    with pytest.raises(RuntimeError, match='other: chunked and token by token differ by'):
        memories.disagreement('other', (wrong, form), inputs)


def test_levels_that_move_out_of_turn_are_noticed():
    def update(gradients, state, params, period=2):
        step = state + 1
        moved = lambda every: jnp.where(step % every == 0, 1.0, 0.0)
        return {'blocks': {'channel': {'level_0': moved(1), 'level_1': moved(period)}}}, step

    scaling.check_schedule(update, None, 0, None, [1, 2])
    with pytest.raises(RuntimeError, match='level 1 of period 2 did not move at step 2'):
        scaling.check_schedule(lambda *args: update(*args, period=4), None, 0, None, [1, 2])


def test_draws_the_latest_of_each_point(tmp_path):
    point = dict(what='point', curve='length', model='a', fastest_s=0.5, slowest_s=2.0, temporary_mib=1.0)
    rows = [dict(metrics=point | dict(place=place, seconds=1.0)) for place in (1, 2)]
    fitted = dict(metrics=dict(what='fit', curve='length', model='a', cost='seconds'))
    scaling.draw([*rows, fitted], tmp_path / 'curves.png')
    assert (tmp_path / 'curves.png').read_bytes().startswith(b'\x89PNG')


OFTEN = (scaling.lengths, scaling.chunks, scaling.levels)
CURVES = [
    pytest.param(curve, marks=pytest.mark.slow if curve in OFTEN else pytest.mark.exhaustive, id=curve.__name__) for curve in scaling.CURVES
]


@pytest.mark.parametrize('curve', CURVES)
def test_every_curve_at_its_smallest_sizes(curve):
    rows = list(curve(SETTINGS))
    names = {row['curve'] for row in rows}
    assert len(names) == 1 and {row['what'] for row in rows} == {'point'}
    for model in {row['model'] for row in rows}:
        mine = [row for row in rows if row['model'] == model]
        assert len(mine) == 2 and mine[0]['place'] < mine[1]['place']
        assert all(row['seconds'] > 0 and row['fastest_s'] <= row['seconds'] <= row['slowest_s'] for row in mine)
    if names == {'parameters'}:
        assert rows[1]['matrix_flops'] > rows[0]['matrix_flops'] > 6 * rows[0]['place'] * 32  # at least 6 a parameter and token


def test_rows_and_picture_of_a_suite(tmp_path, monkeypatch):
    def part(settings: Settings):
        yield dict(what='point', curve='length', model='a', place=1, seconds=1.0, fastest_s=1.0, slowest_s=1.0, temporary_mib=2.0)
        raise KeyboardInterrupt

    def other(settings: Settings):
        raise AssertionError('not chosen')

    monkeypatch.setattr(scaling, 'PARTS', (other, part))
    output = tmp_path / 'rows.jsonl'
    with pytest.raises(KeyboardInterrupt):
        bench.main(['--suite', 'scaling', '--smoke', '--repeats', '3', '--parts', 'part', '--output', str(output)])
    (row,) = map(json.loads, output.read_text().splitlines())  # written before the interrupt
    assert row['experiment'] == 'bench_scaling' and row['config'] == dict(what='point', curve='length', model='a', place=1, repeats=3)
    assert row['hardware'].startswith(f'{len(jax.devices())} x ')


@pytest.mark.parametrize(
    'arguments',
    [['--repeats', '0'], ['--suite', 'cpu', '--smoke'], ['--suite', 'scaling', '--smoke'], ['--suite', 'scaling', '--parts', 'depths']],
)
def test_bad_arguments(arguments, capsys):
    with pytest.raises(SystemExit):
        bench.main(arguments)
    assert 'allowed' in capsys.readouterr().err
