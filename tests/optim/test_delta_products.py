"""Delta gradient descent for the products of any function: against the rule by hand, the linen helpers, and what it must leave alone."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nested_jax.layers.delta_descent import capture_inputs, delta_dense, inputs_for
from nested_jax.optim import delta_gradient_descent
from nested_jax.optim.delta_products import delta_products, with_inputs

RATE = 0.3


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def expected(gradient, kernel, rows, reduction='mean'):
    """(G + A W) / (1 + eta tr A) of a kernel (in, out) in NumPy."""
    rows = np.asarray(rows, np.float64).reshape(-1, kernel.shape[0])
    second_moment = rows.T @ rows / (len(rows) if reduction == 'mean' else 1)
    return (gradient + second_moment @ kernel) / (1 + RATE * np.trace(second_moment))


PRODUCTS = {
    'matmul': lambda w, x: x @ w,
    'kernel first': lambda w, x: jnp.einsum('io,bti->obt', w, x),
    'transposed': lambda w, x: x @ w.T.reshape(4, 3).T,
    'cast': lambda w, x: x.astype(jnp.bfloat16).astype(jnp.float32) @ w.astype(jnp.float32),
    'jit': lambda w, x: jax.jit(jnp.matmul)(x, w),
    'checkpoint': lambda w, x: jax.checkpoint(lambda x, w: jnp.sin(x @ w))(x, w),
    'constant of a scan': lambda w, x: jax.lax.scan(lambda carry, x: (carry, x @ w), 0.0, x[None])[1],
}


@pytest.mark.parametrize('reduction', ['mean', 'sum'])
@pytest.mark.parametrize('name', PRODUCTS)
def test_products_have_the_cheap_direction(name, reduction):
    """And the gradient of what they multiply, and the result, are as they were."""
    w, x = normal(0, 3, 4), normal(1, 2, 5, 3).astype(jnp.bfloat16).astype(jnp.float32)
    loss = lambda w, x: jnp.sum(jnp.cos(PRODUCTS[name](w, x)))
    plain, (gradient, of_input) = jax.value_and_grad(loss, (0, 1))(w, x)
    found, (direction, of_input_too) = jax.jit(jax.value_and_grad(delta_products(loss, RATE, reduction), (0, 1)))(w, x)
    np.testing.assert_allclose(found, plain, rtol=1e-6)
    np.testing.assert_allclose(of_input_too, of_input, rtol=1e-5, atol=1e-6)
    # Delta gradient descent is of the product's output: the sine behind it is no part of that.
    np.testing.assert_allclose(direction, expected(np.asarray(gradient), np.asarray(w), x, reduction), rtol=2e-5, atol=1e-6)


def test_layers_that_a_scan_goes_through_have_it_each():
    w, x = normal(0, 6, 3, 3), normal(1, 5, 3)
    loss = lambda w, x: jnp.sum(jax.lax.scan(jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None)), x, w)[0])
    inputs = [x]
    for layer in w:
        inputs.append(jnp.tanh(inputs[-1] @ layer))
    gradient, direction = jax.grad(loss)(w, x), jax.grad(delta_products(loss, RATE))(w, x)
    for layer in range(6):
        due = expected(np.asarray(gradient[layer]), np.asarray(w[layer]), inputs[layer])
        np.testing.assert_allclose(direction[layer], due, rtol=2e-5, atol=1e-6)
    (_, captured) = with_inputs(loss)(w, x)
    np.testing.assert_allclose(captured, jnp.stack(inputs[:-1]), rtol=1e-6)


class Model(nn.Module):
    """Two dense layers."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(2, name='out')(nn.gelu(nn.Dense(8, name='in')(x)))


def test_linen_s_layers_have_what_the_interceptors_give():
    x = normal(1, 4, 5, 3)
    params = Model().init(jax.random.key(0), x)['params']
    loss = lambda params, x: jnp.mean(jnp.square(Model().apply({'params': params}, x)))

    def intercepted(params):
        with nn.intercept_methods(delta_dense(RATE)):
            return loss(params, x)

    def captured(params):
        with nn.intercept_methods(capture_inputs):
            output, state = Model().apply({'params': params}, x, mutable='delta_inputs')
        return jnp.mean(jnp.square(output)), inputs_for(params, state['delta_inputs'])

    same = lambda found, due: np.testing.assert_allclose(found, due, rtol=1e-5, atol=1e-7)
    jax.tree.map(same, jax.grad(delta_products(loss, RATE))(params, x), jax.grad(intercepted)(params))
    optimizer, updates = delta_gradient_descent(RATE), []
    for gradients, inputs in (jax.grad(captured, has_aux=True)(params), jax.grad(with_inputs(loss), has_aux=True)(params, x)):
        updates.append(optimizer.update(gradients, optimizer.init(params), params, inputs=inputs)[0])
    jax.tree.map(same, *updates)


def test_projections_of_attention_have_it_too():
    """`nn.DenseGeneral` has kernels of three axes: the direction of the matrix that they are."""
    x, module = normal(1, 2, 5, 8), nn.MultiHeadDotProductAttention(2, qkv_features=8)
    params = module.init(jax.random.key(0), x, x)['params']
    loss = lambda params, x: jnp.mean(jnp.square(module.apply({'params': params}, x, x)))
    plain, directions = jax.grad(loss)(params, x), jax.grad(delta_products(loss, RATE))(params, x)
    for name in ('query', 'key', 'value'):
        gradient, kernel = (np.asarray(tree[name]['kernel']).reshape(8, 8) for tree in (plain, params))
        due = expected(gradient, kernel, x).reshape(8, 2, 4)
        np.testing.assert_allclose(directions[name]['kernel'], due, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(directions[name]['bias'], plain[name]['bias'], rtol=1e-5, atol=1e-7)
    assert not np.allclose(directions['out']['kernel'], plain['out']['kernel'], rtol=1e-3)


OTHERS = {
    'sum of products': lambda w, x: jnp.sum(w[None, None] * x[..., None], -2),
    'scaled': lambda w, x: x @ (2 * w),
    'batch axes': lambda w, x: jnp.einsum('io,bti->bito', w, x),
    'both parameters': lambda w, x: w.T @ w,
    'convolution': lambda w, x: jax.lax.conv_general_dilated(x, w[None], (1,), 'SAME', dimension_numbers=('NWC', 'WIO', 'NWC')),
    'branch': lambda w, x: jax.lax.cond(x[0, 0, 0] < 9, lambda: x @ w, lambda: 2 * x @ w),
    'vmap': lambda w, x: jax.vmap(lambda w: x @ w)(jnp.stack([w, w])),
}


@pytest.mark.parametrize('name', OTHERS)
def test_what_is_no_product_keeps_its_gradient(name):
    w, x = normal(0, 3, 4), normal(1, 2, 5, 3)
    loss = lambda w, x: jnp.sum(jnp.cos(OTHERS[name](w, x)))
    np.testing.assert_allclose(jax.grad(delta_products(loss, RATE))(w, x), jax.grad(loss)(w, x), rtol=1e-5, atol=1e-6)
    assert with_inputs(loss)(w, x)[1] is None


def test_samples_may_be_sharded():
    """On Auto and Explicit meshes; but not behind an axis that is not, as for the layers of linen."""
    w, x = normal(0, 3, 4), normal(1, 8, 5, 3)
    loss = lambda w, x: jnp.sum(jnp.cos(x @ w))
    due = jax.grad(delta_products(loss, RATE))(w, x)
    for kind in (jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit):
        mesh = jax.make_mesh((8,), ('data',), axis_types=(kind,))
        with jax.set_mesh(mesh):
            placed = jax.device_put(w, jax.NamedSharding(mesh, jax.P())), jax.device_put(x, jax.NamedSharding(mesh, jax.P('data')))
            np.testing.assert_allclose(jax.jit(jax.grad(delta_products(loss, RATE)))(*placed), due, rtol=1e-5, atol=1e-6)


def test_products_are_no_more_than_before():
    """Compiled, the gradient has the products of the plain one."""
    from nested_jax.training.compiled import matrix_flops

    w, x = [normal(seed, 8, 8) for seed in range(3)], normal(9, 4, 8)

    def loss(w, x):
        for each in w:
            x = jnp.tanh(x @ each)
        return x.sum()

    count = lambda function: matrix_flops(jax.make_jaxpr(jax.grad(function))(w, x))
    assert count(delta_products(loss, RATE)) == count(loss) > 0


def test_wrong_input_is_named():
    w, x = jnp.ones((3, 3)), jnp.ones((2, 3))
    with pytest.raises(ValueError, match=r"params at 'w' is in more than one product, allowed is one"):
        with_inputs(lambda params, x: jnp.sum(x @ params['w'] @ params['w']))({'w': w}, x)
    with pytest.raises(ValueError, match='learning_rate is -1'):
        delta_products(jnp.matmul, -1)
    with pytest.raises(ValueError, match="reduction is 'max'"):
        delta_products(jnp.matmul, 0.1, 'max')
