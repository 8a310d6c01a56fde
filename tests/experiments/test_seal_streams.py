"""Streams of edits about made-up people: their rows, what is asked after each, and the metrics."""

import dataclasses

import jax
import numpy as np
import pytest

from experiments.seal_streams import (
    ARMS,
    GRID,
    OWN,
    ROW,
    Answers,
    Player,
    arm_config,
    lay_out,
    make_part,
    stream_metrics,
    stream_texts,
    update_flops,
    update_steps,
)
from nested_jax.data.tasks.biographies import END, World
from nested_jax.models.language_model import LanguageModel
from nested_jax.seal.continual import METHODS, Stream, make_stream
from tests.models.small_models import random_params, shapes

WORLD = World()
CONFIG = arm_config(WORLD, 'transformer')
TEXTS = stream_texts(WORLD, 2, 3, 'test', 0)
ORACLE = [[WORLD.oracle(np.random.default_rng(0), text.person) for text in told] for told in TEXTS]


def test_names_of_a_stream_differ_and_are_of_the_split():
    told = stream_texts(WORLD, 3, 40, 'test', 1)
    assert all(len({text.person[:2] for text in stream}) == 40 for stream in told)
    assert all((text.person.first + text.person.last) % 4 == 3 for stream in told for text in stream)
    assert told[0] != told[1]


def test_rows_hold_the_passage_and_the_notes_that_fit():
    edits = [[*ORACLE[0][:2], None], ORACLE[1]]
    rows = lay_out(WORLD, TEXTS, edits).rows
    assert rows.tokens.shape == (2, 3 * OWN, ROW)
    for edit, text in enumerate(TEXTS[0]):
        learned = rows.weights[0, OWN * edit] > 0
        assert rows.targets[0, OWN * edit][learned].tolist() == text.passage and rows.tokens[0, OWN * edit, 0] == END
    notes, real = WORLD.lines(ORACLE[1][2]), rows.weights[1, 5] > 0
    assert rows.targets[1, 5][real].tolist() == [token for note in notes for token in note]
    begins = np.flatnonzero(np.diff(rows.segment_ids[1, 5], prepend=0))
    assert (begins % GRID == 0).all() and rows.tokens[1, 5, begins].tolist() == [END] * 4
    assert not rows.weights[0, 5].any()
    long = lay_out(WORLD, [TEXTS[0][:1]], [[ORACLE[0][0][:-1] + ORACLE[0][1]]]).rows
    assert long.weights[0, 1].sum() == sum(map(len, notes))


def test_lanes_are_rates_by_streams_and_nothing_is_learned_at_rate_zero():
    player = Player(WORLD, CONFIG, 'adapters', METHODS['sequential'], steps=4)
    base, streams = random_params(player.model, dtype=np.float32), lay_out(WORLD, TEXTS, ORACLE)
    found = player.play(base, streams, (0.0, 0.05), 0)
    assert found.stream.shape == (4, 4, 3, 4) and found.known.shape == (4, 4, 40)
    np.testing.assert_array_equal(found.stream[:, :2], np.broadcast_to(found.stream[:1, :2], (4, 2, 3, 4)))
    person = TEXTS[1][2].person
    asked = np.array([WORLD.question(person, attribute) for attribute in range(4)])
    likeliest = np.asarray(player.model.apply({'params': base}, asked)[0][:, -1].argmax(-1))
    np.testing.assert_array_equal(found.stream[0, 1, 2], likeliest == [WORLD.answer(person, attribute) for attribute in range(4)])
    assert (found.stream[1:, 2:] != found.stream[:1, 2:]).any()
    assert found.routed is None and found.of(np.array([3])).stream.shape == (4, 1, 3, 4)


def test_metrics_of_a_stream():
    stream, known = np.zeros((3, 1, 2, 2), bool), np.ones((3, 1, 4), bool)
    stream[1, 0, 0] = stream[2, 0, 1] = True  # the second edit wipes out the first
    known[2, 0, :2] = False
    found = stream_metrics(Answers(stream, known, None))
    assert found['matrix'] == [[1.0, 0.0], [0.0, 1.0]] and found['forgetting'] == 1.0 and found['average_accuracy'] == 0.5
    assert found['turned_wrong'] == (0 + 4 / 8) / 2 and found['turned_right'] == (2 / 8 + 2 / 8) / 2 and found['known'] == [1.0, 1.0, 0.5]


def test_operations_of_an_update():
    params = shapes(LanguageModel(CONFIG))
    flops = lambda name, moved='adapters': update_flops(CONFIG, params, METHODS[name], moved, 8)
    weights = sum(leaf.size for leaf in jax.tree.leaves(params)) - params['embedding'].size
    mlp = sum(leaf.size for leaf in jax.tree.leaves(params['blocks']['channel']))
    assert flops('sequential', 'levels') == 16 * OWN * ROW * (4 * weights + 2 * mlp)
    assert flops('sequential') < flops('lwf') < flops('replay of edits') == flops('a-gem') < flops('joint') == 4.5 * flops('sequential')
    assert flops('ewc') > flops('ewc of base') == flops('sequential') == flops('o-lora')


@pytest.mark.parametrize('learner', ['hope-attention', 'hope-linear', 'transformer'])
def test_arms_of_equal_flops_take_equal_flops(learner):
    config = arm_config(WORLD, learner)
    params, arms = shapes(LanguageModel(config)), [f'{learner}, equal FLOPs', f'{learner}, equal FLOPs, levels']
    assert [ARMS[arm].moved for arm in arms] == ['adapters', 'levels'] and all(arm_config(WORLD, arm) == config for arm in arms)
    for name in ('sequential', 'replay of edits', 'ewc', 'lwf'):  # the others cost what one of these does, or a multiple
        method = METHODS[name]
        steps = [update_steps(WORLD, arm, method, 8) for arm in arms]
        adapters, levels = (update_flops(config, params, method, ARMS[arm].moved, 8, count) for arm, count in zip(arms, steps, strict=True))
        assert abs(adapters / levels - 1) < (0.025 if name == 'lwf' else 0.02) and steps[0] > steps[1] == 16
    assert update_steps(WORLD, learner, METHODS['sequential'], 8) == 16


@pytest.mark.slow
def test_flops_of_arms_are_equal_by_the_compilers_count():
    """Which has attention's scores, the optimizer and all that is elementwise; a loop's body counts once."""
    config = dataclasses.replace(arm_config(WORLD, 'hope-attention'), scan_layers=False)
    model, method, found = LanguageModel(config), METHODS['sequential'], []
    for arm in ('hope-attention, equal FLOPs', 'hope-attention, equal FLOPs, levels'):
        _, learn = make_stream(model, make_part(config, ARMS[arm].moved), method, OWN)
        steps, rows = update_steps(WORLD, arm, method, 3), lay_out(WORLD, TEXTS, ORACLE).rows
        plans, lanes = np.zeros((2, steps, OWN), np.int32), [np.zeros(2, dtype) for dtype in (np.float32, np.int32, np.uint32)]
        batch, params = rows._replace(rows=plans, **dict(zip(('learning_rate', 'steps', 'seed'), lanes, strict=True))), shapes(model)
        stream = Stream(jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((2, *leaf.shape), leaf.dtype), params), None, None)
        found.append(steps * learn.lower(params, stream, batch, np.int32(0)).cost_analysis()['flops'])
    assert found[0] == pytest.approx(found[1], rel=0.03)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['hope-linear, levels'])
def test_a_bank_of_levels_is_asked(name):
    config = dataclasses.replace(arm_config(WORLD, name), num_layers=1)
    player = Player(WORLD, config, ARMS[name].moved, METHODS['adapter bank'], steps=4)
    found = player.play(random_params(player.model, dtype=np.float32), lay_out(WORLD, TEXTS, ORACLE), (0.0, 0.02), 0)
    np.testing.assert_array_equal(found.stream[0, :2], found.stream[1, :2])
    assert 0 < found.routed <= 1
