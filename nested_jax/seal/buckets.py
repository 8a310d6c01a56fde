"""Candidates of the inner update laid out in buckets of equal shape, instead of padding every sequence to one length.

A candidate is a few short sequences. When each step reads all of them they share rows, several to a row; documents of a row are
independent in every model, and the loss is a mean over tokens, so this changes nothing but the work. When a step reads only some rows
(`rows_per_step`), each sequence has a row of its own, and the order in which they come is settled here, by the candidate's own seed.

Letters in shapes: K candidates, R rows, T tokens, N rows a step, S steps until the rows come again.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from nested_jax.config import check


@dataclasses.dataclass(frozen=True)
class Candidate:
    """What one self-edit has the model learn.

    Raises:
        ValueError: naming the field, its value and what is allowed.
    """

    sequences: tuple[tuple[int, ...], ...]  # tokens, at least two each
    learning_rate: float
    steps: int
    seed: int = 0  # of the adapter's start and of the order of the rows
    prompt_lengths: tuple[int, ...] | None = None  # tokens at the front of each sequence that are not learned; None: none

    def __post_init__(self):
        check(bool(self.sequences), 'sequences', self.sequences, 'at least one')
        short = next((sequence for sequence in self.sequences if len(sequence) < 2), None)
        check(short is None, 'sequences', short, 'sequences of at least two tokens')
        check(self.learning_rate >= 0, 'learning_rate', self.learning_rate, 'a number of at least 0')
        check(self.steps >= 0, 'steps', self.steps, 'an integer of at least 0')
        lengths, counts = self.prompt_lengths, [len(sequence) for sequence in self.sequences]
        fits = lengths is None or (len(lengths) == len(counts) and all(0 <= n < count for n, count in zip(lengths, counts, strict=True)))
        check(fits, 'prompt_lengths', lengths, 'one for each sequence, shorter than it')


class Batch(NamedTuple):
    """Candidates of one bucket; arrays lead with K."""

    tokens: jax.Array  # (K, R, T) int32
    targets: jax.Array  # (K, R, T) int32
    weights: jax.Array  # (K, R, T) float32: 1 where the target is learned
    segment_ids: jax.Array  # (K, R, T) int32: sequences of a row, from 1, what follows each being its own; 0 in a row of none
    rows: jax.Array  # (K, S, N) int32: what steps read, from the first one again after S; -1 is no row
    learning_rate: jax.Array  # (K,) float32
    steps: jax.Array  # (K,) int32
    seed: jax.Array  # (K,) uint32


def buckets(
    candidates: Sequence[Candidate],
    *,
    rows_per_step: int | None = None,
    grid: int = 1,
    at_most: int = 64,
    shape: tuple[int, int] | None = None,
) -> Iterator[tuple[list[int], Batch]]:
    """Lays candidates out in batches of equal shape.

    Rows and tokens are rounded up to a power of two or one and a half of it, candidates to a power of four, so that few programs are
    compiled; places without a candidate hold one that takes no step. Candidates of a batch take about equally many steps.

    Args:
        candidates: in any order; those of a bucket keep it.
        rows_per_step: sequences that each step reads, epoch by epoch without repetition; None: all.
        grid: the model's, `config.grid`; sequences that share a row begin on its multiples.
        at_most: candidates in one batch.
        shape: rows and tokens of a bucket for all candidates that fit into it, which saves programs; None: each has the smallest.

    Yields:
        The candidates' places in `candidates`, and their batch, in which they come first.

    Raises:
        ValueError: for batches of no candidates, or steps of no rows.
    """
    check(at_most >= 1, 'at_most', at_most, 'an integer of at least 1')
    check(rows_per_step is None or rows_per_step >= 1, 'rows_per_step', rows_per_step, 'an integer of at least 1 or None')
    layouts = [_layout(candidate, grid, packed=rows_per_step is None, shape=shape) for candidate in candidates]
    shapes: dict[tuple, list[int]] = {}
    for place, (candidate, layout) in enumerate(zip(candidates, layouts, strict=True)):
        shapes.setdefault((layout.num_rows, layout.length, round_up(candidate.steps)), []).append(place)
    for (rows, length, steps), places in sorted(shapes.items()):
        for start in range(0, len(places), at_most):
            part = places[start : start + at_most]
            filled = [_fill(candidates[place], layouts[place], rows, length) for place in part]
            plans = [_plan(candidates[place], layouts[place], rows, steps, rows_per_step) for place in part]
            yield part, _stack([candidates[place] for place in part], filled, plans, min(_power_of_four(len(part)), at_most))


def real_share(batch: Batch) -> float:
    """Share of the places a bucket's steps compute that hold a token to learn from."""
    rows, steps = np.asarray(batch.rows), np.asarray(batch.steps)
    real = (np.asarray(batch.weights) > 0).sum(-1)  # (K, R)
    read = (np.take_along_axis(real[:, None], np.maximum(rows, 0), -1) * (rows >= 0)).sum(-1)  # (K, S)
    index = np.arange(max(steps.max(), 1))
    taken = read[:, index % rows.shape[1]] * (index[None] < steps[:, None])
    return float(taken.sum() / (taken.size * rows.shape[2] * batch.tokens.shape[-1]))


def round_up(count: int) -> int:
    """The next power of two, or one and a half of one: 1, 2, 3, 4, 6, 8, 12, ..."""
    power = 1 << max(count - 1, 0).bit_length()
    return 3 * power // 4 if power >= 4 and count <= 3 * power // 4 else power


def _power_of_four(count: int) -> int:
    return 4 ** (((count - 1).bit_length() + 1) // 2)


class _Layout(NamedTuple):
    """Where a candidate's sequences lie."""

    places: list[tuple[int, int, int]]  # of each sequence: row, first token, number within its row from 1
    real_rows: int
    num_rows: int  # rounded up
    length: int  # rounded up


def _layout(candidate: Candidate, grid: int, *, packed: bool, shape: tuple[int, int] | None) -> _Layout:
    """First fit, longest sequence first, in rows as long as the longest or up to four times that, whichever takes fewest places."""
    counts = [len(sequence) - 1 for sequence in candidate.sequences]
    longest = round_up(max(counts))

    def of_length(length: int) -> _Layout:
        if packed:
            return _packed(counts, length, grid)
        return _Layout([(row, 0, 1) for row in range(len(counts))], len(counts), round_up(len(counts)), length)

    if shape is not None and max(counts) <= shape[1] and (given := of_length(shape[1])).real_rows <= shape[0]:
        return given._replace(num_rows=shape[0])
    lengths = {round_up(longest * halves // 2) for halves in (2, 3, 4, 6, 8)} if packed else {longest}
    return min(map(of_length, sorted(lengths)), key=lambda layout: layout.num_rows * layout.length)


def _packed(counts: list[int], length: int, grid: int) -> _Layout:
    ends, numbers, places = [], [], [(0, 0, 0)] * len(counts)
    for index in sorted(range(len(counts)), key=lambda index: -counts[index]):
        starts = [-(-end // grid) * grid for end in ends]
        row = next((row for row, start in enumerate(starts) if start + counts[index] <= length), len(ends))
        if row == len(ends):
            ends.append(0), numbers.append(0), starts.append(0)
        ends[row], numbers[row] = starts[row] + counts[index], numbers[row] + 1
        places[index] = (row, starts[row], numbers[row])
    return _Layout(places, len(ends), round_up(len(ends)), length)


def _fill(candidate: Candidate, layout: _Layout, rows: int, length: int) -> tuple[np.ndarray, ...]:
    """tokens, targets, weights and segment_ids (R, T)."""
    tokens, targets, segments = (np.zeros((rows, length), np.int32) for _ in range(3))
    weights = np.zeros((rows, length), np.float32)
    skipped = candidate.prompt_lengths or (0,) * len(candidate.sequences)
    for sequence, (row, start, number), prompt in zip(candidate.sequences, layout.places, skipped, strict=True):
        here = slice(start, start + len(sequence) - 1)
        tokens[row, here], targets[row, here] = sequence[:-1], sequence[1:]
        # Up to the next sequence the row goes on with this one: a document may not begin off the grid.
        segments[row, start:] = np.maximum(segments[row, start:], number)
        weights[row, start + max(prompt - 1, 0) : here.stop] = 1.0
    return tokens, targets, weights, segments


def _plan(candidate: Candidate, layout: _Layout, rows: int, steps: int, rows_per_step: int | None) -> np.ndarray:
    """(S, N) rows: all of them in every step, or epochs in an order of the candidate's seed, one after another."""
    if rows_per_step is None:
        return np.where(np.arange(rows) < layout.real_rows, np.arange(rows), -1).astype(np.int32)[None]
    rng, order = np.random.default_rng(candidate.seed), np.zeros(0, np.int32)
    while order.size < steps * rows_per_step:
        order = np.concatenate([order, rng.permutation(layout.real_rows).astype(np.int32)])
    return order[: steps * rows_per_step].reshape(steps, rows_per_step)


def _stack(candidates: list[Candidate], filled: list[tuple], plans: list[np.ndarray], size: int) -> Batch:
    """A batch of `size` places, those after the candidates holding the first one again, with no step to take."""
    again = [0] * (size - len(candidates))
    places = [*range(len(candidates)), *again]
    arrays = [np.stack([filled[place][field] for place in places]) for field in range(4)]
    rate, seed = (np.array([getattr(candidates[place], name) for place in places]) for name in ('learning_rate', 'seed'))
    steps = np.array([candidate.steps for candidate in candidates] + again, np.int32)
    return Batch(*arrays, np.stack([plans[place] for place in places]), rate.astype(np.float32), steps, seed.astype(np.uint32))
