"""Streams of edits about made-up people: their rows, learning them one after another, and what is answered after each.

Letters in shapes: K streams, E edits, A attributes, R rows of a stream, S steps, Q questions.
"""

import functools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from experiments.seal_world import INNER, Edit, Learner, Text, model_config
from nested_jax.config import ModelConfig
from nested_jax.data.tasks.biographies import END, World
from nested_jax.evaluation.continual import continual_metrics, regressions
from nested_jax.models.language_model import LanguageModel
from nested_jax.seal.buckets import Batch, Candidate, buckets
from nested_jax.seal.continual import Method, bank_variables, make_stream, plan, routed_logits
from nested_jax.seal.inner_loop import Read
from nested_jax.seal.parts import Part, adapter_part, level_part

PyTree = Any
ROW, OWN, GRID = 32, 2, 4  # tokens of a row; rows of an edit, passage and notes; where notes begin, the same for all learners
STEPS = 16  # of an edit's update
KNOWN = 10  # known people who are asked about
Moved = Literal['adapters', 'levels']


class Arm(NamedTuple):
    """A learner and what of it an edit moves."""

    learner: Learner
    moved: Moved
    rates: tuple[float, ...]  # learning rates tried
    equal_flops: bool = False  # adapters take as many steps as cost what `STEPS` of the same model's levels do


ADAPTER_RATES, LEVEL_RATES = (2e-3, 4e-3, 8e-3), (1e-3, 2e-3, 4e-3)
ARMS = {
    'transformer': Arm('transformer', 'adapters', ADAPTER_RATES),
    'hope-attention': Arm('hope-attention', 'adapters', ADAPTER_RATES),
    'hope-attention, levels': Arm('hope-attention', 'levels', LEVEL_RATES),
    'hope-linear': Arm('hope-linear', 'adapters', ADAPTER_RATES),
    'hope-linear, levels': Arm('hope-linear', 'levels', LEVEL_RATES),
    # A control: one level, updated at every step.
    'transformer, levels': Arm('transformer', 'levels', LEVEL_RATES),
}
EQUAL_FLOPS_RATES = (2e-3, 4e-3, 8e-3, 1.6e-2)
for _learner in get_args(Learner):
    ARMS[f'{_learner}, equal FLOPs'] = Arm(_learner, 'adapters', EQUAL_FLOPS_RATES, equal_flops=True)
    ARMS[f'{_learner}, equal FLOPs, levels'] = Arm(_learner, 'levels', EQUAL_FLOPS_RATES)


class Streams(NamedTuple):
    """People whom K streams tell of, and what is learned."""

    texts: tuple[tuple[Text, ...], ...]  # (K, E)
    rows: Batch  # `rows`, `learning_rate`, `steps` and `seed` are those of no edit yet


class Answers(NamedTuple):
    """Which answers are right, before the stream (0) and after each edit."""

    stream: np.ndarray  # (E + 1, K, E, A) bool
    known: np.ndarray  # (E + 1, K, known questions) bool
    routed: float | None  # share of the streams' questions about learned edits that a bank sent to the right update

    def of(self, places: np.ndarray) -> 'Answers':
        """Those of some of the streams."""
        return self._replace(stream=self.stream[:, places], known=self.known[:, places])


def make_part(config: ModelConfig, moved: Moved) -> Part:
    """What an edit moves."""
    return adapter_part(INNER) if moved == 'adapters' else level_part(INNER, config.levels, OWN * ROW)


def stream_texts(world: World, count: int, edits: int, split: str, seed: int) -> list[list[Text]]:
    """People of a split, no two of one name in a stream, with a passage about each."""
    rng, streams = np.random.default_rng([seed, 2]), []
    for _ in range(count):
        people = {}
        while len(people) < edits:
            person = world.person(rng, split)
            people.setdefault(person[:2], person)
        streams.append([Text(person, world.passage(rng, person)) for person in people.values()])
    return streams


def lay_out(world: World, texts: Sequence[Sequence[Text]], edits: Sequence[Sequence[Edit | None]]) -> Streams:
    """Streams in rows: of each edit the passage in one and the notes in another, as many of the first ones as it holds.

    Args:
        world: of the people.
        texts: (K, E).
        edits: (K, E) tokens, None for the passage alone.
    """
    sequences, filled = [], []
    for told, written in zip(texts, edits, strict=True):
        for text, edit in zip(told, written, strict=True):
            notes = _that_fit([] if edit is None else world.lines(list(edit)))
            passage = (END, *text.passage)
            sequences += [(passage,), tuple((END, *note) for note in notes) or (passage,)]
            filled += [True, bool(notes)]
    candidates = [Candidate(row, 0.0, 0) for row in sequences]
    ((_, batch),) = buckets(candidates, grid=GRID, shape=(1, ROW), at_most=len(candidates))
    shape = (len(texts), -1, ROW)
    fields = [np.asarray(leaf).reshape(shape) for leaf in batch[:4]]
    fields[2] = fields[2] * np.reshape(filled, (len(texts), -1, 1))
    return Streams(tuple(map(tuple, texts)), Batch(*fields, *(None,) * 4))


def _that_fit(notes: list[list[int]]) -> list[list[int]]:
    ends = np.cumsum([-(-len(note) // GRID) * GRID for note in notes])
    return [note for note, end in zip(notes, ends, strict=True) if end <= ROW]


class Player:
    """Learns streams by one method, and asks after every edit; compiled once for each number of streams.

    Args:
        world: of the people.
        config: of the model.
        moved: what an edit moves.
        method: against forgetting.
        steps: of an edit's update.
    """

    def __init__(self, world: World, config: ModelConfig, moved: Moved, method: Method, steps: int = STEPS):
        self.world, self.method, self.steps = world, method, steps
        self.model, self.part = LanguageModel(config), make_part(config, moved)
        self._start, self._learn = make_stream(self.model, self.part, method, OWN)
        self._ask = jax.jit(jax.vmap(self._likeliest))
        bank = lambda base, learned, questions: routed_logits(self.model, bank_variables(self.part, base, learned), questions)
        self._ask_bank = jax.jit(lambda base, learned, questions: jax.lax.map(lambda lane: bank(base, *lane), (learned, questions)))

    def play(self, base: PyTree, streams: Streams, rates: Sequence[float], seed: int) -> Answers:
        """Learns every stream once for each learning rate.

        Args:
            base: parameters all learners begin with.
            streams: (K,).
            rates: learning rates; the streams of the first come first.
            seed: of adapters and of what is read again.

        Returns:
            Answers of len(rates) K streams.
        """
        count, edits = len(streams.texts), len(streams.texts[0])
        rows = jax.tree.map(lambda leaf: np.concatenate([leaf] * len(rates)), streams.rows)
        questions, answers, known, known_answers = self._questions(streams, len(rates))
        stream = self._start(base, self._probe(), count * len(rates), edits, seed)
        asked = np.concatenate([questions, known], 1)
        found = [self._answers(base, stream, asked)]
        for edit in range(edits):
            stream = self._learn(base, stream, self._batch(rows, rates, edit, seed), jnp.int32(edit))
            found.append(self._answers(base, stream, asked))
        split = questions.shape[1]
        right = np.stack([tokens == np.concatenate([answers, known_answers], 1) for tokens, _ in found])
        shape = (edits + 1, count * len(rates), edits, -1)
        routed = self._routed([chosen[:, :split] for _, chosen in found], edits) if self.method.keep == 'bank' else None
        return Answers(right[:, :, :split].reshape(shape), right[:, :, split:], routed)

    def _batch(self, rows: Batch, rates: Sequence[float], edit: int, seed: int) -> Batch:
        """The batch of one edit: the same rows and adapters for a stream at every rate."""
        real, lanes = rows.weights.any(-1), len(rows.tokens)
        count = lanes // len(rates)
        rng = lambda lane: np.random.default_rng([seed, edit, lane % count])
        plans = [plan(self.method, edit, OWN, self.steps, real[lane], rng(lane)) for lane in range(lanes)]
        most = self.steps * (real.shape[1] // OWN if self.method.keep == 'joint' else 1)  # one shape, one program
        padded = np.stack([np.pad(each, ((0, most - len(each)), (0, 0)), constant_values=-1) for each in plans])
        seeds = 1000 * seed + 100 * edit + np.arange(lanes) % count
        steps = np.full(lanes, len(plans[0]), np.int32)
        return rows._replace(
            rows=padded, learning_rate=np.repeat(np.float32(rates), count), steps=steps, seed=seeds.astype(np.uint32)
        )  # fmt: skip

    def _probe(self) -> Read:
        """Passages of known people and questions about them, 32 rows."""
        rng, people = np.random.default_rng(0), self.world.known_people
        texts = [[Text(people[index % len(people)], self.world.passage(rng, people[index % len(people)])) for index in range(16)]]
        notes = [[self.world.oracle(rng, text.person) for text in texts[0]]]
        rows = lay_out(self.world, texts, notes).rows
        return Read(rows.tokens[0], rows.targets[0], rows.weights[0], rows.segment_ids[0])

    def _questions(self, streams: Streams, repeats: int) -> tuple[np.ndarray, ...]:
        """Questions (K, Q, 6) and answers (K, Q) about the streams' people, and about known ones."""
        world, attributes = self.world, range(self.world.attributes)
        ask = lambda person: [world.question(person, attribute) for attribute in attributes]
        tell = lambda person: [world.answer(person, attribute) for attribute in attributes]
        over = lambda texts, function: [line for text in texts for line in function(text.person)]
        questions, answers = (np.array([over(texts, each) for texts in streams.texts] * repeats, np.int32) for each in (ask, tell))
        lines = [[line for person in world.known_people[:KNOWN] for line in each(person)] for each in (ask, tell)]
        known, known_answers = (np.broadcast_to(np.array(each, np.int32), (len(questions), *np.shape(each))) for each in lines)
        return questions, answers, known, known_answers

    def _likeliest(self, params: PyTree, questions: jax.Array) -> jax.Array:
        return self.model.apply({'params': params}, questions)[0][:, -1].argmax(-1)

    def _answers(self, base: PyTree, stream: Any, questions: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Tokens (K, Q), and to whom a bank sent the questions (K, Q)."""
        if self.method.keep != 'bank':
            return np.asarray(self._ask(stream.params, questions)), None
        logits, chosen = self._ask_bank(base, stream.learned, questions)
        return np.asarray(logits.argmax(-1)), np.asarray(chosen)

    def _routed(self, chosen: list[np.ndarray], edits: int) -> float:
        whose = np.repeat(np.arange(edits), self.world.attributes)
        hits = [(sent[:, whose < done] == whose[whose < done] + 1).mean() for done, sent in enumerate(chosen) if done]
        return float(np.mean(hits))


def stream_metrics(answers: Answers) -> dict[str, Any]:
    """What streams of one rate come to: the matrix is the mean over streams, the metrics are those of this matrix."""
    before, matrix = answers.stream[0].mean((0, 2)), answers.stream[1:].mean((1, 3))
    every = np.concatenate([answers.stream.reshape(*answers.stream.shape[:2], -1), answers.known], 2)
    turned = [regressions(old.ravel(), new.ravel()) for old, new in zip(every, every[1:], strict=False)]
    known = answers.known.mean((1, 2))
    return dict(
        continual_metrics(matrix, before)._asdict(), matrix=matrix.tolist(), before=before.tolist(), known=known.tolist(),
        turned_right=float(np.mean([right for right, _ in turned])), turned_wrong=float(np.mean([wrong for _, wrong in turned])),
    )  # fmt: skip


def update_flops(config: ModelConfig, params: PyTree, method: Method, moved: Moved, edits: int, steps: int = STEPS) -> float:
    """Floating-point operations of an edit's update, mean over a stream, by the rule of 2 a parameter and token for each pass.

    Forward and backward through the weights, the gradient of what is learned, teachers, reference gradients and Fisher information;
    attention's scores and what is elementwise in the parameters are left out, as are rows of padding that are not read.
    """
    sizes = {jax.tree_util.keystr(path): leaf.size for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    weights = sum(size for name, size in sizes.items() if 'embedding' not in name)
    learned = jax.eval_shape(lambda: make_part(config, moved).start(params, jnp.uint32(0)))
    moving = sum(leaf.size for leaf in jax.tree.leaves(learned))
    step = 4 * weights + (6 if moved == 'adapters' else 2) * moving
    teachers = 2 * weights * sum(map(bool, (method.kl_to_base, method.distill)))
    memory = ROW * method.read_rows * (edits - 1) / edits
    read = OWN * ROW + memory
    fisher = 8 * weights * OWN * ROW if method.elastic and method.elastic_of == 'edits' else 0
    repeats = (edits + 1) / 2 if method.keep == 'joint' else 1
    return steps * repeats * (step * read + teachers * read) + fisher


@functools.cache
def update_steps(world: World, name: str, method: Method, edits: int) -> int:
    """Steps of an arm's update: `STEPS`, or as many as come nearest to the operations of so many steps of levels."""
    arm, config = ARMS[name], arm_config(world, name)
    if not arm.equal_flops:
        return STEPS
    params = jax.eval_shape(LanguageModel(config).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))['params']
    flops = functools.partial(update_flops, config, params, method, edits=edits)
    of_a_step = lambda moved: flops(moved=moved, steps=1) - flops(moved=moved, steps=0)
    return round(STEPS * of_a_step('levels') / of_a_step(arm.moved))


def arm_config(world: World, name: str) -> ModelConfig:
    """The model of an arm."""
    return model_config(world, ARMS[name].learner)
