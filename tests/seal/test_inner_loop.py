"""The inner update: K at once is each alone, equals a loop written out, and touches nothing else."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nested_jax.models.language_model import LanguageModel
from nested_jax.seal.inner_loop import Candidate, InnerConfig, buckets, learn_all, make_inner_loop, real_share
from nested_jax.seal.lora import LoraConfig, attach, init_lora
from tests.models.small_models import random_params, small

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
    assert_close(learn_all(make_inner_loop(MODEL, config), PARAMS, [each], config)[0], written_out(PARAMS, each, config))


def test_many_are_each_alone_in_any_order():
    mixed = [candidate(seed, rows=1 + seed % 4, steps=seed % 4, learning_rate=0.01 * (1 + seed % 2)) for seed in range(8)]
    loop = make_inner_loop(MODEL, CONFIG)
    together = learn_all(loop, PARAMS, mixed, CONFIG)
    backwards = learn_all(loop, PARAMS, mixed[::-1], CONFIG)[::-1]
    alone = learn_all(loop, PARAMS, mixed, CONFIG, at_most=1)
    assert_close(together, backwards)
    assert_close(together, alone)


def test_no_steps_is_the_start_and_losses_end_with_the_steps():
    loop = make_inner_loop(MODEL, CONFIG)
    ((places, batch),) = buckets([candidate(0, steps=3), candidate(1, steps=4)], CONFIG)
    learned = loop(PARAMS, batch)
    assert places == [0, 1] and np.count_nonzero(learned.losses, axis=1).tolist() == [3, 4]
    ((_, still),) = buckets([candidate(2, steps=0)], CONFIG)
    assert_close(jax.tree.map(lambda leaf: leaf[0], loop(PARAMS, still).adapters), init_lora(PARAMS, jax.random.key(2), CONFIG.lora), 1e-7)


def test_rows_of_a_step_come_epoch_by_epoch():
    config = dataclasses.replace(CONFIG, rows_per_step=2)
    ((_, batch),) = buckets([candidate(0, rows=4, steps=4)], config)
    first, second = batch.rows[0].reshape(2, 4)
    assert sorted(first) == sorted(second) == [0, 1, 2, 3] and list(first) != list(second)
    ((_, again),) = buckets([candidate(0, rows=4, steps=4)], config)
    np.testing.assert_array_equal(batch.rows, again.rows)
    assert np.isfinite(make_inner_loop(MODEL, config)(PARAMS, batch).losses).all()


def test_buckets_round_up_to_powers_of_two():
    mixed = [candidate(0, rows=3, length=6), candidate(1, rows=4, length=9), candidate(2, rows=4, length=8), candidate(3, rows=1)]
    shapes = {batch.tokens.shape: places for places, batch in buckets(mixed, CONFIG)}
    assert shapes == {(1, 1, 8): [3], (3, 4, 8): [0, 1, 2]}
    sizes = [batch.tokens.shape[0] for _, batch in buckets([candidate(seed) for seed in range(5)], CONFIG, at_most=2)]
    assert sizes == [2, 2, 1]


def test_the_share_of_real_tokens():
    ((_, full),) = buckets([Candidate(((1,) * 9,) * 4, 0.1, 4)], CONFIG)
    ((_, half),) = buckets([Candidate(((1,) * 9,) * 2 + ((1, 1),), 0.1, 4)], CONFIG)
    assert real_share(full) == 1.0 and real_share(half) == 17 / 32


def test_it_learns():
    each = candidate(5, steps=64, learning_rate=0.05)
    ((_, batch),) = buckets([each], CONFIG)
    losses = make_inner_loop(MODEL, CONFIG)(PARAMS, batch).losses[0]
    assert losses[-1] < 0.7 * losses[0]


def test_the_weights_are_held_once():
    shapes = jax.eval_shape(lambda: PARAMS)
    loop = make_inner_loop(MODEL, dataclasses.replace(CONFIG, lora=LoraConfig(rank=1, alpha=1.0, targets=('query',))))

    def used(count: int) -> int:
        ((_, batch),) = buckets([Candidate(((1, 2),), 0.1, 1, seed=seed) for seed in range(count)], CONFIG)
        return loop.lower(shapes, batch).compile().memory_analysis().temp_size_in_bytes

    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(PARAMS))
    assert (used(33) - used(1)) / 32 < weights / 2


@pytest.mark.parametrize(
    ('field', 'changes'),
    [
        ('sequences', dict(sequences=())),
        ('sequences', dict(sequences=((1,),))),
        ('learning_rate', dict(learning_rate=-1.0)),
        ('steps', dict(steps=-1)),
        ('prompt_lengths', dict(prompt_lengths=(1,))),
        ('prompt_lengths', dict(prompt_lengths=(6, 0, 0))),
    ],
)
def test_bad_candidates_are_named(field, changes):
    with pytest.raises(ValueError, match=f'{field} is .*allowed is'):
        candidate(0, **changes)


def test_bad_settings_are_named():
    for field, value in itertools.chain(
        [('rows_per_step', 0), ('clip_norm', 0.0)], ((name, -1.0) for name in ('weight_decay', 'kl_to_base'))
    ):
        with pytest.raises(ValueError, match=f'{field} is .*allowed is'):
            InnerConfig(**{field: value})
