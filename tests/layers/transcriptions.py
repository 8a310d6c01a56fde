"""What tests need to write a layer's equations out in numpy, in float64."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from nested_jax.layers.common import Context

CONTEXT = Context(None, None, True)


def run_layer(layer: nn.Module, *, width: int, time: int = 13):
    """Random parameters as numpy arrays, random (2, time, width) inputs, and what the layer makes of them."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, time, width))
    shapes = jax.eval_shape(lambda x: layer.init(jax.random.key(0), x, None, CONTEXT), x)['params']

    def draw(leaf):
        return rng.normal(size=leaf.shape) * (leaf.shape[0] ** -0.5 if len(leaf.shape) > 1 else 0.5)

    params = jax.tree.map(draw, shapes)
    y, state = jax.jit(lambda params, x: layer.apply({'params': params}, x, None, CONTEXT))(jax.tree.map(jnp.asarray, params), x)
    return params, x, np.asarray(y), state


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def rms_norm(x: np.ndarray, scale: np.ndarray, epsilon: float = 1e-6) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon) * scale


def convolve(x: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Causal, depthwise, of four taps, then SiLU."""
    padded = np.pad(x, ((0, 0), (3, 0), (0, 0)))
    return silu(sum(kernel[tap] * padded[:, tap : tap + x.shape[1]] for tap in range(4)))
