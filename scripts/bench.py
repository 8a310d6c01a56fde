"""Times the models against each other and against PyTorch peers: `python scripts/bench.py --suite cpu`.

Every figure is checked before it is timed: the chunked memories against their token-by-token references. A figure is the
median of repeated, warmed-up, synchronised runs, printed with minimum and maximum, and one row of
experiments/results/bench_<suite>.jsonl. Peers that cannot be imported are named, not passed over.
"""

import argparse
import dataclasses
import functools
import importlib.util
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import seal_world
from nested_jax import optim
from nested_jax.config import AttentionConfig, ModelConfig
from nested_jax.data.tasks.biographies import END, World
from nested_jax.evaluation.rows import append_row, hardware_name, make_row
from nested_jax.memory import matrix, mlp, self_modifying
from nested_jax.models import LanguageModel, preset
from nested_jax.models.loss import model_loss
from nested_jax.models.sampling import Reading, decode, prefill
from nested_jax.seal.buckets import Candidate, buckets, real_share
from nested_jax.seal.inner_loop import make_inner_loop

TOKENS = 8192  # of a training step, at every length
MODELS = ('transformer-tiny', 'gated-deltanet-tiny', 'titans-tiny', 'hope-linear-tiny', 'hope-tiny')


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of one run: median, minimum and maximum over repetitions; and of the compilation."""

    median: float
    fastest: float
    slowest: float
    compile: float = 0.0


def measure(run: Callable[[], object], repeats: int) -> Timing:
    """Times a synchronised call after one call that is not counted."""
    run()
    seconds = []
    for _ in range(repeats):
        begun = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - begun)
    return Timing(statistics.median(seconds), min(seconds), max(seconds))


def train_step(config: ModelConfig, batch: int, length: int) -> tuple[Callable[[], object], float, int, int]:
    """A compiled AdamW step of a model as a synchronised call; compile seconds, temporary bytes and parameters."""
    model, optimizer = LanguageModel(config), optax.adamw(1e-3)
    tokens = jax.random.randint(jax.random.key(1), (batch, length), 0, config.vocab_size)
    params = jax.jit(model.init)(jax.random.key(0), tokens[:1, :16])['params']

    def step(params, state, tokens):
        loss = lambda p: model_loss(model, p, tokens, tokens)[0] / tokens.size
        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    state = optimizer.init(params)
    begun = time.perf_counter()
    compiled = jax.jit(step).lower(params, state, tokens).compile()
    seconds = time.perf_counter() - begun
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    value = float(compiled(params, state, tokens)[2])
    if not np.isfinite(value):
        raise RuntimeError(f'loss of {config} is {value}')
    return lambda: jax.block_until_ready(compiled(params, state, tokens)), seconds, compiled.memory_analysis().temp_size_in_bytes, size


def time_training(name: str, config: ModelConfig, batch: int, length: int, repeats: int) -> dict:
    """Training tokens a second of one model at one length."""
    run, compile_seconds, temporary, size = train_step(config, batch, length)
    timing = measure(run, repeats)
    return dict(
        what='training', model=name, batch=batch, length=length, tokens_per_step=batch * length, parameters=size,
        tokens_per_second=batch * length / timing.median, slowest=batch * length / timing.slowest,
        fastest=batch * length / timing.fastest, compile_s=compile_seconds, temporary_mib=temporary / 2**20,
    )  # fmt: skip


def attention_forms(config: ModelConfig) -> dict[str, ModelConfig]:
    """The Transformer with blocks of queries and, up to 2,048 tokens, with all at once, which is slower there already."""
    blocks = dataclasses.replace(config, attention=AttentionConfig(query_block=256))
    whole = {'transformer-tiny': config} if config.max_length <= 2048 else {}
    return whole | {'transformer-tiny (blocks)': blocks}


def training_lengths(repeats: int):
    """Every model from 1k to 8k tokens at equal tokens a step."""
    for length in (1024, 2048, 4096, 8192):
        for name in MODELS:
            config = preset(name, max_length=length)
            for form, variant in (attention_forms(config) if name == 'transformer-tiny' else {name: config}).items():
                yield time_training(form, variant, TOKENS // length, length, repeats)


def memory_inputs(batch: int = 4, time: int = 512, heads: int = 4, dim: int = 32) -> dict[str, jax.Array]:
    """Random unit queries and keys, values and gates."""
    keys = jax.random.split(jax.random.key(0), 5)
    rows = lambda key: jax.random.normal(key, (batch, time, heads, dim))
    unit = lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True)
    gate = lambda key: jax.random.uniform(key, (batch, time, heads))
    return dict(
        q=unit(rows(keys[0])), k=unit(rows(keys[1])), v=rows(keys[2]), rate=0.5 * gate(keys[3]), log_alpha=jnp.log1p(-0.1 * gate(keys[4]))
    )


def memory_forms() -> dict[str, tuple[Callable, Callable]]:
    """Name -> (chunked, token by token), both from the inputs to outputs."""

    def mlp_form(function):
        weights = [jax.random.normal(jax.random.key(seed), (4, 32, 32)) / 6 for seed in (7, 8)]
        return lambda i: function(i['q'], i['k'], i['v'], i['rate'], i['log_alpha'], initial=mlp.MLPWeights(*weights), chunk_size=16)[0]

    def self_modifying_form(function):
        rule = self_modifying.Rule(kind='matrix', gradient='token', chunk_size=32, projection_chunk_size=32)
        initial = self_modifying.Memories(0.1 * jax.random.normal(jax.random.key(9), (4, 32, 3 * 32 + 2)), None, None)

        def run(i):
            inputs = self_modifying.Inputs(i['q'], i['k'], i['v'], i['rate'], i['log_alpha'], None)
            y = function(inputs, jnp.ones(4), initial, rule=rule)
            return y[0] if isinstance(y, tuple) else y

        return run

    matrix_form = lambda function: lambda i: function(i['q'], i['k'], i['v'], i['rate'], i['log_alpha'])[0]
    gradient_descent = matrix.delta_gradient_descent, matrix.delta_gradient_descent_reference
    modifying = self_modifying.self_modifying, self_modifying.self_modifying_reference
    return {
        'delta_gradient_descent': tuple(map(matrix_form, gradient_descent)),
        'mlp_memory': tuple(map(mlp_form, (mlp.mlp_memory, mlp.mlp_memory_reference))),
        'self_modifying': tuple(map(self_modifying_form, modifying)),
    }


def chunked_against_reference(repeats: int):
    """Forward and backward of each memory in both forms, once they agree."""
    inputs = memory_inputs()
    for name, forms in memory_forms().items():
        runs, outputs = [], []
        for form in forms:
            gradient = jax.jit(jax.grad(lambda i, form=form: jnp.sum(form(i) ** 2)))
            runs.append(functools.partial(lambda g: jax.block_until_ready(g(inputs)), gradient))
            outputs.append(jax.jit(form)(inputs))
        error = float(jnp.abs(outputs[0] - outputs[1]).max() / jnp.abs(outputs[1]).max())
        if not error < 1e-3:
            raise RuntimeError(f'{name}: chunked and token by token differ by {error:.1e}')
        chunked, reference = (measure(run, repeats) for run in runs)
        tokens = inputs['rate'].shape[0] * inputs['rate'].shape[1]
        yield dict(
            what='chunked against reference', model=name, tokens=tokens, error=error, ratio=reference.median / chunked.median,
            tokens_per_second=tokens / chunked.median, reference_tokens_per_second=tokens / reference.median,
        )  # fmt: skip


def titans_peer(repeats: int):
    """titans-pytorch's MemoryAsContextTransformer and our Titans and Hope at equal width, depth, length and batch."""
    if importlib.util.find_spec('titans_pytorch') is None:
        print('titans-pytorch cannot be imported here: that comparison is left out', flush=True)
        return
    import torch
    from titans_pytorch import MemoryAsContextTransformer

    batch, length, width, depth = 4, 1024, 256, 4
    for name in ('titans-tiny', 'hope-linear-tiny', 'hope-tiny'):
        config = preset(name, width=width, num_layers=depth, num_heads=4, head_dim=64, max_length=length)
        yield time_training(f'{name} (width {width})', config, batch, length, repeats)
    torch.manual_seed(0)
    peer = MemoryAsContextTransformer(num_tokens=256, dim=width, depth=depth, segment_len=128, heads=4, dim_head=64)
    optimizer, tokens = torch.optim.AdamW(peer.parameters(), 1e-3), torch.randint(0, 256, (batch, length + 1))

    def run():
        optimizer.zero_grad()
        peer(tokens, return_loss=True).backward()
        optimizer.step()

    timing = measure(run, max(repeats // 4, 2))
    yield dict(
        what='training', model='titans-pytorch MAC', batch=batch, length=length, tokens_per_step=batch * length,
        parameters=sum(p.numel() for p in peer.parameters()), tokens_per_second=batch * length / timing.median,
        slowest=batch * length / timing.slowest, fastest=batch * length / timing.fastest,
    )  # fmt: skip


def layer_shapes(width: int, hidden: int, layers: int) -> list[dict[str, tuple[int, int]]]:
    """Matrices of a Transformer's layers, each a parameter of its own."""
    layer = dict(query=(width, width), key=(width, width), value=(width, width), output=(width, width))
    return [layer | dict(gate=(width, hidden), up=(width, hidden), down=(hidden, width)) for _ in range(layers)]


def optimizer_step(make: Callable, shapes: list, advance: int) -> tuple[Callable[[], object], float, int]:
    """A compiled update as a synchronised call, `advance` steps into training; compile seconds and temporary bytes."""
    params = jax.tree.map(jnp.zeros, shapes, is_leaf=lambda shape: isinstance(shape, tuple))
    keys = jax.tree.unflatten(jax.tree.structure(params), list(jax.random.split(jax.random.key(0), len(jax.tree.leaves(params)))))
    gradients = jax.tree.map(lambda leaf, key: jax.random.normal(key, leaf.shape), params, keys)
    optimizer = make()
    state = optimizer.init(params)
    begun = time.perf_counter()
    update = jax.jit(optimizer.update).lower(gradients, state, params).compile()
    seconds = time.perf_counter() - begun
    for _ in range(advance):
        state = update(gradients, state, params)[1]
    return lambda: jax.block_until_ready(update(gradients, state, params)), seconds, update.memory_analysis().temp_size_in_bytes


def optimizer_steps(repeats: int):
    """Cost of a step of each optimizer on the same gradients; M3's is the mean over a period of its slow momentum."""
    period = 10
    makers = {
        'optax.adamw': lambda: optax.adamw(1e-3),
        'optax.contrib.muon': lambda: optax.contrib.muon(1e-3),
        'muon': lambda: optim.muon(1e-3),
        'm3': lambda: optim.m3(1e-3, periods=(period,)),
    }
    large = preset('transformer-340m')
    trees = {
        '24 layers of 512': layer_shapes(512, 1408, 24),
        '2 layers of the 340m preset': layer_shapes(large.width, large.levels[0].hidden_dim, 2),
    }
    for tree, shapes in trees.items():
        for name, make in makers.items():
            run, compile_seconds, temporary = optimizer_step(make, shapes, advance=1)
            seconds = measure(run, repeats).median
            if name == 'm3':
                renewing = measure(optimizer_step(make, shapes, advance=period)[0], repeats).median
                seconds = ((period - 1) * seconds + renewing) / period
            yield dict(what='optimizer', model=name, tree=tree, step_s=seconds, compile_s=compile_seconds, temporary_mib=temporary / 2**20)


def decoding(repeats: int, new_tokens: int = 32, piece: int = 4096):
    """Time of a token after short and long contexts, alone and 64 side by side; recurrent models have read the context."""
    for name in ('gated-deltanet-tiny', 'titans-tiny', 'hope-linear-tiny', 'hope-tiny'):
        model = LanguageModel(preset(name))
        variables = {'params': jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 16), jnp.int32))['params']}
        tokens, reading = jax.random.randint(jax.random.key(1), (1, 65_536), 0, 256), None
        seconds = {}
        for context in (1024, 65_536):
            start = 0 if reading is None else 1024
            for begin in range(start, context, piece):
                reading = prefill(model, variables, tokens[:, begin : min(begin + piece, context)], reading and reading.state)
            if not np.isfinite(reading.logits).all():
                raise RuntimeError(f'{name} has logits that are not finite after {context} tokens')
            for batch in (1, 64):
                rows = jax.tree.map(lambda leaf, batch=batch: jnp.repeat(leaf, batch, 0), reading)
                run = Decoding(model, variables, rows, new_tokens)
                timing = measure(run, repeats)
                seconds[context, batch] = timing.median
                yield dict(
                    what='decoding', model=name, context=context, batch=batch, tokens_per_second=batch * new_tokens / timing.median,
                    slowest=batch * new_tokens / timing.slowest, fastest=batch * new_tokens / timing.fastest,
                    ms_per_token=1e3 * timing.median / new_tokens, ratio_to_1k=timing.median / seconds[1024, batch],
                )  # fmt: skip


class Decoding:
    """Decodes on and on from a reading, whose memory each call takes and gives back."""

    def __init__(self, model: LanguageModel, variables: dict, reading: Reading, count: int):
        self.reading = reading
        self._decode = lambda reading: decode(model, variables, reading, key=jax.random.key(0), max_new_tokens=count)

    def __call__(self) -> object:
        tokens, self.reading = self._decode(self.reading)
        return jax.block_until_ready(tokens)


def seal_candidates(repeats: int):
    """Inner updates of SEAL's candidates side by side against one after another: the same program at K = 1, in the same buckets."""
    world = World()
    model = LanguageModel(seal_world.model_config(world))
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))['params']
    loop, rng = make_inner_loop(model, seal_world.INNER), np.random.default_rng(0)
    texts = seal_world.write_texts(world, 64, 'train', 0)
    edits = [world.lines(world.edit(rng, text.person)) for text in texts]
    sequences = [tuple((END, *line) for line in [*edit, text.passage]) for edit, text in zip(edits, texts, strict=True)]
    candidates = [Candidate(rows, 3e-3, 16, seed) for seed, rows in enumerate(sequences)]
    layout = lambda count, at_most: list(buckets(candidates[:count], at_most=at_most, shape=seal_world.SHAPE))
    run_all = lambda batches: [jax.block_until_ready(loop(params, batch).adapters) for _, batch in batches]
    used = lambda batch: loop.lower(params, batch).compile().memory_analysis().temp_size_in_bytes
    one = layout(64, 1)
    alone, single = run_all(one), measure(lambda: run_all(one[:8]), repeats).median / 8
    for count in (1, 4, 16, 32, 64):
        batches = layout(count, count)
        timing = measure(lambda batches=batches: run_all(batches), repeats)
        together = jax.tree.map(lambda *leaves: np.concatenate(leaves), *run_all(batches))
        sequential = jax.tree.map(lambda *leaves: np.concatenate(leaves), *alone[:count])
        gaps = jax.tree.map(lambda a, b: float(np.linalg.norm(a - b) / np.linalg.norm(b)), together, sequential)
        error = max(jax.tree.leaves(gaps))
        if not error < 1e-5:
            raise RuntimeError(f'{count} candidates together and alone differ by {error:.1e}')
        slope = (used(batches[0][1]) - used(one[0][1])) / (count - 1) if count > 1 else 0.0
        yield dict(
            what='inner updates', model='seal world, 0.1M parameters', candidates=count, steps=16, error=error,
            candidates_per_second=count / timing.median, slowest=count / timing.slowest, fastest=count / timing.fastest,
            ratio=count * single / timing.median, real_share=real_share(batches[0][1]), kib_per_candidate=slope / 2**10,
        )  # fmt: skip


SUITES = {
    'cpu': (chunked_against_reference, titans_peer, training_lengths),
    'optim': (optimizer_steps,),
    'decode': (decoding,),
    'seal': (seal_candidates,),
}


def use_large_pages() -> None:
    """Starts the process again with memory in large pages, as demo.sh does, for all models and peers alike."""
    if 'GLIBC_TUNABLES' not in os.environ:
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {'GLIBC_TUNABLES': 'glibc.malloc.hugetlb=1'})


def main() -> None:
    """Runs a suite, printing and storing a row for each figure."""
    use_large_pages()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--suite', choices=SUITES, default='cpu')
    parser.add_argument('--repeats', type=int, default=5, help='runs each figure is the median of')
    parser.add_argument('--output', type=pathlib.Path, help='file of rows; default experiments/results/bench_<suite>.jsonl')
    arguments = parser.parse_args()
    if arguments.repeats < 1:
        parser.error(f'--repeats is {arguments.repeats}, allowed is an integer of at least 1')
    output = arguments.output or ROOT / 'experiments' / 'results' / f'bench_{arguments.suite}.jsonl'
    hardware = hardware_name(jax.devices())
    for part in SUITES[arguments.suite]:
        begun = time.perf_counter()
        for metrics in part(arguments.repeats):
            config = {
                key: metrics[key] for key in ('what', 'model', 'tree', 'batch', 'length', 'context', 'candidates') if key in metrics
            } | {'repeats': arguments.repeats}
            wall, begun = time.perf_counter() - begun, time.perf_counter()
            name = f'bench_{arguments.suite}'
            row = make_row(experiment=name, model=metrics['model'], seed=0, config=config, metrics=metrics, hardware=hardware, wall_s=wall)
            append_row(output, row)
            shown = {key: f'{value:,.4g}' if isinstance(value, float) else value for key, value in metrics.items()}
            print('  '.join(f'{key} {value}' for key, value in shown.items()), flush=True)


if __name__ == '__main__':
    main()
