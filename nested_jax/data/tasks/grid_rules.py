"""A world of small grid tasks in the form of ARC's: rules of several families, drawn anew for each task, and words for self-edits.

A family is a kind of rule ('gravity'), a rule one of its cases ('gravity to the left'). What a family's rules have to do with rotations,
mirror images, colours and sizes is known, and so what transformed copies of a task can teach about it. A model is pre-trained on tasks
of the `SEEN` families and meets those of the others for the first time in a task's demonstrations. No network, nothing stored.

A self-edit is a configuration of the training on a task's demonstrations, in nine tokens: CONFIGURE, a word for each field, DONE.
"""

import dataclasses
import itertools
import json
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from nested_jax.data.tasks.arc import VOCAB_SIZE, Grid, Pair, Task, answer, encode

Array = np.ndarray
Draw = Callable[[np.random.Generator], Callable[[Array], Array]]
Kind = Literal['colour', 'turn', 'direction', 'size']
NUM_COLOURS = 6  # the background included
_AXES_AND_ENDS = ((0, -1), (0, 1), (1, -1), (1, 1))  # up, down, left, right


class Family(NamedTuple):
    """A kind of rule."""

    kind: Kind
    seen: bool  # in pre-training
    draw: Draw  # one of its rules


def _colours(rng: np.random.Generator, count: int) -> list[int]:
    return (1 + rng.permutation(NUM_COLOURS - 1)[:count]).tolist()


def _recolour(rng: np.random.Generator) -> Callable[[Array], Array]:
    old, new = _colours(rng, 2)
    return lambda grid: np.where(grid == old, new, grid)


def _swap(rng: np.random.Generator) -> Callable[[Array], Array]:
    one, other = _colours(rng, 2)
    return lambda grid: np.where(grid == one, other, np.where(grid == other, one, grid))


def _keep(rng: np.random.Generator) -> Callable[[Array], Array]:
    colour = _colours(rng, 1)[0]
    return lambda grid: np.where(grid == colour, grid, 0)


def _remove(rng: np.random.Generator) -> Callable[[Array], Array]:
    colour = _colours(rng, 1)[0]
    return lambda grid: np.where(grid == colour, 0, grid)


def _fill(rng: np.random.Generator) -> Callable[[Array], Array]:
    colour = _colours(rng, 1)[0]
    return lambda grid: np.where(grid == 0, colour, grid)


def _paint(rng: np.random.Generator) -> Callable[[Array], Array]:
    colour = _colours(rng, 1)[0]
    return lambda grid: np.where(grid > 0, colour, 0)


def _mirror(rng: np.random.Generator) -> Callable[[Array], Array]:
    axis = int(rng.integers(2))
    return lambda grid: np.flip(grid, axis)


def _rotate(rng: np.random.Generator) -> Callable[[Array], Array]:
    turns = int(rng.integers(1, 4))
    return lambda grid: np.rot90(grid, turns)


def _transpose(rng: np.random.Generator) -> Callable[[Array], Array]:
    turns = 2 * int(rng.integers(2))
    return lambda grid: np.rot90(grid, turns).T


def _gravity(rng: np.random.Generator) -> Callable[[Array], Array]:
    axis, end = _AXES_AND_ENDS[rng.integers(4)]

    def fall(grid: Array) -> Array:
        order = np.argsort((grid > 0) * end, axis=axis, kind='stable')
        return np.take_along_axis(grid, order, axis)

    return fall


def _shift(rng: np.random.Generator) -> Callable[[Array], Array]:
    axis, end = _AXES_AND_ENDS[rng.integers(4)]
    return lambda grid: np.roll(grid, end, axis)


def _ray(rng: np.random.Generator) -> Callable[[Array], Array]:
    """What is coloured runs on over the background, in one direction, to the next coloured cell."""
    axis, end = _AXES_AND_ENDS[rng.integers(4)]

    def extend(grid: Array) -> Array:
        lines = np.moveaxis(grid, axis, 0)[::end].copy()
        for before, line in itertools.pairwise(lines):
            line[...] = np.where(line == 0, before, line)
        return np.moveaxis(lines[::end], 0, axis)

    return extend


def _edge(rng: np.random.Generator) -> Callable[[Array], Array]:
    axis, end = _AXES_AND_ENDS[rng.integers(4)]
    colour = _colours(rng, 1)[0]

    def paint(grid: Array) -> Array:
        painted = grid.copy()
        np.moveaxis(painted, axis, 0)[0 if end < 0 else -1] = colour
        return painted

    return paint


def _crop(rng: np.random.Generator) -> Callable[[Array], Array]:
    axis, end = _AXES_AND_ENDS[rng.integers(4)]
    return lambda grid: np.take(grid, [0 if end < 0 else -1], axis)


def _stretch(rng: np.random.Generator) -> Callable[[Array], Array]:
    axis = int(rng.integers(2))
    return lambda grid: grid.repeat(2, axis)


FAMILIES: dict[str, Family] = {
    'recolour': Family('colour', True, _recolour),
    'remove': Family('colour', True, _remove),
    'paint': Family('colour', True, _paint),
    'mirror': Family('turn', True, _mirror),
    'shift': Family('direction', True, _shift),
    'ray': Family('direction', True, _ray),
    'crop': Family('size', True, _crop),
    'swap': Family('colour', False, _swap),
    'keep': Family('colour', False, _keep),
    'fill': Family('colour', False, _fill),
    'rotate': Family('turn', False, _rotate),
    'transpose': Family('turn', False, _transpose),
    'gravity': Family('direction', False, _gravity),
    'edge': Family('direction', False, _edge),
    'stretch': Family('size', False, _stretch),
}
SEEN = tuple(name for name, family in FAMILIES.items() if family.seen)

# What a self-edit says, and the values it may have, in the order in which it is written.
FIELDS: dict[str, tuple[Any, ...]] = dict(
    basic=(False, True),
    size=(False, True),
    chain=(False, True),
    repeat=(False, True),
    loss=('all', 'output'),
    learning_rate=(1e-4, 3e-4, 1e-3, 3e-3),
    epochs=(1, 2, 4, 8),
)
CONFIGURE, DONE, _WORD = range(VOCAB_SIZE, VOCAB_SIZE + 3)
_WORDS = tuple((field, value) for field, values in FIELDS.items() for value in values)
WORLD_VOCAB_SIZE = _WORD + len(_WORDS)
_AUGMENTATIONS = ('basic', 'size', 'chain', 'repeat')


def configurations() -> list[list[int]]:
    """All 512 self-edits that are well formed, DONE included, in the order of `FIELDS`, the last one's values changing first."""
    places = {word: _WORD + index for index, word in enumerate(_WORDS)}
    return [[*(places[word] for word in zip(FIELDS, values, strict=True)), DONE] for values in itertools.product(*FIELDS.values())]


def edit_text(tokens: Sequence[int]) -> str:
    """What a self-edit says, as the JSON that `seal.self_edits.parse_configuration` reads; other text where it has no form.

    It has one when every token before DONE is a word and no field is said twice; what is not said is not in the JSON.
    """
    tokens = list(tokens)
    said = [_WORDS[token - _WORD] for token in tokens[: tokens.index(DONE)] if token >= _WORD] if DONE in tokens else []
    fields = dict(said)
    if not said or len(said) < tokens.index(DONE) or len(fields) < len(said):
        return ' '.join(map(str, tokens))
    generation = {f'use_{name}_augmentations': fields[name] for name in _AUGMENTATIONS if name in fields}
    training = dict(
        strategy=f'train_using_{fields["loss"]}_tokens' if 'loss' in fields else None,
        learning_rate=fields.get('learning_rate'),
        num_train_epochs=fields.get('epochs'),
    )
    return json.dumps(dict(data_generation=generation, training=training))


@dataclasses.dataclass(frozen=True)
class World:
    """Sizes of the world.

    Raises:
        ValueError: naming the field, its value and what is allowed.
    """

    shapes: tuple[tuple[int, int], ...] = ((2, 3), (3, 2))  # of inputs, one for each task
    demonstrations: int = 3
    tests: int = 2  # inputs that are asked about
    coloured: float = 0.6  # share of an input's cells, on average
    edits: float = 0.15  # share of pre-training's documents that show a self-edit

    def __post_init__(self):
        if not self.shapes or not all(1 <= side <= 6 for shape in self.shapes for side in shape):
            raise ValueError(f'shapes is {self.shapes}, allowed is at least one pair of integers from 1 to 6')
        for name, least in dict(demonstrations=2, tests=1).items():
            if getattr(self, name) < least:
                raise ValueError(f'{name} is {getattr(self, name)}, allowed is an integer of at least {least}')
        for name in ('coloured', 'edits'):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f'{name} is {getattr(self, name)}, allowed is a number above 0 and below 1')

    def task(self, rng: np.random.Generator, family: str) -> Task:
        """A task by a rule of a family.

        Raises:
            ValueError: for a family that is not one of `FAMILIES`.
        """
        if family not in FAMILIES:
            raise ValueError(f'family is {family!r}, allowed is one of {", ".join(FAMILIES)}')
        rule, shape = FAMILIES[family].draw(rng), self.shapes[rng.integers(len(self.shapes))]
        pairs = tuple(self._pair(rng, rule, shape) for _ in range(self.demonstrations + self.tests))
        return Task(family, pairs[: self.demonstrations], pairs[self.demonstrations :])

    def row(self, rng: np.random.Generator, length: int) -> tuple[list[int], list[int]]:
        """A document of pre-training, cut or padded, and 1 where its tokens are learned.

        It is a task of a seen family, of whose outputs all but the first can be known, or its demonstrations with any self-edit.
        """
        task = self.task(rng, SEEN[rng.integers(len(SEEN))])
        if rng.random() < self.edits:
            shown, said = encode(task.train), [CONFIGURE, *_ALL[rng.integers(len(_ALL))]]
            tokens, learned = shown + said, [0] * len(shown) + [0] + [1] * (len(said) - 1)
        else:
            pairs = (*task.train, task.test[0])
            tokens, learned = encode(pairs), []
            for count in range(2, len(pairs) + 1):
                start, end = answer(pairs[:count]), len(encode(pairs[:count]))
                learned += [0] * (start - len(learned)) + [1] * (end - start)
        pad = [0] * length
        return (tokens + pad)[:length], (learned + pad)[:length]

    def _pair(self, rng: np.random.Generator, rule: Callable[[Array], Array], shape: tuple[int, int]) -> Pair:
        """An input that the rule changes, if one is found, and its output."""
        for _ in range(50):
            given = rng.integers(1, NUM_COLOURS, shape) * (rng.random(shape) < self.coloured)
            made = rule(given)
            if made.shape != given.shape or (made != given).any():
                break
        return Pair(_freeze(given), _freeze(made))


def _freeze(grid: Array) -> Grid:
    return tuple(map(tuple, grid.tolist()))


_ALL = configurations()
