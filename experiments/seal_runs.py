"""SEAL's loop as stages, whatever is written about: arms, rounds, tables, and going on after a stop.

What a domain has to offer is `Domain`: made-up people in `experiments/seal_knowledge.py`, passages with questions and a pre-trained model
in `experiments/seal_squad.py`. Letters in shapes: C texts, M self-edits of each, P repetitions of an update.
"""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, Protocol, get_args

import jax
import numpy as np

from experiments.grid import INTERRUPTED
from experiments.seal_tables import draw_seal
from experiments.seal_world import Budget, Edit, Marks, bootstrap
from nested_jax.config import check
from nested_jax.evaluation.rows import append_row, config_digest, hardware_name, make_row, read_rows
from nested_jax.seal.outer_loop import Algorithm, OuterConfig, RewardTable, advantages, better_half, choose, digest
from nested_jax.seal.rewards import Reward, Tried, reliability
from nested_jax.seal.stages import Stages

PyTree = Any
RewardName = Literal['right', 'log_prob', 'rubric']
TEST_START, CHOICE_START = 1000, 2000  # seeds of adapters: those of the test, and of the best of several untrained


@dataclasses.dataclass(frozen=True)
class RunArgs:
    """The arguments of every domain.

    Raises:
        ValueError: naming the argument, its value and what is allowed.
    """

    seeds: tuple[int, ...] = (0,)
    """A whole run for each."""
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
    algorithms: tuple[Algorithm, ...] = ('rest-em', 'random')
    """Ways to learn from a round's self-edits, each from the start."""
    reward: RewardName = 'right'
    """What self-edits are chosen by: the share of the questions that are answered rightly after an update, the mean log-probability of
    the right answers, or the rubric of their text, which needs no update. What is reported is the share in any case."""
    halving: bool = False
    """Try only the better half of a passage's self-edits, by the first adapter start, from the others: fewer updates, or more starts."""
    smoke: bool = False
    """A few steps of everything and no row, to see that it works; its numbers mean nothing."""

    def __post_init__(self):
        least = dict(rounds=1, contexts=2, each=2, repetitions=2, tests=2)
        for name, bound in least.items():
            check(getattr(self, name) >= bound, name, getattr(self, name), f'an integer of at least {bound}')
        check(bool(self.algorithms), 'algorithms', self.algorithms, 'at least one')
        weighs = [name for name in self.algorithms if not OuterConfig(algorithm=name).imitates]
        check(not (self.halving and weighs), 'halving', self.halving, f'False with {", ".join(weighs)}, which weigh all self-edits')
        check(self.reward in get_args(RewardName), 'reward', self.reward, f'one of {", ".join(get_args(RewardName))}')
        check(not (self.halving and self.reward == 'rubric'), 'halving', True, 'False with the reward rubric, which needs no update')
        check(bool(self.seeds) and min(self.seeds) >= 0, 'seeds', self.seeds, 'at least one integer, none below 0')

    @property
    def sizes(self) -> dict[str, Any]:
        """What decides the numbers of a seed, by name; rows from before there was a choice keep their digest."""
        chosen = {} if self.algorithms == RunArgs.algorithms else dict(algorithms=list(self.algorithms))
        chosen |= dict(reward=self.reward) if self.reward != RunArgs.reward else {}
        chosen |= dict(halving=True) if self.halving else {}
        return {name: getattr(self, name) for name in ('rounds', 'contexts', 'each', 'repetitions', 'tests')} | chosen


class Domain(Protocol):
    """What is written about, by which model, and how it learns and is asked.

    Attributes:
        shares: real tokens among those computed, of every bucket so far.
        test_edits: self-edits of a text that the test's updates learn from.
        reward: by which self-edits are chosen; whatever needs an update is in `Marks` already.
    """

    shares: list[float]
    test_edits: int
    reward: Reward

    def start(self, stages: Stages, seed: int) -> PyTree:
        """Parameters of the model as it begins."""

    def texts(self, split: str, count: int, seed: int, index: int = 0) -> list:
        """(C,) of 'train', by round, of 'dev' or of 'test'."""

    def write(self, params: PyTree, texts: list, each: int, seed: int) -> np.ndarray:
        """Self-edits (C, M, tokens)."""

    def update(self, algorithm: Algorithm, params: PyTree, texts: list, edits: np.ndarray, values: np.ndarray, seed: int) -> PyTree:
        """What the writer learns from self-edits (C, M, tokens) of values (C M,), to be stored."""

    def advance(self, params: PyTree, learned: PyTree) -> PyTree:
        """Parameters of the writer that has learned it."""

    def ask(self, params: PyTree, texts: list) -> Marks:
        """Marks (C, 1) of the model as it is."""

    def learn_and_ask(self, params: PyTree, texts: list, edits: Sequence[Edit | None], budget: Budget, repetitions: Sequence[int]) -> Marks:
        """Marks (C, P) of updates on each text and its self-edit, or on the text alone where that is None."""

    def test(self, params: PyTree, texts: list, edits: Sequence[Edit | None], budget: Budget, repetitions: Sequence[int]) -> Marks:
        """The same as the test has it."""

    def tried(self, text: Any, edit: Edit) -> Tried:
        """What is known of a self-edit without an update."""

    def joined(self, edits: np.ndarray) -> Edit:
        """What the test makes of self-edits (M, tokens) of one text."""

    def oracle(self, texts: list, seed: int) -> list[Edit]:
        """Self-edits that hold all answers."""

    def shuffled(self, edit: Edit, seed: int) -> Edit:
        """A self-edit of the same words in another order."""

    def composition(self, texts: list, edits: Sequence[Edit]) -> dict[str, Any]:
        """What one self-edit of each text is made of; `coverage` among it, the share of answers it tells."""

    def known(self, params: PyTree) -> float:
        """Share right of what the model should not forget."""


def run_seeds(
    experiment: str, model: str, args: Any, domain: Callable[[], Domain], config: Callable[[int], dict], budgets: Sequence[Budget],
    reported: Sequence[Budget] = (),
) -> int:  # fmt: skip
    """Runs the seeds that have no row; returns the exit code.

    Args:
        experiment: of the rows.
        model: its name in the rows.
        args: a `RunArgs` with `runs` and `results`.
        domain: makes the `Domain`, once it is known to be needed.
        config: seed -> everything that decides its numbers.
        budgets: to try on the development split; a single one is not tried.
        reported: budgets beside the one at which untrained self-edits do best.
    """
    try:
        for seed in args.seeds:
            began, key = time.monotonic(), config_digest(config(seed))
            if not args.smoke and key in {row['config_digest'] for row in read_rows(args.results)}:
                print(f'seed {seed} has a row in {args.results}')
                continue
            metrics = Run(domain(), args, seed, Stages(args.runs / key)).metrics(budgets, reported)
            print('\n'.join(report(metrics)), flush=True)
            hardware, wall = hardware_name(jax.devices()), time.monotonic() - began
            told = dict(seed=seed, config=config(seed), metrics=metrics, hardware=hardware, wall_s=wall)
            row = make_row(experiment=experiment, model=model, **told)
            if not args.smoke:
                append_row(args.results, row)
            picture = args.runs / key / 'arms.png'
            draw_seal([row], picture)
            print(f'{picture}, {wall:.0f} s', flush=True)
    except KeyboardInterrupt:
        print(f'stopped; the same command goes on from {args.runs}', flush=True)
        return INTERRUPTED
    return 0


class Earned(NamedTuple):
    """What the self-edits of a round earn."""

    rewards: np.ndarray  # (C, M)
    ties: np.ndarray  # (C, M) decide between equal rewards
    baseline: np.ndarray  # (C,) without a self-edit
    told: dict[str, Any]  # of all rewards


class Run:
    """The stages of one seed."""

    def __init__(self, domain: Domain, args: RunArgs, seed: int, stages: Stages):
        self.domain, self.args, self.seed, self.stages = domain, args, seed, stages

    def metrics(self, budgets: Sequence[Budget], reported: Sequence[Budget]) -> dict[str, Any]:
        """What the row holds: the sweep, and for each reported budget the arms, each round's rewards and what was written."""
        with progress('the model'):
            start = self.domain.start(self.stages, self.seed)
        known = self.domain.known(start)
        print(f'  questions about what is known: {known:.3f} right', flush=True)
        sweep, chosen = {}, budgets[0]
        if len(budgets) > 1:
            with progress('trying budgets'):
                sweep = {str(budget): self.sweep(start, budget) for budget in budgets}
            chosen = max(budgets, key=lambda budget: sweep[str(budget)]['untrained self-edit'])
        found = {}
        for budget in dict.fromkeys((chosen, *reported)):
            with progress(f'{budget}: arms without training of the writer'):
                arms = self.untrained_arms(start, budget)
            trained = {name: self.rounds(start, budget, name) for name in self.args.algorithms}
            arms |= {arm: right for told in trained.values() for arm, right in told.pop('arms').items()}
            found[str(budget)] = dict(arms=summary(arms), **trained)
        share = float(np.mean(self.domain.shares)) if self.domain.shares else None
        return dict(known=known, sweep=sweep, chosen=str(chosen), reported=found, real_share=share)

    def sweep(self, params: Any, budget: Budget) -> dict[str, float]:
        """Accuracy of three arms on people of the development split."""
        texts = self.domain.texts('dev', self.args.contexts, self.seed)
        edits = self.edits('sweep/edits', params, texts, 1, 0)[:, 0]
        arms = {'passage only': [None] * len(texts), 'untrained self-edit': edits, 'oracle edit': self.domain.oracle(texts, self.seed)}
        ask = lambda edits: self.domain.learn_and_ask(params, texts, edits, budget, [TEST_START])
        name = lambda arm: f'sweep/{_stage_name(budget)}/{arm.replace(" ", "-")}'
        return {arm: float(self.marks(name(arm), lambda edits=edits: ask(edits)).right.mean()) for arm, edits in arms.items()}

    def untrained_arms(self, params: Any, budget: Budget) -> dict[str, np.ndarray]:
        """Shares right (tests,) of the arms that need no round."""
        texts, folder = self.test_texts(), _stage_name(budget)
        many = self.edits('test/edits', params, texts, self.args.each, 1)
        order = np.stack(self.choice(f'{folder}/test/choice', params, texts, many, budget), -1)
        best = [max(range(self.args.each), key=lambda m: tuple(order[c, m])) for c in range(len(texts))]
        untrained = [self.domain.joined(written) for written in many]
        arms = {
            'passage only': [None] * len(texts),
            'untrained self-edit': untrained,
            'shuffled self-edit': [self.domain.shuffled(edit, self.seed) for edit in untrained],
            f'best of {self.args.each} untrained': [written[m] for written, m in zip(many, best, strict=True)],
            'oracle edit': self.domain.oracle(texts, self.seed),
        }
        base = self.marks('test/base', lambda: self.domain.ask(params, texts)).right[:, 0]
        found = {'base': base}
        for arm, edits in arms.items():
            ask = functools.partial(self.domain.test, params, texts, edits, budget, [TEST_START])
            found[arm] = self.marks(f'{folder}/test/{arm.replace(" ", "-")}', ask).right[:, 0]
        return found

    def rounds(self, params: Any, budget: Budget, algorithm: Algorithm) -> dict[str, Any]:
        """Rounds of one way to choose what the writer is trained on, and the test after each."""
        texts, arms, history = self.test_texts(), {}, []
        for index in range(1, self.args.rounds + 1):
            name = f'{_stage_name(budget)}/{algorithm}-{index}'
            with progress(f'{budget}: {algorithm}, round {index}'):
                params, told = self.round(params, budget, algorithm, index, name)
                many = self.edits(f'{name}/test-edits', params, texts, self.domain.test_edits, 1)
                edits = [self.domain.joined(written) for written in many]
                ask = functools.partial(self.domain.test, params, texts, budget=budget, repetitions=[TEST_START])
                arms[f'{algorithm}, round {index}'] = self.marks(f'{name}/test', functools.partial(ask, edits)).right[:, 0]
                known = self.domain.known(params)
                history.append(told | dict(known=known, **self.domain.composition(texts, edits)))
        alone = self.marks(f'{name}/test-passage-only', functools.partial(ask, [None] * len(texts))).right[:, 0]
        return dict(arms=arms | {f'passage only after {algorithm}': alone}, rounds=history)

    def round(self, params: Any, budget: Budget, algorithm: Algorithm, index: int, name: str) -> tuple[Any, dict]:
        """The writer after one update, and what its rewards were."""
        texts = self.domain.texts('train', self.args.contexts, self.seed, index)
        edits = self.edits(f'{name}/edits', params, texts, self.args.each, 10 + index)
        found = Earned(np.zeros(edits.shape[:2]), np.zeros(edits.shape[:2]), np.zeros(len(texts)), {})
        if algorithm != 'random':
            earn = functools.partial(self.earned, f'{name}/rewards', params, budget=budget)
            found = (earn if self.domain.reward.needs_update else self.judged)(texts, edits)
        rewards, ties, baseline, told = found
        config, rng = OuterConfig(algorithm=algorithm), np.random.default_rng([self.seed, index])
        values = choose(config, rewards, baseline, ties, rng) if config.imitates else advantages(algorithm, rewards)
        update = lambda: self.domain.update(algorithm, params, texts, edits, values.reshape(-1).astype(float), self.seed)
        learned = self.stages.tree(f'{name}/writer', update)
        return self.domain.advance(params, learned), told | dict(trained_on=int(np.count_nonzero(values)))

    def earned(self, name: str, params: Any, texts: list, edits: np.ndarray, *, budget: Budget) -> Earned:
        """By the model after updates."""
        marks, ties = self.by_reward(self.rewards(name, params, texts, edits, budget))
        baseline = self.by_reward(self.domain.ask(params, texts))[0][:, 0]
        marks = _finite(marks, baseline)
        # Of those with all repetitions only: the mean of few is the likelier to be the largest by luck.
        rewards, ties = (np.nan_to_num(mark.mean(2), nan=-np.inf, neginf=-np.inf) for mark in (marks, ties))
        tried = marks[np.isfinite(rewards)].reshape(len(texts), -1, self.args.repetitions)
        mean = float(np.nanmean(marks, 2).mean())
        told = dict(mean=mean, best=float(rewards.max(1).mean()), reliability=reliability(tried)._asdict())
        return Earned(rewards, ties, baseline, told)

    def judged(self, texts: list, edits: np.ndarray) -> Earned:
        """By what is known of them without an update."""
        rewards, nothing = self.read(texts, edits), self.read(texts, [[[]]] * len(texts))
        return Earned(rewards, np.zeros_like(rewards), nothing[:, 0], dict(mean=float(rewards.mean()), best=float(rewards.max(1).mean())))

    def choice(self, name: str, params: Any, texts: list, edits: np.ndarray, budget: Budget) -> tuple[np.ndarray, np.ndarray]:
        """Rewards, and what decides between equal ones, (C, M) of self-edits that are updated on once at most."""
        if not self.domain.reward.needs_update:
            return self.judged(texts, edits)[:2]
        flat, again = [edit for written in edits for edit in written], [text for text in texts for _ in range(edits.shape[1])]
        marks = self.marks(name, lambda: self.domain.learn_and_ask(params, again, flat, budget, [CHOICE_START]))
        return tuple(mark.reshape(edits.shape[:2]) for mark in self.by_reward(marks))

    def read(self, texts: list, edits: Sequence[Sequence[Edit]]) -> np.ndarray:
        """(C, M) rewards that need no update, of self-edits (C, M, tokens)."""
        mark = lambda text, edit: self.domain.reward.mark(self.domain.tried(text, edit))
        return np.array([[mark(text, edit) for edit in each] for text, each in zip(texts, edits, strict=True)])

    def by_reward(self, marks: Marks) -> tuple[np.ndarray, np.ndarray]:
        """What is rewarded, and what decides between equal ones."""
        return (marks.log_prob, marks.right) if self.args.reward == 'log_prob' else (marks.right, marks.log_prob)

    def rewards(self, name: str, params: Any, texts: list, edits: np.ndarray, budget: Budget) -> Marks:
        """Marks (C, M, P) of every self-edit; with `halving` NaN where it is not tried again."""
        earn = functools.partial(self.asked, params=params, texts=texts, edits=edits, budget=budget)
        repetitions, everything = range(self.args.repetitions), np.ones(edits.shape[:2], bool)
        if not self.args.halving:
            return earn(name, everything, repetitions)
        first = earn(f'{name}-first', everything, repetitions[:1])
        rest = earn(f'{name}-rest', better_half(*(mark[..., 0] for mark in self.by_reward(first))), repetitions[1:])
        return Marks(*(np.concatenate(marks, 2) for marks in zip(first, rest, strict=True)))

    def asked(
        self, name: str, tried: np.ndarray, repetitions: Sequence[int], *, params: Any, texts: list, edits: np.ndarray, budget: Budget,
        part: int = 16,
    ) -> Marks:  # fmt: skip
        """Marks (C, M, P) of the self-edits `tried` (C, M), a stage for each few passages: none serves another learner."""
        learner, found = digest(params), Marks(*np.full((2, *tried.shape, len(repetitions)), np.nan))
        for start in range(0, len(texts), part):
            here = np.zeros_like(tried)
            here[start : start + part] = tried[start : start + part]
            rows = [(texts[c], edits[c, m]) for c, m in np.argwhere(here)]
            ask = lambda rows=rows: self.domain.learn_and_ask(params, *zip(*rows, strict=True), budget, repetitions)
            stored = self.stages(f'{name}-{start}', lambda ask=ask: ask()._asdict() | dict(learner=np.array(learner)))
            found.right[here] = RewardTable(str(stored['learner']), stored['right']).rewards(learner)
            found.log_prob[here] = stored['log_prob']
        return found

    def edits(self, name: str, params: Any, texts: list, each: int, seed: int) -> np.ndarray:
        """Self-edits (C, M, tokens)."""
        write = lambda: dict(tokens=self.domain.write(params, texts, each, 1000 * self.seed + seed))
        return self.stages(name, write)['tokens']

    def test_texts(self) -> list:
        """Passages of the test, the same for every arm."""
        return self.domain.texts('test', self.args.tests, self.seed)

    def marks(self, name: str, make: Any) -> Marks:
        """Marks, as a stage."""
        return Marks(**self.stages(name, lambda: make()._asdict()))


@contextlib.contextmanager
def progress(what: str) -> Iterator[None]:
    """Says what was done and in how many seconds."""
    began = time.monotonic()
    yield
    print(f'{what}: {time.monotonic() - began:.1f} s', flush=True)


def _finite(marks: np.ndarray, baseline: np.ndarray) -> np.ndarray:
    """Marks (C, M, P) in which self-edits that nothing can be learned from, of log-probability -inf, earn the least of their passage.

    That is the least of the others and of the baseline (C,): by it no invalid self-edit is better than a valid one, or than none.
    """
    invalid = np.isneginf(marks)
    least = np.fmin(np.fmin.reduce(np.where(invalid, np.nan, marks), (1, 2)), baseline)
    return np.where(invalid, least[:, None, None], marks)


def summary(arms: dict[str, np.ndarray]) -> dict[str, dict[str, Any]]:
    """Mean and interval of each arm, and of its paired difference from untrained self-edits."""
    untrained = arms['untrained self-edit']
    return {arm: dict(right=bootstrap(right), above_untrained=bootstrap(right - untrained)) for arm, right in arms.items()}


def report(metrics: dict[str, Any]) -> list[str]:
    """The tables as they are printed."""
    lines = ['']
    if metrics['sweep']:
        heads = ''.join(f'{arm:>22}' for arm in next(iter(metrics['sweep'].values())))
        lines += ['shares right on the development split', f'{"budget":>12}{heads}']
    for budget, arms in metrics['sweep'].items():
        told = ''.join(f'{right:22.3f}' for right in arms.values())
        lines.append(f'{budget:>12}{told}' + ('  chosen' if budget == metrics['chosen'] else ''))
    for budget, found in metrics['reported'].items():
        lines += ['', f'{budget}, test: shares right, and above untrained self-edits, with 95 % intervals over passages']
        for arm, value in found['arms'].items():
            mean, low, high = value['right']
            gap, below, above = value['above_untrained']
            lines.append(f'{arm:>28}  {mean:.3f} [{low:.3f}, {high:.3f}]   {gap:+.3f} [{below:+.3f}, {above:+.3f}]')
        told_of = ((name, index, told) for name, part in found.items() if name != 'arms' for index, told in enumerate(part['rounds'], 1))
        for name, index, told in told_of:
            if 'mean' not in told:
                continue
            rewards = f'mean reward {told["mean"]:.3f}, best of a passage {told["best"]:.3f}'
            icc = f', ICC {told["reliability"]["icc"]:.2f}' if 'reliability' in told else ''
            after = f'coverage then {told["coverage"]:.2f}, known {told["known"]:.3f}'
            lines.append(f'  {name}, round {index}: {rewards}{icc}, trained on {told["trained_on"]}, {after}')
        lines += [f'  {order(found["arms"])}'] if 'rest-em' in found else []
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
