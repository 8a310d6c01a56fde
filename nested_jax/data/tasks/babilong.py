"""bAbI stories in a haystack: the facts of a simulated story spread over a long text.

Kuratov et al. 2024 (BABILong, arXiv:2406.10149) hides the facts of bAbI stories (Weston et al. 2015, arXiv:1502.05698) between sentences
of books. Here the stories come from a simulator of their world and the sentences between of a grammar (`haystack`). Four people move
among six places and take and leave three objects, in bAbI's words; an object is taken where it was left.

    qa1   Where is Mary?                                 people move
    qa2   Where is the apple?                            people move, take and leave; the object has been taken
    qa3   Where was the apple before the kitchen?        the same; it asks where the object came from

A story has `num_facts` sentences, each of any person alike; in qa2 and qa3 the person takes or leaves something with chance 1/3 where
that is possible, and moves otherwise. bAbI's stories are of various lengths and have several questions. Facts lie at uniform depths in
their order. bAbI's qa4 and qa5, which BABILong averages over too, are not here. As in `needles` the share of right sequences is the one
to compare.

One core makes 3,900, 2,800 and 2,100 texts of 4,096 bytes a second, with 8, 12 and 24 facts.
"""

import dataclasses
import re

import numpy as np

from nested_jax.data.tasks.haystack import HaystackTask, Plan, spell
from nested_jax.data.tasks.task import Guess, check, check_choice

PEOPLE = ('Daniel', 'John', 'Mary', 'Sandra')
PLACES = ('bathroom', 'bedroom', 'garden', 'hallway', 'kitchen', 'office')
OBJECTS = ('apple', 'football', 'milk')
_MOVES = ('moved', 'went', 'journeyed', 'travelled', 'went back')
_TAKES = ('got', 'grabbed', 'took', 'picked up')
_LEAVES = ('dropped', 'left', 'put down', 'discarded')
QUESTIONS = {'qa1': 'Where is {}?', 'qa2': 'Where is the {}?', 'qa3': 'Where was the {} before the {}?'}
_HEAD = b'Some facts about people and things are hidden within the following text. I will ask about them afterwards.\n'
_LONGEST_FACT = len('Sandra journeyed to the bathroom. ') + len('back ')
_MOST_STORIES = 1000


class _World:
    """Where people and objects are, and the places each object has been to."""

    def __init__(self):
        self.places: dict[str, str] = {}  # of people who have moved
        self.holders: dict[str, str] = {}  # of objects that are held
        self.trails: dict[str, list[str]] = {}  # of objects that have been taken, no place twice in a row

    def move(self, person: str, place: str) -> None:
        self.places[person] = place
        for thing, holder in self.holders.items():
            if holder == person:
                self._visit(thing, place)

    def take(self, person: str, thing: str) -> None:
        self.holders[thing] = person
        self._visit(thing, self.places[person])

    def leave(self, thing: str) -> None:
        del self.holders[thing]

    def _visit(self, thing: str, place: str) -> None:
        trail = self.trails.setdefault(thing, [])
        if trail[-1:] != [place]:
            trail.append(place)


@dataclasses.dataclass(frozen=True)
class BabiHaystack(HaystackTask):
    """Where a person or an object is or was, of a story spread over a long text."""

    question: str = 'qa1'
    """qa1, qa2 or qa3."""
    num_facts: int = 8
    """Sentences of the story."""

    prompt_end = re.compile(r'\nQuestion: .*\? Answer:')

    def __post_init__(self):
        check_choice('question', self.question, QUESTIONS)
        fewest = {'qa1': 1, 'qa2': 2, 'qa3': 4}[self.question]
        check('num_facts', self.num_facts, self.num_facts >= fewest, f'at least {fewest} for {self.question}')
        shortest = len(_HEAD) + self.num_facts * _LONGEST_FACT + 80  # question and answer take no more
        check('length', self.length, self.length >= shortest, f'at least {shortest} for num_facts={self.num_facts}')

    def draw(self, rng: np.random.Generator, split: str) -> Plan:
        """A story, of those that answer a question, at uniform depths."""
        for _ in range(_MOST_STORIES):
            world, facts = self._tell(rng)
            if asked := _askable(world, self.question):
                break
        else:
            raise ValueError(f'num_facts={self.num_facts}; allowed: enough for a question of {self.question}')
        *names, answer = asked[rng.integers(len(asked))]
        depths = np.sort(rng.random(len(facts)))
        inserts = tuple((float(depth), f'{fact} '.encode()) for depth, fact in zip(depths, facts, strict=True))
        tail = f'\nQuestion: {QUESTIONS[self.question].format(*names)} Answer:'
        return Plan(_HEAD, inserts, tail.encode(), spell([answer]))

    def signature(self, drawn: Plan) -> bytes:
        """The story's sentences and the question."""
        return b''.join(fact for _, fact in drawn.inserts) + drawn.tail

    def _tell(self, rng: np.random.Generator) -> tuple[_World, list[str]]:
        world, facts = _World(), []
        while len(facts) < self.num_facts:
            person = PEOPLE[rng.integers(len(PEOPLE))]
            things = _reachable(world, person) if self.question != 'qa1' and rng.random() < 1 / 3 else []
            facts.append(_handle(rng, world, person, things[rng.integers(len(things))]) if things else _move(rng, world, person))
        return world, facts

    def read(self, prompt: str) -> list[str]:
        """Follows the story sentence by sentence; see `HaystackTask.read`."""
        person_at, thing_with, been, last_words = {}, {}, {}, prompt.rsplit('\n', 1)[-1]
        for match in _FACT.finditer(prompt):
            person, goes, takes, leaves = match.group('person', 'place', 'taken', 'left')
            if goes:
                person_at[person] = goes
            elif takes:
                thing_with[takes] = person
            else:
                thing_with.pop(leaves, None)
            for thing, holder in thing_with.items():
                if holder in person_at:
                    been.setdefault(thing, []).append(person_at[holder])
        if match := re.search(r'Where was the (\w+) before the (\w+)\?', last_words):
            path = been[match[1]]
            arrived = max(at for at in range(len(path)) if path[at] == match[2] and at and path[at - 1] != match[2])
            return [path[arrived - 1]]
        name = re.search(r'Where is (?:the )?(\w+)\?', last_words)[1]
        return [been[name][-1] if name in OBJECTS else person_at[name]]

    def guesses(self) -> dict[str, Guess]:
        """'last mention': the place that the text names last."""

        def last_mention(tokens: np.ndarray) -> np.ndarray:
            prompts = [self.prompt(row) for row in tokens]
            mentions = ([match['place'] for match in _FACT.finditer(prompt) if match['place']][-1:] for prompt in prompts)
            return np.stack([self.say(prompt, mention, self.length)[0] for prompt, mention in zip(prompts, mentions, strict=True)])

        return {'last mention': last_mention}


_FACT = re.compile(
    rf'\b(?P<person>{"|".join(PEOPLE)}) (?:(?:{"|".join(_MOVES)}) to the (?P<place>\w+)'
    rf'|(?:{"|".join(_TAKES)}) the (?P<taken>\w+)(?: there)?|(?:{"|".join(_LEAVES)}) the (?P<left>\w+)(?: there)?)\.'
)


def _reachable(world: _World, person: str) -> list[str]:
    """What a person holds, and what lies where the person is, or anywhere as far as told."""
    if person not in world.places:
        return []
    here = lambda thing: world.trails.get(thing, [world.places[person]])[-1] == world.places[person]
    return [thing for thing in OBJECTS if world.holders.get(thing) == person or thing not in world.holders and here(thing)]


def _handle(rng: np.random.Generator, world: _World, person: str, thing: str) -> str:
    leaves = thing in world.holders
    verbs = _LEAVES if leaves else _TAKES
    if leaves:
        world.leave(thing)
    else:
        world.take(person, thing)
    return f'{person} {verbs[rng.integers(len(verbs))]} the {thing}{rng.choice(["", " there"])}.'


def _move(rng: np.random.Generator, world: _World, person: str) -> str:
    elsewhere = [place for place in PLACES if place != world.places.get(person)]
    place = elsewhere[rng.integers(len(elsewhere))]
    world.move(person, place)
    return f'{person} {_MOVES[rng.integers(len(_MOVES))]} to the {place}.'


def _askable(world: _World, question: str) -> list[tuple[str, ...]]:
    """What may be asked for, each with its answer behind."""
    if question == 'qa1':
        return list(world.places.items())
    if question == 'qa2':
        return [(thing, trail[-1]) for thing, trail in world.trails.items()]
    # The place before the last visit, for places the object has come to from another.
    came_from = {(thing, to): was for thing, trail in world.trails.items() for was, to in zip(trail, trail[1:], strict=False)}
    return [(*asked, was) for asked, was in came_from.items()]
