"""Damped steps of the deep memory, against one step written out in numpy."""

import jax.numpy as jnp
import numpy as np

from nested_jax.memory.mlp import MLPWeights, mlp_memory, mlp_memory_reference


def test_damping_divides_each_layers_rate(x64):
    """One token against the written-out step: W_in by the outputs' slope, W_out and its erasure by its input."""
    rng = np.random.default_rng(3)
    w_in, w_out, k, v = (3.0 * rng.normal(size=shape) for shape in ((4, 5), (5, 4), (4,), (4,)))
    eta, damping = 0.3, 0.7
    z = k @ w_in
    gate = 1 / (1 + np.exp(-z))
    h, slope = z * gate, gate * (1 + z * (1 - gate))
    error = h @ w_out - v
    rate_in = eta / (1 + damping * np.sum((slope[:, None] * w_out) ** 2))
    rate_out = eta / (1 + damping * np.sum(h**2))
    expected_in = w_in - eta * np.outer(k, k @ w_in) - rate_in * np.outer(k, slope * (w_out @ error))
    expected_out = w_out - rate_out * np.outer(h, h @ w_out) - rate_out * np.outer(h, error)
    row = lambda x: jnp.asarray(x)[None, None, None]
    for run in (mlp_memory, mlp_memory_reference):
        _, state = run(
            row(k), row(k), row(v), row(eta), row(0.0), damping=row(damping),
            initial=MLPWeights(jnp.asarray(w_in)[None], jnp.asarray(w_out)[None]), chunk_size=1, residual=False,
        )  # fmt: skip
        np.testing.assert_allclose(state.running.w_in[0, 0], expected_in, rtol=1e-12)
        np.testing.assert_allclose(state.running.w_out[0, 0], expected_out, rtol=1e-12)
