"""Cells that train on text: what their rows depend on, runs that go on, and what stops a grid."""

import dataclasses
import json

import jax
import pytest

from experiments import text_runs
from experiments.grid import INTERRUPTED, Cell
from experiments.text_runs import TextArgs, TextGrid, cell_config, count_parameters, run_cell, run_text_grid, smaller
from nested_jax.data import open_dataset
from nested_jax.evaluation.rows import config_digest, read_rows
from tests.models.small_models import random_params, small


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp('text')
    for index in range(60):  # about one file of twenty is held out
        (folder / f'{index}.txt').write_text(f'document {index}: ' + 'memory writes memory. ' * 12)
    return open_dataset(str(folder))


@pytest.fixture
def settings():
    return smaller(TextArgs().train(0))


def model():
    return small('transformer', vocab_size=256, max_length=64)


def make_grid(path, settings, **changes) -> TextGrid:
    cells = tuple(Cell('transformer', 'text', seed) for seed in (0, 1))
    grid = TextGrid(
        'toy', cells, lambda cell: model(), lambda cell: dataclasses.replace(settings, seed=cell.seed), path / 'rows.jsonl', path / 'runs'
    )
    return dataclasses.replace(grid, **changes)


def test_a_row_depends_on_settings_and_text_and_on_no_path(data, settings):
    config = cell_config(model(), settings, data)
    elsewhere = cell_config(model(), dataclasses.replace(settings, output='/somewhere/else', log_every=7), data)
    assert config == elsewhere and '/' not in json.dumps(config)
    for changed in (dict(seed=1), dict(learning_rate=1.0), dict(steps=3)):
        assert config_digest(cell_config(model(), dataclasses.replace(settings, **changed), data)) != config_digest(config)


def test_parameters_are_counted_without_embedding_and_head():
    sizes = {name: sum(leaf.size for leaf in jax.tree.leaves(part)) for name, part in random_params_of(model()).items()}
    assert count_parameters(model()) == sizes['blocks'] + sizes['norm'] > 0


def random_params_of(config):
    from nested_jax.models.language_model import LanguageModel

    return random_params(LanguageModel(config), dtype='float32')


def test_a_finished_run_is_not_trained_again(data, settings, tmp_path, monkeypatch):
    first = run_cell(model(), settings, data, tmp_path, lambda result, data: dict(step=result.step))
    assert first['step'] == settings.steps and first['tokens'] == settings.steps * settings.tokens_per_step
    assert 0 < first['heldout_bits_per_byte'] < 20 and first['tokens_per_second'] > 0
    monkeypatch.setattr(text_runs.train.__globals__['_Trainer'], 'train_step', lambda *_: pytest.fail('a step of a finished run'))
    assert run_cell(model(), settings, data, tmp_path, lambda result, data: dict(step=result.step)) == first


def test_a_signal_ends_the_grid_with_no_row(data, settings, tmp_path, monkeypatch):
    real = text_runs.train
    monkeypatch.setattr(text_runs, 'train', lambda *args, **options: dataclasses.replace(real(*args, **options), stopped_by=2))
    assert run_text_grid(make_grid(tmp_path, settings), data, TextArgs()) == INTERRUPTED
    assert read_rows(tmp_path / 'rows.jsonl') == []


def test_rows_of_a_grid(data, settings, tmp_path, capsys):
    asked = []
    measure = lambda result, data: dict(asked=asked.append(result.step) or len(asked))
    grid = make_grid(tmp_path, settings, measure=lambda cell: measure if cell.seed else None, measured=dict(windows=3))
    assert run_text_grid(grid, data, TextArgs()) == 0
    rows = read_rows(tmp_path / 'rows.jsonl')
    assert [row['seed'] for row in rows] == [0, 1] and asked == [settings.steps]
    assert 'asked' not in rows[0]['metrics'] and rows[1]['metrics']['asked'] == 1 and rows[0]['config']['windows'] == 3
    assert 'bits per byte' in capsys.readouterr().out
    assert run_text_grid(grid, data, TextArgs()) == 0
    assert len(read_rows(tmp_path / 'rows.jsonl')) == 2


def test_a_cell_that_cannot_start_is_named_before_any_is_run(data, settings, tmp_path, monkeypatch):
    monkeypatch.setattr(text_runs, 'run_grid', lambda *_, **__: pytest.fail('no device work before'))
    odd = lambda cell: dataclasses.replace(settings, sequence_length=63)
    grid = make_grid(tmp_path, settings, model=lambda cell: small('hope-linear', vocab_size=256), train=odd)
    with pytest.raises(ValueError, match='sequence_length is 63'):
        run_text_grid(grid, data, TextArgs())
