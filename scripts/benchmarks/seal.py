"""SEAL's inner updates of many candidates side by side."""

import jax
import jax.numpy as jnp
import numpy as np

from experiments import seal_world
from nested_jax.data.tasks.biographies import END, World
from nested_jax.models import LanguageModel
from nested_jax.seal.buckets import Candidate, buckets, real_share
from nested_jax.seal.inner_loop import make_inner_loop
from scripts.benchmarks.timing import Settings, measure


def seal_candidates(settings: Settings):
    """Inner updates of SEAL's candidates side by side against one after another: the same program at K = 1, in the same buckets."""
    world = World()
    model = LanguageModel(seal_world.model_config(world))
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))['params']
    loop, rng = make_inner_loop(model, seal_world.INNER), np.random.default_rng(0)
    counts = (1, 2) if settings.smoke else (1, 4, 16, 32, 64)
    texts = seal_world.write_texts(world, counts[-1], 'train', 0)
    edits = [world.lines(world.edit(rng, text.person)) for text in texts]
    sequences = [tuple((END, *line) for line in [*edit, text.passage]) for edit, text in zip(edits, texts, strict=True)]
    candidates = [Candidate(rows, 3e-3, 16, seed) for seed, rows in enumerate(sequences)]
    layout = lambda count, at_most: list(buckets(candidates[:count], at_most=at_most, shape=seal_world.SHAPE))
    run_all = lambda batches: [jax.block_until_ready(loop(params, batch).adapters) for _, batch in batches]
    used = lambda batch: loop.lower(params, batch).compile().memory_analysis().temp_size_in_bytes
    one = layout(counts[-1], 1)
    alone, single = run_all(one), measure(lambda: run_all(one[:8]), settings.repeats).median / len(one[:8])
    for count in counts:
        batches = layout(count, count)
        timing = measure(lambda batches=batches: run_all(batches), settings.repeats)
        together = jax.tree.map(lambda *leaves: np.concatenate(leaves), *run_all(batches))
        sequential = jax.tree.map(lambda *leaves: np.concatenate(leaves), *alone[:count])
        gaps = jax.tree.map(lambda a, b: float(np.linalg.norm(a - b) / np.linalg.norm(b)), together, sequential)
        error = max(jax.tree.leaves(gaps))
        if not error < 1e-5:
            raise RuntimeError(f'{count} candidates together and alone differ by {error:.1e}')
        temporary = used(batches[0][1])
        slope = (temporary - used(one[0][1])) / (count - 1) if count > 1 else 0.0
        yield dict(
            what='inner updates', model='seal world, 0.1M parameters', candidates=count, steps=16, error=error,
            candidates_per_second=count / timing.median, slowest=count / timing.slowest, fastest=count / timing.fastest,
            ratio=count * single / timing.median, real_share=real_share(batches[0][1]), kib_per_candidate=slope / 2**10,
            temporary_mib=temporary / 2**20,
        )  # fmt: skip


PARTS = (seal_candidates,)
