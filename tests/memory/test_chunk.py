"""The closed form of one chunk against loops over its tokens, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nested_jax.memory import chunk as chunks

CHUNK, D_IN, D_OUT = 7, 4, 3


def random_chunk(seed: int = 0, rows: int = 2) -> dict:
    """Inputs of one chunk, `rows` of them."""
    rng = np.random.default_rng(seed)
    return {
        'inputs': rng.normal(size=(rows, CHUNK, D_IN)),
        'error': rng.normal(size=(rows, CHUNK, D_OUT)),
        'queries': rng.normal(size=(rows, CHUNK, D_IN)),
        'rate': rng.uniform(size=(rows, CHUNK)),
        'erase': rng.uniform(size=(rows, CHUNK)) / 4,
        'alpha': rng.uniform(0.3, 1.0, (rows, CHUNK)),
        'beta': rng.uniform(0.1, 0.9, (rows, CHUNK)),
        'weight': rng.normal(size=(rows, D_IN, D_OUT)),
        'momentum': rng.normal(size=(rows, D_IN, D_OUT)),
        'rest': rng.normal(size=(rows, D_IN, D_OUT)),
        'push': np.ones((rows, CHUNK)),
    }


def loop(c: dict, row: int, momentum: bool, erase: bool, rest: bool):
    """Tokens one after the other: reads after each token, last weight and momentum."""
    weight, velocity, reads = c['weight'][row], c['momentum'][row], []
    start = c['rest'][row] if rest else 0.0
    for t in range(CHUNK):
        x, alpha = c['inputs'][row, t], c['alpha'][row, t]
        step = -c['rate'][row, t] * np.outer(x, c['error'][row, t])
        velocity = c['beta'][row, t] * velocity + step if momentum else step
        erased = c['erase'][row, t] * np.outer(x, x @ weight) if erase else 0.0
        weight = alpha * weight + (1 - alpha) * start - erased + c['push'][row, t] * velocity
        reads.append(c['queries'][row, t] @ weight)
    return np.stack(reads), weight, velocity


def closed_form(c: dict, momentum: bool, erase: bool, rest: bool):
    """The same by `chunk.py`."""
    decays = chunks.chunk_decays(jnp.log(c['alpha']), jnp.log(c['beta']) if momentum else None, jnp.asarray(c['push']))
    velocity, start = c['momentum'] if momentum else None, c['rest'] if rest else None
    writes = chunks.layer_writes(
        decays, c['inputs'], c['error'], c['rate'], c['weight'], velocity, erase=c['erase'] if erase else None, rest=start
    )
    reads = chunks.read_running(decays, writes, c['queries'], c['weight'], velocity, rest=start)
    return reads, *chunks.weight_after(decays, writes, c['weight'], velocity, rest=start)


@pytest.mark.parametrize('momentum', [True, False])
@pytest.mark.parametrize('erase', [True, False])
@pytest.mark.parametrize('rest', [True, False])
def test_chunk_equals_the_loop(x64, momentum, erase, rest):
    c = random_chunk()
    reads, weight, velocity = closed_form(c, momentum, erase, rest)
    for row in range(2):
        expected = loop(c, row, momentum, erase, rest)
        np.testing.assert_allclose(reads[row], expected[0], atol=1e-12)
        np.testing.assert_allclose(weight[row], expected[1], atol=1e-12)
        if momentum:
            np.testing.assert_allclose(velocity[row], expected[2], atol=1e-12)
        else:
            assert velocity is None


def test_given_rows_and_products_change_nothing(x64):
    c = {name: jnp.asarray(value) for name, value in random_chunk().items()}
    decays = chunks.chunk_decays(jnp.log(c['alpha']), jnp.log(c['beta']))
    gram = chunks.overlaps(c['inputs'], c['inputs'])
    inverse = chunks.erasure_inverse(decays, gram, c['erase'])
    base = (decays, c['inputs'], c['error'], c['rate'], c['weight'], c['momentum'])
    outputs = c['inputs'] @ c['weight']
    given = chunks.layer_writes(*base, erase=c['erase'], inverse=inverse, gram=gram, outputs=outputs, rest=c['rest'])
    computed = chunks.layer_writes(*base, erase=c['erase'], rest=c['rest'])
    np.testing.assert_allclose(given.erasures, computed.erasures, atol=1e-13)
    read = (decays, computed, c['queries'], c['weight'], c['momentum'])
    overlap = chunks.overlaps(c['queries'], c['inputs'])
    np.testing.assert_allclose(chunks.read_running(*read, overlap=overlap), chunks.read_running(*read), atol=1e-13)


def test_null_tokens_leave_weight_and_momentum(x64):
    c = random_chunk()
    for null in (0, 3, 4, CHUNK - 1):
        for name, value in {'rate': 0.0, 'erase': 0.0, 'alpha': 1.0, 'beta': 1.0, 'push': 0.0}.items():
            c[name][:, null] = value
    real = {name: value[:, [1, 2, 5]] if value.shape[1] == CHUNK else value for name, value in c.items()}
    for got, want in zip(closed_form(c, True, True, True)[1:], closed_form(real, True, True, True)[1:], strict=True):
        np.testing.assert_allclose(got, want, atol=1e-12)


def test_a_push_of_zero_is_needed(x64):
    """With momentum, eta = 0 and alpha = 1 are not inert: the momentum is added once more."""
    c = random_chunk()
    for name, value in {'rate': 0.0, 'erase': 0.0, 'alpha': 1.0, 'beta': 1.0}.items():
        c[name][:] = value
    np.testing.assert_allclose(closed_form(c, True, True, False)[1], c['weight'] + CHUNK * c['momentum'], atol=1e-12)


@pytest.mark.parametrize('small', [0.0, 1e-30])
def test_spans_keep_their_digits_after_a_wipe(small):
    """One retention near zero must not disturb the products that do not contain it (float32)."""
    alpha = np.full((1, CHUNK), 0.9, np.float32)
    alpha[0, 2] = small
    with np.errstate(divide='ignore'):
        decays = chunks.chunk_decays(jnp.log(alpha), jnp.log(alpha))
    expected = np.array([[np.prod(alpha[0, j + 1 : t + 1]) if j <= t else 0.0 for j in range(CHUNK)] for t in range(CHUNK)])
    np.testing.assert_allclose(decays.spans[0], expected, rtol=1e-5, atol=1e-37)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(decays))


def test_gradients_stay_finite_when_memory_is_wiped():
    def total(log_alpha):
        return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(chunks.chunk_decays(log_alpha, log_alpha)))

    grad = jax.grad(total)(jnp.array([-0.1, -jnp.inf, -0.2, 0.0], jnp.float32))
    assert np.isfinite(grad).all()


@pytest.mark.parametrize('low', [-60.0, -1e3, -np.inf])
def test_products_of_decays_near_zero_and_one(low):
    """Spans that do not contain the small factor keep their digits; those that do vanish; nothing is NaN."""
    log_alpha = np.full((1, 64), -1e-5, np.float32)
    log_alpha[0, 10::20] = low
    decays = chunks.chunk_decays(jnp.asarray(log_alpha))
    wide = np.maximum(log_alpha[0].astype(np.float64), -1e4)
    exponents = np.array([[wide[j + 1 : t + 1].sum() if j <= t else -np.inf for j in range(64)] for t in range(64)])
    np.testing.assert_allclose(decays.spans[0], np.exp(exponents), rtol=2e-5, atol=1e-12)
    np.testing.assert_allclose(decays.kept[0], np.exp(np.cumsum(wide)), rtol=2e-5, atol=1e-12)
    grad = jax.grad(lambda g: jnp.sum(chunks.chunk_decays(g).spans))(jnp.asarray(log_alpha))
    assert np.isfinite(grad).all()
