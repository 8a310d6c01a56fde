"""What `experiments/seal_arc.py` does with a model on the world of grid rules: pre-training, updates by configuration, answers, policies.

A function here is pure: what it does follows from parameters, tasks and seeds, and comes back as arrays, so that it can be a stage
(`nested_jax/seal/stages.py`) or a row. Letters in shapes: C tasks, M self-edits of each, K candidates of one task, Q questions about it.
"""

import functools
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.fitting import lane, make_fit
from nested_jax.config import LevelConfig, ModelConfig
from nested_jax.data.tasks.arc import NEXT, PAD, Grid, Pairs, Task, answer, decode, encode
from nested_jax.data.tasks.arc_augmentations import GROUPS, Group, training_tasks, transform, views
from nested_jax.data.tasks.grid_rules import CONFIGURE, DONE, FIELDS, WORLD_VOCAB_SIZE, World, configurations
from nested_jax.models import sampling
from nested_jax.models.language_model import LanguageModel
from nested_jax.seal.buckets import Batch, Candidate, buckets
from nested_jax.seal.inner_loop import InnerConfig, make_inner_loop
from nested_jax.seal.lora import LoraConfig, attach
from nested_jax.seal.outer_loop import Samples
from nested_jax.seal.rewards import vote_pass_2
from nested_jax.seal.self_edits import Configuration
from nested_jax.seal.voting import IDENTITY
from nested_jax.training.config import TrainConfig

PyTree = Any
WORLD = World(shapes=((2, 2),), tests=1)
LENGTH = 57  # tokens of a row of pre-training
ROWS = 4  # an update's training tasks at most; every step reads all of them
SHAPES = ((2, 96), (4, 96))  # rows and tokens of an update: the first into which a candidate's training tasks fit
PROMPT, POLICY_PROMPT, ANSWER = 68, 62, 14  # tokens of what is asked, of what a policy sees, of an answer, at most
TOGETHER, ASKED = 8, 64  # candidates that learn side by side, and that are asked
INNER = InnerConfig(lora=LoraConfig(rank=4, alpha=64.0, targets=('query', 'value', 'up', 'down')))
MEASURES = ('vote', 'solved', 'cells')


class Question(NamedTuple):
    """A test input, asked in one view."""

    view: str
    test: int  # which test input
    invert: Any  # grid of the view -> grid
    prompt: list[int]


def model_config() -> ModelConfig:
    """A Transformer of 0.03M parameters."""
    return ModelConfig(
        num_layers=2, width=32, num_heads=2, head_dim=16, vocab_size=WORLD_VOCAB_SIZE, max_length=SHAPES[-1][1],
        mixer='attention', levels=(LevelConfig(96, 1),),
    )  # fmt: skip


def train_config(steps: int) -> TrainConfig:
    """Of pre-training."""
    return TrainConfig(
        steps=steps, batch_size=32, sequence_length=LENGTH, learning_rate=3e-3, warmup_steps=min(100, steps // 4), beta2=0.99
    )


def pretrain(model: LanguageModel, config: TrainConfig, seed: int) -> PyTree:
    """Parameters after `config.steps` steps on rows of the world."""
    rng = np.random.default_rng([seed, 0])
    rows = np.array([WORLD.row(rng, LENGTH + 1) for _ in range(config.steps * config.batch_size)], np.uint8)
    rows = rows.reshape(1, config.steps, config.batch_size, 2, LENGTH + 1)

    def draw(data: jax.Array, state: Any) -> dict[str, jax.Array]:
        tokens, learned = jnp.moveaxis(data[state.step].astype(jnp.int32), 1, 0)
        return dict(tokens=tokens[:, :-1], targets=tokens[:, 1:], weights=learned[:, 1:].astype(jnp.float32))

    return lane(make_fit(model, config, draw)([seed], data=jnp.asarray(rows)).params, 0, 0)


def draw_task(index: int, family: str) -> Task:
    """The task of a number, whatever others there are."""
    return WORLD.task(np.random.default_rng([1, index]), family)


def candidates(task: Task, edits: Sequence[Configuration], seed: int) -> list[Candidate]:
    """What each configuration has the model learn; those of the same transformations learn from the same training tasks."""
    made: dict[tuple[Group, ...], list[Pairs]] = {}
    found = []
    for edit in edits:
        groups = tuple(group for group in GROUPS if getattr(edit, group))
        if groups not in made:
            rng = np.random.default_rng([seed, *(group in groups for group in GROUPS)])
            made[groups] = training_tasks(task.train, groups, rng, at_most=ROWS, most_tokens=SHAPES[-1][1] + 1)
        rows = made[groups]
        prompts = tuple(map(answer, rows)) if edit.output_tokens_only else None
        found.append(Candidate(tuple(tuple(encode(row)) for row in rows), edit.learning_rate, edit.epochs, seed, prompts))
    return found


def questions(task: Task) -> list[Question]:
    """Every test input as it is, with the demonstrations in either order, and in each of the five views."""
    found = []
    for index, pair in enumerate(task.test):
        for shown in (task.train, task.train[::-1]):
            found.append(Question(IDENTITY, index, lambda grid: grid, encode(shown, pair.given)))
        for view in views():
            prompt = encode(transform(task.train, view.apply), view.apply(pair.given))
            found.append(Question(view.name, index, view.invert, prompt))
    return found


class Solver:
    """Updates a model on configurations of a task and asks it; compiled once for each shape of a bucket."""

    def __init__(self, model: LanguageModel):
        self.model, self._learn = model, make_inner_loop(model, INNER)
        read = lambda variables, tokens, segments: sampling.prefill(model, variables, tokens, segment_ids=segments)
        write = functools.partial(_write, model)
        updated = lambda params, adapters: attach(params, adapters, INNER.lora)
        self._read = jax.jit(jax.vmap(lambda params, adapters, *asked: read(updated(params, adapters), *asked), (None, 0, None, None)))
        after = jax.vmap(lambda params, adapters, reading: write(updated(params, adapters), reading), (None, 0, 0))
        self._write = jax.jit(after, donate_argnums=2)
        self._read_plain = jax.jit(lambda params, *asked: read({'params': params}, *asked))
        self._write_plain = jax.jit(lambda params, reading: write({'params': params}, reading), donate_argnums=1)

    def base(self, params: PyTree, task: Task) -> np.ndarray:
        """(3,) marks of the model as it is, in the order of `MEASURES`."""
        read, write = functools.partial(self._read_plain, params), functools.partial(self._write_plain, params)
        return np.array(_marks(task, _complete(read, write, questions(task))))

    def rewards(self, params: PyTree, task: Task, edits: Sequence[Configuration], seed: int) -> np.ndarray:
        """(K, 3) marks of the model after the update of each configuration, in the order of `MEASURES`.

        Args:
            params: of the learner.
            task: whose demonstrations are learned from, and whose test inputs are asked.
            edits: (K,).
            seed: of the training tasks, their order and the adapters' start, the same for all.
        """
        learned = [(places, self._learn(params, batch).adapters) for places, batch in _buckets(candidates(task, edits, seed))]
        order = [place for places, _ in learned for place in places]
        parts = [jax.tree.map(operator.itemgetter(slice(len(places))), adapters) for places, adapters in learned]
        adapters = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)
        found, asked = np.zeros((len(edits), len(MEASURES))), questions(task)
        for start in range(0, len(edits), ASKED):
            part = jax.tree.map(operator.itemgetter(slice(start, start + ASKED)), adapters)
            read, write = functools.partial(self._read, params, part), functools.partial(self._write, params, part)
            tokens = _complete(read, write, asked)
            found[order[start : start + ASKED]] = [_marks(task, answers) for answers in tokens]
        return found


def read_edits(edits: np.ndarray) -> list[int | None]:
    """Places of self-edits (N, tokens) among all configurations; None for what is not a word for each field in their order, and DONE."""
    places = {tuple(tokens): index for index, tokens in enumerate(configurations())}
    return [places.get(tuple(tokens)) for tokens in edits.tolist()]


def write_edits(model: LanguageModel, params: PyTree, tasks: Sequence[Task], each: int, seed: int) -> np.ndarray:
    """(C, M, tokens) self-edits that a policy writes behind demonstrations, at temperature 1."""
    prompts = [_policy_prompt(task) for task in tasks for _ in range(each)]
    tokens, segments = sampling.pad_prompts(prompts, POLICY_PROMPT)
    reading = sampling.prefill(model, {'params': params}, tokens, segment_ids=segments)
    options = dict(key=jax.random.key(seed), max_new_tokens=len(FIELDS) + 1, stop=DONE)
    written, _ = sampling.decode(model, {'params': params}, reading, **options)
    return np.asarray(written).reshape(len(tasks), each, -1)


def samples(tasks: Sequence[Task], edits: np.ndarray) -> Samples:
    """Self-edits (C, M, tokens) behind the demonstrations they were written for, as the policy's update reads them."""
    length = POLICY_PROMPT + len(FIELDS) + 1
    tokens, weights = np.full((edits.shape[0] * edits.shape[1], length + 1), PAD, np.int32), np.zeros((len(tasks) * edits.shape[1], length))
    for row, edit in enumerate(edits.reshape(-1, edits.shape[-1]).tolist()):
        prompt = _policy_prompt(tasks[row // edits.shape[1]])
        own = edit[: edit.index(DONE) + 1] if DONE in edit else edit
        tokens[row, : len(prompt) + len(own)] = prompt + own
        weights[row, len(prompt) - 1 : len(prompt) + len(own) - 1] = 1
    return Samples(tokens[:, :-1], tokens[:, 1:], weights.astype(np.float32))


def probabilities(model: LanguageModel, params: PyTree, tasks: Sequence[Task]) -> np.ndarray:
    """(C, 512) probability with which a policy writes each configuration; what is missing to 1 is that of invalid self-edits."""
    words, measure = jnp.asarray(configurations()), _measure(model)
    return np.stack([measure(params, words, *sampling.pad_prompts([_policy_prompt(task)], POLICY_PROMPT)) for task in tasks])


@functools.cache
def _measure(model: LanguageModel) -> Any:
    @jax.jit
    def measure(params: PyTree, words: jax.Array, tokens: jax.Array, segments: jax.Array) -> jax.Array:
        variables = {'params': params}
        logits, state = model.apply(variables, tokens, segment_ids=segments)
        first = jnp.broadcast_to(logits[:, -1:], (words.shape[0], 1, logits.shape[-1]))
        later = jax.vmap(lambda row: model.apply(variables, row[None], state)[0][0])(words[:, :-1])
        log = jax.nn.log_softmax(jnp.concatenate([first, later], 1))
        return jnp.exp(jnp.take_along_axis(log, words[..., None], -1).sum((1, 2)))

    return measure


def _policy_prompt(task: Task) -> list[int]:
    return [*encode(task.train), CONFIGURE]


def _write(model: LanguageModel, variables: PyTree, reading: sampling.Reading) -> tuple[jax.Array, sampling.Reading]:
    """Half of an answer, the likeliest token each time."""
    options = dict(key=jax.random.key(0), max_new_tokens=ANSWER // 2, temperature=0.0, stop=NEXT)
    return sampling.decode(model, variables, reading, **options)


def _complete(read: Any, write: Any, asked: Sequence[Question]) -> np.ndarray:
    """Answers (..., Q, tokens); the second half is written only where one of the first did not end."""
    written, reading = write(read(*sampling.pad_prompts([question.prompt for question in asked], PROMPT)))
    first = np.asarray(written)
    return first if (first == NEXT).any(-1).all() else np.concatenate([first, write(reading)[0]], -1)


def _marks(task: Task, tokens: np.ndarray) -> tuple[float, ...]:
    """Means over the test inputs: right answer among the two voted for, greedy answer right, share of its cells that are right."""
    asked, marks = questions(task), []
    answers = [decode(row) for row in tokens.tolist()]
    answers = [grid if grid is None else question.invert(grid) for question, grid in zip(asked, answers, strict=True)]
    for index, pair in enumerate(task.test):
        given: dict[str, list[Grid | None]] = {}
        for question, grid in zip(asked, answers, strict=True):
            if question.test == index:
                given.setdefault(question.view, []).append(grid)
        greedy = given[IDENTITY][0]
        marks.append((vote_pass_2(given, pair.made), float(greedy == pair.made), _cells(greedy, pair.made)))
    return tuple(np.mean(marks, 0).tolist())


def _cells(grid: Grid | None, right: Grid) -> float:
    """Share of the cells that are right, 0 for another shape."""
    if grid is None or (len(grid), len(grid[0])) != (len(right), len(right[0])):
        return 0.0
    return float(np.mean(np.array(grid) == np.array(right)))


def _buckets(found: Sequence[Candidate]) -> list[tuple[list[int], Batch]]:
    """Candidates in the first of `SHAPES` that holds them."""
    fits = [next((shape for shape in SHAPES if _rows_needed(candidate, shape[1]) <= shape[0]), SHAPES[-1]) for candidate in found]
    laid = []
    for shape in SHAPES:
        own = [place for place, fit in enumerate(fits) if fit == shape]
        for places, batch in buckets([found[place] for place in own], at_most=TOGETHER, shape=shape):
            laid.append(([own[place] for place in places], batch))
    return laid


def _rows_needed(candidate: Candidate, length: int) -> int:
    """Rows that hold a candidate's training tasks, each laid into the first one with room, longest first, as `buckets` does."""
    rows: list[int] = []
    for count in sorted((len(sequence) - 1 for sequence in candidate.sequences), reverse=True):
        room = next((index for index, used in enumerate(rows) if used + count <= length), None)
        if room is None:
            rows.append(count)
        else:
            rows[room] += count
    return len(rows)
