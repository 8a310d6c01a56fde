"""Other uses of the inner update, each against the same thing done by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nested_jax.models.language_model import LanguageModel
from nested_jax.seal.buckets import Batch, Candidate, buckets
from nested_jax.seal.inner_loop import InnerConfig, Learner, make_inner_loop, read_rows, token_loss
from nested_jax.seal.lora import LoraConfig, attach, init_lora, merge
from nested_jax.seal.modes import make_meta_step, make_test_time_training
from tests.models.small_models import random_params, small

CONFIG = InnerConfig(lora=LoraConfig(rank=2, alpha=4.0, targets=('query', 'down')))
MODEL = LanguageModel(small('transformer', num_layers=1))
PARAMS = random_params(MODEL, dtype=np.float32)
FILLED = jax.tree.map(lambda leaf: leaf + 0.05, init_lora(PARAMS, jax.random.key(3), CONFIG.lora))


def batch(seed: int, steps: int, count: int = 4, rate: float = 0.02) -> Batch:
    rng = np.random.default_rng(seed)
    draw = lambda: tuple(tuple(rng.integers(0, 32, 8).tolist()) for _ in range(2))
    ((_, found),) = buckets([Candidate(draw(), rate, steps, seed=index) for index in range(count)], shape=(2, 8))
    return found


def assert_close(one, other, tolerance=1e-5):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance)


def test_test_time_training_is_an_update_that_is_thrown_away():
    prompts, learned = np.random.default_rng(0).integers(0, 32, (4, 3, 6)), batch(1, 3)
    answer, before = make_test_time_training(MODEL, CONFIG), jax.tree.map(np.array, PARAMS)
    logits = answer(PARAMS, learned, prompts)
    adapters = make_inner_loop(MODEL, CONFIG)(PARAMS, learned).adapters
    for index in range(4):
        merged = merge(PARAMS, jax.tree.map(lambda leaf, index=index: leaf[index], adapters), CONFIG.lora)
        assert_close(logits[index], MODEL.apply({'params': merged}, prompts[index])[0][:, -1], 5e-5)
    untouched = MODEL.apply({'params': PARAMS}, prompts[0])[0][:, -1]
    assert float(jnp.abs(logits[0] - untouched).max()) > 0.01
    assert_close(answer(PARAMS, learned._replace(steps=np.zeros(4, np.int32)), prompts)[0], untouched)
    assert_close(PARAMS, before, 0)


@pytest.mark.parametrize('steps', [0, 2])
def test_a_meta_step_takes_the_queries_gradient_where_the_updates_ended(steps):
    support, query = batch(1, steps), batch(2, 0)
    optimizer = optax.sgd(0.3)
    found = make_meta_step(MODEL, CONFIG, optimizer)(PARAMS, FILLED, optimizer.init(FILLED), support, query)
    learned = make_inner_loop(MODEL, CONFIG)(PARAMS, support, FILLED).adapters if steps else None

    def loss(adapters, index):
        read = read_rows(jax.tree.map(lambda leaf: jnp.asarray(leaf[index]), query), np.arange(2))
        total, count = token_loss(Learner(MODEL, attach(PARAMS, adapters, CONFIG.lora)), PARAMS, read)
        return total / count

    starts = [jax.tree.map(lambda leaf, index=index: leaf[index], learned) if steps else FILLED for index in range(4)]
    values, gradients = zip(*(jax.value_and_grad(loss)(start, index) for index, start in enumerate(starts)), strict=True)
    mean = jax.tree.map(lambda *leaves: sum(leaves) / 4, *gradients)
    assert_close(found.adapters, jax.tree.map(lambda leaf, gradient: leaf - 0.3 * gradient, FILLED, mean))
    np.testing.assert_allclose(found.loss, np.mean(values), rtol=1e-5)


@pytest.mark.slow
def test_meta_learning_makes_updates_on_new_texts_better():
    pairs = dict(enumerate(np.random.default_rng(0).permutation(32)))  # what a query asks of a token is not what the support shows

    def texts(seed: int) -> tuple[Batch, Batch]:
        rng, support, query = np.random.default_rng(seed), [], []
        for _ in range(4):
            one = rng.integers(0, 32, 4)
            support.append(tuple(np.repeat(one, 2).tolist()))
            query.append(tuple(np.stack([one, [pairs[token] for token in one]], 1).ravel().tolist()))
        made = [buckets([Candidate((each,), 0.02, 2) for each in part], shape=(1, 8)) for part in (support, query)]
        return tuple(next(iter(found))[1] for found in made)

    optimizer = optax.adam(0.02)
    step, adapters = make_meta_step(MODEL, CONFIG, optimizer), init_lora(PARAMS, jax.random.key(0), CONFIG.lora)
    state, tested = optimizer.init(adapters), lambda adapters: float(step(PARAMS, adapters, state, *texts(10_000)).loss)
    before = tested(adapters)
    for index in range(60):
        adapters, state, _ = step(PARAMS, adapters, state, *texts(index))
    assert tested(adapters) < 0.9 * before
