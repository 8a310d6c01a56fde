"""Loss by position: the bins, the windows, and a run of two steps."""

import types

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import context_use
from experiments.context_use import EDGES, Args, bits_by_position, heldout_windows, model_config
from nested_jax.evaluation.rows import read_rows


class Informed:
    """Knows nothing at first, and from position 2,048 on that the next byte is as good as always a zero."""

    def apply(self, variables, tokens):
        sure = (jnp.arange(tokens.shape[1]) >= 2048)[:, None] & (jnp.arange(256) == 0)[None]
        return jnp.where(sure, 100.0, 0.0)[None], None


def test_bits_of_each_bin_of_positions():
    result = types.SimpleNamespace(model=Informed(), state=types.SimpleNamespace(params={}))
    bits = bits_by_position(result, np.zeros((2, EDGES[-1] + 1), np.int32))
    assert list(bits) == ['0-31', '32-63', '64-127', '128-255', '256-511', '512-1023', '1024-2047', '2048-4095']
    assert list(bits.values())[:-1] == pytest.approx([8.0] * 7) and bits['2048-4095'] == pytest.approx(0, abs=1e-6)


def test_windows_begin_files_that_are_long_enough():
    lengths = np.array([10, 5000, 4097, 4096, 9000])
    read = lambda index, start, stop: np.full(stop - start, index)
    data = types.SimpleNamespace(heldout=types.SimpleNamespace(lengths=lengths, read=read))
    windows = heldout_windows(data, 10)
    assert windows.shape == (3, 4097) and windows[:, 0].tolist() == [1, 2, 4]
    assert len(heldout_windows(data, 2)) == 2


def test_only_the_windowed_transformer_has_a_window():
    assert model_config('transformer-window').attention.window == 256 and model_config('transformer').attention.window is None
    assert Args().train(3).sequence_length == 1024 and Args().train(3).seed == 3


@pytest.mark.parametrize('arguments', [['--models', 'lstmm'], ['--windows', '0'], ['--steps', '0']])
def test_wrong_input_exits_with_2_and_names_it(arguments, capsys, monkeypatch):
    monkeypatch.setattr(context_use, 'open_dataset', lambda *_: pytest.fail('the text is not read before'))
    with pytest.raises(SystemExit) as stop:
        context_use.main(arguments)
    assert stop.value.code == 2 and (arguments[1] if arguments[0] == '--models' else arguments[0].strip('-')) in capsys.readouterr().err


def test_smoke_run_trains_and_stores_nothing(tmp_path, capsys):
    results = tmp_path / 'rows.jsonl'
    assert context_use.main(['--smoke', '--models', 'transformer', '--results', str(results), '--runs', str(tmp_path / 'runs')]) == 0
    assert 'text transformer seed 0' in capsys.readouterr().out and read_rows(results) == []
