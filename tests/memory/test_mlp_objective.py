"""The deep memory written by the dot product with its values (DLA), against its rule written out in numpy.

Nothing to compare with is published: the rule is that of a secondary source, a forget gate and plain gradient descent on -M(k).v.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nested_jax.memory.mlp import MLPWeights, mlp_memory
from tests.memory.test_mlp import compare_with_reference, random_call, run


def silu(z):
    gate = 1 / (1 + np.exp(-z))
    return z * gate, gate * (1 + z * (1 - gate))


def deep_linear_attention(call: dict, damping: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One head, token by token: W_t = alpha_t W_{t-1} - eta_t d/dW (-M(k_t).v_t), gradients at the chunk's first weights, damped."""
    w_in, w_out = (np.array(w[0]) for w in call['initial'])
    outputs = []
    for t in range(call['q'].shape[1]):
        if t % size == 0:
            first_in, first_out = w_in, w_out
        q, k, v, eta, log_alpha = (np.array(call[name][0, t, 0]) for name in ('q', 'k', 'v', 'eta', 'log_alpha'))
        h, slope = silu(k @ first_in)
        gradient_in, gradient_out = -np.outer(k, slope * (first_out @ v)), -np.outer(h, v)
        rate_in = eta / (1 + damping[t] * np.sum((slope[:, None] * first_out) ** 2))
        rate_out = eta / (1 + damping[t] * np.sum(h**2))
        w_in = np.exp(log_alpha) * w_in - rate_in * gradient_in
        w_out = np.exp(log_alpha) * w_out - rate_out * gradient_out
        outputs.append(silu(q @ w_in)[0] @ w_out)
    return np.stack(outputs), w_in, w_out


def test_dot_products_write_deep_linear_attention(x64):
    call = random_call(11, batch=1, dgd='none', momentum=False)
    damping = np.random.default_rng(1).uniform(size=11)
    given = call | {'damping': jnp.broadcast_to(jnp.asarray(damping)[None, :, None], (1, 11, 2))}
    y, state = run(given, chunk_size=4, dgd='none', residual=False, objective='dot')
    expected = deep_linear_attention(call, damping, 4)
    for got, want in zip((y[0, :, 0], *(w[0, 0] for w in state.running)), expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_chunked_dot_products_equal_the_reference(x64):
    compare_with_reference('none', True, 'running', 'init', True, time=7, chunk_size=3, objective='dot')


def test_the_dot_product_does_not_look_at_what_is_stored(x64):
    """One step from two memories that differ in W_out adds the same to W_out."""
    call = random_call(1, batch=1, dgd='none', momentum=False)
    moved = call | {'initial': MLPWeights(call['initial'].w_in, call['initial'].w_out + 1.0)}
    alpha = jnp.exp(call['log_alpha'][0, 0, 0])
    steps = [
        run(case, chunk_size=1, dgd='none', objective='dot')[1].running.w_out[0, 0] - alpha * case['initial'].w_out[0]
        for case in (call, moved)
    ]
    np.testing.assert_allclose(*steps, atol=1e-12)


def test_an_unknown_objective_is_named():
    call = jax.tree.map(jnp.asarray, random_call(1, momentum=False))
    with pytest.raises(ValueError, match=r"objective is 'l1'.*'dot'"):
        mlp_memory(**call, objective='l1')
