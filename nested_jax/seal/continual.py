"""A stream of self-edits learned one after another, and what keeps the earlier ones from being forgotten.

Every edit is one inner update (`inner_loop.py`) of a part of the model (`parts.py`), merged before the next, as in Sec. 5 of
arXiv:2506.10943v2. A `Method` adds to this: rows of earlier edits (experience replay, arXiv:1902.10486v4), penalties (EWC,
arXiv:1612.00796v2, online as arXiv:1805.06370v2; LwF, arXiv:1606.09282v3; the divergence from the base; O-LoRA, arXiv:2310.14152v1),
a projection of the gradient (A-GEM, arXiv:1812.00420v2), or another way to keep edits: each one's update apart, with a router, or all of
them learned at once from the base, which no stream can do and is the upper bound.

Letters in shapes: K streams, E edits, R rows of a stream, S steps, N rows a step, Q questions.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from nested_jax.config import check
from nested_jax.models.language_model import LanguageModel
from nested_jax.seal.buckets import Batch
from nested_jax.seal.inner_loop import Learner, Read, descent_step, logits_of, read_rows, token_loss
from nested_jax.seal.parts import Part
from nested_jax.seal.retention import diagonal_fisher, distillation, elastic_penalty, overlap, project, route

PyTree = Any
Memory = Literal['none', 'passages', 'edits']
Keep = Literal['merged', 'bank', 'joint']


@dataclasses.dataclass(frozen=True)
class Method:
    """How a stream learns; the default is updates one after another with nothing against forgetting.

    Raises:
        ValueError: naming the field, its value and what is allowed.
    """

    keep: Keep = 'merged'  # each update in the weights; apart, with a router; or all edits so far learned at once from the base
    memory: Memory = 'none'  # which rows of earlier edits are stored: their passages alone, or all that was learned
    memory_rows: int = 2  # stored rows that each step reads
    average_gradient: bool = False  # A-GEM: stored rows are not learned, but their loss may not grow
    elastic: float = 0.0  # EWC: weight of the penalty
    elastic_of: Literal['edits', 'base'] = 'edits'  # whose Fisher information: of edits so far around the last weights, or of the base
    elastic_decay: float = 0.95  # of the Fisher information from one edit to the next
    distill: float = 0.0  # LwF: weight of the divergence from the model before the edit
    distill_temperature: float = 2.0
    kl_to_base: float = 0.0  # weight of the divergence from the model before the stream
    orthogonal: float = 0.0  # O-LoRA: weight of the overlap with earlier adapters

    def __post_init__(self):
        for name, allowed in (
            ('keep', ('merged', 'bank', 'joint')),
            ('memory', ('none', 'passages', 'edits')),
            ('elastic_of', ('edits', 'base')),
        ):
            check(getattr(self, name) in allowed, name, getattr(self, name), f'one of {", ".join(allowed)}')
        for name in ('elastic', 'distill', 'kl_to_base', 'orthogonal'):
            check(getattr(self, name) >= 0, name, getattr(self, name), 'a number of at least 0')
        check(0 <= self.elastic_decay <= 1, 'elastic_decay', self.elastic_decay, 'a number from 0 to 1')
        check(self.distill_temperature > 0, 'distill_temperature', self.distill_temperature, 'a number above 0')
        check(self.memory_rows >= 1, 'memory_rows', self.memory_rows, 'an integer of at least 1')
        stored = self.memory != 'none'
        check(stored or not self.average_gradient, 'average_gradient', self.average_gradient, "False with memory='none'")
        check(self.keep == 'merged' or not stored, 'memory', self.memory, f"'none' with keep={self.keep!r}")

    @property
    def read_rows(self) -> int:
        """Stored rows that each step reads, 0 without memory."""
        return 0 if self.memory == 'none' else self.memory_rows


METHODS: dict[str, Method] = {
    'sequential': Method(),
    'replay of edits': Method(memory='edits'),
    'ewc': Method(elastic=1.0),
    'kl to base': Method(kl_to_base=1.0),
    'o-lora': Method(orthogonal=0.5),
    'a-gem': Method(memory='edits', average_gradient=True),
    'lwf': Method(distill=1.0),
    'adapter bank': Method(keep='bank'),
    'joint': Method(keep='joint'),
    'replay of passages': Method(memory='passages'),
    'ewc of base': Method(elastic=1.0, elastic_of='base'),
}


class Stream(NamedTuple):
    """Learners of K streams that began as one base; leaves lead with K."""

    params: PyTree  # with all edits so far; of a bank the base's
    fisher: PyTree | None  # of EWC
    learned: PyTree | None  # (K, E, ...) each edit's own update, zeros ahead: of O-LoRA and of a bank


def make_stream(model: LanguageModel, part: Part, method: Method, own_rows: int) -> tuple[Callable[..., Stream], Callable[..., Stream]]:
    """Builds the beginning of streams, and the learning of one edit in each.

    Args:
        model: whose parameters are learned.
        part: what of them an update moves.
        method: against forgetting.
        own_rows: rows of an edit; steps read as many, and the method's stored ones behind them (`plan`).

    Returns:
        start(base, probe, count, edits, seed) -> Stream: `probe` is a `Read` of what the base is known to know, for EWC around it.
        learn(base, stream, batch, edit) -> Stream: compiled once for each shape; `batch` holds the rows of all edits of K streams.

    Raises:
        ValueError: from `start`, when O-LoRA's penalty is asked for and the part has no adapters.
    """
    step = descent_step(part.optimizer, _value_and_gradient(model, part, method, own_rows))

    def start(base: PyTree, probe: Read, count: int, edits: int, seed: int = 0) -> Stream:
        fisher = learned = None
        if method.elastic:
            found = diagonal_fisher(model, base, probe, jax.random.key(seed))
            fisher = found if method.elastic_of == 'base' else jax.tree.map(jnp.zeros_like, found)
        if method.orthogonal or method.keep == 'bank':
            first = part.start(base, jnp.uint32(seed))
            _check_adapters(method, first)
            learned = jax.tree.map(lambda leaf: jnp.zeros((edits, *leaf.shape)), first)
        repeat = lambda leaf: jnp.broadcast_to(leaf, (count, *leaf.shape))
        return Stream(*(jax.tree.map(repeat, tree) for tree in (base, fisher, learned)))

    @jax.jit
    def learn(base: PyTree, stream: Stream, batch: Batch, edit: jax.Array) -> Stream:
        alone = method.keep != 'merged'
        contexts, axes = (
            _Context(base, stream._replace(params=base if alone else stream.params)),
            _Context(None, Stream(None if alone else 0, 0, 0)),
        )
        begin = lambda context, seed: _begin(part, context.stream.params, seed)
        carry = jax.vmap(begin, (axes, 0))(contexts, batch.seed)
        advance = lambda index, carry: jax.vmap(step, (None, axes, 0, 0))(index, contexts, batch, carry)
        learned, _, _ = jax.lax.fori_loop(0, batch.steps.max(), advance, carry)
        finish = lambda context, learned, candidate: _finish(model, part, method, context.stream, learned, candidate, edit)
        return jax.vmap(finish, (axes, 0, 0))(contexts, learned, batch)

    return start, learn


def plan(method: Method, edit: int, own_rows: int, steps: int, real: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Which rows the steps of one edit read.

    Args:
        method: says what is read beside the edit's own rows, which come first.
        edit: from 0; its rows are own_rows * edit and those behind it, the first being the passage.
        own_rows: of each edit.
        steps: of the edit's update. All edits at once take as many for each of them.
        real: (R,) bool, rows with something to learn.
        rng: of the stored rows, drawn anew for each step, and of the order of all rows.

    Returns:
        (S, N) int32 places among the rows of the stream, -1 for none.
    """
    first, end = own_rows * edit, own_rows * (edit + 1)
    if method.keep == 'joint':
        order, known = np.zeros(0, np.int32), np.flatnonzero(real[:end])
        while order.size < steps * end:
            order = np.concatenate([order, rng.permutation(known)])
        return order[: steps * end].reshape(-1, own_rows).astype(np.int32)
    stored = np.arange(0, first, own_rows if method.memory == 'passages' else 1)
    stored, count = stored[real[stored]], method.read_rows
    draw = lambda: rng.permutation(stored)[:count]
    drawn = [np.pad(rows := draw(), (0, count - len(rows)), constant_values=-1) for _ in range(steps)]
    own = np.broadcast_to(np.where(real[first:end], np.arange(first, end), -1), (steps, own_rows))
    return np.concatenate([own, np.reshape(drawn, (steps, count))], 1).astype(np.int32)


def bank_variables(part: Part, base: PyTree, learned: PyTree) -> PyTree:
    """(E + 1, ...) parameters of the base and of the base with each one of a bank's updates; those still ahead are the base again.

    Args:
        part: that was learned.
        base: parameters.
        learned: (E, ...) of one stream.
    """
    used = jax.vmap(lambda one: jnp.any(jnp.stack([jnp.any(leaf != 0) for leaf in jax.tree.leaves(one)])))(learned)
    choose = lambda use, new, old: jnp.where(use, new, old)
    one = lambda use, update: jax.tree.map(lambda new, old: choose(use, new, old), part.merged(base, update), base)
    merged = jax.vmap(one)(used, learned)
    return jax.tree.map(lambda old, new: jnp.concatenate([old[None], new]), base, merged)


def routed_logits(model: LanguageModel, bank: PyTree, questions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Logits (Q, V) behind each question from the member of a bank that it is routed to, and which that was (Q,).

    Args:
        model: of all members.
        bank: of `bank_variables`.
        questions: (Q, T) int32 tokens.
    """
    logits = jax.vmap(lambda params: model.apply({'params': params}, questions)[0])(bank)  # (E + 1, Q, T, V)
    log = jax.nn.log_softmax(logits[:, :, :-1])
    losses = -jnp.take_along_axis(log, jnp.broadcast_to(questions[None, :, 1:, None], (*log.shape[:-1], 1)), -1)[..., 0].sum(-1)
    chosen = route(losses)
    return jnp.take_along_axis(logits[:, :, -1], chosen[None, :, None], 0)[0], chosen


class _Context(NamedTuple):
    base: PyTree
    stream: Stream


def _begin(part: Part, params: PyTree, seed: jax.Array) -> tuple:
    learned = part.start(params, seed)
    return learned, part.optimizer.init(learned), jnp.zeros(())


def _check_adapters(method: Method, learned: PyTree) -> None:
    adapters = any(path[-1] == 'a' for path in traverse_util.flatten_dict(learned))
    check(adapters or not method.orthogonal, 'orthogonal', method.orthogonal, '0 for a part without adapters')


def _value_and_gradient(model: LanguageModel, part: Part, method: Method, own_rows: int) -> Callable:
    """(learned, context, candidate, rows) -> loss and gradient of a step."""

    def loss(learned: PyTree, context: _Context, candidate: Batch, rows: jax.Array) -> jax.Array:
        read, params = read_rows(candidate, rows), context.stream.params
        learner = Learner(model, part.variables(params, learned))
        total, count = token_loss(learner, params, read)
        teachers = [(method.kl_to_base, 1.0, context.base), (method.distill, method.distill_temperature, params)]
        for weight, temperature, teacher in teachers:
            if weight:
                known = logits_of(Learner(model, {'params': teacher}), read)
                total += weight * distillation(known, logits_of(learner, read), read.weights, temperature)
        return total / jnp.maximum(count, 1.0) + penalty(learned, context)

    def penalty(learned: PyTree, context: _Context) -> jax.Array:
        stream, total = context.stream, jnp.zeros(())
        if method.elastic:
            anchor = context.base if method.elastic_of == 'base' else stream.params
            total += method.elastic * elastic_penalty(stream.fisher, part.merged(stream.params, learned), anchor)
        if method.orthogonal:
            total += method.orthogonal * overlap(learned, stream.learned)
        return total

    def projected(learned: PyTree, context: _Context, candidate: Batch, rows: jax.Array) -> tuple[jax.Array, PyTree]:
        value, gradient = jax.value_and_grad(loss)(learned, context, candidate, rows[:own_rows])
        return value, project(gradient, jax.grad(loss)(learned, context, candidate, rows[own_rows:]))

    return projected if method.average_gradient else jax.value_and_grad(loss)


def _finish(model: LanguageModel, part: Part, method: Method, stream: Stream, learned: PyTree, candidate: Batch, edit: jax.Array) -> Stream:
    """The stream behind an edit."""
    params, fisher, kept = stream
    if method.keep != 'bank':
        params = part.merged(params, learned)
    if kept is not None:
        kept = jax.tree.map(lambda all, new: all.at[edit].set(new), kept, learned)
    if fisher is not None and method.elastic_of == 'edits':
        read = read_rows(candidate, candidate.rows[0])
        found = diagonal_fisher(model, params, read, jax.random.key(candidate.seed))
        fisher = jax.tree.map(lambda old, new: method.elastic_decay * old + new, fisher, found)
    return Stream(params, fisher, kept)
