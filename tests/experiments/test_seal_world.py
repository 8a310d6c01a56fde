"""What the experiments on the world of people do with a model."""

from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.seal_world import (
    INNER,
    LENGTH,
    Budget,
    Learner,
    Reader,
    bootstrap,
    composition,
    model_config,
    samples,
    shuffled,
    write_edits,
    write_texts,
)
from nested_jax.data.tasks.biographies import EDIT, END, PAD, World
from nested_jax.models.language_model import LanguageModel
from nested_jax.seal.buckets import Candidate
from nested_jax.seal.inner_loop import learn_all, make_inner_loop
from nested_jax.seal.lora import merge
from tests.models.small_models import random_params, shapes

WORLD = World()
MODEL = LanguageModel(model_config(WORLD))
PARAMS = random_params(MODEL, dtype=np.float32)
TEXTS = write_texts(WORLD, 3, 'train', 0)
ORACLE = [WORLD.oracle(np.random.default_rng(0), text.person) for text in TEXTS]


def test_samples_weigh_the_writers_own_tokens():
    edit = np.array([ORACLE[0] + [END] * 5])[None]
    rows = samples(TEXTS[:1], edit)
    prompt = [END, *TEXTS[0].passage, EDIT]
    assert rows.tokens[0].tolist() == (prompt + ORACLE[0] + [PAD] * LENGTH)[:LENGTH]
    learned = rows.targets[0][rows.weights[0] > 0].tolist()
    assert learned == ORACLE[0] and learned[-1] == END
    np.testing.assert_array_equal(rows.tokens[0, 1:], rows.targets[0, :-1])


def test_edits_are_written_behind_the_passage():
    edits = write_edits(MODEL, PARAMS, TEXTS, 2, 0)
    assert edits.shape == (3, 2, LENGTH - WORLD.passage_length - 2)
    for edit in edits.reshape(6, -1).tolist():
        assert END not in edit or set(edit[edit.index(END) :]) == {END}
    np.testing.assert_array_equal(edits, write_edits(MODEL, PARAMS, TEXTS, 2, 0))
    assert (edits != write_edits(MODEL, PARAMS, TEXTS, 2, 1)).any()


@pytest.mark.parametrize('learner', ['transformer', pytest.param('hope-linear', marks=pytest.mark.slow)])
def test_marks_are_those_of_a_model_updated_by_itself(learner):
    model = LanguageModel(model_config(WORLD, learner))
    params, budget, reader = random_params(model, dtype=np.float32), Budget(0.03, 12), Reader(model, WORLD)
    edits = [ORACLE[0], None, ORACLE[2]]
    marks = reader.learn_and_ask(params, TEXTS, edits, budget, [7, 8])
    assert marks.right.shape == marks.log_prob.shape == (3, 2)
    for index, text in enumerate(TEXTS):
        notes = WORLD.lines(edits[index]) if edits[index] else []
        each = Candidate(tuple((END, *line) for line in [*notes, text.passage]), *budget, seed=8)
        updated = merge(params, learn_all(make_inner_loop(model, INNER), params, [each], grid=model.config.grid)[0], INNER.lora)
        questions = jnp.array([WORLD.question(text.person, attribute) for attribute in range(4)])
        log = jax.nn.log_softmax(model.apply({'params': updated}, questions)[0][:, -1])
        answers = np.array([WORLD.answer(text.person, attribute) for attribute in range(4)])
        np.testing.assert_allclose(marks.log_prob[index, 1], log[np.arange(4), answers].mean(), rtol=2e-3)
    assert marks.log_prob[0].min() > reader.ask(params, [TEXTS[0].person]).log_prob[0, 0]
    assert 0 < min(reader.shares) <= 1


def test_shuffled_edits_keep_lengths_and_words():
    mixed = shuffled(WORLD, ORACLE[0], 0)
    assert mixed != ORACLE[0] and sorted(mixed) == sorted(ORACLE[0])
    assert [len(line) for line in WORLD.lines(mixed)] == [len(line) for line in WORLD.lines(ORACLE[0])]
    assert shuffled(WORLD, [END], 0) == [END]


def test_the_composition_of_edits():
    wrong = WORLD.note(np.random.default_rng(1), TEXTS[1].person, 'wrong') + [END]
    found = composition(WORLD, TEXTS[:2], [ORACLE[0], wrong])
    assert found.styles == {'question': 0.8, 'wrong': 0.2} and found.coverage == 0.5


def test_the_bootstrap():
    values = np.random.default_rng(0).normal(loc=0.3, size=400)
    mean, low, high = bootstrap(values)
    assert mean == pytest.approx(values.mean())
    np.testing.assert_allclose([mean - low, high - mean], 1.96 * values.std() / 20, rtol=0.1)


def test_learners_are_of_one_size():
    count = lambda learner: sum(leaf.size for leaf in jax.tree.leaves(shapes(LanguageModel(model_config(WORLD, learner)))))
    sizes = [count(learner) for learner in get_args(Learner)]
    assert max(sizes) < 1.03 * min(sizes), sizes
