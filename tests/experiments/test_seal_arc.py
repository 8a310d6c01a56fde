"""The experiment from its command line: a smoke run, going on after an interrupt, and bad input."""

import pytest

from experiments import seal_arc
from experiments.seal_arc_rewards import SPLITS
from nested_jax.seal.stages import Stages


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
    [('tasks', 0), ('rounds', 0), ('each', 1), ('seeds', ()), ('pretraining_steps', 1), ('learning_rate', 0), ('algorithms', ())],
)
def test_bad_arguments_are_named(name, value):
    with pytest.raises(ValueError, match=f'{name} is .*allowed is'):
        seal_arc.Args(**{name: value})


def test_without_a_table_it_is_said_how_to_make_one(tmp_path):
    with pytest.raises(ValueError, match='--build-table'):
        seal_arc.main(['--table', str(tmp_path / 'none.jsonl'), '--runs', str(tmp_path)])
