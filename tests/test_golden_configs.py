"""Named configurations are what they were: a default that moves is said by its field, and so is a digest that stored rows are found by.

Where a change is meant, `python -c 'from tests.test_golden_configs import write; write()'` stores the new state for the commit to show.
"""

import dataclasses
import importlib
import json
import pathlib

import tyro

from experiments import hope_pretrain
from nested_jax.config import as_dict
from nested_jax.evaluation.rows import config_digest
from nested_jax.models.presets import preset, preset_names
from nested_jax.training.config import TrainConfig, _flat

ROOT = pathlib.Path(__file__).parents[1]
GOLDEN = pathlib.Path(__file__).parent / 'goldens' / 'configs.json'
BASE = 'transformer-tiny'  # the others are stored as what differs from it
ABSENT = 'absent'


def flat(value: object, name: str = '') -> dict:
    """Dotted name -> value, as JSON has it; paths as text, from the repository on."""
    text = json.dumps(value, default=lambda other: str(other).removeprefix(f'{ROOT}/'))
    return _flat(json.loads(text), name)


def fields_of(value: object, name: str = '') -> dict:
    """Of a configuration, `added` fields at their default included."""
    return flat(dataclasses.asdict(value), name)


def defaults(arguments: type) -> dict:
    """Of a command line, without making one: some need packages, or have arguments without a default."""
    found = {}
    for field in dataclasses.fields(arguments):
        value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if value is not dataclasses.MISSING and value is not tyro.MISSING:
            found |= (fields_of if dataclasses.is_dataclass(value) else flat)(value, field.name)
    return found


def difference(fields: dict, base: dict) -> dict:
    """What to change in `base` to get `fields`."""
    return {name: fields.get(name, ABSENT) for name in sorted({*fields, *base}) if fields.get(name, ABSENT) != base.get(name, ABSENT)}


def present() -> dict[str, dict]:
    """Name -> what is stored of it: fields, of presets those that differ from the first; digests of what rows hold of presets."""
    base, found = fields_of(preset(BASE)), {}
    for name in preset_names():
        found[f'preset {name}'] = difference(fields_of(preset(name)), {} if name == BASE else base)
        found[f'preset {name}']['digest'] = config_digest(as_dict(preset(name)))
    found['training'] = fields_of(TrainConfig())
    found['training --smoke'] = difference(fields_of(hope_pretrain._SMOKE), found['training'])
    for path in sorted((ROOT / 'experiments').glob('*.py')):
        if '\nclass Args' in path.read_text():
            found[f'experiment {path.stem}'] = defaults(importlib.import_module(f'experiments.{path.stem}').Args)
    return found


def write() -> None:
    """Stores the present state, a line for each name."""
    lines = (f'{json.dumps(name)}: {json.dumps(fields, sort_keys=True)}' for name, fields in present().items())
    GOLDEN.write_text('{\n' + ',\n'.join(lines) + '\n}\n')


def test_named_configurations_are_what_they_were():
    """F2: of presets and experiments; what drifted is said by its name."""
    stored, now = json.loads(GOLDEN.read_text()), present()
    moved = [
        f'{name}: {field} was {stored.get(name, {}).get(field, ABSENT)!r} and is {now.get(name, {}).get(field, ABSENT)!r}'
        for name in sorted({*stored, *now})
        for field in difference(now.get(name, {}), stored.get(name, {}))
    ]
    assert not moved, '\n'.join(moved)
    assert len([name for name in now if name.startswith('experiment ')]) > 15
