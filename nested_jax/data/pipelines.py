"""From documents of tokens to batches: shuffle, pack into rows, batch, share out to processes, prefetch.

An epoch is one long stream: the documents in shuffled order, each starting on a multiple of `grid`, cut every `length` tokens into
rows. The rows are shuffled again, so that a batch mixes documents, and batches take them in turn, one epoch after the other
without a gap. A document that a cut goes through continues in another row as a fresh segment; the target of a row's last token
is the document's next token all the same, so every token but a document's first is a target exactly once in an epoch.

Everything is a pure function of the seed and the step: `batches[step]` needs no history, and resuming is indexing. Batches are
dicts of arrays (batch, length): tokens, targets and segment_ids int32, weights float32. Segments count from 1 in each row; 0 is
padding (token 0, weight 0), which lies between the end of a document and the next multiple of `grid`, and after an epoch's last.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from nested_jax.data.documents import TokenDocuments

if TYPE_CHECKING:
    import grain  # it imports jax, which takes seconds: bad input is to be met before

Batch = dict[str, np.ndarray]
# Training has no end; grain wants a length, and wraps around there.
_ENDLESS = 2**62


class _Layout(NamedTuple):
    """Where the documents of an epoch lie in its stream."""

    order: np.ndarray  # (N,) document at each place
    starts: np.ndarray  # (N,) its first position in the stream
    rows: np.ndarray  # (R,) the row of the stream that is read in turn


def _permutation(count: int, *seeds: int) -> np.ndarray:
    """Shuffled 0 ... count - 1. RandomState because its numbers, unlike Generator's, are frozen across versions of numpy."""
    return np.random.RandomState(list(seeds)).permutation(count)


class PackedRows:
    """The rows of every epoch, with random access.

    Args:
        documents: to pack.
        length: tokens of a row, T.
        grid: documents start on multiples of it within a row; T is one too.
        seed: of the shuffles; None keeps documents and rows in order.

    Raises:
        ValueError: for a length below 2, a grid that does not divide it, a seed outside [0, 2**32), or no text at all.
    """

    def __init__(self, documents: TokenDocuments, length: int, *, grid: int = 1, seed: int | None = None):
        _check_layout(length, grid, seed)
        self.rows_per_epoch = rows_per_epoch(documents, length=length, grid=grid)
        self.documents, self.length, self.grid, self.seed = documents, length, grid, seed
        self._layout = functools.lru_cache(maxsize=2)(self._layout_of_epoch)

    def _layout_of_epoch(self, epoch: int) -> _Layout:
        count = len(self.documents.lengths)
        if self.seed is None:
            order, rows = np.arange(count), np.arange(self.rows_per_epoch)
        else:
            order, rows = _permutation(count, self.seed, epoch, 0), _permutation(self.rows_per_epoch, self.seed, epoch, 1)
        room = _rounded_up(self.documents.lengths[order], self.grid)
        return _Layout(order, np.cumsum(room) - room, rows)

    def __getitem__(self, index: int) -> Batch:
        """Row of a running index over all epochs: arrays (T,)."""
        epoch, turn = divmod(int(index), self.rows_per_epoch)
        layout = self._layout(epoch)
        row = self.empty_row()
        first = int(layout.rows[turn]) * self.length
        place, segment = int(np.searchsorted(layout.starts, first, 'right')) - 1, 0
        while place < len(layout.starts) and layout.starts[place] < first + self.length:
            start = int(layout.starts[place]) - first  # in the row; negative where the document began in an earlier one
            segment += self._fill(row, int(layout.order[place]), start, segment + 1)
            place += 1
        return row

    def _fill(self, row: Batch, document: int, start: int, segment: int) -> bool:
        """Write what the row holds of a document that starts at `start`; False if that is nothing."""
        begin, skipped = max(start, 0), max(-start, 0)
        count = min(int(self.documents.lengths[document]) - skipped, self.length - begin)
        if count <= 0:
            return False
        tokens = self.documents.read(document, skipped, skipped + count + 1)
        targets = tokens[1 : count + 1]
        row['tokens'][begin : begin + count] = tokens[:count]
        row['segment_ids'][begin : begin + count] = segment
        row['targets'][begin : begin + len(targets)] = targets
        row['weights'][begin : begin + len(targets)] = 1
        return True

    def empty_row(self) -> Batch:
        """A row of padding."""
        row = {name: np.zeros(self.length, np.int32) for name in ('tokens', 'targets', 'segment_ids')}
        return row | {'weights': np.zeros(self.length, np.float32)}


class _ProcessRows:
    """The rows one process reads, in its order: its share of every global batch.

    Args:
        rows: of all processes.
        batch_size: of the global batch.
        share: which of every batch's rows.
        num_rows: where they end; the last batch is filled with padding.
    """

    def __init__(self, rows: PackedRows, batch_size: int, share: tuple[int, ...], num_rows: int = _ENDLESS):
        self._rows, self._batch_size, self._share, self._num_rows = rows, batch_size, share, num_rows

    def __len__(self) -> int:
        return -(-self._num_rows // self._batch_size) * len(self._share)

    def __getitem__(self, index: int) -> Batch:
        batch, turn = divmod(int(index), len(self._share))
        row = batch * self._batch_size + self._share[turn]
        return self._rows[row] if row < self._num_rows else self._rows.empty_row()


def rows_per_epoch(documents: TokenDocuments, *, length: int, grid: int = 1) -> int:
    """Rows of `length` tokens that an epoch fills, the last one perhaps in part.

    Raises:
        ValueError: see `PackedRows`.
    """
    _check_layout(length, grid, None)
    if not (total := int(_rounded_up(documents.lengths, grid).sum())):
        raise ValueError('documents hold no tokens')
    return -(-total // length)


def training_batches(
    documents: TokenDocuments,
    *,
    length: int,
    batch_size: int,
    grid: int = 1,
    seed: int = 0,
    share: Sequence[int] | None = None,
) -> grain.MapDataset:
    """Endless shuffled batches with random access: `training_batches(...)[step]`.

    A global batch is the same whatever the number of processes that read a share of it each.

    Args:
        documents: to train on.
        length: tokens of a row, T.
        batch_size: rows of the global batch, B.
        grid: where documents may start (`ModelConfig.grid`).
        seed: of the shuffles.
        share: the rows of every batch that this process reads, ascending; None: all.

    Returns:
        A data set of batches (rows of the share, T).

    Raises:
        ValueError: see `PackedRows`; for a share that is no part of a batch, and text too short for one batch.
    """
    share = _checked_share(batch_size, share)
    rows = PackedRows(documents, length, grid=grid, seed=seed)
    if rows.rows_per_epoch < batch_size:
        held = f'{documents.num_tokens} tokens fill {rows.rows_per_epoch} rows of length={length}'
        raise ValueError(f'batch_size={batch_size}: {held}; allowed: at most {rows.rows_per_epoch}')
    return _batched(_ProcessRows(rows, batch_size, share), len(share))


def evaluation_batches(
    documents: TokenDocuments,
    *,
    length: int,
    batch_size: int,
    max_tokens: int | None = None,
    grid: int = 1,
    share: Sequence[int] | None = None,
) -> grain.MapDataset:
    """Batches of held-out text in order, each token but a document's first a target exactly once.

    The last batch is filled with rows of weight 0, so that all have one shape.

    Args:
        documents: to evaluate on.
        length: tokens of a row, T.
        batch_size: rows of the global batch, B.
        max_tokens: evaluate on the rows that hold the first so many; None: on all.
        grid: see `training_batches`.
        share: see `training_batches`.

    Returns:
        A finite data set of batches (rows of the share, T).

    Raises:
        ValueError: see `training_batches`; for max_tokens below 1.
    """
    share = _checked_share(batch_size, share)
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f'max_tokens={max_tokens}; allowed: at least 1, or None for all')
    rows = PackedRows(documents, length, grid=grid)
    num_rows = rows.rows_per_epoch if max_tokens is None else min(rows.rows_per_epoch, -(-max_tokens // length))
    return _batched(_ProcessRows(rows, batch_size, share, num_rows), len(share))


def batch_iterator(batches: grain.MapDataset, *, start: int = 0, threads: int = 2, prefetch: int = 8) -> grain.DatasetIterator:
    """Iterate from a step on, reading ahead in threads.

    `get_state()` and `set_state(state)` of the iterator are exact; its state fits in JSON and in an orbax checkpoint.

    Args:
        batches: of `training_batches` or `evaluation_batches`.
        start: step of the first batch.
        threads: that read batches.
        prefetch: batches read ahead at most.

    Raises:
        ValueError: for a negative start, or no thread or batch to read ahead with.
    """
    if start < 0:
        raise ValueError(f'start={start}; allowed: at least 0')
    if threads < 1 or prefetch < 1:
        raise ValueError(f'threads={threads}, prefetch={prefetch}; allowed: at least 1 each')
    import grain

    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch)
    iterator = iter(batches.to_iter_dataset(options))
    iterator.set_state({**iterator.get_state(), 'next_index': start})
    return iterator


def _batched(rows: _ProcessRows, size: int) -> grain.MapDataset:
    import grain

    return grain.MapDataset.source(rows).batch(size)


def _rounded_up(lengths: np.ndarray, grid: int) -> np.ndarray:
    return -(-lengths // grid) * grid


def _check_layout(length: int, grid: int, seed: int | None) -> None:
    if length < 2:
        raise ValueError(f'length={length}; allowed: at least 2')
    if grid < 1 or length % grid:
        raise ValueError(f'length={length}; allowed: multiples of the grid {grid} on which documents start')
    if seed is not None and not 0 <= seed < 2**32:
        raise ValueError(f'seed={seed}; allowed: 0 to {2**32 - 1}')


def _checked_share(batch_size: int, share: Sequence[int] | None) -> tuple[int, ...]:
    if batch_size < 1:
        raise ValueError(f'batch_size={batch_size}; allowed: at least 1')
    rows = tuple(range(batch_size)) if share is None else tuple(int(row) for row in share)
    if not rows or list(rows) != sorted(set(rows)) or rows[0] < 0 or rows[-1] >= batch_size:
        raise ValueError(f'share={rows}; allowed: some of the rows 0 to {batch_size - 1}, ascending')
    return rows
