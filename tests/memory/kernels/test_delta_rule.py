"""TPU kernels of the delta rule and DGD against their plain-JAX twins, in interpret mode."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from nested_jax.memory import matrix
from nested_jax.memory.kernels import delta_rule as kernels

BATCH, TIME, HEADS, DIM_K, DIM_V, CHUNK = 2, 41, 2, 8, 6, 16

RULES = {
    'delta': ('delta_rule', {}),
    'dgd-l2': ('delta_gradient_descent', {'objective': 'l2'}),
    'dgd-dot': ('delta_gradient_descent', {'objective': 'dot'}),
}
STRESS = ('random', 'forgets', 'keeps', 'correlated')


def arguments(stress: str = 'random', time: int = TIME, dtype=jnp.float32):
    """q, k, v, gate, log decay and state; keys of norm 1."""
    rng = np.random.default_rng(0)
    rows = (BATCH, time, HEADS)
    k = rng.normal(size=(*rows, DIM_K)) * (0.05 if stress == 'correlated' else 1) + (stress == 'correlated')
    log_decay = -np.exp(rng.normal(size=rows) + {'forgets': 3, 'keeps': -9}.get(stress, 0))
    gate = rng.uniform(0.1, 0.9, size=rows) * (1 + np.exp(log_decay)) / 2
    tokens = rng.normal(size=(*rows, DIM_K)), k / np.linalg.norm(k, axis=-1, keepdims=True), rng.normal(size=(*rows, DIM_V))
    state = rng.normal(size=(BATCH, HEADS, DIM_K, DIM_V))
    return *(jnp.asarray(x, dtype) for x in tokens), *(jnp.asarray(x, jnp.float32) for x in (gate, log_decay, state))


@functools.partial(jax.jit, static_argnames=('module', 'rule'))
def run(module, rule: str, args):
    """y, the last state and the gradients of a random function of both."""
    name, options = RULES[rule]
    options = options | ({'interpret': True} if module is kernels else {})

    def loss(args):
        *tokens, state = args
        y, last = getattr(module, name)(*tokens, state=state, chunk_size=CHUNK, **options)
        weight = jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)
        return jnp.sum(weight * y) + jnp.sum(jnp.sin(last)), (y, last)

    gradients, outputs = jax.grad(loss, has_aux=True)(args)
    return outputs, gradients


def close(got, expected, tolerance: float):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        a, b = (np.asarray(x, np.float32) for x in (a, b))
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * max(np.abs(b).max(), 1e-6))


@pytest.mark.parametrize('stress', STRESS)
@pytest.mark.parametrize('rule', RULES)
def test_equals_twin_with_gradients(rule, stress):
    args = arguments(stress)
    close(run(kernels, rule, args), run(matrix, rule, args), 1e-4)


def test_bfloat16_as_exact_as_its_inputs():
    args = arguments(dtype=jnp.bfloat16)
    close(run(kernels, 'delta', args), run(matrix, 'delta', args), 2e-2)


def test_decay_to_nothing():
    *args, log_decay, state = arguments()
    args = (*args, log_decay.at[:, 20].set(-jnp.inf), state)
    outputs, gradients = run(kernels, 'dgd-l2', args)
    close(outputs, run(matrix, 'dgd-l2', args)[0], 1e-4)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradients))


def test_initial_state_shared_heads_and_erase():
    q, k, v, beta, _, state = arguments(time=16)
    options = dict(erase=0.5 * beta, initial=state[0], chunk_size=CHUNK)
    call = lambda module, **more: module.delta_rule(q[:, :, :1], k[:, :, :1], v, beta, **options, **more)
    close(call(kernels, interpret=True), call(matrix), 1e-4)


@pytest.mark.parametrize('decays', [True, False])
def test_segments_are_forgotten(decays):
    *args, log_decay, state = arguments()
    ids = jnp.asarray([[0] * 16 + [1] * 3 + [0] * 22, [4] * 41])
    weight = jnp.cos(jnp.arange(BATCH * TIME * HEADS * DIM_V, dtype=jnp.float32)).reshape(BATCH, TIME, HEADS, DIM_V)

    def loss(args, implementation):
        *tokens, decay, state = args
        decay = decay if decays else None
        y, last = matrix.delta_rule(*tokens, decay, state=state, segment_ids=ids, chunk_size=CHUNK, implementation=implementation)
        return jnp.sum(weight * y) + jnp.sum(jnp.sin(last))

    value = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    with pltpu.force_tpu_interpret_mode():
        got = value((*args, log_decay, state), 'pallas_tpu')
    close(got, value((*args, log_decay, state), 'jax'), 1e-4)


def test_bad_arguments():
    args = arguments()[:4]
    with pytest.raises(ValueError, match='chunk_size must be a multiple of 16, got 24'):
        kernels.delta_rule(*args, chunk_size=24)
    with pytest.raises(ValueError, match='q must be float32 or bfloat16, got float16'):
        kernels.delta_rule(args[0].astype(jnp.float16), *args[1:])
    with pytest.raises(ValueError, match='objective must be one of'):
        kernels.delta_gradient_descent(*args, args[3], objective='l1')


@pytest.mark.parametrize('rule', RULES)
def test_chosen_by_name(rule):
    name, options = RULES[rule]
    *args, state = arguments()

    def lowered(**more):
        call = lambda *args: getattr(matrix, name)(*args, state=state, chunk_size=CHUNK, **options, **more)
        return jax.jit(call).trace(*args).lower(lowering_platforms=('tpu',)).as_text()

    assert '@tpu_custom_call' in lowered(implementation='pallas_tpu')
    assert '@tpu_custom_call' not in lowered()


def test_bad_choice():
    args = arguments()[:5]
    with pytest.raises(ValueError, match="implementation must be one of .*, got 'triton'"):
        matrix.delta_rule(*args, implementation='triton')
    segments = dict(segment_ids=jnp.zeros((BATCH, TIME), int), implementation='pallas_tpu')
    with pytest.raises(ValueError, match='segment_ids must be None'):
        matrix.delta_rule(*args, initial=jnp.zeros((HEADS, DIM_K, DIM_V)), **segments)
    with pytest.raises(ValueError, match='segment_ids must be None'):
        matrix.delta_gradient_descent(*args, **segments)
    with pytest.raises(ValueError, match="takes gradient='token' and read='running', got 'chunk'"):
        matrix.delta_gradient_descent(*args, gradient='chunk', implementation='pallas_tpu')
