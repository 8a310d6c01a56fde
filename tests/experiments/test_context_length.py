"""Evaluation of a trained run at other lengths: the figures of the run itself at its own length, and a clear error."""

import json

import pytest

from experiments import context_length
from nested_jax.config import InSequenceConfig, ModelConfig, as_dict
from nested_jax.evaluation.rows import read_rows
from nested_jax.models.presets import preset, without


def test_a_configuration_survives_json():
    for config in (
        preset('transformer-conv-tiny'),
        without(preset('hope-tiny'), 'key'),
        preset('hope-linear-tiny', in_sequence=InSequenceConfig(blocks=(1, 3))),
    ):
        assert ModelConfig.from_dict(json.loads(json.dumps(as_dict(config)))) == config


def test_a_folder_without_a_run_exits_with_2(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        context_length.main([str(tmp_path)])
    assert stop.value.code == 2
    assert 'runs has' in capsys.readouterr().err


@pytest.mark.slow
def test_at_its_own_length_a_run_gets_its_own_figure(tmp_path):
    from experiments import hope_pretrain

    run, results = tmp_path / 'run', tmp_path / 'rows.jsonl'
    few = ['--smoke', '--model.preset', 'gated-deltanet-tiny', '--train.final-eval-tokens', '2048', '--train.output', str(run)]
    assert hope_pretrain.main(few) == 0
    assert context_length.main([str(run), '--lengths', '64', '256', '--tokens', '2048', '--results', str(results)]) == 0
    (own,), (row,) = read_rows(run / 'results.jsonl'), read_rows(results)
    assert row['metrics']['bits_per_byte']['64'] == pytest.approx(own['metrics']['heldout_bits_per_byte'], rel=1e-5)
    assert row['metrics']['bits_per_byte']['256'] != row['metrics']['bits_per_byte']['64']
    assert row['metrics']['step'] == 4
