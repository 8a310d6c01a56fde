"""Hierarchical voting on cases that can be counted by hand."""

import pytest

from nested_jax.seal.voting import IDENTITY, vote

A, B, C, D = (((n, 0), (0, n)) for n in (1, 2, 3, 4))


def test_what_most_views_propose_wins_over_what_is_said_most_often():
    answers = {IDENTITY: [A, A, A, A], 'flip-0': [B], 'flip-1': [B], 'transpose': [B]}
    assert vote(answers) == [B, A]
    assert vote(answers, submitted=1) == [B]


def test_the_identity_breaks_ties():
    assert vote({'flip-0': [A], IDENTITY: [B]}) == [B, A]
    assert vote({'flip-0': [A], 'flip-1': [B]}) == [A, B]


def test_answers_that_are_no_grids_do_not_count():
    assert vote({IDENTITY: [None, None], 'flip-0': [None, C]}) == [C]
    assert vote({IDENTITY: [None]}) == [] == vote({})


def test_rows_and_columns_that_are_most_frequent_make_an_answer_nobody_gave():
    wrong = [((1, 1), (2, 0)), ((1, 1), (0, 2)), ((0, 1), (2, 2)), ((1, 0), (2, 2))]
    right = ((1, 1), (2, 2))
    assert right in vote({IDENTITY: wrong}, submitted=9)
    assert vote({IDENTITY: wrong + wrong[:1]})[0] == wrong[0]
    turned = [tuple(zip(*grid, strict=True)) for grid in wrong]
    assert tuple(zip(*right, strict=True)) in vote({IDENTITY: turned}, submitted=9)
    assert right not in vote({IDENTITY: wrong[:3]}, submitted=9)


def test_grids_of_several_shapes_vote_together():
    assert vote({IDENTITY: [((1,),), A], 'flip-0': [((1,),)]})[0] == ((1,),)


@pytest.mark.parametrize('order', [(A, B, C, D), (D, C, B, A)])
def test_each_view_proposes_three_at_most(order):
    answers = {IDENTITY: [grid for count, grid in zip((4, 3, 2, 1), order, strict=True) for _ in range(count)]}
    assert vote(answers, submitted=9) == list(order[:3])
