"""The reward table of `experiments/seal_arc.py`: what every configuration earns on every task, so that a policy's expected reward is exact.

A row of the results file is a task: the measures of all 512 configurations, and of the learner without an update. The learner is frozen:
rows say whose rewards they are, and those of two learners are not mixed.
"""

import pathlib
import time
from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.seal_arc_world import INNER, MEASURES, ROWS, SHAPES, WORLD, Solver, draw_task, model_config, train_config
from nested_jax.config import as_dict
from nested_jax.data.tasks.grid_rules import FAMILIES, configurations, edit_text
from nested_jax.evaluation.rows import append_row, config_digest, hardware_name, make_row, read_rows
from nested_jax.models.language_model import LanguageModel
from nested_jax.seal.outer_loop import digest
from nested_jax.seal.self_edits import Configuration, parse_configuration

PyTree = Any
EXPERIMENT = 'seal_arc_table'
HELD_OUT = tuple(name for name, family in FAMILIES.items() if not family.seen)
# By split, the families of its tasks: of one kind a single configuration may serve all, of all kinds each may want another.
SPLITS = {'one kind': tuple(name for name in HELD_OUT if FAMILIES[name].kind == 'colour'), 'all kinds': HELD_OUT}
LEAST = len(HELD_OUT) + 1  # tasks, from the first, of which each split has one for training and one for the test


class TableError(ValueError):
    """A file of rewards, or a choice of tasks, that policies cannot be compared on."""


class Table(NamedTuple):
    """Rewards of a frozen learner, by task."""

    learner: str  # digest
    indices: tuple[int, ...]  # (C,) of tasks
    measures: np.ndarray  # (C, 512, 3) in the order of `MEASURES`
    base: np.ndarray  # (C, 3) of the learner without an update


def family_of(index: int) -> str:
    """Families take turns."""
    return HELD_OUT[index % len(HELD_OUT)]


def is_test(index: int) -> bool:
    """Every second turn is the test's."""
    return index // len(HELD_OUT) % 2 == 1


def table_config(pretraining_steps: int, model_seed: int, index: int) -> dict:
    """Everything that decides a task's rewards."""
    return dict(
        world=as_dict(WORLD), model=as_dict(model_config()), train=as_dict(train_config(pretraining_steps)), inner=as_dict(INNER),
        rows=ROWS, shapes=[list(shape) for shape in SHAPES], seed=model_seed, task=index,
    )  # fmt: skip


def all_edits() -> list[Configuration]:
    """(512,) in the order of `configurations`."""
    return [parse_configuration(edit_text(tokens)) for tokens in configurations()]


def build_table(params: PyTree, indices: Iterable[int], pretraining_steps: int, model_seed: int, path: pathlib.Path) -> None:
    """Adds a row for each task that has none.

    Args:
        params: of the learner.
        indices: of the tasks.
        pretraining_steps, model_seed: of the learner, for the rows.
        path: of the rows.

    Raises:
        TableError: when the file has rows of another learner, or other content.
    """
    solver, edits, learner, rows = Solver(LanguageModel(model_config())), all_edits(), digest(params), _rows(path)
    check_learner(rows.values(), learner, path)
    for index in indices:
        config, began = table_config(pretraining_steps, model_seed, index), time.monotonic()
        if config_digest(config) in rows:
            continue
        task = draw_task(index, family_of(index))
        found, base = solver.rewards(params, task, edits, index), solver.base(params, task)
        metrics = dict(family=family_of(index), learner=learner, base=base.tolist(), **_pack(found))
        told = dict(seed=model_seed, config=config, metrics=metrics, hardware=hardware_name(jax.devices()), wall_s=time.monotonic() - began)
        append_row(path, make_row(experiment=EXPERIMENT, model='transformer', **told))
        best, mean = found[:, 0].max(), found[:, 0].mean()
        said = f'task {index} ({family_of(index)}): without an update {base[0]:.0f}, mean {mean:.3f}, best {best:.0f}'
        print(f'{said}   {time.monotonic() - began:.0f} s', flush=True)


def task_rows(path: pathlib.Path, pretraining_steps: int, model_seed: int, tasks: int) -> dict[int, dict]:
    """The rows of one learner by task, of the first `tasks` tasks those that have one.

    Raises:
        TableError: for a file of other content.
    """
    rows = _rows(path)
    keys = {index: config_digest(table_config(pretraining_steps, model_seed, index)) for index in range(tasks)}
    return {index: rows[key] for index, key in keys.items() if key in rows}


def check_learner(rows: Iterable[dict], learner: str, path: pathlib.Path) -> None:
    """Raises TableError where a row of the file is of another learner than the one of this digest."""
    others = {row['metrics']['learner'] for row in rows} - {learner}
    if others:
        raise TableError(f'table is {path} with rows of learner {min(others)[:12]}, allowed is rows of learner {learner[:12]} alone')


def check_splits(indices: Collection[int]) -> None:
    """Raises TableError where a split has no training or no test task among these."""
    for split, families in SPLITS.items():
        train, test = (sum(_belongs(index, families, test=half) for index in indices) for half in (False, True))
        if not (train and test):
            had = f'{train} training and {test} test tasks of {split}'
            raise TableError(f'tasks is {len(indices)} with {had}, allowed is at least one of either: {LEAST} tasks or more')


def as_table(rows: dict[int, dict]) -> Table:
    """The rewards of one learner, in the order of the tasks' numbers.

    Args:
        rows: by task, as `task_rows` has them; at least one.

    Raises:
        TableError: for rows of several learners.
    """
    indices = tuple(sorted(rows))
    metrics = [rows[index]['metrics'] for index in indices]
    learners = {each['learner'] for each in metrics}
    if len(learners) > 1:
        raise TableError(f'table is one of {len(learners)} learners, allowed is one learner, as --build-table has it')
    return Table(learners.pop(), indices, np.stack(list(map(_unpack, metrics))), np.array([each['base'] for each in metrics]))


def select(table: Table, families: Sequence[str], *, test: bool) -> Table:
    """The tasks of a split's half."""
    places = [place for place, index in enumerate(table.indices) if _belongs(index, families, test=test)]
    indices = tuple(table.indices[place] for place in places)
    return table._replace(indices=indices, measures=table.measures[places], base=table.base[places])


def _belongs(index: int, families: Sequence[str], *, test: bool) -> bool:
    return family_of(index) in families and is_test(index) == test


def _rows(path: pathlib.Path) -> dict[str, dict]:
    """Rows of a table by their digest."""
    allowed = 'allowed is a file of rows that --build-table made'
    try:
        rows = {row['config_digest']: row for row in read_rows(path)}
        others = {row['experiment'] for row in rows.values()} - {EXPERIMENT}
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise TableError(f'table is {path}, {allowed} ({error!r})') from None
    if others:
        raise TableError(f'table is {path} with rows of {min(others)}, {allowed}')
    return rows


def _pack(found: np.ndarray) -> dict[str, Any]:
    """Measures (512, 3) of one test input: right or wrong as digits, shares of cells in hundredths."""
    digits = lambda column: ''.join('1' if value else '0' for value in column)
    return dict(vote=digits(found[:, 0]), solved=digits(found[:, 1]), cells=np.rint(100 * found[:, 2]).astype(int).tolist())


def _unpack(metrics: dict) -> np.ndarray:
    columns = [[int(digit) for digit in metrics[name]] for name in MEASURES[:2]]
    return np.stack([*columns, np.array(metrics['cells']) / 100], -1).astype(float)


def random_table(tasks: int) -> Table:
    """Rewards drawn at random, for smoke runs."""
    rng = np.random.default_rng(0)
    right = rng.integers(2, size=(tasks, len(configurations()), len(MEASURES))).astype(float)
    return Table('random', tuple(range(tasks)), right, np.zeros((tasks, len(MEASURES))))
