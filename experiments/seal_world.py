"""What the experiments on the world of people do with a model: pre-train it, have it write, update it, ask it.

Everything is a function of parameters, people and seeds, and comes back as arrays, so that it can be a stage (`nested_jax/seal/stages.py`).
Letters in shapes: C people, M self-edits of each, A attributes, P repetitions of an update, each with an adapter start of its own.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.fitting import lane, make_fit
from nested_jax.config import LevelConfig, MemoryConfig, ModelConfig
from nested_jax.data.tasks.biographies import EDIT, END, PAD, Person, World
from nested_jax.models.language_model import LanguageModel
from nested_jax.models.sampling import generate
from nested_jax.seal.buckets import Candidate, buckets, real_share
from nested_jax.seal.inner_loop import InnerConfig, make_inner_loop
from nested_jax.seal.lora import LoraConfig, attach
from nested_jax.seal.outer_loop import Samples
from nested_jax.seal.rewards import Tried
from nested_jax.training.config import TrainConfig

PyTree = Any
Edit = list[int]
Learner = Literal['transformer', 'hope-attention', 'hope-linear']
LENGTH = 64  # tokens of a row of pre-training, and of a passage with its self-edit
SHAPE = (2, 32)  # of a bucket: a passage and as many notes as there are attributes
INNER = InnerConfig(lora=LoraConfig(rank=8, alpha=16.0, targets=('query', 'value', 'up', 'down')))


class Budget(NamedTuple):
    """How much an update learns."""

    learning_rate: float
    steps: int

    def __str__(self) -> str:
        return f'{self.learning_rate:g} x {self.steps}'


PROTOTYPE = Budget(3e-3, 16)  # of the first prototype of this world


class Text(NamedTuple):
    """A person and the passage about them that everyone reads."""

    person: Person
    passage: list[int]


class Marks(NamedTuple):
    """What updated models answered, (C, P) each."""

    right: np.ndarray  # share of the attributes whose answer is the likeliest token
    log_prob: np.ndarray  # mean log-probability of the right answers


def model_config(world: World, learner: Learner = 'transformer') -> ModelConfig:
    """A model of 0.1M parameters: the Transformer, its MLP split into two CMS levels, or Hope with matrix memories."""
    hidden = {'transformer': (192,), 'hope-attention': (96, 96), 'hope-linear': (74, 74)}[learner]
    hope = dict(
        mixer='self-modifying',
        memory=MemoryConfig(kind='matrix', gradient='token', momentum=False, decay_to='init', chunk_size=4, projection_chunk_size=4),
    )
    return ModelConfig(
        num_layers=2, width=64, num_heads=4, head_dim=16, vocab_size=world.vocab_size, max_length=LENGTH,
        levels=tuple(LevelConfig(size, LENGTH * 4**index) for index, size in enumerate(hidden)),
        **(hope if learner == 'hope-linear' else dict(mixer='attention')),
    )  # fmt: skip


def train_config(steps: int) -> TrainConfig:
    """Of pre-training."""
    return TrainConfig(
        steps=steps, batch_size=32, sequence_length=LENGTH, learning_rate=3e-3, warmup_steps=min(100, steps // 4), beta2=0.99
    )


def pretrain(model: LanguageModel, world: World, config: TrainConfig, seed: int) -> PyTree:
    """Parameters after `config.steps` steps on rows of the world."""
    rng = np.random.default_rng([seed, 0])
    rows = np.array([world.row(rng, LENGTH + 1) for _ in range(config.steps * config.batch_size)], np.uint8)
    rows = rows.reshape(1, config.steps, config.batch_size, LENGTH + 1)

    def draw(data: jax.Array, state: Any) -> dict[str, jax.Array]:
        batch = data[state.step].astype(jnp.int32)
        return dict(tokens=batch[:, :-1], targets=batch[:, 1:], weights=(batch[:, 1:] != PAD).astype(jnp.float32))

    return lane(make_fit(model, config, draw)([seed], data=jnp.asarray(rows)).params, 0, 0)


def write_texts(world: World, count: int, split: str, seed: int) -> list[Text]:
    """New people of a split, with a passage about each."""
    rng = np.random.default_rng([seed, 1])
    people = [world.person(rng, split) for _ in range(count)]
    return [Text(person, world.passage(rng, person)) for person in people]


def write_edits(model: LanguageModel, params: PyTree, texts: Sequence[Text], each: int, seed: int) -> np.ndarray:
    """(C, M, tokens) self-edits at temperature 1; what follows the end is the end again."""
    prompts = np.repeat([[END, *text.passage, EDIT] for text in texts], each, 0).astype(np.int32)
    room = LENGTH - prompts.shape[1]
    options = dict(key=jax.random.key(seed), max_new_tokens=room, temperature=1.0, top_p=0.95, stop=END)
    return np.asarray(generate(model, {'params': params}, prompts, **options)).reshape(len(texts), each, room)


def samples(texts: Sequence[Text], edits: np.ndarray) -> Samples:
    """Self-edits (C, M, tokens) behind what they were written for, as the writer's update reads them."""
    rows, weights = [], []
    for text, written in zip(texts, edits, strict=True):
        for edit in written.tolist():
            own = edit[: edit.index(END) + 1] if END in edit else edit
            prompt = [END, *text.passage, EDIT]
            rows.append((prompt + own + [PAD] * LENGTH)[: LENGTH + 1])
            weights.append([0.0] * (len(prompt) - 1) + [1.0] * len(own) + [0.0] * LENGTH)
    tokens, weights = np.array(rows, np.int32), np.array([row[:LENGTH] for row in weights], np.float32)
    return Samples(tokens[:, :-1], tokens[:, 1:], weights)


class Reader:
    """Updates a model on self-edits and asks it; compiled once for each shape of a bucket.

    Attributes:
        shares: real tokens among those computed, of every bucket so far.
    """

    def __init__(self, model: LanguageModel, world: World):
        self.world, self.shares, self._grid, devices = world, [], model.config.grid, jax.devices()
        self._learn = make_inner_loop(model, INNER, devices)
        self._together = 8 * len(devices) if devices[0].platform == 'cpu' else 64  # a core's cache holds what so few compute

        def ask(params: PyTree, adapters: PyTree | None, questions: jax.Array, answers: jax.Array) -> tuple[jax.Array, jax.Array]:
            variables = {'params': params} if adapters is None else attach(params, adapters, INNER.lora)
            logits = model.apply(variables, questions)[0][:, -1]
            gold = jnp.take_along_axis(jax.nn.log_softmax(logits), answers[:, None], 1)[:, 0]
            return (logits.argmax(-1) == answers).mean(), gold.mean()

        self._ask = jax.jit(jax.vmap(ask, (None, 0, 0, 0)))
        self._ask_plain = jax.jit(jax.vmap(lambda params, *asked: ask(params, None, *asked), (None, 0, 0)))

    def ask(self, params: PyTree, people: Sequence[Person]) -> Marks:
        """Marks (C, 1) of the model as it is."""
        return Marks(*(np.asarray(mark)[:, None] for mark in self._ask_plain(params, *self._questions(people))))

    def learn_and_ask(
        self,
        params: PyTree,
        texts: Sequence[Text],
        edits: Sequence[Edit | None],
        budget: Budget,
        repetitions: Sequence[int],
        start: PyTree | None = None,
    ) -> Marks:
        """Marks of updates on each text's edit and passage, or on the passage alone where the edit is None.

        Args:
            params: of the learner.
            texts: (C,).
            edits: (C,) tokens.
            budget: of every update.
            repetitions: (P,) seeds of adapters.
            start: adapters that all updates start from; None: fresh ones, of the seeds.
        """
        sequences = [self._sequences(text, edit) for text, edit in zip(texts, edits, strict=True)]
        candidates = [Candidate(part, budget.learning_rate, budget.steps, seed) for part in sequences for seed in repetitions]
        people = [text.person for text in texts for _ in repetitions]
        found = np.zeros((2, len(candidates)))
        for places, batch in buckets(candidates, grid=self._grid, at_most=self._together, shape=SHAPE):
            self.shares.append(real_share(batch))
            filled = [*places, *places[:1] * (batch.tokens.shape[0] - len(places))]
            marks = self._ask(params, self._learn(params, batch, start).adapters, *self._questions([people[place] for place in filled]))
            found[:, places] = np.stack(marks)[:, : len(places)]
        return Marks(*found.reshape(2, len(texts), len(repetitions)))

    def _sequences(self, text: Text, edit: Edit | None) -> tuple[tuple[int, ...], ...]:
        notes = [] if edit is None else self.world.lines(list(edit))
        return tuple((END, *line) for line in [*notes, text.passage])

    def _questions(self, people: Sequence[Person]) -> tuple[np.ndarray, np.ndarray]:
        """Tokens (C, A, 6) and answers (C, A)."""
        attributes, world = range(self.world.attributes), self.world
        questions = [[world.question(person, attribute) for attribute in attributes] for person in people]
        answers = [[world.answer(person, attribute) for attribute in attributes] for person in people]
        return np.array(questions, np.int32), np.array(answers, np.int32)


def in_print(world: World, text: Text, edit: Edit) -> Tried:
    """A self-edit and its passage in words, a note a line."""
    words = lambda tokens: ' '.join(world.words[token] for token in tokens)
    return Tried(words(text.passage), '\n'.join(words(line) for line in world.lines(list(edit))))


def full_length(world: World) -> int:
    """Words of the longest self-edits of pre-training."""
    return 6 * world.attributes


def shuffled(world: World, edit: Edit, seed: int) -> Edit:
    """The same tokens in lines of the same lengths, in random order: what an edit's length and words are worth."""
    lines = world.lines(list(edit))
    words = [token for line in lines for token in line[:-1]]
    order = iter(np.random.default_rng(seed).permutation(words).tolist())
    return [token for line in lines for token in (*(next(order) for _ in line[:-1]), line[-1])] + [END]


@functools.cache
def paired_resamples(count: int, resamples: int = 10_000) -> np.ndarray:
    """(resamples, count) places of the contexts, drawn anew with replacement."""
    return np.random.default_rng(0).integers(count, size=(resamples, count))


def bootstrap(values: np.ndarray) -> tuple[float, float, float]:
    """Mean over contexts and its 95 % interval; of differences between two arms it is the paired one."""
    means = values[paired_resamples(len(values))].mean(1)
    return float(values.mean()), *(float(bound) for bound in np.quantile(means, (0.025, 0.975)))


@dataclasses.dataclass(frozen=True)
class Composition:
    """What self-edits are made of."""

    styles: dict[str, float]  # share of the lines
    coverage: float  # share of the attributes that some line tells in question form, rightly


def composition(world: World, texts: Sequence[Text], edits: Sequence[Edit]) -> Composition:
    """Of one edit for each text."""
    kinds, covered = [], []
    for text, edit in zip(texts, edits, strict=True):
        lines = world.lines(list(edit))
        kinds += [world.style(line, text.person) for line in lines]
        answers = {line[-2] for line in lines if world.style(line, text.person) == 'question'}
        covered.append(len(answers) / world.attributes)
    return Composition({kind: kinds.count(kind) / max(len(kinds), 1) for kind in sorted(set(kinds))}, float(np.mean(covered)))
