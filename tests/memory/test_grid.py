"""The layout of tokens on a chunk grid against plain Python lists."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nested_jax.memory import grid

SIZE = 4


def _call(tokens, opened=None, position=None):
    """Chunks, complete flags, the tokens gathered back, and the open chunk after the call."""
    length = tokens.shape[1]
    laid = grid.lay_out(tokens, SIZE, opened, position)
    return laid.chunks, laid.complete, grid.gather_outputs(laid, laid.chunks, length), grid.open_chunk(laid, length)


@pytest.mark.parametrize('length', [1, 3, 4, 5, 8, 11])
def test_a_first_call_starts_on_the_grid(length):
    tokens = np.arange(2 * length * 3).reshape(2, length, 3) + 1
    chunks, complete, back, opened = jax.jit(_call)(jnp.asarray(tokens))
    rows = np.moveaxis(np.asarray(chunks), 0, 1).reshape(2, -1, 3)
    assert rows.shape[1] == -(-length // SIZE) * SIZE
    np.testing.assert_array_equal(rows[:, :length], tokens)
    np.testing.assert_array_equal(back, tokens)
    ends = [(n + 1) * SIZE <= length for n in range(chunks.shape[0])]
    assert (complete is None) == all(ends)
    if complete is not None:
        np.testing.assert_array_equal(complete, np.array(ends)[:, None] & np.ones((1, 2), bool))
    left = length % SIZE
    np.testing.assert_array_equal(opened[:, :left], tokens[:, length - left :])


@pytest.mark.parametrize('length', [1, 3, 4, 6, 9])
def test_a_later_call_continues_each_rows_open_chunk(length):
    stream = np.arange(SIZE * 40).reshape(SIZE, 40) + 1
    position = np.array([4, 5, 6, 7])  # all four phases, one a row
    rows = range(SIZE)
    before = np.zeros((SIZE, SIZE), int)
    for row in rows:
        before[row, : position[row] % SIZE] = stream[row, SIZE : position[row]]
    tokens = np.stack([stream[row, position[row] : position[row] + length] for row in rows])
    chunks, complete, back, opened = jax.jit(_call)(jnp.asarray(tokens), jnp.asarray(before), jnp.asarray(position, jnp.int32))
    np.testing.assert_array_equal(back, tokens)
    flat = np.moveaxis(np.asarray(chunks), 0, 1).reshape(SIZE, -1)
    for row in rows:
        end = position[row] + length
        np.testing.assert_array_equal(flat[row, : end - SIZE], stream[row, SIZE:end])
        np.testing.assert_array_equal(complete[:, row], [SIZE + (n + 1) * SIZE <= end for n in range(chunks.shape[0])])
        np.testing.assert_array_equal(opened[row, : end % SIZE], stream[row, end - end % SIZE : end])


def test_no_state_and_an_empty_state_lie_alike():
    tokens = jnp.arange(2 * 7).reshape(2, 7)
    first = jax.jit(_call)(tokens)
    second = jax.jit(_call)(tokens, jnp.zeros((2, SIZE), int), jnp.zeros(2, jnp.int32))
    np.testing.assert_array_equal(first[2], second[2])
    np.testing.assert_array_equal(first[3][:, :3], second[3][:, :3])
    np.testing.assert_array_equal(first[1], second[1][:2])


def test_pytrees_keep_their_structure_and_dtype():
    tokens = {'x': jnp.ones((1, 5, 2), jnp.float32), 'ids': jnp.ones((1, 5), jnp.int32), 'none': None}
    laid = grid.lay_out(tokens, SIZE)
    assert laid.chunks['none'] is None
    assert laid.chunks['x'].shape == (2, 1, SIZE, 2) and laid.chunks['x'].dtype == jnp.float32
    assert laid.chunks['ids'].shape == (2, 1, SIZE) and laid.chunks['ids'].dtype == jnp.int32
    assert grid.open_chunk(laid, 5)['x'].shape == (1, SIZE, 2)


def test_documents_start_where_the_id_changes_at_a_chunks_first_token():
    ids = jnp.array([[1, 1, 1, 1, 2, 2, 2, 2, 2, 3, 3, 3], [5, 5, 5, 5, 5, 5, 5, 5, 0, 0, 0, 0]])
    laid = grid.lay_out(ids, SIZE)
    np.testing.assert_array_equal(grid.starts_document(laid.chunks).T, [[False, True, False], [False, False, True]])
    np.testing.assert_array_equal(grid.starts_document(laid.chunks[:1]), [[False, False]])


def test_where_rows_chooses_whole_rows_of_a_pytree():
    new, old = {'a': jnp.ones((2, 3, 4)), 'b': jnp.ones(2)}, {'a': jnp.zeros((2, 3, 4)), 'b': jnp.zeros(2)}
    chosen = grid.where_rows(jnp.array([True, False]), new, old)
    np.testing.assert_array_equal(chosen['a'].sum((1, 2)), [12, 0])
    np.testing.assert_array_equal(chosen['b'], [1, 0])


@pytest.mark.parametrize('time', [1, 3, 4, 6, 9])
def test_pieces_end_where_segments_do(time):
    stream = np.arange(SIZE * 40).reshape(SIZE, 40) + 1
    position = np.array([4, 5, 6, 7])  # all four phases, one a row
    tokens = jnp.asarray(np.stack([row[start : start + time] for row, start in zip(stream, position, strict=True)]))
    pieces = jax.jit(lambda tokens, position: grid.cut_pieces(tokens, SIZE, position))(tokens, position)
    np.testing.assert_array_equal(grid.join_pieces(pieces, pieces.rows[..., None], time)[..., 0], tokens)
    for row, start in enumerate(position):
        cuts = [start, *(place for place in range(start + 1, start + time) if place % SIZE == 0), start + time]
        expected = [stream[row, a:b].tolist() for a, b in zip(cuts[:-1], cuts[1:], strict=True)]
        lengths = pieces.lengths[:, row].tolist()
        assert lengths == [len(piece) for piece in expected] + [0] * (len(lengths) - len(expected))
        assert [pieces.rows[i, row, :length].tolist() for i, length in enumerate(lengths)][: len(expected)] == expected
        assert pieces.phase[:, row].tolist() == [place % SIZE for place in cuts[:-1]] + [cuts[-1] % SIZE] * (len(lengths) - len(expected))


@pytest.mark.parametrize('time', [3, 8, 9])
def test_pieces_of_a_first_call_are_segments(time):
    tokens = jnp.arange(2 * time).reshape(2, time)
    pieces = grid.cut_pieces(tokens, SIZE)
    assert pieces.phase is None and pieces.place is None
    assert pieces.rows.shape == (-(-time // SIZE), 2, min(time, SIZE))
    if time == 9:
        np.testing.assert_array_equal(pieces.lengths, [[4, 4], [4, 4], [1, 1]])
    else:
        assert pieces.lengths is None
    np.testing.assert_array_equal(grid.join_pieces(pieces, pieces.rows, time), tokens)
