"""Matrix memories: golden vectors of public implementations, chunks against tokens, streaming, and the algebra of the rules."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from nested_jax.memory import matrix, matrix_chunks

BATCH, TIME, HEADS, DIM_K, DIM_V = 2, 13, 2, 4, 3

# Every rule and option: name, gates, keyword arguments.
RULES = {
    'linear': ('linear_attention', (), {}),
    'linear-decay': ('linear_attention', ('g',), {}),
    'linear-channel': ('linear_attention', ('gk',), {}),
    'delta': ('delta_rule', ('beta',), {}),
    'delta-decay': ('delta_rule', ('beta', 'g'), {}),
} | {
    f'dgd-{objective}-{gradient}-{read}': (
        'delta_gradient_descent',
        ('eta', 'g'),
        {'objective': objective, 'gradient': gradient, 'read': read},
    )
    for objective in ('l2', 'dot')
    for gradient in ('token', 'chunk')
    for read in ('running', 'anchor')
}
GRID = {name for name in RULES if 'chunk' in name or 'anchor' in name}


def inputs(seed: int = 0, time: int = TIME, batch: int = BATCH) -> dict[str, jax.Array]:
    """Random arguments of every rule: keys of norm 1, eta within the stable range."""
    rng = np.random.default_rng(seed)
    gate = lambda *shape: 1 / (1 + np.exp(-rng.normal(size=shape)))
    rows = (batch, time, HEADS)
    k = rng.normal(size=(*rows, DIM_K))
    g = np.log(gate(*rows))
    arrays = {
        'q': rng.normal(size=(*rows, DIM_K)),
        'k': k / np.linalg.norm(k, axis=-1, keepdims=True),
        'v': rng.normal(size=(*rows, DIM_V)),
        'beta': 2 * gate(*rows),
        'g': g,
        'gk': np.log(gate(*rows, DIM_K)),
        'eta': gate(*rows) * (1 + np.exp(g)) / 2,
        'state': rng.normal(size=(batch, HEADS, DIM_K, DIM_V)),
        'initial': rng.normal(size=(HEADS, DIM_K, DIM_V)),
    }
    return {name: jnp.asarray(array) for name, array in arrays.items()}


@functools.partial(jax.jit, static_argnames=('rule', 'reference', 'chunk_size'))
def run(rule: str, x: dict, *, reference: bool = False, **options):
    """(y, state) of a rule on the arguments in `x`."""
    name, gates, fixed = RULES[rule]
    function = getattr(matrix, name + '_reference' if reference else name)
    return function(x['q'], x['k'], x['v'], *(x[gate] for gate in gates), **fixed, **options)


def some_state(rule: str, x: dict):
    """A state to go on from; its two rows are at different places of a chunk of 4."""
    if rule not in GRID:
        return x['state']
    return matrix.MemoryState(x['state'], x['state'][:, ::-1], jnp.array([7, 13], jnp.int32))


def close(got, expected, tolerance: float = 1e-11) -> None:
    """Compare pytrees: rms of the difference relative to the rms of what is expected."""
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert a.shape == b.shape
        assert np.isfinite(a).all()
        assert np.sqrt(np.mean((a - b) ** 2)) <= tolerance * np.sqrt(np.mean(b**2)) + 1e-30


SEGMENTS = np.array([[5, 5, 5, 2, 2, 2, 2, 2, 5, 5, 6, 6, 6], [0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1]])


# Chunks against tokens


LARGE = ['linear-channel', 'delta-decay', 'dgd-l2-chunk-running']


@pytest.mark.parametrize('rule, chunk_size', [(rule, 4) for rule in RULES] + [(rule, 16) for rule in LARGE])
def test_chunks_equal_the_tokens(x64, rule, chunk_size):
    """From a state, with segments that begin anywhere, several of them inside one chunk."""
    x = inputs()
    options = dict(state=some_state(rule, x), initial=x['initial'], segment_ids=SEGMENTS, chunk_size=chunk_size)
    close(run(rule, x, **options), run(rule, x, reference=True, **options))


@pytest.mark.parametrize('rule, group', [(rule, 1) for rule in LARGE] + [('delta-decay', 2**30)])
def test_gradients_equal_the_tokens(x64, monkeypatch, rule, group):
    """With respect to every argument, the state and the initial state; with a chunk a group and all chunks at once."""
    monkeypatch.setattr(matrix_chunks, '_GROUP_ELEMENTS', group)
    weights = jnp.sin(jnp.arange(BATCH * TIME * HEADS * DIM_V, dtype=float)).reshape(BATCH, TIME, HEADS, DIM_V)

    def total(x, reference):
        options = dict(state=some_state(rule, x), initial=x['initial'], segment_ids=SEGMENTS, chunk_size=4)
        y, state = run.__wrapped__(rule, x, reference=reference, **options)
        floats = [leaf for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.floating)]
        return jnp.sum(weights * y) + sum(jnp.sum(jnp.sin(leaf)) for leaf in floats)

    grad = jax.jit(jax.value_and_grad(total), static_argnums=1)
    got, expected = grad(inputs(), False), grad(inputs(), True)
    close(got, expected)
    assert all(np.any(got[1][name]) for name in ('q', 'k', 'v', 'state', 'initial', *RULES[rule][1]))


@pytest.mark.parametrize('rule', ['linear-channel', 'dgd-l2-chunk-running'])
def test_gradients_equal_finite_differences(x64, rule):
    x = inputs(time=5, batch=1)
    names = ('q', 'k', 'v', 'initial', *RULES[rule][1])

    @jax.jit
    def function(*arrays):
        values = dict(zip(names, arrays, strict=True))
        y, state = run(rule, values, initial=values['initial'], chunk_size=2)
        return y, state.running if rule in GRID else state

    check_grads(function, tuple(x[name] for name in names), order=1, modes=['rev'], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize('rule', ['linear', 'linear-channel', 'delta-decay'])
def test_chunk_size_does_not_matter_to_tokenwise_rules(x64, rule):
    expected = run(rule, inputs(), chunk_size=1)
    for chunk_size in (5, 64):
        close(run(rule, inputs(), chunk_size=chunk_size), expected)


@pytest.mark.parametrize('rule', ['linear-channel', 'delta-decay', 'dgd-dot-chunk-running'])
def test_decays_near_zero_and_one(x64, rule):
    """Float32 chunks against float64 tokens, where running sums of log decays would lose their digits; finite gradients."""
    x = inputs(time=64)
    rng = np.random.default_rng(1)
    for name in ('g', 'gk'):
        draws = rng.uniform(size=x[name].shape)
        log = np.where(draws < 0.05, -60.0, np.where(draws < 0.1, -np.inf, -1e-6 * draws))
        x[name] = jnp.asarray(np.where(draws > 0.95, 0.0, log))
    x['eta'] = 0.5 * x['eta']
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), x)

    def function(x, reference=False):
        y, state = run(rule, x, reference=reference, chunk_size=16)
        return y, state.running if rule in GRID else state

    expected = function(jax.tree.map(lambda leaf: leaf.astype(jnp.float64), narrow), reference=True)
    close(jax.jit(function)(narrow), expected, 2e-5)
    grad = jax.jit(jax.grad(lambda x: sum(jnp.sum(part) for part in function(x))))(narrow)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grad))


@pytest.mark.parametrize('rule', LARGE)
def test_bfloat16_inputs_keep_a_float32_memory(rule):
    x = inputs(time=64)
    names = ('q', 'k', 'v')
    half = {name: leaf.astype(jnp.bfloat16) if name in names else leaf for name, leaf in x.items()}
    full = {name: leaf.astype(jnp.float32) for name, leaf in half.items()}
    (y, state), (y_full, state_full) = (run(rule, x, chunk_size=16) for x in (half, full))
    assert y.dtype == jnp.bfloat16
    assert jax.tree.leaves(state)[0].dtype == jnp.float32
    close(y, y_full, 1e-2)
    close(state, state_full, 1e-2)


# States, segments, batches


@pytest.mark.parametrize('piece', [1, 3, 7])
@pytest.mark.parametrize('rule', ['linear-channel', 'delta-decay', 'dgd-l2-token-anchor', 'dgd-l2-chunk-running'])
def test_streaming_equals_the_whole(x64, rule, piece):
    """Pieces of 3 and of 7 tokens begin at every place of a chunk of 4."""
    x = inputs(time=21)
    expected = run(rule, x, initial=x['initial'], chunk_size=4)
    state, outputs = None, []
    for start in range(0, 21, piece):
        part = {name: leaf[:, start : start + piece] if leaf.shape[:2] == (BATCH, 21) else leaf for name, leaf in x.items()}
        y, state = run(rule, part, state=state, initial=x['initial'], chunk_size=4)
        outputs.append(y)
    close((jnp.concatenate(outputs, 1), state), expected)


@pytest.mark.parametrize('rule', ['linear-channel', 'delta-decay'])
def test_packed_documents_are_independent(x64, rule):
    x = inputs(batch=1)
    ids = jnp.array([[0, 0, 0, 0, 0, 3, 3, 0, 0, 0, 0, 0, 0]])  # the third document has the first one's id
    y, state = run(rule, x, initial=x['initial'], segment_ids=ids, chunk_size=4)
    for start, end in ((0, 5), (5, 7), (7, 13)):
        part = {name: leaf[:, start:end] if leaf.shape[:2] == (1, TIME) else leaf for name, leaf in x.items()}
        alone, last = run(rule, part, initial=x['initial'], chunk_size=4)
        close(y[:, start:end], alone)
    close(state, last)


def test_documents_on_the_grid_are_independent(x64):
    x = inputs(batch=1)
    ids = jnp.array([[0] * 8 + [1] * 5])
    y, state = run('dgd-l2-chunk-running', x, initial=x['initial'], segment_ids=ids, chunk_size=4)
    part = {name: leaf[:, 8:] if leaf.shape[:2] == (1, TIME) else leaf for name, leaf in x.items()}
    alone, last = run('dgd-l2-chunk-running', part, initial=x['initial'], chunk_size=4)
    close((y[:, 8:], state.running, state.anchor), (alone, last.running, last.anchor))


@pytest.mark.parametrize('rule', LARGE)
def test_causal_and_independent_rows(x64, rule):
    """Changing the tokens from 6 on in row 0 changes nothing before them and nothing in row 1."""
    x, other = inputs(), inputs(seed=1)
    changed = {name: leaf.at[0, 6:].set(other[name][0, 6:]) if leaf.shape[:2] == (BATCH, TIME) else leaf for name, leaf in x.items()}
    (y, _), (y_changed, _) = (run(rule, x, chunk_size=4) for x in (x, changed))
    np.testing.assert_array_equal(y[0, :6], y_changed[0, :6])
    np.testing.assert_array_equal(y[1], y_changed[1])
    assert np.all(np.any(y[0, 6:] != y_changed[0, 6:], axis=(1, 2)))


@pytest.mark.parametrize('rule', ['dgd-l2-token-running', 'dgd-l2-chunk-anchor', 'dgd-dot-chunk-running'])
@pytest.mark.parametrize('time', [1, 6])
def test_null_tokens_are_exactly_inert(rule, time):
    """eta = 0 and alpha = 1: not a bit of the memory changes, and reads see the initial memory (identity 16)."""
    x = inputs(time=time)
    x |= {'eta': jnp.zeros_like(x['eta']), 'g': jnp.zeros_like(x['g'])}
    y, state = run(rule, x, initial=x['initial'], chunk_size=4)
    for memory in jax.tree.leaves(state)[: 2 if rule in GRID else 1]:
        np.testing.assert_array_equal(memory, np.broadcast_to(x['initial'], memory.shape))
    close(y, jnp.einsum('hkv,bthk->bthv', x['initial'], x['q']), 1e-6)


@pytest.mark.parametrize('rule', ['linear-decay', 'linear-channel', 'delta-decay'])
def test_heads_may_share_queries_and_keys(x64, rule):
    """One head of them is as good as equal ones, in chunks and token by token."""
    x = inputs()
    shared = x | {name: x[name][:, :, :1] for name in ('q', 'k')}
    repeated = x | {name: jnp.repeat(shared[name], HEADS, 2) for name in ('q', 'k')}
    options = dict(state=some_state(rule, x), initial=x['initial'], segment_ids=SEGMENTS, chunk_size=4)
    expected = run(rule, repeated, **options)
    for reference in (False, True):
        close(run(rule, shared, reference=reference, **options), expected)


def test_gradients_of_shared_queries_and_keys_add_up_over_heads(x64):
    x = inputs()

    @functools.partial(jax.jit, static_argnums=1)
    def gradients(x, repeats):
        repeated = lambda x: x | {name: jnp.repeat(x[name][:, :, :1], repeats, 2) for name in ('q', 'k')}
        return jax.grad(lambda x: jnp.sum(jnp.sin(run.__wrapped__('linear-decay', repeated(x), chunk_size=4)[0])))(x)

    close(gradients(x, 1), gradients(x, HEADS))


# The algebra of the rules (spec section 7)


def test_dot_objective_is_the_gated_delta_rule(x64):
    """Identity 10: beta = eta / alpha and values scaled by alpha."""
    x = inputs()
    expected = run('dgd-dot-token-running', x, chunk_size=4)
    alpha = jnp.exp(x['g'])
    close(run('delta-decay', x | {'beta': x['eta'] / alpha, 'v': alpha[..., None] * x['v']}, chunk_size=4), expected)


def test_l2_objective_erases_twice_what_it_writes(x64):
    """Identity 11: erase 2 eta, so the fixed point of a repeated token is S^T k = v / 2."""
    x = inputs()
    alpha = jnp.exp(x['g'])
    equal = x | {'beta': 2 * x['eta'] / alpha, 'v': alpha[..., None] * x['v'] / 2}
    close(run('delta-decay', equal, chunk_size=4), run('dgd-l2-token-running', x, chunk_size=4))
    repeated = {name: jnp.repeat(x[name][:, :1], 64, 1) for name in ('q', 'k', 'v')}
    gates = {'eta': jnp.full((BATCH, 64, HEADS), 0.3), 'g': jnp.zeros((BATCH, 64, HEADS))}
    _, state = run('dgd-l2-token-running', repeated | gates, chunk_size=16)
    close(jnp.einsum('bhkv,bhk->bhv', state, x['k'][:, 0]), x['v'][:, 0] / 2)


def test_a_negative_eigenvalue_tracks_parity(x64):
    """alpha - 2 eta = -1 flips the memory along k at each one, over any number of tokens and chunks."""
    bits = np.random.default_rng(0).integers(0, 2, (1, 200, 1))
    k = np.broadcast_to(np.eye(4)[0], (1, 200, 1, 4))
    x = {'q': k, 'k': k, 'v': np.zeros((1, 200, 1, 1)), 'eta': bits.astype(float), 'g': np.zeros((1, 200, 1))}
    y, _ = run('dgd-l2-token-running', x, initial=np.eye(4)[None, :, :1], chunk_size=16)
    np.testing.assert_allclose(y[0, :, 0, 0], 1 - 2 * (np.cumsum(bits[0, :, 0]) % 2), atol=1e-12)


def test_anchored_gradients_at_the_ends_of_chunk_size(x64):
    """Identity 12: chunks of one token are the token-wise rule; one chunk is a single anchored batch."""
    x = inputs()
    y, state = run('dgd-l2-chunk-running', x, initial=x['initial'], chunk_size=1)
    close((y, state.running), run('dgd-l2-token-running', x, initial=x['initial']))
    x |= {'g': jnp.zeros_like(x['g'])}
    y, state = run('dgd-l2-chunk-anchor', x, initial=x['initial'], chunk_size=TIME + 1)
    close(y, jnp.einsum('hkv,bthk->bthv', x['initial'], x['q']))
    target = x['v'] - jnp.einsum('hkv,bthk->bthv', x['initial'], x['k'])
    memory = jnp.broadcast_to(x['initial'], (BATCH, HEADS, DIM_K, DIM_V))
    for t in range(TIME):
        key, rate = x['k'][:, t], x['eta'][:, t, :, None]
        row = rate * (target[:, t] - jnp.einsum('bhkv,bhk->bhv', memory, key))
        memory += key[..., None] * row[..., None, :]
    close(state.running, memory)


def test_anchoring_error_is_of_second_order(x64):
    """Identity 13: it falls by four when eta is halved."""
    x = inputs()
    errors = []
    for scale in (0.01, 0.005):
        small = x | {'eta': scale * x['eta'], 'g': 0 * x['g']}
        anchored = run('dgd-l2-chunk-running', small, initial=x['initial'], chunk_size=TIME)[0]
        errors.append(float(jnp.abs(anchored - run('dgd-l2-token-running', small, initial=x['initial'])[0]).max()))
    assert 3.5 < errors[0] / errors[1] < 4.5


@pytest.mark.parametrize('objective', ['l2', 'dot'])
def test_one_step_follows_the_gradient_of_the_objective(x64, objective):
    """Identity 18: S (alpha - eta k k^T) minus eta times autodiff's gradient, of one half of the squared error."""
    x = inputs(time=1, batch=1)
    key, value = x['k'][0, 0, 0], x['v'][0, 0, 0]
    loss = {'l2': lambda s: 0.5 * jnp.sum((s.T @ key - value) ** 2), 'dot': lambda s: -value @ (s.T @ key)}[objective]
    start, eta, alpha = x['state'][0, 0], x['eta'][0, 0, 0], jnp.exp(x['g'][0, 0, 0])
    expected = alpha * start - eta * jnp.outer(key, key) @ start - eta * jax.grad(loss)(start)
    padded = {name: jnp.concatenate([x[name], jnp.zeros_like(x[name])], 1) for name in ('q', 'k', 'v', 'eta', 'g')}
    _, state = run(f'dgd-{objective}-token-running', padded, state=x['state'])
    close(state[0, 0], expected)


def test_a_retention_of_zero_wipes_the_memory(x64):
    """Identity 16: only what token 6 wrote and later tokens is left."""
    x = inputs()
    x['g'] = x['g'].at[:, 6].set(-jnp.inf)
    x['eta'] = x['eta'].at[:, 6].set(0.0)
    y, state = run('dgd-l2-token-running', x, initial=x['initial'], chunk_size=4)
    later = {name: x[name][:, 7:] for name in ('q', 'k', 'v', 'eta', 'g')}
    close((y[:, 7:], state), run('dgd-l2-token-running', later, chunk_size=4))
    np.testing.assert_array_equal(y[:, 6], 0.0)


# Golden vectors

SCALE = 16**-0.5


def golden(folder, name: str, dtype) -> dict[str, jax.Array]:
    with np.load(folder / 'golden' / f'{name}.npz') as arrays:
        return {key: jnp.asarray(array, dtype) for key, array in arrays.items()}


def token_first(x: dict, *names: str) -> list[jax.Array]:
    return [jnp.swapaxes(x[name], 1, 2) for name in names]


def retention(x, call):
    q, k, v = token_first(x, 'q', 'k', 'v')
    decay = jnp.broadcast_to(jnp.log1p(-(2.0 ** -(5 + jnp.arange(2.0, dtype=q.dtype)))), q.shape[:3])
    y, state = call('linear_attention', q * SCALE, k, v, decay)
    return jnp.swapaxes(y, 1, 2), state


def linear_attn(x, call):
    return call('linear_attention', x['q'] * SCALE, x['k'], x['v'], x.get('g', x.get('gk')), state=x['h0'])


def mamba2_ssd(x, call):
    y, state = call('linear_attention', x['C'], x['B'], x['dt'][..., None] * x['x'], x['A'][None, None] * x['dt'])
    return y, state.mT


def hgrn2(x, call):
    forget = 0.3 + 0.7 * jax.nn.sigmoid(x['f_raw'])
    return call('linear_attention', jax.nn.silu(x['q_raw']) * SCALE, 1 - forget, x['i'], jnp.log(forget), state=x['h0'])


def delta_rule(x, call):
    q, k, v, beta = token_first(x, 'q', 'k', 'v', 'beta')
    y, state = call('delta_rule', q * SCALE, k, v, beta, state=x['h0'])
    return jnp.swapaxes(y, 1, 2), state


def gated_delta_rule(x, call):
    return call('delta_rule', x['q'] * SCALE, x['k'], x['v'], x['beta'], x['g'], state=x['h0'])


GOLDEN = {
    'retention': (retention, 'q k v'),
    'linear_attn': (linear_attn, 'q k v h0'),
    'simple_gla': (linear_attn, 'q k v g h0'),
    'mamba2_ssd': (mamba2_ssd, 'x dt A B C'),
    'gla': (linear_attn, 'q k v gk h0'),
    'hgrn2': (hgrn2, 'q_raw f_raw i h0'),
    'delta_rule': (delta_rule, 'q k v beta h0'),
    'gated_delta_rule': (gated_delta_rule, 'q k v g beta h0'),
    'gated_delta_rule_stress': (gated_delta_rule, 'q k v g beta h0'),
    'gated_delta_rule_corrkeys': (gated_delta_rule, 'q k v g beta h0'),
}


def check_golden(folder, name: str, suffix: str, dtype, tolerance: float) -> None:
    """Outputs, last state and all gradients."""
    function, names = GOLDEN[name]
    x = golden(folder, name, dtype)
    call = lambda rule, *args, **kw: getattr(matrix, rule + suffix)(*args, **kw, chunk_size=32)

    @jax.jit
    def values_and_gradients(x):
        outputs, pull = jax.vjp(lambda part: function(x | part, call), {key: x[key] for key in names.split()})
        return outputs, pull((x['do'], x.get('dht', jnp.zeros_like(outputs[1]))))[0]

    outputs, gradients = values_and_gradients(x)
    with np.load(folder / 'golden' / f'{name}.npz') as arrays:
        expected = (arrays['o'], arrays.get('ht', arrays.get('ht_recurrent')))
        close(outputs, expected, tolerance)
        close(gradients, {key: arrays[f'd{key}'] for key in gradients}, tolerance)


@pytest.mark.parametrize(
    'name, suffix',
    [(name, '') for name in GOLDEN if name != 'hgrn2']
    + [(name, '_reference') for name in ('gla', 'gated_delta_rule')]
    + [pytest.param(name, '_reference', marks=pytest.mark.slow) for name in GOLDEN if name not in ('gla', 'gated_delta_rule')]
    + [pytest.param('hgrn2', '', marks=pytest.mark.slow)],
)
def test_golden_vectors_in_float64(x64, shared_data, name, suffix):
    check_golden(shared_data, name, suffix, jnp.float64, 1e-9)


@pytest.mark.parametrize('name', ['gated_delta_rule_stress', 'gated_delta_rule_corrkeys'])
def test_hard_golden_vectors_in_float32(shared_data, name):
    check_golden(shared_data, name, '', jnp.float32, 1e-3)


@pytest.mark.slow
@pytest.mark.parametrize('suffix', ['_reference', ''])
@pytest.mark.parametrize('name', GOLDEN)
def test_all_golden_vectors_in_float32(shared_data, name, suffix):
    hard = name.endswith(('stress', 'corrkeys'))
    check_golden(shared_data, name, suffix, jnp.float32, 1e-3 if hard else 1e-5 if suffix else 1e-4)


def test_golden_packed_sequences(x64, shared_data):
    """Segments with initial states of their own: one run from each, under vmap."""
    x = golden(shared_data, 'gated_delta_rule_varlen', jnp.float64)
    bounds = np.asarray(x['cu_seqlens']).astype(int)
    ids = jnp.asarray(np.repeat(np.arange(3), np.diff(bounds))[None])
    args = (x['q'] * SCALE, x['k'], x['v'], x['beta'], x['g'])
    function = lambda initial: matrix.delta_rule(*args, initial=initial, segment_ids=ids, chunk_size=32)
    y, state = jax.jit(jax.vmap(function))(x['h0'])
    for i in range(3):
        close(y[i, :, bounds[i] : bounds[i + 1]], x['o'][:, bounds[i] : bounds[i + 1]], 1e-9)
    close(state[2, 0], x['ht'][2], 1e-9)


# Bad arguments


@pytest.mark.parametrize(
    'change, message',
    [
        ({'k': jnp.zeros((2, 13, 2, 5))}, 'k must'),
        ({'v': jnp.zeros((2, 12, 2, 3))}, 'v must'),
        ({'v': jnp.zeros((2, 13, 3, 3))}, 'v must'),
        ({'q': jnp.zeros((2, 13, 8))}, 'q must'),
        ({'eta': jnp.zeros((2, 13))}, 'eta must'),
        ({'log_alpha': jnp.zeros((2, 13, 1))}, 'log_alpha must'),
        ({'initial': jnp.zeros((2, 3, 4))}, 'initial must'),
        ({'state': jnp.zeros((2, 2, 3, 4))}, 'state must'),
        ({'state': jnp.zeros((2, 2, 4, 3)), 'gradient': 'chunk'}, 'state must be a MemoryState'),
        ({'segment_ids': jnp.zeros((2, 12), int)}, 'segment_ids must'),
        ({'segment_ids': jnp.zeros((2, 13))}, 'segment_ids must be integers'),
        ({'chunk_size': 0}, 'chunk_size must'),
        ({'chunk_size': 2.0}, 'chunk_size must'),
        ({'objective': 'L2'}, "objective must be one of .*got 'L2'"),
        ({'gradient': 'batch'}, 'gradient must'),
        ({'read': 'start'}, 'read must'),
    ],
)
def test_bad_arguments(change, message):
    x = inputs()
    arguments = {'q': x['q'], 'k': x['k'], 'v': x['v'], 'eta': x['eta'], 'log_alpha': x['g']} | change
    for function in (matrix.delta_gradient_descent, matrix.delta_gradient_descent_reference):
        with pytest.raises(ValueError, match=message):
            function(**arguments)


def test_bad_decay_of_linear_attention():
    x = inputs()
    with pytest.raises(ValueError, match='log_decay must'):
        matrix.linear_attention(x['q'], x['k'], x['v'], x['gk'][..., :3])
