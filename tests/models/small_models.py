"""Models of every family small enough to compile in seconds, with random parameters at which nothing vanishes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from nested_jax.config import LevelConfig, ModelConfig
from nested_jax.models.language_model import LanguageModel
from nested_jax.models.presets import preset

CORE = ('transformer', 'hope-attention', 'gated-deltanet', 'titans', 'hope', 'hope-linear')
# The paper's other models. True: the default suite tests what one compiled program shows; the rest, and the others, are slow tests.
BASELINES: dict[str, bool] = {
    'rwkv7': True,
    'comba': False,
}
FAMILIES = (*CORE, *BASELINES)
# Families whose keys have no unit norm: the rows' sizes bound what a token writes, and nothing bounds a sum that does not decay.
UNNORMALIZED = ('rwkv7',)
# Families with learned initial states, and how many a block has.
INITIAL_STATES = {
    'titans': 2,
    'hope': 10,
    'hope-linear': 5,
}
# What else the small model of a family changes.
_SHRUNK: dict[str, dict] = {}

# The tests compile much and compute little.
fast_jit = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})


def small(family: str, **overrides) -> ModelConfig:
    """The family's tiny preset with its options kept and its sizes shrunk; hope and hope-linear have two grids, 4 and 2."""
    config = preset(f'{family}-tiny')
    sizes = (2, 4) if family == 'hope-linear' else (4, 2)
    memory = dataclasses.replace(config.memory, chunk_size=sizes[0], projection_chunk_size=sizes[1], hidden_dim=6)
    shrunk = dict(
        num_layers=2, width=16, num_heads=2, head_dim=8, vocab_size=32, max_length=16, memory=memory, scan_layers=True,
        levels=tuple(LevelConfig(24 // len(config.levels), level.period) for level in config.levels),
    )  # fmt: skip
    return dataclasses.replace(config, **(shrunk | _SHRUNK.get(family, {}) | overrides))


def shapes(model: LanguageModel):
    """Shapes of the model's parameters."""
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 3), jnp.int32))['params']


def random_params(model: LanguageModel, *, dtype=np.float64, scale: float = 1.0, seed: int = 0):
    """Kernels keep the size of rows (times `scale`), initial memories are of size one half, gates open about halfway."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name, noise = jax.tree_util.keystr(path, simple=True, separator='/'), rng.normal(size=leaf.shape)
        if 'kernel' in name or name == 'head':
            noise *= scale * leaf.shape[-2] ** -0.5
        elif name.endswith('scale') and 'retention' not in name:
            noise = 1 + 0.2 * noise
        elif 'embedding' not in name:
            noise *= 0.5 * scale
        return jnp.asarray(noise, dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes(model))


def initial_leaves(params) -> dict[str, jax.Array]:
    """The learned initial states, by name."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    named = {jax.tree_util.keystr(path, simple=True, separator='/'): leaf for path, leaf in leaves}
    return {name: leaf for name, leaf in named.items() if '/initial_' in name}
