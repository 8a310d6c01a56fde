"""Ad-hoc level stacking: a pre-trained Transformer becomes Hope-Attention (section 7.3, arXiv:2512.24695v1).

The MLP of every block becomes the initial weights of one level of a Continuum Memory System, and goes on learning with that level's
period. The paper does not say which block's MLP goes to which level; both readings are here: all to one level, or each block's to a
level of its own choice. Levels of a block that get none are new, with a zero output matrix: the model computes what it computed before,
to the bit, until its first update.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from nested_jax.config import LevelConfig, ModelConfig
from nested_jax.layers.channel import SwiGLU

PyTree = Any


def stack_levels(
    config: ModelConfig,
    params: PyTree,
    levels: Sequence[LevelConfig],
    placement: int | Sequence[int],
    *,
    key: jax.Array,
    aggregation: Literal['chain', 'sum'] = 'chain',
) -> tuple[ModelConfig, PyTree]:
    """Give a model with one MLP a block several levels, its MLPs among them, without a change of what it computes.

    To train on, hand `training.optimizer.make_optimizer` the levels' periods. Pure in `params` and `key`: for a model that fills its
    devices, compile it with `out_shardings` and the old parameters donated.

    Args:
        config: of one level, such as `load_pretrained` returns.
        params: parameters of `LanguageModel(config)`.
        levels: of every block, fastest first. A level that MLPs are placed at has their hidden width; new ones may have any.
        placement: the level, counted from 0, that the MLPs become; or one for each block.
        key: of the new levels' input matrices.
        aggregation: of the levels: Eq. 70 or 74. The sum weighs each by 1 at first.

    Returns:
        The configuration with these levels, and its parameters, new ones in the dtype of the old.

    Raises:
        ValueError: for a model with more than one level, a hybrid, or a placement that does not fit.
    """
    levels = tuple(levels)
    places = _places(config, levels, placement)
    stacked = dataclasses.replace(config, levels=levels, aggregation=aggregation)
    pretrained = params['blocks']['channel']['level_0']
    channel = {}
    for i, (level, new_key) in enumerate(zip(levels, jax.random.split(key, len(levels)), strict=True)):
        here = [place == i for place in places]
        fresh = None if all(here) else _new_level(stacked, level.hidden_dim, new_key, pretrained)
        channel[f'level_{i}'] = _choose(here, pretrained, fresh)
    if aggregation == 'sum':
        channel['aggregation'] = jnp.ones((config.num_layers, len(levels)), jax.tree.leaves(pretrained)[0].dtype)
    return stacked, {**params, 'blocks': {**params['blocks'], 'channel': channel}}


def _places(config: ModelConfig, levels: tuple[LevelConfig, ...], placement: int | Sequence[int]) -> tuple[int, ...]:
    """The level of each block's MLP."""
    if len(config.unit) > 1 or len(config.levels) > 1 or config.aggregation != 'chain':
        what = f'mixer {config.mixer!r}, {len(config.levels)} levels and aggregation {config.aggregation!r}'
        raise ValueError(f"config has {what}, allowed is a model of one mixer, one level and aggregation 'chain'")
    places = (placement,) * config.num_layers if isinstance(placement, int) else tuple(placement)
    if len(places) != config.num_layers or not all(0 <= place < len(levels) for place in places):
        allowed = f'a level from 0 to {len(levels) - 1}, or one for each of {config.num_layers} blocks'
        raise ValueError(f'placement is {placement!r}, allowed is {allowed}')
    hidden = config.levels[0].hidden_dim
    for place in sorted(set(places)):
        if levels[place].hidden_dim != hidden:
            raise ValueError(
                f'levels[{place}].hidden_dim is {levels[place].hidden_dim}, allowed is {hidden}, that of the MLPs placed there'
            )
    return places


def _new_level(config: ModelConfig, hidden_dim: int, key: jax.Array, like: PyTree) -> PyTree:
    """A level of every block that adds nothing: initial weights, but a zero output matrix. In the dtypes of `like`."""
    rows = jnp.zeros((1, 1, config.width), config.dtype)
    init = jax.vmap(lambda key: SwiGLU(config, hidden_dim).init(key, rows)['params'])
    level = init(jax.random.split(key, config.num_layers))
    level['down'] = jax.tree.map(jnp.zeros_like, level['down'])
    return jax.tree.map(lambda leaf, old: leaf.astype(old.dtype), level, like)


def _choose(here: list[bool], pretrained: PyTree, fresh: PyTree | None) -> PyTree:
    """Of each block, leaves (blocks, ...), the pre-trained MLP or the new level."""
    if fresh is None:
        return pretrained
    if not any(here):
        return fresh
    mask = jnp.asarray(here)
    return jax.tree.map(lambda old, new: jnp.where(jnp.expand_dims(mask, range(1, old.ndim)), old, new), pretrained, fresh)
