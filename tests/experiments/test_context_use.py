"""Loss by position: the bins, the windows, and a run of two steps."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import context_use
from experiments.context_use import EDGES, Args, bits_by_position, heldout_windows
from experiments.text_runs import one_block
from nested_jax.evaluation.rows import read_rows
from nested_jax.models.language_model import LanguageModel


class Informed:
    """Knows nothing at first, and from position 2,048 on that the next byte is as good as always a zero."""

    config = types.SimpleNamespace(in_sequence=None)

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
    assert Args().model('transformer-window').attention.window == 256 and Args().model('transformer').attention.window is None
    assert Args().train(3).sequence_length == 1024 and Args().train(3).seed == 3


def test_what_reads_with_a_rate_learns_from_the_window(monkeypatch):
    """Zeros are learned from zeros; a model that only reads them says the same wherever it is."""
    monkeypatch.setattr(context_use, 'EDGES', (32, 64, 96, 128))
    model, windows = LanguageModel(one_block(Args(inner_rate=0.1).model('hope-linear-in-sequence'))), np.zeros((1, 129), np.int32)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))['params']
    result = types.SimpleNamespace(model=model, state=types.SimpleNamespace(params=params))
    learned = list(bits_by_position(result, windows).values())
    result.model = LanguageModel(dataclasses.replace(model.config, in_sequence=None))
    read = list(bits_by_position(result, windows).values())
    assert learned[0] == pytest.approx(read[0], rel=1e-5) and learned[-1] < read[-1] - 0.5


@pytest.mark.parametrize('arguments', [['--models', 'lstmm'], ['--windows', '0'], ['--steps', '0'], ['--inner-rate', '-1']])
def test_wrong_input_exits_with_2_and_names_it(arguments, capsys, monkeypatch):
    monkeypatch.setattr(context_use, 'open_dataset', lambda *_: pytest.fail('the text is not read before'))
    with pytest.raises(SystemExit) as stop:
        context_use.main(arguments)
    named = {'--models': 'lstmm', '--inner-rate': 'in_sequence.learning_rate is -1.0'}.get(arguments[0], arguments[0].strip('-'))
    assert stop.value.code == 2 and named in capsys.readouterr().err


def test_smoke_run_trains_and_stores_nothing(tmp_path, capsys):
    results = tmp_path / 'rows.jsonl'
    assert context_use.main(['--smoke', '--models', 'transformer', '--results', str(results), '--runs', str(tmp_path / 'runs')]) == 0
    assert 'text transformer seed 0' in capsys.readouterr().out and read_rows(results) == []
