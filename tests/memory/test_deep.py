"""Miras' deep memories: against their rules written out in numpy, their loop over tokens, and what must hold by their equations.

No outputs of these models are published. The transcriptions below are of the equations as secondary sources print them, with this
package's readings where those leave room (see `nested_jax/memory/deep.py`); they share no code with it, derivatives included.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nested_jax.memory.deep import DeepTokens, deep_memory, deep_memory_reference, output_error, weights_of
from nested_jax.memory.mlp import MLPWeights
from tests.memory.test_mlp import assert_trees_close

WIDTH, HIDDEN, HEADS = 4, 5, 2
RULES = {'yaad': ('huber', 'l2'), 'moneta': ('lp', 'lq'), 'memora': ('l2', 'kl')}


def random_call(time: int, objective: str = 'l2', *, batch: int = 2, damped: bool = True) -> tuple[DeepTokens, jax.Array, MLPWeights]:
    """(tokens, scale, initial) at random, rates as the layers give them for chunks of four."""
    rng = np.random.default_rng(0)
    rows, gate = (batch, time, HEADS, WIDTH), (batch, time, HEADS)
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
    strength = rng.uniform(0.2, 1.0, gate)
    tokens = DeepTokens(
        unit(rng.normal(size=rows)), unit(rng.normal(size=rows)), rng.normal(size=rows), strength / 4, np.log(rng.uniform(0.6, 1.0, gate)),
        strength if damped else None, rng.uniform(0.5, 3.0, gate) if objective == 'huber' else None,
    )  # fmt: skip
    initial = MLPWeights(rng.normal(size=(HEADS, WIDTH, HIDDEN)), rng.normal(size=(HEADS, HIDDEN, WIDTH)))
    return jax.tree.map(jnp.asarray, (tokens, rng.uniform(0.5, 1.5, (HEADS, WIDTH)), initial))


@functools.partial(jax.jit, static_argnames=('function', 'objective', 'retention', 'decay_to', 'chunk_size'))
def run(call, segment_ids=None, state=None, position=None, function=deep_memory, **options):
    extra = {} if function is deep_memory_reference else {'state': state, 'position': position}
    return function(*call, segment_ids=segment_ids, **options, **extra)


# Written out in numpy: one head


def gelu(z):
    inner = np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)
    slope = 0.5 * (1 + np.tanh(inner)) + 0.5 * z * (1 - np.tanh(inner) ** 2) * np.sqrt(2 / np.pi) * (1 + 3 * 0.044715 * z**2)
    return 0.5 * z * (1 + np.tanh(inner)), slope


def layer_norm(o):
    """LN(o), its Jacobian and 1 / its standard deviation."""
    centred, factor = o - o.mean(), 1 / np.sqrt(o.var() + 1e-6)
    jacobian = factor * (np.eye(o.size) - 1 / o.size - factor**2 * np.outer(centred, centred) / o.size)
    return centred * factor, jacobian, factor


def read(w_in, w_out, x, scale):
    return x + scale * layer_norm(gelu(x @ w_in)[0] @ w_out)[0]


def gradients(name, w_in, w_out, token, scale):
    """d objective / d W of one token, and what its rates are divided by."""
    key, damping = token['key'], token['damping']
    h, slope = gelu(key @ w_in)
    normed, jacobian, factor = layer_norm(h @ w_out)
    difference = key + scale * normed - token['value']
    size = np.sqrt(np.sum(difference**2))
    if name == 'memora':
        error, bound = difference, 1.0
    elif name == 'yaad':  # Eq. 26: l2 up to delta, delta times the norm beyond
        error = difference if size <= token['threshold'] else token['threshold'] * difference / size
        bound = min(1.0, token['threshold'] / size)
    else:  # Eq. 25: p sign(x) |x|^(p - 1) with p = 3, smoothed
        error = 3 * np.tanh(10 * difference) * np.sqrt(difference**2 + 1e-6) ** 2
        bound = 3 * np.sqrt(size**2 + 1e-6)
    out = jacobian.T @ (scale * error)
    gain = damping * bound * factor**2 * np.max(scale**2)
    passed = np.sum((slope[:, None] * w_out) ** 2)
    return (np.outer(key, slope * (w_out @ out)), np.outer(h, out)), (1 + gain * passed, 1 + gain * np.sum(h**2))


def transcription(name, call, size, *, decays_to_start=True):
    """y and A of head 0 of row 0: Eq. 24-27 with the gradients of Eq. 28, arXiv:2504.13173v1."""
    tokens, scale, initial = jax.tree.map(np.array, call)
    rows = {key: None if value is None else value[0, :, 0] for key, value in tokens._asdict().items()}
    scale, start = scale[0], [w[0] for w in initial]
    weights = {
        'yaad': lambda a: a,
        'moneta': lambda a: a / max(np.sum(np.abs(a) ** 4) ** (1 / 4), 1.0) ** 2,
        'memora': lambda a: len(a) * np.exp(a) / np.exp(a).sum(0, keepdims=True),
    }[name]
    a, outputs = list(start), []
    for t in range(len(rows['key'])):
        token = {key: None if value is None else value[t] for key, value in rows.items()}
        if t % size == 0:
            first, firsts = list(a), [weights(x) for x in a]
        grads, divisors = gradients(name, *firsts, token, scale)
        alpha = np.exp(token['log_alpha'])
        rest = start if decays_to_start else [0, 0]
        a = [alpha * x + (1 - alpha) * r - token['eta'] / d * g for x, r, g, d in zip(a, rest, grads, divisors, strict=True)]
        if name == 'yaad':
            seen = a
        elif name == 'moneta':
            seen = [x * np.linalg.norm(w) / np.linalg.norm(f) for x, f, w in zip(a, first, firsts, strict=True)]
        else:
            moved = [x - f for x, f in zip(a, first, strict=True)]
            seen = [w + m - m.mean(0, keepdims=True) for w, m in zip(firsts, moved, strict=True)]
        outputs.append(read(*seen, token['query'], scale))
    return np.stack(outputs), a


@pytest.mark.parametrize('name', RULES)
def test_rule_is_the_equations(x64, name):
    objective, retention = RULES[name]
    call = random_call(12, objective, batch=1)
    y, state = run(call, objective=objective, retention=retention, chunk_size=4)
    expected, accumulated = transcription(name, call, 4)
    np.testing.assert_allclose(y[0, :, 0], expected, rtol=1e-9, atol=1e-11)
    for got, want in zip(state.accumulated, accumulated, strict=True):
        np.testing.assert_allclose(got[0, 0], want, rtol=1e-9, atol=1e-11)


# Chunked against token by token


def scalar(call, ids, function, **options):
    y = function(*call, segment_ids=ids, **options)
    y = y[0] if function is deep_memory else y
    return jnp.sum(jnp.sin(y) * jnp.arange(y.size).reshape(y.shape) / y.size), y


@functools.partial(jax.jit, static_argnames=('function', 'objective', 'retention', 'decay_to', 'chunk_size'))
def gradient(call, ids, function, **options):
    return jax.grad(scalar, has_aux=True)(call, ids, function, **options)


@pytest.mark.slow
@pytest.mark.parametrize(('name', 'decay_to'), [('yaad', 'zero'), ('moneta', 'init'), ('memora', 'init')])
def test_chunked_equals_reference(x64, name, decay_to):
    objective, retention = RULES[name]
    call = random_call(11, objective, damped=decay_to == 'init')
    ids = jnp.asarray([[1] * 4 + [2] * 7, [1] * 8 + [2] * 3])
    options = dict(objective=objective, retention=retention, decay_to=decay_to, chunk_size=4)
    fast, slow = (gradient(call, ids, function, **options) for function in (deep_memory, deep_memory_reference))
    assert_trees_close(fast[1], slow[1], 1e-11)
    assert_trees_close(fast[0], slow[0], 1e-9)


@pytest.mark.slow
def test_a_stream_may_be_cut_inside_a_chunk(x64):
    call = random_call(11)
    options = dict(retention='kl', chunk_size=4)
    whole, last = run(call, **options)
    part = lambda begin, end: (jax.tree.map(lambda x: x[:, begin:end], call[0]), *call[1:])
    first, state = run(part(0, 6), **options)
    second, state = run(part(6, 11), state=state, position=jnp.full(2, 6), **options)
    np.testing.assert_allclose(jnp.concatenate([first, second], 1), whole, atol=1e-12)
    assert_trees_close(state.accumulated, last.accumulated, 1e-12)


# What must hold


def test_errors_are_gradients_of_their_objectives(x64):
    """Of the stated ones by automatic differentiation; 'lp' up to its smoothing, which acts below a third."""
    rng = np.random.default_rng(1)
    difference, threshold = jnp.asarray(rng.normal(size=(50, 3))), jnp.asarray(rng.uniform(0.2, 3.0, 50))
    size = lambda x: jnp.sqrt(jnp.sum(x**2, -1))
    objectives = {
        'l2': lambda x: 0.5 * jnp.sum(x**2),
        'huber': lambda x: jnp.sum(jnp.where(size(x) <= threshold, 0.5 * size(x) ** 2, threshold * (size(x) - 0.5 * threshold))),
        'lp': lambda x: jnp.sum(jnp.abs(x) ** 3),
    }
    for name, objective in objectives.items():
        error, bound = output_error(name, difference, threshold)
        exact = name != 'lp'
        keep = np.full(difference.shape, True) if exact else np.abs(difference) > 0.35
        np.testing.assert_allclose(error[keep], jax.grad(objective)(difference)[keep], rtol=1e-12 if exact else 3e-3)
        assert (np.abs(error) <= bound[:, None] * np.abs(difference) * (1 + 1e-12)).all()
    zero, _ = output_error('lp', jnp.zeros((1, 3)), None)
    np.testing.assert_array_equal(zero, 0)


def test_retentions_are_what_they_are_called(x64):
    a = jnp.asarray(np.random.default_rng(2).normal(size=(3, 6, 5)))
    np.testing.assert_allclose(weights_of(a, 'l2'), a)
    weights = weights_of(10 * a, 'lq')
    np.testing.assert_allclose(jnp.sum(weights**4, (1, 2)) ** 0.25, 1 / jnp.sum((10 * a) ** 4, (1, 2)) ** 0.25, rtol=1e-12)
    np.testing.assert_allclose(weights_of(1e-3 * a, 'lq'), 1e-3 * a)
    weights = weights_of(a, 'kl')
    assert (weights > 0).all()
    np.testing.assert_allclose(weights.mean(1), 1, rtol=1e-12)
    # Eq. 27 from W itself: W <- softmax(alpha log W - eta grad), mass 6 per unit.
    step = jnp.asarray(np.random.default_rng(3).normal(size=a.shape))
    np.testing.assert_allclose(6 * jax.nn.softmax(0.9 * jnp.log(weights) - step, 1), weights_of(0.9 * a - step, 'kl'), rtol=1e-12)


def test_tokens_without_a_rate_write_nothing(x64):
    call = random_call(6, batch=1)
    still = call[0]._replace(eta=jnp.zeros((1, 6, HEADS)), log_alpha=jnp.zeros((1, 6, HEADS)))
    for retention in ('l2', 'lq', 'kl'):
        _, state = run((still, *call[1:]), retention=retention, chunk_size=2)
        np.testing.assert_allclose(state.accumulated.w_in[0], call[2].w_in, rtol=1e-13)


def test_far_values_move_a_huber_memory_no_further(x64):
    """Beyond the threshold a step depends on the error's direction alone."""
    call = random_call(1, 'huber', batch=1, damped=False)
    writes = []
    for size in (1e3, 1e6):
        tokens = call[0]._replace(value=size * call[0].value)
        writes.append(run((tokens, *call[1:]), objective='huber', chunk_size=1)[1].accumulated.w_out - call[2].w_out[None])
    np.testing.assert_allclose(*writes, rtol=1e-2, atol=1e-4)
    assert float(jnp.abs(writes[0]).max()) > 1e-3


def test_wrong_arguments_are_named():
    tokens, scale, initial = random_call(2)
    with pytest.raises(ValueError, match=r"objective is 'l1'.*'huber'"):
        deep_memory(tokens, scale, initial, objective='l1')
    with pytest.raises(ValueError, match=r"retention is 'l1'.*'kl'"):
        deep_memory(tokens, scale, initial, retention='l1')
    with pytest.raises(ValueError, match='threshold'):
        deep_memory(tokens, scale, initial, objective='huber')
    with pytest.raises(ValueError, match=r'scale has shape \(4,\)'):
        deep_memory(tokens, scale[0], initial)
    with pytest.raises(ValueError, match=r'tokens.eta has shape'):
        deep_memory(tokens._replace(eta=tokens.eta[:, :1]), scale, initial)
    with pytest.raises(ValueError, match='position is None'):
        deep_memory(tokens, scale, initial, state=deep_memory(tokens, scale, initial)[1])
