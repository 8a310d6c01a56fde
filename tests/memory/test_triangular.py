"""The triangular solver, in float32 against float64, and in float64 its derivative."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nested_jax.memory import triangular

SIZE, DIM = 64, 32


def system(case: str) -> np.ndarray:
    """(3, C, C) strictly lower triangular beta_t k_t.k_j, float32, for keys of a given cosine."""
    rng = np.random.default_rng(0)
    cosine, beta = {'random': (0.0, 0.9), '0.5': (0.5, 0.9), '0.9': (0.9, 0.9), 'near-equal': (1 - 1e-6, 1.9)}[case]
    keys = np.sqrt(cosine) * rng.normal(size=(3, 1, DIM)) + np.sqrt(1 - cosine) * rng.normal(size=(3, SIZE, DIM))
    keys /= np.linalg.norm(keys, axis=-1, keepdims=True)
    return np.tril(beta * keys @ keys.swapaxes(-1, -2), -1).astype(np.float32)


@pytest.mark.parametrize('case', ['random', '0.5', '0.9', 'near-equal'])
def test_inverse_of_full_chunks(case):
    strict = system(case)
    expected = np.linalg.inv(np.eye(SIZE) + strict.astype(np.float64))
    got = triangular.invert_unit_lower(jnp.asarray(strict))
    assert np.linalg.norm(got - expected) / np.linalg.norm(expected) < 1e-5


@pytest.mark.parametrize('case', ['0.9', 'near-equal'])
def test_solution_and_its_derivative(case):
    """The written-out derivatives, in float32, against the formula in float64."""
    strict, rng = system(case), np.random.default_rng(1)
    rows, weights = (rng.normal(size=(3, SIZE, 5)).astype(np.float32) for _ in range(2))
    solved, pull = jax.vjp(triangular.solve_unit_lower, jnp.asarray(strict), jnp.asarray(rows))
    got = (solved, *pull(jnp.asarray(weights)))
    inverse = np.linalg.inv(np.eye(SIZE) + strict.astype(np.float64))
    exact = inverse @ rows
    back = inverse.swapaxes(-1, -2) @ weights
    expected = (exact, -np.tril(back @ exact.swapaxes(-1, -2), -1), back)
    for a, b in zip(got, expected, strict=True):
        assert np.linalg.norm(a - b) / np.linalg.norm(b) < 1e-5


@pytest.mark.parametrize('size', [1, 5, 8, 16, 48, 63])
@pytest.mark.parametrize('cosine', [0.0, 0.9])
def test_inverse_with_correlated_keys(size, cosine):
    """Float32 keeps six digits where power series overflow."""
    rng = np.random.default_rng(0)
    keys = np.sqrt(cosine) * rng.normal(size=(3, 1, 64)) / 8 + np.sqrt(1 - cosine) * rng.normal(size=(3, size, 64)) / 8
    strict = np.tril(0.9 * keys @ keys.swapaxes(-1, -2), -1).astype(np.float32)
    expected = np.linalg.inv(np.eye(size) + strict.astype(np.float64))
    np.testing.assert_allclose(triangular.invert_unit_lower(jnp.asarray(strict)), expected, atol=2e-6 * np.abs(expected).max())


def test_inverse_derivative(x64):
    strict = jnp.tril(jax.random.normal(jax.random.key(0), (2, 6, 6)), -1)
    weights = jax.random.normal(jax.random.key(1), (2, 6, 6))
    written_out = jax.grad(lambda s: jnp.sum(weights * triangular.invert_unit_lower(s)))(strict)
    stock = jax.grad(lambda s: jnp.sum(weights * jnp.linalg.inv(jnp.eye(6)[None] + s)))(strict)
    np.testing.assert_allclose(written_out, jnp.tril(stock, -1), atol=1e-11)


def test_no_lapack():
    """With its batched triangular solve a step of hope-tiny could wait for ever (jaxlib 0.10.2, two cores)."""
    program = jax.jit(jax.grad(lambda s: jnp.sum(triangular.solve_unit_lower(s, s)))).lower(jnp.zeros((2, 16, 16)))
    assert 'trsm' not in program.as_text() and 'triangular_solve' not in program.as_text()
