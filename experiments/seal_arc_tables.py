"""The table and the figure of policies over configurations, from the rows of `experiments/seal_arc.py`."""

import pathlib
from collections.abc import Iterable, Sequence

import numpy as np
from matplotlib.figure import Figure

from experiments.racing import interval
from experiments.tables import check_same

Bounds = tuple[float, float, float]  # mean, lower and upper bound


def arc_table(rows: list[dict]) -> list[str]:
    """Lines of a table for each set of tasks, the largest first, an empty one between two; none without rows.

    It has a column for the expected reward on each split and one for what it is above the best constant.

    Raises:
        ValueError: naming a setting in which two seeds differ.
    """
    lines = []
    for alike in _by_tasks(rows):
        lines += [''] if lines else []
        lines += _one_table(_by_seed(alike))
    return lines


def _one_table(runs: list[dict]) -> list[str]:
    splits = runs[0]['metrics']['splits']
    heads = [f'{split}, %' for split in splits], [f'{split}, above the best constant' for split in splits]
    heads = [head for pair in zip(*heads, strict=True) for head in pair]
    title = f'expected vote pass@2 on test tasks (n = {len(runs)}), {_count(runs[0])} tasks'
    lines = [f'| {title} | ' + ' | '.join(heads) + ' |', '| --- ' * (1 + len(heads)) + '|']
    for arm in _arms(runs):
        cells = [_cell(_bounds(runs, split, arm, name)) for split in splits for name in ('vote', 'above_constant')]
        having = len(_having(runs, splits, arm))
        lines.append(f'| {arm}{f" (n = {having})" if having < len(runs) else ""} | ' + ' | '.join(cells) + ' |')
    return lines


def draw_arc(rows: list[dict], path: pathlib.Path) -> None:
    """A panel for each split, a bar for each arm, with the intervals of the table; of the largest set of tasks alone."""
    runs = _by_seed(_by_tasks(rows)[0])
    splits, names = runs[0]['metrics']['splits'], _arms(runs)
    figure = Figure(figsize=(6 * len(splits), 1 + 0.28 * len(names)), layout='constrained')
    for axes, split in zip(figure.subplots(1, len(splits), squeeze=False)[0], splits, strict=True):
        means, lows, highs = np.array([_bounds(runs, split, arm, 'vote') for arm in names]).T
        places = np.arange(len(names))[::-1]
        axes.barh(places, means, xerr=np.maximum([means - lows, highs - means], 0), color='C0', alpha=0.7)
        axes.axvline(means[names.index('best constant')], color='gray', linestyle=':')
        axes.set_yticks(places, names)
        axes.set(title=f'{split}: {splits[split]["tasks"][1]} test tasks', xlabel='expected vote pass@2, %', xlim=(0, 102))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def _by_tasks(rows: Sequence[dict]) -> list[list[dict]]:
    """Rows of the same tasks together, those of the most first: what is known of a few tasks is no seed of what is known of all."""
    sets: dict[tuple[int, ...], list[dict]] = {}
    for row in rows:
        sets.setdefault(tuple(row['config']['table']['tasks']), []).append(row)
    return sorted(sets.values(), key=lambda alike: -_count(alike[0]))


def _count(row: dict) -> int:
    return len(row['config']['table']['tasks'])


def _by_seed(rows: Sequence[dict]) -> list[dict]:
    """A row for each seed, of one configuration, with each arm as the latest of its rows has it.

    These may be of different algorithms: what a policy learns does not depend on which others its row has.
    """
    updates, found = {}, {}
    for row in rows:
        own = {update['algorithm']: update for update in row['config']['outer']}
        known, again = (dict(outer={name: each[name] for name in own.keys() & updates}) for each in (updates, own))
        check_same(rows[0]['config'] | known, row['config'] | again, 'seeds of SEAL on grids')
        updates |= own
        found[row['seed']] = _joined(found[row['seed']], row) if row['seed'] in found else row
    return [row for _, row in sorted(found.items())]


def _joined(row: dict, later: dict) -> dict:
    """The later row, and the arms that it lacks from the other."""
    splits = {
        split: part | dict(arms=row['metrics']['splits'][split]['arms'] | part['arms'])
        for split, part in later['metrics']['splits'].items()
    }
    return later | dict(metrics=dict(splits=splits))


def _arms(runs: Sequence[dict]) -> list[str]:
    return list(dict.fromkeys(arm for row in runs for part in row['metrics']['splits'].values() for arm in part['arms']))


def _having(runs: Sequence[dict], splits: Iterable[str], arm: str) -> list[dict]:
    return [row for row in runs if all(arm in row['metrics']['splits'][split]['arms'] for split in splits)]


def _bounds(runs: Sequence[dict], split: str, arm: str, name: str) -> Bounds:
    """In %: over seeds, or over tasks where there is one seed or all agree, as arms without a policy do."""
    found = [[100 * value for value in row['metrics']['splits'][split]['arms'][arm][name]] for row in _having(runs, [split], arm)]
    if len(found) == 1 or all(each == found[0] for each in found):
        return tuple(found[0])
    mean, half = interval([each[0] for each in found])
    return mean, mean - half, mean + half


def _cell(bounds: Bounds) -> str:
    mean, low, high = bounds
    return f'{mean:.1f} [{low:.1f}, {high:.1f}]'
