"""Tables of the rows of models trained on text, beside the paper's numbers; `tables.py` says how cells are grouped and what is refused."""

import statistics

from experiments import ablations, context_use, language_modeling
from experiments.cms_levels import BASE, NESTED
from experiments.tables import entry, group

# Table 2, arXiv:2512.24695v1: perplexity on Wikitext at 760M parameters and 30B tokens, and at 1.3B and 100B.
PAPER_PERPLEXITIES = {
    'transformer': (24.18, 17.92), 'samba': (21.07, 16.15), 'retnet': (25.77, 18.91), 'deltanet': (24.52, 18.62), 'rwkv7': (23.75, 18.44),
    'comba': (22.41, 18.16), 'ttt-linear': (24.17, 18.42), 'memora': (22.28, 15.90), 'dla': (23.12, 16.31), 'titans': (20.08, 15.60),
    'hope': (18.68, 14.39),
}  # fmt: skip
# Table 6: mean of two perplexities and accuracy in % at 1.3B parameters. Its whole model has adaptive queries.
PAPER_ABLATIONS = {
    'with query': (12.24, 58.1), 'without dgd': (13.41, 56.5), 'without momentum': (13.58, 56.9), 'without retention': (13.71, 57.2),
    'without cms': (13.04, 57.3), 'without key': (13.77, 56.9), 'without value': (13.90, 55.1), 'whole': (12.19, 57.4),
}  # fmt: skip


def language_modeling_table(rows: list[dict]) -> list[str]:
    """Lines of the comparison of models, best first, then those of Table 2 that have not run; none without rows."""
    full = full_runs(rows)
    if not full:
        return []
    runs = {model: runs for (model, _), runs in group(full).items()}
    order = sorted(runs, key=lambda model: statistics.mean(_bits(run)[0] for run in runs[model]))
    tokens = full[0]['metrics']['tokens'] / 1e6
    lines = [
        f'| model, {tokens:.2f}M tokens | parameters | held-out bits per byte | tokens/s | perplexity in the paper, 760M / 1.3B |',
        '| --- | --- | --- | --- | --- |',
    ]
    for model in dict.fromkeys([*order, *language_modeling.TABLE]):
        found = runs.get(model, [])
        size = f'{found[0]["metrics"]["parameters"] / 1e6:.2f}M' if found else ''
        speed = f'{statistics.median(run["metrics"]["tokens_per_second"] for run in found):,.0f}' if found else ''
        paper = ' / '.join(f'{value:.2f}' for value in PAPER_PERPLEXITIES.get(model, ()))
        lines.append(f'| {model} | {size} | {entry(map(_bits, found), 3)} | {speed} | {paper} |')
    return lines


def full_runs(rows: list[dict]) -> list[dict]:
    """The runs of all tokens, without their learning rates, of which each model has that of its own search."""
    full = [row for row in rows if row['config']['task']['name'] == language_modeling.TRAINED]
    return [row | dict(config=row['config'] | dict(train=_without_rate(row['config']['train']))) for row in full]


def ablation_table(rows: list[dict]) -> list[str]:
    """Lines of the ablations of Hope, one column for each base; none without rows."""
    if not rows:
        return []
    cells, bases = group(rows), ('hope-linear', 'hope')
    lines = [f'| held-out bits per byte | {" | ".join(bases)} | the paper, perplexity / accuracy |', '| --- ' * (len(bases) + 2) + '|']
    for arm in ablations.ARMS:
        found = [entry(map(_bits, cells.get((base, arm), ())), 3) for base in bases]
        paper = ' / '.join(map(str, PAPER_ABLATIONS.get(arm, ())))
        lines.append(f'| {arm} | {" | ".join(found)} | {paper} |')
    return lines


def probe_table(rows: list[dict]) -> list[str]:
    """Lines of what the whole models' levels and memories do, means over seeds; none without rows."""
    cells = {base: runs for (base, arm), runs in group(rows).items() if arm == ablations.WHOLE} if rows else {}
    lines = ['| probe of a whole model | ' + ' | '.join(cells) + ' |', '| --- ' * (len(cells) + 1) + '|']
    probes = {base: [_flat(run['metrics']['probe']) for run in runs] for base, runs in cells.items()}
    for name in dict.fromkeys(name for found in probes.values() for probe in found for name in probe):
        means = (entry(([probe[name]] for probe in found if name in probe), 3) for found in probes.values())
        lines.append(f'| {name} | {" | ".join(means)} |')
    return lines if cells else []


def levels_table(rows: list[dict]) -> list[str]:
    """Lines of the grid of CMS levels, one column for each slowest period and variant; none without rows."""
    if not rows:
        return []
    cells = {task: runs for (_, task), runs in group(rows).items()}
    counts, ends = ({task.split(' x ')[place] for task in cells} for place in (0, 1))
    periods = sorted(ends, key=lambda end: (end.endswith(NESTED), int(end.removesuffix(NESTED))))
    heads = [f'slowest {int(end.removesuffix(NESTED)):,} tokens{", nested" * end.endswith(NESTED)}' for end in periods]
    lines = [f'| {BASE}, levels | {" | ".join(heads)} |', '| --- ' * (len(periods) + 1) + '|']
    for count in sorted(counts, key=int):
        found = (entry(map(_bits, cells.get(f'{count} x {end}', ())), 3) for end in periods)
        lines.append(f'| {count} | {" | ".join(found)} |')
    return lines


def context_table(rows: list[dict]) -> list[str]:
    """Lines of bits per byte by position; none without rows."""
    if not rows:
        return []
    cells = {model: runs for (model, _), runs in group(rows).items()}
    bins = list(rows[0]['metrics']['by_position'])
    lines = [f'| bits per byte at positions | {" | ".join(bins)} |', '| --- ' * (len(bins) + 1) + '|']
    for model in dict.fromkeys([*context_use.MODELS, *cells]):
        found = (entry(([run['metrics']['by_position'][name]] for run in cells.get(model, ())), 3) for name in bins)
        lines.append(f'| {model} | {" | ".join(found)} |')
    return lines


def _bits(row: dict) -> list[float]:
    return [row['metrics']['heldout_bits_per_byte']]


def _without_rate(train: dict) -> dict:
    return {name: value for name, value in train.items() if name != 'learning_rate'}


def _flat(tree: dict, prefix: str = '') -> dict[str, float]:
    """Names in words -> numbers of a nested dictionary."""
    flat = {}
    for name, value in tree.items():
        words = f'{prefix} {name}'.strip().replace('_', ' ')
        flat |= _flat(value, words) if isinstance(value, dict) else {words: value}
    return flat
