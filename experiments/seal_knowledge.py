"""Knowledge incorporation: a model that learns to write its own training data: `python -m experiments.seal_knowledge`.

Table 2, arXiv:2506.10943v2, of Qwen2.5-7B and questions on SQuAD's passages, single passage: base 32.7 %, passage only 33.5, untrained
self-edits 39.7, GPT-4.1's 46.3, SEAL after two rounds 47.0. One training seed; recomputed from the published files, SEAL above untrained
is +7.3 points with a 95 % interval of 2.5 to 11.9.

Here the whole loop runs on a world of made-up people (`nested_jax/data/tasks/biographies.py`): a Transformer of 0.1M parameters is
pre-trained for 1,500 steps, and then, in each round, writes six self-edits of each of 64 passages about new people, learns from each with
two adapter starts, and is trained on the best of six (ReST-EM). 256 other people are the test. Beside SEAL's arms stand those that say
what its gain is made of: the same edits with their words shuffled, the best of six untrained edits (chosen with one adapter start, asked
with another), the edit that holds all answers, training on a random one of the six, and the passage alone after the last round, since
the writer is the learner.

The inner budget, learning rate x steps, decides which arm wins, so nine are tried on 64 passages of their own. The one at which untrained
self-edits do best there is reported, and 0.003 x 16 beside it, the setting of the first prototype. Intervals are 95 % bootstraps over
passages, of differences paired.

The paper's order of arms does not come out here, at any budget; that training on the best helps and on random ones does not, does
(README, table).

Every stage is stored in --runs and done once: the command given again after Ctrl-C or a kill goes on where it stopped.
"""

import contextlib
import dataclasses
import functools
import pathlib
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import tyro

from experiments.grid import INTERRUPTED
from experiments.seal_tables import draw_seal
from experiments.seal_world import (
    PROTOTYPE,
    Budget,
    Edit,
    Learner,
    Marks,
    Reader,
    Text,
    bootstrap,
    composition,
    model_config,
    pretrain,
    samples,
    shuffled,
    train_config,
    write_edits,
    write_texts,
)
from nested_jax.config import as_dict
from nested_jax.data.tasks.biographies import World
from nested_jax.evaluation.rows import append_row, config_digest, hardware_name, make_row, read_rows
from nested_jax.models.language_model import LanguageModel
from nested_jax.seal.outer_loop import OuterConfig, RewardTable, choose, digest, make_policy_update
from nested_jax.seal.rewards import reliability
from nested_jax.seal.stages import Stages

EXPERIMENT = 'seal_knowledge'
RESULTS = pathlib.Path(__file__).parent / 'results' / f'{EXPERIMENT}.jsonl'
BUDGETS = tuple(Budget(rate, steps) for rate in (3e-3, 1e-2, 3e-2) for steps in (8, 16, 32))

TEST_START, CHOICE_START = 1000, 2000  # seeds of adapters: those of the test, and of the best of six untrained


@dataclasses.dataclass(frozen=True)
class Args:
    """Have a model learn to write its own training data.

    Raises:
        ValueError: naming the argument, its value and what is allowed.
    """

    learner: Learner = 'transformer'
    """The model that writes and learns; of Hope's, adapters lie on the projections and on both levels of the CMS."""
    seeds: tuple[int, ...] = (0,)
    """A whole run for each, pre-training included."""
    rounds: int = 3
    """Updates of the writer."""
    contexts: int = 64
    """Passages of a round, and of the choice of the budget."""
    each: int = 6
    """Self-edits of a passage."""
    repetitions: int = 2
    """Adapter starts of a self-edit."""
    tests: int = 256
    """Passages of the test."""
    pretraining_steps: int = 1500
    """Of 32 rows of 64 tokens."""
    runs: pathlib.Path = pathlib.Path('runs') / EXPERIMENT
    """Folder of the stages."""
    results: pathlib.Path = RESULTS
    """File that a row for each seed is added to."""
    smoke: bool = False
    """A few steps of everything and no row, to see that it works; its numbers mean nothing."""

    def __post_init__(self):
        least = dict(rounds=1, contexts=2, each=2, repetitions=2, tests=2, pretraining_steps=2)
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ValueError(f'{name} is {getattr(self, name)}, allowed is an integer of at least {bound}')
        if not self.seeds or min(self.seeds) < 0:
            raise ValueError(f'seeds is {self.seeds}, allowed is at least one integer, none below 0')

    @property
    def budgets(self) -> tuple[Budget, ...]:
        """Those tried."""
        return (PROTOTYPE,) if self.smoke else BUDGETS


def main(argv: list[str] | None = None) -> int:
    """Runs the seeds that have no row; returns the exit code."""
    args = tyro.cli(Args, args=argv, description=__doc__)
    if args.smoke:
        sizes = dict(rounds=1, contexts=4, each=2, tests=4, pretraining_steps=4, seeds=args.seeds[:1], runs=args.runs / 'smoke')
        args = dataclasses.replace(args, **sizes)
    try:
        for seed in args.seeds:
            run_seed(args, seed)
    except KeyboardInterrupt:
        print(f'stopped; the same command goes on from {args.runs}', flush=True)
        return INTERRUPTED
    return 0


def run_seed(args: Args, seed: int) -> None:
    """One seed: every stage, the table, the picture and the row."""
    began, config = time.monotonic(), run_config(args, seed)
    if not args.smoke and config_digest(config) in {row['config_digest'] for row in read_rows(args.results)}:
        print(f'seed {seed} has a row in {args.results}')
        return
    run = Run(args, seed, Stages(args.runs / config_digest(config)))
    metrics = run.metrics()
    print('\n'.join(report(metrics)), flush=True)
    hardware, wall = hardware_name(jax.devices()), time.monotonic() - began
    row = make_row(experiment=EXPERIMENT, model=args.learner, seed=seed, config=config, metrics=metrics, hardware=hardware, wall_s=wall)
    if not args.smoke:
        append_row(args.results, row)
    picture = args.runs / config_digest(config) / 'arms.png'
    draw_seal([row], picture)
    print(f'{picture}, {wall:.0f} s', flush=True)


def run_config(args: Args, seed: int) -> dict:
    """Everything that decides what a seed's numbers come out as."""
    sizes = {name: getattr(args, name) for name in ('rounds', 'contexts', 'each', 'repetitions', 'tests')}
    world, outer = World(), OuterConfig()
    return dict(
        world=as_dict(world), model=as_dict(model_config(world, args.learner)), train=as_dict(train_config(args.pretraining_steps)),
        outer=as_dict(outer), budgets=[list(budget) for budget in args.budgets], seed=seed, **sizes,
    )  # fmt: skip


class Run:
    """The stages of one seed."""

    def __init__(self, args: Args, seed: int, stages: Stages):
        self.args, self.seed, self.stages, self.world = args, seed, stages, World()
        self.model = LanguageModel(model_config(self.world, args.learner))
        self.reader = Reader(self.model, self.world)
        self.updates = {name: make_policy_update(self.model, OuterConfig(algorithm=name)) for name in ('rest-em', 'random')}

    def metrics(self) -> dict[str, Any]:
        """What the row holds: the sweep, and for each reported budget the arms, each round's rewards and what was written."""
        with progress('pre-training'):
            train = train_config(self.args.pretraining_steps)
            start = self.stages.tree('pretrained', lambda: pretrain(self.model, self.world, train, self.seed))
        self.known = [float(self.reader.ask(start, self.world.known_people).right.mean())]
        print(f'  questions about known people: {self.known[0]:.3f} right', flush=True)
        with progress('trying budgets'):
            sweep = {str(budget): self.sweep(start, budget) for budget in self.args.budgets}
        chosen = max(self.args.budgets, key=lambda budget: sweep[str(budget)]['untrained self-edit'])
        reported = {}
        for budget in dict.fromkeys((chosen, PROTOTYPE)):
            with progress(f'{budget}: arms without training of the writer'):
                arms = self.untrained_arms(start, budget)
            trained = {name: self.rounds(start, budget, name) for name in self.updates}
            arms |= {arm: right for found in trained.values() for arm, right in found.pop('arms').items()}
            reported[str(budget)] = dict(arms=summary(arms), **trained)
        share = float(np.mean(self.reader.shares)) if self.reader.shares else None
        return dict(known=self.known[0], sweep=sweep, chosen=str(chosen), reported=reported, real_share=share)

    def sweep(self, params: Any, budget: Budget) -> dict[str, float]:
        """Accuracy of three arms on people of the development split."""
        texts = write_texts(self.world, self.args.contexts, 'dev', self.seed)
        edits = self.edits('sweep/edits', params, texts, 1, 0)[:, 0]
        arms = {'passage only': [None] * len(texts), 'untrained self-edit': edits, 'oracle edit': self.oracle(texts)}
        ask = lambda edits: self.reader.learn_and_ask(params, texts, edits, budget, [TEST_START])
        name = lambda arm: f'sweep/{_stage_name(budget)}/{arm.replace(" ", "-")}'
        return {arm: float(self.marks(name(arm), lambda edits=edits: ask(edits)).right.mean()) for arm, edits in arms.items()}

    def untrained_arms(self, params: Any, budget: Budget) -> dict[str, np.ndarray]:
        """Shares right (tests,) of the arms that need no round."""
        texts, folder = self.test_texts(), _stage_name(budget)
        many = self.edits('test/edits', params, texts, self.args.each, 1)
        flat, again = [edit for written in many for edit in written], [text for text in texts for _ in range(self.args.each)]
        choice = self.marks(f'{folder}/test/choice', lambda: self.reader.learn_and_ask(params, again, flat, budget, [CHOICE_START]))
        order = np.stack([mark.reshape(len(texts), -1) for mark in choice], -1)
        best = [max(range(self.args.each), key=lambda m: tuple(order[c, m])) for c in range(len(texts))]
        arms = {
            'passage only': [None] * len(texts),
            'untrained self-edit': many[:, 0],
            'shuffled self-edit': [shuffled(self.world, edit.tolist(), self.seed) for edit in many[:, 0]],
            f'best of {self.args.each} untrained': [written[m] for written, m in zip(many, best, strict=True)],
            'oracle edit': self.oracle(texts),
        }
        base = self.marks('test/base', lambda: self.reader.ask(params, [text.person for text in texts])).right[:, 0]
        found = {'base': base}
        for arm, edits in arms.items():
            name = f'{folder}/test/{arm.replace(" ", "-")}'
            found[arm] = self.marks(name, lambda edits=edits: self.reader.learn_and_ask(params, texts, edits, budget, [TEST_START])).right[
                :, 0
            ]
        return found

    def rounds(self, params: Any, budget: Budget, algorithm: str) -> dict[str, Any]:
        """Rounds of one way to choose what the writer is trained on, and the test after each."""
        texts, arms, history = self.test_texts(), {}, []
        for index in range(1, self.args.rounds + 1):
            name = f'{_stage_name(budget)}/{algorithm}-{index}'
            with progress(f'{budget}: {algorithm}, round {index}'):
                params, told = self.round(params, budget, algorithm, index, name)
                edits = self.edits(f'{name}/test-edits', params, texts, 1, 1)[:, 0]
                ask = functools.partial(self.reader.learn_and_ask, params, texts, budget=budget, repetitions=[TEST_START])
                arms[f'{algorithm}, round {index}'] = self.marks(f'{name}/test', functools.partial(ask, edits)).right[:, 0]
                known = float(self.reader.ask(params, self.world.known_people).right.mean())
                history.append(told | dict(known=known, **dataclasses.asdict(composition(self.world, texts, edits))))
        alone = self.marks(f'{name}/test-passage-only', functools.partial(ask, [None] * len(texts))).right[:, 0]
        return dict(arms=arms | {f'passage only after {algorithm}': alone}, rounds=history)

    def round(self, params: Any, budget: Budget, algorithm: str, index: int, name: str) -> tuple[Any, dict]:
        """The writer after one update, and what its rewards were."""
        texts = write_texts(self.world, self.args.contexts, 'train', 1000 * self.seed + index)
        edits = self.edits(f'{name}/edits', params, texts, self.args.each, 10 + index)
        told: dict[str, Any] = {}
        rewards, ties, baseline = np.zeros(edits.shape[:2]), np.zeros(edits.shape[:2]), np.zeros(len(texts))
        if algorithm != 'random':
            marks = self.rewards(f'{name}/rewards', params, texts, edits, budget)
            baseline = self.reader.ask(params, [text.person for text in texts]).right[:, 0]
            rewards, ties = marks.right.mean(2), marks.log_prob.mean(2)
            told = dict(mean=float(rewards.mean()), best=float(rewards.max(1).mean()), reliability=reliability(marks.right)._asdict())
        picked = choose(OuterConfig(algorithm=algorithm), rewards, baseline, ties, np.random.default_rng([self.seed, index]))
        update = lambda: self.updates[algorithm](params, samples(texts, edits), picked.reshape(-1).astype(float), self.seed)
        return self.stages.tree(f'{name}/writer', update), told | dict(trained_on=int(picked.sum()))

    def rewards(self, name: str, params: Any, texts: list[Text], edits: np.ndarray, budget: Budget, part: int = 16) -> Marks:
        """Marks (C, M, P) of every self-edit, a stage for each few passages: none is updated on twice, and none serves another learner."""
        found, learner = [], digest(params)
        for start in range(0, len(texts), part):
            written = zip(texts[start : start + part], edits[start : start + part], strict=True)
            rows = [(text, edit) for text, each in written for edit in each]
            ask = lambda rows=rows: self.reader.learn_and_ask(params, *zip(*rows, strict=True), budget, range(self.args.repetitions))
            stored = self.stages(f'{name}-{start}', lambda ask=ask: ask()._asdict() | dict(learner=np.array(learner)))
            right = RewardTable(str(stored['learner']), stored['right']).rewards(learner)
            found.append(Marks(right, stored['log_prob']))
        return Marks(*(np.concatenate(marks).reshape(*edits.shape[:2], -1) for marks in zip(*found, strict=True)))

    def edits(self, name: str, params: Any, texts: list[Text], each: int, seed: int) -> np.ndarray:
        """Self-edits (C, M, tokens)."""
        write = lambda: dict(tokens=write_edits(self.model, params, texts, each, 1000 * self.seed + seed))
        return self.stages(name, write)['tokens']

    def oracle(self, texts: list[Text]) -> list[Edit]:
        """The best edits there are."""
        rng = np.random.default_rng(self.seed)
        return [self.world.oracle(rng, text.person) for text in texts]

    def test_texts(self) -> list[Text]:
        """Passages of the test, the same for every arm."""
        return write_texts(self.world, self.args.tests, 'test', self.seed)

    def marks(self, name: str, make: Any) -> Marks:
        """Marks, as a stage."""
        return Marks(**self.stages(name, lambda: make()._asdict()))


@contextlib.contextmanager
def progress(what: str) -> Iterator[None]:
    """Says what was done and in how many seconds."""
    began = time.monotonic()
    yield
    print(f'{what}: {time.monotonic() - began:.1f} s', flush=True)


def summary(arms: dict[str, np.ndarray]) -> dict[str, dict[str, Any]]:
    """Mean and interval of each arm, and of its paired difference from untrained self-edits."""
    untrained = arms['untrained self-edit']
    return {arm: dict(right=bootstrap(right), above_untrained=bootstrap(right - untrained)) for arm, right in arms.items()}


def report(metrics: dict[str, Any]) -> list[str]:
    """The tables as they are printed."""
    lines = [
        '',
        'shares right on the development split',
        f'{"budget":>12}' + ''.join(f'{arm:>22}' for arm in next(iter(metrics['sweep'].values()))),
    ]
    for budget, arms in metrics['sweep'].items():
        lines.append(
            f'{budget:>12}' + ''.join(f'{right:22.3f}' for right in arms.values()) + ('  chosen' if budget == metrics['chosen'] else '')
        )
    for budget, found in metrics['reported'].items():
        lines += ['', f'{budget}, test: shares right, and above untrained self-edits, with 95 % intervals over passages']
        for arm, value in found['arms'].items():
            mean, low, high = value['right']
            gap, below, above = value['above_untrained']
            lines.append(f'{arm:>28}  {mean:.3f} [{low:.3f}, {high:.3f}]   {gap:+.3f} [{below:+.3f}, {above:+.3f}]')
        for index, told in enumerate(found['rest-em']['rounds'], 1):
            rewards = f'mean reward {told["mean"]:.3f}, best of a passage {told["best"]:.3f}, ICC {told["reliability"]["icc"]:.2f}'
            after = f'coverage then {told["coverage"]:.2f}, known {told["known"]:.3f}'
            lines.append(f'  round {index}: {rewards}, trained on {told["trained_on"]}, {after}')
        lines.append(f'  {order(found["arms"])}')
    return lines


def order(arms: dict[str, dict]) -> str:
    """Whether the paper's order of arms came out."""
    last = [arm for arm in arms if arm.startswith('rest-em')][-1]
    names = ('base', 'passage only', 'untrained self-edit', last)
    values = [arms[name]['right'][0] for name in names]
    held = all(low < high for low, high in zip(values, values[1:], strict=False))
    return f"the paper's order, {' < '.join(names)}: " + ('reproduced' if held else 'not reproduced')


def _stage_name(budget: Budget) -> str:
    return f'rate-{budget.learning_rate:g}-steps-{budget.steps}'


if __name__ == '__main__':
    sys.exit(main())
