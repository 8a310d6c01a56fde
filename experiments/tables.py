"""Tables of the grids' rows, beside the paper's numbers: means over seeds with 95 % intervals, of one configuration only."""

import json
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from experiments import babilong, formal_languages, haystack_runs, mad, needle
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
# Table 1, arXiv:2512.24695v1, at 4,096, 8,192 and 16,384 tokens, of models trained on text.
_PAPER_KINDS = ('single_1', 'single_2', 'single_3', 'multikey_1', 'multiquery', 'multivalue')
_PAPER_LENGTHS = ('4096', '8192', '16384')
PAPER_NEEDLES = {
    model: {kind: dict(zip(_PAPER_LENGTHS, share.split(), strict=True)) for kind, share in zip(_PAPER_KINDS, shares, strict=True)}
    for model, shares in {
        'transformer': ('88.6 76.4 79.8', '100 98.8 94.2', '78.0 69.2 40.8', '79.4 83.0 61.4', '58.9 48.0 29.8', '37.5 34.1 21.5'),
        'hope-attention': ('100 100 100', '100 98.4 94.4', '76.8 68.8 42.4', '80.2 84.8 60.8', '60.4 47.8 30.6', '35.2 34.4 24.8'),
        'rwkv7': ('100 100 99.6', '93.8 44.8 12.6', '63.8 13.2 5.8', '21.4 18.8 9.6', '20.4 14.8 8.6', '16.2 13.4 6.8'),
        'comba': ('100 100 99.4', '92.6 47.2 13.4', '62.4 13.8 7.4', '21.4 19.4 8.2', '21.8 15.2 6.4', '16.5 13.5 7.2'),
        'dla': ('96.4 71.2 44.0', '79.6 42.6 28.2', '18.2 8.8 4.0', '27.4 20.0 11.8', '26.4 22.0 6.4', '25.6 12.8 9.6'),
        'titans': ('100 100 100', '99.6 84.6 75.4', '74.2 42.8 21.2', '26.4 23.6 8.2', '22.8 19.8 9.4', '24.6 15.1 8.2'),
        'hope': ('100 100 100', '99.2 88.4 78.2', '73.2 46.2 24.8', '29.4 24.8 14.8', '31.7 24.8 14.2', '31.4 17.2 11.4'),
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


def needle_table(rows: list[dict]) -> list[str]:
    """Lines of a table for each kind of needles that has rows.

    Raises:
        ValueError: naming a setting in which runs differ that have to be alike.
    """
    paper = lambda kind: lambda model, length: PAPER_NEEDLES.get(model, {}).get(kind, {}).get(length, '')
    return _length_tables('needles found, %', rows, needle.Args.known_tasks, paper)


def babilong_table(rows: list[dict]) -> list[str]:
    """Lines of a table for each question about stories that has rows.

    Raises:
        ValueError: naming a setting in which runs differ that have to be alike.
    """
    return _length_tables('stories, answers right, %', rows, babilong.Args.known_tasks, lambda question: lambda model, length: '')


def _length_tables(title: str, rows: list[dict], tasks: Sequence[str], paper: Callable[[str], Callable[[str, str], str]]) -> list[str]:
    """For each task a table whose columns are the lengths in bytes; an empty line stands between two."""
    lines = []
    for task in tasks:
        runs = [row for row in rows if row['config']['task']['name'] == task]
        group(runs)
        lengths = tuple(dict.fromkeys(length for row in runs for length in row['metrics']['lengths']))
        rules = ' / '.join(dict.fromkeys(name for row in runs for name in row['metrics']['trivial']))
        made = _table(
            f'{title}, {task}, at bytes', [_at(row, length) for row in runs for length in lengths], haystack_runs.MODELS, lengths,
            lambda row: [100 * row['metrics']['whole']], lambda row: [100 * share for share in row['metrics']['trivial'].values()],
            paper(task), rules,
        )  # fmt: skip
        lines += ['', *made] if lines and made else made
    return lines


def _at(row: dict, length: str) -> dict:
    """What a row says of one length, as if this were its task."""
    metrics = row['metrics']
    config = row['config'] | dict(task=row['config']['task'] | dict(name=length))
    return row | dict(config=config, metrics=metrics['lengths'][length] | dict(trivial=metrics['trivial']))


def _table(
    title: str,
    rows: list[dict],
    models: Sequence[str],
    tasks: Sequence[str],
    shares: Callable[[dict], list[float]],
    trivial: Callable[[dict], list[float]],
    paper: Callable[[str, str], str],
    rule: str = 'most frequent answer',
) -> list[str]:
    """A line for each model, one below with the paper's numbers, where it has any, and the trivial rule's at the end."""
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
    lines.append(f'| {rule} | ' + ' | '.join(_means(every(task)) for task in tasks) + ' |')
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
        check_same(first.setdefault((row['model'], task), config), config, f'{row["model"]} on {task}')
        check_same(trained.setdefault(task, config), config | dict(model=trained[task]['model']), f'the models on {task}')
        cells.setdefault((row['model'], task), {})[row['seed']] = row
    return {key: list(by_seed.values()) for key, by_seed in cells.items()}


def check_same(one: dict, other: dict, where: str) -> None:
    """Raises ValueError naming the first setting in which two configurations differ, the seed excepted."""
    for name in dict.fromkeys([*one, *other]):
        first, second = one.get(name), other.get(name)
        if isinstance(first, dict) and isinstance(second, dict):
            check_same(first, second, where)
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
