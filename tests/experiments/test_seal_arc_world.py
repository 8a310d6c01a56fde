"""Updates by configuration on tasks of grids: what is learned from, marks by hand, and answers that do not depend on company."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import seal_arc_world as world
from experiments.seal_arc_rewards import all_edits, family_of
from nested_jax.data.tasks.arc import NEXT, Pair, Task, answer, encode
from nested_jax.models.language_model import LanguageModel
from nested_jax.seal.voting import IDENTITY

SQUARE, OTHER = ((1, 2), (3, 4)), ((1, 2), (3, 5))
TASK = Task('made', (Pair(SQUARE, OTHER), Pair(OTHER, SQUARE), Pair(SQUARE, SQUARE)), (Pair(OTHER, SQUARE),))


def test_candidates_follow_their_configurations():
    edits = all_edits()
    found = world.candidates(TASK, [edits[0], edits[16], edits[511], edits[3]], 5)
    assert found[0].prompt_lengths is None and found[0].sequences == found[1].sequences == found[3].sequences
    assert found[1].prompt_lengths == tuple(len(row) - 7 for row in found[1].sequences), 'four cells, two ends of rows and NEXT are learned'
    assert (found[0].steps, found[3].steps, found[0].learning_rate, found[2].learning_rate) == (1, 8, 1e-4, 3e-3)
    assert found[2].sequences != found[0].sequences and all(len(one.sequences) <= world.ROWS for one in found)


def test_all_tasks_fit_into_the_shapes():
    for index in range(8):
        task = world.draw_task(index, family_of(index))
        laid = world._buckets(world.candidates(task, all_edits()[::37], index))
        assert {batch.tokens.shape[1:] for _, batch in laid} <= set(world.SHAPES)
        assert max(len(question.prompt) for question in world.questions(task)) <= world.PROMPT
        assert len(encode(task.train)) + 1 <= world.POLICY_PROMPT
        assert len(encode(task.test)) - answer(task.test) <= world.ANSWER


def test_marks_by_hand():
    asked = world.questions(TASK)
    views = {question.view: question for question in asked}
    assert len(asked) == 7 and asked[0].view == asked[1].view == IDENTITY

    def said(grids: list) -> np.ndarray:
        tokens = np.full((len(grids), world.ANSWER), NEXT)
        for row, grid in enumerate(grids):
            cells = encode([Pair(grid, grid)])[1:]
            count = len(cells) // 2 - 1  # the second half ends with NEXT, the first with ARROW
            tokens[row, :count] = cells[:count]
        return tokens

    assert views['transpose'].invert(((1, 3), (2, 4))) == SQUARE
    back = [next(view for view in world.views() if view.name == question.view).apply(SQUARE) for question in asked[2:]]
    assert world._marks(TASK, said([SQUARE, SQUARE, *back])) == (1.0, 1.0, 1.0)
    assert world._marks(TASK, said([OTHER, OTHER, *back])) == (1.0, 0.0, 0.75)
    assert world._marks(TASK, said([((1, 2),)] * 7)) == (0.0, 0.0, 0.0)


@pytest.mark.slow
def test_rewards_are_those_of_each_configuration_alone(monkeypatch):
    monkeypatch.setattr(world, 'TOGETHER', 4)
    monkeypatch.setattr(world, 'ASKED', 4)
    # A model that was not trained answers no grids: in place of marks, a sum that tells answers apart.
    monkeypatch.setattr(world, '_marks', lambda task, tokens: (float(tokens.ravel() @ np.arange(tokens.size)),) * 3)
    model = LanguageModel(world.model_config())
    params = model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))['params']
    solver, edits = world.Solver(model), [all_edits()[place] for place in (3, 511, 12, 255, 15, 31)]
    found = solver.rewards(params, TASK, edits, 0)
    assert found.shape == (6, 3) and len(set(found[:, 0])) > 2
    # A batch of another order holds each configuration in another place.
    np.testing.assert_array_equal(found[::-1], solver.rewards(params, TASK, edits[::-1], 0))
    assert solver.base(params, TASK).shape == (3,)
