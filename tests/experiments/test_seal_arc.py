"""The experiment from its command line: a smoke run, going on after an interrupt, what is done without a table, and bad input."""

import collections
import json

import pytest

from experiments import seal_arc, seal_arc_rewards
from experiments.seal_arc_rewards import SPLITS, draw_task, family_of
from nested_jax.evaluation.rows import read_rows
from nested_jax.seal.stages import Stages
from tests.experiments import test_seal_arc_rewards


def test_smoke_run_goes_on_where_it_was_stopped_and_stores_no_row(tmp_path, capsys, monkeypatch):
    places = ('--runs', str(tmp_path / 'runs'), '--results', str(tmp_path / 'rows.jsonl'))
    smoke = lambda: seal_arc.main(['--smoke', *places, '--algorithms', 'rest-em'])
    stored = lambda: {str(path): path.read_bytes() for path in tmp_path.rglob('*.stage')}
    make = Stages.__call__

    def stopping(self, name, compute):
        if name.endswith('rest-em-0/policy'):
            raise KeyboardInterrupt
        return make(self, name, compute)

    monkeypatch.setattr(Stages, '__call__', stopping)
    assert smoke() == 130 and 'the same command goes on' in capsys.readouterr().out
    before = stored()
    monkeypatch.setattr(Stages, '__call__', make)
    assert smoke() == 0
    said = capsys.readouterr().out
    assert before and before.items() < stored().items()
    assert all(arm in said for arm in (*SPLITS, 'uniform', 'best constant', 'best of each task', 'untrained policy', 'rest-em, round 1'))
    assert not (tmp_path / 'rows.jsonl').exists() and list(tmp_path.rglob('arms.png'))


@pytest.mark.parametrize(
    ('name', 'value'),
    [
        ('tasks', 0),
        ('subset', 8),
        ('rounds', 0),
        ('each', 1),
        ('seeds', ()),
        ('pretraining_steps', 1),
        ('learning_rate', 0),
        ('algorithms', ()),
    ],
)
def test_bad_arguments_are_named(name, value):
    with pytest.raises(ValueError, match=f'{name} is .*allowed is'):
        seal_arc.Args(**{name: value})


class Counted(test_seal_arc_rewards.Solver):
    """Says which tasks were tried with how many configurations, and stops once after so many."""

    tried: collections.Counter = collections.Counter()
    stop: int | None = None

    def rewards(self, params, task, edits, seed):
        """Made-up ones."""
        if Counted.stop == len(Counted.tried):
            Counted.stop = None
            raise KeyboardInterrupt
        assert task == draw_task(seed, family_of(seed)) and len({json.dumps(edit, default=vars) for edit in edits}) == 512
        Counted.tried[seed] += 1
        return super().rewards(params, task, edits, seed)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs of few steps, whose learner's rewards are made up."""
    monkeypatch.setattr(seal_arc_rewards, 'Solver', Counted)
    monkeypatch.setattr(Counted, 'tried', collections.Counter())
    few = '--pretraining-steps 2 --rounds 1 --each 2 --algorithms rest-em --tasks 20'.split()
    places = {name: str(tmp_path / name) for name in ('runs', 'table', 'results')}
    flags = [word for name, value in places.items() for word in (f'--{name}', value)]
    return lambda *more: seal_arc.main([*few, *flags, *more])


def test_without_a_table_some_tasks_are_tried_once_and_it_is_said_which(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Counted, 'stop', 5)
    assert run('--subset', '10') == 130 and len(Counted.tried) == 5
    assert 'has 0 of 20 tasks of this learner; intervals are over 10 tasks' in capsys.readouterr().out
    assert run('--subset', '10') == 0
    assert Counted.tried == dict.fromkeys(range(10), 1) and not (tmp_path / 'table').exists()
    said = capsys.readouterr().out
    assert 'one kind, 3 training and 2 test tasks' in said and 'all kinds, 8 training and 2 test tasks' in said
    assert run('--subset', '10') == 0 and 'seed 0 has a row' in capsys.readouterr().out
    (row,) = read_rows(tmp_path / 'results')
    assert row['config']['table']['tasks'] == list(range(10)) and row['metrics']['splits']['all kinds']['tasks'] == [8, 2]


def test_rows_of_the_table_are_used_and_the_rest_is_tried(run, tmp_path, capsys):
    assert run('--build-table', '--tasks', '12') == 0 and set(Counted.tried) == set(range(12))
    before = (tmp_path / 'table').read_bytes()

    def used(subset: int = 16, tasks: int = 20) -> dict:
        places = {name: tmp_path / name for name in ('runs', 'table', 'results')}
        args = seal_arc.Args(subset=subset, tasks=tasks, pretraining_steps=2, **places)
        return seal_arc.run_config(args, seal_arc.rewards(args), 0)

    assert used(subset=14)['table']['tasks'] == list(range(14))
    assert 'has 12 of 20 tasks of this learner; intervals are over 14 tasks' in capsys.readouterr().out
    few = used(subset=9)
    assert few['table']['tasks'] == list(range(12)) and 'intervals are over 12 tasks' in capsys.readouterr().out
    assert used(tasks=12) == few, 'the same tasks, whatever they are a part of'
    assert run('--build-table') == 0 and capsys.readouterr() and used()['table']['tasks'] == list(range(20))
    assert 'intervals' not in capsys.readouterr().out and (tmp_path / 'table').read_bytes().startswith(before)
    assert Counted.tried == dict.fromkeys(range(12), 1) | {12: 2, 13: 2} | dict.fromkeys(range(14, 20), 1)


def test_the_stored_rows_are_those_of_the_defaults(tmp_path, capsys, monkeypatch):
    def start(args):
        raise AssertionError('something is computed')

    monkeypatch.setattr(seal_arc, 'start', start)
    assert seal_arc.main(['--seeds', '0', '1', '2', '--runs', str(tmp_path)]) == 0
    assert [line.split(' has a row')[0] for line in capsys.readouterr().out.splitlines()] == ['seed 0', 'seed 1', 'seed 2']
    assert not list(tmp_path.iterdir())


def test_too_few_tasks_and_another_file_are_one_line_before_any_work(run, tmp_path, capsys):
    def refused(*more: str) -> str:
        assert run(*more) == 2
        line = capsys.readouterr().err
        assert line.startswith('error: ') and line.count('\n') == 1 and 'allowed is' in line
        return line

    assert 'tasks is 8 with 3 training and 0 test tasks of one kind' in refused('--tasks', '8')
    (tmp_path / 'table').write_text('{"config_digest": "a", "experiment": "race"}')
    assert 'with rows of race' in refused()
    assert not Counted.tried and not (tmp_path / 'runs').exists()
    assert 'with rows of race' in refused('--build-table')
    (tmp_path / 'table').unlink()
    assert run('--build-table', '--tasks', '9') == 0 and capsys.readouterr()
    assert 'with rows of learner' in refused('--build-table', '--model-seed', '1')
    text = (tmp_path / 'table').read_text()
    learner = json.loads(text.splitlines()[0])['metrics']['learner']
    (tmp_path / 'table').write_text(text.replace(learner, 'f' * 64))
    assert 'with rows of learner ffffffffffff' in refused()
    assert Counted.tried == dict.fromkeys(range(9), 1)
