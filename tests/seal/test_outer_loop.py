"""The writer's update: who is chosen, what advantages are, and that the update makes what was rewarded likelier."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nested_jax.models.language_model import LanguageModel
from nested_jax.seal.lora import LoraConfig, merge
from nested_jax.seal.outer_loop import (
    ALGORITHMS,
    OuterConfig,
    RewardTable,
    Samples,
    StaleRewardsError,
    advantages,
    better_half,
    choose,
    digest,
    learning_rates,
    make_policy_update,
)
from tests.models.small_models import random_params, small

MODEL = LanguageModel(small('transformer'))
PARAMS = random_params(MODEL, dtype=np.float32)
REWARDS = np.array([[0.5, 0.75, 0.75], [0.25, 0.25, 0.0], [1.0, 0.5, 0.0]])
TIES = np.array([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]])


def samples(count: int = 6, length: int = 8) -> Samples:
    tokens = np.random.default_rng(0).integers(0, 32, (count, length + 1)).astype(np.int32)
    weights = np.zeros((count, length), np.float32)
    weights[:, 4:] = 1
    return Samples(tokens[:, :-1], tokens[:, 1:], weights)


def log_prob(params, batch: Samples) -> np.ndarray:
    logits, _ = MODEL.apply({'params': params}, batch.tokens)
    each = jnp.take_along_axis(jax.nn.log_softmax(logits), batch.targets[..., None], -1)[..., 0]
    return np.asarray((each * batch.weights).sum(1))


def chosen(baseline=(0.0, 0.0, 0.0), **changes) -> list[tuple[int, int]]:
    picked = choose(OuterConfig(**changes), REWARDS, np.array(baseline), TIES, np.random.default_rng(0))
    return list(zip(*map(np.ndarray.tolist, np.nonzero(picked)), strict=True))


def test_the_best_is_chosen_and_ties_are_broken():
    assert chosen() == [(0, 2), (1, 1), (2, 0)]
    assert chosen(baseline=(0.75, 0.0, 0.5)) == [(1, 1), (2, 0)]
    assert chosen(baseline=(0.75, 0.0, 0.5), require_gain=False) == [(0, 2), (1, 1), (2, 0)]
    assert chosen(top_share=0.34) == [(2, 0)]
    assert chosen(baseline=(0.0, 0.0, 1.0), top_share=0.67) == [(0, 2), (1, 1)]


def test_the_control_chooses_without_looking():
    config, rng = OuterConfig(algorithm='random'), np.random.default_rng(0)
    counts = sum(choose(config, REWARDS, np.zeros(3), TIES, rng) for _ in range(600))
    assert counts.sum() == 1800 and counts.min() > 150


def test_the_better_half_is_kept_and_ties_are_broken():
    rewards, ties = np.array([[0.5, 1.0, 0.5, 0.0, 0.0], [0.2, 0.1, 0.3, 0.4, 0.0]]), np.zeros((2, 5))
    ties[0, 2] = 1.0
    np.testing.assert_array_equal(better_half(rewards, ties), [[0, 1, 1, 0, 0], [0, 0, 1, 1, 0]])
    np.testing.assert_array_equal(better_half(rewards[:, :3], ties[:, :3]).sum(1), [2, 2])


def test_advantages_by_their_definitions():
    rewards = np.array([[1.0, 0.0, 0.5, 0.5], [0.25, 0.25, 0.25, 0.25]])
    others = (rewards.sum(1, keepdims=True) - rewards) / 3
    np.testing.assert_allclose(advantages('rloo', rewards), rewards - others)
    np.testing.assert_allclose(advantages('dr-grpo', rewards), rewards - rewards.mean(1, keepdims=True))
    np.testing.assert_allclose(advantages('grpo', rewards)[0], (rewards[0] - 0.5) / np.std(rewards[0], ddof=1), rtol=1e-5)
    np.testing.assert_array_equal(advantages('grpo', rewards)[1], np.zeros(4))


@pytest.mark.parametrize('algorithm', ['rest-em', 'rloo', 'grpo', 'dr-grpo'])
def test_what_was_rewarded_becomes_likelier(algorithm):
    config = OuterConfig(algorithm=algorithm, learning_rate=1e-3, epochs=8, batch_size=4)
    values = np.array([1.0, 0, 0, 0, 1, 0]) if config.imitates else np.array([1.0, -0.5, -0.5, -0.5, 1, -0.5])
    before = log_prob(PARAMS, samples())
    after = log_prob(make_policy_update(MODEL, config)(PARAMS, samples(), values, 0), samples())
    assert (after - before)[[0, 4]].min() > 0.1
    if not config.imitates:
        assert (after - before)[[1, 2, 3, 5]].max() < 0


def test_imitation_is_the_mean_loss_of_the_chosen():
    config = OuterConfig(learning_rate=1e-2, epochs=1, batch_size=4, clip_norm=1e9)
    values = np.array([1.0, 0, 1, 0, 0, 0])
    part = jax.tree.map(lambda leaf: leaf[[0, 2]], samples())
    gradient = jax.jit(jax.grad(lambda params: -_sum(params, part) / 8))(PARAMS)
    moved = jax.tree.map(lambda new, old: np.asarray(new - old), make_policy_update(MODEL, config)(PARAMS, samples(), values, 0), PARAMS)
    expected = jax.tree.map(lambda g: -1e-2 * g / (jnp.abs(g) + 1e-8), gradient)
    for a, b, g in zip(*map(jax.tree.leaves, (moved, expected, gradient)), strict=True):
        clear = np.abs(g) > 1e-4
        np.testing.assert_allclose(a[clear], b[clear], rtol=1e-2)


@pytest.mark.parametrize(
    ('share', 'steps', 'expected'),
    [
        (0.0, 4, [1, 0.75, 0.5, 0.25]),
        (0.3, 7, [0, 1 / 3, 2 / 3, 1, 0.75, 0.5, 0.25]),
        (0.03, 150, [0, 0.2, 0.4, 0.6, 0.8, *(1 - np.arange(145) / 145)]),
        (0.03, 1, [0]),
    ],
)
def test_the_learning_rate_of_each_step(share, steps, expected):
    config = OuterConfig(learning_rate=7e-5, schedule='linear', warmup_share=share)
    found = jax.vmap(learning_rates(config, steps))(jnp.arange(steps))
    np.testing.assert_allclose(found, 7e-5 * np.array(expected), rtol=1e-5, atol=1e-12)
    assert learning_rates(OuterConfig(learning_rate=7e-5), steps) == 7e-5


def test_an_update_takes_its_steps_at_the_scheduled_rates():
    """Five steps, the first two of which rise, against Adam with a rate set by hand before each step."""
    config = OuterConfig(learning_rate=1e-2, epochs=5, batch_size=6, clip_norm=1e9, schedule='linear', warmup_share=0.4)
    adam = optax.scale_by_adam()

    @jax.jit
    def step(params, state, rate):
        direction, state = adam.update(jax.grad(lambda params: -_sum(params, samples()) / 24)(params), state)
        return jax.tree.map(lambda leaf, each: leaf - rate * each, params, direction), state

    params, state = PARAMS, jax.jit(adam.init)(PARAMS)
    for rate in (0.0, 5e-3, 1e-2, 2e-2 / 3, 1e-2 / 3):
        params, state = step(params, state, rate)
    found = make_policy_update(MODEL, config)(PARAMS, samples(), np.ones(6), 0)
    np.testing.assert_allclose(log_prob(found, samples()), log_prob(params, samples()), rtol=1e-3)


def _sum(params, batch):
    logits, _ = MODEL.apply({'params': params}, batch.tokens)
    return (jnp.take_along_axis(jax.nn.log_softmax(logits), batch.targets[..., None], -1)[..., 0] * batch.weights).sum()


def test_the_divergence_holds_the_writer_back():
    values = np.array([1.0, -1, 1, -1, 1, -1])
    change = lambda kl: np.abs(log_prob(make_policy_update(MODEL, OuterConfig(
        algorithm='dr-grpo', learning_rate=1e-3, epochs=12, kl=kl, clip_ratio=0.9))(PARAMS, samples(), values, 0), samples())
        - log_prob(PARAMS, samples())).mean()  # fmt: skip
    assert change(10.0) < 0.7 * change(0.0)


def test_nothing_chosen_changes_nothing():
    update = make_policy_update(MODEL, OuterConfig())
    assert update(PARAMS, samples(), np.zeros(6), 0) is PARAMS


def test_rewards_of_another_learner_are_refused():
    table = RewardTable(digest(PARAMS), REWARDS[..., None])
    assert table.rewards(digest(PARAMS)).shape == (3, 3, 1)
    other = jax.tree.map(lambda leaf: leaf, PARAMS) | {'embedding': PARAMS['embedding'].at[0, 0].add(1e-6)}
    with pytest.raises(StaleRewardsError, match='rewards are of learner'):
        table.rewards(digest(other))


def test_the_writer_learns_by_adapters():
    batch, values = samples(), np.array([1.0, 0, 1, 0, 0, 0])
    lora = LoraConfig(rank=4, alpha=8.0, targets=('query', 'value', 'down'))
    update = make_policy_update(MODEL, OuterConfig(learning_rate=1e-2, epochs=20, batch_size=4, lora=lora))
    adapters = update(PARAMS, batch, values, 0)
    gain = log_prob(merge(PARAMS, adapters, lora), batch) - log_prob(PARAMS, batch)
    assert gain[[0, 2]].min() > 1
    untouched = merge(PARAMS, update(PARAMS, batch, np.zeros(6), 0), lora)
    jax.tree.map(np.testing.assert_array_equal, untouched, PARAMS)


@pytest.mark.parametrize(
    ('field', 'value'),
    [
        ('algorithm', 'ppo'), ('epochs', 0), ('batch_size', 0), ('learning_rate', 0.0), ('clip_ratio', 0.0), ('clip_norm', 0.0),
        ('top_share', 0.0), ('top_share', 1.1), ('kl', -0.1), ('schedule', 'cosine'), ('warmup_share', 1.0), ('warmup_share', 0.1),
    ],
)  # fmt: skip
def test_bad_settings_are_named(field, value):
    with pytest.raises(ValueError, match=f'{field} is .*allowed is'):
        OuterConfig(**{field: value})


def test_bad_rewards_are_named():
    assert set(ALGORITHMS) == {'rest-em', 'random', 'rloo', 'grpo', 'dr-grpo'}
    with pytest.raises(ValueError, match=r'rewards is \(3, 1\), allowed is'):
        advantages('rloo', np.zeros((3, 1)))
    with pytest.raises(ValueError, match="algorithm is 'rest-em', allowed is one of rloo"):
        advantages('rest-em', REWARDS)
