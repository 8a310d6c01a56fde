"""Baselines and expected rewards counted by hand, and probabilities against the model's own logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import seal_policies
from experiments.seal_arc_rewards import SPLITS, Table, family_of, is_test, random_table, select
from experiments.seal_arc_world import draw_task, model_config, probabilities, read_edits, samples, write_edits
from nested_jax.data.tasks.arc import encode
from nested_jax.data.tasks.grid_rules import CONFIGURE, DONE, configurations
from nested_jax.models.language_model import LanguageModel

WORDS = configurations()


def table(indices: tuple[int, ...], votes: list[list[int]]) -> Table:
    """Of as many configurations as `votes` has columns; the share of cells is half the vote."""
    votes = np.array(votes, float)
    return Table('it', indices, np.stack([votes, votes, votes / 2], -1), np.zeros((len(indices), 3)))


def test_baselines_by_hand():
    train = table((0, 1, 2), [[0, 1, 0, 0], [0, 1, 0, 1], [1, 0, 0, 0]])
    test = table((8, 10, 11), [[0, 0, 0, 1], [1, 0, 1, 0], [0, 1, 1, 1]])
    found = {arm: values[:, 0].tolist() for arm, values in seal_policies.baselines(train, test).items()}
    assert found['no update'] == [0, 0, 0] and found['uniform'] == [0.25, 0.5, 0.75]
    assert found['best constant'] == [0, 0, 1]
    assert found['best constant of a family'] == [0, 1, 1], 'family 2 has its own, family 3 has no training task'
    assert found['best of each task'] == [1, 1, 1]


def test_of_equal_rewards_the_share_of_cells_decides():
    assert seal_policies.best(np.array([[1, 0, 0.1], [1, 0, 0.3], [0, 0, 0.9]])) == 1


def test_expected_rewards_give_nothing_for_what_is_missing_to_one():
    measures = table((0,), [[1, 0, 1, 1]]).measures
    np.testing.assert_allclose(seal_policies.expected(np.array([[0.25, 0.25, 0.125, 0]]), measures), [[0.375, 0.375, 0.1875]])


def test_self_edits_that_cannot_be_read_earn_nothing():
    written = np.array([[WORDS[0], WORDS[511], [*WORDS[0][:-1], WORDS[0][0]], [DONE] * 8, [*WORDS[0][6::-1], DONE]]])
    votes = np.ones((1, 512))
    found = seal_policies.look_up(table((0,), votes.tolist()), written)
    assert found[0, :, 0].tolist() == [1, 1, 0, 0, 0]
    assert read_edits(written[0]) == [0, 511, None, None, None], 'the last says all of it in another order'


def test_halves_share_no_task_and_have_all_families():
    whole = random_table(32)
    for families in SPLITS.values():
        train, test = (select(whole, families, test=half) for half in (False, True))
        assert not set(train.indices) & set(test.indices) and not any(map(is_test, train.indices))
        assert {family_of(index) for index in train.indices} == {family_of(index) for index in test.indices} == set(families)
        np.testing.assert_array_equal(test.measures[0], whole.measures[test.indices[0]])


@pytest.fixture(scope='module')
def policy():
    model = LanguageModel(model_config())
    return model, model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))['params']


def test_probabilities_are_those_of_the_models_logits(policy):
    model, params = policy
    task = draw_task(0, family_of(0))
    found = probabilities(model, params, [task])[0]
    shown = [*encode(task.train), CONFIGURE]
    logits = model.apply({'params': params}, jnp.array([[*shown, *WORDS[place]] for place in (0, 100, 511)]))[0]
    log = jax.nn.log_softmax(logits)[:, len(shown) - 1 : -1]
    said = jnp.array([WORDS[place] for place in (0, 100, 511)])
    wanted = jnp.exp(jnp.take_along_axis(log, said[..., None], -1).sum((1, 2)))
    np.testing.assert_allclose(found[[0, 100, 511]], wanted, rtol=1e-4)
    assert len(set(wanted.tolist())) == 3 and found.shape == (512,) and 0 < found.sum() < 1


def test_what_is_written_is_what_the_update_reads(policy):
    tasks = [draw_task(index, family_of(index)) for index in (0, 7)]
    edits = write_edits(*policy, tasks, 2, 0).copy()
    edits[0, 0] = [*WORDS[5][:3], *[DONE] * 5]
    found = samples(tasks, edits)
    learned = [row[weight > 0].tolist() for row, weight in zip(found.targets, found.weights, strict=True)]
    assert learned[0] == [*WORDS[5][:3], DONE]
    assert learned[3][:3] == edits[1, 1, :3].tolist()
    prompt = [*encode(tasks[1].train), CONFIGURE]
    assert found.tokens[3, : len(prompt)].tolist() == prompt
