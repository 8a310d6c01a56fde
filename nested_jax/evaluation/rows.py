"""Measured results as rows of a JSON-lines file: tables and pictures are made from rows and from nothing else."""

import collections
import datetime
import hashlib
import json
import os
import pathlib
import platform
import shlex
import statistics
import subprocess
import sys
from typing import Any

from nested_jax.config import redacted

_ROOT = pathlib.Path(__file__).resolve().parents[2]
_ARCHIVED = '$Format:%H$'  # git archive puts the commit here (.gitattributes)


def make_row(
    *,
    experiment: str,
    model: str,
    seed: int,
    config: dict,
    metrics: dict[str, Any],
    hardware: str,
    wall_s: float,
    command: str | None = None,
) -> dict:
    """One result with everything needed to make it again.

    Args:
        experiment: name of the table, picture or job.
        model: preset or other name.
        seed: of the run.
        config: resolved configuration, JSON.
        metrics: what was measured.
        hardware: as `hardware_name` says it.
        wall_s: seconds the run took.
        command: that made it; None for this process's command line.
    """
    return dict(
        experiment=experiment,
        model=model,
        seed=seed,
        config=redacted(config),
        config_digest=config_digest(config),
        metrics=metrics,
        hardware=hardware,
        commit=commit(),
        command=command or command_line(),
        wall_s=round(wall_s, 1),
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
    )


def append_row(path: str | os.PathLike, row: dict) -> None:
    """Adds a row to the end of a file; makes the file and its folder when absent."""
    append_rows(path, [row])


def append_rows(path: str | os.PathLike, rows: list[dict]) -> None:
    """Adds rows to the end of a file in one write, so that none or all of them are there when the process is killed."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, 'ab', buffering=0) as file:
        file.write(''.join(json.dumps(row) + '\n' for row in rows).encode())


def read_rows(path: str | os.PathLike) -> list[dict]:
    """The rows of a file, oldest first; none when it is absent."""
    path = pathlib.Path(path)
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()] if path.exists() else []


def best_runs(rows: list[dict]) -> dict[tuple[int, str], list[dict]]:
    """Pre-training runs that compare with one another: those evaluated on the whole held-out text, at the best learning rate.

    Args:
        rows: of runs on one text; those of a part of the held-out text are passed over.

    Returns:
        (tokens, model) -> the latest run of each seed, at the learning rate with the best mean.
    """
    whole = max((row['metrics']['heldout_bytes'] for row in rows), default=0)
    by_rate = collections.defaultdict(dict)
    for row in rows:
        if row['metrics']['heldout_bytes'] == whole:
            key = row['metrics']['tokens'], row['model'], row['config']['train']['learning_rate']
            by_rate[key][row['seed']] = row
    best = {}
    for (tokens, model, _), by_seed in by_rate.items():
        runs = list(by_seed.values())
        if (tokens, model) not in best or mean_bits_per_byte(runs) < mean_bits_per_byte(best[tokens, model]):
            best[tokens, model] = runs
    return best


def mean_bits_per_byte(runs: list[dict]) -> float:
    """Mean over runs of what they reached on held-out text."""
    return statistics.mean(run['metrics']['heldout_bits_per_byte'] for run in runs)


def config_digest(config: dict) -> str:
    """16 hexadecimal digits of the sha256 of a configuration as it is stored, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(redacted(config), sort_keys=True).encode()).hexdigest()[:16]


def hardware_name(devices: list) -> str:
    """What the run ran on, from its JAX devices: kind and number, and the processor's cores."""
    kind = devices[0].device_kind
    name = platform.machine() if kind == 'cpu' else kind
    return f'{len(devices)} x {name}, {os.cpu_count()} CPU cores'


def commit() -> str:
    """The commit of the source tree, `+changes` when files other than results differ from it, 'unknown' outside a repository.

    In what `git archive` packed, as scripts/launch_tpu.sh sends it, the commit it was made of: changes since are not seen there.
    """
    if not (_ROOT / '.git').exists():
        return 'unknown' if _ARCHIVED.startswith('$') else _ARCHIVED
    try:
        head = _git(_ROOT, 'rev-parse', 'HEAD')
        changed = _git(_ROOT, 'status', '--porcelain', '--untracked-files=no', '--', '.', ':(exclude)experiments/results')
        return head + ('+changes' if changed else '')
    except (OSError, subprocess.SubprocessError):
        return 'unknown'


def command_line() -> str:
    """The command that started this process, in the form a user types."""
    main = sys.modules['__main__']
    spec = getattr(main, '__spec__', None)
    program = f'python -m {spec.name}' if spec else f'python {sys.argv[0]}'
    return shlex.join([*program.split(), *_redacted_words(sys.argv[1:])])


def _redacted_words(words: list[str]) -> list[str]:
    """Arguments without secrets: --name value and --name=value are known by their names."""
    told, option = [], ''
    for word in words:
        name, equals, value = word.partition('=') if word.startswith('-') else (option, '', word)
        told.append(f'{name}={redacted(value, name)}' if equals else word if word.startswith('-') else redacted(value, name))
        option = '' if equals or not word.startswith('-') else word
    return told


def _git(folder: pathlib.Path, *arguments: str) -> str:
    result = subprocess.run(['git', *arguments], cwd=folder, check=True, capture_output=True, text=True, timeout=10)
    return result.stdout.strip()
