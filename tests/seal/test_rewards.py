"""Graders against hand-made cases and GPT-4.1's verdicts, rewards, reliability against known components, and the rubric."""

import json
import lzma

import numpy as np
import pytest

from nested_jax.seal.rewards import (
    GRADERS,
    REWARDS,
    Tried,
    agreement,
    by_rubric,
    contains,
    exact_match,
    gold_recall,
    reliability,
    rubric,
    token_f1,
)
from nested_jax.seal.voting import IDENTITY


@pytest.mark.parametrize(
    ('answer', 'gold', 'recall', 'inside', 'exact', 'f1'),
    [
        ('The metal was iron.', 'iron', 1, 1, 0, 0.5),
        ('Iron', 'the iron', 1, 1, 1, 1),
        ('in June of 1856', '1856, in June', 1, 0, 0, 6 / 7),
        ('copper\nIron', 'iron', 0, 0, 0, 0),
        ('ironic', 'iron', 0, 0, 0, 0),
        ('very very big', 'very very very big', 0, 0, 0, 6 / 7),
        ('', 'iron', 0, 0, 0, 0),
        ('anything', 'the', 0, 0, 0, 0),
    ],
)
def test_graders(answer, gold, recall, inside, exact, f1):
    marks = [grader(answer, gold) for grader in (gold_recall, contains, exact_match, token_f1)]
    assert marks == [recall, inside, exact, pytest.approx(f1)]


def test_rewards_are_told_all_that_is_known_and_only_the_rubric_needs_no_update():
    passage, edit = 'Tesla was born in 1856.', 'Tesla was born in 1856.\nIn 1856.'
    tried = Tried(passage, edit, golds=['1856', 'iron'], answers=['In 1856', 'Iron'], log_probs=np.array([-1.0, -4.0]))
    expected = dict(gold_recall=1, contains=1, exact_match=0.5, token_f1=(2 / 3 + 1) / 2, log_prob=-2.5, rubric=rubric(edit, passage).total)
    assert {name: REWARDS[name].mark(tried) for name in expected} == pytest.approx(expected)
    assert {name for name, reward in REWARDS.items() if not reward.needs_update} == {'rubric'}
    assert REWARDS['rubric'].mark(Tried(passage)) == 4 < by_rubric(6).mark(Tried(passage, edit))
    right, wrong, other = ((1, 2),), ((2, 1),), ((3, 3),)
    views = [{IDENTITY: [wrong, right], 'flip': [right]}, {IDENTITY: [wrong, None], 'flip': [other, other, right]}]
    assert REWARDS['vote_pass_2'].mark(Tried('', golds=[right, right], answers=views)) == 0.5
    assert set(REWARDS) == {*expected, 'vote_pass_2'}
    with pytest.raises(ValueError, match='longer'):
        REWARDS['contains'].mark(tried._replace(answers=['1856']))


def test_gold_recall_agrees_with_the_published_verdicts(shared_data):
    lines = lzma.open(shared_data / 'seal_squad' / 'judge_verdicts_dev.jsonl.xz', 'rt').read().splitlines()
    rows = [json.loads(line) for line in lines]
    judged = [row['gpt41'] for row in rows]
    kappas = {name: agreement([grader(row['pred'], row['gold']) >= 0.5 for row in rows], judged).kappa for name, grader in GRADERS.items()}
    assert max(kappas, key=kappas.get) == 'gold_recall' and kappas['gold_recall'] > 0.7, kappas
    assert kappas['exact_match'] < 0.2


def test_agreement():
    assert agreement([True, False], [True, False]) == (1.0, 1.0)
    assert agreement([True, True, False, False], [True, False, True, False]) == (0.5, 0.0)
    assert agreement([True, True], [True, True]) == (1.0, 1.0)
    with pytest.raises(ValueError, match='others has 1 verdicts, allowed'):
        agreement([True, False], [True])


def test_reliability_finds_the_components():
    rng = np.random.default_rng(0)
    true = rng.normal(scale=0.1, size=(4000, 5, 1)) + rng.normal(size=(4000, 1, 1))
    found = reliability(true + rng.normal(scale=0.2, size=(4000, 5, 3)))
    np.testing.assert_allclose(found, (0.01, 0.04, 0.01 / (0.01 + 0.04 / 3)), rtol=0.05)
    assert reliability(np.broadcast_to(rng.normal(size=(9, 5, 1)), (9, 5, 3))).icc == 1.0
    assert reliability(np.zeros((9, 5, 3))).icc == 0.0
    with pytest.raises(ValueError, match=r'rewards has shape \(9, 5, 1\), allowed'):
        reliability(np.zeros((9, 5, 1)))


def test_the_rubric_prefers_what_it_should():
    passage = 'Tesla was born in 1856 in Smiljan. He worked on alternating current.'
    good = 'Tesla was born in Smiljan.\nTesla worked on alternating current.'
    repeated, strange = 'Tesla was born in Smiljan.\n' * 2, 'Bananas ripen quicker beside apples.\nOtters hold hands.'
    assert rubric(good, passage).diversity > rubric(repeated, passage).diversity
    assert rubric(good, passage).quality == 5 and rubric(repeated, passage).quality == 1
    assert rubric(good, passage).correctness == 5 and rubric(strange, passage).correctness == 1
    assert rubric('', passage) == (1, 1, 1, 1) and rubric('', passage).total == 4
    assert rubric('word ' * 500, passage).length == 5
