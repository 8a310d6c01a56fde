"""The grid of CMS levels: which periods a cell has, and that its cells differ in nothing else."""

import pytest

from experiments import cms_levels
from experiments.cms_levels import Args, level_config, make_cells
from experiments.text_runs import count_parameters
from nested_jax.evaluation.rows import read_rows


@pytest.mark.parametrize(
    ('task', 'periods'),
    [
        ('1 x 512', [512]),
        ('2 x 8192', [512, 8192]),
        ('3 x 8192', [512, 2048, 8192]),
        ('4 x 512', [512] * 4),
        ('3 x 2048', [512, 1024, 2048]),
        ('3 x 8192 nested', [512, 2048, 8192]),
    ],
)
def test_periods_lie_in_equal_ratios_from_the_fastest_to_the_slowest(task, periods):
    config = level_config(task)
    assert [level.period for level in config.levels] == periods and config.nested_levels is task.endswith('nested')


def test_levels_share_out_the_hidden_units():
    sizes = [count_parameters(level_config(f'{count} x 2048')) for count in (1, 2, 3, 4)]
    assert max(sizes) / min(sizes) < 1.01


def test_one_level_is_run_once_and_seeds_come_last():
    assert [cell.task for cell in make_cells(Args(levels=(1, 2), slowest=(512, 2048), seeds=(0,), variants=('nested',)))] == [
        '2 x 2048 nested'
    ]
    cells = make_cells(Args(levels=(1, 2), slowest=(2048, 8192), seeds=(0, 1), variants=('sequential',)))
    assert [cell.task for cell in cells[:3]] == ['1 x 512', '2 x 2048', '2 x 8192'] and [cell.seed for cell in cells] == [0] * 3 + [1] * 3


@pytest.mark.parametrize('arguments', [['--levels', '0'], ['--slowest', '1000'], ['--steps', '0'], ['--levels'], ['--variants', 'both']])
def test_wrong_input_exits_with_2_and_names_it(arguments, capsys, monkeypatch):
    monkeypatch.setattr(cms_levels, 'open_dataset', lambda *_: pytest.fail('the text is not read before'))
    with pytest.raises(SystemExit) as stop:
        cms_levels.main(arguments)
    assert stop.value.code == 2 and arguments[0].strip('-') in capsys.readouterr().err


@pytest.mark.slow
def test_smoke_run_trains_and_stores_nothing(tmp_path, capsys):
    results = tmp_path / 'rows.jsonl'
    assert cms_levels.main(['--smoke', '--results', str(results), '--runs', str(tmp_path / 'runs')]) == 0
    assert '1 x 512 hope-linear seed 0' in capsys.readouterr().out and read_rows(results) == []
