"""States handed on from device to device, by a mixer that is a loop over tokens; and what is refused."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nested_jax.layers import sequence
from nested_jax.layers.common import Context
from nested_jax.training.compiled import collectives

LENGTH, ROWS, WIDTH = 8, 4, 3
# Documents that end between the stretches, in one, and after one token of one; an id that comes back is another document.
IDS = np.array([[0] * 8, [0] * 2 + [1] * 6, [0] * 3 + [1] * 3 + [2] * 2, [0] * 5 + [1] + [2] * 2], np.int32)
CASES = [({'sequence': 4}, None), ({'data': 2, 'sequence': 4}, IDS), ({'data': 2, 'sequence': 2}, IDS)]


def remember(decay, rows, state, context: Context):
    """A leaky sum of a document's rows, and its number of tokens; a state is of the document that the call's first one, 0, goes on with."""
    total, count = (jnp.zeros((rows.shape[0], WIDTH)), jnp.zeros(rows.shape[0])) if state is None else state
    ids = jnp.zeros(rows.shape[:2], jnp.int32) if context.segment_ids is None else context.segment_ids
    y = []
    for t in range(rows.shape[1]):
        begins = ids[:, t] != (ids[:, t - 1] if t else 0)
        total = jnp.where(begins[:, None], 0, total) * decay + jnp.tanh(rows[:, t])
        count = jnp.where(begins, 0, count) + 1
        y.append(jnp.concatenate([total**2, count[:, None]], 1))
    return jnp.stack(y, 1), (total, count)


def loss(decay, rows, *, hand_on):
    x, ids, weights = rows
    y = sequence.pass_state(remember, decay, x, ids) if hand_on else remember(decay, x, None, Context(None, ids, True))[0]
    return jnp.sum(y * weights)


@pytest.mark.parametrize(('sizes', 'ids'), CASES, ids=['one document', 'packed, of two rows', 'two stretches'])
def test_states_are_handed_on(sizes, ids):
    draw = np.random.default_rng(0)
    x, weights = draw.normal(size=(ROWS, LENGTH, WIDTH)), draw.normal(size=(ROWS, LENGTH, WIDTH + 1))
    decay, rows = jnp.float32(0.8), (x.astype(np.float32), ids, weights.astype(np.float32))
    gradient = lambda function: jax.jit(jax.value_and_grad(lambda decay, x: function(decay, (x, *rows[1:])), (0, 1)))
    expected, of_loop = gradient(functools.partial(loss, hand_on=False))(decay, rows[0])
    auto, devices = (jax.sharding.AxisType.Auto,) * len(sizes), jax.devices()[: math.prod(sizes.values())]
    mesh = jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=auto, devices=devices)
    split = lambda decay, rows: sequence.split(functools.partial(loss, hand_on=True), decay, rows, grid=1)
    with jax.set_mesh(mesh):
        compiled = gradient(split).lower(decay, rows[0]).compile()
        found, ours = compiled(decay, rows[0])
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-5), ours, of_loop)
    rounds = ROWS // sizes.get('data', 1) + sizes['sequence'] - 1
    permuted = [each for each in collectives(compiled.as_text()) if each.kind == 'collective-permute']
    assert {each.runs for each in permuted} == {rounds}
    assert {each.shapes[0][1] for each in permuted} == {(1,), (1, WIDTH)}  # each array counts, though all have one channel


def test_what_does_not_split_is_refused():
    with jax.set_mesh(jax.make_mesh((8,), ('sequence',), axis_types=(jax.sharding.AxisType.Auto,))):
        with pytest.raises(ValueError, match='the rows have 24 tokens, allowed is a multiple of sequence x grid = 8 x 4'):
            sequence.split(lambda params, rows: jnp.sum(rows), None, jnp.zeros((2, 24)), grid=4)
        before = lambda params, x: jnp.sum(sequence.tokens_before(x, None, 3))
        with pytest.raises(ValueError, match='a device along sequence has 2 tokens, allowed are at least 3'):
            jax.jit(lambda x: sequence.split(before, None, x, grid=1))(jnp.zeros((2, 16, 1)))
