"""A world of made-up people, in which knowledge can be present in a text and yet not answer a question.

A person has a first and a last name and a value for each attribute. A passage names them once and then tells each attribute in random
order, in one of two wordings: 'anna berg . they lives-in oslo . they works-as baker . ...'. A question has another form, 'Q anna berg
city ?', and is answered by one token. Pre-training shows this link for `known` people, who never change, and passages followed by notes
about people made up for each document: a prior of self-edits that is diverse and often wrong. No network, nothing stored.

A note says one thing in one of six styles (`STYLES`); only a few of them help a learner that will be asked.
"""

import dataclasses
import functools
from typing import NamedTuple

import numpy as np

PAD, END, EDIT, ASK, MARK, STOP, THEY = range(7)
_SPECIAL = ('<pad>', '<end>', '<edit>', 'Q', '?', '.', 'they')
_FILLERS = 8
STYLES = ('question', 'statement', 'reversed', 'nameless', 'off-topic', 'wrong')
MALFORMED = 'malformed'
_SPLITS = ('train', 'dev', 'test')


class Person(NamedTuple):
    """Who a passage is about."""

    first: int
    last: int
    facts: tuple[int, ...]  # value of each attribute, from 0


@dataclasses.dataclass(frozen=True)
class World:
    """Sizes of the world, and its tokens.

    Raises:
        ValueError: naming the field, its value and what is allowed.
    """

    names: int = 24  # first names, and as many last names
    attributes: int = 4
    values: int = 8  # of each attribute
    known: int = 40  # people who are the same in all of pre-training
    seed: int = 0  # of the known people

    def __post_init__(self):
        for field in ('names', 'attributes', 'values'):
            if getattr(self, field) < 2:
                raise ValueError(f'{field} is {getattr(self, field)}, allowed is an integer of at least 2')
        if not 1 <= self.known <= self.names**2 // 4:
            raise ValueError(f'known is {self.known}, allowed is an integer from 1 to a quarter of names ** 2, {self.names**2 // 4}')

    @property
    def vocab_size(self) -> int:
        """Tokens of all kinds."""
        return self._value(self.attributes, 0)

    @property
    def passage_length(self) -> int:
        """Tokens of a passage."""
        return 3 + 4 * self.attributes

    @functools.cached_property
    def words(self) -> tuple[str, ...]:
        """What each token is called in print."""
        kinds = [*_SPECIAL, *(f'filler{index}' for index in range(_FILLERS))]
        kinds += [f'first{index}' for index in range(self.names)] + [f'last{index}' for index in range(self.names)]
        kinds += [f'attribute{index}' for index in range(self.attributes)]
        kinds += [f'has-{wording}-attribute{index}' for index in range(self.attributes) for wording in 'ab']
        return (*kinds, *(f'value{kind}.{index}' for kind in range(self.attributes) for index in range(self.values)))

    @functools.cached_property
    def known_people(self) -> tuple[Person, ...]:
        """Those of pre-training, no two of one name."""
        rng = np.random.default_rng(self.seed)
        names = rng.permutation(self.names**2)[: self.known]
        return tuple(Person(int(name) // self.names, int(name) % self.names, self._facts(rng)) for name in names)

    def person(self, rng: np.random.Generator, split: str = 'train') -> Person:
        """Someone new, with a name of the split's and facts of their own; known people's names are in none.

        Names are dealt to the splits in turn by their number: half to 'train', a quarter each to 'dev' and 'test'.

        Raises:
            ValueError: for a split that is not known.
        """
        if split not in _SPLITS:
            raise ValueError(f'split is {split!r}, allowed is one of {_SPLITS}')
        taken = {(person.first, person.last) for person in self.known_people}
        while True:
            name = int(rng.integers(self.names**2))
            first, last = name // self.names, name % self.names
            if (first, last) not in taken and ('train', 'dev', 'train', 'test')[(first + last) % 4] == split:
                return Person(first, last, self._facts(rng))

    def passage(self, rng: np.random.Generator, person: Person) -> list[int]:
        """(3 + 4 attributes) tokens: the name, then every attribute once, in random order and wording."""
        tokens = [*self._name(person), STOP]
        for attribute in rng.permutation(self.attributes):
            tokens += [THEY, self._verb(attribute, rng.integers(2)), self._value(attribute, person.facts[attribute]), STOP]
        return tokens

    def question(self, person: Person, attribute: int) -> list[int]:
        """Six tokens, the separator before a document included; the answer is the next one."""
        return [END, ASK, *self._name(person), self._attribute(attribute), MARK]

    def answer(self, person: Person, attribute: int) -> int:
        """The token that is right."""
        return self._value(attribute, person.facts[attribute])

    def note(self, rng: np.random.Generator, person: Person, style: str, attribute: int | None = None) -> list[int]:
        """One line of a self-edit, its full stop included, about an attribute, or any."""
        attribute = int(rng.integers(self.attributes)) if attribute is None else attribute
        value, verb, name = self.answer(person, attribute), self._verb(attribute, rng.integers(2)), self._name(person)
        if style == 'wrong':
            value = self._value(attribute, (person.facts[attribute] + 1 + rng.integers(self.values - 1)) % self.values)
        if style in ('question', 'wrong'):
            return [*self.question(person, attribute)[1:], value, STOP]
        if style == 'off-topic':
            return [*(len(_SPECIAL) + rng.integers(_FILLERS, size=4)).tolist(), STOP]
        return {
            'statement': [*name, verb, value, STOP],
            'reversed': [value, verb, *name, STOP],
            'nameless': [THEY, verb, value, STOP],
        }[style]

    def edit(self, rng: np.random.Generator, person: Person) -> list[int]:
        """A self-edit as pre-training shows them: as many notes as attributes, of random styles, then the end."""
        notes = [self.note(rng, person, STYLES[rng.integers(len(STYLES))]) for _ in range(self.attributes)]
        return [*(token for note in notes for token in note), END]

    def oracle(self, rng: np.random.Generator, person: Person) -> list[int]:
        """The best self-edit there is: every attribute in question form."""
        notes = [self.note(rng, person, 'question', attribute) for attribute in range(self.attributes)]
        return [*(token for note in notes for token in note), END]

    def row(self, rng: np.random.Generator, length: int) -> list[int]:
        """One row of pre-training: a new person's passage with a self-edit (55 of 100), or much about known people, cut to `length`."""
        if rng.random() < 0.55:
            person = self.person(rng, _SPLITS[rng.integers(3)])
            tokens = [END, *self.passage(rng, person), EDIT, *self.edit(rng, person)]
            return (tokens + [PAD] * length)[:length]
        tokens: list[int] = []
        while len(tokens) < length:
            person = self.known_people[rng.integers(self.known)]
            tokens += [END, *self.passage(rng, person)] if rng.random() < 0.4 else [END, *self._lesson(rng, person)]
        return tokens[:length]

    def lines(self, edit: list[int]) -> list[list[int]]:
        """A self-edit's notes: what ends with a full stop before the end."""
        tokens, notes, note = edit[: edit.index(END)] if END in edit else edit, [], []
        for token in tokens:
            note.append(token)
            if token == STOP:
                notes, note = [*notes, note], []
        return notes

    def style(self, note: list[int], person: Person) -> str:
        """What kind of note it is about a person, or 'malformed'; 'statement', 'reversed' and 'nameless' count if they are true."""
        name, facts = self._name(person), range(self.attributes)
        verbs = {(self._verb(kind, wording), self.answer(person, kind)) for kind in facts for wording in (0, 1)}
        for kind in facts:
            if note[:-2] == self.question(person, kind)[1:] and len(note) == 7:
                return 'question' if note[-2] == self.answer(person, kind) else 'wrong'
        pairs = {'statement': note[2:-1], 'reversed': note[1::-1], 'nameless': note[1:-1]}
        frames = {'statement': note[:2] == name and len(note) == 5, 'reversed': note[2:-1] == name, 'nameless': note[:1] == [THEY]}
        for style, fits in frames.items():
            if fits and tuple(pairs[style]) in verbs:
                return style
        fillers = range(len(_SPECIAL), len(_SPECIAL) + _FILLERS)
        return 'off-topic' if len(note) == 5 and all(token in fillers for token in note[:-1]) else MALFORMED

    def _lesson(self, rng: np.random.Generator, person: Person) -> list[int]:
        return self.note(rng, person, ('question', 'question', 'statement')[rng.integers(3)])

    def _facts(self, rng: np.random.Generator) -> tuple[int, ...]:
        return tuple(rng.integers(self.values, size=self.attributes).tolist())

    def _name(self, person: Person) -> list[int]:
        start = len(_SPECIAL) + _FILLERS
        return [start + person.first, start + self.names + person.last]

    def _attribute(self, attribute: int) -> int:
        return len(_SPECIAL) + _FILLERS + 2 * self.names + int(attribute)

    def _verb(self, attribute: int, wording: int) -> int:
        return self._attribute(self.attributes) + 2 * int(attribute) + int(wording)

    def _value(self, attribute: int, value: int) -> int:
        return self._verb(self.attributes, 0) + int(attribute) * self.values + int(value)
