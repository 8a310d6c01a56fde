"""What all generated tasks share: examples by index, splits that hold nothing in common, batches, scores and trivial baselines.

An example is a pure function of (task, split, seed, index): its numbers come from a Philox generator whose key they are, so the order
of access does not matter and nothing is stored. NumPy may change the numbers of `Generator` between its versions.

Examples are dealt to the splits by a checksum of what tells them apart (`Task.signature`), whatever the seed: a draw that belongs to
another split is drawn again. Training keeps six draws of eight, each of the other splits one. This holds within a task: one of other
parameters, say of longer sequences, may hold the same as a part of its own.
"""

import abc
import dataclasses
import zlib
from collections.abc import Callable, Collection
from typing import Any, ClassVar, NamedTuple

import numpy as np

Example = dict[str, np.ndarray]
Guess = Callable[[np.ndarray], np.ndarray]
# Remainders of the checksum by 8; the rest is trained on.
_HELD_OUT = {'validation': 0, 'test': 1}
_MOST_DRAWS = 1000  # (7/8)**1000 is below 1e-57


class Scores(NamedTuple):
    """Shares that are right."""

    positions: float  # of the scored positions
    sequences: float  # of the sequences, every scored position right


@dataclasses.dataclass(frozen=True)
class Task(abc.ABC):
    """A task whose examples are generated. Subclasses are frozen dataclasses; their fields are the parameters."""

    splits: ClassVar[tuple[str, ...]] = ('train', 'validation', 'test')

    @property
    @abc.abstractmethod
    def vocab_size(self) -> int:
        """Tokens and targets are below it."""

    @abc.abstractmethod
    def draw(self, rng: np.random.Generator, split: str) -> Any:
        """One example, or what `render` makes one of, before it is known which split it belongs to."""

    def render(self, rng: np.random.Generator, drawn: Any) -> Example:
        """The example of what was drawn, the generator being where `draw` left it."""
        return drawn

    @abc.abstractmethod
    def solve(self, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Targets (T,) and weights (T,) from the tokens (T,) alone, written apart from the generator; targets count where weights are 1."""

    def signature(self, drawn: Any) -> bytes:
        """What no two splits have in common; here all tokens."""
        return drawn['tokens'].tobytes()

    def belongs(self, drawn: Any, split: str) -> bool:
        """Whether what was drawn is one of a split's."""
        remainder = zlib.crc32(self.signature(drawn)) % 8
        return remainder not in _HELD_OUT.values() if split == 'train' else remainder == _HELD_OUT[split]

    def guesses(self) -> dict[str, Guess]:
        """Trivial rules, named: each takes tokens (N, T) to predictions (N, T)."""
        return {}

    def example(self, index: int, *, split: str = 'train', seed: int = 0) -> Example:
        """The example of an index.

        Args:
            index: from 0 to below 2**64.
            split: one of `splits`.
            seed: from 0 to below 2**32.

        Returns:
            'tokens' and 'targets' (T,) int32, and 'weights' (T,) float32, 1 where the answer is scored.

        Raises:
            ValueError: for an index, split or seed out of range, and a task too small to have examples of the split.
        """
        return self.render(*self.deal(index, split, seed))

    def deal(self, index: int, split: str, seed: int) -> tuple[np.random.Generator, Any]:
        """What is drawn for an index, of its split, and the generator behind it; see `example`."""
        check('split', split, split in self.splits, f'one of {self.splits}')
        check('seed', seed, 0 <= seed < 2**32, 'an integer from 0 to below 2**32')
        check('index', index, 0 <= index < 2**64, 'an integer from 0 to below 2**64')
        rng = np.random.Generator(np.random.Philox(key=np.array([self.splits.index(split) << 32 | seed, index], np.uint64)))
        for _ in range(_MOST_DRAWS):
            if self.belongs(drawn := self.draw(rng, split), split):
                return rng, drawn
        raise ValueError(f'split={split!r}: {self} has too few different examples for one of this split')

    def batch(self, start: int, count: int, *, split: str = 'train', seed: int = 0) -> Example:
        """Examples start to start + count, stacked: arrays (count, T); see `example`."""
        check('count', count, count >= 1, 'an integer of at least 1')
        rows = [self.example(index, split=split, seed=seed) for index in range(start, start + count)]
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def source(self, size: int, *, split: str = 'train', seed: int = 0) -> 'Source':
        """The first `size` examples with random access, for `grain.MapDataset.source`."""
        return Source(self, size, split, seed)

    def baselines(self, *, split: str = 'test', count: int = 256, seed: int = 0) -> dict[str, Scores]:
        """What answers without the task's point score, measured on drawn examples.

        'majority' gives the most frequent answer of as many training examples, 'token' the most frequent one to each token; the
        others are the rules of `guesses`.

        Args:
            split: to measure on.
            count: examples.
            seed: of the examples.
        """
        train, test = self.batch(0, count, split='train', seed=seed), self.batch(0, count, split=split, seed=seed)
        majority, answers = _frequent_answers(train, self.vocab_size)
        predictions = dict(majority=np.full_like(test['tokens'], majority), token=answers[test['tokens']])
        predictions |= {name: guess(test['tokens']) for name, guess in self.guesses().items()}
        return {name: score(prediction, test) for name, prediction in predictions.items()}


@dataclasses.dataclass(frozen=True)
class Source:
    """The first examples of a split with random access."""

    task: Task
    size: int
    split: str
    seed: int

    def __post_init__(self):
        check('size', self.size, self.size >= 1, 'an integer of at least 1')

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < self.size:
            raise IndexError(f'index={index}; allowed: 0 to {self.size - 1}')
        return self.task.example(int(index), split=self.split, seed=self.seed)


def score(predictions: np.ndarray, batch: Example) -> Scores:
    """Shares right by position and by sequence.

    Args:
        predictions: (N, T).
        batch: 'targets' and 'weights' (N, T).
    """
    scored = batch['weights'] > 0
    right = predictions == batch['targets']
    return Scores(float(right[scored].mean()), float((right | ~scored).all(1).mean()))


def check(name: str, value: Any, holds: bool, allowed: str) -> None:
    """Raises ValueError with the argument's name, its value and what is allowed, unless it holds."""
    if not holds:
        raise ValueError(f'{name}={value!r}; allowed: {allowed}')


def check_choice(name: str, value: str, choices: Collection[str]) -> None:
    """Raises ValueError unless the value is one of the choices."""
    check(name, value, value in choices, ', '.join(choices))


def make_example(tokens: np.ndarray, targets: np.ndarray, scored: np.ndarray) -> Example:
    """An example of the dtypes promised, from arrays (T,); `scored` is boolean."""
    return dict(tokens=tokens.astype(np.int32), targets=targets.astype(np.int32), weights=scored.astype(np.float32))


def _frequent_answers(batch: Example, vocab_size: int) -> tuple[int, np.ndarray]:
    """The most frequent answer of all, and to each token (vocab_size,): where a token is never asked about, that of all."""
    scored = batch['weights'] > 0
    tokens, targets = batch['tokens'][scored].astype(np.int64), batch['targets'][scored]
    majority = int(np.bincount(targets).argmax())
    pairs, counts = np.unique(tokens * vocab_size + targets, return_counts=True)
    pairs = pairs[np.argsort(counts)]
    answers = np.full(vocab_size, majority)
    answers[pairs // vocab_size] = pairs % vocab_size  # of repeated places the last, most frequent, stays
    return majority, answers
