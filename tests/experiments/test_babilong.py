"""The grid of stories in a haystack: its texts, what trivial rules get, and a run of a few steps."""

import pytest

from experiments import babilong, haystack_runs
from experiments.babilong import Args
from experiments.grid import Cell
from experiments.haystack_runs import trivial


def test_trivial_rules_get_less_than_most_answers():
    args = Args()
    shares = {question: trivial(args.text(question, 1024), 0, 400) for question in args.tasks}
    assert all(share['most frequent answer'] < 0.3 for share in shares.values())
    assert 0.25 < shares['qa1']['last mention'] < 0.7 and all(share['last mention'] < 0.8 for share in shares.values())


def test_short_texts_have_as_many_sentences_as_fit():
    assert [Args().text('qa1', length).num_facts for length in (256, 384, 512, 1024)] == [1, 5, 8, 8]
    assert Args().lengths('qa3', 'train_lengths') == (384, 512, 1024)
    assert Args().text('qa4', 1024).num_facts == 5 and Args(num_facts=3, tasks=('qa4',)).text('qa4', 1024).num_facts == 3


def test_a_row_says_what_stories_there_were():
    config = Args(num_facts=4).row(Cell('titans', 'qa3', 2))
    assert config['task']['name'] == config['task']['question'] == 'qa3' and config['task']['num_facts'] == 4 and config['seed'] == 2


@pytest.mark.parametrize('arguments', [['--tasks', 'qa6'], ['--num-facts', '20'], ['--models', 'hopee'], ['--models']])
def test_wrong_input_exits_with_2_and_names_it(arguments, capsys, monkeypatch):
    monkeypatch.setattr(haystack_runs, 'run_grid', lambda *_, **__: pytest.fail('no device work before'))
    with pytest.raises(SystemExit) as stop:
        babilong.main(arguments)
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert {'--num-facts': 'num_facts', '--tasks': 'qa1, qa2, qa3,'}.get(arguments[0], arguments[-1].strip('-')) in said


def test_smoke_run_trains_tests_and_stores_nothing(tmp_path, capsys):
    results = tmp_path / 'rows.jsonl'
    assert babilong.main(['--smoke', '--models', 'transformer', '--train-lengths', '512', '--results', str(results)]) == 0
    said = capsys.readouterr().out
    assert 'qa1 transformer seed 0' in said and 'last mention' in said and 'nan' not in said and not results.exists()
