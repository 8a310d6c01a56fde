"""The grid of formal languages: its metrics against cases counted by hand, its choices, and a run of a few steps."""

import numpy as np
import pytest

from experiments import formal_languages
from experiments.formal_languages import Args, distinct, evaluate, model, right_sequences
from nested_jax.data.tasks.formal_languages import BINS, LANGUAGES, FormalLanguage
from nested_jax.evaluation.rows import read_rows


def test_right_sequences_of_known_mistakes():
    batch = dict(targets=np.zeros((4, 3), int), weights=np.array([[1, 1, 1], [1, 1, 1], [1, 1, 0], [1, 1, 0]], np.float32))
    predictions = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]])  # right; first wrong; last wrong; wrong only behind the string
    assert right_sequences(predictions, batch) == 0.5


def test_distinct_strings():
    batch = dict(tokens=np.array([[1, 2], [0, 1], [1, 2], [0, 1], [3, 3]]), targets=np.arange(5))
    assert {name: rows.tolist() for name, rows in distinct(batch).items()} == dict(tokens=[[1, 2], [0, 1], [3, 3]], targets=[0, 1, 4])


@pytest.mark.parametrize('language', LANGUAGES)
def test_the_solver_is_right_everywhere_and_the_most_frequent_answer_is_scored_beside(language):
    task = FormalLanguage(language)
    bins = evaluate(lambda tokens: np.stack([task.solve(row)[0] for row in tokens]), task, 0, 40)['bins']
    assert all(found['every'] == found['positions'] == 1 for found in bins.values())
    common = formal_languages.majority(task, 0)
    trivial = evaluate(lambda tokens: np.full_like(tokens, common), task, 0, 40)['bins']
    assert all(found['every'] == found['majority'] for found in trivial.values())
    assert trivial['bin1']['majority'] == 0 or language == 'shuffle-2'


@pytest.mark.parametrize(('language', 'counts'), [('aa-star', (25, 25, 25)), ('abab-star', (12, 13, 12)), ('counter-3', (16, 17, 17))])
def test_languages_with_one_string_a_length_are_tested_on_all_of_them(language, counts):
    task = FormalLanguage(language)
    bins = evaluate(lambda tokens: tokens, task, 1, 500)['bins']
    assert tuple(found['strings'] for found in bins.values()) == tuple(task.num_strings(split) for split in bins) == counts


def test_checkpoints_are_chosen_where_bin_0_is_held_out(monkeypatch):
    asked = []
    monkeypatch.setattr(formal_languages, 'make_train', lambda *args, **options: asked.append(options))
    for language in LANGUAGES:
        formal_languages.prepare(Args(), 'transformer', language)
    every = dict(zip(LANGUAGES, (options['score_every'] for options in asked), strict=True))
    assert {language for language, steps in every.items() if steps} == {'parity', 'shuffle-2'}
    held_out = {name for name in LANGUAGES if not np.array_equal(*(FormalLanguage(name).num_strings(split) for split in ('bin0', 'bin1')))}
    assert {options['validation'] for options in asked} == {'bin0'} and {'parity', 'shuffle-2'} <= held_out


def test_models_have_the_language_s_vocabulary_and_see_whole_strings():
    assert model('transformer', 'shuffle-2').vocab_size == 5 and model('transformer', 'aa-star').vocab_size == 3
    assert model('transformer', 'parity').max_length >= BINS['bin2'][1]


@pytest.mark.parametrize(
    'arguments',
    [
        ['--models', 'lstmm'],
        ['--models'],
        ['--languages', 'dyck'],
        ['--seeds', '-1'],
        ['--steps', '0'],
        ['--minutes', '0'],
        ['--learning-rates', '0'],
    ],
)
def test_wrong_input_exits_with_2_and_names_it(arguments, capsys, monkeypatch):
    monkeypatch.setattr(formal_languages, 'run_grid', lambda *_, **__: pytest.fail('no device work before'))
    with pytest.raises(SystemExit) as stop:
        formal_languages.main(arguments)
    assert stop.value.code == 2
    said = capsys.readouterr().err.replace('-', '_')
    assert (arguments[1] if arguments[0] == '--models' and len(arguments) > 1 else arguments[0].strip('-').replace('-', '_')) in said


def test_smoke_run_trains_tests_and_stores_nothing(tmp_path, capsys):
    results = tmp_path / 'rows.jsonl'
    assert formal_languages.main(['--smoke', '--models', 'transformer', '--results', str(results)]) == 0
    said = capsys.readouterr().out
    assert 'parity transformer seed 0' in said and 'majority' in said and 'nan' not in said and not results.exists()


def test_a_run_stores_a_row_for_each_cell(tmp_path, monkeypatch):
    metrics = dict(bins={name: dict(every=1.0, majority=0.0, strings=5) for name in formal_languages.TESTS}, learning_rate=0.1)
    monkeypatch.setattr(formal_languages, 'prepare', lambda args, name, language: lambda seeds: [metrics for _ in seeds])
    words = [
        '--models',
        'transformer',
        'hope-linear',
        '--languages',
        'parity',
        '--seeds',
        '3',
        '4',
        '--results',
        str(tmp_path / 'rows.jsonl'),
    ]
    for _ in range(2):
        assert formal_languages.main(words) == 0
    rows = read_rows(tmp_path / 'rows.jsonl')
    assert [(row['model'], row['seed']) for row in rows] == [('transformer', 3), ('transformer', 4), ('hope-linear', 3), ('hope-linear', 4)]
    assert len({row['config_digest'] for row in rows}) == 4
    assert formal_languages.main([*words, '--steps', '700']) == 0 and len(read_rows(tmp_path / 'rows.jsonl')) == 8
