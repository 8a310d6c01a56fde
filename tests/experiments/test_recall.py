"""The recall experiment: its sequences, its scores, and a run of a few steps."""

import dataclasses

import jax
import numpy as np
import pytest

from experiments import recall


def draw(seed: int, count: int, *sizes: int) -> dict[str, np.ndarray]:
    return jax.device_get(recall.draw_sequences(jax.random.key(seed), count, *sizes))


def test_every_key_is_told_once_and_asked_for_once_later():
    sequences = draw(0, 300, 64, 4, 16)
    found = set()
    for tokens, targets, weights in zip(*(sequences[name] for name in ('tokens', 'targets', 'weights')), strict=True):
        asked = np.flatnonzero(weights)
        pairs = len(asked)
        found.add(pairs)
        keys, values = tokens[0 : 2 * pairs : 2], tokens[1 : 2 * pairs : 2]
        assert len(set(keys)) == pairs and (keys > 0).all() and (keys < 128).all() and (values >= 128).all()
        told = dict(zip(keys, values, strict=True))
        assert asked.min() >= 2 * pairs and sorted(tokens[asked]) == sorted(keys)
        assert all(targets[place] == told[tokens[place]] for place in asked)
        rest = np.delete(tokens, np.concatenate([np.arange(2 * pairs), asked]))
        assert (rest == 0).all() and (np.delete(targets, asked) == 0).all()
    assert found == set(range(4, 17))


def test_keys_are_mostly_asked_for_soon():
    asked = np.flatnonzero(draw(1, 2000, 64, 4)['weights'].sum(0))
    first, last = (draw(1, 2000, 64, 4)['weights'][:, part].sum() for part in (slice(8, 16), slice(56, 64)))
    assert asked.min() == 8 and first > 4 * last > 0


def test_evaluation_counts_asked_positions_only():
    told = lambda tokens: np.stack([_answers(row) for row in tokens])
    assert set(recall.evaluate(told, 0, 5).values()) == {1.0}
    assert all(share < 0.05 for share in recall.evaluate(lambda tokens: np.full_like(tokens, 130), 0, 50).values())


def _answers(tokens: np.ndarray) -> np.ndarray:
    values = {}
    for place in range(0, len(tokens) - 1, 2):
        if tokens[place + 1] < 128:
            break
        values[tokens[place]] = tokens[place + 1]
    return np.array([values.get(token, 0) for token in tokens])


def test_arms_differ_in_the_token_mixer_only():
    configs = [dataclasses.asdict(recall.model_config(arm)) for arm in recall.ARMS]
    for config in configs:
        for name in ('mixer', 'memory', 'attention'):
            config.pop(name)
    assert all(config == configs[0] for config in configs)


@pytest.mark.parametrize('arguments', [['--eval-sequences', '0'], ['--arms', 'lstm']])
def test_wrong_input_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        recall.main(arguments)
    assert stop.value.code == 2 and arguments[0].strip('-').replace('-', '_') in capsys.readouterr().err.replace('-', '_')


def test_smoke_run_trains_and_tests(tmp_path, capsys):
    assert recall.main(['--smoke', '--arms', 'transformer', '--results', str(tmp_path / 'rows.jsonl')]) == 0
    said = capsys.readouterr().out
    assert 'transformer' in said and '256:64' in said and 'nan' not in said and not (tmp_path / 'rows.jsonl').exists()
