"""The self-referential weight matrix against its equations, written out in numpy."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nested_jax.memory.srwm import RATES, srwm

BATCH, LENGTH, HEADS, WIDTH, OUT = 2, 21, 3, 4, 5
IDS = np.array([[1] * 9 + [2] * 1 + [1] * 11, [4] * 8 + [5] * 13], np.int32)


def _inputs(seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(BATCH, LENGTH, HEADS, WIDTH)), rng.normal(size=(HEADS, WIDTH, OUT + 2 * WIDTH + RATES))


def _softmax(x):
    return np.exp(x) / np.exp(x).sum()


def _equations(x, initial, segment_ids):
    """One row and head: W of (d_out + 2 d_in + 4, d_in), rows in the order y, q, k, beta.

    Eq. (5) to (8), arXiv:2202.05780v2, with x_t for phi(x_t). The rule agrees with the authors' own plain test of their kernel
    (IDSIA/modern-srwm); the numbers of the equations are from a secondary source, the paper itself was not at hand.
    """
    w, outputs = initial.T.copy(), []
    rows = np.split(np.arange(len(w)), np.cumsum([OUT, WIDTH, WIDTH]))
    for t, x_t in enumerate(x):
        if t and segment_ids[t] != segment_ids[t - 1]:
            w = initial.T.copy()
        y, q, k, beta = (w[part] @ x_t for part in rows)
        v_bar, v = w @ _softmax(k), w @ _softmax(q)
        w = w.copy()
        for part, rate in zip(rows, 1 / (1 + np.exp(-beta)), strict=True):
            w[part] += rate * np.outer(v[part] - v_bar[part], _softmax(k))
        outputs.append(y)
    return np.stack(outputs), w.T


def test_the_recurrence_is_that_of_the_equations(x64):
    x, initial = _inputs()
    run = jax.jit(functools.partial(srwm, chunk_size=4))
    for segment_ids in (np.zeros_like(IDS), IDS):
        y, state = run(x, initial, segment_ids=segment_ids)
        for row in range(BATCH):
            for head in range(HEADS):
                expected, last = _equations(x[row, :, head], initial[head], segment_ids[row])
                np.testing.assert_allclose(y[row, :, head], expected, rtol=0, atol=1e-12)
                np.testing.assert_allclose(state[row, head], last, rtol=0, atol=1e-12)


@pytest.mark.slow
def test_gradients_are_those_of_finite_differences_and_do_not_depend_on_chunks(x64):
    x, initial = _inputs()
    rng, step = np.random.default_rng(1), 1e-5
    direction = rng.normal(size=x.shape), rng.normal(size=initial.shape)

    def loss(x, initial, chunk_size):
        y, state = srwm(x, initial, segment_ids=IDS, chunk_size=chunk_size)
        return jnp.sin(y).sum() + jnp.cos(state).sum()

    run = {size: jax.jit(jax.value_and_grad(functools.partial(loss, chunk_size=size), argnums=(0, 1))) for size in (4, 64)}
    gradients = {size: evaluate(x, initial)[1] for size, evaluate in run.items()}
    for a, b in zip(gradients[4], gradients[64], strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-12)
    ahead, behind = (run[4](*(a + sign * step * d for a, d in zip((x, initial), direction, strict=True)))[0] for sign in (1, -1))
    slope = sum((np.asarray(g) * d).sum() for g, d in zip(gradients[4], direction, strict=True))
    np.testing.assert_allclose(slope, (ahead - behind) / (2 * step), rtol=1e-6)


def test_tokens_that_are_not_valid_read_and_write_nothing(x64):
    x, initial = _inputs()
    y, state = jax.jit(srwm)(x, initial, valid=np.zeros((BATCH, LENGTH), bool))
    np.testing.assert_array_equal(state, np.broadcast_to(initial[None], state.shape))
    np.testing.assert_allclose(y, np.einsum('bthi,hio->btho', x, initial[..., :OUT]), rtol=0, atol=1e-12)


def test_the_backward_pass_keeps_no_matrix_of_every_token():
    x, initial = jax.ShapeDtypeStruct((1, 256, 2, 16), jnp.float32), jax.ShapeDtypeStruct((2, 16, 52), jnp.float32)
    keep = jax.eval_shape(lambda *inputs: jax.vjp(srwm, *inputs)[1], x, initial)
    assert max(math.prod(leaf.shape) for leaf in jax.tree.leaves(keep)) <= 256 // 32 * 2 * 16 * 52


def test_arguments_that_do_not_fit_are_named():
    x, initial = _inputs()
    with pytest.raises(ValueError, match='x must'):
        srwm(x[0], initial)
    with pytest.raises(ValueError, match='initial must'):
        srwm(x, initial[:, 1:])
    with pytest.raises(ValueError, match='valid must'):
        srwm(x, initial, valid=np.ones((BATCH, 3), bool))
    with pytest.raises(ValueError, match='chunk_size'):
        srwm(x, initial, chunk_size=0)
