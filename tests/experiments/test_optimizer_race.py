"""The race: lanes against a run alone, the search and its edge rule, differences that count, the controls, and a run of a few steps."""

import dataclasses
import functools
import importlib.util
import json
import math
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import optimizer_race, race_tasks, racing
from experiments.racing import Optimizer, Setting
from nested_jax.layers import delta_descent
from nested_jax.optim import with_delta

DUMMY = Optimizer(lambda *_: None, 1e-2, 'beta', (0.9, 0.8, 0.95))
BUDGET = 32


# --- lanes and costs


def test_a_lane_is_the_run_alone():
    """Each lane has its own seed and setting; the period of m3's slow momentum ends within the run."""
    task, optimizer = race_tasks.stream(20), optimizer_race.OPTIMIZERS['m3']
    settings = [Setting(0.1, 0.1, 0.98), Setting(0.03, 0.0, 0.9), Setting(0.03, 0.0, 0.98)]
    found = racing.Runs(task, optimizer, 2)([7, 7, 8], settings)
    alone = jax.jit(functools.partial(racing.train_one, task, optimizer))
    for lane, (seed, setting) in enumerate(zip([7, 7, 8], settings, strict=True)):
        expected = alone({}, np.uint32(seed), setting, True)
        np.testing.assert_allclose(found.search[lane], expected.search, rtol=2e-6)
        np.testing.assert_allclose(found.curve[lane], expected.curve, rtol=2e-6)
    assert len(set(found.search)) == 3
    searched = racing.Runs(task, optimizer, 2)([7, 7, 8], settings, curve=False)
    np.testing.assert_array_equal(searched.search, found.search)
    assert found.curve.shape == (3, 10) and searched.curve.shape == (3, 0)


def test_a_curve_ends_with_the_last_step():
    """Step by step by hand, with the losses of the points in between."""
    task, optimizer, setting = race_tasks.stream(20), optimizer_race.OPTIMIZERS['sgd'], Setting(0.1, 0.0, 0.9)
    found = jax.jit(functools.partial(racing.train_one, task, optimizer))({}, np.uint32(3), setting, True)
    advance = jax.jit(lambda carry, index: racing.advance(task, optimizer, {}, np.uint32(3), setting, carry, index))
    carry, losses = racing.begin(task, optimizer, np.uint32(3), setting), []
    for index in range(20):
        carry = advance(carry, index)
        losses.append(float(task.loss(carry[0], task.heldout({}, jax.random.key(3))[1])))
    np.testing.assert_allclose(found.curve, losses[1::2], rtol=1e-5)


def test_a_run_that_diverges_counts_as_knowing_nothing():
    task, optimizer = race_tasks.stream(20), optimizer_race.OPTIMIZERS['sgd']
    found = jax.jit(functools.partial(racing.train_one, task, optimizer))({}, np.uint32(3), Setting(1e20, 0.0, 0.9), True)
    assert float(found.search) == float(found.curve[-1]) == task.ceiling


def test_lanes_compute_the_slow_momentum_once_a_period():
    """The count of steps, and whether a curve is asked for, are the same in all lanes, so that every branch stays a branch."""
    one = functools.partial(racing.train_one, race_tasks.stream(20), optimizer_race.OPTIMIZERS['m3'])
    together, seeds, settings = jax.vmap(one, (None, 0, 0, None)), np.arange(2, dtype=np.uint32), np.ones((3, 2), np.float32)
    alone = jax.make_jaxpr(one)({}, seeds[0], Setting(*settings[:, 0]), True)
    lanes = jax.make_jaxpr(together)({}, seeds, Setting(*settings), True)
    assert str(lanes).count(' cond[') == str(alone).count(' cond[') > 2


def test_flops_of_m3_have_its_slow_momentum_once_a_period():
    task = race_tasks.stream(20)
    fast, m3 = (racing.step_flops(task, optimizer_race.OPTIMIZERS[name]) for name in ('m3-fast', 'm3'))
    dearest = racing.step_flops(task, dataclasses.replace(optimizer_race.OPTIMIZERS['m3'], period=1))
    assert m3 - fast == pytest.approx((dearest - fast) / 10) and dearest > 1.5 * fast


def test_delta_gradient_descent_has_the_products_of_gradient_descent(monkeypatch):
    """On every kernel of the language model's two layers, which are stacked, and on no other leaf."""
    task, wrapped = race_tasks.char_lm(10), []
    monkeypatch.setattr(delta_descent, 'with_delta', lambda *args: wrapped.append(args) or with_delta(*args))
    flops = [racing.step_flops(task, optimizer_race.OPTIMIZERS[name]) for name in ('sgd', 'delta-gradient-descent')]
    leaves = jax.tree_util.tree_leaves_with_path(jax.eval_shape(task.init, jax.random.key(0)))
    kernels = [path for path, _ in leaves if jax.tree_util.keystr(path[-1:], simple=True) == 'kernel']
    assert len(wrapped) == len(kernels) == 7 and flops[0] == flops[1] > 0


def test_schedule_warms_up_stays_and_falls_to_zero():
    task = race_tasks.stream(20)
    plateau = racing.rate_schedule(task, 2.0)
    assert [float(plateau(count)) for count in (0, 1, 5, 19)] == [1.0, 2.0, 2.0, 2.0]
    falling = racing.rate_schedule(dataclasses.replace(task, decay_share=0.5), 2.0)
    assert [float(falling(count)) for count in (0, 10, 15, 20)] == [1.0, 2.0, 1.0, 0.0]


# --- the search


def bowl(best: float, **others):
    """Losses whose lowest is at a learning rate, a weight decay and a knob; and the list of what was asked for."""
    asked = []

    def evaluate(settings):
        asked.append(list(settings))
        return [abs(math.log10(s.rate / best)) + sum(abs(getattr(s, name) - value) for name, value in others.items()) for s in settings]

    return evaluate, asked


def test_search_refines_around_the_best_and_tries_decay_and_knob():
    evaluate, asked = bowl(1.7e-2, weight_decay=0.01, knob=0.9)
    trials = racing.search(evaluate, DUMMY, BUDGET)
    assert trials.best == Setting(pytest.approx(1.7e-2, rel=0.02), 0.01, 0.9) and trials.at_edge == ()
    counts = [len(settings) for settings in asked if settings]
    assert counts[:5] == [5, 4, 4, 4, 2]  # the last two: rates at that decay, and what is around the best
    assert {setting.knob for setting in asked[2]} == {0.8, 0.9, 0.95}


def test_search_comes_back_to_the_rate():
    """With weight decay ten times the rate is better, and with that rate another knob."""

    def loss(setting):
        decays, high = setting.weight_decay == 0.01, setting.rate > 0.05
        return abs(math.log10(setting.rate) + 2 - decays) + 2 * (not decays) + abs(setting.knob - (0.95 if high else 0.9))

    trials = racing.search(lambda settings: list(map(loss, settings)), DUMMY, BUDGET)
    assert trials.best == Setting(pytest.approx(0.1, rel=1e-5), 0.01, 0.95) and trials.at_edge == ()


def test_search_goes_on_while_the_best_moves():
    """A knob of 0.6 is best, with ten times the first rate, two steps away; that some runs have diverged makes the gains no smaller."""

    def loss(setting):
        halvings, rate = math.log2((1 - setting.knob) / 0.1), math.log10(setting.rate) + 2
        return 1e3 if rate > 1.7 else 1e-3 * (0.1 + abs(rate - halvings / 2) + abs(halvings - 2))

    trials = racing.search(lambda settings: list(map(loss, settings)), DUMMY, BUDGET)
    assert trials.best == Setting(pytest.approx(0.1, rel=1e-5), 0.0, 0.6) and trials.at_edge == ()


def test_search_has_overtime_where_its_budget_ended_at_the_edge():
    """The other side of the best is tried, if it is near; diverged runs, a thousand times the loss, do not hide it."""
    evaluate = lambda settings: [1e3 if setting.rate > 1 else 1 / setting.rate for setting in settings]
    trials = racing.search(evaluate, DUMMY, 7)
    assert 'rate' not in trials.at_edge and 7 < len(trials.losses) <= 7 + racing.OVERTIME and trials.best < max(trials.losses)
    assert 'rate' in racing.search(evaluate, DUMMY, 3).at_edge
    trials = racing.search(evaluate, DUMMY, BUDGET)
    assert trials.at_edge == () and max(setting.rate for setting in trials.losses) > 1 >= trials.best.rate > 0.9


@pytest.mark.parametrize('best', [1e-5, 3e-1, 40.0])
def test_search_extends_the_grid_until_the_best_is_inside(best):
    evaluate, asked = bowl(best)
    trials = racing.search(evaluate, DUMMY, BUDGET)
    rates = sorted(setting.rate for setting in trials.losses)
    assert not trials.at_edge and rates[0] < trials.best.rate < rates[-1]
    assert abs(math.log10(trials.best.rate / best)) < 0.07
    assert len(asked) > 3


def test_search_says_that_the_best_is_still_at_the_edge():
    trials = racing.search(lambda settings: [math.log(setting.rate) for setting in settings], DUMMY, BUDGET)
    assert trials.at_edge == ('rate',) and len(trials.losses) == BUDGET + racing.OVERTIME


@pytest.mark.parametrize(
    ('others', 'found'),
    [
        (dict(weight_decay=1.0), dict(weight_decay=1.0, knob=0.9)),
        (dict(knob=0.99), dict(weight_decay=0.0, knob=0.9875)),
        (dict(knob=0.6), dict(weight_decay=0.0, knob=0.6)),
        (dict(knob=0.0), dict(weight_decay=0.0, knob=0.0)),
    ],
)
def test_search_extends_the_other_grids(others, found):
    """The best is between values that were tried, or at zero, of which there is no other side."""
    trials = racing.search(bowl(1e-2, **others)[0], DUMMY, BUDGET)
    assert trials.at_edge == () and trials.best._replace(rate=0) == Setting(0, **found)
    for name, value in found.items():
        tried = [getattr(setting, name) for setting in trials.losses]
        assert value == 0 or min(tried) < value < max(tried)


def test_search_extends_from_the_best_of_the_combinations():
    """Weight decay and hyper-parameter both end at an edge, which neither does alone."""
    evaluate = lambda settings: [abs(math.log10(s.rate / 1e-2)) - 5 * s.weight_decay * (s.knob == 0.95) for s in settings]
    assert racing.search(evaluate, DUMMY, BUDGET, extra=True).best.weight_decay > 0.1
    assert racing.search(evaluate, DUMMY, BUDGET).best.weight_decay == 0


def test_search_says_what_is_still_at_the_edge():
    """A decay whose losses fall by as much for each halving of its distance from 1."""
    trials = racing.search(lambda settings: [abs(math.log10(s.rate / 1e-2)) + math.log(1 - s.knob) for s in settings], DUMMY, BUDGET)
    assert trials.at_edge == ('knob',) and len({setting.knob for setting in trials.losses}) > 3 + racing.MAX_EXTENSIONS


def test_search_ends_where_a_decay_levels_off():
    trials = racing.search(lambda settings: [1 + abs(math.log10(s.rate / 1e-2)) + (1 - s.knob) ** 2 for s in settings], DUMMY, BUDGET)
    assert trials.at_edge == () and 0.9 < trials.best.knob < 1 and len({setting.knob for setting in trials.losses}) < 6


def test_search_stops_where_losses_have_levelled_off():
    trials = racing.search(lambda settings: [1 + 1 / (1 + 100 * setting.rate) for setting in settings], DUMMY, BUDGET)
    rates = sorted(setting.rate for setting in trials.losses)
    assert not trials.at_edge and 30 < trials.best.rate <= rates[-1] < 1e3


def test_search_goes_down_where_everything_has_diverged():
    evaluate = lambda settings: [min(2.0, abs(math.log10(setting.rate / 1e-6))) for setting in settings]
    assert racing.search(evaluate, DUMMY, BUDGET).best.rate == pytest.approx(1e-6, rel=1e-5)


@pytest.mark.parametrize('best', [1e-9, 1e-2, 3e5])
def test_budgets_are_equal_and_the_baseline_s_larger(best):
    """However far the grid has to be extended."""
    counts = [len(racing.search(bowl(best, knob=0.93)[0], DUMMY, BUDGET, extra=extra).losses) for extra in (False, True)]
    assert counts == [BUDGET, BUDGET + racing.EXTRA]
    assert all(len(set(optimizer.knobs)) == 3 for optimizer in optimizer_race.OPTIMIZERS.values())


def test_m3_without_its_slow_momentum_is_searched_as_m3_is():
    """And is m3 until the first period ends."""
    m3, fast = (optimizer_race.OPTIMIZERS[name] for name in ('m3', 'm3-fast'))
    assert dataclasses.replace(m3, make=None, period=1) == dataclasses.replace(fast, make=None)
    task, key = race_tasks.stream(20), jax.random.key(0)
    params = task.init(key)
    gradients = [jax.random.normal(jax.random.fold_in(key, step), params['kernel'].shape) for step in range(12)]
    both = [optimizer.make(lambda count: 1e-2, 0.1, 0.9) for optimizer in (m3, fast)]
    states = [optimizer.init(params) for optimizer in both]
    update = [jax.jit(optimizer.update) for optimizer in both]
    gaps = []
    for gradient in gradients:
        found = [one({'kernel': gradient}, state, params) for one, state in zip(update, states, strict=True)]
        states = [state for _, state in found]
        gaps.append(float(jnp.abs(found[0][0]['kernel'] - found[1][0]['kernel']).max()))
    assert max(gaps[:9]) < 1e-7 and min(gaps[10:]) > 1e-5


# --- what counts as a difference


def test_interval_is_student_s():
    mean, half = racing.interval([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0])
    assert mean == 5.5 and half == pytest.approx(2.262157 * statistics.stdev(range(10)) / math.sqrt(10), rel=1e-4)


def test_paired_p_of_known_numbers():
    # Student's sleep data, t = -4.0621 with 9 degrees of freedom.
    gaps = [1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4]
    assert racing.paired_p(gaps) == pytest.approx(0.00283289, rel=1e-3)
    assert racing.paired_p([0.0, 0.0]) == 1 and racing.paired_p([0.5, 0.5]) == 0


@pytest.mark.parametrize(('target', 'share'), [(4.5, 0.25), (4.0, 0.25), (3.5, 0.375), (2.0, 0.75), (1.9, None)])
def test_share_to_reach_a_loss(target, share):
    """At 0.25 of the steps 4, at 0.5 3, at 0.75 2, then back to 3."""
    assert racing.share_to_reach(target, [4.0, 3.0, 2.0, 3.0]) == share


@pytest.mark.parametrize(('gap', 'verdict'), [(1.45, 'better'), (1.3, 'equal'), (-1.45, 'worse'), (-1.3, 'equal')])
def test_a_difference_counts_from_3_09_sigma(gap, verdict):
    """With ten seeds each the resolvable difference is 3.09 sigma / sqrt(5) = 1.382 sigma."""
    baseline = 3 + 0.1 * np.random.default_rng(0).normal(size=10)
    losses = baseline - 0.1 * gap + 0.001 * np.random.default_rng(1).permutation(np.linspace(-1, 1, 10))
    result = racing.compare(losses, baseline, 0.1)
    assert result['verdict'] == verdict and result['wins'] == (10 if gap > 0 else 0)
    assert result['resolvable'] == pytest.approx(0.1382, rel=1e-3) and result['difference'] == pytest.approx(0.1 * gap)


def test_a_difference_that_the_seeds_do_not_share_does_not_count():
    """Above 3.09 sigma of adamw's runs, but the other's own runs are spread too far."""
    baseline = np.full(10, 3.0)
    assert racing.compare(baseline - np.array([5.0] + [0.0] * 9), baseline, 0.1)['verdict'] == 'equal'


# --- controls and the table


def row(name: str, losses, **metrics) -> dict:
    return dict(model=name, config=dict(task='stream'), metrics=dict(losses=list(map(float, losses))) | metrics)


def race(again: float = 0.0, flipped: float = 0.5, **metrics) -> list[dict]:
    drawn = np.random.default_rng(0).normal(size=(4, 10)) * 0.1 + 3
    means = {'adamw': 0.0, 'adamw-again': again, 'adamw-flipped': flipped, 'muon': -0.5}
    return [row(name, losses + mean, **metrics) for (name, mean), losses in zip(means.items(), drawn, strict=True)]


def test_char_lm_searches_and_compares_on_different_held_out_text():
    task = race_tasks.char_lm(10)
    search, comparison = (np.asarray(part['tokens']) for part in task.heldout(task.data, jax.random.key(0)))
    assert search.shape == comparison.shape == (128, 64) and len(np.unique(np.concatenate([search, comparison]), axis=0)) == 256


def test_controls_that_come_out_as_they_must():
    assert optimizer_race.problems(race()) == []


@pytest.mark.parametrize(
    ('changes', 'said'),
    [
        (dict(again=0.5), 'adamw-again came out worse, not equal'),
        (dict(again=-0.5), 'adamw-again came out better, not equal'),
        (dict(flipped=0.0), 'adamw-flipped came out equal, not worse'),
        (dict(flipped=-0.5), 'adamw-flipped came out better, not worse'),
        (dict(at_edge=['rate', 'knob']), 'best rate and knob at the edge of its grid'),
    ],
)
def test_controls_that_do_not(changes, said):
    assert any(said in problem for problem in optimizer_race.problems(race(**changes)))


def test_adamw_against_itself_is_seldom_told_apart():
    drawn = np.random.default_rng(1).normal(size=(300, 2, 10))
    told = [racing.compare(a, b, float(np.std(b, ddof=1)))['verdict'] != 'equal' for a, b in drawn]
    assert np.mean(told) < 0.02


def test_table_has_the_best_first_and_the_verdicts(tmp_path):
    lines = optimizer_race.table(race(), 'stream')
    names = [line.split()[0] for line in lines]
    assert names[:2] == ['stream', 'muon'] and names[-1] == 'adamw-flipped' and {'adamw', 'adamw-again'} == set(names[2:4])
    assert 'better 10' in lines[1] and 'worse 0' in lines[-1]
    optimizer_race.draw(race(), tmp_path / 'race.png')
    assert (tmp_path / 'race.png').stat().st_size > 1000


def test_costs_to_adamw_s_loss_are_shares_of_its_run():
    adamw = dict(losses=[3.0, 5.0], curve=[6.0, 4.0], step_seconds=1.0, flops=10.0)
    entry = dict(losses=[1.0, 1.0], curve=[4.0, 1.0], step_seconds=3.0, flops=20.0)
    assert optimizer_race.shares_to_reach(entry, adamw) == dict(steps=0.5, step_seconds=1.5, flops=1.0)
    assert optimizer_race.shares_to_reach(adamw, adamw) == dict(steps=1.0, step_seconds=1.0, flops=1.0)
    assert optimizer_race.shares_to_reach(entry | dict(curve=[9.0, 5.0]), adamw) is None


def test_losses_at_equal_cost_are_of_the_curve():
    adamw = dict(curve=[6.0, 4.0], step_seconds=1.0, flops=10.0)
    entry = dict(curve=[4.0, 1.0], step_seconds=4 / 3, flops=5.0)  # three quarters of the run, and twice
    assert optimizer_race.losses_at_equal_cost(entry, adamw) == dict(step_seconds=2.5, flops=1.0)
    assert optimizer_race.losses_at_equal_cost(adamw, adamw) == dict(step_seconds=4.0, flops=4.0)


def test_the_latest_row_of_an_optimizer_counts():
    assert optimizer_race.latest([row('sgd', [1]), row('sgd', [2])], 'stream')['sgd']['losses'] == [2.0]


# --- tasks


def test_stream_is_of_orthogonal_tasks_and_judged_on_all_of_them():
    task, long, key = race_tasks.stream(9), race_tasks.stream(900), jax.random.key(3)
    inputs, targets = map(np.asarray, jax.jit(jax.vmap(lambda step: task.draw({}, key, step)))(jnp.arange(9)))
    largest = np.abs(np.einsum('sbi,tci->stbc', inputs, inputs)).max((2, 3))
    same = np.arange(9)[:, None] // 3 == np.arange(9)[None] // 3
    assert largest[same].min() > 0.1 and largest[~same].max() < 1e-5
    target = np.linalg.lstsq(inputs.reshape(-1, 48), targets.reshape(-1, 16), rcond=None)[0]
    many = np.asarray(jax.jit(jax.vmap(lambda step: long.draw({}, key, step)[0]))(jnp.arange(900))).reshape(-1, 48)
    kernel = np.random.default_rng(0).normal(size=target.shape)
    expected = np.mean((many @ (kernel - target)) ** 2)
    assert float(task.loss({'kernel': jnp.asarray(kernel, jnp.float32)}, task.heldout({}, key)[1])) == pytest.approx(expected, rel=0.02)


@pytest.mark.skipif(importlib.util.find_spec('sklearn') is None, reason='needs the extra race')
def test_digits_are_split():
    task = race_tasks.digits(3)
    assert [part['labels'].size for part in task.data.values()] == [359, 359, 1079]
    images = [part['images'] for part in (*task.heldout(task.data, jax.random.key(0)), task.data['train'])]
    assert len(np.unique(np.concatenate(images).reshape(-1, 64), axis=0)) == 1797
    batch = task.draw(task.data, jax.random.key(0), jnp.int32(0))
    assert batch['images'].shape == (64, 8, 8) and 0 <= float(batch['images'].min()) <= float(batch['images'].max()) == 1
    untrained = jax.jit(lambda key: task.loss(task.init(key), batch))(jax.random.key(0))
    assert float(untrained) == pytest.approx(math.log(10), abs=0.7)


# --- the command line


@pytest.mark.parametrize(
    'arguments', [['--seeds', '1'], ['--lanes', '0'], ['--steps-share', '0'], ['--tasks', 'imagenet'], ['--optimizers', 'adam']]
)
def test_wrong_input_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        optimizer_race.main(['--tasks', 'stream', *arguments])
    assert stop.value.code == 2 and arguments[0].strip('-').replace('-', '_') in capsys.readouterr().err.replace('-', '_')


def test_digits_without_scikit_learn_name_the_extra(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(SystemExit) as stop:
        optimizer_race.main(['--tasks', 'digits'])
    assert stop.value.code == 2 and '[race]' in capsys.readouterr().err


def test_smoke_run_races_and_stores_nothing(tmp_path, capsys):
    arguments = ['--smoke', '--tasks', 'stream', '--optimizers', 'delta-gradient-descent', '--results', str(tmp_path / 'rows.jsonl')]
    assert optimizer_race.main(arguments) == 0
    said = capsys.readouterr().out
    for name in ('adamw ', 'adamw-again', 'adamw-flipped', 'delta-gradient-descent'):
        assert name in said
    assert 'nan' not in said and list(tmp_path.iterdir()) == []


def test_smoke_run_tries_the_other_tasks(tmp_path, monkeypatch, capsys):
    """Each in one step, digits only where they can be had."""
    monkeypatch.setattr(optimizer_race, 'TASKS', dict.fromkeys(race_tasks.TASKS, race_tasks.stream))
    monkeypatch.setattr(optimizer_race, '_race', lambda args, name: race())
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    arguments = ['--smoke', '--optimizers', 'sgd', '--results', str(tmp_path / 'rows.jsonl')]
    assert optimizer_race.main(arguments) == 0 and list(tmp_path.iterdir()) == []
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[:2] for line in lines[-2:]] == [['char-lm', 'sgd'], ['recall', 'sgd']] and lines[0][0] == 'stream'
    task, setting = race_tasks.stream(10), Setting(*np.float32([0.1, 0, 0.9]))
    carry = racing.begin(task, optimizer_race.OPTIMIZERS['sgd'], np.uint32(0), setting)
    params, _ = racing.advance(task, optimizer_race.OPTIMIZERS['sgd'], {}, np.uint32(0), setting, carry, jnp.int32(0))
    assert float(lines[-1][2]) == pytest.approx(float(task.loss(params, task.draw({}, jax.random.key(0), jnp.int32(1)))), abs=1e-4)


def test_a_race_stores_one_row_for_each_entry(tmp_path, monkeypatch):
    results = tmp_path / 'rows.jsonl'
    losses = dict(adamw=3.0, muon=2.5)

    def enter(args, runs, name):
        found = dict(
            setting=Setting(0.1, 0.0, 0.9)._asdict(), knob='b2', searched=[], at_edge=False, sensitivity=[1.0, 2.0, 3.0], curve=[3.0]
        )
        spread = np.linspace(-0.1, 0.1, args.seeds) + losses[name]
        return found | dict(losses=spread.tolist(), step_seconds=0.1, flops=1e6, state_bytes=8.0), 1.0

    measured = lambda runs, setting, seeds: dict(losses=[3.0 + 0.5 * (runs.optimizer is optimizer_race.CONTROL)] * len(seeds))
    monkeypatch.setattr(optimizer_race, '_enter', enter)
    monkeypatch.setattr(optimizer_race, 'measure', measured)
    assert optimizer_race.main(['--tasks', 'stream', '--optimizers', 'muon', '--results', str(results)]) == 0
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    assert [found['model'] for found in rows] == ['adamw', 'adamw-again', 'adamw-flipped', 'muon']
    assert len({found['config_digest'] for found in rows}) == 4 and results.with_suffix('.png').exists()
    losses['muon'] = 3.5
    monkeypatch.setattr(optimizer_race, 'measure', lambda runs, setting, seeds: dict(losses=[3.0] * len(seeds)))
    assert optimizer_race.main(['--tasks', 'stream', '--optimizers', 'muon', '--results', str(results)]) == 1
