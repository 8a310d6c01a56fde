"""Packing and batches: nothing lost, nothing twice, the same for any number of processes, exact at any step."""

import hashlib
import json

import grain
import numpy as np
import pytest

from nested_jax.data import pipelines
from nested_jax.data.documents import TokenizedDocuments

LENGTHS = [1, 37, 0, 5, 16, 64, 2, 33, 100, 8, 3, 1]
TOTAL = sum(LENGTHS)
TARGETS = sum(length - 1 for length in LENGTHS if length)


@pytest.fixture
def documents():
    """Every token differs from every other, so that each can be followed."""
    ends = np.cumsum(LENGTHS)
    return TokenizedDocuments([np.arange(end - length, end) + 1 for length, end in zip(LENGTHS, ends, strict=True)], np.dtype(np.uint16))


def stack(rows):
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def epoch_rows(documents, length, grid=1, seed=0, epoch=0):
    rows = pipelines.PackedRows(documents, length, grid=grid, seed=seed)
    return stack([rows[epoch * rows.rows_per_epoch + i] for i in range(rows.rows_per_epoch)])


def assert_same(one, two):
    assert one.keys() == two.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], two[name], err_msg=name)


# ---- packing


@pytest.mark.parametrize(('length', 'grid'), [(2, 1), (16, 1), (16, 4), (16, 16), (7, 1), (64, 8), (1000, 1)])
@pytest.mark.parametrize('seed', [None, 3])
@pytest.mark.parametrize('epoch', [0, 2])
def test_an_epoch_holds_every_token_once(documents, length, grid, seed, epoch):
    rows = epoch_rows(documents, length, grid, seed, epoch)
    real = rows['segment_ids'] > 0
    assert sorted(rows['tokens'][real]) == list(range(1, TOTAL + 1))
    assert (rows['tokens'][~real] == 0).all()
    scored = rows['weights'] > 0
    firsts = set((np.cumsum(LENGTHS) - LENGTHS)[np.array(LENGTHS) > 0] + 1)
    assert sorted(rows['targets'][scored]) == sorted(set(range(1, TOTAL + 1)) - firsts)
    # In these documents the next token is always one more.
    np.testing.assert_array_equal(rows['targets'][scored], rows['tokens'][scored] + 1)
    assert not rows['targets'][~scored].any()
    assert set(np.unique(rows['weights'])) <= {0, 1}
    assert {name: value.dtype.name for name, value in rows.items()} == dict(
        tokens='int32', targets='int32', segment_ids='int32', weights='float32'
    )


@pytest.mark.parametrize('grid', [1, 2, 4, 16])
def test_segments_are_documents_and_start_on_the_grid(documents, grid):
    document_of = np.repeat(np.arange(len(LENGTHS)), LENGTHS)
    rows = epoch_rows(documents, 16, grid)
    for tokens, segments in zip(rows['tokens'], rows['segment_ids'], strict=True):
        present = [segment for segment in np.unique(segments) if segment]
        assert present == list(range(1, len(present) + 1))
        owners = [np.unique(document_of[tokens[segments == segment] - 1]).tolist() for segment in present]
        assert all(len(owner) == 1 for owner in owners)
        assert all(one != two for one, two in zip(owners, owners[1:], strict=False))
        for segment in present:
            places = np.flatnonzero(segments == segment)
            assert places[0] % grid == 0
            np.testing.assert_array_equal(np.diff(places), 1)


def test_without_a_grid_only_the_last_row_is_padded(documents):
    rows = epoch_rows(documents, 16, seed=None)
    padding = rows['segment_ids'] == 0
    assert padding.sum() == -TOTAL % 16
    assert padding[-1, TOTAL % 16 :].all()


def test_the_target_of_a_rows_last_token_is_in_the_next_row(documents):
    rows = epoch_rows(documents, 16, seed=None)
    crossing = 0
    for i in range(len(rows['tokens']) - 1):
        if rows['weights'][i, -1]:
            crossing += 1
            assert rows['targets'][i, -1] == rows['tokens'][i + 1, 0]
    assert crossing


def test_order_without_a_seed_is_the_documents(documents):
    rows = epoch_rows(documents, 16, seed=None)
    assert rows['tokens'].ravel()[:TOTAL].tolist() == list(range(1, TOTAL + 1))


def test_seed_and_epoch_change_the_order(documents):
    variants = [epoch_rows(documents, 16, seed=seed, epoch=epoch)['tokens'] for seed, epoch in ((0, 0), (1, 0), (0, 1))]
    for one, two in ((0, 1), (0, 2), (1, 2)):
        assert not np.array_equal(variants[one], variants[two])
    np.testing.assert_array_equal(variants[0], epoch_rows(documents, 16, seed=0)['tokens'])


def test_shuffle_is_frozen(documents):
    """A run is resumed with another numpy, too: these numbers must never change."""
    rows = pipelines.PackedRows(documents, 16, grid=4, seed=11)
    assert [int(rows[i]['tokens'][0]) for i in range(6)] == [239, 38, 159, 191, 112, 255]


# ---- batches


@pytest.mark.parametrize('process_count', [1, 2, 4, 8])
def test_global_batches_do_not_depend_on_the_number_of_processes(documents, process_count):
    """R4."""
    arguments = dict(length=8, batch_size=8, grid=4, seed=5)
    whole = pipelines.training_batches(documents, **arguments)
    parts = [pipelines.training_batches(documents, **arguments, share=share) for share in np.split(np.arange(8), process_count)]
    for step in range(12):  # some epochs
        batches = [part[step] for part in parts]
        assert batches[0]['tokens'].shape == (8 // process_count, 8)
        assert_same({name: np.concatenate([batch[name] for batch in batches]) for name in whole[0]}, whole[step])


def hashes(documents, start, stop, shares):
    """A hash of the tokens of each global batch, put together from what each process reads of it."""
    read = [
        pipelines.batch_iterator(pipelines.training_batches(documents, length=8, batch_size=8, seed=5, share=share), start=start)
        for share in shares
    ]
    found = []
    for _ in range(start, stop):
        whole = np.full((8, 8), -1, np.int32)
        for share, iterator in zip(shares, read, strict=True):
            whole[np.array(share)] = next(iterator)['tokens']
        found.append(hashlib.sha256(whole.tobytes()).hexdigest())
    return found


def test_another_number_of_processes_goes_on_with_the_same_batches(documents):
    """R4: also where a process's rows do not lie side by side, as those of a TPU host in a torus do not."""
    whole = hashes(documents, 0, 9, [range(8)])
    assert len(set(whole)) == 9
    split = lambda count: np.split(np.arange(8), count)
    mixed = hashes(documents, 0, 3, split(2)) + hashes(documents, 3, 5, split(8)) + hashes(documents, 5, 7, split(4))
    assert mixed + hashes(documents, 7, 9, [(0, 1, 4, 5), (2, 3, 6, 7)]) == whole


def test_batches_run_through_epochs_without_a_gap(documents):
    batches = pipelines.training_batches(documents, length=8, batch_size=7, seed=1)
    count = pipelines.rows_per_epoch(documents, length=8)
    assert count % 7
    rows = {name: np.concatenate([batches[step][name] for step in range(count)]) for name in batches[0]}  # 7 epochs of rows
    for epoch in range(7):
        tokens = rows['tokens'][epoch * count : (epoch + 1) * count]
        assert sorted(tokens[tokens > 0]) == list(range(1, TOTAL + 1))
    assert rows['weights'].sum() == 7 * TARGETS


def test_resuming_at_every_step_is_exact(documents):
    """R5: within an epoch and across its end."""
    assert 4 < pipelines.rows_per_epoch(documents, length=8, grid=2) < 10 * 4
    batches = pipelines.training_batches(documents, length=8, batch_size=4, grid=2, seed=2)
    iterator = pipelines.batch_iterator(batches)
    states, expected = [], []
    for _ in range(20):
        states.append(json.loads(json.dumps(iterator.get_state())))
        expected.append(next(iterator))
    for step in range(20):
        resumed = pipelines.batch_iterator(batches, start=step)
        for batch in expected[step:]:
            assert_same(next(resumed), batch)
        resumed.set_state(states[step // 2])
        assert_same(next(resumed), expected[step // 2])
        assert_same(batches[step], expected[step])


def test_iterator_passes_grains_own_check(documents):
    batches = pipelines.evaluation_batches(documents, length=16, batch_size=4)
    grain.experimental.assert_equal_output_after_checkpoint(batches.to_iter_dataset())


@pytest.mark.parametrize(('length', 'grid', 'batch_size'), [(16, 1, 4), (16, 16, 5), (9, 1, 3), (512, 1, 2)])
def test_evaluation_counts_every_target_once(documents, length, grid, batch_size):
    batches = list(pipelines.evaluation_batches(documents, length=length, batch_size=batch_size, grid=grid))
    assert {batch['tokens'].shape for batch in batches} == {(batch_size, length)}
    scored = np.concatenate([batch['targets'][batch['weights'] > 0] for batch in batches])
    assert len(scored) == len(set(scored)) == TARGETS
    assert (np.diff(scored) > 0).all()


def test_evaluation_of_the_first_tokens(documents):
    batches = list(pipelines.evaluation_batches(documents, length=16, batch_size=2, max_tokens=40))
    tokens = np.concatenate([batch['tokens'].ravel() for batch in batches])
    assert tokens[:48].tolist() == list(range(1, 49))
    assert not tokens[48:].any()
    assert len(batches) == 2


@pytest.mark.parametrize('process_count', [2, 4])
def test_evaluation_is_shared_by_processes(documents, process_count):
    arguments = dict(length=16, batch_size=4)
    whole = pipelines.evaluation_batches(documents, **arguments)
    parts = [pipelines.evaluation_batches(documents, **arguments, share=share) for share in np.split(np.arange(4), process_count)]
    assert {len(part) for part in parts} == {len(whole)}
    for step in range(len(whole)):
        joined = {name: np.concatenate([part[step][name] for part in parts]) for name in whole[0]}
        assert_same(joined, whole[step])


def test_no_text_at_all():
    empty = TokenizedDocuments([np.zeros(0)], np.dtype(np.uint8))
    with pytest.raises(ValueError, match='documents hold no tokens'):
        pipelines.evaluation_batches(empty, length=8, batch_size=1)


@pytest.mark.parametrize(
    ('changed', 'message'),
    [
        (dict(length=1), 'length=1; allowed: at least 2'),
        (dict(length=12, grid=8), 'length=12; allowed: multiples of the grid 8'),
        (dict(grid=0), 'multiples of the grid 0'),
        (dict(seed=-1), 'seed=-1; allowed: 0 to 4294967295'),
        (dict(batch_size=0), 'batch_size=0; allowed: at least 1'),
        (dict(share=()), r'share=\(\); allowed: some of the rows 0 to 3, ascending'),
        (dict(share=(2, 4)), r'share=\(2, 4\); allowed: some of the rows 0 to 3'),
        (dict(share=(1, 0)), r'share=\(1, 0\)'),
        (dict(share=(1, 1)), r'share=\(1, 1\)'),
        (dict(share=(-1, 1)), r'share=\(-1, 1\)'),
        (dict(batch_size=1000), f'batch_size=1000: {TOTAL} tokens fill 34 rows of length=8; allowed: at most 34'),
    ],
)
def test_what_is_not_allowed(documents, changed, message):
    with pytest.raises(ValueError, match=message):
        pipelines.training_batches(documents, **(dict(length=8, batch_size=4) | changed))


def test_what_iterators_and_evaluations_do_not_allow(documents):
    """R5: a start before the first."""
    batches = pipelines.training_batches(documents, length=8, batch_size=4)
    with pytest.raises(ValueError, match='start=-1; allowed: at least 0'):
        pipelines.batch_iterator(batches, start=-1)
    with pytest.raises(ValueError, match='threads=0, prefetch=8'):
        pipelines.batch_iterator(batches, threads=0)
    with pytest.raises(ValueError, match='max_tokens=0; allowed: at least 1'):
        pipelines.evaluation_batches(documents, length=8, batch_size=4, max_tokens=0)
