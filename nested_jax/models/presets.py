"""Named model configurations. Imports no JAX.

At each size all families have the Transformer's depth, width and heads; their MLPs are sized so that parameters outside the
embedding and the head agree within 3 %.
"""

import dataclasses
import difflib
from typing import NamedTuple, get_args

from nested_jax.config import AttentionConfig, LevelConfig, MemoryConfig, ModelConfig, SelfModified, StateSpaceConfig


class _Size(NamedTuple):
    layers: int
    width: int
    heads: int
    vocab_size: int
    max_length: int
    periods: tuple[int, ...]  # of Hope's levels in tokens, fastest first


_LARGE_PERIODS = (2**19, 2**20, 2**21, 2**22)
_SIZES = {
    'tiny': _Size(4, 128, 4, 256, 4096, (512, 2048)),
    '124m': _Size(12, 768, 12, 32_000, 4096, _LARGE_PERIODS),
    '340m': _Size(24, 1024, 16, 32_000, 4096, _LARGE_PERIODS),
    '760m': _Size(24, 1536, 16, 32_000, 4096, _LARGE_PERIODS),
    '1.3b': _Size(24, 2048, 16, 32_000, 4096, _LARGE_PERIODS),
}

# Hidden units of the MLPs, all levels together, that equalise the parameters of each family at each size.
_HIDDEN = {
    'transformer': {'tiny': 448, '124m': 2048, '340m': 2752, '760m': 4096, '1.3b': 5504},
    'transformer-conv': {'tiny': 448, '124m': 2048, '340m': 2752, '760m': 4096, '1.3b': 5504},
    'hope-attention': {'tiny': 448, '124m': 2048, '340m': 2752, '760m': 4096, '1.3b': 5504},
    'gated-deltanet': {'tiny': 400, '124m': 1792, '340m': 2400, '760m': 3584, '1.3b': 4800},
    'titans': {'tiny': 376, '124m': 1728, '340m': 2352, '760m': 3504, '1.3b': 4720},
    'titans-mac': {'tiny': 288, '124m': 1216, '340m': 1664, '760m': 2464, '1.3b': 3344},
    'titans-mag': {'tiny': 288, '124m': 1216, '340m': 1664, '760m': 2464, '1.3b': 3344},
    'titans-mal': {'tiny': 200, '124m': 704, '340m': 976, '760m': 1440, '1.3b': 1984},
    'hope': {'tiny': 312, '124m': 1600, '340m': 2240, '760m': 3328, '1.3b': 4480},
    'dla': {'tiny': 376, '124m': 1728, '340m': 2352, '760m': 3504, '1.3b': 4720},
    'moneta': {'tiny': 376, '124m': 1728, '340m': 2352, '760m': 3504, '1.3b': 4720},
    'yaad': {'tiny': 376, '124m': 1728, '340m': 2352, '760m': 3504, '1.3b': 4720},
    'memora': {'tiny': 376, '124m': 1728, '340m': 2352, '760m': 3504, '1.3b': 4720},
    'atlas': {'tiny': 360, '124m': 1680, '340m': 2320, '760m': 3472, '1.3b': 4672},
    'hope-linear': {'tiny': 364, '124m': 1728, '340m': 2336, '760m': 3456, '1.3b': 4672},
    'linear-attention': {'tiny': 448, '124m': 2048, '340m': 2752, '760m': 4096, '1.3b': 5504},
    'retnet': {'tiny': 280, '124m': 1024, '340m': 1376, '760m': 2048, '1.3b': 2768},
    'gla': {'tiny': 440, '124m': 2032, '340m': 2736, '760m': 4080, '1.3b': 5488},
    'deltanet': {'tiny': 440, '124m': 2032, '340m': 2736, '760m': 4080, '1.3b': 5488},
    'mamba2': {'tiny': 336, '124m': 1440, '340m': 1968, '760m': 2976, '1.3b': 4032},
    'ttt-linear': {'tiny': 432, '124m': 2032, '340m': 2736, '760m': 4064, '1.3b': 5456},
    'ttt-mlp': {'tiny': 352, '124m': 1872, '340m': 2576, '760m': 3840, '1.3b': 5168},
    'samba': {'tiny': 384, '124m': 1744, '340m': 2352, '760m': 3504, '1.3b': 4720},
    # References for state tracking, not parallel over tokens: nobody would train them at scale.
    'lstm': {'tiny': 272},
    'srwm': {'tiny': 544},
    'rwkv7': {'tiny': 352, '124m': 1856, '340m': 2512, '760m': 3792, '1.3b': 5136},
    'comba': {'tiny': 400, '124m': 1792, '340m': 2400, '760m': 3584, '1.3b': 4800},
}

# Windows that training sequences of 4,096 tokens outgrow, so that what lies further back has to come from the memory.
_WINDOWED = AttentionConfig(num_persistent=16, window=1024, query_block=1024)

_FAMILIES = {
    'transformer': dict(mixer='attention'),
    # A control: the Transformer with the memories' short convolutions.
    'transformer-conv': dict(mixer='attention', attention=AttentionConfig(short_convolution=True)),
    'hope-attention': dict(mixer='attention'),
    'gated-deltanet': dict(mixer='gated-delta-rule', memory=MemoryConfig(kind='matrix', chunk_size=32, projection_chunk_size=32)),
    'titans': dict(mixer='titans', memory=MemoryConfig(dgd='none')),
    'dla': dict(mixer='dla', memory=MemoryConfig(dgd='none', momentum=False, decay_to='init')),
    'moneta': dict(mixer='moneta', memory=MemoryConfig(dgd='none', momentum=False, decay_to='init')),
    'yaad': dict(mixer='yaad', memory=MemoryConfig(dgd='none', momentum=False, decay_to='init')),
    'memora': dict(mixer='memora', memory=MemoryConfig(dgd='none', momentum=False, decay_to='init')),
    'atlas': dict(mixer='atlas', memory=MemoryConfig(dgd='none', decay_to='init')),
    'titans-mac': dict(mixer='titans-mac', memory=MemoryConfig(dgd='none'), attention=AttentionConfig(num_persistent=16, segment=512)),
    'titans-mag': dict(mixer='titans-mag', memory=MemoryConfig(dgd='none'), attention=_WINDOWED),
    'titans-mal': dict(mixer='titans-mal', memory=MemoryConfig(dgd='none'), attention=_WINDOWED),
    'hope': dict(mixer='self-modifying', memory=MemoryConfig(decay_to='init')),
    'hope-linear': dict(
        mixer='self-modifying',
        memory=MemoryConfig(kind='matrix', gradient='token', momentum=False, decay_to='init'),
    ),
    'linear-attention': dict(mixer='linear-attention', memory=MemoryConfig(kind='matrix', chunk_size=64, projection_chunk_size=64)),
    'retnet': dict(mixer='retention', memory=MemoryConfig(kind='matrix', chunk_size=64, projection_chunk_size=64)),
    'gla': dict(mixer='gated-linear-attention', memory=MemoryConfig(kind='matrix', chunk_size=64, projection_chunk_size=64)),
    'deltanet': dict(mixer='delta-rule', memory=MemoryConfig(kind='matrix', chunk_size=32, projection_chunk_size=32)),
    'mamba2': dict(mixer='mamba2', memory=MemoryConfig(kind='matrix', chunk_size=64, projection_chunk_size=64)),
    'ttt-linear': dict(mixer='ttt', memory=MemoryConfig(kind='matrix')),
    'ttt-mlp': dict(mixer='ttt', memory=MemoryConfig(kind='mlp')),
    'rwkv7': dict(mixer='rwkv7', memory=MemoryConfig(kind='matrix', chunk_size=32, projection_chunk_size=32)),
    'comba': dict(mixer='comba', memory=MemoryConfig(kind='matrix', chunk_size=32, projection_chunk_size=32)),
    'samba': dict(
        mixer='mamba-attention',
        attention=AttentionConfig(window=2048),
        memory=MemoryConfig(kind='matrix', chunk_size=32, projection_chunk_size=32),
    ),
    'lstm': dict(mixer='lstm'),
    'srwm': dict(mixer='srwm', memory=MemoryConfig(kind='matrix', chunk_size=32, projection_chunk_size=32)),
}

# What else the tiny model of a family changes. Mamba-2: 8 heads whose states together are of RetNet's size; above, the published sizes.
# Samba, Titans: larger windows would see all of a sequence of a few hundred tokens.
_TINY = {
    'mamba2': dict(state_space=StateSpaceConfig(state_dim=32, head_dim=32)),
    'samba': dict(attention=AttentionConfig(window=64)),
    'titans-mac': dict(attention=AttentionConfig(num_persistent=4, segment=64)),
    'titans-mag': dict(attention=AttentionConfig(num_persistent=4, window=64)),
    'titans-mal': dict(attention=AttentionConfig(num_persistent=4, window=64)),
}


def preset(name: str, **overrides) -> ModelConfig:
    """A named model configuration.

    Args:
        name: '<family>-<size>', one of `preset_names()`: every family at every size, but lstm and srwm at the size tiny only.
        **overrides: fields of `ModelConfig` to replace.

    Returns:
        The `ModelConfig`.

    Raises:
        ValueError: if there is no such preset, or an override is not allowed.
    """
    if name not in preset_names():
        near = difflib.get_close_matches(name, preset_names(), 3)
        raise ValueError(f'preset is {name!r}, allowed is one of {", ".join(near or preset_names())}')
    family, size = name.rsplit('-', 1)
    shape, hidden = _SIZES[size], _HIDDEN[family][size]
    options = _FAMILIES[family] | (_TINY.get(family, {}) if size == 'tiny' else {})
    periods = shape.periods if family.startswith('hope') else shape.periods[:1]
    config = ModelConfig(
        num_layers=shape.layers, width=shape.width, num_heads=shape.heads, head_dim=shape.width // shape.heads,
        levels=tuple(LevelConfig(hidden // len(periods), period) for period in periods),
        vocab_size=shape.vocab_size, max_length=shape.max_length, scan_layers=size != 'tiny', **options,
    )  # fmt: skip
    return dataclasses.replace(config, **overrides)


def without(config: ModelConfig, part: str) -> ModelConfig:
    """The configuration with one part left out, for ablations (Table 6, arXiv:2512.24695v1).

    Args:
        config: of a model with self-modifying memories.
        part: 'dgd', 'momentum', 'retention', 'cms' (one level of as many hidden units, updated as often as the fastest), or what
            static projections shall give instead of a memory: 'key', 'value', 'target', 'eta' or 'alpha'.

    Raises:
        ValueError: if there is no such part, or the model does without it already.
    """
    memory, fastest = config.memory, config.levels[0]
    one_level = (LevelConfig(sum(level.hidden_dim for level in config.levels), fastest.period),)
    remaining = tuple(name for name in memory.self_modified if name != part)
    changes = {
        'dgd': dict(memory=dataclasses.replace(memory, dgd='none')),
        'momentum': dict(memory=dataclasses.replace(memory, momentum=False)),
        'retention': dict(memory=dataclasses.replace(memory, retention=False)),
        'cms': dict(levels=one_level),
        **{name: dict(memory=dataclasses.replace(memory, self_modified=remaining)) for name in get_args(SelfModified)},
    }
    if part not in changes:
        raise ValueError(f'part is {part!r}, allowed is one of {", ".join(changes)}')
    changed = dataclasses.replace(config, **changes[part])
    if config.mixer != 'self-modifying' or changed == config:
        raise ValueError(f'part is {part!r}, allowed is a part that the model has')
    return changed


def with_periods(config: ModelConfig, periods: tuple[int, ...]) -> ModelConfig:
    """The configuration with other periods of its levels.

    Args:
        config: of a model.
        periods: tokens between two updates of each level, fastest first.

    Raises:
        ValueError: if there are not as many periods as levels, or one is no integer of at least 1.
    """
    if len(periods) != len(config.levels):
        raise ValueError(f'periods is {periods}, allowed is one for each level: {len(config.levels)}')
    levels = (dataclasses.replace(level, period=period) for level, period in zip(config.levels, periods, strict=True))
    return dataclasses.replace(config, levels=tuple(levels))


def preset_names() -> tuple[str, ...]:
    """All names `preset` knows."""
    return tuple(f'{family}-{size}' for family in _FAMILIES for size in _HIDDEN[family])
