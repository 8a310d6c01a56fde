"""Multi-query associative recall (MQAR, arXiv:2312.04927): `python -m experiments.recall`.

A sequence begins with pairs of a key and a value, all keys distinct; later each key comes once more, mostly soon, and the model is to
say its value there. The slots between hold a filler. Two layers of width 64 with 2 heads of 32 train on sequences of 64 tokens with 4 to
16 pairs and are tested on as many and on longer sequences with more pairs. The arms differ in the token mixer alone:

    hope-linear     self-modifying matrix memories (delta gradient descent, token-wise gradients)
    dgd-static      the same memory; keys, values, targets and rates are static projections
    hope-linear-zero, dgd-static-zero
                    both, decaying to zero as the paper has it; all others of ours decay to their learned initial states
    hope            self-modifying MLP memories
    gated-deltanet, transformer, transformer-conv (with the memories' short convolutions)

What came out, of three seeds at the best of three rates, is told in results/README.md: the gated delta rule and attention learn the task
within these steps each time, memories written by delta gradient descent with at most two seeds of three. One to eleven minutes a run on
one CPU core.
"""

import dataclasses
import functools
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from experiments.arguments import parse_arguments
from experiments.fitting import fit_one, make_fit
from nested_jax.config import AttentionConfig, LevelConfig, MemoryConfig, ModelConfig, as_dict
from nested_jax.evaluation.rows import append_row, hardware_name, make_row
from nested_jax.models.language_model import LanguageModel
from nested_jax.training.config import TrainConfig
from nested_jax.training.state import step_key

EXPERIMENT = 'recall'
RESULTS = pathlib.Path(__file__).parent / 'results' / f'{EXPERIMENT}.jsonl'
_MATRIX = dict(kind='matrix', gradient='token', momentum=False, decay_to='init')
ARMS = {
    'hope-linear': dict(mixer='self-modifying', memory=MemoryConfig(**_MATRIX)),
    'dgd-static': dict(mixer='self-modifying', memory=MemoryConfig(**_MATRIX, self_modified=())),
    'hope-linear-zero': dict(mixer='self-modifying', memory=MemoryConfig(**_MATRIX | dict(decay_to='zero'))),
    'dgd-static-zero': dict(mixer='self-modifying', memory=MemoryConfig(**_MATRIX | dict(decay_to='zero'), self_modified=())),
    'hope': dict(mixer='self-modifying', memory=MemoryConfig(decay_to='init')),
    'gated-deltanet': dict(mixer='gated-delta-rule'),
    'transformer': dict(mixer='attention'),
    'transformer-conv': dict(mixer='attention', attention=AttentionConfig(short_convolution=True)),
}
VOCABULARY = 256  # 0 is the filler, the lower half are keys, the upper half values
TRAINED = (64, 4, 16)  # length, fewest and most pairs
TESTS = ((64, 4), (64, 8), (64, 16), (128, 16), (128, 32), (256, 32), (256, 64))  # length, pairs


@dataclasses.dataclass(frozen=True)
class Args:
    """Train two-layer models on associative recall and test them on longer sequences with more pairs."""

    arms: tuple[
        Literal[
            'hope-linear', 'dgd-static', 'hope-linear-zero', 'dgd-static-zero', 'hope', 'gated-deltanet', 'transformer', 'transformer-conv'
        ],
        ...,
    ] = tuple(ARMS)
    """Token mixers."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """One run of every arm for each."""
    learning_rate: float = 3e-3
    """At the end of the warm-up; a cosine takes it to a tenth."""
    steps: int = 2000
    """Optimizer steps."""
    warmup_steps: int = 50
    """Steps of linear warm-up."""
    batch_size: int = 32
    """Sequences a step, all of them new."""
    eval_sequences: int = 200
    """Sequences of each test."""
    results: pathlib.Path = RESULTS
    """File that a row for each run is added to."""
    smoke: bool = False
    """A few steps with one seed and no row, to see that everything works; its numbers mean nothing."""

    def __post_init__(self):
        for name in ('arms', 'seeds'):
            if not getattr(self, name):
                raise ValueError(f'{name} is (), allowed is at least one')
        if self.eval_sequences < 1:
            raise ValueError(f'eval_sequences is {self.eval_sequences}, allowed is an integer of at least 1')

    @property
    def train(self) -> TrainConfig:
        """The settings of the optimizer, which checks its own."""
        return TrainConfig(
            steps=self.steps, batch_size=self.batch_size, sequence_length=TRAINED[0], learning_rate=self.learning_rate,
            warmup_steps=self.warmup_steps,
        )  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Runs every arm with every seed, prints and stores what it measures; returns the exit code."""
    args = parse_arguments(Args, argv, __doc__)
    if args.smoke:
        args = dataclasses.replace(args, seeds=args.seeds[:1], steps=4, warmup_steps=1, batch_size=4, eval_sequences=8)
    print(f'{"arm":<18}{"seed":<6}{"loss":<9}% of values right by length:pairs', flush=True)
    for arm in args.arms:
        model = LanguageModel(model_config(arm))
        fit = make_fit(model, args.train, lambda _, state: draw_sequences(step_key(state), args.batch_size, *TRAINED))
        predict = jax.jit(lambda params, tokens, model=model: model.apply({'params': params}, tokens)[0].argmax(-1))
        for seed in args.seeds:
            began = time.monotonic()
            params, loss = fit_one(fit, seed)
            accuracy = evaluate(functools.partial(predict, params), seed, args.eval_sequences)
            wall_s = time.monotonic() - began
            shares = '  '.join(f'{test} {100 * share:.1f}' for test, share in accuracy.items())
            print(f'{arm:<18}{seed:<6}{loss:<9.4f}{shares}   {wall_s:.0f} s', flush=True)
            if not args.smoke:
                append_row(args.results, _row(args, model.config, arm, seed, dict(loss=loss, accuracy=accuracy), wall_s))
    return 0


def model_config(arm: str) -> ModelConfig:
    """The model of an arm."""
    return ModelConfig(
        num_layers=2,
        width=64,
        num_heads=2,
        head_dim=32,
        levels=(LevelConfig(128, 1),),
        vocab_size=VOCABULARY,
        scan_layers=False,
        **ARMS[arm],
    )


def draw_sequences(key: jax.Array, count: int, length: int, fewest: int, most: int | None = None) -> dict[str, jax.Array]:
    """Sequences of associative recall, each with its own number of pairs.

    Args:
        key: typed key.
        count: sequences.
        length: tokens of a sequence, at least three times `most`.
        fewest: pairs at least.
        most: pairs at most; None: `fewest`.

    Returns:
        'tokens' and 'targets' (count, length) int32, and 'weights' (count, length) float32, 1 where a key is asked for.
    """
    most = fewest if most is None else most
    pairs_key, keys_key, values_key, places_key = jax.random.split(key, 4)
    pairs = jax.random.randint(pairs_key, (count, 1), fewest, most + 1)
    half = VOCABULARY // 2
    keys = 1 + jax.lax.top_k(jax.random.uniform(keys_key, (count, half - 1)), most)[1]
    values = jax.random.randint(values_key, (count, most), half, VOCABULARY)
    # Distinct places behind the pairs, the one after g slots with weight g^-0.99, drawn by the largest of perturbed log weights.
    gaps = jnp.arange(length)[None] - 2 * pairs + 1
    scores = jnp.where(gaps > 0, -0.99 * jnp.log(jnp.maximum(gaps, 1)) + jax.random.gumbel(places_key, (count, length)), -jnp.inf)
    places = jax.lax.top_k(scores, most)[1]
    index, row = jnp.arange(most)[None], jnp.arange(count)[:, None]
    outside = lambda place: jnp.where(index < pairs, place, length)  # pairs that a sequence does not have are dropped
    zeros = jnp.zeros((count, length), jnp.int32)
    tokens = zeros.at[row, outside(2 * index)].set(keys, mode='drop').at[row, outside(2 * index + 1)].set(values, mode='drop')
    tokens = tokens.at[row, outside(places)].set(keys, mode='drop')
    targets = zeros.at[row, outside(places)].set(values, mode='drop')
    return dict(tokens=tokens, targets=targets, weights=(targets > 0).astype(jnp.float32))


def evaluate(predict: Callable[[np.ndarray], jax.Array], seed: int, count: int) -> dict[str, float]:
    """Share of right values in each test, by 'length:pairs', on sequences drawn apart from the training's.

    Args:
        predict: (count, length) tokens -> (count, length) values.
        seed: of the run.
        count: sequences of a test.
    """
    shares = {}
    for index, (length, pairs) in enumerate(TESTS):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 2**31), index)
        batch = jax.device_get(draw_sequences(key, count, length, pairs))
        right = np.asarray(predict(batch['tokens'])) == batch['targets']
        shares[f'{length}:{pairs}'] = float((right * batch['weights']).sum() / batch['weights'].sum())
    return shares


def _row(args: Args, model: ModelConfig, arm: str, seed: int, metrics: dict, wall_s: float) -> dict:
    train = as_dict(dataclasses.replace(args.train, seed=seed, output='none'))
    config = dict(model=as_dict(model), train=train, trained=TRAINED, tests=TESTS, eval_sequences=args.eval_sequences)
    return make_row(
        experiment=EXPERIMENT, model=arm, seed=seed, config=config, metrics=metrics, hardware=hardware_name(jax.devices()), wall_s=wall_s
    )


if __name__ == '__main__':
    sys.exit(main())
