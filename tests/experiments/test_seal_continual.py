"""The experiment of streams from its command line, what its cells are, and bad input."""

import pytest

from experiments import seal_continual
from experiments.grid import Cell
from experiments.seal_streams import ARMS


@pytest.mark.slow
def test_a_smoke_run_stores_no_row_and_keeps_its_models(tmp_path, capsys):
    smoke = lambda: seal_continual.main(['--smoke', '--runs', str(tmp_path / 'runs'), '--results', str(tmp_path / 'rows.jsonl')])
    assert smoke() == 0
    said, stages = capsys.readouterr().out, {path: path.read_bytes() for path in tmp_path.rglob('*.stage')}
    assert 'sequential transformer seed 0: learned' in said and not (tmp_path / 'rows.jsonl').exists()
    assert sorted(path.stem for path in stages) == ['edits', 'pretrained']
    assert smoke() == 0 and {path: path.read_bytes() for path in tmp_path.rglob('*.stage')} == stages


def test_cells_differ_and_the_stream_is_in_their_configuration():
    args = seal_continual.Args()
    config = lambda **changes: seal_continual.cell_config(args, Cell(**dict(model='transformer', task='ewc', seed=0) | changes))
    assert config()['task']['elastic'] > 0 and config()['moved'] == 'adapters' and config()['rates'] == list(ARMS['transformer'].rates)
    others = [config(task='lwf'), config(model='transformer, levels'), config(model='hope-attention'), config(seed=1)]
    assert all(other != config() for other in others)
    assert seal_continual.cell_config(seal_continual.Args(edits='passage'), Cell('transformer', 'ewc', 0)) != config()


def test_o_lora_is_for_adapters():
    assert seal_continual.applies(Cell('hope-linear', 'o-lora', 0)) and not seal_continual.applies(Cell('hope-linear, levels', 'o-lora', 0))
    assert seal_continual.applies(Cell('hope-linear, levels', 'ewc', 0))


def test_the_rate_nearest_to_the_target_is_reported():
    assert seal_continual.nearest({'0.002': 0.3, '0.004': 0.52, '0.008': 0.6}) == '0.004'
    assert seal_continual.nearest({'0.004': 0.6, '0.002': 0.4}) == '0.002'


@pytest.mark.parametrize(
    ('name', 'value'), [('learners', ('gpt',)), ('methods', ()), ('length', 1), ('streams', 1), ('pretraining_steps', 0), ('seeds', ())]
)
def test_bad_arguments_are_named(name, value):
    with pytest.raises(ValueError, match=f'{name} is .*allowed is'):
        seal_continual.Args(**{name: value})
