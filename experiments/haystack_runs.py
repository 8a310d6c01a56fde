"""Small models that read long texts and answer: what the grids of needles and of BABILong share.

A model trains on texts of a few lengths and is tested on much longer ones. These are made and read in pieces, the model's state carried
from one to the next, so that neither a text nor what a model makes of it is ever held as a whole. An answer is right when at every place
of it the model's most probable byte is the right one, given the bytes before: then, and only then, greedy decoding writes it.

The texts of one index ask the same question about the same sentences at all lengths (`Task.example`), so that lengths are compared on
equal questions.
"""

import collections
import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np

from experiments.fitting import Fitted, Phase, lane, make_fit
from experiments.grid import Cell, Grid, Train, make_cells, run_grid
from experiments.task_runs import VALIDATION_SEED, TaskArgs, best, examples, fit_rates, model_config, registered, stack
from nested_jax.config import ModelConfig
from nested_jax.data.tasks.haystack import HaystackTask, Plan
from nested_jax.data.tasks.task import Example, score
from nested_jax.models.language_model import LanguageModel
from nested_jax.training.state import TrainState

MODELS = ('hope-linear-zero', 'gated-deltanet', 'transformer', 'titans', 'transformer-window-256', 'hope-linear', 'samba')
ROWS = 8  # texts read side by side
PIECE = 256  # tokens read at a time
PHASE = 50  # steps on texts of one length
TRIVIAL_TEXTS = 256  # of which the most frequent answer is taken
Texts = Callable[[int], HaystackTask]  # length -> task
Read = Callable[[Any, np.ndarray, Any], tuple[jax.Array, Any]]  # parameters, (B, T) tokens, state -> (B, T) bytes guessed, state


@dataclasses.dataclass(frozen=True)
class HaystackArgs(TaskArgs):
    """The arguments of a grid whose texts have lengths; subclasses name the tasks and make their texts."""

    known_tasks: ClassVar[tuple[str, ...]]

    models: tuple[str, ...] = registered(MODELS)
    """Families of the presets, or variants: <family>-without-<part>, <family>-chunk-<tokens>, <family>-window-<tokens>."""
    tasks: tuple[str, ...] = ()
    """Of the tasks that there are, see above."""
    learning_rates: tuple[float, ...] = (5e-3,)
    """Peaks that every run tries; it keeps what does best on validation texts of the lengths trained on."""
    steps: int = 5000
    """Optimizer steps."""
    batch_size: int = 1
    """Texts a step of the longest trained on; of shorter ones as many as have no more bytes."""
    train_examples: int = 20_000
    """Texts of each length trained on, which are read again and again."""
    train_lengths: tuple[int, ...] = (64, 128, 256, 512, 1024)
    """Bytes of the texts trained on, the shortest alone at first, then the next one too, and so on; those too short are left out."""
    test_lengths: tuple[int, ...] = (512, 1024, 2048, 4096, 8192, 16_384)
    """Bytes of the texts tested on; those too short for a task are left out."""
    elsewhere: float = 1.0
    """Factor of the loss of bytes outside the answer, whose own is 1."""
    validation_examples: int = 40
    """Texts of each length trained on by which learning rates are chosen, a multiple of 8."""
    test_examples: int = 40
    """Texts of each test, a multiple of 8."""
    results: pathlib.Path = pathlib.Path()
    """File that a row for each run is added to."""

    def __post_init__(self):
        super().__post_init__()
        for name in ('validation_examples', 'test_examples'):
            self.check(name, getattr(self, name) % ROWS == 0, f'a multiple of {ROWS}')
        for name in ('train_lengths', 'test_lengths'):
            lengths = getattr(self, name)
            self.check(name, bool(lengths) and list(lengths) == sorted(set(lengths)) and lengths[0] > 0, 'ascending integers above 0')
        self.check('steps', self.steps >= len(self.train_lengths), f'at least {len(self.train_lengths)}, one for each of train_lengths')
        self.check('elsewhere', 0 <= self.elsewhere <= 1, 'a number from 0 to 1')
        self.check('models', bool(self.models), 'at least one')
        self.check('tasks', bool(self.tasks) and set(self.tasks) <= set(self.known_tasks), f'some of {", ".join(self.known_tasks)}')
        for name in self.models:
            self.model(name)
        for task in self.tasks:
            for name in ('train_lengths', 'test_lengths'):
                self.check(name, bool(self.lengths(task, name)), f'at least one that is long enough for {task}')

    def text(self, task: str, length: int) -> HaystackTask:
        """The task at a length; raises ValueError where that is too short."""
        raise NotImplementedError

    def lengths(self, task: str, name: str) -> tuple[int, ...]:
        """Those of the argument `name` that are long enough for a task."""

        def fits(length: int) -> bool:
            try:
                self.text(task, length)
            except ValueError:
                return False
            return True

        return tuple(filter(fits, getattr(self, name)))

    def model(self, name: str) -> ModelConfig:
        """The model of a name, which can look back over the longest text."""
        return model_config(name, width=64, heads=2, vocab_size=256, max_length=max(*self.train_lengths, *self.test_lengths))

    def smaller(self) -> Self:
        """The arguments of a smoke run: one text a step, and a test at the same length."""
        length = self.lengths(self.tasks[0], 'train_lengths')[-1:]
        few = dict(batch_size=1, validation_examples=ROWS, test_examples=ROWS, train_lengths=length, test_lengths=length)
        return super().smaller(models=self.models[:1], tasks=self.tasks[:1], **few)

    def row(self, cell: Cell) -> dict:
        """The configuration of a cell's row, all that its numbers depend on."""
        lengths = {name: self.lengths(cell.task, name) for name in ('train_lengths', 'test_lengths')}
        config = self.config(cell, self.model(cell.model), self.text(cell.task, lengths['train_lengths'][-1]))
        return config | dict(train=config['train'] | lengths | dict(elsewhere=self.elsewhere))


def run(experiment: str, args: HaystackArgs) -> int:
    """Runs the cells that have no row; returns the exit code."""
    args = args.smaller() if args.smoke else args
    cells = make_cells(args.models, args.tasks, args.seeds)
    grid = Grid(experiment, cells, args.row, functools.partial(prepare, args), describe, args.results, args.side_by_side)
    return run_grid(grid, minutes=args.minutes, store=not args.smoke)


def prepare(args: HaystackArgs, name: str, task: str) -> Train:
    """Builds what trains seeds and tests them at every length.

    Args:
        args: sizes, lengths and the learning rates to try.
        name: of the model.
        task: of its texts.
    """
    config, texts = args.model(name), functools.partial(args.text, task)
    trained, tested = (args.lengths(task, name) for name in ('train_lengths', 'test_lengths'))
    # What a model keeps of a row that it trains on, nobody reads: it need not be as long as the longest text.
    fit = make_fit(LanguageModel(dataclasses.replace(config, max_length=trained[-1])), args.train(trained[-1]), _batch)
    measure = functools.partial(measure_length, config)

    def train(seeds: Sequence[int]) -> list[dict]:
        fitted = fit_rates(args, fit, seeds, phases(args, texts, trained, seeds))
        return [best(args, validate(lane(fitted, index), seed), functools.partial(test, seed)) for index, seed in enumerate(seeds)]

    def validate(runs: Fitted, seed: int) -> Fitted:
        of = dict(split='validation', seed=VALIDATION_SEED + seed, count=args.validation_examples)
        each = (lane(runs.params, index) for index in range(len(args.learning_rates)))
        return runs._replace(score=np.array([np.mean([measure(params, texts(n), **of)['whole'] for n in trained]) for params in each]))

    def test(seed: int, params: Any) -> dict:
        of = dict(split='test', seed=seed, count=args.test_examples)
        lengths = {str(length): measure(params, texts(length), **of) for length in tested}
        return dict(lengths=lengths, texts=args.test_examples, trivial=trivial(texts(tested[0]), seed, args.test_examples))

    return train


def phases(args: HaystackArgs, texts: Texts, lengths: Sequence[int], seeds: Sequence[int]) -> list[Phase]:
    """What runs train on: texts of one length for some steps, then of another, as `schedule` has it.

    Args:
        args: numbers of steps and texts, and the weight of places outside of answers.
        texts: the task of a length.
        lengths: of texts, ascending.
        seeds: of the runs.

    Returns:
        Phases of 'first', (S,), their first step, and 'tokens', 'targets' and 'weights', (S, steps, texts a step, length).
    """
    found, first, used = [], 0, collections.Counter()
    for end, length in schedule(args.steps, lengths):
        shape = (end - first, args.batch_size * lengths[-1] // length, length)
        places = used[length] + np.arange(shape[0] * shape[1])
        # No text of one length asks what a text of another does.
        indices = lengths.index(length) * args.train_examples + places % args.train_examples
        data = [pack([texts(length).example(int(index), seed=seed) for index in indices], args.elsewhere, shape) for seed in seeds]
        found.append(Phase(end, stack([rows | dict(first=np.int32(first)) for rows in data])))
        first, used[length] = end, used[length] + len(indices)
    return found


def schedule(steps: int, lengths: Sequence[int]) -> list[tuple[int, int]]:
    """The steps at which phases end, and the lengths of their texts.

    There is a stage for each length, all of them as long: phases of this length and of all shorter ones take turns in it.
    """
    ends = [min(first + PHASE, steps) for first in range(0, steps, PHASE)]
    stages = [index * len(lengths) // len(ends) for index in range(len(ends))]
    return [(end, lengths[stage - index % (stage + 1)]) for index, (end, stage) in enumerate(zip(ends, stages, strict=True))]


def pack(rows: list[Example], elsewhere: float, shape: tuple[int, ...]) -> Example:
    """Examples stacked to a shape, in as few bytes as they need, their weights at least `elsewhere`."""
    whole = {name: np.stack([row[name] for row in rows]).reshape(shape) for name in rows[0]}
    tokens = {name: whole[name].astype(np.uint8) for name in ('tokens', 'targets')}
    return tokens | dict(weights=np.maximum(whole['weights'], np.float32(elsewhere)))


def _batch(data: dict, state: TrainState) -> Example:
    rows = {name: data[name][state.step - data['first']] for name in ('tokens', 'targets', 'weights')}
    return rows | {name: rows[name].astype(jnp.int32) for name in ('tokens', 'targets')}


@functools.lru_cache(maxsize=8)
def reader(config: ModelConfig) -> Read:
    """A compiled function that reads a piece and says the most probable next byte everywhere; one program for pieces of one length."""
    model = LanguageModel(config)

    @jax.jit
    def read(params: Any, tokens: jax.Array, state: Any) -> tuple[jax.Array, Any]:
        logits, state = model.apply({'params': params}, tokens, state)
        return logits.argmax(-1), state

    return read


def count_right(read: Read, params: Any, state: Any, pieces: Iterable[Example]) -> tuple[np.ndarray, np.ndarray]:
    """Reads texts side by side.

    Args:
        read: see `reader`.
        params: of the model.
        state: before the first piece.
        pieces: 'tokens', 'targets' and 'weights' (B, T) one after another.

    Returns:
        How many places of each text's answer are right, and how many there are, (B,) int64.
    """
    right, places = 0, 0
    for piece in pieces:
        guessed, state = read(params, piece['tokens'], state)
        due = piece['weights'] > 0
        right, places = right + (due & (guessed == piece['targets'])).sum(1), places + due.sum(1)
    return np.asarray(right), np.asarray(places)


def pieces(task: HaystackTask, indices: Iterable[int], size: int, *, split: str, seed: int) -> Iterator[Example]:
    """Texts side by side, in pieces (B, size) of which the last may be shorter; see `HaystackTask.stream`."""
    streams = [task.stream(index, size, split=split, seed=seed) for index in indices]
    for parts in zip(*streams, strict=True):
        yield {name: np.stack([part[name] for part in parts]) for name in parts[0]}


def measure_length(config: ModelConfig, params: Any, task: HaystackTask, *, split: str, seed: int, count: int) -> dict[str, Any]:
    """Shares right on the first texts of a split: of 'whole' answers, of their 'positions', and of whole answers by depth.

    Args:
        config: of the model that reads.
        params: its parameters.
        task: of one length.
        split, seed: of the texts.
        count: texts, a multiple of `ROWS`.

    Returns:
        'whole', 'positions', and 'thirds': right and all texts whose answer's only sentence is in the text's first, second and last third.
    """
    if 'attention' in config.unit and config.attention.window is None:  # keys beyond the text would all be empty
        config = dataclasses.replace(config, max_length=task.length)
    read, state = reader(config), LanguageModel(config).init_state(ROWS)
    groups = [range(start, start + ROWS) for start in range(0, count, ROWS)]
    found = [count_right(read, params, state, pieces(task, group, PIECE, split=split, seed=seed)) for group in groups]
    right, places = (np.concatenate(counts) for counts in zip(*found, strict=True))
    whole, thirds = right == places, [[0, 0] for _ in range(3)]
    for index in range(count):
        depth = answer_depth(task.deal(index, split, seed)[1])
        if depth is not None:
            third = thirds[min(int(3 * depth), 2)]
            third[0], third[1] = third[0] + int(whole[index]), third[1] + 1
    return dict(whole=float(whole.mean()), positions=float(right.sum() / places.sum()), thirds=thirds)


def answer_depth(plan: Plan) -> float | None:
    """The depth of the one sentence that has the answer; None where none has all of it, or several have."""
    answer = plan.answer.strip(b' .')
    depths = [depth for depth, sentence in plan.inserts if answer in sentence]
    return depths[0] if len(depths) == 1 else None


def trivial(task: HaystackTask, seed: int, count: int) -> dict[str, float]:
    """Shares of whole answers that trivial rules get right on the first test texts: the most frequent of training, and `guesses`."""
    answers = lambda split, number: [task.deal(index, split, seed)[1].answer for index in range(number)]
    (common, _), *_ = collections.Counter(answers('train', TRIVIAL_TEXTS)).most_common(1)
    batch = examples(task, 'test', seed, count)
    guessed = {name: score(guess(batch['tokens']), batch).sequences for name, guess in task.guesses().items()}
    return {'most frequent answer': float(np.mean([answer == common for answer in answers('test', count)]))} | guessed


def describe(metrics: dict) -> str:
    """Shares of whole answers by length, of right positions, and what trivial rules get."""
    show = lambda found: f'{100 * found["whole"]:.1f} ({100 * found["positions"]:.1f})'
    lengths = ', '.join(f'{int(length):,}: {show(found)}' for length, found in metrics['lengths'].items())
    rules = ', '.join(f'{name} {100 * share:.1f}' for name, share in metrics['trivial'].items())
    return f'whole answers (positions) right, %: {lengths}; {rules}; rate {metrics["learning_rate"]:g}'
