"""The inner update: K at once is each alone, equals a loop written out, and touches nothing else."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nested_jax.config import LevelConfig
from nested_jax.models.language_model import LanguageModel
from nested_jax.seal.buckets import Candidate, buckets
from nested_jax.seal.inner_loop import InnerConfig, learn_all, make_inner_loop
from nested_jax.seal.lora import LoraConfig, attach, init_lora
from tests.models.small_models import random_params, shapes, small

CONFIG = InnerConfig(lora=LoraConfig(rank=2, alpha=4.0, targets=('query', 'down')))
MODEL = LanguageModel(small('transformer'))
PARAMS = random_params(MODEL, dtype=np.float32)


def candidate(seed: int, rows: int = 3, length: int = 6, **changes) -> Candidate:
    rng = np.random.default_rng(seed)
    sequences = tuple(tuple(rng.integers(0, 32, length - (row % 2)).tolist()) for row in range(rows))
    return dataclasses.replace(Candidate(sequences, learning_rate=0.01, steps=3, seed=seed), **changes)


def assert_close(one, other, tolerance=1e-5):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance)


def written_out(params, each: Candidate, config: InnerConfig):
    """The update as a loop over steps and rows, without padding."""
    adapters = init_lora(params, jax.random.key(each.seed), config.lora)
    optimizer = optax.chain(optax.clip_by_global_norm(config.clip_norm), optax.scale_by_adam(), optax.scale(-1.0))
    state = optimizer.init(adapters)

    def loss(adapters):
        total, count = 0.0, 0
        for row, sequence in enumerate(each.sequences):
            first = each.prompt_lengths[row] if each.prompt_lengths else 1
            tokens = jnp.asarray([sequence])
            new = jax.nn.log_softmax(MODEL.apply(attach(params, adapters, config.lora), tokens)[0][0])
            base = jax.nn.log_softmax(MODEL.apply({'params': params}, tokens)[0][0])
            for place in range(max(first, 1), len(sequence)):
                kl = (jnp.exp(base[place - 1]) * (base[place - 1] - new[place - 1])).sum()
                total, count = total - new[place - 1, sequence[place]] + config.kl_to_base * kl, count + 1
        return total / count

    gradient = jax.jit(jax.grad(loss))
    for step in range(each.steps):
        updates, state = optimizer.update(gradient(adapters), state, adapters)
        rate = each.learning_rate * (1 - step / each.steps)
        adapters = jax.tree.map(lambda leaf, update, rate=rate: leaf + rate * update, adapters, updates)
    return adapters


@pytest.mark.parametrize('changes', [{}, dict(kl_to_base=0.5)], ids=['plain', 'kl'])
def test_it_is_the_loop_written_out(changes):
    config = dataclasses.replace(CONFIG, **changes)
    each = candidate(1, prompt_lengths=(2, 0, 1))
    assert_close(learn_all(make_inner_loop(MODEL, config), PARAMS, [each])[0], written_out(PARAMS, each, config))


def test_many_are_each_alone_in_any_order():
    mixed = [candidate(seed, rows=1 + seed % 4, steps=seed % 4, learning_rate=0.01 * (1 + seed % 2)) for seed in range(8)]
    loop = make_inner_loop(MODEL, CONFIG)
    together = learn_all(loop, PARAMS, mixed)
    backwards = learn_all(loop, PARAMS, mixed[::-1])[::-1]
    alone = learn_all(loop, PARAMS, mixed, at_most=1)
    assert_close(together, backwards)
    assert_close(together, alone)


def test_candidates_are_split_over_devices_where_their_number_divides():
    mixed = [candidate(seed, rows=1 + seed % 2, steps=1 + seed % 3) for seed in range(5)]
    split = make_inner_loop(MODEL, CONFIG, jax.devices()[:2])
    assert_close(learn_all(split, PARAMS, mixed), learn_all(make_inner_loop(MODEL, CONFIG), PARAMS, mixed, at_most=1))
    for count, used in ((1, 1), (4, 2)):
        ((_, batch),) = buckets([candidate(seed) for seed in range(count)])
        assert len(split(PARAMS, batch).loss.devices()) == used


def learned(steps: int, **layout) -> tuple:
    """Adapters and last loss of one candidate after so many steps."""
    ((_, batch),) = buckets([candidate(5, rows=4, steps=steps, learning_rate=0.05)], **layout)
    found = make_inner_loop(MODEL, CONFIG)(PARAMS, batch)
    return jax.tree.map(lambda leaf: leaf[0], found.adapters), float(found.loss[0])


def test_no_step_is_the_start():
    adapters, loss = learned(0)
    assert_close(adapters, init_lora(PARAMS, jax.random.key(5), CONFIG.lora), 1e-7)
    assert loss == 0.0


@pytest.mark.parametrize('rows_per_step', [None, 2])
def test_it_learns(rows_per_step):
    assert learned(64, rows_per_step=rows_per_step)[1] < 0.7 * learned(1, rows_per_step=rows_per_step)[1]


def test_one_program_serves_all_numbers_of_steps():
    loop = make_inner_loop(MODEL, CONFIG)
    for steps in (1, 2, 7):
        learn_all(loop, PARAMS, [candidate(0, steps=steps)])
    assert loop._cache_size() == 1


def test_the_weights_are_held_once():
    shapes = jax.eval_shape(lambda: PARAMS)
    loop = make_inner_loop(MODEL, dataclasses.replace(CONFIG, lora=LoraConfig(rank=1, alpha=1.0, targets=('query',))))

    def used(count: int) -> int:
        ((_, batch),) = buckets([Candidate(((1, 2),), 0.1, 1, seed=seed) for seed in range(count)])
        return loop.lower(shapes, batch).compile().memory_analysis().temp_size_in_bytes

    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(PARAMS))
    assert (used(32) - used(1)) / 31 < weights / 2


@pytest.mark.parametrize('devices', [1, 2])
def test_memory_grows_by_the_adapters_alone(devices):
    """A candidate of two tokens and an adapter much larger than what the tokens need, beside weights much larger than that."""
    hidden, rank, layers = 2048, 512, 2
    model = LanguageModel(small('transformer', levels=(LevelConfig(hidden, 1),)))
    params = shapes(model)
    config = dataclasses.replace(CONFIG, lora=LoraConfig(rank=rank, alpha=1.0, targets=('query',)))
    loop = make_inner_loop(model, config, jax.devices()[:devices])

    def used(count: int) -> int:
        ((_, batch),) = buckets([Candidate(((1, 2),), 0.1, 1, seed=seed) for seed in range(count)])
        memory = loop.lower(params, batch).compile().memory_analysis()  # of one device
        return memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes

    size = lambda tree: sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
    adapter = size(jax.eval_shape(lambda: init_lora(params, jax.random.key(0), config.lora)))
    activations = 4 * layers * 2 * 3 * hidden  # float32: gate, up and their product of two tokens
    assert activations < adapter < size(params) / 6
    each = devices * (used(64) - used(16)) / 48
    # Six: the adapter, its gradient and two moments, what replaces the adapter, and what is returned.
    assert each < 6.5 * adapter + activations, (each / adapter, activations / adapter)


def test_bad_settings_are_named():
    for field, value in (('clip_norm', 0.0), ('weight_decay', -1.0), ('kl_to_base', -1.0)):
        with pytest.raises(ValueError, match=f'{field} is .*allowed is'):
            InnerConfig(**{field: value})
