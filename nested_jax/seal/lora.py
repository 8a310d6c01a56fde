"""Low-rank adapters of a language model as a plain pytree, so that K of them stack on a leading axis over one set of weights.

An adapter of a projection with kernel W (D_in, D_out) is `a` (D_in, R) and `b` (R, D_out); the layer computes x W + alpha/R (x a) b
(Eq. 3, arXiv:2106.09685v2). Stacked blocks have stacked adapters. The model reads them as its variable collection 'lora':

    variables = attach(params, adapters, config)
    logits, _ = model.apply(variables, tokens)

Adapters begin as PEFT's do: a uniform within 1/sqrt(D_in), b zero.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

PyTree = Any


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Which projections have adapters, and of what size.

    Raises:
        ValueError: naming the field, its value and what is allowed.
    """

    rank: int = 32
    alpha: float = 64.0  # the product a b counts alpha / rank
    targets: tuple[str, ...] = ('query', 'value')  # ends of the paths of projections, 'down' or 'level_0/down'

    def __post_init__(self):
        if self.rank < 1:
            raise ValueError(f'rank is {self.rank}, allowed is an integer of at least 1')
        if not self.alpha > 0:
            raise ValueError(f'alpha is {self.alpha}, allowed is a number above 0')
        if not self.targets:
            raise ValueError(f'targets is {self.targets}, allowed is at least one name of a projection')

    @property
    def scale(self) -> float:
        """What the product a b is multiplied by."""
        return self.alpha / self.rank


def init_lora(params: PyTree, key: jax.Array, config: LoraConfig) -> PyTree:
    """Fresh adapters, at which the model computes what it does without.

    Args:
        params: of a `LanguageModel`, arrays or shapes.
        key: random key; `jax.vmap` over keys gives a stack.
        config: targets and rank.

    Returns:
        {'blocks': {... {'a': (..., D_in, R), 'b': (..., R, D_out)}}} in float32, the leading axes being the kernel's.

    Raises:
        ValueError: for a target that no projection's path ends with.
    """
    kernels = _kernels(params, config)
    adapters = {}
    for (path, kernel), draw in zip(kernels.items(), jax.random.split(key, len(kernels)), strict=True):
        *layers, wide, narrow = kernel.shape
        bound = wide**-0.5
        adapters[(*path, 'a')] = jax.random.uniform(draw, (*layers, wide, config.rank), minval=-bound, maxval=bound)
        adapters[(*path, 'b')] = jnp.zeros((*layers, config.rank, narrow))
    return traverse_util.unflatten_dict(adapters)


def attach(params: PyTree, adapters: PyTree, config: LoraConfig) -> dict[str, PyTree]:
    """Variables of the model with its adapters beside its weights, which stay as they are."""
    scaled = {path: leaf * config.scale if path[-1] == 'b' else leaf for path, leaf in traverse_util.flatten_dict(adapters).items()}
    return {'params': params, 'lora': traverse_util.unflatten_dict(scaled)}


def merge(params: PyTree, adapters: PyTree, config: LoraConfig) -> PyTree:
    """Parameters with the adapters added to their kernels, in the kernels' dtype; the product is taken in float32."""
    flat, parts = traverse_util.flatten_dict(params), traverse_util.flatten_dict(adapters)
    for *path, name in parts:
        if name == 'a':
            kernel, a, b = flat[*path, 'kernel'], parts[*path, 'a'], parts[*path, 'b']
            flat[*path, 'kernel'] = (kernel + config.scale * (a @ b)).astype(kernel.dtype)
    return traverse_util.unflatten_dict(flat)


def _kernels(params: PyTree, config: LoraConfig) -> dict[tuple[str, ...], Any]:
    """Path of each projection that a target names -> its kernel."""
    found, unused = {}, set(config.targets)
    for (*path, name), leaf in traverse_util.flatten_dict(params).items():
        if name != 'kernel' or path[-1].endswith('convolution'):
            continue
        hits = {target for target in config.targets if f'/{"/".join(path)}'.endswith(f'/{target}')}
        unused -= hits
        if hits:
            found[tuple(path)] = leaf
    if unused:
        known = sorted({path[-2] for path in traverse_util.flatten_dict(params) if path[-1] == 'kernel'})
        raise ValueError(f'targets has {min(unused)!r}, which no projection ends with; allowed are {", ".join(known)}')
    return found
