"""Tables of the grids' rows, beside the paper's numbers: means over seeds with 95 % intervals, of one configuration only."""

import json
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from experiments import formal_languages, mad
from experiments.racing import interval
from nested_jax.data.tasks.formal_languages import LANGUAGES

NOT_RUN = 'not run'
ALL_RIGHT = ('100 / 100',) * 6
# Table 5, arXiv:2512.24695v1, bins 0 and 1, in the order of LANGUAGES.
PAPER_LANGUAGES = {
    'hope': ALL_RIGHT,
    'lstm': ALL_RIGHT,
    'srwm': ALL_RIGHT,
    'transformer': ('46.4 / 0', '0 / 0', '0 / 0', *ALL_RIGHT[:3]),
    'linear-attention': ('78.1 / 0', '0 / 0', '0 / 0', *ALL_RIGHT[:3]),
    'deltanet': ('98.2 / 10.1', '0 / 0', '0 / 0', *ALL_RIGHT[:3]),
}
# Table 4, arXiv:2512.24695v1.
_PAPER_MAD_TASKS = ('compression', 'in-context-recall', 'fuzzy-in-context-recall', 'selective-copying', 'memorization')
PAPER_MAD = {
    model: dict(zip(_PAPER_MAD_TASKS, shares, strict=True))
    for model, shares in {
        'transformer': ('49.4', '100', '47.9', '96.2', '83.7'),
        'rwkv7': ('45.1', '100', '32.8', '95.6', '82.2'),
        'comba': ('46.3', '100', '32.8', '96.4', '82.9'),
        'titans': ('49.8', '100', '50.0', '99.4', '83.4'),
        'hope': ('51.2', '100', '52.1', '99.7', '85.2'),
    }.items()
}


def language_table(rows: list[dict]) -> list[str]:
    """Lines of the table of formal languages; none without rows.

    Raises:
        ValueError: naming a setting in which runs differ that have to be alike.
    """
    bins = lambda row, name: [100 * found[name] for found in row['metrics']['bins'].values()]
    return _table(
        'strings right at every position, %, bins 0 / 1 / 2', rows, formal_languages.MODELS, tuple(LANGUAGES),
        lambda row: bins(row, 'every'), lambda row: bins(row, 'majority'),
        lambda model, task: PAPER_LANGUAGES[model][list(LANGUAGES).index(task)] if model in PAPER_LANGUAGES else '',
    )  # fmt: skip


def mad_table(rows: list[dict]) -> list[str]:
    """Lines of the table of MAD's tasks; none without rows.

    Raises:
        ValueError: naming a setting in which runs differ that have to be alike.
    """
    shares = lambda row, name: [100 * row['metrics'][name][average] for average in ('micro', 'macro')]
    return _table(
        'MAD, accuracy, %, micro / macro', rows, mad.MODELS, tuple(mad.TASKS),
        lambda row: shares(row, 'test'), lambda row: shares(row, 'majority'),
        lambda model, task: PAPER_MAD.get(model, {}).get(task, ''),
    )  # fmt: skip


def _table(
    title: str,
    rows: list[dict],
    models: Sequence[str],
    tasks: Sequence[str],
    shares: Callable[[dict], list[float]],
    trivial: Callable[[dict], list[float]],
    paper: Callable[[str, str], str],
) -> list[str]:
    """A line for each model, one below with the paper's numbers, where it has any, and the most frequent answer's at the end."""
    if not rows:
        return []
    cells = group(rows)
    models = tuple(dict.fromkeys([*models, *(model for model, _ in cells)]))
    lines = [f'| {title} | {" | ".join(tasks)} |', '| --- ' * (len(tasks) + 1) + '|']
    for model in models:
        lines.append(f'| {model} | ' + ' | '.join(entry(map(shares, cells.get((model, task), ()))) for task in tasks) + ' |')
        if any(paper(model, task) for task in tasks):
            lines.append(f'| {model}, the paper | ' + ' | '.join(paper(model, task) for task in tasks) + ' |')
    every = lambda task: [trivial(row) for (_, name), runs in cells.items() if name == task for row in runs]
    lines.append('| most frequent answer | ' + ' | '.join(_means(every(task)) for task in tasks) + ' |')
    return lines


def group(rows: Iterable[dict]) -> dict[tuple[str, str], list[dict]]:
    """(model, task) -> the latest run of each seed.

    Args:
        rows: of one experiment.

    Raises:
        ValueError: naming a setting in which two runs of one cell differ, the seed excepted, or the training of two runs of one task.
    """
    cells, first, trained = {}, {}, {}
    for row in rows:
        config, task = row['config'], row['config']['task']['name']
        _check_same(first.setdefault((row['model'], task), config), config, f'{row["model"]} on {task}')
        _check_same(trained.setdefault(task, config), config | dict(model=trained[task]['model']), f'the models on {task}')
        cells.setdefault((row['model'], task), {})[row['seed']] = row
    return {key: list(by_seed.values()) for key, by_seed in cells.items()}


def _check_same(one: dict, other: dict, where: str) -> None:
    for name in dict.fromkeys([*one, *other]):
        first, second = one.get(name), other.get(name)
        if isinstance(first, dict) and isinstance(second, dict):
            _check_same(first, second, where)
        elif name != 'seed' and first != second:
            raise ValueError(f'{where}: {name} is {json.dumps(first)} and {json.dumps(second)}, allowed is one value: tables mix none')


def entry(runs: Iterable[list[float]], digits: int = 1) -> str:
    """Means and half-widths of the 95 % intervals, and the number of runs; 'not run' without any."""
    runs = list(runs)
    if not runs:
        return NOT_RUN
    if len(runs) == 1:
        return f'{_means(runs, digits)} (n = 1)'
    spreads = (interval(values) for values in zip(*runs, strict=True))
    return ' / '.join(f'{mean:.{digits}f} ± {half:.{digits}f}' for mean, half in spreads) + f' (n = {len(runs)})'


def _means(runs: list[list[float]], digits: int = 1) -> str:
    return ' / '.join(f'{mean:.{digits}f}' for mean in np.mean(runs, 0)) if runs else ''
