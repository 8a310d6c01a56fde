"""The memories in both of their forms, for checks before timings."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from nested_jax.memory import matrix, mlp, self_modifying


def memory_inputs(batch: int = 4, time: int = 512, heads: int = 4, dim: int = 32) -> dict[str, jax.Array]:
    """Random unit queries and keys, values and gates."""
    keys = jax.random.split(jax.random.key(0), 5)
    rows = lambda key: jax.random.normal(key, (batch, time, heads, dim))
    unit = lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True)
    gate = lambda key: jax.random.uniform(key, (batch, time, heads))
    return dict(
        q=unit(rows(keys[0])), k=unit(rows(keys[1])), v=rows(keys[2]), rate=0.5 * gate(keys[3]), log_alpha=jnp.log1p(-0.1 * gate(keys[4]))
    )


Forms = tuple[Callable, Callable]  # chunked, token by token: both from the inputs to outputs


def matrix_forms(chunk_size: int = 64) -> Forms:
    """Delta gradient descent, whose outputs do not depend on the chunk size."""

    def form(function):
        return lambda i: function(i['q'], i['k'], i['v'], i['rate'], i['log_alpha'], chunk_size=chunk_size)[0]

    return form(matrix.delta_gradient_descent), form(matrix.delta_gradient_descent_reference)


def mlp_forms(chunk_size: int = 16, hidden: int = 32) -> Forms:
    """The MLP memory; its steps of a chunk add up, so that longer chunks take smaller ones."""
    share = min(1.0, 16 / chunk_size)

    def form(function):
        def run(i):
            heads, dim = i['k'].shape[2:]
            shapes = (heads, dim, hidden), (heads, hidden, dim)
            weights = [jax.random.normal(jax.random.key(seed), shape) / 6 for seed, shape in zip((7, 8), shapes, strict=True)]
            initial = mlp.MLPWeights(*weights)
            return function(i['q'], i['k'], i['v'], share * i['rate'], i['log_alpha'], initial=initial, chunk_size=chunk_size)[0]

        return run

    return form(mlp.mlp_memory), form(mlp.mlp_memory_reference)


def self_modifying_forms() -> Forms:
    """Hope's matrix memories."""
    rule = self_modifying.Rule(kind='matrix', gradient='token', chunk_size=32, projection_chunk_size=32)
    initial = self_modifying.Memories(0.1 * jax.random.normal(jax.random.key(9), (4, 32, 3 * 32 + 2)), None, None)

    def form(function):
        def run(i):
            inputs = self_modifying.Inputs(i['q'], i['k'], i['v'], i['rate'], i['log_alpha'], None)
            y = function(inputs, jnp.ones(4), initial, rule=rule)
            return y[0] if isinstance(y, tuple) else y

        return run

    return form(self_modifying.self_modifying), form(self_modifying.self_modifying_reference)


def memory_forms() -> dict[str, Forms]:
    """Both forms of every memory, of 4 heads of width 32."""
    return {'delta_gradient_descent': matrix_forms(), 'mlp_memory': mlp_forms(), 'self_modifying': self_modifying_forms()}


def disagreement(name: str, forms: Forms, inputs: dict[str, jax.Array]) -> float:
    """The largest difference of two forms' outputs, relative to the second's largest.

    Raises:
        RuntimeError: if it is 1e-3 or more.
    """
    outputs = [jax.jit(form)(inputs) for form in forms]
    error = float(jnp.abs(outputs[0] - outputs[1]).max() / jnp.abs(outputs[1]).max())
    if not error < 1e-3:
        raise RuntimeError(f'{name}: chunked and token by token differ by {error:.1e}')
    return error
