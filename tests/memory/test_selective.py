"""The selective scan against its token-by-token twin, its equations in numpy, and Mamba-2's reference, which is a special case of it."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nested_jax.memory.selective import selective_scan, selective_scan_reference

BATCH, LENGTH, CHANNELS, SIZE = 2, 37, 5, 3
ONE = np.zeros((BATCH, LENGTH), np.int32)
IDS = np.array([[1] * 9 + [2] * 1 + [1] * 27, [4] * 8 + [5] * 16 + [6] * 13], np.int32)


def _inputs(length=LENGTH, seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape))
    x, b, c = draw(BATCH, length, CHANNELS), draw(BATCH, length, SIZE), draw(BATCH, length, SIZE)
    dt, rate = jax.nn.softplus(draw(BATCH, length, CHANNELS)), jnp.exp(draw(SIZE, CHANNELS))
    return dict(x=x, dt=dt, rate=rate, b=b, c=c, state=draw(BATCH, SIZE, CHANNELS))


def _equations(x, dt, rate, b, c, state, segment_ids):
    """Eq. (2a), (2b) and Algorithm 2, arXiv:2312.00752v2, with the Euler step dt B of the authors' implementation, for A = -rate."""
    h, y = np.array(state), np.zeros(x.shape)
    for row in range(x.shape[0]):
        for t in range(x.shape[1]):
            if t and segment_ids[row, t] != segment_ids[row, t - 1]:
                h[row] = 0
            for d in range(x.shape[2]):
                h[row, :, d] = np.exp(-dt[row, t, d] * rate[:, d]) * h[row, :, d] + dt[row, t, d] * b[row, t] * x[row, t, d]
                y[row, t, d] = c[row, t] @ h[row, :, d]
    return y, h


_chunked = jax.jit(functools.partial(selective_scan, chunk_size=8))


@functools.cache
def _graded(scan):
    """Jitted (inputs, ids) -> values and gradients of a loss that sees both outputs."""

    def loss(inputs, segment_ids):
        y, state = scan(**inputs, segment_ids=segment_ids, chunk_size=8)
        return jnp.sin(y).sum() + jnp.cos(state).sum(), (y, state)

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def test_chunks_equal_the_reference_and_the_equations(x64):
    inputs = _inputs()
    for segment_ids in (ONE, IDS):
        (_, expected), gradients = _graded(selective_scan_reference)(inputs, segment_ids)
        for a, b in zip(expected, _equations(**jax.tree.map(np.asarray, inputs), segment_ids=segment_ids), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-12)
        (_, outputs), chunked = _graded(selective_scan)(inputs, segment_ids)
        for a, b in zip(jax.tree.leaves((outputs, chunked)), jax.tree.leaves((expected, gradients)), strict=True):
            assert a.dtype == jnp.float64
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-11)
    for a, b in zip(_chunked(**inputs), _graded(selective_scan)(inputs, ONE)[0][1], strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize(('dtype', 'tolerance'), [(jnp.float64, 1e-9), (jnp.float32, 1e-5)])
def test_mamba_2_is_the_case_of_one_rate_for_each_head(x64, shared_data, dtype, tolerance):
    with np.load(shared_data / 'golden' / 'mamba2_ssd.npz') as arrays:
        data = {name: jnp.asarray(arrays[name], dtype) for name in ('x', 'dt', 'A', 'B', 'C', 'o', 'ht')}
    for head in range(2):
        rate = jnp.full((16, 32), -data['A'][head], dtype)
        dt = jnp.broadcast_to(data['dt'][:, :, head, None], (2, 128, 32))
        y, state = _chunked(data['x'][:, :, head], dt, rate, data['B'][:, :, head], data['C'][:, :, head])
        for a, b in ((y, data['o'][:, :, head]), (jnp.swapaxes(state, 1, 2), data['ht'][:, head])):
            assert a.dtype == dtype and float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b)) < tolerance


def test_a_stream_may_be_cut_anywhere(x64):
    inputs = _inputs()
    for segment_ids in (ONE, IDS):
        expected, last = _chunked(**inputs, segment_ids=segment_ids)
        state, parts, done = inputs['state'], [], 0
        for length in (5, 1, 8, 1, 1, 16, 5):
            ids = segment_ids[:, done : done + length]
            begins = done > 0 and segment_ids[:, done] != segment_ids[:, done - 1]
            state = jnp.where(jnp.broadcast_to(begins, BATCH)[:, None, None], 0.0, state)
            piece = {name: inputs[name][:, done : done + length] for name in ('x', 'dt', 'b', 'c')}
            y, state = _chunked(**piece, rate=inputs['rate'], state=state, segment_ids=ids)
            parts.append(y)
            done += length
        np.testing.assert_allclose(np.concatenate(parts, 1), expected, rtol=0, atol=1e-12)
        np.testing.assert_allclose(state, last, rtol=0, atol=1e-12)


def test_a_step_of_zero_writes_nothing_and_steps_of_any_size_stay_finite(x64):
    inputs = _inputs()
    still = _chunked(**inputs | dict(dt=0 * inputs['dt']))
    np.testing.assert_array_equal(still[1], inputs['state'])
    np.testing.assert_allclose(still[0], jnp.einsum('bnd,btn->btd', inputs['state'], inputs['c']), rtol=0, atol=1e-12)
    for factor in (1e4, 1e-6):
        values, gradients = _graded(selective_scan)(inputs | dict(rate=inputs['rate'] * factor), IDS)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((values, gradients)))


def test_states_are_bounded_by_what_is_written(x64):
    """|h| <= max |b x| dt / (1 - exp(-dt rate)): a decay of e and a write of at most (1 - e) of the bound keep it."""
    inputs = _inputs(600, seed=1) | dict(state=None)
    inputs['rate'] = jnp.ones_like(inputs['rate'])
    _, state = _chunked(**inputs)
    step = inputs['dt'] / -jnp.expm1(-inputs['dt'])
    written = jnp.abs(inputs['b'][:, :, :, None] * (inputs['x'] * step)[:, :, None])
    assert 0.1 < float((jnp.abs(state) / written.max(1)).max()) <= 1


def test_low_precision_inputs_give_float32_states():
    inputs = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), _inputs())
    y, state = jax.eval_shape(selective_scan, inputs['x'].astype(jnp.bfloat16), *(inputs[name] for name in ('dt', 'rate', 'b', 'c')))
    assert y.dtype == state.dtype == jnp.float32


def test_the_backward_pass_keeps_no_state_of_every_token():
    length, shape = 512, jax.ShapeDtypeStruct
    rows, keys = shape((1, length, 24), jnp.float32), shape((1, length, 16), jnp.float32)
    largest = {}
    for scan in (selective_scan, selective_scan_reference):
        keep = jax.eval_shape(lambda *inputs, scan=scan: jax.vjp(scan, *inputs)[1], rows, rows, shape((16, 24), jnp.float32), keys, keys)
        largest[scan] = max(math.prod(leaf.shape) for leaf in jax.tree.leaves(keep))
    assert largest[selective_scan_reference] >= length * 16 * 24
    assert largest[selective_scan] <= max(length * 24, length // 32 * 16 * 24)


def test_arguments_that_do_not_fit_are_named():
    good = _inputs() | dict(state=None)
    for name, array in (('x', good['x'][0]), ('dt', good['dt'][:, 1:]), ('rate', good['rate'][:, 1:]), ('b', good['b'][..., 1:])):
        with pytest.raises(ValueError, match=name):
            selective_scan(**good | {name: array})
    with pytest.raises(ValueError, match='state'):
        selective_scan(**good | dict(state=jnp.zeros((1, SIZE, CHANNELS))))
    with pytest.raises(ValueError, match='chunk_size'):
        selective_scan(**good, chunk_size=0)
