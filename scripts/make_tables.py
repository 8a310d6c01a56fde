"""Writes the README's tables and the figures from the rows in experiments/results: `python scripts/make_tables.py`.

Runs of one model, number of tokens, learning rate and text are one line: the mean over seeds, and the sample standard deviation.
Only runs evaluated on the whole held-out text count, and of each model and number of tokens the learning rate with the best mean. The
tables of the grids are those of experiments/tables.py and experiments/text_tables.py, and the figures, PNG beside the rows, those of
experiments/figures.py.
"""

import argparse
import collections
import json
import pathlib
import statistics
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from experiments import optimizer_race
from experiments.figures import FIGURES
from experiments.racing import interval
from experiments.seal_arc_tables import arc_table
from experiments.seal_continual_tables import continual_table
from experiments.seal_tables import seal_table
from experiments.tables import babilong_table, language_table, mad_table, needle_table
from experiments.text_tables import ablation_table, context_table, language_modeling_table, levels_table, probe_table
from nested_jax.evaluation.rows import best_runs, mean_bits_per_byte, read_rows

README, RESULTS = ROOT / 'README.md', ROOT / 'experiments' / 'results'
VERDICTS = dict(better='+', worse='−', equal='=')
BEGIN, END = '<!-- made by scripts/make_tables.py -->\n', '<!-- end -->'


def tables(results: pathlib.Path = RESULTS) -> str:
    """All tables as Markdown."""
    pretraining = best_runs(read_rows(results / 'hope_pretrain.jsonl'))
    speeds = speed_table(read_rows(results / 'bench_cpu.jsonl'))
    parity = parity_table(read_rows(results / 'parity.jsonl'))
    race = race_table(read_rows(results / 'optimizer_race.jsonl'))
    languages = language_table(read_rows(results / 'formal_languages.jsonl'))
    mad = mad_table(read_rows(results / 'mad.jsonl'))
    needles = needle_table(read_rows(results / 'needle.jsonl'))
    stories = babilong_table(read_rows(results / 'babilong.jsonl'))
    models = language_modeling_table(read_rows(results / 'language_modeling.jsonl'))
    ablated = read_rows(results / 'ablations.jsonl')
    levels = levels_table(read_rows(results / 'cms_levels.jsonl'))
    context = context_table(read_rows(results / 'context_use.jsonl'))
    made = [pretraining_table(pretraining), models, ablation_table(ablated), probe_table(ablated), levels, context]
    seal = seal_table(read_rows(results / 'seal_knowledge.jsonl'))
    grids = arc_table(read_rows(results / 'seal_arc.jsonl'))
    streams = continual_table(read_rows(results / 'seal_continual.jsonl'))
    chips = tpu_table(read_rows(results / 'compile_for_tpu.jsonl'))
    made += [speeds, parity, languages, mad, needles, stories, race, seal, grids, streams, chips]
    return '\n\n'.join('\n'.join(table) for table in made if table) + '\n'


def pretraining_table(groups: dict[tuple[int, str], list[dict]]) -> list[str]:
    """Lines of the table of bits per byte, best model first for each number of tokens."""
    lines = ['| model | tokens | parameters | learning rate | held-out bits per byte |', '| --- | --- | --- | --- | --- |']
    for (tokens, model), runs in sorted(groups.items(), key=lambda item: (-item[0][0], mean_bits_per_byte(item[1]))):
        rate, size = runs[0]['config']['train']['learning_rate'], runs[0]['metrics']['parameters']
        name = model.replace(' without ', ' without: ', 1).replace(' without ', ', ')
        lines.append(f'| {name} | {tokens / 1e6:.2f}M | {size / 1e6:.2f}M | {rate:g} | {_spread(runs)} |')
    return lines


def speed_table(rows: list[dict]) -> list[str]:
    """Lines of the table of training tokens a second, by model and length; of a model's rows at one length the latest."""
    speeds = collections.defaultdict(dict)
    for row in rows:
        metrics = row['metrics']
        if metrics['what'] == 'training':
            speeds[metrics['model']][metrics['length']] = metrics['tokens_per_second']
    lengths = sorted({length for by_length in speeds.values() for length in by_length})
    names = ' | '.join(f'{length:,}' for length in lengths)
    lines = [f'| training tokens a second at length | {names} |', '| --- ' * (len(lengths) + 1) + '|']
    for model, by_length in speeds.items():
        lines.append(f'| {model} | ' + ' | '.join(f'{by_length[length]:,.0f}' if length in by_length else '' for length in lengths) + ' |')
    return lines


def parity_table(rows: list[dict]) -> list[str]:
    """Lines of the table of parity at the lengths 51 to 100, of every arm, chunk and learning rate that has three seeds."""
    groups = collections.defaultdict(dict)
    for row in rows:
        memory = row['config']['model']['memory']
        key = row['model'], memory['projection_chunk_size'], memory['decay_to'], row['config']['train']['learning_rate']
        groups[key][row['seed']] = row['metrics']['bin1']['every']
    lines = ['| parity arm | chunk | decays to | strings of 51 to 100 bits right at every position, by seed |', '| --- | --- | --- | --- |']
    for (arm, size, decay_to, _), shares in groups.items():
        if len(shares) >= 3:
            lines.append(f'| {arm} | {size} | {decay_to} | {", ".join(f"{100 * share:.4g}" for _, share in sorted(shares.items()))} % |')
    return lines


def race_table(rows: list[dict]) -> list[str]:
    """Lines of the table of the optimizers' last losses, the latest rows of every task, in the order in which they ran."""
    tasks = list(dict.fromkeys(row['config']['task'] for row in rows))
    entries = {task: optimizer_race.latest(rows, task) for task in tasks}
    lines = [f'| optimizer | {" | ".join(tasks)} | state, bytes a parameter |', '| --- ' * (len(tasks) + 2) + '|']
    for name in dict.fromkeys(row['model'] for row in rows):
        cells = [_race_cell(entries[task], name) for task in tasks]
        sizes = [entries[task][name].get('state_bytes') for task in tasks if name in entries[task]]
        lines.append(f'| {name} | {" | ".join(cells)} | {f"{sizes[0]:.3g}" if sizes[0] else ""} |')
    return lines


def tpu_table(rows: list[dict]) -> list[str]:
    """Lines of the table of steps compiled for TPU topologies, the latest of each preset, topology and mesh; none without rows."""
    latest = {(row['model'], row['config']['topology'], json.dumps(row['config']['mesh'])): row for row in rows}
    gib = lambda count: f'{count / 2**30:.2f}'
    kinds = ('all-gather', 'all-reduce', 'reduce-scatter')
    lines = [
        f'| compiled for TPU, GiB a chip | topology | mesh | memory | {" | ".join(kinds)} | full rematerialisations |',
        '| --- ' * 8 + '|',
    ]
    for (model, topology, _), row in latest.items():
        metrics, mesh = row['metrics'], ', '.join(f'{axis}={size}' for axis, size in row['config']['mesh'].items())
        moved = ' | '.join(gib(metrics['collectives'].get(kind, {}).get('bytes', 0)) for kind in kinds)
        memory = gib(metrics['memory']['total'])
        lines.append(f'| {model} | {topology} | {mesh} | {memory} | {moved} | {metrics["full_rematerialisations"]} |')
    return lines if latest else []


def _race_cell(entries: dict[str, dict], name: str) -> str:
    """Mean, 95 % interval, and the verdicts against adamw and muon."""
    if name not in entries:
        return ''
    mean, half = interval(entries[name]['losses'])
    results = [optimizer_race.judged(entries, name, baseline) for baseline in optimizer_race.BASELINES]
    return f'{mean:.4g} ± {half:.2g} {" ".join(VERDICTS[result["verdict"]] if result else "·" for result in results)}'


def _spread(runs: list[dict]) -> str:
    values = [run['metrics']['heldout_bits_per_byte'] for run in runs]
    if len(values) == 1:
        return f'{values[0]:.3f} (one seed)'
    return f'{mean_bits_per_byte(runs):.3f} ± {statistics.stdev(values):.3f} ({len(values)} seeds)'


def insert(text: str, made: str) -> str:
    """The text with what stands between the marks replaced."""
    before, rest = text.split(BEGIN)
    return before + BEGIN + made + END + rest.split(END, 1)[1]


def main() -> int:
    """Rewrites the README and draws the figures, or with --check says whether it is up to date by the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--check', action='store_true', help='change nothing; exit code 1 when the README is out of date')
    arguments = parser.parse_args()
    text = README.read_text()
    made = insert(text, tables())
    if arguments.check:
        return int(made != text)
    README.write_text(made)
    for name, draw in FIGURES.items():
        if rows := read_rows(RESULTS / f'{name}.jsonl'):
            draw(rows, RESULTS / f'{name}.png')
    return 0


if __name__ == '__main__':
    sys.exit(main())
