"""RULER's needles in a haystack: sentences that give a key a value, and a question for some of the values.

Hsieh et al. 2024 (arXiv:2404.06654; rules and template of NVIDIA/RULER): needles lie at depths drawn without replacement from 40 equal
steps. The kinds, with the haystack, the keys and the values:

    single_1             noise, a line that is repeated     one key of one value      word -> number
    single_2, single_3   prose                              one key of one value      word -> number, word -> uuid
    multikey_1           prose                              four keys, one asked for  word -> number
    multikey_2, _3       needles of other keys              one key of one value      word -> number, uuid -> uuid
    multivalue           prose                              one key of four values    word -> number
    multiquery           prose                              four keys, all asked for  word -> number

Where the reference differs: its prose is Paul Graham's essays, its words are pairs of English ones and all its lengths are counted with
a tokenizer; here prose is of a grammar, words are made of syllables (24 million, so that no key comes twice at any length), and tokens
are bytes, of which the kinds of four needles need some 650. Values are asked for in the order of keys, or of appearance; the reference
takes any order and looks for the values in what a model generates. The share of right positions is flattered by the answer's earlier
bytes; the share of sequences is the one to compare.

One core makes 3,800 texts of 4,096 bytes a second with prose and 1,300 with uuids among uuids, the slowest; a stream of a million bytes
runs at 50 and 7 million tokens a second.
"""

import dataclasses
import re
import uuid
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from nested_jax.data.tasks.haystack import HaystackTask, Plan, spell
from nested_jax.data.tasks.task import Guess, check, check_choice

_NOISE = b'The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n'
_SYLLABLES = [consonant + vowel for consonant in 'bdfghklmnprstv' for vowel in 'aeiou']
_NUM_WORDS = len(_SYLLABLES) ** 4
_DEPTHS = 40


class Kind(NamedTuple):
    """A task of RULER."""

    haystack: str
    key: str
    value: str
    num_keys: int = 1
    num_values: int = 1  # of each key
    num_queries: int = 1


KINDS = {
    'single_1': Kind('noise', 'word', 'number'),
    'single_2': Kind('prose', 'word', 'number'),
    'single_3': Kind('prose', 'word', 'uuid'),
    'multikey_1': Kind('prose', 'word', 'number', num_keys=4),
    'multikey_2': Kind('needles', 'word', 'number'),
    'multikey_3': Kind('needles', 'uuid', 'uuid'),
    'multivalue': Kind('prose', 'word', 'number', num_values=4),
    'multiquery': Kind('prose', 'word', 'number', num_keys=4, num_queries=4),
}


@dataclasses.dataclass(frozen=True)
class NeedlePlan(Plan):
    """A text's parts, and the order in which keys are taken."""

    key_order: tuple[int, int]  # step and start


@dataclasses.dataclass(frozen=True)
class Needles(HaystackTask):
    """The values of keys that a long text gave in passing."""

    kind: str = 'single_1'
    """One of `KINDS`."""
    brief: bool = False
    """For short texts, and not the reference's: 'sela-kegu is: 5391295.' is all of a needle, and 'sela-kegu is' of the question."""

    digits: int = 7
    """Of a number; the reference has 7."""

    prompt_end = re.compile(r'(?: mentioned in the provided text|\n[a-z0-9, -]+) (?:is|are)(?= |$)')

    def __post_init__(self):
        check_choice('kind', self.kind, KINDS)
        check('digits', self.digits, 1 <= self.digits <= 18, '1 to 18')
        fewest = self.draw(np.random.default_rng(0), 'train').size - 1
        check('length', self.length, self.length >= fewest, f'at least {fewest} for kind={self.kind!r} and brief={self.brief}')

    def draw(self, rng: np.random.Generator, split: str) -> NeedlePlan:
        """Keys, values, depths and what is asked for."""
        kind, order = KINDS[self.kind], _draw_key_order(rng)
        keys = [_draw_key(rng, kind.key, order, number) for number in range(kind.num_keys)]
        needles = [(key, _draw_value(rng, kind.value, self.digits)) for key in keys for _ in range(kind.num_values)]
        asked = [keys[number] for number in rng.permutation(kind.num_keys)[: kind.num_queries]]
        depths = np.sort(rng.choice(_DEPTHS, len(needles), replace=False)) / (_DEPTHS - 1)
        needles = [needles[number] for number in rng.permutation(len(needles))]
        answers = [value for query in asked for key, value in needles if key == query]
        head, tail = _template(kind.value, _enumerate(asked), len(answers))
        if self.brief:
            head, tail = b'', f'\n{_enumerate(asked)} {"is" if len(answers) == 1 else "are"}'.encode()
        inserts = tuple((float(depth), self._write(*needle)) for depth, needle in zip(depths, needles, strict=True))
        return NeedlePlan(head, inserts, tail, spell(answers), order)

    def sentences(self, rng: np.random.Generator, plan: NeedlePlan) -> Iterator[bytes]:
        """Noise, prose, or needles of keys that are not asked for."""
        kind = KINDS[self.kind]
        if kind.haystack == 'prose':
            yield from super().sentences(rng, plan)
        number = kind.num_keys
        while True:
            key = None if kind.haystack == 'noise' else _draw_key(rng, kind.key, plan.key_order, number)
            yield _NOISE if key is None else self._write(key, _draw_value(rng, kind.value, self.digits))
            number += 1

    def _write(self, key: str, value: str) -> bytes:
        kind = KINDS[self.kind]
        begin, end = '' if self.brief else f'One of the special magic {kind.value}s for ', ' ' if kind.haystack == 'prose' else '\n'
        return f'{begin}{key} is: {value}.{end}'.encode()

    def read(self, prompt: str) -> list[str]:
        """Collects every needle; see `HaystackTask.read`."""
        values = {}
        for key, value in _find_needles(prompt):
            values.setdefault(key, []).append(value)
        asked = _ASKED.fullmatch(prompt.rsplit('\n', 1)[1])[1]
        return [value for key in re.split(r', and |, ', asked) for value in values.get(key, [])]

    def guesses(self) -> dict[str, Guess]:
        """'last mention': the values that come last, whatever the key."""
        kind = KINDS[self.kind]
        count = kind.num_values * kind.num_queries

        def last_mention(tokens: np.ndarray) -> np.ndarray:
            prompts = [self.prompt(row) for row in tokens]
            answers = ([value for _, value in _find_needles(prompt)][-count:] for prompt in prompts)
            return np.stack([self.say(prompt, answer, self.length)[0] for prompt, answer in zip(prompts, answers, strict=True)])

        return {'last mention': last_mention}


_ASKED = re.compile(r'(?:.* special magic \w+ for )?(.*?)(?: mentioned in the provided text)? (?:is|are)')


def _find_needles(text: str) -> list[tuple[str, str]]:
    return re.findall(r'(\S+) is: (\S+)\.(?=\s)', text)


def _draw_key_order(rng: np.random.Generator) -> tuple[int, int]:
    """Step and start of a walk over all words that comes back to none before it has seen all: the step has no factor 2, 5 or 7."""
    steps = [factor for factor in range(70) if factor % 2 and factor % 5 and factor % 7]
    return int(rng.integers(_NUM_WORDS // 70)) * 70 + int(rng.choice(steps)), int(rng.integers(_NUM_WORDS))


def _draw_key(rng: np.random.Generator, kind: str, order: tuple[int, int], number: int) -> str:
    if kind == 'uuid':
        return _draw_uuid(rng)
    code, syllables = (order[0] * number + order[1]) % _NUM_WORDS, []
    for _ in range(4):
        code, syllable = divmod(code, len(_SYLLABLES))
        syllables.append(_SYLLABLES[syllable])
    return '{}{}-{}{}'.format(*syllables)


def _draw_value(rng: np.random.Generator, kind: str, digits: int) -> str:
    return _draw_uuid(rng) if kind == 'uuid' else str(rng.integers(10 ** (digits - 1), 10**digits))


def _draw_uuid(rng: np.random.Generator) -> str:
    return str(uuid.UUID(bytes=rng.bytes(16), version=4))


def _enumerate(keys: list[str]) -> str:
    return keys[0] if len(keys) == 1 else f'{", ".join(keys[:-1])}, and {keys[-1]}'


def _template(value: str, query: str, num_answers: int) -> tuple[bytes, bytes]:
    """RULER's sentences before and after the text, which tell one answer from several."""
    some, kind, are, ask = ('A', value, 'is', 'is') if num_answers == 1 else ('Some', f'{value}s', 'are', 'are all')
    head = f'{some} special magic {kind} {are} hidden within the following text. Make sure to memorize it. '
    head += f'I will quiz you about the {kind} afterwards.\n'
    magic = f'the special magic {kind} for {query} mentioned in the provided text'
    return head.encode(), f'\nWhat {ask} {magic}? {magic[0].upper()}{magic[1:]} {are}'.encode()
