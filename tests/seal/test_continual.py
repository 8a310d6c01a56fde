"""Streams of edits: one after another is the inner loop and a merge, every term is in the loss, and each way of keeping keeps its own."""

import dataclasses
import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nested_jax.config import LevelConfig
from nested_jax.models.language_model import LanguageModel
from nested_jax.seal.buckets import Batch, Candidate, buckets
from nested_jax.seal.continual import METHODS, Method, bank_variables, make_stream, plan, routed_logits
from nested_jax.seal.inner_loop import InnerConfig, Learner, learn_all, logits_of, make_inner_loop, read_rows
from nested_jax.seal.lora import LoraConfig, merge
from nested_jax.seal.parts import adapter_part, level_part
from nested_jax.seal.retention import diagonal_fisher, project
from tests.models.small_models import random_params, small

CONFIG = InnerConfig(lora=LoraConfig(rank=2, alpha=4.0, targets=('query', 'down')))
MODEL = LanguageModel(small('transformer', num_layers=1))
PARAMS = random_params(MODEL, dtype=np.float32)
PART = adapter_part(CONFIG)
EDITS, OWN, STEPS, LENGTH = 3, 2, 2, 8
REAL = np.ones(EDITS * OWN, bool)


def streams(count: int = 2) -> list[Candidate]:
    """A candidate that holds a stream's rows, for each stream."""
    rng = np.random.default_rng(0)
    draw = lambda: tuple(tuple(rng.integers(0, 32, LENGTH).tolist()) for _ in REAL)
    return [Candidate(draw(), learning_rate=0.02 * (1 + index), steps=STEPS, seed=index) for index in range(count)]


def batch_of(method: Method, edit: int, candidates=None) -> Batch:
    """The batch of one edit, rows planned with the stream's place as the seed."""
    candidates = candidates or streams()
    ((_, batch),) = buckets(candidates, rows_per_step=1, shape=(len(REAL), LENGTH))
    batch = jax.tree.map(lambda leaf: leaf[: len(candidates)], batch)
    plans = [plan(method, edit, OWN, STEPS, REAL, np.random.default_rng(index)) for index in range(len(candidates))]
    steps = np.full(len(candidates), len(plans[0]), np.int32)
    return jax.tree.map(jnp.asarray, batch._replace(rows=np.stack(plans), seed=batch.seed + 10 * edit, steps=steps))


def run(method: Method, edits: int = EDITS, part=PART, model=MODEL, params=PARAMS):
    start, learn = make_stream(model, part, method, OWN)
    probe = jax.tree.map(lambda leaf: leaf[0], read_rows_of(batch_of(method, 0)))
    stream = start(params, probe, 2, EDITS)
    for edit in range(edits):
        stream = learn(params, stream, batch_of(method, edit), jnp.int32(edit))
    return stream


def read_rows_of(batch: Batch):
    return jax.vmap(read_rows, (0, None))(batch, np.arange(OWN))


def assert_close(one, other, tolerance=2e-5):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance)


def test_one_after_another_is_the_inner_loop_and_a_merge():
    found, loop = run(Method()).params, make_inner_loop(MODEL, CONFIG)
    for index, whole in enumerate(streams()):
        params = PARAMS
        for edit in range(EDITS):
            own = dataclasses.replace(whole, sequences=whole.sequences[OWN * edit : OWN * (edit + 1)], seed=whole.seed + 10 * edit)
            params = merge(params, learn_all(loop, params, [own], shape=(OWN, LENGTH))[0], CONFIG.lora)
        assert_close(jax.tree.map(lambda leaf, index=index: leaf[index], found), params)
        assert float(jnp.abs(params['blocks']['mixer']['query']['kernel'] - PARAMS['blocks']['mixer']['query']['kernel']).max()) > 0.01


def written_out(method: Method, context: dict, batch: Batch, adapters, rows):
    """The loss of one step of the first stream, from the formulas."""
    read = read_rows(jax.tree.map(lambda leaf: leaf[0], batch), rows)
    logits = lambda params: jax.nn.log_softmax(logits_of(Learner(MODEL, {'params': params}), read))
    params = merge(context['params'], adapters, CONFIG.lora)
    log = logits(params)
    total = -(jnp.take_along_axis(log, read.targets[..., None], -1)[..., 0] * read.weights).sum()
    base, before = logits(context['base']), jax.nn.log_softmax(logits(context['params']) / 2)
    total += method.kl_to_base * ((jnp.exp(base) * (base - log)).sum(-1) * read.weights).sum()
    total += method.distill * 4 * ((jnp.exp(before) * (before - jax.nn.log_softmax(log / 2))).sum(-1) * read.weights).sum()
    total /= read.weights.sum()
    for name in ('mixer/query', 'channel/level_0/down'):
        at = lambda tree, name=name: functools.reduce(operator.getitem, name.split('/'), tree['blocks'])
        gap = at(params)['kernel'] - at(context['params'])['kernel']
        total += method.elastic * 0.5 * (at(context['fisher'])['kernel'] * gap**2).sum()
        for old in context['learned']:
            total += method.orthogonal * ((jnp.swapaxes(at(old)['a'], 1, 2) @ at(adapters)['a']) ** 2).sum()
    return total


ALL = Method(memory='edits', elastic=30.0, distill=0.7, kl_to_base=0.4, orthogonal=0.5)


@pytest.mark.parametrize('averaged', [pytest.param(False, marks=pytest.mark.slow, id='all terms'), pytest.param(True, id='a-gem')])
def test_the_second_edit_written_out(averaged):
    method = METHODS['a-gem'] if averaged else ALL
    start, learn = make_stream(MODEL, PART, method, OWN)
    first, second = batch_of(method, 0), batch_of(method, 1)
    one = jax.tree.map(lambda leaf: leaf[0], read_rows_of(first))
    before = learn(PARAMS, start(PARAMS, one, 2, EDITS), first, jnp.int32(0))
    after = learn(PARAMS, before, second, jnp.int32(1))
    pick = lambda tree: jax.tree.map(lambda leaf: leaf[0], tree)
    context = dict(base=PARAMS, params=pick(before.params), learned=[], fisher=jax.tree.map(jnp.zeros_like, PARAMS))
    if not averaged:
        context |= dict(learned=[jax.tree.map(lambda leaf: leaf[0, 0], before.learned)], fisher=pick(before.fisher))
        key = jax.random.key(first.seed[0])
        assert_close(context['fisher'], diagonal_fisher(MODEL, context['params'], one, key))
    adapters = PART.start(context['params'], second.seed[0])
    state, gradient = (
        PART.optimizer.init(adapters),
        jax.jit(jax.grad(lambda adapters, rows: written_out(method, context, second, adapters, rows))),
    )
    for index, rows in enumerate(second.rows[0]):
        assert rows[:OWN].tolist() == [2, 3] and set(rows[OWN:].tolist()) == {0, 1}
        towards = project(gradient(adapters, rows[:OWN]), gradient(adapters, rows[OWN:])) if averaged else gradient(adapters, rows)
        updates, state = PART.optimizer.update(towards, state, adapters)
        rate = second.learning_rate[0] * (1 - index / STEPS)
        adapters = jax.tree.map(lambda leaf, update, rate=rate: leaf - rate * update, adapters, updates)
    assert_close(pick(after.params), merge(context['params'], adapters, CONFIG.lora))


@pytest.mark.slow
def test_a_bank_keeps_edits_apart_and_routes_to_them():
    stream = run(METHODS['adapter bank'], edits=2)
    for leaf, base in zip(jax.tree.leaves(stream.params), jax.tree.leaves(PARAMS), strict=True):
        np.testing.assert_array_equal(leaf[1], base)
    learned = jax.tree.map(lambda leaf: leaf[0], stream.learned)
    bank = jax.jit(lambda learned: bank_variables(PART, PARAMS, learned))(learned)
    pick = lambda index: jax.tree.map(lambda leaf: leaf[index], bank)
    assert_close([pick(0), pick(3)], [PARAMS, PARAMS], 0)
    assert_close(pick(2), merge(PARAMS, jax.tree.map(lambda leaf: leaf[1], learned), CONFIG.lora))
    questions = np.array([sequence[:6] for sequence in streams()[0].sequences])
    logits, chosen = jax.jit(lambda bank: routed_logits(MODEL, bank, questions))(bank)
    alone = np.stack([MODEL.apply({'params': pick(index)}, questions)[0] for index in range(EDITS + 1)])
    log = np.asarray(jax.nn.log_softmax(alone))[:, :, :-1]
    losses = -np.take_along_axis(log, questions[None, :, 1:, None], -1)[..., 0].sum(-1)
    np.testing.assert_array_equal(chosen, losses.argmin(0))
    assert len(set(np.asarray(chosen).tolist())) > 1
    np.testing.assert_allclose(logits, alone[chosen, np.arange(len(questions)), -1], rtol=0, atol=1e-5)


@pytest.mark.slow
def test_levels_learn_at_their_periods_and_nothing_else_does():
    model = LanguageModel(small('hope-linear', levels=(LevelConfig(12, OWN * LENGTH), LevelConfig(12, 3 * OWN * LENGTH))))
    params, part = random_params(model, dtype=np.float32), level_part(CONFIG, model.config.levels, OWN * LENGTH)
    after = run(Method(), edits=1, part=part, model=model, params=params).params
    moved = jax.tree.map(lambda new, old: bool((new[0] != old).any()), after, params)
    assert all(jax.tree.leaves(moved['blocks']['channel']['level_0']))
    moved['blocks']['channel'].pop('level_0')
    assert not any(jax.tree.leaves(moved))  # two steps: the third is the first at which the slow level moves
    with pytest.raises(ValueError, match='orthogonal is 0.5, allowed is 0 for a part without adapters'):
        run(METHODS['o-lora'], part=part, model=model, params=params)


def test_what_steps_read():
    rng, real = np.random.default_rng(0), np.array([True] * 5 + [False] + [True] * 4)
    rows = lambda method, edit: plan(method, edit, 2, 50, real, rng)
    assert (rows(Method(), 1) == [2, 3]).all() and (rows(Method(), 2) == [4, -1]).all()
    assert (rows(METHODS['replay of edits'], 0)[:, 2:] == -1).all()
    edits, passages = rows(METHODS['replay of edits'], 3), rows(METHODS['replay of passages'], 3)
    assert set(edits[:, 2:].ravel()) == {0, 1, 2, 3, 4} and set(passages[:, 2:].ravel()) == {0, 2, 4}
    assert all(len(set(row)) == 4 for row in edits.tolist()) and (edits[:, :2] == [6, 7]).all()
    joint = rows(METHODS['joint'], 2)
    assert joint.shape == (150, 2) and np.unique(joint[:, 0], return_counts=True)[1].min() > 20 and set(joint.ravel()) == {0, 1, 2, 3, 4}


@pytest.mark.parametrize(
    ('field', 'value'),
    [('keep', 'all'), ('memory', 'some'), ('elastic', -1.0), ('memory_rows', 0), ('distill_temperature', 0.0), ('elastic_decay', 2.0)],
)
def test_bad_methods_are_named(field, value):
    with pytest.raises(ValueError, match=f'{field} is .*allowed is'):
        Method(**{field: value})


def test_memory_and_what_needs_it():
    with pytest.raises(ValueError, match='average_gradient is True, allowed is False'):
        Method(average_gradient=True)
    with pytest.raises(ValueError, match="memory is 'edits', allowed is 'none' with keep='bank'"):
        Method(keep='bank', memory='edits')
