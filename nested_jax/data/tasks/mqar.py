"""Multi-query associative recall (MQAR).

Arora et al. 2023 (arXiv:2312.04927; rules of HazyResearch/zoology): a sequence begins with pairs of a key and a value, all keys and all
values distinct; later each key comes once more and its value is asked for there. Queries lie on even places behind the pairs, the one
after g free places with weight g^(a - 1), most of them soon. Token 0 is the filler, keys are 1 to V/2 - 1, values the upper half.

The other places hold random tokens, as by default in the reference, but none of the sequence's own keys, which would be queries without
an answer; or the filler, as in experiments/recall.py. The reference trains on a mixture of lengths and numbers of pairs, which here are
several tasks. One core draws 12,000 sequences of 64 tokens with 8 pairs a second, and 5,600 of 1,024 with 256.
"""

import dataclasses

import numpy as np

from nested_jax.data.tasks.task import Example, Guess, Task, check, make_example


@dataclasses.dataclass(frozen=True)
class MultiQueryRecall(Task):
    """The value of each key where the key comes again."""

    vocab_size: int = 8192
    """Tokens, keys and values among them."""
    length: int = 64
    """Tokens of a sequence; even."""
    num_pairs: int = 8
    """Pairs of a key and a value; four times as many fit into the length."""
    power: float = 0.01
    """a: 1 spreads the queries evenly, 0 puts most soon after the pairs."""
    random_fillers: bool = True
    """Random tokens between the queries; False: token 0."""

    def __post_init__(self):
        check('num_pairs', self.num_pairs, self.num_pairs >= 1, 'an integer of at least 1')
        check('length', self.length, self.length >= 4 * self.num_pairs and self.length % 2 == 0, f'even, at least {4 * self.num_pairs}')
        fewest = 2 * self.num_pairs + 2
        check('vocab_size', self.vocab_size, self.vocab_size >= fewest, f'at least {fewest}, for {self.num_pairs} keys and values')
        check('power', self.power, 0 <= self.power <= 1, '0 to 1')

    def draw(self, rng: np.random.Generator, split: str) -> Example:
        """A sequence of pairs, then queries."""
        half, shown = self.vocab_size // 2, 2 * self.num_pairs
        keys = 1 + rng.choice(half - 1, self.num_pairs, replace=False)
        values = half + rng.choice(self.vocab_size - half, self.num_pairs, replace=False)
        gaps = 1 + np.arange((self.length - shown) // 2)
        # The largest of perturbed log weights are a weighted draw without replacement, in its order.
        places = np.argsort((1 - self.power) * np.log(gaps) - rng.gumbel(size=len(gaps)))[: self.num_pairs]
        tokens, targets = self._fillers(rng, keys), np.zeros(self.length, np.int64)
        tokens[0:shown:2], tokens[1:shown:2] = keys, values
        tokens[shown + 2 * places], targets[shown + 2 * places] = keys, values
        return make_example(tokens, targets, targets > 0)

    def _fillers(self, rng: np.random.Generator, keys: np.ndarray) -> np.ndarray:
        if not self.random_fillers:
            return np.zeros(self.length, np.int64)
        # Uniform over all tokens but the keys: the i-th of these lies above as many keys as are at most i plus their own rank.
        ranks = np.sort(keys) - np.arange(len(keys))
        fillers = rng.integers(0, self.vocab_size - len(keys), self.length)
        return fillers + np.searchsorted(ranks, fillers, side='right')

    def solve(self, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Looks up every later token among the pairs; see `Task.solve`."""
        shown = 2 * self.num_pairs
        values = {int(tokens[place]): int(tokens[place + 1]) for place in range(0, shown, 2)}
        targets = np.array([0] * shown + [values.get(int(token), 0) for token in tokens[shown:]])
        return targets, (targets > 0).astype(np.float32)

    def guesses(self) -> dict[str, Guess]:
        """'last value': that of the last pair, whatever the key."""
        return {'last value': lambda tokens: np.broadcast_to(tokens[:, 2 * self.num_pairs - 1, None], tokens.shape)}
