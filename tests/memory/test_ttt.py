"""Test-time training layers: against the official implementation, their loop over tokens, and what must hold by their equations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nested_jax.memory.ttt
from nested_jax.memory.ttt import Layer, Norm, TTTState, inner_model, ttt, ttt_initial_state, ttt_reference

WIDTH, HEADS, SIZE = 4, 2, 4
MODELS = ('linear', 'mlp')
compiled = functools.partial(jax.jit, static_argnames='function')


def random_call(model: str, time: int, *, batch: int = 2) -> dict:
    """Arrays of `ttt` at random, drawn by numpy: nothing to compile."""
    rng = np.random.default_rng(0)
    rows = (batch, time, HEADS, WIDTH)
    widths = (WIDTH, WIDTH) if model == 'linear' else (WIDTH, 6, WIDTH)
    pairs = zip(widths[:-1], widths[1:], strict=True)
    call = {name: rng.normal(size=rows) for name in ('q', 'k', 'v')} | {
        'eta': rng.uniform(0.05, 0.3, rows[:3]),
        'token_scale': 1 / np.arange(1, SIZE + 1) + 0.1 * rng.normal(size=SIZE),
        'norm': Norm(1 + 0.2 * rng.normal(size=(HEADS, WIDTH)), 0.2 * rng.normal(size=(HEADS, WIDTH))),
        'initial': tuple(Layer(rng.normal(size=(HEADS, a, b)) / 2, rng.normal(size=(HEADS, 1, b)) / 2) for a, b in pairs),
    }
    return jax.tree.map(jnp.asarray, call)


def part(call: dict, begin: int, end: int) -> dict:
    """The call of tokens begin to end."""
    return {name: x[:, begin:end] if name in ('q', 'k', 'v', 'eta', 'segment_ids') else x for name, x in call.items()}


@compiled
def run(call: dict, function=ttt):
    return function(**call)


@compiled
def gradient(call: dict, function=ttt):
    """Gradients of a number that reads outputs and state unevenly, and (outputs, state)."""

    def scalar(call):
        y, state = function(**call)
        leaves = [y, *jax.tree.leaves((state.anchor, state.gradient))]
        terms = (jnp.sum(jnp.sin(leaf + i) * jnp.arange(leaf.size).reshape(leaf.shape) / leaf.size) for i, leaf in enumerate(leaves))
        return sum(terms), (y, state)

    return jax.grad(scalar, has_aux=True, allow_int=True)(call)


def assert_trees_close(got, want, atol: float) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
        if a.dtype != jax.dtypes.float0:
            np.testing.assert_allclose(a, b, atol=atol, rtol=atol, err_msg=jax.tree_util.keystr(path))


def relative_rms(got, want) -> float:
    return float(np.sqrt(np.mean(np.square(np.asarray(got, np.float64) - want)) / np.mean(np.square(want))))


def golden(folder, model: str) -> dict[str, jax.Array]:
    with np.load(folder / 'golden' / f'ttt_{model}_official.npz') as arrays:
        return {name: jnp.asarray(arrays[name], float) for name in arrays if arrays[name].dtype.kind == 'f'}


def flat(x):
    """Mini-batches of heads (B, H, n, C, D) -> (B, T, H, D)."""
    batch, heads, n, size, width = x.shape
    return jnp.moveaxis(x.reshape(batch, heads, n * size, width), 1, 2)


@compiled
def golden_gradients(g: dict, function=ttt):
    """Gradients of the golden file's objective, and its outputs and last weights; everything in the golden file's layout."""
    kernels = [name for name in ('W1', 'W2') if name in g]
    names = ('XQ', 'XK', 'XV', 'ttt_lr_eta', 'ttt_norm_weight', 'ttt_norm_bias', *kernels, *(name.replace('W', 'b') for name in kernels))

    def total(inputs):
        initial = tuple(Layer(inputs[name], inputs[name.replace('W', 'b')]) for name in kernels)
        y, state = function(
            *(flat(inputs[name]) for name in ('XQ', 'XK', 'XV')), flat(inputs['ttt_lr_eta'].mT)[..., 0], g['token_eta'][0, 0, 0, :, 0],
            norm=Norm(inputs['ttt_norm_weight'], inputs['ttt_norm_bias']), initial=initial,
        )  # fmt: skip
        y = y.reshape(g['dout'].shape)
        last = {f'{w}{i + 1}_last': x for i, layer in enumerate(state.anchor) for w, x in zip('Wb', layer, strict=True)}
        return jnp.sum(y * g['dout']), {'out': y, **last}

    gradients, outputs = jax.grad(total, has_aux=True)({name: g[name] for name in names})
    return outputs | {f'd_{name}': x for name, x in gradients.items()}


@pytest.mark.parametrize('model', MODELS)
@pytest.mark.parametrize('function', [ttt, pytest.param(ttt_reference, marks=pytest.mark.slow)])
def test_golden_official_implementation(x64, shared_data, model, function):
    g = golden(shared_data, model)
    got = golden_gradients(g, function=function)
    assert set(got) >= {'out', 'W1_last', 'b1_last', 'd_XQ', 'd_ttt_lr_eta', 'd_b1', 'd_ttt_norm_bias'} and len(got) == (
        11 if model == 'linear' else 15
    )
    for name, value in got.items():
        assert relative_rms(value, g[name]) < 1e-9, (name, relative_rms(value, g[name]))


@pytest.mark.slow
@pytest.mark.parametrize('model', MODELS)
def test_golden_in_float32(shared_data, model):
    g = golden(shared_data, model)
    for name, value in golden_gradients(g).items():
        assert value.dtype == jnp.float32 and relative_rms(value, g[name]) < 1e-4, (name, relative_rms(value, g[name]))


@pytest.mark.slow
def test_equals_the_loop_over_tokens(x64, monkeypatch):
    """Outputs, states and gradients: documents, padding, the rest of a mini-batch, five mini-batches in groups of three."""
    monkeypatch.setattr(nested_jax.memory.ttt, '_GROUP', 3)
    call = random_call('mlp', 18)
    call['segment_ids'] = jnp.array([[1] * 6 + [0] * 2 + [2] * 10, [3] * 4 + [4] * 14])
    call['eta'] = call['eta'].at[:, 6:8].set(0)
    assert_trees_close(gradient(call), gradient(call, function=ttt_reference), 1e-10)


@pytest.mark.slow
@pytest.mark.parametrize('model', MODELS)
def test_going_on_from_a_state_equals_the_loop_over_tokens(x64, model):
    call = random_call(model, 18)
    _, state = run(part(call, 0, 5))
    later = part(call, 5, 18) | {'state': TTTState(state.anchor, state.gradient, jnp.array([5, 7], jnp.int32))}
    assert_trees_close(gradient(later), gradient(later, function=ttt_reference), 1e-10)


@pytest.mark.slow
def test_whole_mini_batches_leave_the_same_state_as_a_cut_one(x64):
    call = random_call('mlp', 2 * SIZE)
    y, state = run(call)
    y_first, middle = run(part(call, 0, 3))
    y_second, last = run(part(call, 3, 2 * SIZE) | {'state': middle})
    assert_trees_close((jnp.concatenate([y_first, y_second], 1), last), (y, state), 1e-12)
    assert not any(leaf.any() for leaf in jax.tree.leaves(state.gradient))


@pytest.mark.slow
def test_without_a_rate_it_is_the_initial_model(x64):
    call = random_call('mlp', 7)
    y, state = run(call | {'eta': 0 * call['eta']})
    norm = jax.tree.map(lambda x: x[None, :, None], call['norm'])
    expected = inner_model(jax.tree.map(lambda w: w[None], call['initial']), jnp.moveaxis(call['q'], 1, 2), norm)
    np.testing.assert_allclose(jnp.moveaxis(y, 1, 2), expected, atol=1e-12)
    assert_trees_close(state.anchor, ttt_initial_state(call['initial'], 2).anchor, 0)


def test_one_token_mini_batches_are_online_gradient_descent(x64):
    """C = 1: W_t = W_{t-1} - s eta_t grad at W_{t-1}, written out for the linear model without its norm's help from the library."""
    call = random_call('linear', 5, batch=1)
    y, _ = run(call | {'token_scale': jnp.ones(1)})
    q, k, v, eta = (np.asarray(call[name])[0, :, 0] for name in ('q', 'k', 'v', 'eta'))
    weight, bias = np.asarray(call['initial'][0].kernel[0]), np.asarray(call['initial'][0].bias[0, 0])
    gamma, beta = (np.asarray(x[0]) for x in call['norm'])
    project = np.eye(WIDTH) - 1 / WIDTH
    for t in range(5):
        deviation = np.sqrt(np.mean((project @ (k[t] @ weight + bias)) ** 2) + 1e-6)
        normed = project @ (k[t] @ weight + bias) / deviation
        jacobian = (project - np.outer(normed, normed) / WIDTH) / deviation  # of the norm, symmetric
        step = eta[t] * jacobian @ (gamma * (k[t] + normed * gamma + beta - v[t]))
        weight, bias = weight - np.outer(k[t], step), bias - step
        z = project @ (q[t] @ weight + bias)
        np.testing.assert_allclose(y[0, t, 0], q[t] + gamma * z / np.sqrt(np.mean(z**2) + 1e-6) + beta, atol=1e-10)


def test_wrong_arguments_are_named():
    call = random_call('mlp', 3)
    state = ttt_initial_state(call['initial'], 2)
    for name, wrong in {
        'q': call['q'][0], 'k': call['k'][:, :2], 'v': call['v'][..., :2], 'eta': call['eta'][..., :1],
        'token_scale': call['token_scale'][:0],
        'norm.scale': call['norm']._replace(scale=call['norm'].shift[0]), 'initial': (), 'segment_ids': jnp.zeros((2, 4), jnp.int32),
        r'initial\[1\].kernel': (call['initial'][0], call['initial'][0]), 'state': state._replace(position=jnp.zeros(3, jnp.int32)),
    }.items():  # fmt: skip
        field = name.split('.')[0].split('\\')[0]
        with pytest.raises(ValueError, match=name):
            jax.eval_shape(lambda call: ttt(**call), call | {field: wrong})
