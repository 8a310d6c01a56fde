"""The ledger: every second has one cause, over restarts too; slow steps and stalls against a definition written out."""

import json
import shutil
import socket

import numpy as np
import pytest

from nested_jax.training.checkpoints import SaveError
from nested_jax.training.goodput import FILE, Ledger, StepTimes, summary
from nested_jax.training.guard import DivergedError


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now

    def spend(self, seconds):
        self.now += seconds


@pytest.fixture
def clock():
    return Clock()


def begin(folder, clock, step, start_s=1.0):
    ledger = Ledger(folder, clock, lambda: 5000 + clock.now)
    clock.spend(start_s)
    with ledger.during('restore'):
        clock.spend(2)
    ledger.begin(step)
    with ledger.during('compile'):
        clock.spend(10)
    return ledger


def run_steps(ledger, clock, first, last, step_s=1.0):
    for step in range(first + 1, last + 1):
        ledger.step(step - 1)
        with ledger.during('data'):
            clock.spend(0.25)
        clock.spend(step_s)
    ledger.step(last)


def save(ledger, clock, seconds=3.0):
    with ledger.during('save'):
        clock.spend(seconds)


def assert_adds_up(spent, wall_s):
    assert spent.total_s == pytest.approx(wall_s, rel=1e-9)
    assert spent.productive_s + sum(spent.badput_s.values()) == pytest.approx(spent.total_s, rel=1e-9)


def test_an_undisturbed_run(tmp_path, clock):
    ledger = begin(tmp_path, clock, 0)
    run_steps(ledger, clock, 0, 4)
    save(ledger, clock)
    with ledger.during('evaluate'):
        clock.spend(5)
    ledger.close('finished')
    spent = summary(tmp_path)
    expected = dict(start=1, restore=2, compile=10, data=1, save=3, evaluate=5, wasted=0, recovery=0)
    assert spent.badput_s == pytest.approx(expected) and spent.productive_s == pytest.approx(4)
    assert (spent.wasted_steps, spent.restarts) == (0, 0)
    assert_adds_up(spent, 26)
    assert spent.goodput == pytest.approx(4 / 26) and 'goodput 15.4% of 26.0 s' in str(spent)


def test_steps_since_the_last_checkpoint_of_a_killed_process_are_wasted(tmp_path, clock):
    ledger = begin(tmp_path, clock, 0)
    run_steps(ledger, clock, 0, 4)
    save(ledger, clock, 30.0)  # a slow one
    run_steps(ledger, clock, 4, 7, step_s=2.0)
    clock.spend(0.5)  # killed here, half a second after its last line
    clock.spend(6)  # until it is started again
    ledger = begin(tmp_path, clock, 4)
    run_steps(ledger, clock, 4, 10)
    ledger.close('finished')
    spent = summary(tmp_path)
    assert (spent.wasted_steps, spent.restarts) == (3, 1)
    assert spent.badput_s['wasted'] == pytest.approx(6) and spent.badput_s['recovery'] == pytest.approx(6.5)
    assert spent.badput_s['save'] == pytest.approx(30) and spent.productive_s == pytest.approx(4 + 6)
    assert_adds_up(spent, clock.now - 1000)


def test_falling_back_behind_an_earlier_process_wastes_its_steps_too(tmp_path, clock):
    for first, last in ((0, 4), (4, 8), (2, 10)):
        ledger = begin(tmp_path, clock, first)
        for step in range(first, last, 2):
            run_steps(ledger, clock, step, step + 2)
            save(ledger, clock)
    ledger.close('finished')
    spent = summary(tmp_path)
    assert spent.wasted_steps == 2 + 4 and spent.badput_s['wasted'] == pytest.approx(6)
    assert spent.productive_s == pytest.approx(10)
    assert_adds_up(spent, clock.now - 1000)


def test_time_in_which_a_run_lay_stopped_is_not_counted(tmp_path, clock):
    ledger = begin(tmp_path, clock, 0)
    run_steps(ledger, clock, 0, 4)
    ledger.close('stopped')
    clock.spend(86_400)
    ledger = begin(tmp_path, clock, 4)
    ledger.close('finished')
    spent = summary(tmp_path)
    assert spent.badput_s['recovery'] == 0 and spent.wasted_steps == 0
    assert_adds_up(spent, clock.now - 1000 - 86_400)


def test_going_back_within_a_process_wastes_what_it_leaves(tmp_path, clock):
    ledger = begin(tmp_path, clock, 0)
    run_steps(ledger, clock, 0, 4)
    save(ledger, clock)
    run_steps(ledger, clock, 4, 6)
    ledger.go_back()
    ledger.begin(4)
    run_steps(ledger, clock, 4, 6)
    ledger.close('finished')
    spent = summary(tmp_path)
    assert (spent.wasted_steps, spent.badput_s['wasted'], spent.productive_s) == (2, pytest.approx(2), pytest.approx(6))
    assert_adds_up(spent, clock.now - 1000)


def test_line_cut_off_by_a_kill_is_left_out(tmp_path, clock):
    ledger = begin(tmp_path, clock, 0)
    run_steps(ledger, clock, 0, 4)
    before = summary(tmp_path)
    with open(tmp_path / FILE, 'a') as file:
        file.write('{"process": "1-')
    assert summary(tmp_path) == before


def test_a_run_that_began_before_slow_steps_had_a_phase_is_summed_up(tmp_path, clock):
    begin(tmp_path, clock, 0).close('stopped')
    older = [json.loads(line) for line in (tmp_path / FILE).read_text().splitlines()]
    for line in older:
        del line['where'], line['slow']
    (tmp_path / FILE).write_text(''.join(json.dumps(line | dict(slow_steps=3, stalls=1)) + '\n' for line in older))
    ledger = begin(tmp_path, clock, 0)
    run_steps(ledger, clock, 0, 4)
    ledger.close('finished')
    assert summary(tmp_path).restarts == 1 and not summary(tmp_path).slow


def test_process_that_fails_says_how_far_it_came(tmp_path, clock):
    with pytest.raises(OSError), begin(tmp_path, clock, 0) as ledger:
        ledger.step(0)
        clock.spend(0.5)
        ledger.step(1)
        raise OSError
    begin(tmp_path, clock, 0).close('finished')
    assert summary(tmp_path).wasted_steps == 1 and summary(tmp_path).badput_s['wasted'] == pytest.approx(0.5)


def test_error_inside_ends_its_cause(tmp_path, clock):
    ledger = begin(tmp_path, clock, 0)
    ledger.step(0)
    with pytest.raises(OSError), ledger.during('save'):
        clock.spend(3)
        raise OSError
    clock.spend(2)
    ledger.close('stopped')
    assert summary(tmp_path).badput_s['save'] == pytest.approx(3) and summary(tmp_path).productive_s == pytest.approx(2)


def test_slow_steps_and_stalls_against_numpy():
    rng = np.random.default_rng(0)
    steps, waits = 1 + 0.1 * rng.random(200), 0.01 * rng.random(200)
    steps[[5, 60, 150]], waits[[3, 90]] = 3.0, 6.0
    slow, stalls = 0, 0
    held = rng.choice([0.0, 1.0], 200)  # how much of what a step took it waited
    for n in range(10, 200):
        recent = steps[max(n - 128, 0) : n]
        middle = np.median(recent)
        slow += steps[n] > middle + 3 * np.median(np.abs(recent - middle))
        stalls += waits[n] > 5 * middle
    times = StepTimes()
    for step_s, data_s, share in zip(steps, waits, held, strict=True):
        times.add(step_s, data_s, share * step_s)
    data, *others = times.slow.values()
    assert (sum(others), data) == (slow, stalls) and slow >= 2 and stalls == 1


@pytest.mark.parametrize(
    'data_s, work_s, wait_s, phase',
    [
        (6, 1, 0, '6.00 s of it for its batch'),
        (0.25, 7, 0, '7.00 s of it in its own work'),
        (0.25, 0.5, 7, '7.00 s of it waiting for its devices or another process'),
    ],
)
def test_what_took_a_step_long_is_said_by_each_process(tmp_path, clock, capsys, data_s, work_s, wait_s, phase):
    """S6. All wait for a straggler, which is the one whose line says something else."""
    ledger = Ledger(None, clock, process=3)
    ledger.begin(0)
    run_steps(ledger, clock, 0, 12)
    with ledger.during('data'):
        clock.spend(data_s)
    clock.spend(work_s)
    with ledger.waiting():
        clock.spend(wait_s)
    ledger.step(13)
    run_steps(ledger, clock, 13, 15)
    (line,) = capsys.readouterr().out.splitlines()
    total = data_s + work_s + wait_s
    assert line == f'step 13 in process 3 on {socket.gethostname()} took {total:.2f} s where 1.00 s is usual, {phase}'


def test_slow_steps_of_all_processes_are_counted_by_host_and_phase(tmp_path, clock):
    """S6. Above the median and three deviations, which is no line of its own: the sum at the end names the straggler."""
    account = begin(tmp_path, clock, 0)
    before = clock.now
    for process in (0, 1):
        clock.now = before
        ledger = account if process == 0 else Ledger(tmp_path, clock, process=process)
        if process:
            ledger.begin(0)
        run_steps(ledger, clock, 0, 12)
        for step in (13, 14):
            clock.spend(1 + process * 0.5)
            with ledger.waiting():
                clock.spend(0.5 - process * 0.5)
            ledger.step(step)
        if process:
            with ledger.during('data'):
                clock.spend(5.5)
            clock.spend(1)
            ledger.step(15)
        ledger.close('finished')
    waiting, working, stalled = (
        f'process {index} on {socket.gethostname()}, {phase}'
        for index, phase in ((0, 'waiting for its devices or another process'), (1, 'in its own work'), (1, 'for its batch'))
    )
    spent = summary(tmp_path)
    assert spent.slow == {waiting: 2, working: 2, stalled: 1} and spent.restarts == 0
    assert f', 2 slow in {waiting}, 2 slow in {working}, 1 slow in {stalled}' in str(spent)


def test_saves_and_evaluations_are_no_slow_steps(tmp_path, clock, capsys):
    ledger = begin(tmp_path, clock, 0)
    for step in range(30):
        run_steps(ledger, clock, step, step + 1)
        if step % 10 == 9:
            save(ledger, clock, 50.0)
    ledger.close('finished')
    assert not summary(tmp_path).slow
    assert not capsys.readouterr().out


def test_what_was_before_the_ledger_is_start(tmp_path, clock):
    clock.spend(7)
    with Ledger(tmp_path, clock, lambda: 5000 + clock.now, began=1000.0) as ledger:
        clock.spend(1)
        ledger.begin(0)
        ledger.go_back()
        ledger.begin(0)
        ledger.close('finished')
    spent = summary(tmp_path)
    assert spent.badput_s['start'] == pytest.approx(8)  # once
    assert_adds_up(spent, 8)


def test_what_ended_a_try_is_counted_and_never_hidden(tmp_path, clock):
    for error in (SaveError, SaveError, DivergedError):
        with pytest.raises(error), begin(tmp_path, clock, 0):
            raise error
    begin(tmp_path, clock, 0).close('stopped')
    spent = summary(tmp_path)
    assert spent.errors == {'SaveError': 2, 'DivergedError': 1} and str(spent).endswith(', 2 x SaveError, 1 x DivergedError')
    gone = tmp_path / 'gone'
    gone.mkdir()
    with pytest.raises(DivergedError), begin(gone, clock, 0):
        shutil.rmtree(gone)  # nothing can be written there, as on a full disk
        raise DivergedError
