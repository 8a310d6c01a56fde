"""The parity experiment: its strings, its scores, its arms, and a run of a few steps."""

import dataclasses

import jax
import numpy as np
import pytest

from experiments import parity
from nested_jax.evaluation.rows import read_rows


def draw(seed: int, count: int, index: int) -> dict[str, np.ndarray]:
    return jax.device_get(parity.draw_strings(jax.random.key(seed), count, *parity.BINS[index]))


@pytest.mark.parametrize('index', range(len(parity.BINS)))
def test_strings_have_their_bin_s_lengths_and_the_parities_of_their_prefixes(index):
    strings, (shortest, longest) = draw(0, 1000, index), parity.BINS[index]
    lengths = strings['weights'].sum(1).astype(int)
    assert set(lengths) == set(range(shortest, longest + 1))
    for bits, parities, inside, length in zip(strings['tokens'], strings['targets'], strings['weights'], lengths, strict=True):
        assert inside[:length].all() and not inside[length:].any()
        odd = 0
        for bit, said in zip(bits, parities, strict=True):
            odd ^= int(bit)
            assert said == odd
    assert abs(strings['tokens'].mean() - 0.5) < 0.02


def test_strings_follow_their_key():
    first, again, other = draw(1, 8, 0), draw(1, 8, 0), draw(2, 8, 0)
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not np.array_equal(first['tokens'], other['tokens'])


def test_bins_are_disjoint_and_training_draws_from_the_first():
    lengths = [set(range(shortest, longest + 1)) for shortest, longest in parity.BINS]
    assert lengths[0] == set(range(2, 51)) and lengths[1] == set(range(51, 101))
    assert sum(map(len, lengths)) == len(set.union(*lengths))
    assert parity.Args().train.sequence_length == max(lengths[0])


def test_score_of_known_mistakes():
    targets, inside = np.zeros((4, 3), int), np.array([[1, 1, 1], [1, 1, 1], [1, 1, 0], [1, 1, 0]])
    predictions = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]])  # right; first wrong; last wrong; wrong only behind the string
    assert parity.score(predictions, targets, inside) == dict(every=0.5, last=0.75, positions=0.8)


@pytest.mark.parametrize('index', range(len(parity.BINS)))
def test_chance_level(index):
    """A constant answer is right at half of the positions and for hardly a string: a string of length n has all its bits zero in 2^-n."""
    result = parity.evaluate(lambda tokens: np.zeros_like(tokens), 0, 2000, index)
    assert abs(result['positions'] - 0.5) < 0.03 and abs(result['last'] - 0.5) < 0.05
    assert result['every'] < 0.02 if index == 0 else result['every'] == 0
    assert parity.evaluate(lambda tokens: np.cumsum(tokens, 1) % 2, 0, 20, index) == dict(every=1.0, last=1.0, positions=1.0, distinct=20)


def test_arms_differ_in_the_memory_s_update_only():
    configs = {arm: dataclasses.asdict(parity.model_config(arm)) for arm in parity.ARMS}
    assert {arm: configs.pop(arm)['mixer'] for arm in ('gated-deltanet', 'transformer')} == {
        'gated-deltanet': 'gated-delta-rule', 'transformer': 'attention'
    }  # fmt: skip
    changed = {name for config in configs.values() for name in config['memory'] if config['memory'][name] != configs['dgd']['memory'][name]}
    assert changed == {'dgd', 'positive_eigenvalues', 'self_modified'}
    for config in configs.values():
        config.pop('memory')
    assert all(config == configs['dgd'] for config in configs.values())


@pytest.mark.parametrize(
    'arguments',
    [['--steps', '0'], ['--steps', '5', '--warmup-steps', '5'], ['--learning-rate', '-1'], ['--arms', 'adam'], ['--seeds', '-1']],
)
def test_wrong_input_exits_with_2_and_names_the_argument(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        parity.main(arguments)
    assert stop.value.code == 2
    assert arguments[-2].strip('-').replace('-', '_') in capsys.readouterr().err.replace('-', '_')


def test_smoke_run_trains_tests_and_stores_nothing(tmp_path, capsys):
    assert parity.main(['--smoke', '--arms', 'dgd', '--results', str(tmp_path / 'rows.jsonl')]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith('dgd')]
    assert '51-100' in line and 'nan' not in line
    assert not (tmp_path / 'rows.jsonl').exists()


def test_a_run_stores_one_row_for_each_arm_and_seed(tmp_path, monkeypatch):
    monkeypatch.setattr(parity, 'fit_one', lambda fit, seed: ({}, 0.5))
    monkeypatch.setattr(parity, 'evaluate', lambda predict, seed, count, index: dict(every=1.0, last=1.0, positions=1.0, distinct=count))
    assert parity.main(['--arms', 'dgd', 'plain', '--seeds', '3', '4', '--results', str(tmp_path / 'rows.jsonl')]) == 0
    rows = read_rows(tmp_path / 'rows.jsonl')
    assert [(row['model'], row['seed']) for row in rows] == [('dgd', 3), ('dgd', 4), ('plain', 3), ('plain', 4)]
    assert len({row['config_digest'] for row in rows}) == 4
    assert rows[0]['metrics']['bin1']['every'] == 1.0 and rows[0]['config']['model']['memory']['dgd'] == 'per_layer'


@pytest.mark.slow
def test_delta_gradient_descent_learns_parity_and_holds_it_at_twice_the_length(tmp_path):
    results = tmp_path / 'rows.jsonl'
    assert parity.main(['--arms', 'dgd', '--seeds', '0', '--results', str(results)]) == 0
    (row,) = read_rows(results)
    assert row['metrics']['bin0']['every'] == 1.0 and row['metrics']['bin1']['every'] > 0.98
