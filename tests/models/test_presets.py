"""Named configurations: names, parameter counts, and what the configuration refuses."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import pytest

from nested_jax.config import AttentionConfig, InSequenceConfig, LevelConfig, MemoryConfig, StateSpaceConfig
from nested_jax.models.language_model import LanguageModel
from nested_jax.models.presets import preset, preset_names, without
from nested_jax.training.config import TrainConfig
from tests.models.small_models import FAMILIES

SIZES = ('tiny', '124m', '340m', '760m', '1.3b')
TINY_ONLY = ('lstm', 'srwm')  # they are not parallel over tokens


@functools.cache
def _count(name: str) -> int:
    """Parameters outside the embedding and the head; a scan over layers traces one of them."""
    model = LanguageModel(preset(name, scan_layers=True))
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))['params']
    return sum(
        math.prod(leaf.shape) for name, part in params.items() if name not in ('embedding', 'head') for leaf in jax.tree.leaves(part)
    )


def test_names_are_families_times_sizes():
    assert set(preset_names()) == {f'{family}-{size}' for family in FAMILIES for size in SIZES if size == 'tiny' or family not in TINY_ONLY}
    for name in preset_names():
        assert preset(name).width % preset(name).num_heads == 0


def test_a_misspelt_name_gets_the_near_ones():
    with pytest.raises(ValueError, match="'hope-tinny'.*hope-tiny"):
        preset('hope-tinny')
    with pytest.raises(ValueError, match='transformer-124m'):
        preset('???')


def test_overrides_replace_fields_and_are_checked():
    assert preset('hope-tiny', vocab_size=11).vocab_size == 11
    with pytest.raises(ValueError, match='num_layers'):
        preset('hope-tiny', num_layers=0)


def test_parts_can_be_left_out_of_hope():
    hope = preset('hope-tiny')
    assert without(hope, 'dgd').memory.dgd == 'none'
    assert without(hope, 'cms').levels == (LevelConfig(312, 512),)
    assert without(without(hope, 'key'), 'eta').memory.self_modified == ('value', 'target', 'alpha')
    with pytest.raises(ValueError, match="part is 'keys'.*'?momentum"):
        without(hope, 'keys')
    for config, part in ((preset('hope-linear-tiny'), 'momentum'), (without(hope, 'key'), 'key'), (preset('titans-tiny'), 'momentum')):
        with pytest.raises(ValueError, match=f"part is '{part}'.* the model has"):
            without(config, part)
    for memory in (
        MemoryConfig(matrix_memories=('target',)),
        MemoryConfig(matrix_memories=('query',)),
        MemoryConfig(matrix_memories=('memory', 'key', 'value', 'eta', 'alpha')),
        MemoryConfig(kind='matrix', matrix_memories=('key',)),
    ):
        with pytest.raises(ValueError, match='memory.matrix_memories'):
            dataclasses.replace(hope, memory=memory)
    with pytest.raises(ValueError, match='self_modified'):
        dataclasses.replace(hope, memory=MemoryConfig(self_modified=('keys',)))


@pytest.mark.parametrize('size', ['tiny', '1.3b', *(pytest.param(size, marks=pytest.mark.exhaustive) for size in ('124m', '340m', '760m'))])
def test_families_of_one_size_have_equally_many_parameters(size):
    expected = _count(f'transformer-{size}')
    for family in FAMILIES:
        if family in TINY_ONLY and size != 'tiny':
            continue
        assert abs(_count(f'{family}-{size}') / expected - 1) < 0.03, (family, _count(f'{family}-{size}'), expected)


def test_sizes_are_what_their_names_say():
    assert 0.7e6 < _count('hope-tiny') + 2 * 256 * 128 < 1.3e6
    assert 1.2e9 < _count('transformer-1.3b') < 1.35e9
    for size in ('124m', '340m', '760m', '1.3b'):
        config = preset(f'transformer-{size}')
        total = _count(f'transformer-{size}') + 2 * config.vocab_size * config.width
        stated = float(size[:-1]) * (1e9 if size.endswith('b') else 1e6)
        assert 0.95 < total / stated < 1.2, (size, total)


def test_periods_are_at_least_a_training_sequence_and_ordered():
    for family in ('hope', 'hope-linear', 'hope-attention'):
        for size in SIZES:
            config = preset(f'{family}-{size}')
            periods = [level.period for level in config.levels]
            assert periods[0] >= (TrainConfig().sequence_length if size == 'tiny' else config.max_length)
            assert len(periods) > 1 and periods == sorted(periods) and all(b % a == 0 for a, b in zip(periods, periods[1:], strict=False))


def test_grids():
    on_a_grid = {
        'titans': 16,
        'dla': 16,
        'moneta': 16,
        'yaad': 16,
        'memora': 16,
        'atlas': 16,
        'titans-mac': 64,
        'titans-mag': 16,
        'titans-mal': 16,
        'hope': 16,
        'hope-linear': 16,
        'ttt-linear': 16,
        'ttt-mlp': 16,
    }
    assert {family: preset(f'{family}-tiny').grid for family in FAMILIES} == dict.fromkeys(FAMILIES, 1) | on_a_grid
    two = dataclasses.replace(preset('hope-tiny'), memory=MemoryConfig(chunk_size=8, projection_chunk_size=32))
    assert two.grid == 32


@pytest.mark.parametrize(
    ('field', 'changes'),
    [
        ('width', dict(width=0)),
        ('num_heads', dict(num_heads=-1)),
        ('head_dim', dict(head_dim=7)),
        ('levels', dict(levels=())),
        ('levels.period', dict(levels=(LevelConfig(8, 0),))),
        ('levels.hidden_dim', dict(levels=(LevelConfig(0, 8),))),
        ('num_kv_heads', dict(attention=AttentionConfig(num_kv_heads=3))),
        ('window', dict(attention=AttentionConfig(window=0))),
        ('window', dict(attention=AttentionConfig(window=-4))),
        ('head_dim', dict(mixer='retention', head_dim=7)),
        ('head_dim', dict(mixer='gated-linear-attention', head_dim=7)),
        ('state_space.state_dim', dict(state_space=StateSpaceConfig(state_dim=0))),
        ('state_space.head_dim', dict(mixer='mamba2', state_space=StateSpaceConfig(head_dim=48))),
        ('memory.negative_eigenvalues', dict(memory=MemoryConfig(negative_eigenvalues=True))),
        ('mixer', dict(mixer='gru')),
        ('remat', dict(remat='all')),
        ('aggregation', dict(aggregation='mean')),
        ('dtype', dict(dtype='float31')),
        ('in_sequence.blocks', dict(in_sequence=InSequenceConfig(blocks=(9,)))),
        ('in_sequence.blocks', dict(in_sequence=InSequenceConfig(blocks=()))),
        ('num_layers', dict(mixer='mamba-attention', num_layers=3)),
        ('in_sequence', dict(mixer='mamba-attention', in_sequence=InSequenceConfig(blocks=(0,)))),
        ('head_dim', dict(mixer='mamba-attention', head_dim=7)),
        ('num_heads', dict(mixer='srwm', head_dim=16)),
    ],
)
def test_a_wrong_field_is_named(field, changes):
    with pytest.raises(ValueError, match=field.replace('.', r'\.')):
        preset('transformer-tiny', **changes)


@pytest.mark.parametrize(
    ('field', 'changes'),
    [
        ('chunk_size', dict(chunk_size=0)),
        ('chunk_size', dict(chunk_size=6, projection_chunk_size=4)),
        ('gradient', dict(gradient='token')),
        ('momentum', dict(kind='matrix', gradient='token', momentum=True)),
        ('kind', dict(kind='tree')),
        ('dgd', dict(dgd='all')),
        ('read', dict(read='last')),
        ('decay_to', dict(decay_to='one')),
        ('hidden_dim', dict(hidden_dim=0)),
        ('window', dict(window=0)),
    ],
)
def test_a_wrong_field_of_the_memory_is_named(field, changes):
    with pytest.raises(ValueError, match=f'memory.*{field}'):
        preset('hope-tiny', memory=MemoryConfig(**changes))
