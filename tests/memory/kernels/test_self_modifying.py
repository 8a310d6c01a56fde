"""TPU kernels of self-modifying memories against their plain-JAX twin, in interpret mode."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from nested_jax.memory.kernels import self_modifying as kernels
from nested_jax.memory.self_modifying import Inputs, Memories, Rule, self_modifying

BATCH, LENGTH, HEADS, WIDTH, HIDDEN, CHUNK = 2, 36, 2, 8, 5, 16
IDS = np.array([[1] * 16 + [2] * 20, [3] * 36])
BASE = dict(kind='matrix', gradient='token', decay_to='init', chunk_size=CHUNK, projection_chunk_size=CHUNK)
RULES = {
    'hope-linear': {},
    'chunk': dict(gradient='chunk', decay_to='zero'),
    'anchor': dict(gradient='chunk', read='anchor', dgd='none'),
    'no-dgd': dict(dgd='none', decay_to='zero'),
    'ablated': dict(retention=False, self_modified=('value', 'eta'), positive_eigenvalues=True),
    'matrix-momentum': dict(gradient='chunk'),
    'hope': dict(kind='mlp', gradient='chunk'),
    'mlp-anchor': dict(kind='mlp', gradient='chunk', read='anchor', decay_to='zero'),
    'mlp-input-only': dict(kind='mlp', gradient='chunk', dgd='input_only'),
    'mlp-no-dgd': dict(kind='mlp', gradient='chunk', dgd='none', decay_to='zero'),
}
MOMENTUM = 'matrix-momentum', 'hope', 'mlp-no-dgd'
MARKS = {'hope-linear': (), 'hope': pytest.mark.slow}


def arguments(kind: str = 'matrix', momentum: bool = False, length: int = LENGTH):
    """Inputs, scales and learned memories."""
    rng = np.random.default_rng(0)
    rows, gates = (BATCH, length, HEADS, WIDTH), (BATCH, length, HEADS)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    unit = lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True)
    inputs = Inputs(
        unit(normal(*rows)), unit(normal(*rows)), normal(*rows), normal(*gates), normal(*gates) - 2, normal(*gates) if momentum else None
    )
    if kind == 'matrix':
        return inputs, jnp.asarray([1.0, 3.0]), Memories(0.5 * normal(HEADS, WIDTH, 3 * WIDTH + 2), None, None)
    layers = normal(HEADS, WIDTH, 5 * HIDDEN), normal(HEADS, 3, HIDDEN, WIDTH), normal(HEADS, 2, HIDDEN, 1)
    return inputs, jnp.asarray([1.0, 3.0]), Memories(*layers)


def run(implementation: str, rule: Rule, given, **options):
    """Outputs, the state, and the gradients of a function of both."""

    def loss(given):
        inputs, scale, initial, state = given
        y, state = self_modifying(inputs, scale, initial, rule=rule, state=state, implementation=implementation, **options)
        weight = jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)
        return jnp.sum(weight * y) + sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(state[:2])), (y, state)

    with pltpu.force_tpu_interpret_mode():
        gradients, results = jax.jit(jax.grad(loss, has_aux=True))(given)
    return results, gradients


def close(got, expected):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * max(float(jnp.abs(b).max()), 1e-6))


@pytest.mark.parametrize('documents', [pytest.param(False, marks=pytest.mark.exhaustive), True])
@pytest.mark.parametrize('name', [pytest.param(name, marks=MARKS.get(name, pytest.mark.exhaustive)) for name in RULES])
def test_equals_twin_with_gradients(name, documents):
    rule = Rule(**(BASE | RULES[name]))
    given = *arguments(rule.kind, name in MOMENTUM), None
    options = dict(segment_ids=jnp.asarray(IDS)) if documents else {}
    close(run('pallas_tpu', rule, given, **options), run('jax', rule, given, **options))


@pytest.mark.parametrize('name', [pytest.param('hope-linear', marks=pytest.mark.exhaustive), pytest.param('hope', marks=pytest.mark.slow)])
def test_goes_on_from_a_state(name):
    """Four tokens into a chunk."""
    rule = Rule(**(BASE | RULES[name]))
    inputs, scale, initial = arguments(rule.kind, name in MOMENTUM)
    head, tail = (jax.tree.map(lambda x, part=part: x[:, part], inputs) for part in (slice(0, 20), slice(20, None)))
    before = self_modifying(head, scale, initial, rule=rule)[1]
    given, options = (tail, scale, initial, before), dict(position=jnp.full(BATCH, 20))
    found, gradients = run('pallas_tpu', rule, given, **options)
    close((found, gradients), run('jax', rule, given, **options))
    whole = self_modifying(inputs, scale, initial, rule=rule)[0]
    close(found[0], whole[:, 20:])


def test_tokens_that_write_nothing():
    """As in a call that reads only; the derivatives that are of use are finite."""
    inputs, scale, initial = arguments()
    never = jnp.full_like(inputs.eta, -jnp.inf)
    given = inputs._replace(eta=never, alpha=never), scale, initial, None
    found, gradients = run('pallas_tpu', Rule(**BASE), given)
    expected, twin_gradients = run('jax', Rule(**BASE), given)
    close((found[0], found[1].running), (expected[0], expected[1].running))
    close((gradients[0].query, gradients[2]), (twin_gradients[0].query, twin_gradients[2]))


@pytest.mark.parametrize(
    'changes', [dict(projection_chunk_size=8), dict(adaptive_query=True), dict(chunk_size=4), dict(matrix_memories=('key',))], ids=str
)
def test_what_they_do_not_take(changes):
    rule, (inputs, scale, initial) = Rule(**(BASE | changes)), arguments()
    assert kernels.fits('tpu', Rule(**BASE), initial) and not kernels.fits('tpu', rule, initial)
    with pytest.raises(
        ValueError, match="rule is .* allowed with implementation='pallas_tpu' is one chunk size, a multiple of 8, one kind"
    ):
        self_modifying(inputs, scale, initial, rule=rule, implementation='pallas_tpu')


def test_bad_implementation_and_dtype(x64):
    inputs, scale, initial = arguments()
    with pytest.raises(ValueError, match="implementation is 'triton', allowed is one of 'jax', 'pallas_tpu', 'pallas_gpu'"):
        self_modifying(inputs, scale, initial, rule=Rule(**BASE), implementation='triton')
    wide = initial._replace(first=initial.first.astype(jnp.float64))
    with pytest.raises(ValueError, match='initial has dtype float64, allowed with .* is at most float32'):
        self_modifying(inputs, scale, wide, rule=Rule(**BASE), implementation='pallas_tpu')
