"""What test-time training makes of a task's demonstrations (Sec. 3, arXiv:2411.07279v1; the choices are those of the published code).

Every demonstration is asked for in turn with the others shown (leave-one-out), and with one of these left out too; transformations of
whole tasks, in four groups that a self-edit turns on or off, and permuted copies make more of them.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, NamedTuple

import numpy as np

from nested_jax.data.tasks.arc import COLOURS, LONGEST_SIDE, Grid, Pair, Pairs, encode

Group = Literal['basic', 'size', 'chain', 'repeat']
GROUPS: tuple[Group, ...] = ('basic', 'size', 'chain', 'repeat')
VIEWS = ('transpose', 'flip-0', 'flip-1', 'rotate-90', 'rotate-180')  # under which a task is also asked
MOST_ROLL = 4  # exclusive


class Augmenter(NamedTuple):
    """A transformation of grids; `invert` takes back what `apply` made."""

    name: str
    apply: Callable[[Grid], Grid]
    invert: Callable[[Grid], Grid]


def augmenters(rng: np.random.Generator) -> dict[Group, tuple[Augmenter, ...]]:
    """All 23 by group: 11 basic, 3 size, 6 chain, 3 repeat. The translation is drawn here, once for all grids of a task."""
    rolls = tuple(int(roll) for roll in rng.integers(MOST_ROLL, size=2))
    back = tuple(-roll for roll in rolls)
    rigid, scales = _rigid(), _scales()
    translate = _augmenter('translate', lambda grid: np.roll(grid, rolls, (0, 1)), lambda grid: np.roll(grid, back, (0, 1)))
    transpose = rigid['transpose']
    others = [augmenter for augmenter in rigid.values() if augmenter is not transpose]
    return dict(
        basic=(*others, *_reflections(), translate, transpose),
        size=tuple(scales.values()),
        chain=tuple(_chain(augmenter, scales['resolution']) for augmenter in rigid.values()),
        repeat=tuple(_repeat(name, times) for name, times in (('rows', (2, 1)), ('columns', (1, 2)), ('both', (2, 2)))),
    )


def views() -> tuple[Augmenter, ...]:
    """Transformations under which a task is asked besides as it is, in the order of `VIEWS`."""
    rigid = _rigid()
    return tuple(rigid[name] for name in VIEWS)


def transform(pairs: Iterable[Pair], apply: Callable[[Grid], Grid]) -> Pairs:
    """Inputs and outputs alike."""
    return tuple(Pair(apply(pair.given), apply(pair.made)) for pair in pairs)


def left_out(pairs: Pairs) -> list[Pairs]:
    """N demonstrations -> N + N (N - 1) tasks whose last pair is asked for: the rest shown whole, or, from three on, all but one of it."""
    tasks = []
    for index, target in enumerate(pairs):
        rest = (*pairs[:index], *pairs[index + 1 :])
        fewer = itertools.combinations(rest, len(rest) - 1) if len(rest) > 1 else ()
        tasks += [(*shown, target) for shown in (rest, *fewer)]
    return tasks


def permuted(pairs: Pairs, rng: np.random.Generator, *, colours: bool) -> Pairs:
    """A copy with what is shown in another order and, where `colours`, other colours, the background apart."""
    order = rng.permutation(len(pairs) - 1)
    copy = (*(pairs[index] for index in order), pairs[-1])
    if not colours:
        return copy
    new = [0, *(1 + rng.permutation(COLOURS - 1)).tolist()]
    return transform(copy, lambda grid: tuple(tuple(new[colour] for colour in row) for row in grid))


def training_tasks(
    pairs: Pairs, groups: Sequence[Group], rng: np.random.Generator, *, at_most: int = 250, most_tokens: int = 8192
) -> list[Pairs]:
    """What a model is trained on before it is asked about a task.

    Args:
        pairs: the task's demonstrations, at least two.
        groups: transformations that are turned on.
        rng: of the translation, of permuted copies, of the order and of what is kept.
        at_most: tasks.
        most_tokens: of a task; longer ones are dropped.

    Returns:
        Tasks whose last pair is asked for, no two alike: those left out, each as it is, transformed, and either once more permuted;
        of colours only where a group is turned on.

    Raises:
        ValueError: for fewer than two demonstrations, no tasks to be made, or a group that is not known.
    """
    if len(pairs) < 2:
        raise ValueError(f'pairs has {len(pairs)} demonstrations, allowed are at least 2')
    unknown = set(groups) - set(GROUPS)
    if unknown or at_most < 1:
        raise ValueError(f'groups is {groups} and at_most {at_most}, allowed are some of {GROUPS} and at least 1')
    known, tasks = augmenters(rng), left_out(pairs)
    chosen = [augmenter for group in GROUPS if group in groups for augmenter in known[group]]
    tasks += [transform(task, augmenter.apply) for augmenter in chosen for task in tasks]
    tasks = [task for task in dict.fromkeys(tasks) if all(_fits(grid) for pair in task for grid in pair)]
    tasks = list(dict.fromkeys([*tasks, *(permuted(task, rng, colours=bool(chosen)) for task in tasks)]))
    short = [task for task in tasks if len(encode(task)) <= most_tokens]
    return [short[index] for index in rng.permutation(len(short))[:at_most]]


def _fits(grid: Grid) -> bool:
    return max(len(grid), len(grid[0])) <= LONGEST_SIDE


def _augmenter(name: str, apply: Callable[[np.ndarray], np.ndarray], invert: Callable[[np.ndarray], np.ndarray]) -> Augmenter:
    frozen = lambda function: lambda grid: tuple(map(tuple, function(np.array(grid)).tolist()))
    return Augmenter(name, frozen(apply), frozen(invert))


def _rigid() -> dict[str, Augmenter]:
    turns = {f'rotate-{90 * n}': ((lambda grid, n=n: np.rot90(grid, n)), (lambda grid, n=n: np.rot90(grid, -n))) for n in (1, 2, 3)}
    flips = {f'flip-{axis}': (lambda grid, axis=axis: np.flip(grid, axis),) * 2 for axis in (0, 1)}
    return {name: _augmenter(name, *both) for name, both in (turns | flips | dict(transpose=(np.transpose,) * 2)).items()}


def _scales() -> dict[str, Augmenter]:
    def scale(name: str, factors: tuple[int, int]) -> Augmenter:
        down, right = factors
        return _augmenter(name, lambda grid: grid.repeat(down, 0).repeat(right, 1), lambda grid: grid[::down, ::right])

    return {name: scale(name, factors) for name, factors in dict(resolution=(2, 2), height=(2, 1), width=(1, 2)).items()}


def _reflections() -> list[Augmenter]:
    """A mirrored copy beside the grid, on either side of it."""

    def reflect(axis: int, mirror_first: bool) -> Augmenter:
        order = -1 if mirror_first else 1
        apply = lambda grid: np.concatenate([grid, np.flip(grid, axis)][::order], axis)
        invert = lambda grid: np.split(grid, 2, axis)[1 if mirror_first else 0]
        return _augmenter(f'reflect-{axis}-{"first" if mirror_first else "last"}', apply, invert)

    return [reflect(axis, mirror_first) for axis in (0, 1) for mirror_first in (True, False)]


def _repeat(name: str, times: tuple[int, int]) -> Augmenter:
    down, right = times
    invert = lambda grid: grid[: len(grid) // down, : len(grid[0]) // right]
    return _augmenter(f'repeat-{name}', lambda grid: np.tile(grid, times), invert)


def _chain(first: Augmenter, then: Augmenter) -> Augmenter:
    """One after the other."""
    return Augmenter(f'{first.name}+{then.name}', lambda grid: then.apply(first.apply(grid)), lambda grid: first.invert(then.invert(grid)))
