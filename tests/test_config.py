"""Configurations as stored: what a field added later does to those of earlier runs."""

import dataclasses
import json

import pytest

from nested_jax.config import AttentionConfig, LevelConfig, MemoryConfig, ModelConfig, RopeScaling, added, as_dict, redacted
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


def drop(tree, names: set[str]):
    """Without the entries of these names, at any depth."""
    if isinstance(tree, dict):
        return {name: drop(part, names) for name, part in tree.items() if name not in names}
    return tuple(drop(part, names) for part in tree) if isinstance(tree, tuple) else tree


def test_other_fields_are_those_of_the_dataclass():
    config = dataclasses.replace(preset('hope-tiny'), levels=(LevelConfig(8, 2), LevelConfig(8, 4)))
    for value in (config, TrainConfig()):
        told, whole = as_dict(value), dataclasses.asdict(value)
        later = {
            field.name
            for part in (value, AttentionConfig(), MemoryConfig())
            for field in dataclasses.fields(part)
            if field.metadata.get('added')
        }
        assert told == drop(whole, later)
    assert ModelConfig.from_dict(as_dict(config)) == config


def test_a_pretrained_models_attention_is_stored_and_read_back():
    scaling = RopeScaling(32.0, 1.0, 4.0, 8192)
    config = dataclasses.replace(preset('transformer-tiny'), attention=AttentionConfig(qkv_bias=True, rope_scaling=scaling))
    stored = json.loads(json.dumps(as_dict(config)))
    assert 'qk_norm' not in stored['attention'] and stored['attention']['rope_scaling']['factor'] == 32.0
    assert ModelConfig.from_dict(stored) == config


@pytest.mark.parametrize(
    ('preset_name', 'attention', 'message'),
    [
        ('hope-tiny', dict(qk_norm=True), 'attention.qk_norm is True, allowed is False'),
        ('titans-mac-tiny', dict(qkv_bias=True, segment=64), 'attention.qkv_bias is True'),
        ('transformer-tiny', dict(rope_scaling=RopeScaling(8.0, 4.0, 4.0, 8192)), 'that of high frequencies above that of low ones'),
        ('transformer-tiny', dict(rope_scaling=RopeScaling(8.0, 1.0, 4.0, 0)), 'rope_scaling.original_max_length is 0'),
    ],
)
def test_variants_of_attention_are_checked(preset_name, attention, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(preset(preset_name), attention=AttentionConfig(**attention))


def test_secrets_are_not_stored():
    """By the words of a field's name or by their form; what only sounds alike stays, and so does what is no text."""
    kept = dict(tokenizer='bpe:8192', eval_tokens=128, num_keys='many', token=5, without=('key', 'value'), digest='a3' * 20, hf_token='')
    kept |= dict(path='/mnt/hf_datasets_of_many_words_that_go_on_and_on/sk-1', corpus='s3://bucket/a@b', url='https://host/x')
    assert redacted(kept) == kept
    secret = dict(
        hf_token='x', wandb_api_key='x', AWS_SECRET='x', password='x', nested=[dict(Auth='x'), ('https://me:pw@host/x', 'ghp_' + 'a' * 36)]
    )
    hidden = 'redacted'
    assert redacted(secret) == dict(
        hf_token=hidden, wandb_api_key=hidden, AWS_SECRET=hidden, password=hidden,
        nested=[dict(Auth=hidden), ('https://redacted@host/x', hidden)],
    )  # fmt: skip
    assert redacted(redacted(secret)) == redacted(secret)
