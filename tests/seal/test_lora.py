"""Adapters: what they add, where they go, and that merged and unmerged are the same model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from nested_jax.config import LevelConfig
from nested_jax.models.language_model import LanguageModel
from nested_jax.seal.lora import LoraConfig, attach, init_lora, merge
from tests.models.small_models import random_params, shapes, small

TOKENS = np.random.default_rng(0).integers(0, 32, (2, 8))
CONFIG = LoraConfig(rank=3, alpha=6.0, targets=('query', 'value', 'down'))


def filled(params, config=CONFIG, seed=0):
    """Adapters whose b is not zero."""
    adapters = init_lora(params, jax.random.key(seed), config)
    return jax.tree.map(lambda leaf: leaf + 0.1 * jax.random.normal(jax.random.key(seed + 1), leaf.shape), adapters)


@pytest.mark.parametrize('family', ['transformer', 'hope', 'hope-linear', 'gated-deltanet'])
def test_unmerged_equals_merged(family):
    model = LanguageModel(small(family))
    params = random_params(model, dtype=np.float32)
    adapters = filled(params)
    apply = jax.jit(lambda variables: model.apply(variables, TOKENS)[0])
    base = apply({'params': params})
    unmerged, merged = apply(attach(params, adapters, CONFIG)), apply({'params': merge(params, adapters, CONFIG)})
    assert float(jnp.abs(base - merged).max()) > 1e-2
    np.testing.assert_allclose(unmerged, merged, rtol=0, atol=2e-4)
    fresh = init_lora(params, jax.random.key(0), CONFIG)
    np.testing.assert_allclose(apply(attach(params, fresh, CONFIG)), base, rtol=0, atol=1e-5)


@pytest.mark.parametrize('family', ['transformer', 'hope-linear'])
def test_every_target_reaches_the_output(family):
    model = LanguageModel(small(family))
    params = random_params(model, dtype=np.float32)
    adapters = filled(params)
    loss = lambda adapters: jnp.square(model.apply(attach(params, adapters, CONFIG), TOKENS)[0]).mean()
    gradients = traverse_util.flatten_dict(jax.jit(jax.grad(loss))(adapters))
    assert {path[-2] for path in gradients} == {'query', 'value', 'down'}
    assert all(float(jnp.abs(leaf).min(axis=(-1, -2)).max()) > 0 for leaf in gradients.values())


def test_it_begins_as_peft_does():
    params = random_params(LanguageModel(small('transformer')), dtype=np.float32)
    adapters = init_lora(params, jax.random.key(0), LoraConfig(rank=200, targets=('query',)))['blocks']['mixer']['query']
    assert adapters['a'].shape == (2, 16, 200) and adapters['b'].shape == (2, 200, 16)
    assert not np.asarray(adapters['b']).any()
    assert 0.97 * 16**-0.5 < float(jnp.abs(adapters['a']).max()) <= 16**-0.5
    np.testing.assert_allclose(float(adapters['a'].std()), 16**-0.5 / 3**0.5, rtol=0.03)


def test_a_stack_holds_the_weights_once():
    model = LanguageModel(small('transformer', width=64, num_heads=2, head_dim=32))
    params = random_params(model, dtype=np.float32)
    config = LoraConfig(rank=1, alpha=1.0, targets=('query',))

    def used(count: int) -> int:
        stack = jax.eval_shape(jax.vmap(lambda key: init_lora(params, key, config)), jax.random.split(jax.random.key(0), count))
        apply = jax.vmap(lambda params, adapters: model.apply(attach(params, adapters, config), TOKENS[:1, :1])[0], (None, 0))
        memory = jax.jit(apply).lower(params, stack).compile().memory_analysis()
        return memory.argument_size_in_bytes + memory.temp_size_in_bytes

    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    each = (used(65) - used(1)) / 64
    assert each < weights / 8, (each, weights)


def test_a_stack_grows_by_its_adapters():
    """Of a rank at which they are much larger than what one token needs, over weights much larger than that."""
    model = LanguageModel(small('transformer', levels=(LevelConfig(2048, 1),)))
    params, config = shapes(model), LoraConfig(rank=512, alpha=1.0, targets=('query',))
    stack = lambda count: jax.eval_shape(jax.vmap(lambda key: init_lora(params, key, config)), jax.random.split(jax.random.key(0), count))

    def used(count: int) -> int:
        apply = jax.vmap(lambda params, adapters: model.apply(attach(params, adapters, config), TOKENS[:1, :1])[0], (None, 0))
        memory = jax.jit(apply).lower(params, stack(count)).compile().memory_analysis()
        return memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes

    size = lambda tree: sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
    adapter, activations = size(stack(1)), 4 * 3 * 2048  # float32: gate, up and their product of one layer
    each = (used(64) - used(16)) / 48
    # Two and a half: the adapters, b as it is scaled, and a layout of both that XLA computes with.
    assert each < 2.5 * adapter + activations < size(params), (each / adapter, activations / adapter)


def test_targets_are_ends_of_paths():
    params = random_params(LanguageModel(small('hope-attention')), dtype=np.float32)
    paths = lambda *targets: {'/'.join(path[:-1]) for path in traverse_util.flatten_dict(
        init_lora(params, jax.random.key(0), LoraConfig(targets=targets)))}  # fmt: skip
    assert paths('level_1/down') == {'blocks/channel/level_1/down'}
    assert paths('down') == {f'blocks/channel/level_{level}/down' for level in range(4)}
    with pytest.raises(ValueError, match="targets has 'own'.*allowed are down, gate, key"):
        paths('own')


@pytest.mark.parametrize(('field', 'value'), [('rank', 0), ('alpha', 0.0), ('targets', ())])
def test_bad_settings_are_named(field, value):
    with pytest.raises(ValueError, match=f'{field} is .*allowed is'):
        LoraConfig(**{field: value})
