"""Muon against numpy and `optax.contrib.muon`."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nested_jax.optim import BlockSpec, MatrixSpec, muon, orthogonalize, scale_by_muon

QUINTIC = (3.4445, -4.7750, 2.0315)


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def make_params(dtype=jnp.float32):
    shapes = {'wide': (4, 6), 'tall': (6, 4), 'square': {'a': (4, 4), 'b': (4, 4)}}
    is_shape = lambda leaf: isinstance(leaf, tuple)
    return jax.tree.map(lambda shape: jnp.asarray(draw(*shape), dtype), shapes, is_leaf=is_shape)


def run(optimizer, params, steps=10):
    """Updates of each step, stacked, and the last state; gradients are drawn around the parameters."""
    gradients = jax.tree.map(lambda leaf: jnp.asarray(draw(steps, *leaf.shape, seed=1), leaf.dtype), params)

    def step(carry, noise):
        params, state = carry
        gradient = jax.tree.map(jnp.add, params, noise)
        updates, state = optimizer.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), updates

    scan = jax.jit(lambda params: jax.lax.scan(step, (params, optimizer.init(params)), gradients))
    (_, state), updates = scan(params)
    return updates, state


def assert_close(actual, expected, rtol=1e-12, atol=1e-12):
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol=rtol, atol=atol), actual, expected)


# Amsel et al., arXiv:2505.16932, as published: divided by 1.01 for safety.
POLAR_EXPRESS = [
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
]
ITERATIONS = {'quintic': [QUINTIC] * 5, 'polar_express': [(a / 1.01, b / 1.01**3, c / 1.01**5) for a, b, c in POLAR_EXPRESS]}


def newton_schulz(x, method='quintic'):
    x = x / np.sqrt((x**2).sum())
    for a, b, c in ITERATIONS[method]:
        x = a * x + b * (x @ x.T) @ x + c * (x @ x.T) @ (x @ x.T) @ x
    return x


FACTORS = {
    'jordan': lambda o: o * np.sqrt(max(1, o.shape[1] / o.shape[0])),
    'moonshot': lambda o: o * 0.2 * np.sqrt(max(o.shape)),
    'rms': lambda o: 0.2 * o / np.sqrt((o**2).mean()),
    None: lambda o: o,
}


def reference(gradients, beta, nesterov, bias_correction, scaling, method='quintic'):
    """Ten updates of `scale_by_muon` in numpy."""
    momentum, updates = np.zeros_like(gradients[0]), []
    for t, g in enumerate(gradients, 1):
        momentum = beta * momentum + (1 - beta) * g
        m, ahead = momentum, momentum
        if bias_correction:
            m, ahead, g = m / (1 - beta**t), m / (1 - beta ** (t + 1)), g / (1 - beta**t)
        updates.append(FACTORS[scaling](newton_schulz(beta * ahead + (1 - beta) * g if nesterov else m, method)))
    return np.stack(updates)


@pytest.mark.parametrize('scaling', FACTORS)
@pytest.mark.parametrize(('nesterov', 'bias_correction'), [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize('shape', [(3, 5), (5, 3)])
def test_ten_steps_in_numpy(x64, shape, nesterov, bias_correction, scaling):
    gradients = draw(10, *shape)
    optimizer = scale_by_muon(0.9, nesterov=nesterov, bias_correction=bias_correction, scaling=scaling)
    state = optimizer.init(jnp.zeros(shape))
    _, updates = jax.jit(lambda g: jax.lax.scan(lambda state, g: optimizer.update(g, state)[::-1], state, g))(gradients)
    np.testing.assert_allclose(updates, reference(gradients, 0.9, nesterov, bias_correction, scaling), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize('shape', [(3, 5), (5, 3)])
def test_ten_steps_of_polar_express_in_numpy(x64, shape):
    gradients, optimizer = draw(10, *shape), scale_by_muon(0.9, method='polar_express')
    _, updates = jax.jit(lambda g: jax.lax.scan(lambda state, g: optimizer.update(g, state)[::-1], optimizer.init(g[0]), g))(gradients)
    np.testing.assert_allclose(updates, reference(gradients, 0.9, True, True, 'jordan', 'polar_express'), rtol=1e-9, atol=1e-11)


def test_ten_steps_of_fused_projections_in_numpy(x64):
    gradients, optimizer = draw(10, 4, 10), scale_by_muon(0.9, labels=BlockSpec(-1, (6, 2, 2)))
    _, updates = jax.jit(lambda g: jax.lax.scan(lambda state, g: optimizer.update(g, state)[::-1], optimizer.init(g[0]), g))(gradients)
    expected = [reference(part, 0.9, True, True, 'jordan') for part in np.split(gradients, (6, 8), -1)]
    np.testing.assert_allclose(updates, np.concatenate(expected, -1), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ('ours', 'theirs'),
    [
        ({}, {}),
        ({'nesterov': False}, {'nesterov': False}),
        ({'beta': 0.8, 'ns_steps': 3, 'weight_decay': 0.1}, {'beta': 0.8, 'ns_steps': 3, 'weight_decay': 0.1}),
        ({'scaling': 'moonshot'}, {'consistent_rms': 0.2}),
    ],
)
def test_equals_that_of_optax(x64, ours, theirs):
    """Theirs adds 1e-8 to the norm of the momentum."""
    params = make_params(jnp.float64)
    assert_close(run(muon(0.1, **ours), params)[0], run(optax.contrib.muon(0.1, **theirs), params)[0], rtol=1e-7, atol=1e-9)


def test_everything_else_gets_adamw(x64):
    params = {'embedding': jnp.asarray(draw(5, 4)), 'bias': jnp.asarray(draw(4)), 'scalar': jnp.asarray(1.0)}
    actual, _ = run(muon(0.1, adam_learning_rate=0.01, adam_b1=0.8, adam_b2=0.95, adam_eps=1e-6, adam_weight_decay=0.1), params)
    assert_close(actual, run(optax.adamw(0.01, 0.8, 0.95, 1e-6, weight_decay=0.1), params)[0])
    assert_close(run(muon(0.1), params)[0], run(optax.adam(0.1), params)[0])


def test_a_stack_of_layers_is_updated_layer_by_layer(x64):
    stack = {'kernel': jnp.asarray(draw(3, 4, 6))}
    layers = {f'layer_{n}': {'kernel': stack['kernel'][n]} for n in range(3)}
    optimizer = scale_by_muon()
    updates, _ = optimizer.update(stack, optimizer.init(stack))
    expected, _ = optimizer.update(layers, optimizer.init(layers))
    for n in range(3):
        np.testing.assert_allclose(updates['kernel'][n], expected[f'layer_{n}']['kernel'], rtol=1e-10)


def test_fused_projections_are_updated_as_their_blocks(x64):
    """Grouped query, key and value in one kernel, on a stack of layers: the updates of three kernels side by side."""
    x = jnp.asarray(draw(2, 4, 10))
    fused, apart = scale_by_muon(labels=BlockSpec(-1, (6, 2, 2))), scale_by_muon()
    updates, _ = fused.update(x, fused.init(x))
    parts = jnp.split(x, (6, 8), axis=-1)
    expected, _ = apart.update(parts, apart.init(parts))
    np.testing.assert_allclose(updates, jnp.concatenate(expected, axis=-1), rtol=1e-10)


def test_heads_as_batch_axes(x64):
    """(embed, heads, head_dim): a matrix for each head, scaled by its own shape."""
    x = jnp.asarray(draw(4, 3, 6))
    optimizer = scale_by_muon(labels=MatrixSpec(inputs=0, outputs=2))
    updates, _ = optimizer.update(x, optimizer.init(x))
    for head in range(3):
        np.testing.assert_allclose(updates[:, head], np.sqrt(6 / 4) * orthogonalize(x[:, head]), rtol=1e-10)


@pytest.mark.parametrize(
    ('spec', 'shape', 'matrix'),
    [
        (MatrixSpec(inputs=(0, 1, 2), outputs=3), (3, 3, 2, 8), (18, 8)),  # a convolution
        (MatrixSpec(inputs=-3, outputs=(-2, -1)), (2, 6, 3, 4), (2, 6, 12)),  # (embed, heads, head_dim) of scanned layers
        (MatrixSpec(inputs=(-3, -2), outputs=-1), (2, 3, 4, 6), (2, 12, 6)),  # and back
    ],
)
def test_weights_of_four_axes_are_updated_as_their_matrices(x64, spec, shape, matrix):
    x = {'weight': jnp.asarray(draw(*shape))}
    labels = lambda path, leaf: spec
    updates, _ = run(muon(0.1, labels=labels), x, steps=3)
    flat = {'weight': x['weight'].reshape(matrix)}
    noise = jnp.asarray(draw(3, *shape, seed=1)).reshape(3, *matrix)
    optimizer, params = muon(0.1, labels='matrix'), flat
    state = optimizer.init(params)
    for step in range(3):
        expected, state = optimizer.update({'weight': params['weight'] + noise[step]}, state, params)
        np.testing.assert_allclose(updates['weight'][step], expected['weight'].reshape(shape), rtol=1e-9, atol=1e-11)
        params = optax.apply_updates(params, expected)


def test_only_matrices_without_mask():
    with pytest.raises(ValueError, match=r'parameter b is MatrixSpec'):
        scale_by_muon().init({'b': jnp.zeros(3)})
    with pytest.raises(ValueError, match="labels hold 'adam'"):
        scale_by_muon(labels='adam').init({'b': jnp.zeros(3)})


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ({'beta': 1.0}, 'beta is 1.0, allowed is a number of at least 0 and below 1'),
        ({'method': 'x'}, "method is 'x', allowed is one of"),
        ({'ns_steps': 1.5}, 'ns_steps is 1.5, allowed is an integer of at least 0'),
        ({'ns_steps': -1}, 'ns_steps is -1, allowed is an integer of at least 0'),
        ({'scaling': 'x'}, "scaling is 'x', allowed is one of 'jordan', 'moonshot', 'rms', None"),
    ],
)
def test_arguments_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        muon(0.1, **arguments)
