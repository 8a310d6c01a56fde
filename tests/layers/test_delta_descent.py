"""A linen model under the interceptors, whose code does not change, against the same computation written out."""

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nested_jax.layers.common import Projection
from nested_jax.layers.delta_descent import capture_inputs, delta_dense, inputs_for
from nested_jax.optim.delta_descent import delta_gradient_descent


class Perceptron(nn.Module):
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x):
        x = nn.LayerNorm(dtype=self.dtype)(nn.Dense(6, dtype=self.dtype, name='up')(x))
        return nn.Dense(3, use_bias=False, dtype=self.dtype, name='down')(nn.gelu(x))


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x):
        body = lambda module, carry, _: (nn.tanh(nn.Dense(5, name='dense')(carry)), None)
        return nn.scan(body, variable_axes={'params': 0}, split_rngs={'params': True}, length=3)(self, x, None)[0]


def setup(model=None, dtype=None):
    model = model or Perceptron(dtype)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 5)), jnp.float32)
    return model, x, model.init(jax.random.key(0), x)['params']


def loss_of(model, x):
    return lambda params: jnp.mean(jnp.sum(model.apply({'params': params}, x) ** 2, -1))


def layer_inputs(model, params, x):
    _, state = model.apply({'params': params}, x, capture_intermediates=True, mutable=['intermediates'])
    return {'up': x, 'down': nn.gelu(state['intermediates']['LayerNorm_0']['__call__'][0])}


def test_gradients_are_the_cheap_form():
    model, x, params = setup()
    loss = loss_of(model, x)
    value, plain = jax.value_and_grad(loss)(params)
    with nn.intercept_methods(delta_dense(0.3)):
        intercepted, gradients = jax.value_and_grad(loss)(params)
        assert jax.tree.structure(model.init(jax.random.key(0), x)['params']) == jax.tree.structure(params)
    assert intercepted == value
    for name, rows in layer_inputs(model, params, x).items():
        a = rows.T @ rows / 4
        expected = (plain[name].pop('kernel') + a @ params[name]['kernel']) / (1 + 0.3 * jnp.trace(a))
        np.testing.assert_allclose(gradients[name].pop('kernel'), expected, rtol=1e-5, atol=1e-7)
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-6), gradients, plain)  # biases and the norm


@pytest.mark.parametrize('layer', [nn.Dense(6), Projection(6, jnp.float32, use_bias=True)])
def test_layers_of_sequences(layer):
    """Samples over two axes: the same output, and the direction of all of them."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 5)), jnp.float32)
    params = layer.init(jax.random.key(0), x)['params'] | {'bias': jnp.arange(6.0)}
    loss = lambda params: jnp.sum(jnp.square(layer.apply({'params': params}, x))) / 6
    value, plain = jax.value_and_grad(loss)(params)
    with nn.intercept_methods(delta_dense(0.3)):
        intercepted, gradients = jax.value_and_grad(loss)(params)
        assert layer.apply({'params': params}, x[0, 0]).shape == (6,)
    np.testing.assert_allclose(intercepted, value, rtol=1e-6)
    rows = x.reshape(6, 5)
    a = rows.T @ rows / 6
    np.testing.assert_allclose(
        gradients['kernel'], (plain['kernel'] + a @ params['kernel']) / (1 + 0.3 * jnp.trace(a)), rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(gradients['bias'], plain['bias'], rtol=1e-6)
    with nn.intercept_methods(capture_inputs):
        _, state = layer.apply({'params': params}, x, mutable='delta_inputs')
    np.testing.assert_array_equal(inputs_for(params, state['delta_inputs'])['kernel'], x)


def test_a_projection_with_an_adapter_is_left_alone():
    layer, x = Projection(3, jnp.float32), jnp.ones((2, 5))
    variables = layer.init(jax.random.key(0), x) | {'lora': {'a': jnp.ones((5, 1)), 'b': jnp.ones((1, 3))}}
    gradient = jax.grad(lambda variables: jnp.sum(layer.apply(variables, x) ** 2))
    plain = gradient(variables)
    with nn.intercept_methods(delta_dense(0.3)):
        jax.tree.map(np.testing.assert_array_equal, gradient(variables), plain)


def test_nothing_is_transposed_on_the_way_back():
    """Where samples have several axes, XLA on CPU writes the sum of gradient and output transposed, one number at a time."""
    model, x = Perceptron(), jnp.ones((4, 8, 5))
    params = model.init(jax.random.key(0), x)['params']
    with nn.intercept_methods(delta_dense(0.3)):
        compiled = jax.jit(jax.grad(loss_of(model, x))).lower(params).compile().as_text()
    assert compiled.count(' dot(') + compiled.count('dot_general') and ' transpose(' not in compiled


def test_captured_inputs_give_the_exact_form():
    model, x, params = setup()

    def loss(params):
        with nn.intercept_methods(capture_inputs):
            y, state = model.apply({'params': params}, x, mutable='delta_inputs')
        return jnp.mean(jnp.sum(y**2, -1)), inputs_for(params, state['delta_inputs'])

    gradients, inputs = jax.grad(loss, has_aux=True)(params)
    for name, rows in layer_inputs(model, params, x).items():
        np.testing.assert_allclose(inputs[name]['kernel'], rows, rtol=1e-6)
    assert len(jax.tree.leaves(inputs)) == 2
    optimizer = delta_gradient_descent(0.3)
    updates, _ = optimizer.update(gradients, optimizer.init(params), params, inputs=inputs)
    kernel, rows = params['up']['kernel'], inputs['up']['kernel']
    expected = jnp.linalg.solve(jnp.eye(5) + 0.3 * rows.T @ rows / 4, kernel - 0.3 * gradients['up']['kernel'])
    np.testing.assert_allclose(kernel + updates['up']['kernel'], expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(updates['up']['bias'], -0.3 * gradients['up']['bias'], rtol=1e-6)


def test_scanned_and_rematerialised_layers():
    model, x, params = setup(Scanned())
    loss = loss_of(model, x)
    with nn.intercept_methods(delta_dense(0.3)):
        gradients, remat = jax.grad(loss)(params), jax.grad(jax.checkpoint(loss))(params)
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-7), gradients, remat)
    kernel, bias = params['dense']['kernel'], params['dense']['bias']
    last = x
    for layer in range(2):
        last = jnp.tanh(last @ kernel[layer] + bias[layer][None])
    a, plain = last.T @ last / 4, jax.grad(loss)(params)['dense']['kernel']
    np.testing.assert_allclose(gradients['dense']['kernel'][2], (plain[2] + a @ kernel[2]) / (1 + 0.3 * jnp.trace(a)), rtol=1e-4, atol=1e-6)


def test_low_precision_and_traced_rates():
    model, x, params = setup(dtype=jnp.bfloat16)

    @jax.jit
    def gradients(params, rate):
        with nn.intercept_methods(delta_dense(rate)):
            return jax.grad(lambda params: loss_of(model, x)(params).astype(jnp.float32))(params)

    small, large = gradients(params, 0.0), gradients(params, 10.0)
    assert {leaf.dtype for leaf in jax.tree.leaves(small)} == {jnp.dtype('float32')}
    assert jnp.linalg.norm(large['up']['kernel']) < 0.5 * jnp.linalg.norm(small['up']['kernel'])


def test_a_layer_called_twice_is_refused():
    params = {'up': {'kernel': jnp.ones((5, 6))}}
    with pytest.raises(ValueError, match="captured at 'up/kernel' has 2 calls, allowed is one"):
        inputs_for(params, {'up': {'kernel': (jnp.ones((4, 5)), jnp.ones((4, 5)))}})


def test_inputs_of_no_parameter_are_refused():
    """Else every gradient would be taken as it is, silently."""
    params, captured = {'up': {'kernel': jnp.ones((5, 6))}}, {'up': {'kernel': (jnp.ones((4, 5)),)}}
    with pytest.raises(ValueError, match=r"captured holds \['delta_inputs/up/kernel'\], allowed are inputs of parameters: \['up/kernel'\]"):
        inputs_for(params, {'delta_inputs': captured})
    with pytest.raises(ValueError, match=r"captured holds \['up/kernel'\]"):
        inputs_for({'params': params}, captured)


def test_frozen_collections_are_read():
    params, rows = flax.core.freeze({'up': {'kernel': jnp.ones((5, 6))}}), jnp.ones((4, 5))
    assert inputs_for(params, flax.core.freeze({'up': {'kernel': (rows,)}}))['up']['kernel'] is rows
