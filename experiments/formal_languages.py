"""Formal languages, a test of state tracking and counting: `python -m experiments.formal_languages`.

Table 5, arXiv:2512.24695v1: the share of strings with every position right, at the lengths 2 to 50 trained on (bin 0), at 51 to 100
(bin 1), and, of this project alone, at 102 to 150 (bin 2). The paper has Hope, SRWM and the LSTM at 100 / 100 in all six languages; the
Transformer, Linear and DeltaNet at 46.4 / 0, 78.1 / 0 and 98.2 / 10.1 in parity, 0 / 0 in (aa)* and (abab)*, and 100 / 100 in the rest.
It does not say whether Hope ran with chunks: here Hope with matrix memories runs with its chunk of 16 tokens (hope-linear) and refreshed
at every token (hope-linear-chunk-1), and without delta gradient descent, its steps large enough for the negative eigenvalues that parity
needs (`experiments/parity.py`); Hope with MLP memories, the paper's, with chunks of 16 (hope) and at every token (hope-chunk-1).

Two blocks of width 64, four heads of 16 and one MLP, parameters about equal. Languages, splits and answers are those of
`nested_jax/data/tasks/formal_languages.py`; a test has the distinct strings among 500 drawn, and their number is in the row. Beside a
result stands what giving the most frequent answer everywhere gets. Every run tries two learning rates, for 600 steps of 32 strings each,
about two passes over 10,000; the reference makes up to 300. Of parity and Shuffle-2, bin 0 has strings that are not trained on: 200 of
them, of another seed, choose the learning rate and, every 50 steps, the checkpoint. The other languages have one string a length, so that
bin 0 is the training set: there the last step is kept, and the learning rate does best on bin 0, of equals on the training loss. Bins 1
and 2 decide nothing; the reference chooses by bins 0 and 1.

All languages have rows, three seeds each, of all models but hope-chunk-1, which has parity alone. A run (one seed, both rates) takes a
core of two, the other in use, 984 to 1,244 s for hope-chunk-1, 464 to 645 for hope (795 and 1,117 beside further work), 142 to 260 for
hope-linear-chunk-1, 116 to 206 for srwm, 89 to 216 for hope-linear with and without delta gradient descent, 53 to 110 for deltanet, 22
to 82 for the Transformer, linear attention and the LSTM. Small models leave a second core idle, so two processes share the grid and go on
where they stopped:

    taskset -c 0 python -m experiments.formal_languages --minutes 40 --languages parity abab-star counter-3
    taskset -c 1 python -m experiments.formal_languages --minutes 40 --languages aa-star counter-2 shuffle-2
"""

import dataclasses
import functools
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.arguments import parse_arguments
from experiments.grid import Grid, Train, make_cells, run_grid
from experiments.task_runs import Predict, TaskArgs, examples, majority, make_train, model_config, registered
from nested_jax.config import ModelConfig
from nested_jax.data.tasks.formal_languages import BINS, LANGUAGES, FormalLanguage
from nested_jax.data.tasks.task import Example, score
from nested_jax.models.language_model import LanguageModel

EXPERIMENT = 'formal_languages'
RESULTS = pathlib.Path(__file__).parent / 'results' / f'{EXPERIMENT}.jsonl'
MODELS = (
    'hope-linear', 'deltanet', 'transformer', 'hope-linear-without-dgd', 'hope-linear-chunk-1', 'linear-attention', 'lstm', 'srwm', 'hope',
    'hope-chunk-1',
)  # fmt: skip
TESTS = ('bin0', 'bin1', 'bin2')
HELD_OUT = ('parity', 'shuffle-2')  # languages of which bin 0 has strings that training has not
CHECKPOINT_EVERY = 50


@dataclasses.dataclass(frozen=True)
class Args(TaskArgs):
    """Train small models on formal languages and test them on longer strings."""

    models: tuple[str, ...] = registered(MODELS)
    """Families of the presets, or variants: <family>-without-<part>, <family>-chunk-<tokens>."""
    languages: tuple[str, ...] = tuple(LANGUAGES)
    """Of parity, aa-star, abab-star, counter-2, counter-3 and shuffle-2."""
    results: pathlib.Path = RESULTS
    """File that a row for each run is added to."""

    def __post_init__(self):
        super().__post_init__()
        for name in ('models', 'languages'):
            self.check(name, bool(getattr(self, name)), 'at least one')
        self.check('languages', set(self.languages) <= set(LANGUAGES), f'some of {", ".join(LANGUAGES)}')
        for name in self.models:
            model(name, self.languages[0])


def main(argv: list[str] | None = None) -> int:
    """Runs the cells that have no row; returns the exit code."""
    args = parse_arguments(Args, argv, __doc__)
    if args.smoke:
        args = args.smaller(models=args.models[:1], languages=args.languages[:1])
    cells = make_cells(args.models, args.languages, args.seeds)
    config = lambda cell: args.config(cell, model(cell.model, cell.task), FormalLanguage(cell.task))
    grid = Grid(EXPERIMENT, cells, config, functools.partial(prepare, args), describe, args.results, args.side_by_side)
    return run_grid(grid, minutes=args.minutes, store=not args.smoke)


def model(name: str, language: str) -> ModelConfig:
    """The model of a name, with a language's vocabulary."""
    return model_config(name, width=64, heads=4, vocab_size=FormalLanguage(language).vocab_size, max_length=256)


def prepare(args: Args, name: str, language: str) -> Train:
    """What trains and tests a model on a language."""
    task = FormalLanguage(language)
    return make_train(
        args, task, LanguageModel(model(name, language)), validation='bin0', score=right_sequences,
        evaluate=lambda predict, seed: evaluate(predict, task, seed, args.test_examples),
        score_every=CHECKPOINT_EVERY if language in HELD_OUT else None,
    )  # fmt: skip


def right_sequences(predictions: jax.Array, batch: Example) -> jax.Array:
    """Share of strings with every position right, as a float32 scalar."""
    return jnp.all((predictions == batch['targets']) | (batch['weights'] == 0), axis=1).mean(dtype=jnp.float32)


def evaluate(predict: Predict, task: FormalLanguage, seed: int, count: int) -> dict[str, Any]:
    """Shares of each bin's distinct strings right at 'every' position, of right 'positions', and the former for the most frequent answer.

    Args:
        predict: (count, length) tokens -> (count, length) answers.
        task: of the language.
        seed: of the strings.
        count: strings drawn of each bin; equal ones count once.
    """
    bins, longest, common = {}, BINS[TESTS[-1]][1], majority(task, seed)
    for split in TESTS:
        batch = distinct(examples(task, split, seed, count))
        tokens = batch['tokens']
        padded = np.pad(tokens, ((0, 0), (0, longest - tokens.shape[1])), constant_values=task.padding)  # one length, one compilation
        positions, every = score(predict(padded)[:, : tokens.shape[1]], batch)
        trivial = score(np.full_like(tokens, common), batch)
        bins[split] = dict(every=every, positions=positions, strings=len(tokens), majority=trivial.sequences)
    return dict(bins=bins)


def distinct(batch: Example) -> Example:
    """A batch without its repetitions."""
    first = np.sort(np.unique(batch['tokens'], axis=0, return_index=True)[1])
    return {name: rows[first] for name, rows in batch.items()}


def describe(metrics: dict) -> str:
    """Percentages of the three bins, those of the most frequent answer, numbers of strings, and the learning rate."""
    bins = metrics['bins'].values()
    shares, trivial = (' / '.join(f'{100 * found[name]:.1f}' for found in bins) for name in ('every', 'majority'))
    strings = ' / '.join(str(found['strings']) for found in bins)
    return f'{shares} % (majority {trivial}; {strings} strings), rate {metrics["learning_rate"]:g}'


if __name__ == '__main__':
    sys.exit(main())
