"""The six tasks of MAD (Mechanistic Architecture Design) with the settings of its baseline.

Poli et al. 2024 (arXiv:2403.17844; rules of athms/mad-lab). Keys are the lower half of the plain vocabulary and values the upper half;
special tokens and noise come last.

    InContextRecall        pairs of a key and its value, which the sequence keeps; asked for where a key comes again
    NoisyInContextRecall   the same, a fifth of the pairs being noise tokens
    FuzzyInContextRecall   keys and values are motifs of one to three tokens; held-out keys are all of three
    SelectiveCopying       16 tokens strewn among blanks, to be said in order at the end
    Compression            random tokens and one that ends them; each is to be restored
    Memorization           a fixed map from keys to values, asked for everywhere

In the three recall tasks targets are the next tokens everywhere, and weights mark the answers: the reference trains on all of the next
tokens (weights of 1) and tests on the answers alone. It trains on 12,800 sequences, of memorization on 256, again and again. Compression
means something behind a bottleneck only, the reference's auto-encoder: its 'copy' is right everywhere. Where the reference differs: the
query that ends a fuzzy sequence is at times of a key not shown before, the places of blanks do not follow its seed, a sequence may be in
both training and test, and its score is the mean over classes (torchmetrics' macro accuracy), not over positions.

One core draws 7,700, 9,200, 2,600, 22,000, 36,000 and 30,000 sequences a second, in the order above.
"""

import dataclasses
import functools

import numpy as np

from nested_jax.data.tasks.task import Example, Guess, Task, check, make_example


@dataclasses.dataclass(frozen=True)
class InContextRecall(Task):
    """The value of a key that came before."""

    vocab_size: int = 16
    """Tokens: keys, values, noise."""
    length: int = 128
    """Tokens drawn, even; an example has one less, the last being a target only."""
    noise_vocab_size: int = 0
    """Tokens of noise among the vocabulary."""
    noise_share: float = 0.0
    """Chance of a pair to be noise."""

    def __post_init__(self):
        check('length', self.length, self.length >= 4 and self.length % 2 == 0, 'even, at least 4')
        check('vocab_size', self.vocab_size, self._plain >= 4, 'at least 4 tokens that are not noise')
        check('noise_share', self.noise_share, 0 <= self.noise_share < 1, '0 to below 1')
        check('noise_vocab_size', self.noise_vocab_size, self.noise_vocab_size >= (self.noise_share > 0), 'at least 1 with noise')

    @property
    def _plain(self) -> int:
        return self.vocab_size - self.noise_vocab_size

    def draw(self, rng: np.random.Generator, split: str) -> Example:
        """Pairs, of which the last asks for a key shown before."""
        num_keys, pairs = self._plain // 2, self.length // 2
        keys, values = rng.integers(0, num_keys, pairs), rng.integers(num_keys, self._plain, num_keys)
        is_noise = rng.random(pairs) < self.noise_share
        is_noise[[rng.integers(pairs - 1), -1]] = False  # at least one pair to ask for
        keys[-1] = rng.choice(np.unique(keys[:-1][~is_noise[:-1]]))
        sequence = np.stack([keys, values[keys]], 1)
        sequence[is_noise] = rng.integers(self._plain, self.vocab_size, (is_noise.sum(), 2)) if self.noise_vocab_size else 0
        first = np.full(num_keys, pairs)
        np.minimum.at(first, keys[~is_noise], np.flatnonzero(~is_noise))
        asked = ~is_noise & (np.arange(pairs) > first[keys])
        sequence, scored = sequence.ravel(), np.stack([asked, np.zeros(pairs, bool)], 1).ravel()
        return make_example(sequence[:-1], sequence[1:], scored[:-1])

    def solve(self, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Pair by pair, remembering values; see `Task.solve`."""
        targets, weights, values = np.zeros(len(tokens), np.int32), np.zeros(len(tokens), np.float32), {}
        for place in range(0, len(tokens), 2):
            key = int(tokens[place])
            if key in values:
                targets[place], weights[place] = values[key], 1
            elif key < self._plain:
                values[key] = tokens[place + 1]
        return targets, weights

    def guesses(self) -> dict[str, Guess]:
        """'last value': the value of the pair before."""
        return {'last value': functools.partial(_last_value, values=range(self._plain // 2, self._plain))}


@dataclasses.dataclass(frozen=True)
class NoisyInContextRecall(InContextRecall):
    """In-context recall among noise."""

    vocab_size: int = 32
    noise_vocab_size: int = 16
    noise_share: float = 0.2


@dataclasses.dataclass(frozen=True)
class FuzzyInContextRecall(Task):
    """The value of a key that came before, where keys and values are motifs of several tokens."""

    vocab_size: int = 16
    """Tokens: keys, values, and one that fills up at the start."""
    length: int = 128
    """Tokens of a sequence."""
    max_motif: int = 3
    """Tokens of a key or a value at most."""

    def __post_init__(self):
        check('max_motif', self.max_motif, self.max_motif >= 1, 'an integer of at least 1')
        fewest = 2 * self.max_motif + 1
        check('vocab_size', self.vocab_size, self.vocab_size >= fewest, f'at least {fewest}: a motif has no token twice')
        check('length', self.length, self.length >= 8 * self.max_motif, f'at least {8 * self.max_motif}')

    @property
    def _num_keys(self) -> int:
        return (self.vocab_size - 1) // 2

    def draw(self, rng: np.random.Generator, split: str) -> Example:
        """Pairs of motifs, filled up at the start; the last asks for a key shown before."""
        probe, values, used = self._draw_key(rng, split), {}, 0
        values[probe] = self._draw_value(rng)
        stop = self.length - len(probe) - len(values[probe]) - 2 * self.max_motif
        # Some pair begins in the next so many tokens, so the one that is asked for is shown before `stop`.
        probe_at, shown, keys = rng.integers(0, stop - 2 * self.max_motif + 1), False, []
        while used < stop:
            show, shown = used >= probe_at and not shown, shown or used >= probe_at
            key = probe if show else self._draw_key(rng, split)
            values.setdefault(key, self._draw_value(rng))
            keys.append(key)
            used += len(key) + len(values[key])
        return self._write([*keys, probe], values)

    def _draw_key(self, rng: np.random.Generator, split: str) -> tuple[int, ...]:
        size = rng.integers(1, self.max_motif + 1) if split == 'train' else self.max_motif
        return tuple(rng.permutation(self._num_keys)[:size].tolist())

    def _draw_value(self, rng: np.random.Generator) -> tuple[int, ...]:
        values = rng.permutation(np.arange(self._num_keys, self.vocab_size - 1))
        return tuple(values[: rng.integers(1, self.max_motif + 1)].tolist())

    def _write(self, keys: list[tuple[int, ...]], values: dict[tuple[int, ...], tuple[int, ...]]) -> Example:
        sequence, asked, seen = [], [], set()
        for key in keys:
            sequence += [*key, *values[key]]
            asked += [False] * len(key) + [key in seen] * len(values[key])
            seen.add(key)
        missing = self.length + 1 - len(sequence)
        sequence = np.array([self.vocab_size - 1] * missing + sequence)
        return make_example(sequence[:-1], sequence[1:], np.array([False] * missing + asked)[1:])

    def solve(self, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Cuts the sequence where a value is followed by a key; see `Task.solve`."""
        targets, weights, values = np.zeros(len(tokens), np.int32), np.zeros(len(tokens), np.float32), {}
        is_value = tokens >= self._num_keys
        begins = np.flatnonzero(np.diff(np.concatenate([[True], is_value]).astype(int)) == -1)
        for begin, end in zip(begins, [*begins[1:], len(tokens)], strict=True):
            key_end = begin + int((~is_value[begin:end]).sum())
            key, value = tuple(tokens[begin:key_end].tolist()), tokens[key_end:end]
            if key in values:  # the last pair's value is cut off, by one token or by all
                answer = values[key][: len(tokens) - key_end + 1]
                targets[key_end - 1 : key_end - 1 + len(answer)], weights[key_end - 1 : key_end - 1 + len(answer)] = answer, 1
            else:
                values[key] = value
        return targets, weights

    def guesses(self) -> dict[str, Guess]:
        """'last value': the last token of a value so far."""
        return {'last value': functools.partial(_last_value, values=range(self._num_keys, self.vocab_size - 1))}


@dataclasses.dataclass(frozen=True)
class SelectiveCopying(Task):
    """The tokens that are not blank, in their order."""

    vocab_size: int = 16
    """Tokens: those to copy, the blank and the one that asks."""
    length: int = 256
    """Tokens of a sequence, the answer among them."""
    num_copied: int = 16
    """Tokens to copy."""

    def __post_init__(self):
        check('vocab_size', self.vocab_size, self.vocab_size >= 3, 'at least 3')
        check('num_copied', self.num_copied, self.num_copied >= 1, 'an integer of at least 1')
        fewest = 2 * self.num_copied + 2
        check('length', self.length, self.length >= fewest, f'at least {fewest}')

    def draw(self, rng: np.random.Generator, split: str) -> Example:
        """Each blank goes before one of the tokens, drawn uniformly; none goes behind the last."""
        copied, blank = rng.integers(0, self.vocab_size - 2, self.num_copied), self.vocab_size - 2
        asks = self.length - self.num_copied - 1
        before = np.bincount(rng.integers(0, self.num_copied, asks - self.num_copied), minlength=self.num_copied)
        tokens, targets = np.full(self.length, blank), np.zeros(self.length, np.int64)
        tokens[before.cumsum() + np.arange(self.num_copied)] = copied
        tokens[asks], targets[asks + 1 :] = self.vocab_size - 1, copied
        return make_example(tokens, targets, np.arange(self.length) > asks)

    def solve(self, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What comes before the asking token and is not blank; see `Task.solve`."""
        shown = tokens[: tokens.tolist().index(self.vocab_size - 1)]
        copied = [token for token in shown if token != self.vocab_size - 2]
        silent = len(tokens) - len(copied)
        return np.array([0] * silent + copied), np.array([0] * silent + [1] * len(copied), np.float32)

    def guesses(self) -> dict[str, Guess]:
        """'last token': the last one to be copied, which comes right before the asking token."""
        return {'last token': lambda tokens: np.broadcast_to(tokens[:, self.length - self.num_copied - 2, None], tokens.shape)}


@dataclasses.dataclass(frozen=True)
class Compression(Task):
    """All tokens of the sequence, to be restored from what its last position holds."""

    vocab_size: int = 16
    """Tokens, the one that ends a sequence among them."""
    length: int = 32
    """Tokens of a sequence."""

    def __post_init__(self):
        check('vocab_size', self.vocab_size, self.vocab_size >= 3, 'at least 3')
        check('length', self.length, self.length >= 2, 'at least 2')

    def draw(self, rng: np.random.Generator, split: str) -> Example:
        """Uniform tokens and the one that ends them; targets are the same."""
        tokens = np.append(rng.integers(0, self.vocab_size - 1, self.length - 1), self.vocab_size - 1)
        return make_example(tokens, tokens, np.ones(self.length, bool))

    def solve(self, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The tokens; see `Task.solve`."""
        return tokens, np.ones(len(tokens), np.float32)

    def guesses(self) -> dict[str, Guess]:
        """'copy': each token itself, which an auto-encoder's bottleneck forbids."""
        return dict(copy=lambda tokens: tokens)


@dataclasses.dataclass(frozen=True)
class Memorization(Task):
    """A fixed map from keys to values, which no sequence shows."""

    vocab_size: int = 256
    """Tokens: keys, values and the one that asks."""
    length: int = 32
    """Tokens of a sequence; even."""
    map_seed: int = 12345
    """Of the map, the reference's; the seed of examples does not change it."""

    def __post_init__(self):
        check('vocab_size', self.vocab_size, self.vocab_size >= 5, 'at least 5')
        check('length', self.length, self.length >= 2 and self.length % 2 == 0, 'even, at least 2')

    @functools.cached_property
    def values(self) -> np.ndarray:
        """The value of each key."""
        rng, num_keys = np.random.default_rng(self.map_seed), (self.vocab_size - 1) // 2
        keys, values = list(range(num_keys)), list(range(num_keys, self.vocab_size - 1))
        rng.shuffle(keys)
        rng.shuffle(values)
        return np.array(values[:num_keys])[np.argsort(keys)]

    def draw(self, rng: np.random.Generator, split: str) -> Example:
        """Uniform keys, behind each the token that asks for its value."""
        keys = rng.integers(0, len(self.values), self.length // 2)
        tokens, targets = np.full(self.length, self.vocab_size - 1), np.zeros(self.length, np.int64)
        tokens[::2], targets[1::2] = keys, self.values[keys]
        return make_example(tokens, targets, np.arange(self.length) % 2 == 1)

    def solve(self, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Looks up the token before each that asks; see `Task.solve`."""
        known = dict(enumerate(self.values.tolist()))
        asking = [place > 0 and token == self.vocab_size - 1 for place, token in enumerate(tokens)]
        answers = [known[int(tokens[place - 1])] if asks else 0 for place, asks in enumerate(asking)]
        return np.array(answers), np.array(asking, np.float32)


def _last_value(tokens: np.ndarray, values: range) -> np.ndarray:
    """The last token in `values` at or before each position of (N, T); before the first one, token 0."""
    places = np.where(np.isin(tokens, values), np.arange(tokens.shape[1]), -1)
    last = np.maximum.accumulate(places, 1)
    return np.where(last < 0, 0, np.take_along_axis(tokens, np.maximum(last, 0), 1))
