"""The probes of SEAL: a smoke run, what they are made of, and bad input."""

import numpy as np
import pytest

from experiments import seal_probes
from experiments.grid import Cell
from experiments.seal_world import Text
from nested_jax.data.tasks.biographies import World

WORLD, RNG = World(), np.random.default_rng(0)
PERSON = WORLD.person(RNG, 'test')
TEXT = Text(PERSON, WORLD.passage(RNG, PERSON))


PROBES = {
    'test-time': 'prompt, trained on its passage', 'meta': 'meta-learned', 'stacking': 'stacked, one period',
    'prompts': 'implications-chain-of-thought', 'rubric': 'rubric', 'halving': 'all starts',
}  # fmt: skip
# The first is the one that --smoke alone runs.
SMOKES = [pytest.param(*each, marks=pytest.mark.exhaustive if index else pytest.mark.slow) for index, each in enumerate(PROBES.items())]


@pytest.mark.parametrize(('probe', 'arm'), SMOKES)
def test_a_smoke_run_answers_and_stores_no_row(probe, arm, tmp_path, capsys):
    chosen = () if probe == 'test-time' else ('--probes', probe)
    assert seal_probes.main(['--smoke', *chosen, '--runs', str(tmp_path / 'runs'), '--results', str(tmp_path / 'rows.jsonl')]) == 0
    assert arm in capsys.readouterr().out
    assert not (tmp_path / 'rows.jsonl').exists() and list(tmp_path.rglob('pretrained.stage'))


def test_probes_differ_in_their_configuration_alone():
    args = seal_probes.Args()
    configs = [seal_probes.cell_config(args, Cell('transformer', name, 0)) for name in seal_probes.PROBES]
    assert len({str(config) for config in configs}) == len(seal_probes.PROBES) == len(args.probes)
    assert seal_probes.cell_config(args, Cell('transformer', 'meta', 1)) != configs[1]


def test_only_answers_count_in_a_query():
    support, query = seal_probes._support_and_query(WORLD, [TEXT] * 4, 3)
    answers = {WORLD.answer(PERSON, kind) for kind in range(WORLD.attributes)}
    assert set(query.targets[query.weights > 0].tolist()) == answers and query.weights.sum() == 4 * WORLD.attributes
    assert support.weights.sum() == 4 * len(TEXT.passage) and set(support.steps.tolist()) == {3}


def test_the_rubric_reads_notes_and_differences_are_paired():
    oracle, wrong = WORLD.oracle(RNG, PERSON), [token for _ in range(4) for token in WORLD.note(RNG, PERSON, 'off-topic')]
    told, other = (seal_probes.mark(WORLD, TEXT, edit) for edit in (oracle, wrong))
    assert told.total > other.total and told.correctness > other.correctness == 1 and told.quality == 5
    assert seal_probes._tell_notes(WORLD, [TEXT] * 2, [oracle, wrong]) == dict(count=4.0, true=0.5)
    right = RNG.uniform(size=40)
    assert seal_probes.compare({'one': right + 0.25, 'other': right}, 'other')['one']['above_control'] == pytest.approx((0.25,) * 3)


def test_rank_correlation_is_within_passages():
    marks, rewards = np.array([[1.0, 2, 3], [3, 2, 1], [0, 1, 2]]), np.array([[10.0, 20, 30], [3, 2, 1], [5, 5, 5]])
    found = seal_probes._within(marks, rewards)
    assert found['passages'] == 2 and found['mean'] == pytest.approx((1, 1, 1))
    assert seal_probes._within(marks[2:], rewards[2:]) is None


def test_halving_picks_among_those_that_the_first_start_keeps(monkeypatch):
    """By hand: the first start keeps the last two of four, of which all three prefer the third; of all four they prefer the first."""
    right = np.array([[[0.2, 0.9, 0.9, 0.7], [0.0, 0, 0, 0.1], [0.3, 0.5, 0.5, 0.4], [0.5, 0.1, 0.1, 0.2]]] * 2)
    monkeypatch.setattr(seal_probes, '_written', lambda *_: ([TEXT] * 2, np.zeros((2, 4, 5), int)))
    monkeypatch.setattr(seal_probes, '_rewards', lambda *_: [right, -right])
    found = seal_probes.halve(None)
    assert found['updates_of_a_passage'] == {'random': 0, 'one start': 4, 'halving': 8, 'all starts': 12}
    for told in found['budgets'].values():
        means = {arm: values['right'][0] for arm, values in told['picked'].items()}
        assert means == pytest.approx({'random': 0.35, 'one start': 0.2, 'halving': 0.4, 'all starts': 0.7})
        assert told['picked']['halving']['above_control'] == pytest.approx((-0.3,) * 3)


def test_of_equal_marks_the_ties_decide_or_the_first_has_it():
    earned, marks = np.array([[1.0, 2, 3]]), np.array([[0.5, 0.5, 0.25]])
    assert seal_probes._picked(earned, marks) == 1 and seal_probes._picked(earned, marks, np.array([[0.0, 1, 2]])) == 2


@pytest.mark.parametrize(
    ('name', 'value'),
    [('probes', ()), ('tests', 1), ('contexts', 1), ('each', 1), ('meta_steps', 0), ('stream_steps', 6), ('pretraining_steps', 1)],
)
def test_bad_arguments_are_named(name, value):
    with pytest.raises(ValueError, match=f'{name} is .*allowed is'):
        seal_probes.Args(**{name: value})
