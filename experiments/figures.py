"""Figures of the grids' rows: means over seeds with 95 % intervals, of the same cells as the tables (`tables.py`, `text_tables.py`)."""

import math
import pathlib
from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments import context_use, formal_languages, haystack_runs, language_modeling, mad
from experiments.racing import interval
from experiments.seal_arc_tables import draw_arc
from experiments.seal_continual_tables import draw_continual
from experiments.seal_tables import draw_seal
from experiments.tables import group
from experiments.text_tables import full_runs

Points = dict[float, list[float]]  # place on the axis -> a value of each seed
Panels = dict[str, dict[str, Points]]  # title -> series -> points
COLORS = [f'C{index}' for index in range(10)]
STYLES = ('-', '--', ':')


def draw_languages(rows: list[dict], path: pathlib.Path) -> None:
    """A panel for each language, a group of bars for each model: strings right in each bin."""
    share = lambda row: {index: 100 * found['every'] for index, found in enumerate(row['metrics']['bins'].values())}
    panels = _by_task(rows, formal_languages.MODELS, share)
    _draw(panels, path, _bars, 'strings right, %', formal_languages.TESTS)


def draw_mad(rows: list[dict], path: pathlib.Path) -> None:
    """A panel for each task, a bar for each model: micro accuracy."""
    _draw(_by_task(rows, mad.MODELS, lambda row: {0: 100 * row['metrics']['test']['micro']}), path, _bars, 'accuracy, %', ('micro',))


def draw_lengths(rows: list[dict], path: pathlib.Path) -> None:
    """A panel for each kind of needle or question, a line for each model: whole answers right against the text's length."""
    share = lambda row: {int(length): 100 * found['whole'] for length, found in row['metrics']['lengths'].items()}
    trained = max(row['config']['train']['train_lengths'][-1] for row in rows)
    _draw(_by_task(rows, haystack_runs.MODELS, share), path, _lines, 'answers right, %', 'bytes of the text', trained)


def draw_language_modeling(rows: list[dict], path: pathlib.Path) -> None:
    """A bar for each model: held-out bits per byte."""
    panels = _by_task(full_runs(rows), language_modeling.TABLE, lambda row: {0: row['metrics']['heldout_bits_per_byte']})
    _draw(panels, path, _bars, 'held-out bits per byte', ('whole text',))


def draw_ablations(rows: list[dict], path: pathlib.Path) -> None:
    """A panel for each base, a bar for each of its variants: held-out bits per byte."""
    panels: Panels = {}
    for (base, arm), runs in group(rows).items():
        panels.setdefault(base, {})[arm] = {0: [row['metrics']['heldout_bits_per_byte'] for row in runs]}
    _draw(panels, path, _bars, 'held-out bits per byte', ('whole text',))


def draw_levels(rows: list[dict], path: pathlib.Path) -> None:
    """A line for each slowest period and variant: held-out bits per byte against the number of CMS levels."""
    series: dict[str, Points] = {}
    for (_, task), runs in group(rows).items():
        count, end = task.split(' x ')
        period, nested, _ = end.partition(' ')
        series.setdefault(f'slowest {int(period):,} tokens{", nested" * bool(nested)}', {})[int(count)] = [
            row['metrics']['heldout_bits_per_byte'] for row in runs
        ]
    _draw({'CMS': series}, path, _lines, 'held-out bits per byte', 'levels')


def draw_context(rows: list[dict], path: pathlib.Path) -> None:
    """A line for each model: bits per byte against the position, at the end of each bin of positions."""
    at = lambda row: {int(name.split('-')[1]) + 1: bits for name, bits in row['metrics']['by_position'].items()}
    _draw(_by_task(rows, context_use.MODELS, at), path, _lines, 'bits per byte', 'position')


FIGURES: dict[str, Callable[[list[dict], pathlib.Path], None]] = {
    'formal_languages': draw_languages,
    'mad': draw_mad,
    'needle': draw_lengths,
    'babilong': draw_lengths,
    'language_modeling': draw_language_modeling,
    'ablations': draw_ablations,
    'cms_levels': draw_levels,
    'context_use': draw_context,
    'seal_knowledge': draw_seal,
    'seal_arc': draw_arc,
    'seal_continual': draw_continual,
}


def _by_task(rows: list[dict], models: Sequence[str], values: Callable[[dict], dict[float, float]]) -> Panels:
    """A panel for each task, its models in their order, the others' after them."""
    cells = group(rows)
    panels: Panels = {}
    for model in dict.fromkeys([*models, *(model for model, _ in cells)]):
        for (name, task), runs in cells.items():
            if name == model:
                found = list(map(values, runs))
                panels.setdefault(task, {})[model] = {place: [run[place] for run in found] for place in found[0]}
    return panels


def _draw(panels: Panels, path: pathlib.Path, kind: Callable[..., None], ylabel: str, *options) -> None:
    """Draws panels in up to three columns as a PNG; series have one legend and everywhere the same colour."""
    names = list(dict.fromkeys(name for series in panels.values() for name in series))
    columns = min(3, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(4.4 * columns + 2.2, 3.2 * lines), layout='constrained')
    grid = figure.subplots(lines, columns, squeeze=False).ravel()
    for axes, (title, series) in zip(grid, panels.items(), strict=False):
        kind(axes, series, names, *options)
        axes.set(title=title, ylabel=ylabel)
        if ylabel.endswith('%'):
            axes.set_ylim(-3, 105)
        axes.grid(alpha=0.3, axis='y')
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    handles = {label: handle for axes in grid for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc='outside right upper', fontsize='small')
    figure.savefig(path, dpi=110)


def _lines(axes: Axes, series: dict[str, Points], names: Sequence[str], xlabel: str, marked: float | None = None) -> None:
    """A line for each series, on a logarithmic axis where places are far apart; `marked` is the longest length trained on."""
    for name, points in series.items():
        index = names.index(name)
        style = dict(color=COLORS[index % len(COLORS)], linestyle=STYLES[index // len(COLORS) % len(STYLES)], marker='o', markersize=3)
        axes.errorbar(list(points), *_spread(points), label=name, capsize=2, linewidth=1.2, **style)
    places = sorted({place for points in series.values() for place in points})
    if places[-1] > 10 * places[0]:
        axes.set_xscale('log', base=2)
    axes.set(xlabel=xlabel, xticks=places, xticklabels=[f'{place:,}' for place in places])
    axes.tick_params('x', labelsize='x-small')
    if marked is not None:
        axes.axvline(marked, color='gray', linewidth=0.8, linestyle=':', label='longest trained on')


def _bars(axes: Axes, series: dict[str, Points], names: Sequence[str], bars: Sequence[str]) -> None:
    """A group of bars for each series, the bars of one place in one colour; an axis far from zero begins below the lowest."""
    width = 0.8 / len(bars)
    for place, bar in enumerate(bars):
        means, halves = np.array([_spread({place: points[place]}) for points in series.values()])[..., 0].T
        axes.bar(np.arange(len(series)) + width * (place - (len(bars) - 1) / 2), means, width, yerr=halves, capsize=2, label=bar)
    axes.set_xticks(np.arange(len(series)), list(series), rotation=60, ha='right', fontsize='x-small', rotation_mode='anchor')
    lowest, highest = (f(np.mean(values) for points in series.values() for values in points.values()) for f in (min, max))
    if lowest > highest / 2:
        axes.set_ylim(lowest - 0.2 * (highest - lowest) - 0.02 * lowest, None)


def _spread(points: Points) -> tuple[list[float], list[float]]:
    """Means and half-widths of the 95 % intervals, which one run has none of."""
    found = [interval(values) if len(values) > 1 else (values[0], math.nan) for values in points.values()]
    return [mean for mean, _ in found], [half for _, half in found]
