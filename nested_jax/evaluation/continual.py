"""What a learner keeps of a stream of tasks: metrics of the matrix of accuracies after each task.

`matrix[i, j]` is the accuracy on task j after learning tasks 0 to i, `before[j]` that of the learner before the stream. Entries that were
not measured are NaN; a metric that needs one of them says so.
"""

from typing import NamedTuple

import numpy as np


class Continual(NamedTuple):
    """Metrics of a stream of T tasks."""

    average_accuracy: float  # over all tasks, after the last
    learning_accuracy: float  # on each task right after learning it
    backward_transfer: float  # what later tasks change of that, mean of all tasks but the last (arXiv:1706.08840v6)
    forward_transfer: float | None  # on each task just before learning it, above `before`; None where that was not measured
    forgetting: float  # what was lost since each task's best, mean of all but the last (Eq. 3, arXiv:1801.10112v3)


def continual_metrics(matrix: np.ndarray, before: np.ndarray) -> Continual:
    """All metrics.

    Args:
        matrix: (T, T), T at least 2, NaN where not measured; the lower triangle must be there.
        before: (T,).

    Raises:
        ValueError: for other shapes, or a NaN in the lower triangle.
    """
    matrix, before = _checked(matrix, before)
    last, diagonal = matrix[-1], np.diagonal(matrix)
    ahead = np.diagonal(matrix, 1) - before[1:]
    best = np.array([matrix[task:-1, task].max() for task in range(len(before) - 1)])
    return Continual(
        average_accuracy=float(last.mean()),
        learning_accuracy=float(diagonal.mean()),
        backward_transfer=float((last - diagonal)[:-1].mean()),
        forward_transfer=None if np.isnan(ahead).any() else float(ahead.mean()),
        forgetting=float((best - last[:-1]).mean()),
    )


def gain_by_lag(matrix: np.ndarray, before: np.ndarray) -> np.ndarray:
    """(T,) what a task gained over `before`, so many tasks after it was learned, mean over tasks.

    Raises:
        ValueError: as `continual_metrics`.
    """
    matrix, before = _checked(matrix, before)
    return np.array([np.mean(np.diagonal(matrix, -lag) - before[: len(before) - lag]) for lag in range(len(before))])


def intransigence(matrix: np.ndarray, joint: np.ndarray) -> float:
    """Mean of what a learner of all tasks so far together gets on the newest one above the learner of the stream (arXiv:1801.10112v3).

    Args:
        matrix: (T, T).
        joint: (T,) accuracy on task i of a learner trained on tasks 0 to i at once.

    Raises:
        ValueError: as `continual_metrics`.
    """
    matrix, joint = _checked(matrix, joint)
    return float((joint - np.diagonal(matrix)).mean())


def regressions(before: np.ndarray, after: np.ndarray) -> tuple[float, float]:
    """Shares of the questions that an update turned from wrong to right, and from right to wrong.

    Args:
        before, after: (N,) whether each question was answered rightly.

    Raises:
        ValueError: for shapes that differ, or no question.
    """
    before, after = np.asarray(before, bool), np.asarray(after, bool)
    if before.shape != after.shape or before.size == 0:
        raise ValueError(f'after has shape {after.shape}, allowed is that of before, {before.shape}, with at least one question')
    return float((after & ~before).mean()), float((before & ~after).mean())


def _checked(matrix: np.ndarray, row: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    matrix, row = np.asarray(matrix, float), np.asarray(row, float)
    if matrix.ndim != 2 or matrix.shape != (len(row), len(row)) or len(row) < 2:
        raise ValueError(f'matrix has shape {matrix.shape}, allowed is ({len(row)}, {len(row)}), at least (2, 2)')
    if np.isnan(matrix[np.tril_indices(len(row))]).any():
        raise ValueError('matrix has a NaN in its lower triangle, allowed is an accuracy on every task learned so far')
    return matrix, row
