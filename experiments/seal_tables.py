"""The table and the figure of SEAL on the world of people, from the rows of `experiments/seal_knowledge.py`."""

import pathlib
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from experiments.racing import interval
from experiments.seal_world import PROTOTYPE
from experiments.tables import NOT_RUN, check_same

# Table 2, arXiv:2506.10943v2, single passage: of Qwen2.5-7B on SQuAD, by the arm that is its like.
PAPER = {'base': '32.7', 'passage only': '33.5', 'untrained self-edit': '39.7', 'rest-em, round 2': '47.0'}
COMPARED = ('untrained self-edit', 'passage only')  # whose order flips with the budget in the prototype
SETTINGS = ('the chosen budget', str(PROTOTYPE))


def seal_table(rows: list[dict]) -> list[str]:
    """Lines of a table of arms for each learner and way to choose, an empty one between two; none without rows.

    Raises:
        ValueError: naming a setting in which two seeds differ.
    """
    lines = []
    for kind in dict.fromkeys(map(_kind, rows)):
        runs = _by_seed([row for row in rows if _kind(row) == kind])
        chosen = ', '.join(dict.fromkeys(row['metrics']['chosen'] for row in runs))
        config = runs[0]['config']
        chosen_by = f', rewarded by {config["reward"]}' if 'reward' in config else ''
        halving = ', successive halving' if config.get('halving') else ''
        title = f'SEAL on made-up people, {runs[0]["model"]}{chosen_by}{halving}, answers right, %'
        lines += [''] if lines else []
        lines += [f'| {title} | at {SETTINGS[0]} ({chosen}) | at {SETTINGS[1]} | the paper |', '| --- ' * 4 + '|']
        for arm in _arms(runs):
            cells = [_cell([found for row in runs if (found := _found(row, setting, arm))]) for setting in SETTINGS]
            lines.append(f'| {arm} | {cells[0]} | {cells[1]} | {PAPER.get(arm, "")} |')
    return lines


def draw_seal(rows: list[dict], path: pathlib.Path) -> None:
    """Phases of the budgets tried by the table's first learner, if any; its arms at each reported one, with the intervals of the table."""
    runs = _by_seed([row for row in rows if _kind(row) == _kind(rows[0])])
    arms_at = {setting: [arm for arm in _arms(runs) if any(_found(row, setting, arm) for row in runs)] for setting in SETTINGS}
    settings, swept = [setting for setting in SETTINGS if arms_at[setting]], runs[0]['metrics']['sweep']
    figure = Figure(figsize=(5 * (len(settings) + bool(swept)), 5), layout='constrained')
    panels = list(figure.subplots(1, len(settings) + bool(swept), squeeze=False)[0])
    if swept:
        _draw_phases(panels.pop(0), runs)
    for axes, setting in zip(panels, settings, strict=True):
        arms = arms_at[setting]
        bounds = np.array([_bounds([found for row in runs if (found := _found(row, setting, arm))]) for arm in arms])
        places, (means, lows, highs) = np.arange(len(arms))[::-1], bounds.T
        axes.barh(places, means, xerr=np.maximum([means - lows, highs - means], 0), color='C0', alpha=0.7)
        axes.set_yticks(places, arms)
        axes.set(title=f'at {setting}, test', xlabel='answers right, %', xlim=(0, 102))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def _draw_phases(axes: Axes, runs: list[dict]) -> None:
    """What untrained notes earn above the passage alone by learning rate and number of steps, and both; a frame where reported."""
    swept = [row['metrics']['sweep'] for row in runs]
    means = {budget: {arm: np.mean([100 * found[budget][arm] for found in swept]) for arm in COMPARED} for budget in swept[0]}
    places = {budget: tuple(map(float, budget.split(' x '))) for budget in means}
    rates, steps = (sorted(set(each)) for each in zip(*places.values(), strict=True))
    gaps = np.full((len(rates), len(steps)), np.nan)
    reported = {row['metrics']['chosen'] for row in runs} | {str(PROTOTYPE)}
    for budget, (rate, count) in places.items():
        y, x = rates.index(rate), steps.index(count)
        notes, passage = (means[budget][arm] for arm in COMPARED)
        gaps[y, x] = notes - passage
        axes.text(x, y, f'{notes - passage:+.0f}\n{notes:.0f} / {passage:.0f}', ha='center', va='center')
        if budget in reported:
            axes.add_patch(Rectangle((x - 0.48, y - 0.48), 0.96, 0.96, fill=False, linewidth=2))
    limit = max(np.nanmax(np.abs(gaps)), 1.0)
    axes.imshow(gaps, cmap='RdBu', vmin=-limit, vmax=limit, origin='lower', aspect='auto', alpha=0.5)
    axes.set_xticks(range(len(steps)), [f'{count:g}' for count in steps])
    axes.set_yticks(range(len(rates)), [f'{rate:g}' for rate in rates])
    axes.set(title=' minus '.join(COMPARED) + ',\npoints (both, %), development split', xlabel='steps', ylabel='learning rate')


def _kind(row: dict) -> tuple[str, ...]:
    """Learner, algorithms, reward and halving: what makes a table of its own."""
    return row['model'], *(str(row['config'].get(name)) for name in ('algorithms', 'reward', 'halving'))


def _by_seed(rows: list[dict]) -> list[dict]:
    """The latest row of each seed, of one configuration."""
    for row in rows:
        check_same(rows[0]['config'], row['config'], 'seeds of SEAL')
    return [row for _, row in sorted({row['seed']: row for row in rows}.items())]


def _arms(runs: Sequence[dict]) -> list[str]:
    return list(dict.fromkeys(arm for row in runs for found in row['metrics']['reported'].values() for arm in found['arms']))


def _found(row: dict, setting: str, arm: str) -> list[float] | None:
    """Mean over passages in % and its interval, of one seed."""
    budget = row['metrics']['chosen'] if setting == SETTINGS[0] else setting
    arms = row['metrics']['reported'].get(budget, {}).get('arms', {})
    return [100 * value for value in arms[arm]['right']] if arm in arms else None


def _bounds(found: Sequence[list[float]]) -> list[float]:
    """Mean, lower and upper bound: over seeds, or of one seed over passages."""
    if len(found) == 1:
        return found[0]
    mean, half = interval([each[0] for each in found])
    return [mean, mean - half, mean + half]


def _cell(found: Sequence[list[float]]) -> str:
    if not found:
        return NOT_RUN
    mean, low, high = _bounds(found)
    return f'{mean:.1f} [{low:.1f}, {high:.1f}] (n = 1)' if len(found) == 1 else f'{mean:.1f} ± {high - mean:.1f} (n = {len(found)})'
