"""Six questions about SEAL beside its loop, each with its natural control: `python -m experiments.seal_probes`.

All are asked of the Transformer of 0.1M parameters that `experiments/seal_knowledge.py` pre-trains on made-up people, and answered by a
row for each probe and seed. Intervals are 95 % bootstraps over people, of differences paired; they are of one pre-trained model, so what
varies between models is not in them.

- test-time: a passage stands in the prompt, in front of the question. Does training on it first, forgotten afterwards, help
  (arXiv:2411.07279v2)? Against the prompt alone; the learning rate is chosen on people of the development split.
- meta: adapters start where first-order MAML (arXiv:1703.03400v3) put them, for answers after learning a passage. Against fresh adapters,
  and against a start trained as long on the same answers with no update in front of them.
- stacking: the Transformer's MLPs become the slow level of a CMS (Sec. 7.3, arXiv:2512.24695v1) and the model is trained on, on texts
  about new people. Against the Transformer trained on, and the same levels all updated at every step: is what was known kept?
- prompts: the paper's seven (Table 10, arXiv:2506.10943v2: untrained 13.8 % without a prompt to 49.4 % for 'rewrite'). A model without
  language cannot follow a request. What it can follow is the header at which a prompt has it go on, which is its first token or two of
  each note (`prompted`): of the seven requests only that, and how many notes are asked for, is compared.
- rubric: the proxy that needs no update (`nested_jax/seal/rewards.py`) against the reward: rank correlation within a passage, and what
  the self-edit that it picks earns beside a random one and one picked by the reward itself, measured with another adapter start.
- halving: the reward is a mean over three adapter starts, as in the paper. Successive halving gives the second and third to the better
  half of a passage's self-edits alone (`nested_jax/seal/outer_loop.py`): what does its pick earn, with a fourth start, and how many
  updates does it take? Against all self-edits with all three starts.

Pre-training and what a probe trains are stages in --runs: the command given again goes on where it stopped. The rows of one seed took 31
(test-time), 82, 72, 276 and 133 s (rubric) of a shared core, pre-training not counted.
"""

import dataclasses
import functools
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy import stats

from experiments.arguments import parse_arguments
from experiments.grid import Cell, Grid, GridArgs, make_cells, run_grid
from experiments.seal_world import (
    INNER,
    LENGTH,
    PROTOTYPE,
    Budget,
    Edit,
    Marks,
    Reader,
    Text,
    bootstrap,
    full_length,
    in_print,
    model_config,
    pretrain,
    train_config,
    write_edits,
    write_texts,
)
from nested_jax.config import LevelConfig, ModelConfig, as_dict
from nested_jax.data.tasks.biographies import ASK, EDIT, END, THEY, Person, World
from nested_jax.evaluation.rows import config_digest
from nested_jax.models.language_model import LanguageModel
from nested_jax.models.level_stacking import stack_levels
from nested_jax.models.loss import model_loss
from nested_jax.models.sampling import generate
from nested_jax.seal.buckets import Batch, Candidate, buckets
from nested_jax.seal.lora import init_lora
from nested_jax.seal.modes import make_meta_step, make_test_time_training
from nested_jax.seal.outer_loop import better_half
from nested_jax.seal.rewards import Rubric, rubric
from nested_jax.seal.self_edits import KNOWLEDGE_PROMPTS
from nested_jax.seal.stages import Stages
from nested_jax.training.config import TrainConfig
from nested_jax.training.optimizer import level_periods, make_optimizer
from nested_jax.training.state import TrainState
from nested_jax.training.step import make_train_step

PyTree = Any
Name = Literal['test-time', 'meta', 'stacking', 'prompts', 'rubric', 'halving']
EXPERIMENT = 'seal_probes'
RESULTS = pathlib.Path(__file__).parent / 'results' / f'{EXPERIMENT}.jsonl'
BUDGETS = (PROTOTYPE, Budget(1e-2, 32))  # the two that `seal_knowledge` reports
RATES = (3e-3, 1e-2, 3e-2)  # of training at test time
META_RATE, META_BATCH = 3e-3, 16
STREAM = 32 * LENGTH  # tokens of a step of training on
STACKED = {'stacked': (1, 4), 'stacked, one period': (1, 1)}  # steps between updates of the new level, and of the pre-trained one
NOTES = {'implications': 4, 'implications-long': 8, 'implications-very-long': 16}
THOUGHT = 16  # tokens
STARTS = 3  # adapter starts that a reward is the mean of


@dataclasses.dataclass(frozen=True)
class Args(GridArgs):
    """Ask six questions about SEAL on the world of made-up people."""

    seeds: tuple[int, ...] = (0,)
    """A pre-trained model and all probes for each."""
    probes: tuple[Name, ...] = get_args(Name)
    """In this order."""
    tests: int = 128
    """People of a test."""
    contexts: int = 64
    """Passages whose self-edits the rubric marks or halving tries, and people who choose a learning rate."""
    each: int = 6
    """Self-edits of such a passage."""
    meta_steps: int = 150
    """Of meta-learning, 16 people each."""
    stream_steps: int = 200
    """Of training on, 32 rows of 64 tokens each."""
    pretraining_steps: int = 1500
    """Of 32 rows of 64 tokens."""
    runs: pathlib.Path = pathlib.Path('runs') / EXPERIMENT
    """Folder of the stages."""
    results: pathlib.Path = RESULTS
    """File that a row for each probe and seed is added to."""

    def __post_init__(self):
        super().__post_init__()
        self.check('probes', bool(self.probes), 'at least one')
        self.check_counts('meta_steps')
        for name in ('tests', 'contexts', 'each', 'pretraining_steps'):
            self.check(name, getattr(self, name) >= 2, 'an integer of at least 2')
        self.check('stream_steps', self.stream_steps >= 4 and self.stream_steps % 4 == 0, 'a multiple of 4, at least 4')


def main(argv: list[str] | None = None) -> int:
    """Runs the probes that have no row; returns the exit code."""
    args = parse_arguments(Args, argv, __doc__)
    if args.smoke:
        sizes = dict(tests=4, contexts=4, each=2, meta_steps=2, stream_steps=4, pretraining_steps=4)
        args = dataclasses.replace(args, seeds=args.seeds[:1], probes=args.probes[:1], runs=args.runs / 'smoke', **sizes)
    cells, config = make_cells(['transformer'], args.probes, args.seeds), functools.partial(cell_config, args)
    ground = functools.cache(lambda seed: Ground(args, seed))
    prepare = lambda model, name: functools.partial(_run_probe, PROBES[name], ground)
    return run_grid(Grid(EXPERIMENT, cells, config, prepare, describe, args.results), minutes=args.minutes, store=not args.smoke)


def _run_probe(probe: Callable[['Ground'], dict], ground: Callable[[int], 'Ground'], seeds: Sequence[int]) -> list[dict]:
    return [probe(ground(seed)) for seed in seeds]


def cell_config(args: Args, cell: Cell) -> dict:
    """Everything that decides what a cell's numbers come out as."""
    own = {
        'test-time': dict(rates=list(RATES), steps=PROTOTYPE.steps, contexts=args.contexts, tests=args.tests),
        'meta': dict(steps=args.meta_steps, rate=META_RATE, batch=META_BATCH, budget=list(PROTOTYPE), tests=args.tests),
        'stacking': dict(steps=args.stream_steps, rate=stream_config(args).learning_rate, levels=STACKED, tests=args.tests),
        'prompts': dict(notes=NOTES, thought=THOUGHT, budgets=[list(budget) for budget in BUDGETS], tests=args.tests),
        'rubric': dict(contexts=args.contexts, each=args.each, budgets=[list(budget) for budget in BUDGETS]),
        'halving': dict(contexts=args.contexts, each=args.each, budgets=[list(budget) for budget in BUDGETS], starts=STARTS),
    }
    return dict(probe=cell.task, **own[cell.task], **_pretraining(args, cell.seed), inner=as_dict(INNER))


def _pretraining(args: Args, seed: int) -> dict:
    world = World()
    return dict(world=as_dict(world), model=as_dict(model_config(world)), train=as_dict(train_config(args.pretraining_steps)), seed=seed)


class Ground:
    """A seed's pre-trained model, and what asks it."""

    def __init__(self, args: Args, seed: int):
        self.args, self.seed, self.world = args, seed, World()
        self.model = LanguageModel(model_config(self.world))
        self.reader = Reader(self.model, self.world)
        self.stages = Stages(args.runs / config_digest(_pretraining(args, seed)))
        make = lambda: pretrain(self.model, self.world, train_config(args.pretraining_steps), seed)
        self.params = self.stages.tree('pretrained', make)

    def stage(self, probe: Name, part: str) -> str:
        """Name of a stage of a probe, another one for every configuration."""
        return f'{probe}-{config_digest(cell_config(self.args, Cell("transformer", probe, self.seed)))}/{part}'

    def texts(self, split: str, count: int) -> list[Text]:
        """New people of a split."""
        return write_texts(self.world, count, split, self.seed)


def compare(arms: dict[str, np.ndarray], control: str) -> dict[str, dict[str, tuple]]:
    """Mean and interval of each arm (people,), and of its paired difference from the control."""
    return {arm: dict(right=bootstrap(right), above_control=bootstrap(right - arms[control])) for arm, right in arms.items()}


def test_time(ground: Ground) -> dict[str, Any]:
    """Training on the passage of a prompt before it is answered, and forgetting it."""
    answer = make_test_time_training(ground.model, INNER)

    def right(texts: list[Text], budget: Budget, front: bool) -> np.ndarray:
        learned = [Candidate(((END, *text.passage),), *budget) for text in texts]
        prompts = [_prompts(ground.world, text, front) for text in texts]
        gold = np.array([[ground.world.answer(text.person, kind) for kind in range(ground.world.attributes)] for text in texts])
        told = np.zeros(gold.shape, int)
        for places, batch in buckets(learned, shape=(1, 32)):
            filled = [*places, *places[:1] * (batch.tokens.shape[0] - len(places))]
            asked = np.array([prompts[place] for place in filled], np.int32)
            told[places] = np.asarray(answer(ground.params, batch, asked))[: len(places)].argmax(-1)
        return (told == gold).mean(1)

    dev, texts, untrained = ground.texts('dev', ground.args.contexts), ground.texts('test', ground.args.tests), Budget(0.0, 0)
    tried = {rate: float(right(dev, Budget(rate, PROTOTYPE.steps), True).mean()) for rate in RATES}
    chosen = max(RATES, key=tried.__getitem__)
    trained, control = Budget(chosen, PROTOTYPE.steps), 'prompt alone'
    arms = {
        'question alone': right(texts, untrained, False), 'question, trained on the passage': right(texts, trained, False),
        control: right(texts, untrained, True), 'prompt, trained on its passage': right(texts, trained, True),
    }  # fmt: skip
    return dict(
        control=control, chosen=chosen, development={str(rate): value for rate, value in tried.items()}, arms=compare(arms, control)
    )


def _prompts(world: World, text: Text, front: bool) -> list[list[int]]:
    """A question about each attribute, alone or behind the passage, there as the first note of a self-edit, as pre-training has them."""
    questions = [world.question(text.person, attribute) for attribute in range(world.attributes)]
    return [[END, *text.passage, EDIT, *question[1:]] for question in questions] if front else questions


def meta(ground: Ground) -> dict[str, Any]:
    """Where adapters start from."""
    texts, control = ground.texts('test', ground.args.tests), 'fresh adapters'
    starts = {control: None}
    starts |= {name: ground.stages.tree(ground.stage('meta', str(steps)), functools.partial(learn_start, ground, steps))
               for name, steps in (('trained without updates', 0), ('meta-learned', PROTOTYPE.steps))}  # fmt: skip
    ask = lambda start, budget: ground.reader.learn_and_ask(ground.params, texts, [None] * len(texts), budget, [0], start).right[:, 0]
    before = {name: ask(start, Budget(0.0, 0)) for name, start in starts.items()}
    after = {name: ask(start, PROTOTYPE) for name, start in starts.items()}
    return dict(control=control, before={name: bootstrap(right) for name, right in before.items()}, arms=compare(after, control))


def learn_start(ground: Ground, steps: int) -> PyTree:
    """Adapters whose answers are better after `steps` steps on a passage."""
    optimizer = optax.adam(META_RATE)
    step, adapters = make_meta_step(ground.model, INNER, optimizer), init_lora(ground.params, jax.random.key(ground.seed), INNER.lora)
    state = optimizer.init(adapters)
    for index in range(ground.args.meta_steps):
        texts = write_texts(ground.world, META_BATCH, 'train', 10_000 * (ground.seed + 1) + index)
        adapters, state, _ = step(ground.params, adapters, state, *_support_and_query(ground.world, texts, steps))
    return adapters


def _support_and_query(world: World, texts: list[Text], steps: int) -> list[Batch]:
    """Batches of the passages to learn, and of the questions, of which only the answers count."""
    asked = lambda person, kind: (*world.question(person, kind), world.answer(person, kind))
    questions = [tuple(asked(text.person, kind) for kind in range(world.attributes)) for text in texts]
    support = [Candidate(((END, *text.passage),), PROTOTYPE.learning_rate, steps) for text in texts]
    query = [Candidate(rows, 0.0, 0, prompt_lengths=tuple(len(row) - 1 for row in rows)) for rows in questions]
    return [next(buckets(part, shape=(1, 32)))[1] for part in (support, query)]


def stream_config(args: Args) -> TrainConfig:
    """Of training on."""
    return TrainConfig(steps=args.stream_steps, batch_size=32, sequence_length=LENGTH, learning_rate=1e-3, warmup_steps=0, beta2=0.99)


def stacking(ground: Ground) -> dict[str, Any]:
    """What is learned about new people and kept of the known ones, at each quarter of training on and, by person, at its end."""
    new, control = _new_people(ground), 'Transformer'
    models = {control: (ground.model.config, ground.params)}
    for name, (fast, slow) in STACKED.items():
        levels = (LevelConfig(96, fast * STREAM), LevelConfig(ground.model.config.levels[0].hidden_dim, slow * STREAM))
        models[name] = stack_levels(ground.model.config, ground.params, levels, 1, key=jax.random.key(ground.seed))
    curves, learned, kept = {}, {}, {}
    for name, (config, params) in models.items():
        reader, curve = Reader(LanguageModel(config), ground.world), []
        for trained in train_on(config, params, _stream_rows(ground, new), stream_config(ground.args)):
            learned[name], kept[name] = (reader.ask(trained, people).right[:, 0] for people in (new, ground.world.known_people))
            curve.append([float(learned[name].mean()), float(kept[name].mean())])
        curves[name] = curve
    return dict(control=control, new_and_known=curves, arms=compare(learned, control), known=compare(kept, control))


def train_on(config: ModelConfig, params: PyTree, rows: np.ndarray, train: TrainConfig) -> list[PyTree]:
    """Parameters after each quarter of the steps (S, batch, LENGTH + 1), each CMS level updated at its period."""
    model, optimizer = LanguageModel(config), make_optimizer(train, level_periods(config, LENGTH))
    step = make_train_step(lambda params, batch: model_loss(model, params, batch[:, :-1], batch[:, 1:]), optimizer)
    quarter = jax.jit(lambda state, rows: jax.lax.scan(lambda state, batch: (step(state, batch)[0], None), state, rows)[0])
    state, found = TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), jax.random.key(0)), []
    for part in np.split(rows, 4):
        state = quarter(state, part)
        found.append(state.params)
    return found


def _new_people(ground: Ground) -> list[Person]:
    people: dict[tuple[int, int], Person] = {}
    rng = np.random.default_rng([ground.seed, 3])
    while len(people) < min(ground.args.tests, 64):
        person = ground.world.person(rng, 'test')
        people.setdefault((person.first, person.last), person)
    return list(people.values())


def _stream_rows(ground: Ground, people: list[Person]) -> np.ndarray:
    """(steps, batch, LENGTH + 1) of passages and lessons about people, as pre-training tells of those known."""
    rng, train = np.random.default_rng([ground.seed, 4]), stream_config(ground.args)

    def row() -> list[int]:
        tokens: list[int] = []
        while len(tokens) <= LENGTH:
            person, style = people[rng.integers(len(people))], ('question', 'question', 'statement')[rng.integers(3)]
            tokens += [END, *(ground.world.passage(rng, person) if rng.random() < 0.4 else ground.world.note(rng, person, style))]
        return tokens[: LENGTH + 1]

    rows = [row() for _ in range(train.steps * train.batch_size)]
    return np.array(rows, np.int32).reshape(train.steps, train.batch_size, LENGTH + 1)


def prompts(ground: Ground) -> dict[str, Any]:
    """What is learned from self-edits of each format."""
    texts, control = ground.texts('test', ground.args.tests), 'self-edit without a header'
    written = ground.stages(ground.stage('prompts', 'edits'), lambda: prompted(ground, texts))
    edits = {control: write_edits(ground.model, ground.params, texts, 1, ground.seed)[:, 0].tolist(), 'passage only': [None] * len(texts)}
    edits |= {variant: written[variant].tolist() for variant in KNOWLEDGE_PROMPTS}
    found = {}
    for budget in BUDGETS:
        ask = lambda told, budget=budget: ground.reader.learn_and_ask(ground.params, texts, told, budget, [0]).right[:, 0]
        found[str(budget)] = compare({arm: ask(told) for arm, told in edits.items()}, control)
    told = {variant: _tell_notes(ground.world, texts, edits[variant]) for variant in (control, *KNOWLEDGE_PROMPTS)}
    return dict(control=control, budgets=found, notes=told)


def _tell_notes(world: World, texts: list[Text], edits: Sequence[Edit]) -> dict[str, float]:
    """Notes of a self-edit, and the share of them that are well formed and true."""
    styles = [[world.style(line, text.person) for line in world.lines(edit)] for text, edit in zip(texts, edits, strict=True)]
    true = [style in ('question', 'statement', 'reversed', 'nameless') for told in styles for style in told]
    return dict(count=len(true) / len(texts), true=float(np.mean(true)) if true else 0.0)


def prompted(ground: Ground, texts: list[Text]) -> dict[str, np.ndarray]:
    """Self-edits (C, tokens) of each of the seven prompts, as far as a model without language can be asked for them.

    A prompt is the passage and the header at which the model goes on, and each note is drawn by itself: behind the person's name for
    implications, 4, 8 or 16 of them; behind 'they', as the passage's sentences begin, for a rewriting; behind 'Q' for questions with
    answers. The chain of thought is 16 tokens begun with 'they', which stand in front of the implications and are not learned. Without
    a prompt the model goes on after the passage.
    """
    name = lambda text: ground.world.question(text.person, 0)[2:4]
    front = lambda text: [END, *text.passage, EDIT]
    draw = functools.partial(_draw, ground)
    most = max(NOTES.values())
    named = draw([front(text) + name(text) for text in texts], 2, most, 3)
    thoughts = draw([[*front(text), THEY] for text in texts], 0, 1, THOUGHT - 1)[:, 0]
    after = [[*front(text), THEY, *thought.tolist(), *name(text)] for text, thought in zip(texts, thoughts, strict=True)]
    flat = lambda notes: notes.reshape(len(texts), -1)
    found = {variant: flat(named[:, :count]) for variant, count in NOTES.items()}
    found['implications-chain-of-thought'] = flat(draw(after, 2, 4, 3))
    found['rewrite'] = flat(draw([[*front(text), THEY] for text in texts], 1, 4, 3))
    found['self-qa'] = flat(draw([[*front(text), ASK] for text in texts], 1, 4, 6))
    found['none'] = flat(draw([[END, *text.passage] for text in texts], 0, 1, LENGTH - 20))
    return found


def _draw(ground: Ground, fronts: list[list[int]], header: int, each: int, room: int) -> np.ndarray:
    """(C, each, header + room): the last `header` tokens of each prompt and what the model goes on with at temperature 1."""
    repeated = np.repeat(np.array(fronts, np.int32), each, 0)
    options = dict(key=jax.random.key(ground.seed), max_new_tokens=room, temperature=1.0, top_p=0.95)
    drawn = np.asarray(generate(ground.model, {'params': ground.params}, repeated, **options))
    notes = np.concatenate([repeated[:, repeated.shape[1] - header :], drawn], 1)
    return notes.reshape(len(fronts), each, -1)


def judge_rubric(ground: Ground) -> dict[str, Any]:
    """The rubric's marks of stored self-edits beside their rewards."""
    texts, edits = _written(ground, 'rubric')
    scales = [*Rubric._fields, 'total']
    rubrics = [[mark(ground.world, text, edit) for edit in each.tolist()] for text, each in zip(texts, edits, strict=True)]
    marks = np.array([[[*told, told.total] for told in each] for each in rubrics])  # (C, M, scales)
    found = {}
    for budget in BUDGETS:
        right, log_prob = _rewards(ground, 'rubric', texts, edits, budget, 2)
        within = {scale: _within(marks[:, :, index], right.mean(2)) for index, scale in enumerate(scales)}
        within['log-probability of one start, reward of the other'] = _within(log_prob[:, :, 0], right[:, :, 1])
        within['reward of one start, reward of the other'] = _within(right[:, :, 0], right[:, :, 1])
        picked = {
            'random': right[:, :, 1].mean(1),
            'rubric': _picked(right[:, :, 1], marks[:, :, -1]),
            'reward': _picked(right[:, :, 1], right[:, :, 0], log_prob[:, :, 0]),
        }
        found[str(budget)] = dict(rank_correlation=within, picked=compare(picked, 'random'))
    return dict(control='random', budgets=found)


def halve(ground: Ground) -> dict[str, Any]:
    """What the pick among self-edits earns when all starts are given to all of them, to the better half, or one start to all."""
    (texts, edits), control, found = _written(ground, 'halving'), 'all starts', {}
    count, each = edits.shape[:2]
    for budget in BUDGETS:
        right, log_prob = _rewards(ground, 'halving', texts, edits, budget, STARTS + 1)
        kept = better_half(right[:, :, 0], log_prob[:, :, 0])
        means, ties = (values[:, :, :STARTS].mean(2) for values in (right, log_prob))
        earned = functools.partial(_picked, right[:, :, STARTS])
        picked = {
            'random': right[:, :, STARTS].mean(1),
            'one start': earned(right[:, :, 0], log_prob[:, :, 0]),
            'halving': earned(np.where(kept, means, -1.0), ties),
            control: earned(means, ties),
        }
        found[str(budget)] = dict(picked=compare(picked, control))
    tried = int(kept.sum()) // count
    updates = {'random': 0, 'one start': each, 'halving': each + tried * (STARTS - 1), control: each * STARTS}
    return dict(control=control, updates_of_a_passage=updates, budgets=found)


def _written(ground: Ground, probe: Name) -> tuple[list[Text], np.ndarray]:
    """Passages and self-edits (C, M, tokens) about them."""
    texts = ground.texts('train', ground.args.contexts)
    write = lambda: dict(tokens=write_edits(ground.model, ground.params, texts, ground.args.each, ground.seed))
    return texts, ground.stages(ground.stage(probe, 'edits'), write)['tokens']


def _rewards(ground: Ground, probe: Name, texts: list[Text], edits: np.ndarray, budget: Budget, starts: int) -> list[np.ndarray]:
    """Marks (C, M, starts) of every self-edit: shares right, and log-probabilities."""
    rows = [(text, edit) for text, each in zip(texts, edits.tolist(), strict=True) for edit in each]
    ask = lambda: ground.reader.learn_and_ask(ground.params, *zip(*rows, strict=True), budget, range(starts))
    stored = ground.stages(ground.stage(probe, f'rate-{budget.learning_rate:g}-steps-{budget.steps}'), lambda: ask()._asdict())
    return [np.asarray(values).reshape(*edits.shape[:2], starts) for values in Marks(**stored)]


def _picked(earned: np.ndarray, marks: np.ndarray, ties: np.ndarray | None = None) -> np.ndarray:
    """(C,) of what self-edits earned (C, M), that of the highest mark; of equal ones `ties` decide, or the first has it."""
    best = marks == marks.max(1, keepdims=True)
    return earned[np.arange(len(earned)), np.where(best, 0.0 if ties is None else ties, -np.inf).argmax(1)]


def mark(world: World, text: Text, edit: Edit) -> Rubric:
    """The rubric of a self-edit in print; one of as many words as pre-training's longest has the full length."""
    tried = in_print(world, text, edit)
    return rubric(tried.edit, tried.passage, full_length=full_length(world))


def _within(marks: np.ndarray, rewards: np.ndarray) -> dict[str, Any] | None:
    """Spearman's rank correlation (C, M) by passage: mean, interval, and the passages in which both vary; None where there are none."""
    varies = (np.ptp(marks, 1) > 0) & (np.ptp(rewards, 1) > 0)
    if not varies.any():
        return None
    each = [stats.spearmanr(one, other).statistic for one, other in zip(marks[varies], rewards[varies], strict=True)]
    return dict(mean=bootstrap(np.array(each)), passages=int(varies.sum()))


PROBES: dict[str, Callable[[Ground], dict[str, Any]]] = {
    'test-time': test_time, 'meta': meta, 'stacking': stacking, 'prompts': prompts, 'rubric': judge_rubric, 'halving': halve,
}  # fmt: skip


def describe(metrics: dict) -> str:
    """Each arm in %, and above the control."""
    lines = [f'above: {metrics["control"]}']
    for label, arms in _tables(metrics):
        lines.append(label)
        for arm, told in arms.items():
            (mean, low, high), (gap, below, above) = ([100 * value for value in told[key]] for key in ('right', 'above_control'))
            lines.append(f'  {arm:<36}{mean:5.1f} [{low:.1f}, {high:.1f}]   {gap:+.1f} [{below:+.1f}, {above:+.1f}]')
    return '\n'.join(lines)


def _tables(metrics: dict) -> list[tuple[str, dict]]:
    """(what they are measured by, arms)."""
    tables = [(key, metrics[key]) for key in ('arms', 'known') if key in metrics]
    return tables + [(budget, told.get('picked', told)) for budget, told in metrics.get('budgets', {}).items()]


if __name__ == '__main__':
    sys.exit(main())
