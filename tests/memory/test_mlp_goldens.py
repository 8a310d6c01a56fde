"""The deep memory and the linear one against golden vectors of public references."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nested_jax.memory.mlp import MLPWeights, mlp_memory, mlp_memory_reference
from tests.memory.linear_memory import linear_memory

# No test uses titans_luc_default_chunk16, titans_luc_chunk8_batch32 and titans_luc_nomomentum: their memory ends in a LayerNorm
# whose scale is itself written, its gates are means over a chunk, and a chunk's tokens read the weights before it. No memory of ours does
# any of these. Nor titans_linear_fla_asis, whose gradient is wrong.

FORMS = [(mlp_memory, 1e-4), (mlp_memory_reference, 1e-5)]  # and how close to float64 they are in float32
LINEAR = 1e-5  # a linear memory with momentum has no token loop, and its chunks keep to the tolerance of one


def load_golden(folder, name: str, dtype: str = 'float64') -> dict[str, jax.Array]:
    with np.load(folder / 'golden' / f'{name}.npz') as arrays:
        return {key: jnp.asarray(value, dtype) for key, value in arrays.items()}


def assert_rms_close(got, want, tolerance: float) -> None:
    """Against float64 in float32: the goldens' README compares root mean squares."""
    got, want = np.asarray(got, 'float64'), np.asarray(want, 'float64')
    assert np.sqrt(np.mean((got - want) ** 2)) < tolerance * np.sqrt(np.mean(want**2))


def golden_titans_mlp(function, size: int, q, k, v, theta, eta, alpha, w_in, w_out):
    """Outputs (B, T, D) and state of the residual MLP of derived_titans_mlp_res."""
    gates = (x[:, :, None] for x in (theta, jnp.log1p(-alpha), jnp.log(eta)))
    y, state = function(
        *(x[:, :, None] for x in (q, k, v)), *gates,
        initial=MLPWeights(w_in[None], w_out[None]), chunk_size=size, activation='gelu', dgd='none',
    )  # fmt: skip
    return y[:, :, 0], state


GOLDEN_MLP = ('q', 'k', 'v', 'theta', 'eta', 'alpha', 'W1', 'W2')


def test_golden_titans_mlp(x64, shared_data):
    """Outputs, last weights and momentum, and all gradients of float64 autograd over a loop."""
    g = load_golden(shared_data, 'derived_titans_mlp_res')

    def total(*arrays):
        y, state = golden_titans_mlp(mlp_memory, int(g['C']), *arrays)
        return jnp.sum(y * g['dy']), (y, state)

    names = GOLDEN_MLP
    grads, (y, state) = jax.jit(jax.grad(total, range(8), has_aux=True))(*(g[name] for name in names))
    np.testing.assert_allclose(y, g['y'], atol=1e-9)
    for name, last, momentum in zip(('W1', 'W2'), state.running, state.momentum, strict=True):
        np.testing.assert_allclose(last[:, 0], g[f'{name}_last'], atol=1e-9)
        np.testing.assert_allclose(momentum[:, 0], g[f'{name}_mom_last'], atol=1e-9)
    for name, grad in zip(names, grads, strict=True):
        np.testing.assert_allclose(grad, g[f'd_{name}'], atol=1e-9, err_msg=name)


@pytest.mark.parametrize(('function', 'tolerance'), FORMS)
def test_golden_titans_mlp_in_float32(shared_data, function, tolerance):
    g = load_golden(shared_data, 'derived_titans_mlp_res', 'float32')
    size = int(g['C'])
    y, state = jax.jit(functools.partial(golden_titans_mlp, function, size))(*(g[name] for name in GOLDEN_MLP))
    assert y.dtype == jnp.float32
    assert_rms_close(y, g['y'], tolerance)
    for name, last, momentum in zip(('W1', 'W2'), state.running, state.momentum, strict=True):
        assert_rms_close(last[:, 0], g[f'{name}_last'], tolerance)
        assert_rms_close(momentum[:, 0], g[f'{name}_mom_last'], tolerance)


@pytest.mark.parametrize('name', ['derived_titans_linear', 'derived_titans_linear_dgd'])
def test_golden_titans_linear(x64, shared_data, name):
    g = load_golden(shared_data, name)

    def total(q, k, v, theta, eta, alpha, weight):
        start = jnp.broadcast_to(weight[None], (q.shape[0], *weight.shape))
        erase = theta if name.endswith('dgd') else None
        y, last = linear_memory(q, k, v, theta, jnp.log1p(-alpha), jnp.log(eta), start, int(g['C']), erase)
        return jnp.sum(y * g['dy']), (y, last)

    names = ('q', 'k', 'v', 'theta', 'eta', 'alpha', 'W1')
    grads, (y, last) = jax.jit(jax.grad(total, range(7), has_aux=True))(*(g[name] for name in names))
    for got, want in zip((y, *last), ('y', 'W1_last', 'W1_mom_last'), strict=True):
        np.testing.assert_allclose(got, g[want], atol=1e-9)
    for key, grad in zip(names, grads, strict=True):
        np.testing.assert_allclose(grad, g[f'd_{key}'], atol=1e-9, err_msg=key)


@pytest.mark.parametrize('name', ['derived_titans_linear', 'derived_titans_linear_dgd'])
def test_golden_titans_linear_in_float32(shared_data, name):
    g = load_golden(shared_data, name, 'float32')
    start = jnp.broadcast_to(g['W1'][None], (len(g['q']), *g['W1'].shape))
    gates = (g['theta'], jnp.log1p(-g['alpha']), jnp.log(g['eta']))
    erase = g['theta'] if name.endswith('dgd') else None
    y, last = jax.jit(linear_memory, static_argnums=7)(g['q'], g['k'], g['v'], *gates, start, int(g['C']), erase)
    for got, want in zip((y, *last), ('y', 'W1_last', 'W1_mom_last'), strict=True):
        assert got.dtype == jnp.float32
        assert_rms_close(got, g[want], LINEAR)


def normalised_titans(q, k, v, theta, eta, alpha, w, b, h0):
    """Outputs and last weights of a peer's linear memory: objective 1/2 |LN(k M) - (v - k)|^2 at twice the rate, read M_t q + LN(M_t q)."""
    norm = lambda x: w[None, :, None] * jax.nn.standardize(x, epsilon=1e-6) + b[None, :, None]
    error = lambda z, target: jax.vjp(norm, z)[1](norm(z) - target)[0]
    heads_first = lambda x: jnp.moveaxis(x, 2, 1)
    theta, eta, alpha = (heads_first(x)[..., 0] for x in (theta, eta, alpha))
    q, k, v = map(heads_first, (q, k, v))
    read, (last, _) = linear_memory(q, k, v - k, 2 * theta, jnp.log1p(-alpha), jnp.log(eta), h0, 16, error=error)
    return jnp.moveaxis(read + norm(read), 1, 2), last


NORMALISED_TITANS = ('q', 'k', 'v', 'theta', 'eta', 'alpha', 'w', 'b', 'h0')


def test_golden_titans_linear_with_a_normalised_output(x64, shared_data):
    g = load_golden(shared_data, 'titans_linear_fla_fixed')

    def total(*arrays):
        y, last = normalised_titans(*arrays)
        return jnp.sum(y * g['do']) + jnp.sum(last * g['dht']), (y, last)

    grads, (y, last) = jax.jit(jax.grad(total, range(9), has_aux=True))(*(g[name] for name in NORMALISED_TITANS))
    np.testing.assert_allclose(y, g['o'], atol=1e-9)
    np.testing.assert_allclose(last, g['ht'], atol=1e-9)
    for key, grad in zip(NORMALISED_TITANS, grads, strict=True):
        np.testing.assert_allclose(grad, g[f'd{key}'], atol=1e-9 * float(jnp.abs(g[f'd{key}']).max()), err_msg=key)


def test_golden_titans_linear_with_a_normalised_output_in_float32(shared_data):
    g = load_golden(shared_data, 'titans_linear_fla_fixed', 'float32')
    y, last = jax.jit(normalised_titans)(*(g[name] for name in NORMALISED_TITANS))
    for got, want in ((y, g['o']), (last, g['ht'])):
        assert got.dtype == jnp.float32
        assert_rms_close(got, want, LINEAR)


def titans_layer(p: dict, x: jax.Array, memory):
    """lucidrains' NeuralMemory as the goldens' README states it, around `memory(q, k, v, lr, log_alpha, log_momentum)`."""

    def rms(x):
        return x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + jnp.finfo(x.dtype).eps)

    def heads(x):
        return x.reshape(*x.shape[:2], 2, -1)

    def gate(name, x):
        return x @ p[f'{name}.0.weight'].T + p[f'{name}.0.bias'][None, None]

    stored, read = rms(x) * p['store_norm.weight'][None, None], rms(x) * p['retrieve_norm.weight'][None, None]
    q = rms(heads(read @ p['to_queries.weight'].T)) * (p['q_norm.gamma'].reshape(1, 1, 2, -1) + 1)
    k = rms(heads(stored @ p['to_keys.weight'].T)) * (p['k_norm.gamma'].reshape(1, 1, 2, -1) + 1)
    v = heads(stored @ p['to_values.weight'].T)
    log_alpha, log_momentum = jax.nn.log_sigmoid(-gate('to_decay_factor', stored)), jax.nn.log_sigmoid(gate('to_momentum', stored))
    # Their objective is a mean over features without the half: 2 / d of ours.
    rate = 2 / q.shape[-1] * jax.nn.sigmoid(gate('to_adaptive_step', stored))
    y, last = memory(q, k, v, rate, log_alpha, log_momentum)
    y = y * jax.nn.sigmoid(read @ p['retrieve_gate.0.weight'].T)[..., None]
    return y.reshape(x.shape) @ p['combine_heads.weight'].T, last


def peer_mlp(p: dict, *rows, function=mlp_memory):
    initial = MLPWeights(p['memory_model_parameters.0'], p['memory_model_parameters.1'])
    y, state = function(*rows, initial=initial, chunk_size=16, activation='gelu_exact', dgd='none', residual=False)
    return y, (list(state.running), list(state.momentum))


def peer_linear(p: dict, *rows):
    rows = [jnp.moveaxis(x, 2, 1) for x in rows]
    weight = p['memory_model_parameters.0'][None]
    y, (last, momentum) = linear_memory(*rows, jnp.broadcast_to(weight, (2, *weight.shape[1:])), 16)
    return jnp.moveaxis(y, 1, 2), ([last], [momentum])


@pytest.mark.parametrize(('name', 'memory'), [('mlp2', peer_mlp), ('linear', peer_linear)])
def test_golden_peer_layer(x64, shared_data, name, memory):
    """A peer's whole layer with per-token gates: outputs, state, and the gradient of every parameter."""
    g = load_golden(shared_data, f'titans_luc_paperlike_{name}')
    params = {key.removeprefix('param.'): value for key, value in g.items() if key.startswith('param.')}

    def total(params, x):
        y, last = titans_layer(params, x, functools.partial(memory, params))
        return jnp.sum(y * g['dy']), (y, last)

    (grads, dx), (y, last) = jax.jit(jax.grad(total, (0, 1), has_aux=True))(params, g['x'])
    np.testing.assert_allclose(y, g['y'], atol=1e-9)
    for kind, layers in zip(('weights', 'momentum'), last, strict=True):
        for i, got in enumerate(layers):
            want = g[f'last_{kind}.weights.{i}']
            np.testing.assert_allclose(got.reshape(want.shape), want, atol=1e-9)
    np.testing.assert_allclose(dx, g['dx'], atol=1e-9)
    for key, grad in grads.items():
        # Their per-head weights share one parameter in the module; only the per-head copies are differentiated.
        if not key.startswith('memory_model.'):
            np.testing.assert_allclose(grad, g[f'grad.{key}'], atol=1e-9, err_msg=key)


@pytest.mark.parametrize(
    ('name', 'memory', 'tolerance'),
    [
        ('mlp2', peer_mlp, 1e-4),
        ('mlp2', functools.partial(peer_mlp, function=mlp_memory_reference), 1e-4),
        ('linear', peer_linear, LINEAR),
    ],
    ids=['mlp_memory', 'mlp_memory_reference', 'linear'],
)
def test_golden_peer_layer_in_float32(shared_data, name, memory, tolerance):
    """Without bounds on its rates the peer's MLP memory grows to outputs of 1e10, and roundings with it: 1e-4 for either form."""
    g = load_golden(shared_data, f'titans_luc_paperlike_{name}', 'float32')
    params = {key.removeprefix('param.'): value for key, value in g.items() if key.startswith('param.')}
    y, last = jax.jit(lambda x: titans_layer(params, x, functools.partial(memory, params)))(g['x'])
    assert y.dtype == jnp.float32
    assert_rms_close(y, g['y'], tolerance)
    for kind, layers in zip(('weights', 'momentum'), last, strict=True):
        for i, got in enumerate(layers):
            want = g[f'last_{kind}.weights.{i}']
            assert_rms_close(got.reshape(want.shape), want, tolerance)
