"""Formal languages: parity, (aa)*, (abab)*, a^n b^n, a^n b^n c^n and Shuffle-2.

The tasks of Bhattamishra et al. 2020 (arXiv:2009.11264; rules of satwik77/Transformer-Formal-Languages), as in Table 5 of
arXiv:2512.24695v1: a string of the language goes in, and after each letter comes

    parity, aa-star, abab-star   1 if the prefix is in the language (parity: an even number of ones), else 0
    counter-2, counter-3         the letters that may follow, as one symbol: after an a 'a or b', then the letter that is due, at the end T
    shuffle-2                    which of the two kinds of brackets are open, one of 00, 10, 01, 11

Trained on lengths 2 to 50 and tested on the same (bin0), on 51 to 100 (bin1) and on 102 to 150 (bin2, of this project alone). A length
is drawn uniformly from those a split has, then a string uniformly from those of that length. The reference draws parity's and
Shuffle-2's lengths otherwise (geometric and by a grammar), its bin1 begins at 52, and its grammar of Shuffle-2 makes nested strings
only, in which brackets never cross; here they do.

Behind a string comes the last token of the vocabulary, unscored. Of the languages with one string a length, bin0 is part of the
training set, as in the reference: see `num_strings`. One core draws 10,000 strings a second of parity's training set and 4,600 of
Shuffle-2's, 4,800 and 1,800 of their bin0.
"""

import dataclasses
import functools
import math
from typing import ClassVar, NamedTuple

import numpy as np

from nested_jax.data.tasks.task import Example, Guess, Task, check_choice, make_example

BINS = {'train': (2, 50), 'bin0': (2, 50), 'bin1': (51, 100), 'bin2': (102, 150)}  # shortest and longest


class Language(NamedTuple):
    """How a language is written."""

    letters: str  # of the strings, in the order of their tokens
    answers: tuple[str, ...]  # in the order of their targets
    multiple: int  # lengths are its multiples


LANGUAGES = {
    'parity': Language('01', ('0', '1'), 1),
    'aa-star': Language('a', ('0', '1'), 2),
    'abab-star': Language('ab', ('0', '1'), 4),
    'counter-2': Language('ab', ('a|b', 'b', 'T'), 2),
    'counter-3': Language('abc', ('a|b', 'b', 'c', 'T'), 3),
    'shuffle-2': Language('()[]', ('00', '10', '01', '11'), 2),
}


@dataclasses.dataclass(frozen=True)
class FormalLanguage(Task):
    """What may be said after each letter of a string."""

    language: str = 'parity'
    """parity, aa-star, abab-star, counter-2 (a^n b^n), counter-3 (a^n b^n c^n) or shuffle-2."""

    splits: ClassVar[tuple[str, ...]] = tuple(BINS)

    def __post_init__(self):
        check_choice('language', self.language, LANGUAGES)

    @property
    def padding(self) -> int:
        """The token behind a string."""
        return max(len(LANGUAGES[self.language].letters), len(LANGUAGES[self.language].answers))

    @property
    def vocab_size(self) -> int:
        """Letters or answers, whichever are more, and the padding."""
        return self.padding + 1

    def lengths(self, split: str) -> np.ndarray:
        """Lengths of a split's strings."""
        check_choice('split', split, self.splits)
        shortest, longest = BINS[split]
        return np.array([length for length in range(shortest, longest + 1) if length % LANGUAGES[self.language].multiple == 0])

    def num_strings(self, split: str) -> int:
        """Distinct strings that a split's lengths allow; bin0 of parity and Shuffle-2 has a quarter of them, training the rest."""
        return sum(_num_strings(self.language, int(length)) for length in self.lengths(split))

    def belongs(self, example: Example, split: str) -> bool:
        """Whether a string is a split's: by its length, and between training and bin0 by its checksum if there are enough of them."""
        if split in ('bin1', 'bin2') or self.language not in ('parity', 'shuffle-2'):
            return True
        return super().belongs(example, 'train') == (split == 'train')

    def draw(self, rng: np.random.Generator, split: str) -> Example:
        """A string of uniformly drawn length and its answers, padded to the split's longest length."""
        length = int(rng.choice(self.lengths(split)))
        string, answers = _GENERATORS[self.language](rng, length)
        behind = (0, BINS[split][1] - length)
        tokens = np.pad(string, behind, constant_values=self.padding)
        return make_example(tokens, np.pad(answers, behind), np.arange(len(tokens)) < length)

    def solve(self, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Answers by reading the string letter by letter; see `Task.solve`."""
        language = LANGUAGES[self.language]
        string = ''.join(language.letters[token] for token in tokens if token != self.padding)
        answers = [language.answers.index(answer) for answer in _READERS[self.language](string)]
        targets, weights = np.zeros(len(tokens), np.int32), np.zeros(len(tokens), np.float32)
        targets[: len(answers)], weights[: len(answers)] = answers, 1
        return targets, weights

    def guesses(self) -> dict[str, Guess]:
        """'alternate': after even prefixes 1, after odd ones 0, which is right for (aa)*."""
        if LANGUAGES[self.language].answers != ('0', '1'):
            return {}
        return dict(alternate=lambda tokens: np.broadcast_to(np.arange(tokens.shape[1]) % 2, tokens.shape))


def _num_strings(language: str, length: int) -> int:
    if language == 'parity':
        return 2 ** (length - 1)
    if language == 'shuffle-2':
        return _catalan(length // 2) * _catalan(length // 2 + 1)
    return 1


def _catalan(pairs: int) -> int:
    return math.comb(2 * pairs, pairs) // (pairs + 1)


# ---- generators: rng, length -> tokens (length,), answers (length,)


def _draw_parity(rng: np.random.Generator, length: int) -> tuple[np.ndarray, np.ndarray]:
    bits = rng.integers(0, 2, length)
    bits[-1] = bits[:-1].sum() % 2  # the whole string is in the language
    return bits, 1 - bits.cumsum() % 2


def _draw_repetition(rng: np.random.Generator, length: int, *, letters: int, period: int) -> tuple[np.ndarray, np.ndarray]:
    places = np.arange(length)
    return places % letters, (places + 1) % period == 0


def _draw_counter(rng: np.random.Generator, length: int, *, letters: int) -> tuple[np.ndarray, np.ndarray]:
    places, count = np.arange(length), length // letters
    string = places // count
    # From the second letter on the answer is the letter that comes next; the last is T.
    answers = np.where(places < count, 0, (places + 1) // count)
    return string, answers


def _draw_shuffle(rng: np.random.Generator, length: int) -> tuple[np.ndarray, np.ndarray]:
    pairs = length // 2
    round_pairs = int(rng.choice(pairs + 1, p=_share_of_round_pairs(pairs)))
    is_square = np.ones(length, bool)
    is_square[rng.choice(length, 2 * round_pairs, replace=False)] = False
    steps = np.empty(length, np.int64)
    steps[~is_square], steps[is_square] = _draw_dyck(rng, round_pairs), _draw_dyck(rng, pairs - round_pairs)
    open_round, open_square = (steps * ~is_square).cumsum() > 0, (steps * is_square).cumsum() > 0
    return 2 * is_square + (steps < 0), open_round + 2 * open_square


@functools.cache
def _share_of_round_pairs(pairs: int) -> np.ndarray:
    """Shares of the strings with 0, 1, ... pairs of round brackets: ways to place them, times Dyck words of each kind."""
    ways = [math.comb(2 * pairs, 2 * n) * _catalan(n) * _catalan(pairs - n) for n in range(pairs + 1)]
    return np.array([way / sum(ways) for way in ways])


def _draw_dyck(rng: np.random.Generator, pairs: int) -> np.ndarray:
    """A uniform Dyck word as steps +1 and -1: of a shuffle with one step down more, the one rotation that dips only at its end."""
    steps = rng.permutation(np.repeat([1, -1], [pairs, pairs + 1]))
    return np.roll(steps, -(int(steps.cumsum().argmin()) + 1))[:-1]


_GENERATORS = {
    'parity': _draw_parity,
    'aa-star': functools.partial(_draw_repetition, letters=1, period=2),
    'abab-star': functools.partial(_draw_repetition, letters=2, period=4),
    'counter-2': functools.partial(_draw_counter, letters=2),
    'counter-3': functools.partial(_draw_counter, letters=3),
    'shuffle-2': _draw_shuffle,
}


# ---- solvers: a string in letters -> the answer after each


def _read_parity(string: str) -> list[str]:
    return ['1' if string[: end + 1].count('1') % 2 == 0 else '0' for end in range(len(string))]


def _read_repetition(string: str, *, word: str) -> list[str]:
    prefixes = (string[: end + 1] for end in range(len(string)))
    return ['1' if prefix == word * (len(prefix) // len(word)) else '0' for prefix in prefixes]


def _read_counter(string: str, *, letters: str) -> list[str]:
    answers, counts = [], dict.fromkeys(letters, 0)
    for letter in string:
        counts[letter] += 1
        due = next((other for other in letters[1:] if counts[other] < counts['a']), 'T')
        answers.append('a|b' if letter == 'a' else due)
    return answers


def _read_shuffle(string: str) -> list[str]:
    answers, open_round, open_square = [], 0, 0
    for letter in string:
        open_round += dict(zip('()', (1, -1), strict=True)).get(letter, 0)
        open_square += dict(zip('[]', (1, -1), strict=True)).get(letter, 0)
        answers.append(f'{int(open_round > 0)}{int(open_square > 0)}')
    return answers


_READERS = {
    'parity': _read_parity,
    'aa-star': functools.partial(_read_repetition, word='aa'),
    'abab-star': functools.partial(_read_repetition, word='abab'),
    'counter-2': functools.partial(_read_counter, letters='ab'),
    'counter-3': functools.partial(_read_counter, letters='abc'),
    'shuffle-2': _read_shuffle,
}
