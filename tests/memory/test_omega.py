"""Atlas' memory: against the Omega rule written out in numpy, its loop over tokens, and what must hold by its equations.

No outputs of this model are published. The transcription is of the equations as secondary sources print them, with this package's readings
where those leave room (see `nested_jax/memory/omega.py`); it shares no code with it, derivatives and Newton-Schulz included.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nested_jax.config import MemoryConfig
from nested_jax.memory.mlp import MLPWeights
from nested_jax.memory.omega import OmegaGates, OmegaTokens, omega_memory, omega_memory_reference, polynomial_features
from nested_jax.models.presets import preset
from nested_jax.optim.orthogonalize import orthogonalize
from tests.memory.test_mlp import assert_trees_close

WIDTH, HIDDEN, HEADS = 3, 5, 2


def random_call(time: int, *, batch: int = 2):
    """(queries, tokens, gates, initial) at random; about half of the gradients are clipped."""
    rng = np.random.default_rng(0)
    rows, gate = (batch, time, HEADS, WIDTH), (batch, time, HEADS)
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
    features = lambda: np.asarray(polynomial_features(jnp.asarray(unit(rng.normal(size=rows)))))
    tokens = OmegaTokens(features(), unit(rng.normal(size=rows)), rng.uniform(0.2, 1.0, gate))
    gates = OmegaGates(rng.uniform(0.05, 0.25, gate), rng.uniform(0.1, 0.5, gate), *np.log(rng.uniform(0.6, 1.0, (2, *gate))))
    initial = MLPWeights(rng.normal(size=(HEADS, 2 * WIDTH, HIDDEN)), rng.normal(size=(HEADS, HIDDEN, WIDTH)))
    return jax.tree.map(jnp.asarray, (features(), tokens, gates, initial))


@functools.partial(jax.jit, static_argnames=('function', 'window', 'decay_to', 'chunk_size'))
def run(call, segment_ids=None, state=None, position=None, function=omega_memory, **options):
    extra = {} if function is omega_memory_reference else {'state': state, 'position': position}
    return function(*call, segment_ids=segment_ids, orthogonalize=orthogonalize, **options, **extra)


def silu(z):
    gate = 1 / (1 + np.exp(-z))
    return z * gate, gate * (1 + z * (1 - gate))


def newton_schulz(x):
    """Muon's five iterations, from X / |X|."""
    x = x / np.linalg.norm(x)
    for _ in range(5):
        gram = x @ x.T if x.shape[0] <= x.shape[1] else x.T @ x
        polynomial = -4.7750 * gram + 2.0315 * gram @ gram
        x = 3.4445 * x + (polynomial @ x if x.shape[0] <= x.shape[1] else x @ polynomial)
    return x


def clipped(gradient):
    return gradient / max(1.0, np.linalg.norm(gradient))


def gradients(weights, key, value):
    h, slope = silu(key @ weights[0])
    error = h @ weights[1] - value
    return clipped(np.outer(key, slope * (weights[1] @ error))), clipped(np.outer(h, error))


def transcription(call, window: int, size: int):
    """y, weights and momentum of head 0 of row 0: Eq. 9, 32 and 33, arXiv:2505.23735v1, weights changed at the end of each chunk."""
    queries, tokens, gates, initial = jax.tree.map(np.array, call)
    queries, key, value, gamma = queries[0, :, 0], tokens.key[0, :, 0], tokens.value[0, :, 0], tokens.gamma[0, :, 0]
    eta, push, log_alpha, log_beta = (gate[0, :, 0] for gate in gates)
    start = [w[0] for w in initial]
    weights, momentum, outputs = list(start), [np.zeros_like(w) for w in start], []
    for t in range(len(key)):
        outputs.append(silu(queries[t] @ weights[0])[0] @ weights[1])
        momentum = [np.exp(log_beta[t]) * s for s in momentum]
        for i in range(max(0, t - window + 1), t + 1):
            momentum = [s + push[t] * gamma[i] * g for s, g in zip(momentum, gradients(weights, key[i], value[i]), strict=True)]
        if t % size == size - 1:
            steps = [newton_schulz(s) for s in momentum]
            for j in range(t - size + 1, t + 1):
                alpha = np.exp(log_alpha[j])
                weights = [alpha * w + (1 - alpha) * r - eta[j] * s for w, r, s in zip(weights, start, steps, strict=True)]
    return np.stack(outputs), weights, momentum


@pytest.mark.parametrize('window', [3, *(pytest.param(window, marks=pytest.mark.slow) for window in (1, 5))])
def test_rule_is_the_equations(x64, window):
    """Windows of a single token, inside a chunk, and longer than a chunk."""
    call = random_call(12, batch=1)
    y, state = run(call, window=window, chunk_size=4)
    expected, weights, momentum = transcription(call, window, 4)
    np.testing.assert_allclose(y[0, :, 0], expected, rtol=1e-8, atol=1e-10)
    for got, want in zip((*state.memories.weights, *state.memories.momentum), (*weights, *momentum), strict=True):
        np.testing.assert_allclose(got[0, 0], want, rtol=1e-8, atol=1e-10)


def scalar(call, ids, function, **options):
    y = function(*call, segment_ids=ids, orthogonalize=orthogonalize, **options)
    y = y[0] if function is omega_memory else y
    return jnp.sum(jnp.sin(y) * jnp.arange(y.size).reshape(y.shape) / y.size), y


@functools.partial(jax.jit, static_argnames=('function', 'window', 'decay_to', 'chunk_size'))
def gradient(call, ids, function, **options):
    return jax.grad(scalar, has_aux=True)(call, ids, function, **options)


@pytest.mark.slow
@pytest.mark.parametrize('decay_to', ['zero', 'init'])
def test_chunked_equals_reference(x64, decay_to):
    call, ids = random_call(11), jnp.asarray([[1] * 4 + [2] * 7, [1] * 8 + [2] * 3])
    fast, slow = (
        gradient(call, ids, function, window=3, decay_to=decay_to, chunk_size=4) for function in (omega_memory, omega_memory_reference)
    )
    assert_trees_close(fast[1], slow[1], 1e-10)
    assert_trees_close(fast[0], slow[0], 1e-8)


@pytest.mark.slow
def test_a_stream_may_be_cut_inside_a_chunk(x64):
    call, options = random_call(11), dict(window=4, chunk_size=4)
    whole, last = run(call, **options)
    part = lambda begin, end: (*jax.tree.map(lambda x: x[:, begin:end], call[:3]), call[3])
    first, state = run(part(0, 6), **options)
    second, state = run(part(6, 11), state=state, position=jnp.full(2, 6), **options)
    np.testing.assert_allclose(jnp.concatenate([first, second], 1), whole, atol=1e-10)
    assert_trees_close(state[:2], last[:2], 1e-10)


@pytest.mark.slow
def test_each_chunk_moves_singular_values_by_about_its_rates(x64):
    """Without retention: all singular values of the move of W_out are 0.7 to 1.2 times the sum of eta."""
    queries, tokens, gates, initial = random_call(4, batch=1)
    gates = gates._replace(log_alpha=jnp.zeros_like(gates.log_alpha))
    _, state = run((queries, tokens, gates, initial), window=2, chunk_size=4)
    moved = jnp.linalg.svd(state.memories.weights.w_out[0] - initial.w_out, compute_uv=False)
    ratio = np.asarray(moved / gates.eta[0].sum(0)[:, None])
    assert (ratio > 0.6).all() and (ratio < 1.3).all(), ratio


def test_features_have_norm_one_and_are_powers(x64):
    x = jnp.asarray(np.random.default_rng(1).normal(size=(7, 4)))
    x /= jnp.linalg.norm(x, axis=-1, keepdims=True)
    features = polynomial_features(x)
    np.testing.assert_allclose(jnp.linalg.norm(features, axis=-1), 1, rtol=1e-5)
    wide = 2 * x  # channels of mean square one
    np.testing.assert_allclose(features[:, 4:] / features[:, :4], (wide**2 / 2) / wide, rtol=1e-10)


def test_wrong_arguments_are_named():
    queries, tokens, gates, initial = random_call(2)
    call = functools.partial(omega_memory, orthogonalize=orthogonalize, chunk_size=4)
    with pytest.raises(ValueError, match=r'window is 6.*chunk_size \+ 1, 5'):
        call(queries, tokens, gates, initial, window=6)
    with pytest.raises(ValueError, match=r'memory.window is 18.*at most.*17'):
        preset('atlas-tiny', memory=MemoryConfig(window=18))
    with pytest.raises(ValueError, match='decay_to'):
        call(queries, tokens, gates, initial, window=2, decay_to='one')
    with pytest.raises(ValueError, match=r'queries has shape'):
        call(queries[:, :1], tokens, gates, initial, window=2)
    with pytest.raises(ValueError, match=r'gates.push has shape'):
        call(queries, tokens, gates._replace(push=gates.push[..., :1]), initial, window=2)
