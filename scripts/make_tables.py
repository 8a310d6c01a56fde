"""Writes the tables of both READMEs and the figures from the rows in experiments/results: `python scripts/make_tables.py`.

A table stands between `<!-- table: NAME -->` and `<!-- end -->` in README.md or experiments/results/README.md; here is what is made.

Runs of one model, number of tokens, learning rate and text are one line: the mean over seeds, and the sample standard deviation.
Only runs evaluated on the whole held-out text count, and of each model and number of tokens the learning rate with the best mean. The
tables of the grids are those of experiments/tables.py and experiments/text_tables.py, and the figures, PNG beside the rows, those of
experiments/figures.py.
"""

import argparse
import collections
import json
import pathlib
import re
import statistics
import sys
from collections.abc import Callable

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from experiments import optimizer_race
from experiments.figures import FIGURES
from experiments.racing import interval
from experiments.seal_arc_tables import arc_table
from experiments.seal_continual_tables import continual_table, matched_table
from experiments.seal_tables import seal_table
from experiments.tables import babilong_table, language_table, mad_table, needle_table
from experiments.text_tables import ablation_table, context_table, language_modeling_table, levels_table, probe_table
from nested_jax.evaluation.rows import best_runs, mean_bits_per_byte, read_rows

RESULTS = ROOT / 'experiments' / 'results'
PAGES = ROOT / 'README.md', RESULTS / 'README.md'
VERDICTS = dict(better='+', worse='−', equal='=')
PLACE = re.compile(r'(?<=<!-- table: )([a-z_]+)( -->\n).*?(?=<!-- end -->)', re.DOTALL)


def tables(results: pathlib.Path = RESULTS) -> dict[str, list[str]]:
    """Lines of every table by its name, none where nothing was run; but for 'probes', 'seal_matched' and what starts with 'race_' the
    name is that of its file of rows.
    """
    rows = lambda name: read_rows(results / f'{name}.jsonl')
    return {
        'hope_pretrain': pretraining_table(best_runs(rows('hope_pretrain'))),
        'probes': probe_table(rows('ablations')),
        'language_modeling': language_modeling_table(rows('language_modeling')),
        'ablations': ablation_table(rows('ablations')),
        'cms_levels': levels_table(rows('cms_levels')),
        'context_use': context_table(rows('context_use')),
        'bench_cpu': speed_table(rows('bench_cpu')),
        'bench_gpu': gpu_table(rows('bench_gpu')),
        'parity': parity_table(rows('parity')),
        'recall': recall_table(rows('recall')),
        'formal_languages': language_table(rows('formal_languages')),
        'mad': mad_table(rows('mad')),
        'needle': needle_table(rows('needle')),
        'babilong': babilong_table(rows('babilong')),
        'optimizer_race': race_table(rows('optimizer_race')),
        'race_costs': race_costs_table(rows('optimizer_race')),
        'race_equal_costs': race_equal_costs_table(rows('optimizer_race')),
        'race_rates': race_rates_table(rows('optimizer_race')),
        'seal_knowledge': seal_table(rows('seal_knowledge')),
        'seal_arc': arc_table(rows('seal_arc')),
        'seal_continual': continual_table(rows('seal_continual')),
        'seal_matched': matched_table(rows('seal_continual')),
        'bench_seal': candidates_table(rows('bench_seal')),
        'bench_decode': decode_table(rows('bench_decode')),
        'bench_scaling': scaling_table(rows('bench_scaling')),
        'compile_for_tpu': tpu_table(rows('compile_for_tpu')),
        'reliability': reliability_table(rows('reliability')),
    }


def pretraining_table(groups: dict[tuple[int, str], list[dict]]) -> list[str]:
    """Lines of the table of bits per byte, best model first for each number of tokens."""
    lines = ['| model | tokens | parameters | learning rate | held-out bits per byte |', '| --- | --- | --- | --- | --- |']
    for (tokens, model), runs in sorted(groups.items(), key=lambda item: (-item[0][0], mean_bits_per_byte(item[1]))):
        rate, size = runs[0]['config']['train']['learning_rate'], runs[0]['metrics']['parameters']
        name = model.replace(' without ', ' without: ', 1).replace(' without ', ', ')
        lines.append(f'| {name} | {tokens / 1e6:.2f}M | {size / 1e6:.2f}M | {rate:g} | {_spread(runs)} |')
    return lines


def speed_table(rows: list[dict]) -> list[str]:
    """Lines of the table of training tokens a second, by model and length: of the latest rows on one device and on several, the faster."""
    latest, speeds = {}, collections.defaultdict(dict)
    for metrics in (row['metrics'] for row in rows if row['metrics']['what'] == 'training'):
        latest[metrics['model'], metrics['length'], metrics.get('devices', 1)] = metrics['tokens_per_second']
    for (model, length, _), speed in latest.items():
        speeds[model][length] = max(speed, speeds[model].get(length, 0))
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
    heads = ('parity arm', 'chunk', 'decays to', 'learning rate', 'strings of 51 to 100 bits right at every position, by seed')
    lines = [f'| {" | ".join(heads)} |', '| --- ' * len(heads) + '|']
    for (arm, size, decay_to, rate), shares in groups.items():
        if len(shares) >= 3:
            right = ', '.join(f'{100 * share:.4g}' for _, share in sorted(shares.items()))
            lines.append(f'| {arm} | {size} | {decay_to} | {rate:g} | {right} % |')
    return lines


def recall_table(rows: list[dict]) -> list[str]:
    """Lines of the table of associative recall: every arm at the rate that seed 0 is best at, without the easy lengths and pairs."""
    tests = ('64:16', '128:32', '256:32', '256:64')
    runs = collections.defaultdict(dict)
    for row in rows:
        runs[row['model'], row['config']['train']['learning_rate']][row['seed']] = row['metrics']['accuracy']
    heads = ('recall arm', 'learning rate', *(f'{length} tokens, {pairs} pairs' for length, pairs in (test.split(':') for test in tests)))
    lines = [f'| {" | ".join(heads)} |', '| --- ' * len(heads) + '|'] if rows else []
    for arm in dict.fromkeys(arm for (arm, _), seeds in runs.items() if 0 in seeds):
        mean = {rate: statistics.mean(seeds[0].values()) for (name, rate), seeds in runs.items() if name == arm and 0 in seeds}
        best = max(mean, key=mean.get)
        seeds = [accuracy for _, accuracy in sorted(runs[arm, best].items())]
        cells = (', '.join(f'{100 * accuracy[test]:.1f}' for accuracy in seeds) for test in tests)
        lines.append(f'| {arm} | {best:g} | {" | ".join(cells)} |')
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


def race_costs_table(rows: list[dict]) -> list[str]:
    """Lines of what it costs to come to adamw's last loss: steps, CPU seconds and FLOPs, over those of adamw's whole run."""

    def cell(metrics, adamw):
        shares = optimizer_race.shares_to_reach(metrics, adamw)
        return 'not reached' if shares is None else ' · '.join(f'{share:.2f}' for share in shares.values())

    return _by_task("steps, CPU seconds, FLOPs to adamw's loss", rows, cell)


def race_equal_costs_table(rows: list[dict]) -> list[str]:
    """Lines of the mean losses when adamw's CPU seconds and when its FLOPs are spent."""
    cell = lambda metrics, adamw: ' · '.join(f'{loss:.4g}' for loss in optimizer_race.losses_at_equal_cost(metrics, adamw).values())
    return _by_task("loss at adamw's CPU seconds, FLOPs", rows, cell)


def race_rates_table(rows: list[dict]) -> list[str]:
    """Lines of the mean losses of two seeds around the best learning rate."""
    cell = lambda metrics, adamw: ' · '.join(f'{loss:.4g}' for loss in metrics['sensitivity'])
    return _by_task('loss at 1/3, 1, 3 of the rate', rows, cell)


def _by_task(head: str, rows: list[dict], cell: Callable[[dict, dict], str]) -> list[str]:
    """Lines with a cell for each optimizer and task, of the latest rows: of its metrics and adamw's."""
    tasks = list(dict.fromkeys(row['config']['task'] for row in rows))
    entries = [optimizer_race.latest(rows, task) for task in tasks]
    lines = [f'| {head} | {" | ".join(tasks)} |', '| --- ' * (len(tasks) + 1) + '|'] if rows else []
    for name in optimizer_race.OPTIMIZERS if rows else ():
        cells = [cell(of_task[name], of_task['adamw']) if name in of_task else '' for of_task in entries]
        lines.append(f'| {name} | {" | ".join(cells)} |')
    return lines


def gpu_table(rows: list[dict]) -> list[str]:
    """Lines of what ran on a GPU, the latest of each cell and shape; none without rows."""
    latest = {json.dumps(row['config']): row for row in rows}
    heads = ('on a GPU', 'batch x length', 'forward, ms', 'forward and backward, ms', 'tokens/s', 'MFU', 'memory, GiB', 'commit')
    lines = [f'| {" | ".join(heads)} |', '| --- ' * len(heads) + '|']
    lines += [f'| {" | ".join(_gpu_cells(row["metrics"]))} | {row["commit"][:7]} |' for row in latest.values()]
    return lines if latest else []


def _gpu_cells(found: dict) -> list[str]:
    ways = [f'chunks of {found["chunk_size"]}'] if found.get('chunk_size') else []
    ways += ['layers one by one'] * (not found.get('scan_layers', True)) + ["Hope's kernels"] * (found.get('kernels') == 'gpu_unverified')
    name = ', '.join([found['model'], *ways])
    shape = f'{found["batch"]} x {found.get("length", found.get("time"))}'
    if 'heads' in found:
        name, shape = f'{found["what"]}: {name}', f'{shape}, {found["heads"]} heads of {found["dim"]}'
    figures = dict(forward_ms='.2f', both_ms='.2f', tokens_per_second=',.0f', mfu='.1%')
    memory = found['temporary_mib'] / 1024 if 'temporary_mib' in found else found['device_peak_gib']
    return [name, shape, *(format(found[key], form) if key in found else '' for key, form in figures.items()), f'{memory:.1f}']


def candidates_table(rows: list[dict]) -> list[str]:
    """Lines of SEAL's inner updates, the latest of each model, number of candidates and hardware; none without rows."""
    latest = {(row['model'], row['hardware'], row['config']['candidates']): row for row in rows}
    heads = ('candidates together', 'hardware', 'number', 'seconds each', 'times as fast as alone', 'answers, seconds each', 'commit')
    lines = [f'| {" | ".join(heads)} |', '| --- ' * len(heads) + '|']
    for (model, hardware, count), row in sorted(latest.items()):
        found = row['metrics']
        seconds = found.get('seconds_per_candidate') or 1 / found['candidates_per_second']
        answers = f'{found["evaluation_seconds_per_candidate"]:.3f}' if 'evaluation_seconds_per_candidate' in found else ''
        lines.append(f'| {model} | {hardware} | {count} | {seconds:.4f} | {found["ratio"]:.2f} | {answers} | {row["commit"][:7]} |')
    return lines if latest else []


def decode_table(rows: list[dict]) -> list[str]:
    """Lines of what a token costs after short and long contexts, the latest of each model, hardware and batch; none without rows."""
    found: dict[tuple[str, str, int], dict[int, dict]] = {}
    for row in rows:
        found.setdefault((row['model'], row['hardware'], row['config']['batch']), {})[row['config']['context']] = row['metrics']
    contexts = sorted({context for each in found.values() for context in each})
    lines = [f'| decoding, ms a token, after | hardware | side by side | {" | ".join(f"{context:,}" for context in contexts)} | ratio |']
    lines.append('| --- ' * (len(contexts) + 4) + '|')
    for (model, hardware, batch), each in found.items():
        cells = [f'{each[context]["ms_per_token"]:.2f}' if context in each else 'not run' for context in contexts]
        lines.append(f'| {model} | {hardware} | {batch} | {" | ".join(cells)} | {each[max(each)]["ratio_to_1k"]:.2f} |')
    return lines if found else []


def scaling_table(rows: list[dict]) -> list[str]:
    """Lines of how costs grow, the latest slopes of each hardware, curve and model; none without rows."""
    places, slopes = collections.defaultdict(set), collections.defaultdict(dict)
    for row in rows:
        found = row['metrics']
        key = row['hardware'], found['curve'], found['model']
        if found['what'] == 'point':
            places[key].add(found['place'])
        else:
            slopes[key][found['cost']] = found
    heads = ('slope of log cost', 'hardware', 'of', 'from', 'to', 'seconds', 'of the last three points', 'temporary memory')
    lines = [f'| {" | ".join(heads)} |', '| --- ' * len(heads) + '|']
    for (hardware, curve, model), found in slopes.items():
        seconds, memory = found['seconds'], found.get('temporary_mib')
        half = (seconds['high'] - seconds['low']) / 2
        ends = [f'{end(places[hardware, curve, model]):,}' for end in (min, max)]
        grown = f'{memory["slope"]:.2f}' if memory else ''
        cells = (curve, hardware, model, *ends, f'{seconds["slope"]:.2f} ± {half:.2f}', f'{seconds["recent"]:.2f}', grown)
        lines.append(f'| {" | ".join(cells)} |')
    return lines if slopes else []


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


def reliability_table(rows: list[dict]) -> list[str]:
    """Lines of what `scripts/test.sh --full` came to, the latest row of each choice of tests; none without rows."""
    latest = {row['config']['tests']: row for row in rows}
    heads = ('tests', 'passed', 'failed', 'skipped', 'minutes', 'commit')
    lines = [f'| {" | ".join(heads)} |', '| --- ' * len(heads) + '|']
    for tests, row in latest.items():
        found = row['metrics']
        counts = ' | '.join(str(found[name]) for name in ('passed', 'failed', 'skipped'))
        lines.append(f'| {tests} | {counts} | {row["wall_s"] / 60:.1f} | {row["commit"][:7]} |')
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


def insert(text: str, made: dict[str, list[str]]) -> str:
    """The text with each table in its place.

    Raises:
        KeyError: of a place whose table is not made.
    """
    return PLACE.sub(lambda place: ''.join(place.groups()) + ''.join(f'{line}\n' for line in made[place[1]] or ['Not run yet.']), text)


def main() -> int:
    """Rewrites the pages and draws the figures, or with --check says whether they are up to date by the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--check', action='store_true', help='change nothing; exit code 1 when a page is out of date')
    arguments = parser.parse_args()
    made = tables()
    pages = {page: insert(page.read_text(), made) for page in PAGES}
    if arguments.check:
        return int(any(page.read_text() != text for page, text in pages.items()))
    for page, text in pages.items():
        page.write_text(text)
    for name, draw in FIGURES.items():
        if rows := read_rows(RESULTS / f'{name}.jsonl'):
            draw(rows, RESULTS / f'{name}.png')
    return 0


if __name__ == '__main__':
    sys.exit(main())
