"""Configurations as stored: what a field added later does to those of earlier runs."""

import dataclasses

from nested_jax.config import LevelConfig, ModelConfig, added, as_dict
from nested_jax.models.presets import preset
from nested_jax.training.config import TrainConfig


@dataclasses.dataclass(frozen=True)
class _Inner:
    size: int = 1
    later: int | None = added(None)


@dataclasses.dataclass(frozen=True)
class _Outer:
    name: str = 'x'
    parts: tuple[_Inner, ...] = (_Inner(), _Inner(2, 3))


def test_a_field_added_later_shows_only_where_it_is_set():
    assert as_dict(_Outer()) == dict(name='x', parts=(dict(size=1), dict(size=2, later=3)))


def test_other_fields_are_those_of_the_dataclass():
    config = dataclasses.replace(preset('hope-tiny'), levels=(LevelConfig(8, 2), LevelConfig(8, 4)))
    for value in (config, TrainConfig()):
        told, whole = as_dict(value), dataclasses.asdict(value)
        later = {field.name for field in dataclasses.fields(value) if field.metadata.get('added')}
        assert told == {name: part for name, part in whole.items() if name not in later}
    assert ModelConfig.from_dict(as_dict(config)) == config
