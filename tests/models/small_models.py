"""Models of every family small enough to compile in seconds, with random parameters at which nothing vanishes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from nested_jax.config import AttentionConfig, LevelConfig, MemoryConfig, ModelConfig, StateSpaceConfig
from nested_jax.models.language_model import LanguageModel
from nested_jax.models.presets import preset

CORE = ('transformer', 'hope-attention', 'gated-deltanet', 'titans', 'hope', 'hope-linear')
# The paper's other models. True: the default suite tests what one compiled program shows; the rest, and the others, are slow tests.
BASELINES: dict[str, bool] = {
    'linear-attention': False,
    'retnet': False,
    'gla': False,
    'deltanet': False,
    'mamba2': False,
    'ttt-linear': True,
    'ttt-mlp': False,
    'samba': True,
    'lstm': False,
    'srwm': False,
    'dla': False,
    'moneta': True,
    'yaad': False,
    'memora': False,
    'atlas': False,
    'titans-mac': False,
    'titans-mag': True,
    'titans-mal': False,
    'rwkv7': True,
    'comba': False,
    'transformer-conv': False,
}
FAMILIES = (*CORE, *BASELINES)
MIXED = 'hope-mixed'  # no preset: Hope whose memory is an MLP and whose projections are matrices
# Families with learned initial states, and how many a block has.
INITIAL_STATES = {
    'titans': 2,
    'dla': 2,
    'moneta': 2,
    'yaad': 2,
    'memora': 2,
    'atlas': 2,
    'titans-mac': 2,
    'titans-mag': 2,
    'titans-mal': 2,
    'hope': 10,
    'hope-linear': 5,
    MIXED: 6,
    'ttt-linear': 2,
    'ttt-mlp': 4,
    'srwm': 4,
}
# Families whose keys have no unit norm: the rows' sizes bound what a token writes, and nothing bounds a sum that does not decay.
UNNORMALIZED = (
    'linear-attention',
    'retnet',
    'gla',
    'mamba2',
    'samba',
    'rwkv7',
)
# What else the small model of a family changes.
_SHRUNK: dict[str, dict] = {
    # The four levels that the larger presets have.
    'hope-attention': dict(levels=tuple(LevelConfig(6, level.period) for level in preset('hope-attention-1.3b').levels)),
    'mamba2': dict(state_space=StateSpaceConfig(state_dim=6, head_dim=8)),
    'samba': dict(num_layers=4, attention=AttentionConfig(window=6)),
    'atlas': dict(memory=MemoryConfig(dgd='none', decay_to='init', chunk_size=4, projection_chunk_size=2, window=3, hidden_dim=6)),
    # Two of the memory's chunks in a segment, which is the grid of four.
    'titans-mac': dict(
        attention=AttentionConfig(num_persistent=2, segment=4),
        memory=MemoryConfig(dgd='none', chunk_size=2, projection_chunk_size=2, hidden_dim=7),
    ),
    'titans-mag': dict(attention=AttentionConfig(num_persistent=2, window=6)),
    'titans-mal': dict(attention=AttentionConfig(num_persistent=2, window=6)),
}


def small(family: str, **overrides) -> ModelConfig:
    """The family's tiny preset with its options kept and its sizes shrunk; hope and hope-linear have two grids, 4 and 2."""
    config = preset('hope-tiny' if family == MIXED else f'{family}-tiny')
    sizes = (2, 4) if family == 'hope-linear' else (4, 2)
    memory = dataclasses.replace(config.memory, chunk_size=sizes[0], projection_chunk_size=sizes[1], hidden_dim=6)
    if family == MIXED:
        memory = dataclasses.replace(memory, matrix_memories=('key', 'value', 'eta', 'alpha'))
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
