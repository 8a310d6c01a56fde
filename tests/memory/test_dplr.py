"""Diagonal-plus-low-rank memories: golden vectors of four models, chunks against tokens, hard gates and keys, streaming."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from nested_jax.memory import dplr as rules
from nested_jax.memory import matrix, matrix_chunks

BATCH, TIME, HEADS, DIM_K, DIM_V = 2, 13, 2, 4, 3
NAMES = ('q', 'k', 'v', 'a', 'b', 'g')
SEGMENTS = np.array([[5, 5, 5, 2, 2, 2, 2, 2, 5, 5, 6, 6, 6], [0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1]])


def inputs(seed: int = 0, time: int = TIME, batch: int = BATCH) -> dict[str, jax.Array]:
    """Random arguments: removals as RWKV-7's, but with a write direction of their own; decays between 0 and 1."""
    rng = np.random.default_rng(seed)
    rows = (batch, time, HEADS)
    kappa = rng.normal(size=(*rows, DIM_K))
    kappa /= np.linalg.norm(kappa, axis=-1, keepdims=True)
    arrays = {
        'q': rng.normal(size=(*rows, DIM_K)),
        'k': rng.normal(size=(*rows, DIM_K)),
        'v': rng.normal(size=(*rows, DIM_V)),
        'a': -kappa,
        'b': kappa * rng.uniform(size=(*rows, DIM_K)) + 0.1 * rng.normal(size=(*rows, DIM_K)),
        'g': np.log(rng.uniform(0.05, 1, size=(*rows, DIM_K))),
        'state': rng.normal(size=(batch, HEADS, DIM_K, DIM_V)),
        'initial': rng.normal(size=(HEADS, DIM_K, DIM_V)),
    }
    return {name: jnp.asarray(array) for name, array in arrays.items()}


@functools.partial(jax.jit, static_argnames=('reference', 'chunk_size'))
def run(x: dict, *, reference: bool = False, **options):
    """(y, state) on the arguments in `x`."""
    return (rules.dplr_reference if reference else rules.dplr)(*(x[name] for name in NAMES), **options)


def close(got, expected, tolerance: float = 1e-11) -> None:
    """Compare pytrees: rms of the difference relative to the rms of what is expected."""
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert a.shape == b.shape
        assert np.isfinite(a).all()
        assert np.sqrt(np.mean((a - b) ** 2)) <= tolerance * np.sqrt(np.mean(b**2)) + 1e-30


# Chunks against tokens


@pytest.mark.parametrize('chunk_size', [4, *(pytest.param(size, marks=pytest.mark.slow) for size in (1, 5, 64))])
def test_chunks_equal_the_tokens(x64, chunk_size):
    """From a state, with segments that begin anywhere, several of them inside one chunk, and without either."""
    x = inputs()
    options = dict(state=x['state'], initial=x['initial'], segment_ids=SEGMENTS)
    close(run(x, **options, chunk_size=chunk_size), run(x, **options, reference=True))
    close(run(x, chunk_size=chunk_size), run(x, reference=True))


@pytest.mark.parametrize('group', [1, pytest.param(2**30, marks=pytest.mark.slow)])
def test_gradients_equal_the_tokens(x64, monkeypatch, group):
    """With respect to every argument, the state and the initial state; with a chunk a group and all chunks at once."""
    monkeypatch.setattr(matrix_chunks, '_GROUP_ELEMENTS', group)
    weights = jnp.sin(jnp.arange(BATCH * TIME * HEADS * DIM_V, dtype=float)).reshape(BATCH, TIME, HEADS, DIM_V)

    def total(x, reference):
        options = dict(state=x['state'], initial=x['initial'], segment_ids=SEGMENTS, chunk_size=4)
        y, state = run(x, reference=reference, **options)
        return jnp.sum(weights * y) + jnp.sum(jnp.sin(state))

    grad = jax.jit(jax.value_and_grad(total), static_argnums=1)
    got, expected = grad(inputs(), False), grad(inputs(), True)
    close(got, expected)
    assert all(np.any(leaf) for leaf in got[1].values())


@pytest.mark.slow
def test_gradients_equal_finite_differences(x64):
    x = inputs(time=5, batch=1)
    function = jax.jit(lambda *arrays: run(dict(zip(NAMES, arrays, strict=True)), initial=x['initial'], chunk_size=2))
    check_grads(function, tuple(x[name] for name in NAMES), order=1, modes=['rev'], atol=1e-6, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize('piece', [1, 3, 7])
def test_streaming_equals_the_whole(x64, piece):
    x = inputs(time=21)
    expected = run(x, initial=x['initial'], chunk_size=4)
    state, outputs = None, []
    for start in range(0, 21, piece):
        part = {name: leaf[:, start : start + piece] if leaf.shape[:2] == (BATCH, 21) else leaf for name, leaf in x.items()}
        y, state = run(part, state=state, initial=x['initial'], chunk_size=4)
        outputs.append(y)
    close((jnp.concatenate(outputs, 1), state), expected)


def test_later_tokens_and_other_rows_have_no_effect():
    x, other = inputs(), inputs(seed=1)
    changed = {name: leaf.at[0, 6:].set(other[name][0, 6:]) if name in NAMES else leaf for name, leaf in x.items()}
    (y, _), (y_changed, _) = (run(x, chunk_size=4) for x in (x, changed))
    np.testing.assert_array_equal(y[0, :6], y_changed[0, :6])
    np.testing.assert_array_equal(y[1], y_changed[1])
    assert np.all(np.any(y[0, 6:] != y_changed[0, 6:], axis=(1, 2)))


# Numbers


def narrow_against_wide(x: dict, tolerance: float) -> None:
    """Float32 chunks against float64 tokens, and the float32 gradients, which must be finite, against float64 ones."""
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), x)
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), narrow)
    close(run(narrow, chunk_size=32), run(wide, reference=True), tolerance)
    grad = jax.jit(jax.grad(lambda x: sum(jnp.sum(part) for part in run(x, chunk_size=32))))
    got, expected = grad(narrow), grad(wide)
    close(got, expected, 10 * tolerance)


@pytest.mark.slow
def test_decays_near_zero_and_one(x64):
    """Where differences of running sums of log decays would overflow or lose their digits."""
    x = inputs(time=40)
    draws = np.random.default_rng(1).uniform(size=x['g'].shape)
    log = np.where(draws < 0.05, -60.0, np.where(draws < 0.1, -np.inf, -1e-6 * draws))
    narrow_against_wide(x | {'g': jnp.asarray(np.where(draws > 0.95, 0.0, log))}, 2e-5)


@pytest.mark.slow
def test_removals_along_nearly_equal_keys(x64):
    """A triangular system whose powers overflow: keys of cosine 0.99, fully removed and written again, hardly decayed."""
    x = inputs(time=32)
    kappa = np.ones(x['a'].shape) + 0.1 * np.asarray(x['q'])
    kappa = jnp.asarray(kappa / np.linalg.norm(kappa, axis=-1, keepdims=True))
    narrow_against_wide(x | {'a': -kappa, 'b': 1.9 * kappa, 'k': kappa, 'g': jnp.full(kappa.shape, -1e-3)}, 1e-3)


@pytest.mark.slow
def test_bfloat16_inputs_keep_a_float32_memory():
    half = {name: leaf.astype(jnp.bfloat16) if name in ('q', 'k', 'v') else leaf for name, leaf in inputs(time=64).items()}
    (y, state), (y_full, state_full) = (run(x, chunk_size=16) for x in (half, jax.tree.map(lambda leaf: leaf.astype(jnp.float32), half)))
    assert y.dtype == jnp.bfloat16 and state.dtype == jnp.float32
    close(y, y_full, 1e-2)
    close(state, state_full, 1e-3)


def test_without_removals_it_is_linear_attention(x64):
    x = inputs()
    x |= {'a': jnp.zeros_like(x['a'])}
    close(run(x, chunk_size=4), matrix.linear_attention(x['q'], x['k'], x['v'], x['g'], chunk_size=4))


def test_removals_along_the_key_are_the_delta_rule_with_a_rate_of_erasure(x64):
    """Comba's rule for a removal key parallel to the key, in both forms of `matrix.delta_rule`."""
    x = inputs()
    rng = np.random.default_rng(2)
    g, beta, erase = (jnp.asarray(rng.uniform(size=(BATCH, TIME, HEADS))) for _ in range(3))
    k, decay = x['a'], jnp.broadcast_to(-g[..., None], x['g'].shape)
    general = {'k': beta[..., None] * k, 'a': jnp.exp(decay) * k, 'b': -erase[..., None] * k, 'g': decay}
    options = dict(state=x['state'], initial=x['initial'], segment_ids=SEGMENTS, chunk_size=4)
    expected = run(x | general, **options)
    for rule in (matrix.delta_rule, matrix.delta_rule_reference):
        close(rule(x['q'], k, x['v'], beta, -g, erase=erase, **options), expected)


# Golden vectors

SCALE = 16**-0.5


def general(x, call):
    return call(x['q'] * SCALE, x['k'], x['v'], x['a'], x['b'], x['gk'], state=x['h0'])


def rwkv7(x, call):
    return call(x['r'], x['k'], x['v'], -x['kk'], x['kk'] * x['a'], x['w'], state=x['h0'])


def along_a_key(x, call, key, g):
    """S' = e^g S, S = S' + beta k (v - S'^T key)^T."""
    write = x['beta'][..., None] * x['k']
    return call(x['q'] * SCALE, write, x['v'], jnp.exp(g) * key, -write, g, state=x['h0'])


GOLDEN = {
    'dplr': (general, 'q k v a b gk h0'),
    'rwkv7': (rwkv7, 'r w k v kk a h0'),
    'kda': (lambda x, call: along_a_key(x, call, x['k'], x['g']), 'q k v g beta h0'),
    'comba': (lambda x, call: along_a_key(x, call, x['p'], jnp.broadcast_to(x['g'][..., None], x['k'].shape)), 'q k v p g beta h0'),
}


def check_golden(folder, name: str, function, dtype, tolerance: float) -> None:
    """Outputs, last state and all gradients."""
    model, names = GOLDEN[name]
    with np.load(folder / 'golden' / f'{name}.npz') as arrays:
        x, expected = ({key: jnp.asarray(array, kind) for key, array in arrays.items()} for kind in (dtype, float))

    @jax.jit
    def values_and_gradients(x):
        call = functools.partial(function, chunk_size=32)
        outputs, pull = jax.vjp(lambda part: model(x | part, call), {key: x[key] for key in names.split()})
        return outputs, pull((x['do'], x['dht']))[0]

    outputs, gradients = values_and_gradients(x)
    close(outputs, (expected['o'], expected['ht']), tolerance)
    close(gradients, {key: expected[f'd{key}'] for key in gradients}, tolerance)


@pytest.mark.parametrize('name', ['rwkv7', *(pytest.param(name, marks=pytest.mark.slow) for name in GOLDEN if name != 'rwkv7')])
def test_golden_vectors_in_float64(x64, shared_data, name):
    check_golden(shared_data, name, rules.dplr, jnp.float64, 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['dplr', 'comba'])
def test_golden_vectors_token_by_token_in_float64(x64, shared_data, name):
    check_golden(shared_data, name, rules.dplr_reference, jnp.float64, 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize('name', GOLDEN)
def test_golden_vectors_in_float32(shared_data, name):
    check_golden(shared_data, name, rules.dplr, jnp.float32, 1e-4)


# Bad arguments


@pytest.mark.parametrize(
    'change, message',
    [
        ({'a': jnp.zeros((2, 13, 2, 3))}, 'a must'),
        ({'b': jnp.zeros((2, 13, 2))}, 'b must'),
        ({'g': jnp.zeros((2, 13, 2))}, 'log_decay must'),
        ({'k': jnp.zeros((2, 13, 2, 5))}, 'k must'),
    ],
)
def test_bad_arguments(change, message):
    for reference in (False, True):
        with pytest.raises(ValueError, match=message):
            run.__wrapped__(inputs() | change, reference=reference)
