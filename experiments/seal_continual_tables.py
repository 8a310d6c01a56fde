"""The table and the figure of streams of self-edits, from the rows of `experiments/seal_continual.py`."""

import itertools
import math
import pathlib
from collections.abc import Callable, Collection, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.racing import interval
from experiments.tables import check_same, entry
from nested_jax.evaluation.continual import continual_metrics, gain_by_lag, intransigence

# Fig. 6, arXiv:2506.10943v2, from the published results: accuracy of Qwen2.5-7B on eight passages, in % as means over streams, before and
# after each self-edit on those learned so far.
PUBLISHED_BEFORE = (33.09, 32.14, 27.56, 32.58, 32.99, 33.66, 28.68, 25.29)
PUBLISHED = (
    (38.25,),
    (36.41, 49.88),
    (28.79, 43.42, 44.62),
    (27.15, 36.54, 36.64, 43.97),
    (23.50, 29.48, 28.11, 35.36, 37.64),
    (23.31, 28.73, 22.18, 27.75, 35.95, 44.89),
    (18.58, 22.94, 21.83, 24.62, 28.08, 35.59, 38.46),
    (18.94, 21.90, 16.41, 23.72, 22.06, 27.45, 33.49, 33.97),
)
LEVELS = ', levels'  # of the name of a learner that learns by them
EQUAL = ', equal FLOPs'  # of the name of a learner whose updates cost the same by adapters and by levels
MEASURES = {
    'learned': 'learning_accuracy',
    'at the end': 'average_accuracy',
    'forgotten': 'forgetting',
    'backward transfer': 'backward_transfer',
    'forward transfer': 'forward_transfer',
    'right to wrong by an edit': 'turned_wrong',
}
COLUMNS = (*MEASURES, 'known people at the end', 'intransigence')


def continual_table(rows: list[dict]) -> list[str]:
    """Lines of the table, a line for each method and learner at the rate chosen on other streams; none without rows.

    Raises:
        ValueError: naming a setting in which two seeds of one cell differ.
    """
    if not rows:
        return []
    cells = group(rows)
    title = f'{rows[0]["config"]["length"]} {rows[0]["config"]["edits"]}s one after another, %'
    lines = [f'| {title} | learner | {" | ".join(COLUMNS)} | learning rates | MFLOP an edit |', '| --- ' * (len(COLUMNS) + 4) + '|']
    methods = list(dict.fromkeys(method for method, _ in cells))
    for (method, learner), runs in sorted(cells.items(), key=lambda cell: methods.index(cell[0][0])):
        joint = cells.get(('joint', learner), {})
        shares = [entry([[value] for value in found]) if found else '' for found in _columns(runs, joint)]
        rates = ', '.join(sorted({run['metrics']['chosen'] for run in runs.values()}, key=float))
        flops = np.mean([run['metrics']['update_flops'] for run in runs.values()]) / 1e6
        lines.append(f'| {method} | {learner} | {" | ".join(shares)} | {rates} | {flops:,.0f} |')
    told = continual_metrics(*published())
    told = [told.learning_accuracy, told.average_accuracy, told.forgetting, told.backward_transfer]
    return [*lines, f'| sequential | Qwen2.5-7B, the paper | {" | ".join(f"{100 * share:.1f}" for share in told)} | | | | | | |']


def matched_table(rows: list[dict]) -> list[str]:
    """Lines of what levels forget more than adapters of the same model where both have learned equally well; none without rows."""
    cells = group(rows)
    pairs = [(learner, learner.removesuffix(LEVELS)) for learner in dict.fromkeys(name for _, name in cells) if learner.endswith(LEVELS)]
    found = {}
    for method in dict.fromkeys(method for method, _ in cells):
        for levels, adapters in pairs:
            by_levels, by_adapters = cells.get((method, levels), {}), cells.get((method, adapters), {})
            gaps = {seed: forgotten_more(by_levels[seed], by_adapters[seed]) for seed in by_levels if seed in by_adapters}
            found.setdefault(method, {})[adapters] = {seed: gap for seed, gap in gaps.items() if gap is not None}
    names = [adapters for _, adapters in pairs]
    lines = [f'| forgotten by levels more than by adapters, points | {" | ".join(names)} |', '| --- ' * (len(names) + 1) + '|']
    shown = {method: by_model for method, by_model in found.items() if any(by_model.values())}
    lines += [f'| {method} | {" | ".join(_gap(by_model[name].values()) for name in names)} |' for method, by_model in shown.items()]
    return lines if pairs else []


def forgotten_more(levels: dict, adapters: dict) -> tuple[float, float] | None:
    """The highest learning accuracy that two rows both reach on the test's streams, and what the first forgets more there, in points.

    Between neighbouring learning rates both are interpolated, and the lowest that reaches it counts; None where their ranges of learning
    accuracy do not meet.
    """
    curves = [_by_rate(run) for run in (levels, adapters)]
    learned = min(curve[:, 0].max() for curve in curves)
    if learned < max(curve[:, 0].min() for curve in curves):
        return None
    mine, other = (_forgotten_at(learned, curve) for curve in curves)
    return 100 * learned, 100 * (mine - other)


def _by_rate(run: dict) -> np.ndarray:
    """(rates, 2): learning accuracy and forgetting on the test's streams, the lowest learning rate first."""
    by_rate = sorted(run['metrics']['test'].items(), key=lambda item: float(item[0]))
    return np.array([(found['learning_accuracy'], found['forgetting']) for _, found in by_rate])


def _forgotten_at(learned: float, curve: np.ndarray) -> float:
    """Forgetting at a learning accuracy that the curve reaches."""
    reach = next(index for index, pair in enumerate(itertools.pairwise(curve[:, 0])) if min(pair) <= learned <= max(pair))
    ends = curve[reach : reach + 2]
    return float(np.interp(learned, *ends[np.argsort(ends[:, 0])].T))


def _gap(gaps: Collection[tuple[float, float]]) -> str:
    """Of the seeds that have one."""
    learned, more = zip(*gaps, strict=True) if gaps else ((), ())
    if len(more) < 2:
        return ''
    mean, half = interval(more)
    return f'{mean:+.1f} ± {half:.1f} (n = {len(more)}) at {np.mean(learned):.0f} %'


def published() -> tuple[np.ndarray, np.ndarray]:
    """The paper's matrix (8, 8), NaN where not measured, and accuracies before."""
    matrix = np.full((8, 8), np.nan)
    for row, values in enumerate(PUBLISHED):
        matrix[row, : row + 1] = values
    return matrix / 100, np.array(PUBLISHED_BEFORE) / 100


def group(rows: list[dict]) -> dict[tuple[str, str], dict[int, dict]]:
    """(method, learner) -> seed -> the latest row.

    Raises:
        ValueError: naming a setting in which two seeds of one cell differ.
    """
    cells: dict[tuple[str, str], dict[int, dict]] = {}
    for row in rows:
        runs = cells.setdefault((row['config']['task']['name'], row['model']), {})
        if runs:
            check_same(next(iter(runs.values()))['config'], row['config'], f'{row["model"]}, {row["config"]["task"]["name"]}')
        runs[row['seed']] = row
    return cells


def at_chosen(run: dict) -> dict:
    """What a row says of the test's streams at its learning rate."""
    return run['metrics']['test'][run['metrics']['chosen']]


def _columns(runs: dict[int, dict], joint: dict[int, dict]) -> list[list[float]]:
    """Values of the seeds for each of `COLUMNS`."""
    found = [at_chosen(run) for run in runs.values()]
    named = [[100 * each[name] for each in found] for name in MEASURES.values()]
    pairs = [(at_chosen(runs[seed]), at_chosen(joint[seed])) for seed in runs if seed in joint]
    lost = [100 * intransigence(np.array(each['matrix']), np.diagonal(np.array(best['matrix']))) for each, best in pairs]
    return [*named, [100 * each['known'][-1] for each in found], lost]


def draw_continual(rows: list[dict], path: pathlib.Path) -> None:
    """A panel for each method, one more where adapters and levels take equal FLOPs: forgetting against learning accuracy, a line of
    learning rates for each learner; then gains by lag.
    """
    panels: dict[str, dict[str, dict[int, dict]]] = {}
    for (method, learner), runs in group(rows).items():
        panels.setdefault(method + EQUAL * (EQUAL in learner), {})[learner.replace(EQUAL, '')] = runs
    learners = list(dict.fromkeys(learner for by_learner in panels.values() for learner in by_learner))
    columns = min(4, len(panels) + 1)
    lines = math.ceil((len(panels) + 1) / columns)
    figure = Figure(figsize=(3.6 * columns + 2.4, 3.2 * lines), layout='constrained')
    grid = figure.subplots(lines, columns, squeeze=False).ravel()
    for axes, (title, by_learner) in zip(grid, panels.items(), strict=False):
        for learner in sorted(by_learner, key=learners.index):
            _rates(axes, list(by_learner[learner].values()), learner, f'C{learners.index(learner)}')
        axes.set(title=title, xlabel='learned, %', ylabel='forgotten, %', xlim=(0, 100), ylim=(-10, 75))
        axes.grid(alpha=0.3)
    first = next(iter(panels))
    _lags(grid[len(panels)], panels[first], learners, first)
    for axes in grid[len(panels) + 1 :]:
        axes.set_axis_off()
    handles = {label: handle for axes in grid for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc='outside right upper', fontsize='small')
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def _rates(axes: Axes, runs: Sequence[dict], learner: str, color: str) -> None:
    """A point for each learning rate, with 95 % intervals over seeds both ways."""
    rates = list(runs[0]['metrics']['test'])
    of = lambda name: [_spread([100 * run['metrics']['test'][rate][name] for run in runs]) for rate in rates]
    (x, x_half), (y, y_half) = (zip(*of(name), strict=True) for name in ('learning_accuracy', 'forgetting'))
    dashed = '--' if learner.endswith(LEVELS) else '-'
    axes.errorbar(
        x, y, y_half, x_half, color=color, linestyle=dashed, marker='o', markersize=3, linewidth=1.2, elinewidth=0.5, label=learner
    )


def _lags(axes: Axes, by_learner: dict[str, dict[int, dict]], learners: list[str], method: str) -> None:
    """Gain over the untouched model, so many edits after a passage's own."""
    gains: Callable[[dict], np.ndarray] = lambda found: 100 * gain_by_lag(np.array(found['matrix']), np.array(found['before']))
    for learner, runs in by_learner.items():
        values = np.array([gains(at_chosen(run)) for run in runs.values()])
        dashed = '--' if learner.endswith(LEVELS) else '-'
        axes.plot(
            values.mean(0), color=f'C{learners.index(learner)}', linestyle=dashed, marker='o', markersize=3, linewidth=1.2, label=learner
        )
    axes.plot(100 * gain_by_lag(*published()), color='black', linewidth=1.2, label='Qwen2.5-7B, the paper')
    axes.axhline(0, color='gray', linewidth=0.8)
    axes.set(title=f'{method}, at the chosen rate', xlabel='edits since', ylabel='above the untouched model, points')
    axes.grid(alpha=0.3)


def _spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half-width of the 95 % interval, which one run has none of."""
    return interval(values) if len(values) > 1 else (values[0], math.nan)
