"""The grid of MAD: its metrics against cases counted by hand, the auto-encoder's bottleneck, and a run of a few steps."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import mad
from experiments.mad import TASKS, Args, AutoEncoder, evaluate, micro_macro, model, right_positions, sinusoids
from nested_jax.config import LevelConfig


def test_micro_and_macro_of_known_mistakes():
    """Class 0: 3 of 4 right, class 1: 0 of 1, class 3: never due, given once, 0; class 2 is absent. Behind the weights nothing counts."""
    batch = dict(targets=np.array([[0, 0, 0], [0, 1, 2]]), weights=np.array([[1, 1, 1], [1, 1, 0]], np.float32))
    predictions = np.array([[0, 0, 0], [3, 0, 5]])
    assert micro_macro(predictions, batch) == dict(micro=3 / 5, macro=(3 / 4 + 0 + 0) / 3)
    assert right_positions(predictions, batch) == np.float32(3 / 5)
    assert micro_macro(batch['targets'], batch) == dict(micro=1.0, macro=1.0)


def test_a_leak_outside_the_alphabet_costs_macro_accuracy_more_than_micro():
    """Seven of eight values right, the eighth's place taken by seven others: 87.5 % micro, 7 / 15 macro."""
    targets = np.repeat(np.arange(8), 7)[None]
    predictions = np.where(targets == 7, np.arange(56)[None] - 49 + 8, targets)
    found = micro_macro(predictions, dict(targets=targets, weights=np.ones_like(targets, float)))
    assert found == dict(micro=7 / 8, macro=7 / 15)


@pytest.mark.parametrize('task', TASKS)
def test_the_solver_is_right_and_the_most_frequent_answer_is_scored_beside(task):
    solve = lambda tokens: np.stack([TASKS[task].solve(row)[0] for row in tokens])
    found = evaluate(solve, TASKS[task], 0, 100)
    assert found['test'] == dict(micro=1.0, macro=1.0)
    assert found['majority']['micro'] < 0.2 and found['majority']['macro'] <= found['majority']['micro'] + 0.02
    answers = {'compression': 32, 'memorization': 16, 'in-context-recall': 56, 'selective-copying': 16}
    assert abs(found['answers'] / 100 - answers.get(task, found['answers'] / 100)) < 2


def test_the_auto_encoder_sees_its_input_through_the_last_position_only():
    """What it answers anywhere depends on all tokens; the language model's earlier rows are cut off."""
    config = dataclasses.replace(model('transformer', 'compression'), num_layers=1, width=16, head_dim=4, levels=(LevelConfig(8, 1),))
    auto, tokens = AutoEncoder(config), jnp.arange(12, dtype=jnp.int32).reshape(2, 6)
    params = jax.jit(auto.init)(jax.random.key(0), tokens)['params']
    assert 'head' not in params['encoder'] and params['head'].shape == (16, 16)
    answer = jax.jit(lambda tokens: auto.apply({'params': params}, tokens)[0])
    logits, moved = answer(tokens), answer(tokens.at[0, 2].set(15))
    assert logits.shape == (2, 6, 16) and (jnp.abs(moved - logits)[0].max(-1) > 1e-4).all()
    last = jax.jit(lambda tokens: auto.apply({'params': params}, tokens, method=lambda module, t: module.encoder.hidden(t)[0][:, -1]))
    decode = jax.jit(lambda last: auto.apply({'params': params}, last, method=_decode))
    np.testing.assert_allclose(decode(last(tokens)), logits, atol=1e-5)


def _decode(module: AutoEncoder, last: jax.Array) -> jax.Array:
    rows = last[:, None] + sinusoids(6, 16)[None]
    for norm, layer in zip(module.norms[:2], module.layers, strict=True):
        rows = jax.nn.gelu(layer(norm(rows)))
    return module.norms[2](rows) @ module.head_kernel


def test_sinusoids():
    table = np.asarray(sinusoids(5, 8))
    np.testing.assert_allclose(table[:, 0], np.sin(np.arange(5)), atol=1e-6)
    np.testing.assert_allclose(table[:, 3], np.sin(np.arange(5) / 10_000), atol=1e-6)
    np.testing.assert_allclose(table[:, 5], np.cos(np.arange(5) / 10_000 ** (1 / 3)), atol=1e-6)


def test_settings_of_tasks():
    args = Args()
    assert args.of('memorization').train_examples == 256 and args.of('compression').train_examples == 12_800
    assert model('hope-linear', 'memorization').vocab_size == 256 and model('transformer', 'selective-copying').max_length == 256
    assert not model('transformer', 'memorization').tie_embeddings


@pytest.mark.parametrize('arguments', [['--tasks', 'copying'], ['--models', 'rwkv8'], ['--warmup-steps', '600'], ['--train-examples', '0']])
def test_wrong_input_exits_with_2_and_names_it(arguments, capsys, monkeypatch):
    monkeypatch.setattr(mad, 'run_grid', lambda *_, **__: pytest.fail('no device work before'))
    with pytest.raises(SystemExit) as stop:
        mad.main(arguments)
    assert stop.value.code == 2
    said = capsys.readouterr().err.replace('-', '_')
    assert (arguments[1] if arguments[0] == '--models' else arguments[0].strip('-').replace('-', '_')) in said


def test_smoke_run_trains_tests_and_stores_nothing(tmp_path, capsys):
    results = tmp_path / 'rows.jsonl'
    assert mad.main(['--smoke', '--models', 'transformer', '--results', str(results)]) == 0
    said = capsys.readouterr().out
    assert 'compression transformer seed 0' in said and 'majority' in said and 'nan' not in said and not results.exists()
