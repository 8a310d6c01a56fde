"""Candidates in buckets: nothing is lost, little is padded, and rows come as they should."""

import numpy as np
import pytest

from nested_jax.seal.buckets import Candidate, buckets, real_share, round_up


def candidate(seed: int, rows: int = 3, length: int = 6, **changes) -> Candidate:
    rng = np.random.default_rng(seed)
    sequences = tuple(tuple(rng.integers(1, 32, max(length - row % 2, 2)).tolist()) for row in range(rows))
    return Candidate(**dict(sequences=sequences, learning_rate=0.01, steps=3, seed=seed) | changes)


def learned(batch, index: int) -> list[tuple[int, ...]]:
    """The sequences that a candidate's rows hold, by segments and weights, first tokens included."""
    found = []
    for row in range(batch.tokens.shape[1]):
        tokens, targets, weights, ids = (np.asarray(field)[index, row] for field in batch[:4])
        for number in sorted(set(ids) - {0}):
            here = (ids == number) & (weights > 0)
            assert np.all(np.diff(np.flatnonzero(here)) == 1)
            found.append((tokens[here][0], *targets[here]))
            np.testing.assert_array_equal(tokens[here][1:], targets[here][:-1])
    return found


@pytest.mark.parametrize('grid', [1, 4])
@pytest.mark.parametrize('rows_per_step', [None, 2])
def test_every_sequence_is_there_once(grid, rows_per_step):
    mixed = [candidate(seed, rows=1 + seed % 5, length=4 + 3 * (seed % 3)) for seed in range(12)]
    seen = []
    for places, batch in buckets(mixed, grid=grid, rows_per_step=rows_per_step):
        for index, place in enumerate(places):
            assert sorted(learned(batch, index)) == sorted(mixed[place].sequences)
        starts = np.diff(np.asarray(batch.segment_ids), prepend=0, axis=-1) > 0
        assert not set(np.flatnonzero(starts) % batch.tokens.shape[-1] % grid) - {0}
        seen += places
    assert sorted(seen) == list(range(12))


def test_prompts_are_not_learned():
    ((_, batch),) = buckets([Candidate(((5, 6, 7, 8), (9, 10)), 0.1, 1, prompt_lengths=(2, 0))])
    assert sorted(learned(batch, 0)) == [(6, 7, 8), (9, 10)]


def test_short_sequences_share_rows():
    lines = (tuple(range(1, 21)), *((1, 2, 3, 4, 5, 6, 7, 8),) * 4)
    ((_, batch),) = buckets([Candidate(lines, 0.1, 16)] * 4)
    assert batch.tokens.shape[1] * batch.tokens.shape[2] <= 64 and real_share(batch) > 0.7
    ((_, alone),) = buckets([Candidate(lines, 0.1, 16)] * 4, rows_per_step=1)
    assert alone.tokens.shape[1:] == (6, 24)


def test_shapes_are_rounded_up_and_batches_filled():
    assert [round_up(count) for count in (0, 1, 2, 3, 4, 5, 7, 9, 13, 17, 33)] == [1, 1, 2, 3, 4, 6, 8, 12, 16, 24, 48]
    laid_out = lambda count, **options: [
        (len(places), batch.steps.tolist()) for places, batch in buckets([candidate(seed) for seed in range(count)], **options)
    ]
    assert laid_out(5, at_most=4) == [(4, [3] * 4), (1, [3])]
    assert laid_out(5) == [(5, [3] * 5 + [0] * 11)] and laid_out(17, at_most=48) == [(17, [3] * 17 + [0] * 31)]


def test_a_given_shape_holds_what_fits():
    mixed = [candidate(0, rows=1), candidate(1, rows=3), candidate(2, rows=9)]
    found = {batch.tokens.shape[1:]: places for places, batch in buckets(mixed, shape=(2, 12))}
    assert found.pop((2, 12)) == [0, 1] and [*found.values()] == [[2]]
    for places, batch in buckets(mixed, shape=(2, 12)):
        assert all(sorted(learned(batch, index)) == sorted(mixed[place].sequences) for index, place in enumerate(places))


def test_rows_of_a_step_come_epoch_by_epoch():
    ((_, batch),) = buckets([candidate(0, rows=4, steps=4)], rows_per_step=2)
    first, second = batch.rows[0].reshape(2, 4)
    assert sorted(first) == sorted(second) == [0, 1, 2, 3] and list(first) != list(second)
    ((_, again),) = buckets([candidate(0, rows=4, steps=4)], rows_per_step=2)
    np.testing.assert_array_equal(batch.rows, again.rows)
    ((_, whole),) = buckets([candidate(0, rows=1, steps=4)])
    np.testing.assert_array_equal(whole.rows, np.zeros((1, 1, 1)))


def test_the_share_of_real_tokens():
    share = lambda *steps, **layout: [
        real_share(b) for _, b in buckets([Candidate(((1,) * 9,) * 4, 0.1, count) for count in steps], **layout)
    ]
    assert share(4) == share(5) == [1.0]
    assert share(4, 4, 4) == [0.75] and share(5, 6) == pytest.approx([11 / 24])
    assert share(6, rows_per_step=3) == [1.0]
    ((_, fewer),) = buckets([Candidate(((1,) * 9,) * 2 + ((1, 1),), 0.1, 4)])
    assert real_share(fewer) == pytest.approx(17 / 24)


@pytest.mark.parametrize(
    ('field', 'changes'),
    [
        ('sequences', dict(sequences=())),
        ('sequences', dict(sequences=((1,),))),
        ('learning_rate', dict(learning_rate=-1.0)),
        ('steps', dict(steps=-1)),
        ('prompt_lengths', dict(prompt_lengths=(1,))),
        ('prompt_lengths', dict(prompt_lengths=(6, 0, 0))),
    ],
)
def test_bad_candidates_are_named(field, changes):
    with pytest.raises(ValueError, match=f'{field} is .*allowed is'):
        candidate(0, **changes)


def test_bad_layouts_are_named():
    for changes in (dict(at_most=0), dict(rows_per_step=0)):
        with pytest.raises(ValueError, match=f'{next(iter(changes))} is 0, allowed is'):
            list(buckets([candidate(0)], **changes))
