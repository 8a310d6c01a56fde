"""The deep memory: against its loop over tokens, and what must hold by its equations."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nested_jax.memory.matrix import delta_rule
from nested_jax.memory.mlp import ACTIVATIONS, MLPWeights, mlp_initial_state, mlp_memory, mlp_memory_reference, mlp_read
from tests.memory.linear_memory import linear_memory

WIDTH, HIDDEN, HEADS = 4, 5, 2
GATES = ('q', 'k', 'v', 'eta', 'log_alpha', 'log_momentum', 'erase')


def unit(x):
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def random_call(time: int, *, batch: int = 2, dgd: str = 'per_layer', momentum: bool = True) -> dict:
    """Arrays of `mlp_memory` at random, bounded by the rates of ARCHITECTURE's invariant 9. Drawn by numpy: nothing to compile."""
    rng = np.random.default_rng(0)
    rows, gate = (batch, time, HEADS, WIDTH), (batch, time, HEADS)
    k = rng.normal(size=rows)
    call = {
        'q': rng.normal(size=rows),
        'k': k / np.linalg.norm(k, axis=-1, keepdims=True),
        'v': rng.normal(size=rows),
        'eta': rng.uniform(0.05, 0.4, gate),
        'log_alpha': np.log(rng.uniform(0.6, 1.0, gate)),
        'log_momentum': np.log(rng.uniform(0.1, 0.7, gate)) if momentum else None,
        'erase': None if dgd == 'none' else rng.uniform(0.05, 0.4, gate),
        'initial': MLPWeights(rng.normal(size=(HEADS, WIDTH, HIDDEN)) / 2, rng.normal(size=(HEADS, HIDDEN, WIDTH)) / 2),
    }
    return jax.tree.map(jnp.asarray, call)


def part(call: dict, begin: int, end: int) -> dict:
    """The call of tokens begin to end."""
    cut = (*GATES, 'segment_ids', 'valid')
    return {name: np.asarray(value)[:, begin:end] if name in cut and value is not None else value for name, value in call.items()}


OPTIONS = ('function', 'chunk_size', 'activation', 'dgd', 'read', 'decay_to', 'residual', 'objective', 'aligned')
compiled = functools.partial(jax.jit, static_argnames=OPTIONS)


@compiled
def run(call: dict, function=mlp_memory, **options):
    return function(**call, **options)


def scalar(call: dict, function=mlp_memory, **options):
    """A number that reads outputs and state unevenly, and both of them."""
    y, state = function(**call, **options)
    leaves = [y, *jax.tree.leaves((state.running, state.momentum, state.anchor))]
    terms = (jnp.sum(jnp.sin(leaf + i) * jnp.arange(leaf.size).reshape(leaf.shape) / leaf.size) for i, leaf in enumerate(leaves))
    return sum(terms), (y, state)


@compiled
def gradient(call: dict, function=mlp_memory, **options):
    """Gradients of `scalar` with respect to all arrays of the call, and (outputs, state)."""
    return jax.grad(scalar, has_aux=True)(call, function, **options)


def assert_trees_close(got, want, atol: float) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol, rtol=atol), got, want)


# Chunked against token by token

CHOICES = {
    'dgd': ('per_layer', 'input_only', 'none'),
    'momentum': (True, False),
    'read': ('running', 'anchor'),
    'decay_to': ('zero', 'init'),
    'residual': (True, False),
}
# Every pair of choices occurs.
PAIRS = [
    ('per_layer', True, 'running', 'zero', True),
    ('per_layer', False, 'anchor', 'init', False),
    ('input_only', True, 'anchor', 'zero', False),
    ('input_only', False, 'running', 'init', True),
    ('none', True, 'running', 'init', False),
    ('none', False, 'anchor', 'zero', True),
]


def test_pairs_cover_all_pairs():
    for a, b in itertools.combinations(range(5), 2):
        wanted = set(itertools.product(list(CHOICES.values())[a], list(CHOICES.values())[b]))
        missing = wanted - {(row[a], row[b]) for row in PAIRS}
        assert len(missing) <= 1, (a, b, missing)


def compare_with_reference(dgd, momentum, read, decay_to, residual, time, **options):
    call = random_call(time, dgd=dgd, momentum=momentum)
    options |= {'dgd': dgd, 'read': read, 'decay_to': decay_to, 'residual': residual}
    chunked, looped = (gradient(call, function, **options) for function in (mlp_memory, mlp_memory_reference))
    assert_trees_close(chunked[1], looped[1], 1e-12)
    assert_trees_close(chunked[0], looped[0], 1e-10)


@pytest.mark.parametrize('choice', PAIRS, ids=str)
def test_chunked_equals_reference(x64, choice):
    compare_with_reference(*choice, time=11, chunk_size=4)


@pytest.mark.exhaustive
@pytest.mark.parametrize('choice', list(itertools.product(*CHOICES.values())), ids=str)
@pytest.mark.parametrize(('time', 'chunk_size'), [(12, 4), (5, 1), (7, 16)])
def test_chunked_equals_reference_everywhere(x64, choice, time, chunk_size):
    compare_with_reference(*choice, time=time, chunk_size=chunk_size, activation='gelu')


@pytest.mark.parametrize(('time', 'chunk_size'), [(3, 1), (6, 16)])
def test_any_chunk_size(x64, time, chunk_size):
    call = random_call(time)
    assert_trees_close(run(call, chunk_size=chunk_size), run(call, mlp_memory_reference, chunk_size=chunk_size), 1e-12)


def test_reference_is_the_equations(x64):
    """One head, written out in numpy with no code shared: two chunks of two tokens."""
    call = random_call(4, batch=1)
    w_in, w_out = (np.array(w[0]) for w in call['initial'])
    s_in, s_out, outputs = np.zeros_like(w_in), np.zeros_like(w_out), []
    for t in range(4):
        if t % 2 == 0:
            a_in, a_out = w_in, w_out
        q, k, v, eta, log_alpha, log_momentum, erase = (np.array(call[name][0, t, 0]) for name in GATES)
        alpha, beta = np.exp(log_alpha), np.exp(log_momentum)
        z = k @ a_in
        sigmoid = 1 / (1 + np.exp(-z))
        h, slope = z * sigmoid, sigmoid * (1 + z * (1 - sigmoid))
        e_out = k + h @ a_out - v
        e_in = (a_out @ e_out) * slope
        shrink = 1 / (1 + erase * h @ h)
        s_in, s_out = beta * s_in - eta * np.outer(k, e_in), beta * s_out - eta * shrink * np.outer(h, e_out)
        w_in = alpha * w_in - erase * np.outer(k, k @ w_in) + s_in
        w_out = alpha * w_out - erase * shrink * np.outer(h, h @ w_out) + s_out
        z = q @ w_in
        outputs.append(q + (z / (1 + np.exp(-z))) @ w_out)
    y, state = run(call, mlp_memory_reference, chunk_size=2)
    np.testing.assert_allclose(y[0, :, 0], outputs, atol=1e-13)
    assert_trees_close([x[0, 0] for x in (*state.running, *state.momentum)], [w_in, w_out, s_in, s_out], 1e-13)


@pytest.mark.parametrize(('dtype', 'atol'), [('float32', 1e-4), ('bfloat16', 0.15)])
def test_low_precision_inputs(x64, dtype, atol):
    call = random_call(24)
    want, _ = run(call, mlp_memory_reference, chunk_size=8)
    y, state = run(jax.tree.map(lambda x: x.astype(dtype), call), chunk_size=8)
    assert y.dtype == dtype
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(state)} == {'float32', 'int32'}
    np.testing.assert_allclose(y.astype('float64'), want, atol=atol)


# Streaming


def streamed(call: dict, cuts, **options):
    """The call in pieces, the state carried."""
    outputs, state = [], None
    for begin, end in itertools.pairwise(cuts):
        y, state = run({**part(call, begin, end), 'state': state}, **options)
        outputs.append(y)
    return jnp.concatenate(outputs, 1), state


@pytest.mark.parametrize('cut', [cut if cut in (1, 4, 6) else pytest.param(cut, marks=pytest.mark.exhaustive) for cut in range(1, 11)])
def test_streaming_at_every_cut(x64, cut):
    call = random_call(11)
    assert_trees_close(streamed(call, (0, cut, 11), chunk_size=4), run(call, chunk_size=4), 1e-12)


def test_streaming_in_many_pieces(x64):
    """Token by token (decoding), and pieces that end inside, at and after a chunk's end."""
    call = random_call(11)
    whole = run(call, chunk_size=4, decay_to='init')
    for cuts in (range(12), (0, 2, 3, 7, 8, 11)):
        assert_trees_close(streamed(call, cuts, chunk_size=4, decay_to='init'), whole, 1e-12)


def test_streaming_with_rows_at_different_phases(x64):
    """Each row of the batch continues at its own position of the grid."""
    call, lengths = random_call(20, batch=3), (1, 4, 6)
    want, _ = run(call, mlp_memory_reference, chunk_size=4)
    states = []
    for row, length in enumerate(lengths):
        state = mlp_initial_state(call['initial'], 1, momentum=True)
        for t in range(length):
            token = {name: np.asarray(call[name])[row : row + 1, t : t + 1] for name in GATES}
            _, state = run({'initial': call['initial'], 'state': state, **token}, chunk_size=4)
        states.append(state)
    state = jax.tree.map(lambda *rows: jnp.concatenate(rows), *states)
    for begin in (0, 7):
        piece = {name: np.stack([np.asarray(call[name])[i, n + begin : n + begin + 7] for i, n in enumerate(lengths)]) for name in GATES}
        y, state = run({'initial': call['initial'], 'state': state, **piece}, chunk_size=4)
        for row, length in enumerate(lengths):
            np.testing.assert_allclose(y[row], want[row, length + begin : length + begin + 7], atol=1e-12)
    np.testing.assert_array_equal(state.position, [15, 18, 20])


def in_two_pieces(**call):
    options = {name: call.pop(name) for name in OPTIONS if name in call}
    first, second = ({name: x[:, cut] if name in GATES else x for name, x in call.items()} for cut in (slice(0, 6), slice(6, None)))
    y, state = mlp_memory(**first, **options)
    rest, state = mlp_memory(**second, state=state, **options)
    return jnp.concatenate([y, rest], 1), state


def test_gradient_through_the_state(x64):
    """Differentiating across a cut equals differentiating the whole."""
    call = random_call(11)
    assert_trees_close(gradient(call, in_two_pieces, chunk_size=4), gradient(call, chunk_size=4), 1e-10)


# Null tokens and segments


@pytest.mark.parametrize('function', [mlp_memory, mlp_memory_reference])
@pytest.mark.parametrize('decay_to', ['zero', 'init'])
def test_invalid_tokens_are_inert(x64, function, decay_to):
    """At the end, as a whole chunk and inside one: state and other outputs are those without them, whatever they hold."""
    call = random_call(12)
    valid = jnp.array([[1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 0, 0], [1, 1, 0, 1, 1, 1, 1, 1, 1, 1, 1, 0]], bool)
    y, state = run({**call, 'valid': valid}, function, chunk_size=4, decay_to=decay_to)
    short = {name: value[:1, np.r_[0:4, 8:10]] if name in GATES else value for name, value in call.items()}
    want, last = run(short, mlp_memory_reference, chunk_size=4, decay_to=decay_to)
    np.testing.assert_allclose(y[0, np.r_[0:4, 8:10]], want[0], atol=1e-12)
    for got, expected in ((state.running, last.running), (state.momentum, last.momentum)):
        assert_trees_close(jax.tree.map(lambda x: x[0], got), jax.tree.map(lambda x: x[0], expected), 1e-12)
    np.testing.assert_array_equal(state.position, [12, 12])
    # Between valid tokens of one chunk the memory only waits.
    garbage = {**call, 'v': call['v'].at[:, 4:8].set(1e3), 'eta': jnp.where(valid[:, :, None], call['eta'], 7.0)}
    y_garbage, state_garbage = run({**garbage, 'valid': valid}, function, chunk_size=4, decay_to=decay_to)
    np.testing.assert_allclose(y_garbage[0], y[0], atol=1e-12)
    assert_trees_close(jax.tree.map(lambda x: x[0], state_garbage), jax.tree.map(lambda x: x[0], state), 1e-12)


def test_eta_zero_alpha_one_is_inert_without_momentum(x64):
    call = random_call(10, momentum=False)
    silent = {name: call[name].at[:, 6:].set(0.0) for name in ('eta', 'log_alpha', 'erase')}
    _, state = run({**call, **silent}, chunk_size=4)
    assert_trees_close(state.running, run(part(call, 0, 6), chunk_size=4)[1].running, 1e-13)


@pytest.mark.parametrize('function', [mlp_memory, mlp_memory_reference])
def test_a_segment_starts_from_the_initial_state(x64, function):
    call = random_call(14)
    segments = jnp.array([[1] * 8 + [2] * 6, [1] * 3 + [0] * 1 + [2] * 10])
    y, state = run({**call, 'segment_ids': segments}, function, chunk_size=4)
    for row, begin in ((0, 8), (1, 4)):
        alone = {name: value[row : row + 1] if name in GATES else value for name, value in call.items()}
        want, last = run(part(alone, begin, 14), mlp_memory_reference, chunk_size=4)
        np.testing.assert_allclose(y[row, begin:], want[0], atol=1e-12)
        for got, expected in zip(state[:3], last[:3], strict=True):
            assert_trees_close(jax.tree.map(lambda x, row=row: x[row], got), jax.tree.map(lambda x: x[0], expected), 1e-12)


@pytest.mark.exhaustive
def test_segments_stream(x64):
    call = {**random_call(14), 'segment_ids': jnp.array([[1] * 8 + [2] * 6, [1] * 4 + [2] * 10])}
    assert_trees_close(streamed(call, (0, 7, 14), chunk_size=4), run(call, chunk_size=4), 1e-12)


# What must hold by the equations


def test_batch_rows_are_independent_and_outputs_causal(x64):
    call = random_call(10)
    y, _ = run(call, chunk_size=4)
    changed = {name: value.at[1, 6:].set(value[1, 6:] * 0.9 + 0.01) if name in GATES else value for name, value in call.items()}
    other, _ = run(changed, chunk_size=4)
    np.testing.assert_array_equal(y[0], other[0])
    np.testing.assert_array_equal(y[1, :6], other[1, :6])
    assert (np.abs(y[1, 6:] - other[1, 6:]) > 1e-6).all()


@pytest.mark.parametrize('read', ['running', 'anchor'])
def test_no_learning_is_a_static_layer(x64, read):
    """Identity 16: eta = 0, alpha = 1."""
    call = random_call(9)
    silent = {name: jnp.zeros_like(call[name]) for name in ('eta', 'log_alpha', 'erase')}
    y, state = run({**call, **silent}, chunk_size=4, read=read)
    weights = jax.tree.map(lambda w: w[None], call['initial'])
    want = mlp_read(weights, jnp.swapaxes(call['q'], 1, 2))
    np.testing.assert_allclose(y, jnp.swapaxes(want, 1, 2), atol=1e-14)
    assert_trees_close(state.running, mlp_initial_state(call['initial'], 2, momentum=True).running, 0)


def test_retention_zero_wipes_and_decay_to_init_restores(x64):
    """Identity 16: alpha = 0 with eta = 0."""
    call = random_call(9, momentum=False)
    wiped = {'eta': call['eta'].at[:, 6:].set(0.0), 'erase': call['erase'].at[:, 6:].set(0.0)}
    wiped['log_alpha'] = call['log_alpha'].at[:, 6].set(-jnp.inf)
    for decay_to, factor in (('zero', 0.0), ('init', 1.0)):
        y, state = run({**call, **wiped}, chunk_size=4, decay_to=decay_to)
        want = jax.tree.map(lambda w, f=factor: jnp.stack([w, w]) * f, call['initial'])
        assert_trees_close(state.running, want, 1e-14)
        if decay_to == 'zero':
            np.testing.assert_allclose(y[:, 6:], call['q'][:, 6:], atol=1e-14)


def test_zero_output_layer_is_the_identity(x64):
    """Identity 15: W_out = 0 gives M(x) = x, and with v = k there is nothing to learn."""
    call = random_call(9)
    call['initial'] = call['initial']._replace(w_out=jnp.zeros_like(call['initial'].w_out))
    call['v'] = call['k']
    y, state = run(call, chunk_size=4)
    np.testing.assert_allclose(y, call['q'], atol=1e-14)
    assert_trees_close(state.running.w_out, jnp.zeros_like(state.running.w_out), 0)


def test_linear_activation_is_two_linear_layers(x64, monkeypatch):
    """Identity 15: with a linear sigma and W_in held at I, W_out is the linear memory of `chunk.py`."""
    monkeypatch.setitem(ACTIVATIONS, 'linear', lambda x: x)
    rows, heads = random_call(8, dgd='none'), HEADS
    call = {**rows, 'initial': MLPWeights(jnp.stack([jnp.eye(WIDTH)] * heads), jnp.zeros((heads, WIDTH, WIDTH)))}
    call['eta'] = call['eta'].at[:, 4:].set(0.0)  # one chunk of writes: W_out is zero there, so W_in gets no gradient
    y, state = run({**call, 'log_alpha': jnp.zeros_like(call['log_alpha'])}, chunk_size=4, dgd='none', activation='linear', residual=False)
    head_first = [jnp.moveaxis(call[name], 2, 1) for name in ('q', 'k', 'v', 'eta')]
    gates = [jnp.zeros_like(head_first[3]), jnp.moveaxis(call['log_momentum'], 2, 1)]
    want, last = linear_memory(*head_first, *gates, jnp.zeros((2, heads, WIDTH, WIDTH)), 4)
    np.testing.assert_allclose(y, jnp.moveaxis(want, 1, 2), atol=1e-13)
    np.testing.assert_allclose(state.running.w_out, last[0], atol=1e-13)


def test_momentum_zero_is_no_momentum(x64):
    """Identity 17."""
    call = random_call(9)
    y, state = run({**call, 'log_momentum': jnp.full_like(call['eta'], -jnp.inf)}, chunk_size=4)
    want, last = run({**call, 'log_momentum': None}, chunk_size=4)
    np.testing.assert_allclose(y, want, atol=1e-13)
    assert_trees_close(state.running, last.running, 1e-13)


def test_chunks_of_one_token_without_momentum_are_the_gated_delta_rule(x64):
    """Identity 17: M_t = alpha M + eta k (v - M^T k)^T is the rule of rate eta / alpha whose values are alpha v."""
    call = random_call(9, dgd='none', momentum=False)
    start = jnp.asarray(np.random.default_rng(1).normal(size=(HEADS, WIDTH, WIDTH)))
    never = jnp.full_like(call['eta'], -jnp.inf)
    rows = [jnp.moveaxis(x, 2, 1) for x in (*(call[name] for name in ('q', 'k', 'v', 'eta', 'log_alpha')), never)]
    y, (last, _) = jax.jit(linear_memory, static_argnums=7)(*rows, jnp.stack([start, start]), 1)
    alpha = jnp.exp(call['log_alpha'])
    values, rate = alpha[..., None] * call['v'], call['eta'] / alpha
    rule = jax.jit(delta_rule, static_argnames='chunk_size')
    want, state = rule(call['q'], call['k'], values, rate, call['log_alpha'], initial=start, chunk_size=4)
    np.testing.assert_allclose(jnp.moveaxis(y, 1, 2), want, atol=1e-13)
    np.testing.assert_allclose(last, state, atol=1e-13)


def test_anchor_error_is_of_second_order_in_the_rate(x64):
    """Identity 13: without decay, gradients at the anchor and at every token give outputs that differ by a term of order eta^2."""

    def gap(scale):
        call = random_call(8)
        call = {**call, 'eta': call['eta'] * scale, 'erase': call['erase'] * scale, 'log_alpha': jnp.zeros_like(call['eta'])}
        chunked, exact = (run(call, chunk_size=size)[0] for size in (8, 1))
        return jnp.abs(chunked - exact).max()

    assert 3.0 < gap(0.02) / gap(0.01) < 5.0


def test_gradient_is_of_half_the_squared_error(x64):
    """Identity 18, on one token: the write of W_out is eta' h^T (v - M(k))."""
    call = random_call(1, momentum=False, dgd='none')
    call['log_alpha'] = jnp.zeros_like(call['log_alpha'])
    _, state = run(call, chunk_size=4, dgd='none')
    key, weights = call['k'][0, 0, 1], jax.tree.map(lambda w: w[1], call['initial'])
    write = jnp.outer(jax.nn.silu(key @ weights.w_in), call['v'][0, 0, 1] - mlp_read(weights, key))
    np.testing.assert_allclose(state.running.w_out[0, 1] - weights.w_out, call['eta'][0, 0, 1] * write, atol=1e-14)


def test_finite_differences(x64):
    """Identity 19: each initial weight, keys, values and gates, over more than three chunks."""
    call = jax.tree.map(np.asarray, random_call(11))
    leaves, structure = jax.tree.flatten(call)
    grads = jax.tree.leaves(gradient(call, chunk_size=3)[0])
    value = jax.jit(lambda call: scalar(call, chunk_size=3)[0])
    rng, step = np.random.default_rng(1), 1e-5
    for i, (leaf, grad) in enumerate(zip(leaves, grads, strict=True)):
        direction = rng.normal(size=leaf.shape)
        ends = [value(structure.unflatten([*leaves[:i], leaf + sign * step * direction, *leaves[i + 1 :]])) for sign in (1, -1)]
        np.testing.assert_allclose(np.sum(grad * direction), (ends[0] - ends[1]) / (2 * step), rtol=1e-6)
        assert np.abs(grad).max() > 1e-3
    assert all(np.abs(leaf).min() > 1e-8 for leaf in structure.unflatten(grads)['initial'])


@pytest.mark.parametrize('dgd', ['per_layer', 'none'])
def test_zero_inner_gradient_has_finite_outer_gradients(dgd):
    """All-zero weights, keys and values; and a target that is met exactly."""
    call = random_call(8, dgd=dgd)
    zero = {name: jnp.zeros_like(call[name]) for name in ('q', 'k', 'v')} | {'initial': jax.tree.map(jnp.zeros_like, call['initial'])}
    met = {'v': call['k'], 'initial': zero['initial']}
    for case in (zero, met):
        grads, _ = gradient({**call, **case}, chunk_size=4, dgd=dgd)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


def long_call(keys: str, eta: float, alpha: float, beta: float | None) -> dict:
    """2,000 tokens of unit norm, keys at random and values a map of them, or one pair over and over, at constant rates."""
    rows = [unit(jax.random.normal(key, (2, 2000, HEADS, 8))) for key in jax.random.split(jax.random.key(3), 3)]
    q, k, v = (rows[0], rows[1], jnp.roll(rows[1], 1, -1)) if keys == 'random' else [jnp.broadcast_to(x[:, :1], x.shape) for x in rows]
    gate = jnp.ones(q.shape[:3])
    w_in, w_out = (jax.random.normal(jax.random.key(i), (HEADS, 8, 8)) / 8**0.5 for i in range(2))
    initial = MLPWeights(w_in, w_out)
    momentum = None if beta is None else gate * np.log(beta)
    return {'q': q, 'k': k, 'v': v, 'eta': gate * eta, 'log_alpha': gate * np.log(alpha), 'log_momentum': momentum, 'initial': initial}


@pytest.mark.parametrize('keys', ['random', 'repeated'])
@pytest.mark.parametrize(
    ('chunk_size', 'dgd', 'eta', 'alpha', 'beta'),
    [
        (1, 'per_layer', 0.975, 0.95, None),
        (16, 'per_layer', 0.05, 0.999, None),
        (16, 'per_layer', 0.025, 0.999, 0.5),
        (16, 'none', 0.05, 0.999, None),
    ],
)
def test_bounded(keys, chunk_size, dgd, eta, alpha, beta):
    """Stable by construction at |k| = 1: one-token chunks with eta = (1 + alpha) / 2; else the sum of eta over a chunk below 1."""
    y, state = run(long_call(keys, eta, alpha, beta), chunk_size=chunk_size, dgd=dgd)
    assert np.abs(y).max() < 3
    assert all(0.1 < np.abs(leaf).max() < 3 for leaf in state.running)


# Arguments


def test_dims_of_values_may_differ_without_residual(x64):
    call = random_call(6)
    call['v'] = call['v'][..., :3]
    call['initial'] = call['initial']._replace(w_out=call['initial'].w_out[..., :3])
    chunked, looped = (run(call, function, chunk_size=4, residual=False) for function in (mlp_memory, mlp_memory_reference))
    assert_trees_close(chunked, looped, 1e-12)
    assert chunked[0].shape == (2, 6, HEADS, 3)
    with pytest.raises(ValueError, match='v has dim 3'):
        mlp_memory(**call)


@pytest.mark.parametrize('function', [mlp_memory, mlp_memory_reference])
@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'chunk_size': 0}, 'chunk_size is 0'),
        ({'chunk_size': 2.0}, 'chunk_size is 2.0'),
        ({'activation': 'tanh'}, "activation is 'tanh': allowed are"),
        ({'dgd': True}, 'dgd is True'),
        ({'read': 'last'}, "read is 'last'"),
        ({'decay_to': 'one'}, "decay_to is 'one'"),
        ({'dgd': 'none'}, 'erase is given'),
        ({'k': np.ones((2, 6, HEADS, 3))}, 'k has shape'),
        ({'v': np.ones((2, 6, WIDTH))}, 'v has shape'),
        ({'q': np.ones((2, 6, WIDTH))}, 'q has shape'),
        ({'q': np.ones((2, 0, HEADS, WIDTH))}, 'q has shape'),
        ({'eta': np.ones((2, 6))}, 'eta has shape'),
        ({'erase': np.ones((2, 6, 1))}, 'erase has shape'),
        ({'segment_ids': np.ones(6)}, 'segment_ids has shape'),
        ({'valid': np.ones((2, 6))}, 'valid has dtype'),
        ({'initial': MLPWeights(np.ones((WIDTH, HIDDEN)), np.ones((HIDDEN, WIDTH)))}, 'initial.w_in has shape'),
        ({'log_momentum': None, 'state': True}, 'both given or both None'),
        ({'state': 3}, 'state.running.w_in has shape'),
    ],
)
def test_errors(function, change, message):
    call = random_call(6)
    if 'state' in change:
        change = {**change, 'state': mlp_initial_state(call['initial'], 2 if change['state'] is True else 3, momentum=True)}
    with pytest.raises(ValueError, match=message):
        function(**{**call, **change})
