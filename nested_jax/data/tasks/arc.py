"""The Abstraction and Reasoning Corpus (arXiv:1911.01547v2): tasks of coloured grids, and grids as tokens, one for each cell.

A task shows a few pairs of grids made by one rule, and asks for the outputs of test inputs. As tokens a grid is its rows, each closed by
ROW; a pair is 'input ARROW output NEXT'; a document begins with START. What is asked ends with ARROW, and its answer with NEXT.
"""

import json
import lzma
import os
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

COLOURS, LONGEST_SIDE = 10, 30
PAD, START, ROW, ARROW, NEXT, CELL = range(6)  # a cell of colour c is CELL + c
VOCAB_SIZE = CELL + COLOURS
Grid = tuple[tuple[int, ...], ...]  # rows of colours, 0 the background


class Pair(NamedTuple):
    """An input and what the rule makes of it."""

    given: Grid
    made: Grid


Pairs = tuple[Pair, ...]


class Task(NamedTuple):
    """Demonstrations, and the pairs that are asked for."""

    name: str
    train: Pairs
    test: Pairs


def load_tasks(path: str | os.PathLike) -> dict[str, Task]:
    """Tasks by name, sorted.

    Args:
        path: a folder of one JSON file for each task, or one JSON file of all by name, which may be compressed (.xz); a task is
            {'train': [{'input': rows, 'output': rows}, ...], 'test': [...]}, as published.

    Raises:
        ValueError: naming the task and what in it is not allowed, or for a path without tasks.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        found = {file.stem: json.loads(file.read_text()) for file in path.glob('*.json')}
    else:
        found = json.loads(lzma.decompress(path.read_bytes()) if path.suffix == '.xz' else path.read_bytes())
    if not found:
        raise ValueError(f'path is {path}, allowed is a folder or a file with at least one task')
    return {name: _task(name, found[name]) for name in sorted(found)}


def encode(pairs: Sequence[Pair], asked: Grid | None = None) -> list[int]:
    """Tokens of a document: its pairs, and the input that is asked about."""
    tokens = [START]
    for pair in pairs:
        tokens += [*_cells(pair.given), ARROW, *_cells(pair.made), NEXT]
    return tokens if asked is None else [*tokens, *_cells(asked), ARROW]


def answer(pairs: Sequence[Pair]) -> int:
    """Number of tokens in front of the last output of the document `encode(pairs)`."""
    return len(encode(pairs)) - len(_cells(pairs[-1].made)) - 1


def decode(tokens: Sequence[int]) -> Grid | None:
    """The grid that an answer says up to NEXT; None when it has no end, or is not rows of one length."""
    tokens = list(tokens)
    if NEXT not in tokens:
        return None
    rows: list[list[int]] = [[]]
    for token in tokens[: tokens.index(NEXT)]:
        if token == ROW:
            rows.append([])
        elif CELL <= token < VOCAB_SIZE:
            rows[-1].append(token - CELL)
        else:
            return None
    *whole, rest = rows
    fits = whole and not rest and whole[0] and len({len(row) for row in whole}) == 1
    return tuple(map(tuple, whole)) if fits else None


def _cells(grid: Grid) -> list[int]:
    return [token for row in grid for token in (*(CELL + colour for colour in row), ROW)]


def _task(name: str, told: Any) -> Task:
    parts = [told.get(part) if isinstance(told, dict) else None for part in ('train', 'test')]
    if not all(isinstance(part, list) and part for part in parts):
        raise ValueError(f"task {name} is {type(told).__name__}, allowed are lists 'train' and 'test' of at least one pair each")
    train, test = (tuple(Pair(*(_grid(name, pair, side) for side in ('input', 'output'))) for pair in part) for part in parts)
    return Task(name, train, test)


def _grid(name: str, pair: Any, side: str) -> Grid:
    rows = pair.get(side) if isinstance(pair, dict) else None
    fits = isinstance(rows, list) and 1 <= len(rows) <= LONGEST_SIDE and all(isinstance(row, list) for row in rows)
    fits = fits and len({len(row) for row in rows}) == 1 and 1 <= len(rows[0]) <= LONGEST_SIDE
    if not fits or not all(type(colour) is int and 0 <= colour < COLOURS for row in rows for colour in row):
        raise ValueError(f'task {name} has the {side} {rows!r}, allowed are 1 to 30 rows of equal length 1 to 30, colours 0 to 9')
    return tuple(map(tuple, rows))
