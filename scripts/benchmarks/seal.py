"""SEAL's inner updates of many candidates side by side.

Together and alone the updates are the same function, computed in another order of sums. That is checked in float64, where adapters have
to agree within 1e-5 for every candidate; a learning rate off by 3e-5 is found (test). 16 candidates differed by 1.1e-6 there, more
than float64's rounding: part of the program may stay in float32. In float32 they differed by 4.0e-5, all but one element in 49,152 of the
worst leaf by less than 1e-5, and their answers' log-probabilities by 4.8e-6. Adam divides a gradient by its own size, so an element whose
gradient is no larger than rounding may step either way, which would explain it. Both float32 figures are told beside the check.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import seal_world
from nested_jax.data.tasks.biographies import END, World
from nested_jax.models import LanguageModel
from nested_jax.seal.buckets import Batch, Candidate, buckets, real_share
from nested_jax.seal.inner_loop import make_inner_loop
from nested_jax.seal.lora import attach
from scripts.benchmarks.seal_published import published_shapes
from scripts.benchmarks.timing import Settings, measure

PyTree = Any
TOLERANCE = 1e-5  # of adapters in float64, relative to a candidate's


class Updates(NamedTuple):
    """The inner loop of a dtype, with its model's parameters."""

    loop: Callable[..., Any]
    params: PyTree
    ask: Callable[[PyTree, np.ndarray], jax.Array]  # adapters, questions (K, A, T) -> log-probabilities (K, A, V)

    def run(self, batches: list[Batch]) -> list[PyTree]:
        """Adapters of each batch."""
        return [jax.block_until_ready(self.loop(self.params, batch).adapters) for batch in batches]


def make_updates(world: World, dtype: str) -> Updates:
    """Of a model whose weights are the same in every dtype, up to rounding."""
    config = seal_world.model_config(world)
    start = jax.jit(LanguageModel(config).init)(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))['params']
    model = LanguageModel(dataclasses.replace(config, dtype=dtype))
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), start)
    answer = lambda adapters, asked: model.apply(attach(params, adapters, seal_world.INNER.lora), asked)[0][:, -1]
    ask = jax.jit(jax.vmap(lambda adapters, asked: jax.nn.log_softmax(answer(adapters, asked))))
    return Updates(make_inner_loop(model, seal_world.INNER, jax.devices()), params, ask)


def joined(found: list[PyTree]) -> PyTree:
    """Candidates of all batches on one leading axis."""
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *found)


def difference(one: PyTree, other: PyTree) -> float:
    """The largest relative difference of a candidate's leaf."""
    norm = lambda leaf: np.linalg.norm(np.asarray(leaf).reshape(leaf.shape[0], -1), axis=1)
    gaps = jax.tree.map(lambda a, b: float((norm(a - b) / np.maximum(norm(b), 1e-30)).max()), one, other)
    return max(jax.tree.leaves(gaps))


def check_together(world: World, one: list[Batch], together: list[list[Batch]]) -> list[float]:
    """The difference in float64 of each count of candidates together from the same ones alone.

    Raises:
        RuntimeError: where it is above the tolerance.
    """
    with jax.enable_x64(True):
        updates = make_updates(world, 'float64')
        alone, errors = joined(updates.run(one)), []
        for batches in together:
            found = joined(updates.run(batches))
            count = jax.tree.leaves(found)[0].shape[0]
            errors.append(difference(found, jax.tree.map(lambda leaf, count=count: leaf[:count], alone)))
            if not errors[-1] < TOLERANCE:
                raise RuntimeError(f'{count} candidates together and alone differ by {errors[-1]:.1e} in float64')
    return errors


def seal_candidates(settings: Settings):
    """Inner updates of SEAL's candidates side by side, split over the devices, against one after another on one: the same at K = 1."""
    world, rng = World(), np.random.default_rng(0)
    counts = (1, 2) if settings.smoke else (1, 4, 16, 32, 64)
    texts = seal_world.write_texts(world, counts[-1], 'train', 0)
    edits = [world.lines(world.edit(rng, text.person)) for text in texts]
    sequences = [tuple((END, *line) for line in [*edit, text.passage]) for edit, text in zip(edits, texts, strict=True)]
    candidates = [Candidate(rows, 3e-3, 16, seed) for seed, rows in enumerate(sequences)]
    layout = lambda count, at_most: [batch for _, batch in buckets(candidates[:count], at_most=at_most, shape=seal_world.SHAPE)]
    one, all_together = layout(counts[-1], 1), [layout(count, count) for count in counts]
    errors = check_together(world, one, all_together)
    updates = make_updates(world, 'float32')
    used = lambda batch: updates.loop.lower(updates.params, batch).compile().memory_analysis().temp_size_in_bytes
    questions = np.array([[world.question(text.person, kind) for kind in range(world.attributes)] for text in texts], np.int32)
    alone, single = joined(updates.run(one)), measure(lambda: updates.run(one[:8]), settings.repeats).median / len(one[:8])
    for count, batches, error in zip(counts, all_together, errors, strict=True):
        timing = measure(lambda batches=batches: updates.run(batches), settings.repeats)
        found, same = joined(updates.run(batches)), jax.tree.map(lambda leaf, count=count: leaf[:count], alone)
        told = [updates.ask(adapters, questions[:count]) for adapters in (found, same)]
        temporary = used(batches[0])
        slope = (temporary - used(one[0])) / (count - 1) if count > 1 else 0.0
        yield dict(
            what='inner updates', model='seal world, 0.1M parameters', candidates=count, steps=16, error=error,
            float32_error=difference(found, same), float32_log_prob_gap=float(jnp.abs(told[0] - told[1]).max()),
            candidates_per_second=count / timing.median, slowest=count / timing.slowest, fastest=count / timing.fastest,
            ratio=count * single / timing.median, real_share=real_share(batches[0]), kib_per_candidate=slope / 2**10,
            temporary_mib=temporary / 2**20,
        )  # fmt: skip


PARTS = (published_shapes, seal_candidates)
