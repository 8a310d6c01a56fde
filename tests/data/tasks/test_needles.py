"""Needles: template and depths, solver, streaming in flat memory, baselines, and the stored prompts of the reference."""

import collections
import math
import re
import tracemalloc

import numpy as np
import pytest

from nested_jax.data.tasks import Needles
from nested_jax.data.tasks.needles import KINDS, _draw_key, _draw_key_order


def texts(task: Needles, count: int, split: str = 'train') -> list[str]:
    batch = task.batch(0, count, split=split)
    return [bytes([row[0], *targets]).decode() for row, targets in zip(batch['tokens'], batch['targets'], strict=True)]


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('length', [1024, 3001])
def test_solver_agrees(kind, length):
    task = Needles(length, kind)
    batch = task.batch(0, 20, split='test')
    assert batch['tokens'].shape == (20, length)
    np.testing.assert_array_equal(batch['tokens'][:, 1:], batch['targets'][:, :-1])
    for row in range(20):
        targets, weights = task.solve(batch['tokens'][row])
        np.testing.assert_array_equal(weights, batch['weights'][row])
        np.testing.assert_array_equal(targets[weights > 0], batch['targets'][row][weights > 0])


@pytest.mark.parametrize(
    ('kind', 'needles', 'answers'), [('single_2', 1, 1), ('multikey_1', 4, 1), ('multivalue', 4, 4), ('multiquery', 4, 4)]
)
def test_needles_and_answers(kind, needles, answers):
    for text in texts(Needles(2048, kind), 20):
        body, answer = text.rsplit(' are' if answers > 1 else ' is', 1)
        assert body.count('One of the special magic numbers for') == needles
        values = answer.strip(' .').split(', ')
        assert len(values) == answers and all(len(value) == 7 and f'is: {value}.' in body for value in values)


@pytest.mark.parametrize('kind', KINDS)
def test_brief_texts_ask_the_same_in_fewer_words(kind):
    brief, whole = (Needles(2048, kind, brief).draw(np.random.default_rng(5), 'train') for brief in (True, False))
    assert brief.answer == whole.answer and brief.head == b'' and b'magic' not in brief.tail
    for (depth, short), (same_depth, long) in zip(brief.inserts, whole.inserts, strict=True):
        assert depth == same_depth and long.endswith(b' ' + short)
    task = Needles(512, kind, brief=True)
    batch = task.batch(0, 10)
    for row in range(10):
        targets, weights = task.solve(batch['tokens'][row])
        np.testing.assert_array_equal(weights, batch['weights'][row])
        np.testing.assert_array_equal(targets[weights > 0], batch['targets'][row][weights > 0])


def test_shortest_brief_text():
    [text] = texts(Needles(64, brief=True), 1)
    assert re.fullmatch(r'(\S{9}) is: (\d{7})\.\n {20}\n\1 is \2\.', text)


@pytest.mark.parametrize('kind', ['multikey_2', 'multikey_3'])
def test_distractors_have_other_keys(kind):
    for text in texts(Needles(8192, kind), 5):
        keys = [line.split(' for ')[1].split(' is: ')[0] for line in text.split('\n') if line.startswith('One of')]
        assert len(keys) == len(set(keys)) >= 50


def test_words_do_not_come_twice():
    order = _draw_key_order(np.random.default_rng(0))
    steps = {_draw_key_order(np.random.default_rng(seed))[0] for seed in range(300)}
    assert len(steps) == 300 and all(math.gcd(step, 70) == 1 for step in steps)
    assert len({_draw_key(None, 'word', order, number) for number in range(20_000)}) == 20_000


def test_depths_are_uniform():
    task = Needles(20_000, 'single_2')
    counts = collections.Counter(round(task.deal(index, 'train', 0)[1].inserts[0][0] * 39) for index in range(2000))
    assert sorted(counts) == list(range(40)) and all(abs(count - 50) < 6 * 50**0.5 for count in counts.values())
    for index in range(10):
        plan = task.deal(index, 'train', 0)[1]
        text = bytes(task.example(index)['tokens'].tolist())
        # The needle begins within a sentence of its depth.
        begin = text.index(b'One of the special') - len(plan.head)
        assert 0 <= begin - plan.inserts[0][0] * (20_001 - plan.size) < 70 or plan.inserts[0][0] > 0.99


@pytest.mark.parametrize('kind', ['single_1', 'multikey_2', 'multiquery'])
@pytest.mark.parametrize('chunk_size', [1, 7, 1024, 5000])
def test_a_stream_is_the_example(kind, chunk_size):
    task = Needles(1024, kind)
    chunks, example = list(task.stream(3, chunk_size, seed=1)), task.example(3, seed=1)
    assert all(len(chunk['tokens']) == chunk_size for chunk in chunks[:-1])
    for name in example:
        np.testing.assert_array_equal(np.concatenate([chunk[name] for chunk in chunks]), example[name])


def test_a_million_tokens_in_flat_memory():
    task = Needles(2**20, 'single_2')
    tracemalloc.start()
    try:
        tokens = sum(len(chunk['tokens']) for chunk in task.stream(0, 8192))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert tokens == 2**20
    assert peak < 2**19  # a chunk takes 0.13 MB with its text


def test_splits_share_no_question_and_answer():
    task = Needles(600)
    splits = {split: {task.signature(task.deal(index, split, 0)[1]) for index in range(50)} for split in task.splits}
    assert not splits['train'] & splits['test'] and len(splits['test']) == 50
    assert all(task.belongs(task.deal(index, 'test', 0)[1], 'test') for index in range(20))
    assert not any(task.belongs(task.deal(index, 'train', 0)[1], 'test') for index in range(20))


def test_baselines():
    # Where all needles are asked for in their order, what came last is right.
    assert Needles(1024, 'single_1').baselines(count=20)['last mention'].sequences == 1
    assert Needles(1024, 'multivalue').baselines(count=20)['last mention'].sequences == 1
    scores = Needles(1024, 'multikey_1').baselines(count=400)
    assert abs(scores['last mention'].sequences - 1 / 4) < 6 * (3 / 16 / 400) ** 0.5
    assert scores['majority'].sequences == scores['token'].sequences == 0
    assert abs(Needles(1024, 'multiquery').baselines(count=400)['last mention'].sequences - 1 / 24) < 6 * (1 / 24 / 400) ** 0.5


def test_wrong_arguments():
    with pytest.raises(ValueError, match="kind='single_4'; allowed: single_1, "):
        Needles(kind='single_4')
    with pytest.raises(ValueError, match='length=300; allowed: at least 3.. for kind'):
        Needles(300)
    with pytest.raises(ValueError, match='chunk_size=0'):
        Needles().stream(0, 0)
    assert Needles(512).example(0)['tokens'].shape == (512,)


def test_stored_prompts(read_samples):
    recomputed = 0
    for name, samples in read_samples('ruler_reference/*.jsonl.xz'):
        task = Needles(kind=name.removeprefix('niah_').removesuffix('_dev.jsonl.xz'))
        for sample in samples:
            prompt = f'{sample["input"]} {sample["answer_prefix"].strip()}'
            answers = task.read(task.prompt(np.frombuffer(prompt.encode(), np.uint8)))
            # Several values of one key are stored in the order they were drawn in.
            assert (sorted(answers) == sorted(sample['outputs'])) if 'multivalue' in name else answers == sample['outputs']
            recomputed += 1
    assert recomputed == 20 * 5 + 40 * 3
