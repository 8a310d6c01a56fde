"""Few-shot abstraction: a model that learns to configure its own training on a task of grids: `python -m experiments.seal_arc`.

Sec. 4.2, arXiv:2506.10943v2, of Llama-3.2-1B on eight filtered tasks of ARC, five self-edits of each: in-context 0 %, untrained self-edits
20, SEAL after one round 72.5, the configuration that the authors found by hand 100. So one constant configuration beats what is learned,
on tasks chosen to be solvable by it, and 29 of 40 trials have a 95 % interval of 56 to 85 even if they were independent.

Here the world of grid rules (`nested_jax/data/tasks/grid_rules.py`) has 512 configurations: four groups of augmentations on or off, the
loss on all or on output tokens, four learning rates, four numbers of epochs. `--build-table` has a frozen learner, a Transformer of
0.03M parameters that saw seven of 15 families of rules, try all of them on every task of the other eight, and stores what each earns. With
the table the expected reward of any policy is a sum over 512 probabilities, without noise of sampling or of updates. The policy is a model
of its own that begins as the learner does: it reads a task's demonstrations and writes seven words. What cannot be read as a
configuration earns 0.

Where --table lacks tasks of this learner, as with another --model-seed, the first --subset tasks are tried before the policies, all 512
configurations of each, and kept in --runs. How many tasks the numbers are over is said and is part of the row.

Algorithms are compared on two splits: tasks of one kind (colours), where a constant may be the best there is, and tasks of all kinds.
Beside them stand the learner without an update, the uniform policy, the constant and the constant of each family that are best on the
training tasks, and each task's own best. A policy has learned to configure only where it is above the best constant. Intervals are 95 %
bootstraps over test tasks, of differences paired.

Rows of 96 tasks and three seeds of the policies: the table took 1,419 s of one core, a seed of the four algorithms 167 to 221 s, other work
on both. Rows of other algorithms, as of --algorithms dr-grpo, are more arms of the same table: what a policy learns does not depend on
which others are run (seed 0, run again in other company, gave the same bits). Rows are added to --table and --results, stages stored in
--runs: the command given again after Ctrl-C or a kill goes on where it stopped.
"""

import dataclasses
import pathlib
import sys
import time
from typing import Any

import jax
import numpy as np

from experiments.arguments import parse_arguments
from experiments.grid import INTERRUPTED
from experiments.seal_arc_rewards import (
    LEAST,
    SPLITS,
    Table,
    TableError,
    as_table,
    build_table,
    check_learner,
    check_splits,
    random_table,
    select,
    task_rows,
)
from experiments.seal_arc_tables import draw_arc
from experiments.seal_arc_world import MEASURES, model_config, pretrain, train_config
from experiments.seal_policies import Policies, baselines
from experiments.seal_runs import progress
from experiments.seal_world import bootstrap
from nested_jax.config import as_dict, check
from nested_jax.evaluation.rows import append_row, config_digest, hardware_name, make_row, read_rows
from nested_jax.models.language_model import LanguageModel
from nested_jax.seal.outer_loop import Algorithm, OuterConfig, digest
from nested_jax.seal.stages import Stages

PyTree = Any
EXPERIMENT = 'seal_arc'
RESULTS = pathlib.Path(__file__).parent / 'results'
CONSTANT = 'best constant'


@dataclasses.dataclass(frozen=True)
class Args:
    """Have a model learn to configure its own training.

    Raises:
        ValueError: naming the argument, its value and what is allowed.
    """

    build_table: bool = False
    """Add the rewards of all configurations on the tasks that have none, and nothing else."""
    tasks: int = 96
    """Of the table, at most; families take turns, training and test tasks too."""
    subset: int = 16
    """Tasks, from the first, that are tried where the table has no rows for all; at least 9."""
    seeds: tuple[int, ...] = (0,)
    """Of the policies, a row for each."""
    model_seed: int = 0
    """Of the learner, as which the policies begin."""
    rounds: int = 4
    """Updates of a policy."""
    each: int = 15
    """Self-edits of a task in a round."""
    algorithms: tuple[Algorithm, ...] = ('rest-em', 'grpo', 'rloo', 'random')
    """Ways to learn from a round's self-edits."""
    learning_rate: float = 1e-3
    """Of a policy's updates."""
    pretraining_steps: int = 2500
    """Of 32 rows of 57 tokens."""
    runs: pathlib.Path = pathlib.Path('runs') / EXPERIMENT
    """Folder of the stages."""
    table: pathlib.Path = RESULTS / f'{EXPERIMENT}_table.jsonl'
    """File of the rewards."""
    results: pathlib.Path = RESULTS / f'{EXPERIMENT}.jsonl'
    """File that a row for each seed is added to."""
    smoke: bool = False
    """A few steps of everything on random rewards and no row, to see that it works; its numbers mean nothing."""

    def __post_init__(self):
        for name, least in dict(tasks=1, rounds=1, each=2, pretraining_steps=2, model_seed=0).items():
            check(getattr(self, name) >= least, name, getattr(self, name), f'an integer of at least {least}')
        check(self.subset >= LEAST, 'subset', self.subset, f'an integer of at least {LEAST}, for tasks of either half of each split')
        check(bool(self.seeds) and min(self.seeds) >= 0, 'seeds', self.seeds, 'at least one integer, none below 0')
        check(bool(self.algorithms), 'algorithms', self.algorithms, 'at least one')
        check(self.learning_rate > 0, 'learning_rate', self.learning_rate, 'a number above 0')


def main(argv: list[str] | None = None) -> int:
    """Builds the table, or runs the seeds that have no row; returns the exit code."""
    args = parse_arguments(Args, argv, __doc__)
    if args.smoke:
        sizes = dict(rounds=1, each=2, tasks=16, pretraining_steps=2, seeds=args.seeds[:1], runs=args.runs / 'smoke')
        args = dataclasses.replace(args, **sizes)
    try:
        return _build(args) if args.build_table else _run(args)
    except KeyboardInterrupt:
        print(f'stopped; the same command goes on from {args.runs}', flush=True)
        return INTERRUPTED
    except TableError as error:
        print(f'error: {error}', file=sys.stderr)
        return 2


def _build(args: Args) -> int:
    build_table(start(args), range(args.tasks), args.pretraining_steps, args.model_seed, args.table)
    return 0


def _run(args: Args) -> int:
    table = random_table(args.tasks) if args.smoke else rewards(args)
    for seed in args.seeds:
        began, config = time.monotonic(), run_config(args, table, seed)
        if not args.smoke and config_digest(config) in {row['config_digest'] for row in read_rows(args.results)}:
            print(f'seed {seed} has a row in {args.results}')
            continue
        stages, begun = Stages(args.runs / config_digest(config)), start(args)
        found = {split: arms(args, table, split, seed, stages, begun) for split in SPLITS}
        hardware, wall = hardware_name(jax.devices()), time.monotonic() - began
        told = dict(seed=seed, config=config, metrics=dict(splits=found), hardware=hardware, wall_s=wall)
        row = make_row(experiment=EXPERIMENT, model='transformer', **told)
        print('\n'.join(report(found)), flush=True)
        if not args.smoke:
            append_row(args.results, row)
        picture = args.runs / config_digest(config) / 'arms.png'
        draw_arc([row], picture)
        print(f'{picture}, {wall:.0f} s', flush=True)
    return 0


def rewards(args: Args) -> Table:
    """Those of --table; where it lacks tasks, with those of the first --subset tasks, which are tried and kept with the learner's stage.

    Raises:
        TableError: for files of other content, and too few tasks; before any is tried.
    """
    learner = args.pretraining_steps, args.model_seed
    rows = task_rows(args.table, *learner, args.tasks)
    missing = [index for index in range(min(args.subset, args.tasks)) if index not in rows]
    indices = {*rows, *missing}
    check_splits(indices)
    if len(rows) < args.tasks:
        print(f'{args.table} has {len(rows)} of {args.tasks} tasks of this learner; intervals are over {len(indices)} tasks', flush=True)
    if missing:
        own, params = learner_folder(args) / 'table.jsonl', start(args)
        check_learner(rows.values(), digest(params), args.table)
        print(f'all 512 configurations of {len(missing)} tasks are tried, or read from {own}', flush=True)
        build_table(params, missing, *learner, own)
        found = task_rows(own, *learner, args.subset)
        rows |= {index: found[index] for index in missing}
    return as_table(rows)


def learner_folder(args: Args) -> pathlib.Path:
    """Of what is the learner's whatever the policies' seeds."""
    config = dict(model=as_dict(model_config()), train=as_dict(train_config(args.pretraining_steps)), seed=args.model_seed)
    return args.runs / config_digest(config)


def start(args: Args) -> PyTree:
    """Parameters of the learner."""
    with progress('the model'):
        make = lambda: pretrain(LanguageModel(model_config()), train_config(args.pretraining_steps), args.model_seed)
        return Stages(learner_folder(args)).tree('pretrained', make)


def run_config(args: Args, table: Table, seed: int) -> dict:
    """Everything that decides what a seed's numbers come out as."""
    updates = [as_dict(OuterConfig(algorithm=name, learning_rate=args.learning_rate)) for name in args.algorithms]
    return dict(
        table=dict(learner=table.learner, tasks=list(table.indices)), model=as_dict(model_config()), outer=updates, rounds=args.rounds,
        each=args.each, train=as_dict(train_config(args.pretraining_steps)), model_seed=args.model_seed, seed=seed,
    )  # fmt: skip


def arms(args: Args, table: Table, split: str, seed: int, stages: Stages, begun: PyTree) -> dict[str, Any]:
    """Expected rewards on a split's test tasks, by arm, of the policies that begin as `begun`, after each round."""
    train, test = (select(table, SPLITS[split], test=half) for half in (False, True))
    found = baselines(train, test)
    policies = Policies(LanguageModel(model_config()), stages, train, test)
    found['untrained policy'], _ = policies.expected(f'{_name(split)}/untrained', begun)
    told = {}
    for algorithm in args.algorithms:
        with progress(f'{split}: {algorithm}'):
            config = OuterConfig(algorithm=algorithm, learning_rate=args.learning_rate)
            rounds = policies.rounds(f'{_name(split)}/{algorithm}', begun, config, args.rounds, args.each, seed)
            found |= {f'{algorithm}, round {index}': one.pop('expected') for index, one in enumerate(rounds, 1)}
            told[algorithm] = rounds
    return dict(tasks=[len(train.indices), len(test.indices)], arms=summary(found), rounds=told)


def summary(found: dict[str, np.ndarray]) -> dict[str, dict[str, Any]]:
    """Of each arm (tasks, 3): means with intervals by measure, and the paired difference from the best constant in what is rewarded."""
    constant = found[CONSTANT][:, 0]
    measures = lambda values: {name: bootstrap(column) for name, column in zip(MEASURES, values.T, strict=True)}
    return {arm: measures(values) | dict(above_constant=bootstrap(values[:, 0] - constant)) for arm, values in found.items()}


def report(found: dict[str, dict]) -> list[str]:
    """The tables as they are printed."""
    lines = []
    for split, part in found.items():
        train, test = part['tasks']
        lines += ['', f'{split}, {train} training and {test} test tasks: expected reward, above the best constant, share of cells']
        for arm, value in part['arms'].items():
            mean, low, high = value['vote']
            gap, below, above = value['above_constant']
            told = f'{arm:>24}  {mean:.3f} [{low:.3f}, {high:.3f}]   {gap:+.3f} [{below:+.3f}, {above:+.3f}]'
            lines.append(f'{told}   {value["cells"][0]:.3f}')
        for algorithm, rounds in part['rounds'].items():
            invalid = ', '.join(f'{one["invalid"]:.2f}' for one in rounds)
            lines.append(f'  {algorithm}: probability of invalid self-edits by round {invalid}')
    return lines


def _name(split: str) -> str:
    return split.replace(' ', '-')


if __name__ == '__main__':
    sys.exit(main())
