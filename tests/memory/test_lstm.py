"""The LSTM against flax's cell."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nested_jax.memory.lstm import GATES, LSTMState, lstm

WIDTH, LENGTH = 6, 15


def _parts(seed=0):
    rng = np.random.default_rng(seed)
    x, kernel, recurrent = (rng.normal(size=shape) for shape in ((2, LENGTH, 4), (4, GATES * WIDTH), (WIDTH, GATES * WIDTH)))
    return x, kernel, recurrent, rng.normal(size=GATES * WIDTH)


def _flax(x, kernel, recurrent, bias):
    cell, params = nn.OptimizedLSTMCell(WIDTH), {}
    parts = (np.split(part, GATES, axis=-1) for part in (kernel, recurrent, bias))
    for gate, into, back, shift in zip('ifgo', *parts, strict=True):
        params |= {f'i{gate}': {'kernel': into}, f'h{gate}': {'kernel': back, 'bias': shift}}

    def step(carry, x):
        return cell.apply({'params': params}, carry, x)

    zeros = jnp.zeros((x.shape[0], WIDTH))
    (memory, hidden), y = jax.lax.scan(step, (zeros, zeros), jnp.moveaxis(x, 1, 0))
    return jnp.moveaxis(y, 0, 1), LSTMState(memory, hidden)


def test_it_is_the_cell_of_flax(x64):
    x, kernel, recurrent, bias = _parts()
    ours = jax.jit(lstm)(x @ kernel + bias, recurrent)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(jax.jit(_flax)(x, kernel, recurrent, bias)), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-12)


def test_documents_start_from_zeros_and_a_stream_may_be_cut_anywhere(x64):
    x, kernel, recurrent, bias = _parts()
    rows, ids = jnp.asarray(x @ kernel + bias), np.array([[1] * 4 + [2] * 11, [1] * 9 + [2, 1] + [3] * 4], np.int32)
    run = jax.jit(lambda rows, state, ids: lstm(rows, recurrent, state=state, segment_ids=ids))
    expected, last = run(rows, None, ids)
    alone, _ = run(rows[:, 9:10], None, ids[:, 9:10])
    np.testing.assert_allclose(expected[1, 9], alone[1, 0], rtol=0, atol=1e-12)
    state, parts = None, []
    for start, stop in ((0, 4), (4, 5), (5, 15)):
        if start == 4:  # what the model does where a document ends with a call
            state = jax.tree.map(lambda leaf: leaf.at[0].set(0.0), state)
        y, state = run(rows[:, start:stop], state, ids[:, start:stop])
        parts.append(y)
    np.testing.assert_allclose(jnp.concatenate(parts, 1), expected, rtol=0, atol=1e-12)
    np.testing.assert_allclose(state.memory, last.memory, rtol=0, atol=1e-12)


def test_a_cell_counts_at_most_its_tokens():
    """No other bound holds: gates near one make a counter."""
    rows = jnp.full((1, 300, GATES), 20.0)
    hidden, state = jax.jit(lstm)(rows, jnp.zeros((1, GATES)))
    assert 299 < float(state.memory[0, 0]) <= 300 and float(jnp.abs(hidden).max()) <= 1


def test_a_recurrent_matrix_of_another_shape_is_named():
    with pytest.raises(ValueError, match='recurrent'):
        lstm(jnp.zeros((1, 3, 8)), jnp.zeros((8, 2)))
