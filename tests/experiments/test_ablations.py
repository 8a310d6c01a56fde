"""The ablations of Hope: what each arm leaves out, and what the probes see of levels and memories."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import ablations
from experiments.ablations import ARMS, Args, arm_config, distance, level_cosines, moved_memories, without_level
from nested_jax.evaluation.rows import read_rows
from nested_jax.layers.self_modifying import SelfModifyingTitans
from nested_jax.memory import self_modifying
from nested_jax.models.language_model import LanguageModel
from nested_jax.models.presets import preset
from tests.models.small_models import random_params, small

TOKENS = np.random.default_rng(0).integers(0, 32, (2, 12)).astype(np.int32)


def test_arms_differ_from_the_whole_and_from_each_other():
    for base, skipped in (('hope', ()), ('hope-linear', ('without momentum', 'matrix projections'))):
        assert Args(base=base).chosen == tuple(arm for arm in ARMS if arm not in skipped)
        configs = [arm_config(base, arm) for arm in Args(base=base).chosen]
        assert configs[0] == preset(f'{base}-tiny') and all(configs.count(config) == 1 for config in configs)
    assert arm_config('hope', 'with query').memory.adaptive_query
    assert arm_config('hope', 'without self-modification').memory.self_modified == ()
    assert arm_config('hope', 'without dgd').memory.dgd == 'none'


@pytest.mark.parametrize(
    ('arguments', 'named'),
    [
        (['--arms', 'without everything'], 'arm'),
        (['--arms', 'without momentum'], "'momentum'"),
        (['--arms', 'matrix projections'], 'matrix_memories'),
        (['--steps', '0'], 'steps'),
        (['--base', 'titans'], 'base'),
    ],
)
def test_wrong_input_exits_with_2_and_names_it(arguments, named, capsys, monkeypatch):
    monkeypatch.setattr(ablations, 'open_dataset', lambda *_: pytest.fail('the text is not read before'))
    with pytest.raises(SystemExit) as stop:
        ablations.main(arguments)
    assert stop.value.code == 2 and named in capsys.readouterr().err


def test_distances():
    assert distance([jnp.ones(3), jnp.zeros(1)], [jnp.ones(3), jnp.zeros(1)]) == 0
    assert distance(jnp.array([3.0, 0.0]), jnp.array([0.0, 4.0])) == pytest.approx(1.25)


def test_a_level_left_out_adds_nothing():
    model = LanguageModel(small('hope-linear'))
    params = random_params(model, dtype='float32')
    down = lambda tree, index: tree['blocks']['channel'][f'level_{index}']['down']['kernel']
    silent = without_level(params, 1)
    assert not down(silent, 1).any() and (down(silent, 0) == down(params, 0)).all()


def test_levels_that_are_alike_have_a_cosine_of_one():
    model = LanguageModel(small('hope-linear'))
    params = random_params(model, dtype='float32')
    channel = params['blocks']['channel']
    nothing = jax.tree.map(jnp.zeros_like, channel['level_0']['down'])
    assert abs(level_cosines(model.config, params, TOKENS)['0:1']) < 0.5
    # What the first level adds is next to nothing: the second, of the same weights, sees the same rows and adds the same.
    tiny = dict(channel['level_0'], down=jax.tree.map(lambda leaf: 1e-6 * leaf, channel['level_0']['down']))
    alike = dict(params, blocks=dict(params['blocks'], channel=dict(channel, level_0=tiny, level_1=tiny)))
    assert level_cosines(model.config, alike, TOKENS)['0:1'] == pytest.approx(1, abs=1e-3)
    assert nothing['kernel'].shape == tiny['down']['kernel'].shape


class Initial(SelfModifyingTitans):
    """The layer's initial memories."""

    @nn.compact
    def __call__(self, rule: self_modifying.Rule) -> self_modifying.Memories:
        return self._initial(rule)


@pytest.mark.parametrize('family', ['hope', 'hope-linear'])
def test_each_memory_is_found_where_its_layer_puts_it(family):
    config = small(family)
    params = random_params(LanguageModel(config), dtype='float32')
    mixer = params['blocks']['mixer']
    rule = self_modifying.Rule(kind=config.memory.kind)
    initial = jax.vmap(lambda layer: Initial(config).apply({'params': layer}, rule))(mixer)
    running = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), initial)  # two rows of a batch
    names = ('memory', 'key', 'value', 'eta', 'alpha')
    for name in names:
        assert distance(*ablations._one_memory(name, config, running, mixer)) == 0, name
        moved = {leaf: 2 * value if leaf in (f'initial_{name}', f'initial_{name}_out') else value for leaf, value in mixer.items()}
        found = {other: distance(*ablations._one_memory(other, config, running, moved)) > 0 for other in names}
        assert found == {other: other == name for other in names}


def test_memories_move_in_a_context():
    model = LanguageModel(small('hope-linear'))
    moved = moved_memories(model, random_params(model, dtype='float32'), TOKENS)
    assert set(moved) == {'memory', 'key', 'value', 'eta', 'alpha'} and all(0.01 < share < 10 for share in moved.values())


def test_a_read_only_model_writes_nothing():
    model = LanguageModel(dataclasses.replace(small('hope-linear')))
    params = random_params(model, dtype='float32')
    reader = ablations._ReadOnly(model)
    run = jax.jit(lambda params, tokens: reader.apply({'params': params}, tokens)[0])
    changed = TOKENS.copy()
    changed[:, 0] = (changed[:, 0] + 1) % 32
    # Beyond the reach of two layers of convolutions of width four the first token is forgotten.
    np.testing.assert_allclose(run(params, TOKENS)[:, 8:], run(params, changed)[:, 8:], rtol=0, atol=1e-5)


@pytest.mark.slow
def test_smoke_run_probes_and_stores_nothing(tmp_path, capsys):
    results = tmp_path / 'rows.jsonl'
    assert ablations.main(['--smoke', '--results', str(results), '--runs', str(tmp_path / 'runs')]) == 0
    assert 'whole hope-linear seed 0' in capsys.readouterr().out and read_rows(results) == []
