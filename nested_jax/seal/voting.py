"""Voting over the answers that a model gives to one question asked in several views (Sec. 4, arXiv:2411.07279v1).

A view is a transformation of the whole task; its answers are transformed back before they vote. The vote has two rounds: every view
proposes its most frequent answers, and all proposals are counted again.
"""

import collections
from collections.abc import Mapping, Sequence

from nested_jax.data.tasks.arc import Grid

IDENTITY = 'identity'
PROPOSALS = 3  # of each view


def vote(answers: Mapping[str, Sequence[Grid | None]], submitted: int = 2) -> list[Grid]:
    """The answers that are submitted, best first.

    Args:
        answers: by view, `IDENTITY` being the task as it is; None where an answer is no grid.
        submitted: how many at most.

    Returns:
        Those that most views propose, all views together counting as one more; of equals the one that the identity gave more often,
        then the one given more often at all, then the one met first. A view that does not tell which answers to propose proposes grids
        made of their most frequent rows, and columns. Fewer than `submitted` when there are fewer, none without a grid.
    """
    by_view = {view: [grid for grid in given if grid is not None] for view, given in answers.items()}
    everything = [grid for given in by_view.values() for grid in given]
    proposed = collections.Counter(grid for given in (everything, *by_view.values()) for grid in _proposals(given))
    own, total = collections.Counter(by_view.get(IDENTITY, ())), collections.Counter(everything)
    return sorted(proposed, key=lambda grid: (-proposed[grid], -own[grid], -total[grid]))[:submitted]


def _proposals(given: Sequence[Grid]) -> list[Grid]:
    """The most frequent answers; where more of them are equally frequent than there is room for, the two majorities come before these."""
    counts = collections.Counter(given).most_common()
    if len(counts) <= PROPOSALS or counts[PROPOSALS - 1][1] > counts[PROPOSALS][1]:
        return [grid for grid, _ in counts[:PROPOSALS]]
    clear = [grid for grid, count in counts if count > counts[PROPOSALS][1]]
    common = collections.Counter(map(_shape, given)).most_common(1)[0][0]
    alike = [grid for grid in given if _shape(grid) == common]
    columns = _most_frequent([tuple(zip(*grid, strict=True)) for grid in alike])
    majorities = _most_frequent(alike), tuple(zip(*columns, strict=True))
    return list(dict.fromkeys([*clear, *majorities, *(grid for grid, _ in counts)]))[:PROPOSALS]


def _shape(grid: Grid) -> tuple[int, int]:
    return len(grid), len(grid[0])


def _most_frequent(grids: Sequence[Grid]) -> Grid:
    """Each row as most of the grids have it, the first of equals."""
    return tuple(collections.Counter(rows).most_common(1)[0][0] for rows in zip(*grids, strict=True))
