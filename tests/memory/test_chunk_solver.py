"""The triangular solver and the decay products of a chunk, in float32 against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nested_jax.memory import chunk as chunks

SIZE, DIM = 64, 32


def system(case: str) -> np.ndarray:
    """(3, C, C) strictly lower triangular beta_t k_t.k_j, float32, for keys of a given cosine."""
    rng = np.random.default_rng(0)
    cosine, beta = {'random': (0.0, 0.9), '0.5': (0.5, 0.9), '0.9': (0.9, 0.9), 'near-equal': (1 - 1e-6, 1.9)}[case]
    keys = np.sqrt(cosine) * rng.normal(size=(3, 1, DIM)) + np.sqrt(1 - cosine) * rng.normal(size=(3, SIZE, DIM))
    keys /= np.linalg.norm(keys, axis=-1, keepdims=True)
    return np.tril(beta * keys @ keys.swapaxes(-1, -2), -1).astype(np.float32)


@pytest.mark.parametrize('method', ['_invert_by_substitution', '_invert_by_doubling'])
@pytest.mark.parametrize('case', ['random', '0.5', '0.9', 'near-equal'])
def test_inverse_of_full_chunks(method, case):
    strict = system(case)
    expected = np.linalg.inv(np.eye(SIZE) + strict.astype(np.float64))
    got = getattr(chunks, method)(jnp.asarray(strict))
    assert np.linalg.norm(got - expected) / np.linalg.norm(expected) < 1e-5


@pytest.mark.parametrize('case', ['0.9', 'near-equal'])
def test_solution_and_its_derivative(case):
    """The written-out derivatives, in float32, against the formula in float64."""
    strict, rng = system(case), np.random.default_rng(1)
    rows, weights = (rng.normal(size=(3, SIZE, 5)).astype(np.float32) for _ in range(2))
    solved, pull = jax.vjp(chunks.solve_unit_lower, jnp.asarray(strict), jnp.asarray(rows))
    got = (solved, *pull(jnp.asarray(weights)))
    inverse = np.linalg.inv(np.eye(SIZE) + strict.astype(np.float64))
    exact = inverse @ rows
    back = inverse.swapaxes(-1, -2) @ weights
    expected = (exact, -np.tril(back @ exact.swapaxes(-1, -2), -1), back)
    for a, b in zip(got, expected, strict=True):
        assert np.linalg.norm(a - b) / np.linalg.norm(b) < 1e-5


@pytest.mark.parametrize('low', [-60.0, -1e3, -np.inf])
def test_products_of_decays_near_zero_and_one(low):
    """Spans that do not contain the small factor keep their digits; those that do vanish; nothing is NaN."""
    log_alpha = np.full((1, SIZE), -1e-5, np.float32)
    log_alpha[0, 10::20] = low
    decays = chunks.chunk_decays(jnp.asarray(log_alpha))
    wide = np.maximum(log_alpha[0].astype(np.float64), -1e4)
    exponents = np.array([[wide[j + 1 : t + 1].sum() if j <= t else -np.inf for j in range(SIZE)] for t in range(SIZE)])
    np.testing.assert_allclose(decays.spans[0], np.exp(exponents), rtol=2e-5, atol=1e-12)
    np.testing.assert_allclose(decays.kept[0], np.exp(np.cumsum(wide)), rtol=2e-5, atol=1e-12)
    grad = jax.grad(lambda g: jnp.sum(chunks.chunk_decays(g).spans))(jnp.asarray(log_alpha))
    assert np.isfinite(grad).all()
