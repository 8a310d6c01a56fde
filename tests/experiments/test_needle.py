"""The grid of needles: reading in pieces, scoring against known mistakes, rows that are trained on, and a run of a few steps."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import haystack_runs, needle
from experiments.grid import Cell
from experiments.haystack_runs import ROWS, answer_depth, count_right, measure_length, phases, pieces, reader, schedule, trivial
from experiments.needle import Args
from nested_jax.config import LevelConfig
from nested_jax.data.tasks.haystack import Plan
from nested_jax.data.tasks.needles import Needles
from nested_jax.models.language_model import LanguageModel
from nested_jax.training.state import TrainState

SINGLE = lambda length: Needles(length=length)


def test_scores_of_known_mistakes(monkeypatch):
    """A text with one wrong byte in its answer of nine is wrong; what is wrong before the answer does not count."""
    task = SINGLE(700)
    answers = task.batch(0, 2 * ROWS, split='test', seed=3)['targets']
    for text, place in ((3, -1), (9, -9), (9, -8), (12, -10), (12, 0)):
        answers[text, place] += 1
    first = itertools.count(0, ROWS)

    def read(params: None, tokens: np.ndarray, state) -> tuple[np.ndarray, tuple[int, int]]:
        """What stands in `answers` behind each of the tokens; the state is made of the group and of the tokens read."""
        group, done = state if isinstance(state, tuple) else (next(first), 0)
        return answers[group : group + ROWS, done : done + tokens.shape[1]], (group, done + tokens.shape[1])

    monkeypatch.setattr(haystack_runs, 'reader', lambda config: read)
    monkeypatch.setattr(LanguageModel, 'init_state', lambda model, count: count)
    found = measure_length(Args().model('transformer'), None, task, split='test', seed=3, count=2 * ROWS)
    assert found['whole'] == 14 / 16 and found['positions'] == 1 - 3 / (16 * 9)
    depths = [task.deal(index, 'test', 3)[1].inserts[0][0] for index in range(16)]
    thirds = [{index for index in range(16) if min(int(3 * depths[index]), 2) == third} for third in range(3)]
    assert found['thirds'] == [[len(texts - {3, 9}), len(texts)] for texts in thirds] and all(thirds)


def test_depth_is_that_of_the_one_sentence_with_the_answer():
    plan = lambda *facts: Plan(b'', tuple(zip((0.1, 0.5, 0.9), facts, strict=True)), b'', b' here.')
    assert answer_depth(plan(b'a', b'It is here.', b'b')) == 0.5
    assert answer_depth(plan(b'here', b'It is here.', b'b')) is None and answer_depth(plan(b'a', b'b', b'c')) is None


@pytest.mark.parametrize(('name', 'size'), [('hope-linear', 180), ('transformer-window-8', 150)])
def test_reading_in_pieces_is_reading_as_a_whole(name, size):
    task = SINGLE(360)
    config = Args(models=(name,)).model(name)
    config = dataclasses.replace(config, num_layers=1, width=16, head_dim=8, levels=(LevelConfig(8, 1),), max_length=360)
    model, batch = LanguageModel(config), task.batch(0, 2, split='test')
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))['params']
    whole = np.asarray(jax.jit(lambda params, tokens: model.apply({'params': params}, tokens)[0].argmax(-1))(params, batch['tokens']))
    read, guesses = reader.__wrapped__(config), []

    def remember(params, tokens, state):
        guessed, state = read(params, tokens, state)
        guesses.append(guessed)
        return guessed, state

    right, places = count_right(remember, params, model.init_state(2), pieces(task, range(2), size, split='test', seed=0))
    assert [guess.shape[1] for guess in guesses] == ([150, 150, 60] if size == 150 else [180, 180]) and (places == 9).all()
    np.testing.assert_array_equal(np.concatenate(guesses, 1), whole)
    due = batch['weights'] > 0
    np.testing.assert_array_equal(right, (due & (whole == batch['targets'])).sum(1))


def test_schedule():
    """Three stages: the shortest texts, then two lengths by turns, then three."""
    assert schedule(450, (64, 128, 256)) == [
        *[(50, 64), (100, 64), (150, 64)], *[(200, 64), (250, 128), (300, 64)], *[(350, 256), (400, 128), (450, 64)]
    ]  # fmt: skip
    assert schedule(70, (64,)) == [(50, 64), (70, 64)]


def test_phases_have_texts_of_their_own_until_there_are_no_more(monkeypatch):
    monkeypatch.setattr(haystack_runs, 'PHASE', 3)
    texts = lambda length: Needles(length=length, brief=True)
    args = Args(steps=9, batch_size=2, warmup_steps=1, train_examples=20, elsewhere=0.25)
    found = phases(args, texts, (64, 128), (3, 4))
    expected = [(3, 64, range(12)), (6, 64, [*range(12, 20), *range(4)]), (9, 128, range(20, 26))]
    for phase, (end, length, indices) in zip(found, expected, strict=True):
        assert phase.end == end and phase.data['first'].tolist() == [end - 3] * 2
        rows = [texts(length).example(index, seed=4) for index in indices]
        for name in ('tokens', 'targets', 'weights'):
            whole = np.stack([row[name] for row in rows]).reshape(3, 256 // length, length)
            np.testing.assert_array_equal(phase.data[name][1], np.maximum(whole, 0.25) if name == 'weights' else whole)
        state = TrainState(jnp.asarray(end - 2), None, None, None)
        batch = haystack_runs._batch(jax.tree.map(lambda leaf: leaf[0], phase.data), state)
        assert batch['tokens'].dtype == batch['targets'].dtype == jnp.int32
        np.testing.assert_array_equal(batch['tokens'], phase.data['tokens'][0, 1])


def test_questions_are_the_same_at_all_lengths():
    plans = [SINGLE(length).deal(5, 'test', 1)[1] for length in (512, 16_384)]
    assert plans[0] == plans[1]


def test_trivial_rules():
    single, several = (trivial(Needles(length=700, kind=kind), 0, 80) for kind in ('single_1', 'multikey_1'))
    assert single == {'most frequent answer': 0, 'last mention': 1}
    assert several['most frequent answer'] == 0 and abs(several['last mention'] - 1 / 4) < 0.15


def test_lengths_too_short_for_a_kind_are_left_out():
    args = Args()
    config = args.row(Cell('transformer', 'multikey_1', 0))['train']
    assert config['train_lengths'] == (128, 256, 512, 1024) and config['test_lengths'] == args.test_lengths
    assert args.row(Cell('transformer', 'single_1', 0))['train']['train_lengths'] == args.train_lengths


def test_windows_are_variants():
    args = Args()
    assert args.model('transformer-window-256').attention.window == 256 and args.model('transformer').max_length == 16_384


@pytest.mark.parametrize(
    'arguments',
    [
        ['--tasks', 'single_4'],
        ['--models', 'gated-deltanet-window-8'],
        ['--train-lengths', '1024', '512'],
        ['--train-lengths', '30'],
        ['--test-lengths', '40'],
        ['--test-examples', '12'],
        ['--elsewhere', '2'],
    ],
)
def test_wrong_input_exits_with_2_and_names_it(arguments, capsys, monkeypatch):
    monkeypatch.setattr(haystack_runs, 'run_grid', lambda *_, **__: pytest.fail('no device work before'))
    with pytest.raises(SystemExit) as stop:
        needle.main(arguments)
    assert stop.value.code == 2
    said = capsys.readouterr().err.replace('-', '_')
    assert (arguments[1] if arguments[0] == '--models' else arguments[0].strip('-')).replace('-', '_') in said


def test_smoke_run_trains_tests_and_stores_nothing(tmp_path, capsys):
    results = tmp_path / 'rows.jsonl'
    words = ['--smoke', '--models', 'transformer', '--tasks', 'single_1', '--train-lengths', '512', '--results', str(results)]
    assert needle.main(words) == 0
    said = capsys.readouterr().out
    assert 'single_1 transformer seed 0' in said and 'last mention 100.0' in said and 'nan' not in said and not results.exists()
