"""The comparison of Table 2: the order of its cells, the choice of learning rates, its scales, and a run of two steps."""

import pytest

from experiments import language_modeling
from experiments.grid import Cell
from experiments.language_modeling import OTHERS, TABLE, TRAINED, Args, best_rate, make_cells, scale, settings
from nested_jax.evaluation.rows import append_row, read_rows
from nested_jax.models.presets import preset, preset_names


def test_models_are_those_of_the_table_and_then_all_others():
    families = {name.removesuffix('-tiny') for name in preset_names() if name.endswith('-tiny')}
    assert len(TABLE) == 11 and set(TABLE + OTHERS) | {'lstm', 'srwm'} == families and not set(TABLE) & set(OTHERS)


def test_a_models_search_comes_before_its_first_run_and_other_seeds_at_the_end():
    args = Args(models=('transformer', 'hope-linear'), seeds=(0, 1))
    tasks = ['rate 0.002', 'rate 0.003', 'rate 0.006', TRAINED]
    searched = [Cell(model, task, 0) for model in args.models for task in tasks]
    assert list(make_cells(args)) == [*searched, Cell('transformer', TRAINED, 1), Cell('hope-linear', TRAINED, 1)]


def search_row(args: Args, rate: float, bits: float) -> dict:
    train = settings(args, Cell('titans', f'rate {rate:g}', 0))
    return dict(model='titans', config=dict(train=dict(steps=train.steps, learning_rate=rate)), metrics=dict(heldout_bits_per_byte=bits))


def test_a_full_run_takes_the_best_rate_of_a_whole_search(tmp_path):
    args = Args(results=tmp_path / 'rows.jsonl')
    for rate, bits in ((2e-3, 2.5), (3e-3, 2.2)):
        append_row(args.results, search_row(args, rate, bits))
    assert best_rate(args, 'titans') < 1e-30  # a rate is missing
    append_row(args.results, search_row(args, 6e-3, 2.4))
    assert best_rate(args, 'titans') == 3e-3 == settings(args, Cell('titans', TRAINED, 2)).learning_rate
    append_row(args.results, dict(search_row(args, 6e-3, 1.0), config=dict(train=dict(steps=9999, learning_rate=6e-3))))
    assert best_rate(args, 'titans') == 3e-3  # a full run is no search
    assert best_rate(args, 'hope') < 1e-30


def test_scales_hold_the_tokens_they_state():
    tokens = lambda setting: setting.train.steps * setting.train.tokens_per_step
    assert 1.0e6 <= tokens(scale('cpu', '340m')) < 1.1e6
    assert 1.0e8 <= tokens(scale('gpu', '340m')) < 1.01e8
    for size, billions in (('340m', 15), ('760m', 30), ('1.3b', 100)):
        setting = scale('paper', size)
        assert tokens(setting) == pytest.approx(billions * 1e9, rel=1e-4) and setting.train.tokens_per_step == 2**19
        assert preset(f'hope-{size}', **setting.model).dtype == 'bfloat16'


@pytest.mark.parametrize(
    ('arguments', 'named'),
    [
        (['--models', 'hopee'], 'hopee'),
        (['--models', 'lstm', '--scale', 'gpu'], 'lstm'),
        (['--scale', 'paper'], 'corpus'),
        (['--seeds', '-1'], 'seeds'),
        (['--scale', 'large'], 'scale'),
    ],
)
def test_wrong_input_exits_with_2_and_names_it(arguments, named, capsys, monkeypatch):
    monkeypatch.setattr(language_modeling, 'open_dataset', lambda *_: pytest.fail('the text is not read before'))
    with pytest.raises(SystemExit) as stop:
        language_modeling.main(arguments)
    assert stop.value.code == 2 and named in capsys.readouterr().err


def test_smoke_run_trains_and_stores_nothing(tmp_path, capsys):
    results = tmp_path / 'rows.jsonl'
    assert language_modeling.main(['--smoke', '--results', str(results), '--runs', str(tmp_path / 'runs')]) == 0
    assert 'transformer seed 0' in capsys.readouterr().out and read_rows(results) == []
