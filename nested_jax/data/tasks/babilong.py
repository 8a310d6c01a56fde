"""bAbI stories in a haystack: the facts of a simulated story spread over a long text.

Kuratov et al. 2024 (BABILong, arXiv:2406.10149) hides the facts of bAbI stories (Weston et al. 2015, arXiv:1502.05698) between sentences
of books. Here the stories come from a simulator of their world and the sentences between of a grammar (`haystack`). Four people move
among six places and take, leave and give three objects, in bAbI's words; an object is taken where it was left.

    qa1   Where is Mary?                                 people move
    qa2   Where is the apple?                            people move, take and leave; the object has been taken
    qa3   Where was the apple before the kitchen?        the same; it asks where the object came from
    qa4   What is north of the office?                   places lie in a row, and each two neighbours are told of in either direction
    qa5   Who gave the apple to Mary?                    people move, take, leave and give; it asks for one of the three in a gift

A story has `num_facts` sentences. In qa4 they tell of a row of one place more, bAbI's of three places; in the others they are of any
person alike, who takes or leaves something with chance 1/3 where that is possible, in qa5 takes, leaves or gives with chance 2/3, and
moves otherwise. Something is given to who is in the same place, or has not been told of. Where several gifts fit a question the last
counts. bAbI's stories are of various lengths and have several questions. Facts lie at uniform depths in their order. As in `needles` the
share of right sequences is the one to compare.

One core makes 3,900, 2,800, 2,100, 2,700 and 1,000 texts of 4,096 bytes a second, with 8, 12, 24, 5 and 12 facts.
"""

import dataclasses
import re

import numpy as np

from nested_jax.data.tasks.haystack import HaystackTask, Plan, spell
from nested_jax.data.tasks.task import Guess, check, check_choice

PEOPLE = ('Daniel', 'John', 'Mary', 'Sandra')
GIVERS = ('Bill', 'Fred', 'Jeff', 'Mary')  # the people of qa5
PLACES = ('bathroom', 'bedroom', 'garden', 'hallway', 'kitchen', 'office')
OBJECTS = ('apple', 'football', 'milk')
_MOVES = ('moved', 'went', 'journeyed', 'travelled', 'went back')
_TAKES = ('got', 'grabbed', 'took', 'picked up')
_LEAVES = ('dropped', 'left', 'put down', 'discarded')
_GIVES = ('gave', 'handed', 'passed')
_OPPOSITES = {'north': 'south', 'south': 'north', 'east': 'west', 'west': 'east'}
QUESTIONS = ('qa1', 'qa2', 'qa3', 'qa4', 'qa5')
MOST_FACTS = {'qa4': len(PLACES) - 1}  # where there is a limit
_FEWEST_FACTS = {'qa1': 1, 'qa2': 2, 'qa3': 4, 'qa4': 1, 'qa5': 4}
_HEAD = b'Some facts about people and things are hidden within the following text. I will ask about them afterwards.\n'
_LONGEST_FACT = len('Sandra journeyed to the bathroom. ') + len('back ')
_MOST_STORIES = 1000


class _World:
    """Where people and objects are, and the places each object has been to."""

    def __init__(self):
        self.places: dict[str, str] = {}  # of people who have moved
        self.holders: dict[str, str] = {}  # of objects that are held
        self.trails: dict[str, list[str]] = {}  # of objects that have been taken, no place twice in a row
        self.gifts: list[tuple[str, str, str]] = []  # giver, object and receiver

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

    def give(self, person: str, thing: str, receiver: str) -> None:
        self.holders[thing] = receiver
        self.places[receiver] = self.places[person]
        self.gifts.append((person, thing, receiver))

    def _visit(self, thing: str, place: str) -> None:
        trail = self.trails.setdefault(thing, [])
        if trail[-1:] != [place]:
            trail.append(place)


@dataclasses.dataclass(frozen=True)
class BabiHaystack(HaystackTask):
    """What became of people and objects, or where places lie, of a story spread over a long text."""

    question: str = 'qa1'
    """qa1, qa2, qa3, qa4 or qa5."""
    num_facts: int = 8
    """Sentences of the story."""

    prompt_end = re.compile(r'\nQuestion: .*\? Answer:')

    def __post_init__(self):
        check_choice('question', self.question, QUESTIONS)
        fewest, most = _FEWEST_FACTS[self.question], MOST_FACTS.get(self.question)
        allowed = f'at least {fewest} for {self.question}' if most is None else f'{fewest} to {most} for {self.question}'
        check('num_facts', self.num_facts, self.num_facts >= fewest and (most is None or self.num_facts <= most), allowed)
        shortest = len(_HEAD) + self.num_facts * _LONGEST_FACT + 80  # question and answer take no more
        check('length', self.length, self.length >= shortest, f'at least {shortest} for num_facts={self.num_facts}')

    def draw(self, rng: np.random.Generator, split: str) -> Plan:
        """A story, of those that answer a question, at uniform depths."""
        for _ in range(_MOST_STORIES):
            facts, asked = _tell_row(rng, self.num_facts) if self.question == 'qa4' else self._tell(rng)
            if asked:
                break
        else:
            raise ValueError(f'num_facts={self.num_facts}; allowed: enough for a question of {self.question}')
        question, answer = asked[rng.integers(len(asked))]
        depths = np.sort(rng.random(len(facts)))
        inserts = tuple((float(depth), f'{fact} '.encode()) for depth, fact in zip(depths, facts, strict=True))
        return Plan(_HEAD, inserts, f'\nQuestion: {question} Answer:'.encode(), spell([answer]))

    def signature(self, drawn: Plan) -> bytes:
        """The story's sentences and the question."""
        return b''.join(fact for _, fact in drawn.inserts) + drawn.tail

    def _tell(self, rng: np.random.Generator) -> tuple[list[str], list[tuple[str, str]]]:
        """A story's sentences, and all questions that it answers, each with the answer."""
        world, facts, gifts = _World(), [], self.question == 'qa5'
        people = GIVERS if gifts else PEOPLE
        while len(facts) < self.num_facts:
            person = people[rng.integers(len(people))]
            things = _reachable(world, person) if self.question != 'qa1' and rng.random() < (2 / 3 if gifts else 1 / 3) else []
            if not things:
                facts.append(_move(rng, world, person))
            else:
                facts.append(_handle(rng, world, person, things[rng.integers(len(things))], gifts))
        return facts, _askable(world, self.question)

    def read(self, prompt: str) -> list[str]:
        """Follows the story sentence by sentence; see `HaystackTask.read`."""
        question = prompt.rsplit('\n', 1)[-1]
        if match := re.search(r'What is (?:(\w+) of the (\w+)|the (\w+) (\w+) of)\?', question):
            side, place = match.group(1, 2) if match[1] else (_OPPOSITES[match[4]], match[3])
            return [_beside(prompt, place, side)]
        for pattern, answer in _ABOUT_GIFTS.items():
            if match := re.search(pattern, question):
                gifts = [fact.groupdict() for fact in _FACT.finditer(prompt) if fact['given']]
                return [next(gift[answer] for gift in reversed(gifts) if match.groupdict().items() <= gift.items())]
        person_at, been = _follow(prompt)
        if match := re.search(r'Where was the (\w+) before the (\w+)\?', question):
            path = been[match[1]]
            arrived = max(at for at in range(len(path)) if path[at] == match[2] and at and path[at - 1] != match[2])
            return [path[arrived - 1]]
        name = re.search(r'Where is (?:the )?(\w+)\?', question)[1]
        return [been[name][-1] if name in OBJECTS else person_at[name]]

    def guesses(self) -> dict[str, Guess]:
        """'last mention': the place, in qa5 the person or object, that the story names last."""

        def last_mention(tokens: np.ndarray) -> np.ndarray:
            prompts = [self.prompt(row) for row in tokens]
            return np.stack([self.say(prompt, _last_mention(prompt), self.length)[0] for prompt in prompts])

        return {'last mention': last_mention}


_FACT = re.compile(
    rf'\b(?P<person>{"|".join(dict.fromkeys(PEOPLE + GIVERS))}) (?:(?:{"|".join(_MOVES)}) to the (?P<place>\w+)'
    rf'|(?:{"|".join(_TAKES)}) the (?P<taken>\w+)(?: there)?|(?:{"|".join(_LEAVES)}) the (?P<left>\w+)(?: there)?'
    rf'|(?:{"|".join(_GIVES)}) the (?P<given>\w+) to (?P<receiver>\w+))\.'
)
_BESIDE = re.compile(rf'The ({"|".join(PLACES)}) is (\w+) of the (\w+)\.')
# Question about gifts -> which of a gift's parts it asks for.
_ABOUT_GIFTS = {
    r'What did (?P<person>\w+) give to (?P<receiver>\w+)\?': 'given',
    r'Who did (?P<person>\w+) give the (?P<given>\w+) to\?': 'receiver',
    r'Who received the (?P<given>\w+)\?': 'receiver',
    r'Who gave the (?P<given>\w+) to (?P<receiver>\w+)\?': 'person',
    r'Who gave the (?P<given>\w+)\?': 'person',
}


def _beside(prompt: str, place: str, side: str) -> str:
    """The place told to be next to another on one side."""
    for one, way, other in _BESIDE.findall(prompt):
        if (way, other) == (side, place):
            return one
        if (_OPPOSITES[way], one) == (side, place):
            return other
    raise ValueError(f'prompt does not tell what is {side} of the {place}')


def _follow(prompt: str) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Where people are in the end, and where objects have been, after every sentence once."""
    person_at, thing_with, been = {}, {}, {}
    for match in _FACT.finditer(prompt):
        person, goes, takes, leaves = match.group('person', 'place', 'taken', 'left')
        if goes:
            person_at[person] = goes
        elif takes:
            thing_with[takes] = person
        elif leaves:
            thing_with.pop(leaves, None)
        for thing, holder in thing_with.items():
            if holder in person_at:
                been.setdefault(thing, []).append(person_at[holder])
    return person_at, been


def _last_mention(prompt: str) -> list[str]:
    """Of the words that could be the answer the one that the story names last; none if it names none."""
    story, question = prompt.rsplit('\n', 1)
    kind = PEOPLE + GIVERS if 'Who' in question else OBJECTS if 'What did' in question else PLACES
    facts = ' '.join(match[0] for match in re.finditer(f'{_FACT.pattern}|{_BESIDE.pattern}', story))
    return re.findall(rf'\b(?:{"|".join(kind)})\b', facts)[-1:]


def _reachable(world: _World, person: str) -> list[str]:
    """What a person holds, and what lies where the person is, or anywhere as far as told."""
    if person not in world.places:
        return []
    here = lambda thing: world.trails.get(thing, [world.places[person]])[-1] == world.places[person]
    return [thing for thing in OBJECTS if world.holders.get(thing) == person or thing not in world.holders and here(thing)]


def _handle(rng: np.random.Generator, world: _World, person: str, thing: str, gifts: bool) -> str:
    if thing not in world.holders:
        world.take(person, thing)
        return _act(rng, person, _TAKES, thing)
    near = [other for other in GIVERS if other != person and world.places.get(other, world.places[person]) == world.places[person]]
    if gifts and near and rng.random() < 1 / 2:
        receiver = near[rng.integers(len(near))]
        world.give(person, thing, receiver)
        return f'{person} {_GIVES[rng.integers(len(_GIVES))]} the {thing} to {receiver}.'
    world.leave(thing)
    return _act(rng, person, _LEAVES, thing)


def _act(rng: np.random.Generator, person: str, verbs: tuple[str, ...], thing: str) -> str:
    return f'{person} {verbs[rng.integers(len(verbs))]} the {thing}{rng.choice(["", " there"])}.'


def _move(rng: np.random.Generator, world: _World, person: str) -> str:
    elsewhere = [place for place in PLACES if place != world.places.get(person)]
    place = elsewhere[rng.integers(len(elsewhere))]
    world.move(person, place)
    return f'{person} {_MOVES[rng.integers(len(_MOVES))]} to the {place}.'


def _askable(world: _World, question: str) -> list[tuple[str, str]]:
    """What may be asked for, each with its answer."""
    if question == 'qa1':
        return [(f'Where is {person}?', place) for person, place in world.places.items()]
    if question == 'qa2':
        return [(f'Where is the {thing}?', trail[-1]) for thing, trail in world.trails.items()]
    if question == 'qa3':
        # The place before the last visit, for places the object has come to from another.
        came_from = {(thing, to): was for thing, trail in world.trails.items() for was, to in zip(trail, trail[1:], strict=False)}
        return [(f'Where was the {thing} before the {to}?', was) for (thing, to), was in came_from.items()]
    asked = {}
    for person, thing, receiver in world.gifts:  # the last that fits is the answer
        asked[f'What did {person} give to {receiver}?'] = thing
        asked[f'Who gave the {thing} to {receiver}?'] = asked[f'Who gave the {thing}?'] = person
        asked[f'Who did {person} give the {thing} to?'] = asked[f'Who received the {thing}?'] = receiver
    return list(asked.items())


def _tell_row(rng: np.random.Generator, num_facts: int) -> tuple[list[str], list[tuple[str, str]]]:
    """Sentences on neighbours in a row of places, and all questions that they answer, each with the answer."""
    row = [PLACES[place] for place in rng.permutation(len(PLACES))[: num_facts + 1]]
    side = ('north', 'east')[rng.integers(2)]
    facts, asked = [], []
    for one, other in zip(row, row[1:], strict=False):
        pair = [(one, side, other), (other, _OPPOSITES[side], one)]
        told, way, of = pair[rng.integers(2)]
        facts.append(f'The {told} is {way} of the {of}.')
        for place, way, of in pair:
            asked += [(f'What is {way} of the {of}?', place), (f'What is the {place} {way} of?', of)]
    return [facts[place] for place in rng.permutation(num_facts)], asked
