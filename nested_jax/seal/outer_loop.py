"""The outer loop: what a model learns about writing self-edits from the rewards of those it wrote.

ReST-EM trains on the best self-edit of each context (Sec. 3.1, arXiv:2506.10943v2, after arXiv:2312.06585v4); RLOO (arXiv:2402.14740v2),
GRPO (arXiv:2402.03300v3) and Dr. GRPO (arXiv:2503.20783v2) weigh every one by its advantage over the others of its context. A reward
depends on the learner that earned it: `RewardTable` keeps rewards by the learner's digest and refuses those of another.

Letters in shapes: C contexts, M self-edits of each, N = C M, T tokens.
"""

import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from nested_jax.config import added, check
from nested_jax.models.language_model import LanguageModel
from nested_jax.seal.lora import LoraConfig, attach, init_lora
from nested_jax.training.optimizer import clip_by_global_norm

PyTree = Any
Algorithm = Literal['rest-em', 'random', 'rloo', 'grpo', 'dr-grpo']
ALGORITHMS: tuple[Algorithm, ...] = ('rest-em', 'random', 'rloo', 'grpo', 'dr-grpo')


class StaleRewardsError(RuntimeError):
    """Rewards that another learner earned."""


@dataclasses.dataclass(frozen=True)
class OuterConfig:
    """One update of the writer.

    Raises:
        ValueError: naming the field, its value and what is allowed.
    """

    algorithm: Algorithm = 'rest-em'
    learning_rate: float = 3e-4
    epochs: int = 6  # over what is trained on
    batch_size: int = 16  # self-edits a step
    require_gain: bool = True  # ReST-EM: the best must beat the context's baseline
    top_share: float = 1.0  # ReST-EM: share of the contexts, those of the largest gains, whose best is trained on
    clip_ratio: float = 0.2  # of the policies' probabilities; of advantages only
    kl: float = 0.0  # weight of the divergence from the writer before the update; of advantages only
    clip_norm: float = 1.0
    lora: LoraConfig | None = added(None)  # adapters that are trained in place of all parameters
    schedule: Literal['constant', 'linear'] = added('constant')  # of the learning rate, see `learning_rates`
    warmup_share: float = added(0.0)  # of the steps, in which a linear schedule rises

    def __post_init__(self):
        check(self.algorithm in ALGORITHMS, 'algorithm', self.algorithm, f'one of {", ".join(ALGORITHMS)}')
        for name in ('epochs', 'batch_size'):
            check(getattr(self, name) >= 1, name, getattr(self, name), 'an integer of at least 1')
        for name in ('learning_rate', 'clip_ratio', 'clip_norm'):
            check(getattr(self, name) > 0, name, getattr(self, name), 'a number above 0')
        check(0 < self.top_share <= 1, 'top_share', self.top_share, 'a number above 0 and at most 1')
        check(self.kl >= 0, 'kl', self.kl, 'a number of at least 0')
        check(self.schedule in ('constant', 'linear'), 'schedule', self.schedule, 'constant or linear')
        check(0 <= self.warmup_share < 1, 'warmup_share', self.warmup_share, 'a number of at least 0 and below 1')
        rises = self.schedule == 'linear' or not self.warmup_share
        check(rises, 'warmup_share', self.warmup_share, '0 where the schedule is constant')

    @property
    def imitates(self) -> bool:
        """Whether chosen self-edits are trained on as they are."""
        return self.algorithm in ('rest-em', 'random')


class Samples(NamedTuple):
    """Self-edits with the contexts they were written for."""

    tokens: np.ndarray  # (N, T) int32
    targets: np.ndarray  # (N, T) int32
    weights: np.ndarray  # (N, T) float32: 1 where the target is the writer's own token


class RewardTable:
    """Rewards of one learner's self-edits.

    Args:
        learner: digest of the parameters that were updated to earn them, see `digest`.
        rewards: (C, M, repetitions).
    """

    def __init__(self, learner: str, rewards: np.ndarray):
        self.learner, self._rewards = learner, np.asarray(rewards, float)

    def rewards(self, learner: str) -> np.ndarray:
        """(C, M, repetitions).

        Raises:
            StaleRewardsError: when another learner earned them.
        """
        if learner != self.learner:
            raise StaleRewardsError(
                f'the rewards are of learner {self.learner[:12]}, allowed is their use for it alone, not for {learner[:12]}'
            )
        return self._rewards


def digest(params: PyTree) -> str:
    """Tells learners apart: sha256 of all leaves, their paths, shapes and dtypes, in hexadecimal."""
    found = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        value = np.ascontiguousarray(leaf)
        found.update(f'{jax.tree_util.keystr(path)} {value.shape} {value.dtype}'.encode() + value.tobytes())
    return found.hexdigest()


def choose(config: OuterConfig, rewards: np.ndarray, baseline: np.ndarray, ties: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Which self-edits are imitated.

    Args:
        config: with 'rest-em' or, as its control, 'random'.
        rewards: (C, M) means over repetitions.
        baseline: (C,) rewards without an edit, which the best has to beat where `require_gain` is set.
        ties: (C, M) decide between equal rewards, as mean log-probabilities of the gold answers do; the larger wins.
        rng: of the random choice.

    Returns:
        (C, M) bool, at most one of each context.
    """
    count, each = rewards.shape
    if config.algorithm == 'random':
        return np.arange(each)[None] == rng.integers(each, size=(count, 1))
    best = np.array([max(range(each), key=lambda m: (rewards[c, m], ties[c, m])) for c in range(count)])
    gain = rewards[np.arange(count), best] - baseline
    kept = np.zeros(count, bool)
    kept[np.argsort(-gain, kind='stable')[: max(round(config.top_share * count), 1)]] = True
    if config.require_gain:
        kept &= gain > 0
    return kept[:, None] & (np.arange(each)[None] == best[:, None])


def better_half(rewards: np.ndarray, ties: np.ndarray) -> np.ndarray:
    """Successive halving: the self-edits worth trying again after a first, cheap reward.

    Args:
        rewards: (C, M).
        ties: (C, M) decide between equal rewards; the larger wins.

    Returns:
        (C, M) bool, M // 2 of each context and two at least.

    References:
        Karnin et al., Almost Optimal Exploration in Multi-Armed Bandits, ICML 2013
    """
    kept, each = np.zeros(rewards.shape, bool), rewards.shape[1]
    np.put_along_axis(kept, np.lexsort((ties, rewards), 1)[:, -max(each // 2, 2) :], True, 1)
    return kept


def advantages(algorithm: Algorithm, rewards: np.ndarray) -> np.ndarray:
    """What each self-edit is worth beside the others of its context.

    Args:
        algorithm: 'rloo': above the mean of the others; 'grpo': above the mean, over the standard deviation; 'dr-grpo': above the mean.
        rewards: (C, M), M at least 2.

    Returns:
        (C, M).

    Raises:
        ValueError: for another algorithm, or one self-edit a context.
    """
    check(rewards.ndim == 2 and rewards.shape[1] >= 2, 'rewards', rewards.shape, '(contexts, at least two self-edits of each)')
    above, count = rewards - rewards.mean(1, keepdims=True), rewards.shape[1]
    by_algorithm = {
        'rloo': lambda: above * count / (count - 1),
        'grpo': lambda: above / (rewards.std(1, ddof=1, keepdims=True) + 1e-6),
        'dr-grpo': lambda: above,
    }
    check(algorithm in by_algorithm, 'algorithm', algorithm, f'one of {", ".join(by_algorithm)}')
    return by_algorithm[algorithm]()


def learning_rates(config: OuterConfig, steps: int) -> optax.ScalarOrSchedule:
    """Of an update of so many steps, from step 0 on.

    A linear schedule is the one of the published code (arXiv:2506.10943v2): from 0 it rises by equal amounts to the learning rate, over
    `warmup_share` of the steps rounded up, and falls by equal amounts so that it would be 0 after the last step.
    """
    if config.schedule == 'constant':
        return config.learning_rate
    warmup = math.ceil(config.warmup_share * steps)
    rise, fall = optax.linear_schedule(0.0, config.learning_rate, warmup), optax.linear_schedule(config.learning_rate, 0.0, steps - warmup)
    return optax.join_schedules([rise, fall], [warmup])


def make_policy_update(model: LanguageModel, config: OuterConfig) -> Callable[..., PyTree]:
    """Builds (parameters, samples, values (N,), seed) -> parameters, or with `lora` adapters for `lora.merge`.

    Imitation: values are 1 for what is trained on; the loss is the mean over tokens. Advantages: values are those; the loss is the
    clipped objective of PPO on each token, a mean over tokens and then self-edits ('grpo') or a sum over tokens divided by N T
    ('dr-grpo', 'rloo'), plus `kl` times the estimate exp(d) - d - 1 of the divergence, d being how much likelier the writer before the
    update was to write the token.
    """
    log_probs = functools.partial(_log_probs, model)

    def variables(params: PyTree, trained: PyTree) -> PyTree:
        return {'params': trained} if config.lora is None else attach(params, trained, config.lora)

    def loss(trained: PyTree, params: PyTree, batch: Samples, values: jax.Array, before: jax.Array) -> jax.Array:
        new = log_probs(variables(params, trained), batch)
        if config.imitates:
            weights = batch.weights * values[:, None]
            return -(new * weights).sum() / jnp.maximum(weights.sum(), 1.0)
        return _surrogate(config, new, before, values[:, None], batch.weights)

    @jax.jit
    def run(params: PyTree, trained: PyTree, samples: Samples, values: jax.Array, plan: jax.Array) -> PyTree:
        optimizer = optax.chain(clip_by_global_norm(config.clip_norm), optax.adam(learning_rates(config, len(plan))))
        before = jnp.zeros(samples.tokens.shape) if config.imitates else log_probs(variables(params, trained), samples)

        def step(carry: tuple, rows: jax.Array) -> tuple:
            trained, state = carry
            batch = jax.tree.map(lambda leaf: leaf[rows], samples)
            batch = batch._replace(weights=batch.weights * (rows >= 0)[:, None])
            gradient = jax.grad(loss)(trained, params, batch, values[rows], before[rows])
            updates, state = optimizer.update(gradient, state)
            return (optax.apply_updates(trained, updates), state), None

        (trained, _), _ = jax.lax.scan(step, (trained, optimizer.init(trained)), plan)
        return trained

    def update(params: PyTree, samples: Samples, values: np.ndarray, seed: int) -> PyTree:
        used = np.flatnonzero(values) if config.imitates else np.arange(len(values))
        trained = params if config.lora is None else init_lora(params, jax.random.key(seed), config.lora)
        if used.size == 0:
            return trained
        return run(params, trained, samples, jnp.asarray(values, jnp.float32), _plan(used, config, seed))

    return update


def _surrogate(config: OuterConfig, new: jax.Array, before: jax.Array, values: jax.Array, weights: jax.Array) -> jax.Array:
    """The objective of advantages, to be minimised; all arguments (N, T) or broadcast to it."""
    ratio = jnp.exp(new - before)
    clipped = jnp.clip(ratio, 1 - config.clip_ratio, 1 + config.clip_ratio)
    ahead = before - new
    token = config.kl * (jnp.exp(ahead) - ahead - 1) - jnp.minimum(ratio * values, clipped * values)
    real, lengths = jnp.maximum((weights.sum(1) > 0).sum(), 1), jnp.maximum(weights.sum(1), 1.0)
    each = (token * weights).sum(1) / (lengths if config.algorithm == 'grpo' else weights.shape[1])
    return each.sum() / real


def _log_probs(model: LanguageModel, variables: PyTree, samples: Samples) -> jax.Array:
    """(N, T) log-probabilities of the targets."""
    logits, _ = model.apply(variables, samples.tokens)
    return jnp.take_along_axis(jax.nn.log_softmax(logits), samples.targets[..., None], -1)[..., 0]


def _plan(used: np.ndarray, config: OuterConfig, seed: int) -> np.ndarray:
    """(steps, batch_size) places among the samples, epoch by epoch; the last batch of an epoch is filled up with -1."""
    rng, missing = np.random.default_rng(seed), -len(used) % config.batch_size
    epoch = lambda: np.concatenate([rng.permutation(used), np.full(missing, -1)]).reshape(-1, config.batch_size)
    return np.concatenate([epoch() for _ in range(config.epochs)]).astype(np.int32)
