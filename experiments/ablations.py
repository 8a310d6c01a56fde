"""Which part of Hope does the work: `python -m experiments.ablations`.

Table 6, arXiv:2512.24695v1, at 1.3B parameters and 100B tokens (mean of two perplexities / mean accuracy): Hope 12.24 / 58.1; without DGD
13.41 / 56.5, momentum 13.58 / 56.9, weight decay (retention) 13.71 / 57.2, CMS 13.04 / 57.3, inner projection k 13.77 / 56.9,
v 13.90 / 55.1, q 12.19 / 57.4. As the last line takes adaptive queries away, its Hope has them; here they are an arm of their own.

The base is hope-tiny, MLP memories with momentum, or hope-linear-tiny (`--base`), on bytes of the embedded corpus: 0.41M tokens, three
seeds, one learning rate for all arms. Static projections and values in place of a memory, no erasure, no momentum, no forgetting, one
level of as many hidden units. Two arms take no part away: chunks of 64 in place of 16 tokens, which an accelerator would rather have, and
matrices in place of Hope's MLPs for all but the memory that is read.

The whole model also answers what critics asked (`probe` in its row):

    levels      how far each CMS level has moved from where it began, how alike the levels are (cosine of their weights), and what
                held-out text costs without it: a level that stays dead or doubles another shows
    memories    how far each meta-learned memory moves in a context, as a share of its initial state, and what text costs when memories
                are only read

Rows: hope-linear, all arms with three seeds, chunks of 64 with two; hope, whole with one and matrix projections with three. A run took 126
to 684 s of a core, other work on both. Going on: `taskset -c 0 python -m experiments.ablations --base hope --minutes 40`.
"""

import dataclasses
import itertools
import pathlib
import sys
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from experiments.arguments import parse_arguments
from experiments.grid import make_cells
from experiments.text_runs import TextArgs, TextGrid, run_text_grid
from nested_jax.config import ModelConfig
from nested_jax.data import Dataset, evaluation_batches, open_dataset
from nested_jax.evaluation.perplexity import evaluate
from nested_jax.layers.channel import SwiGLU
from nested_jax.layers.common import Context
from nested_jax.memory.self_modifying import Memories
from nested_jax.models.language_model import Block, LanguageModel, open_rows
from nested_jax.models.loss import model_loss
from nested_jax.models.presets import preset, without
from nested_jax.training.config import TrainConfig
from nested_jax.training.loop import Result

EXPERIMENT = 'ablations'
RESULTS = pathlib.Path(__file__).parent / 'results' / f'{EXPERIMENT}.jsonl'
WHOLE, ADAPTIVE_QUERY, STATIC, LONG, MATRICES = 'whole', 'with query', 'without self-modification', 'chunks of 64', 'matrix projections'
PARTS = ('retention', 'dgd', 'momentum', 'cms', 'key', 'value', 'target', 'eta', 'alpha')
ARMS = (WHOLE, *(f'without {part}' for part in PARTS), ADAPTIVE_QUERY, STATIC, LONG, MATRICES)
ARMS_OF_MLPS = ('without momentum', MATRICES)  # that hope-linear does not have


@dataclasses.dataclass(frozen=True)
class Args(TextArgs):
    """Take Hope apart and compare held-out bits per byte."""

    base: Literal['hope', 'hope-linear'] = 'hope-linear'
    """The whole model: with MLP memories, or with matrix memories, which have no momentum."""
    arms: tuple[str, ...] = ()
    """'whole', 'without <part>', 'with query', 'without self-modification', 'chunks of 64', 'matrix projections'; none: all."""
    runs: pathlib.Path = pathlib.Path('runs') / EXPERIMENT
    """Folder of the runs' checkpoints."""
    results: pathlib.Path = RESULTS
    """File that a row for each run is added to."""

    def __post_init__(self):
        super().__post_init__()
        for arm in self.arms:
            arm_config(self.base, arm)

    @property
    def chosen(self) -> tuple[str, ...]:
        """The arms to run."""
        return self.arms or tuple(arm for arm in ARMS if self.base == 'hope' or arm not in ARMS_OF_MLPS)


def main(argv: list[str] | None = None) -> int:
    """Runs the cells that have no row; returns the exit code."""
    args = parse_arguments(Args, argv, __doc__)
    if args.smoke:
        args = dataclasses.replace(args, arms=args.chosen[:1], seeds=args.seeds[:1], runs=args.runs / 'smoke')
    measure = lambda result, data: dict(probe=probe(result, data, args.train(0)))
    grid = TextGrid(
        EXPERIMENT, make_cells((args.base,), args.chosen, args.seeds), lambda cell: arm_config(cell.model, cell.task),
        lambda cell: args.train(cell.seed), args.results, args.runs, lambda cell: measure if cell.task == WHOLE else None,
    )  # fmt: skip
    return run_text_grid(grid, open_dataset(), args)


def arm_config(base: str, arm: str) -> ModelConfig:
    """The model of an arm.

    Raises:
        ValueError: naming the arm and what is allowed.
    """
    config = preset(f'{base}-tiny')
    if arm not in ARMS:
        raise ValueError(f'arm is {arm!r}, allowed is one of {", ".join(map(repr, ARMS))}')
    changed = {
        ADAPTIVE_QUERY: dataclasses.replace(config.memory, adaptive_query=True),
        STATIC: dataclasses.replace(config.memory, self_modified=()),
        LONG: dataclasses.replace(config.memory, chunk_size=64, projection_chunk_size=64),
        MATRICES: dataclasses.replace(config.memory, matrix_memories=('key', 'value', 'eta', 'alpha')),
    }
    if arm in changed:
        return dataclasses.replace(config, memory=changed[arm])
    return config if arm == WHOLE else without(config, arm.removeprefix('without '))


def probe(result: Result, data: Dataset, settings: TrainConfig, tokens: int = 65_536) -> dict[str, Any]:
    """What a trained Hope's levels and memories do, on the first `tokens` of the held-out text; see the module."""
    config, params = result.model.config, result.state.params
    layout = dict(length=settings.sequence_length, batch_size=settings.batch_size, grid=config.grid)
    batches = list(evaluation_batches(data.heldout, **layout, max_tokens=tokens))
    bits, reading_only = (heldout_bits(result.model, data, batches, update=update) for update in (True, False))
    whole = bits(params)
    begun = jax.jit(result.model.init)(jax.random.fold_in(result.state.key, 0), batches[0]['tokens'][:1])['params']
    levels = {
        f'level_{index}': dict(
            moved=distance(*(tree['blocks']['channel'][f'level_{index}'] for tree in (params, begun))),
            cost_of_removal=bits(without_level(params, index)) - whole,
        )
        for index in range(len(config.levels))
    }
    memories = moved_memories(result.model, params, batches[0]['tokens'])
    return dict(
        levels=levels, cosine=level_cosines(config, params, batches[0]['tokens']), memories=memories,
        cost_of_reading_only=reading_only(params) - whole,
    )  # fmt: skip


def heldout_bits(model: LanguageModel, data: Dataset, batches: list[dict], *, update: bool) -> Callable[[Any], float]:
    """Bits per byte of held-out batches as a function of parameters; with `update=False` memories are read and never written."""
    reader, fields = model if update else _ReadOnly(model), ('tokens', 'targets', 'segment_ids', 'weights')
    step = jax.jit(lambda params, batch: model_loss(reader, params, *(batch[name] for name in fields)))
    return lambda params: evaluate(step, params, batches, data.tokenizer.count_bytes).bits_per_byte


@dataclasses.dataclass(frozen=True)
class _ReadOnly:
    """A model whose memories are never written."""

    model: LanguageModel

    def apply(self, variables: Any, *args: Any, **options: Any) -> Any:
        return self.model.apply(variables, *args, update=False, **options)

    def head(self, params: Any) -> jax.Array:
        return self.model.head(params)


def distance(after: Any, before: Any) -> float:
    """|after - before| / |before| over all leaves."""
    norm = lambda tree: np.sqrt(sum(float(np.square(np.asarray(leaf, np.float64)).sum()) for leaf in jax.tree.leaves(tree)))
    return float(norm(jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), after, before)) / norm(before))


def without_level(params: Any, index: int) -> Any:
    """Parameters whose level adds nothing, in any block."""
    silent = lambda path, leaf: (
        jnp.zeros_like(leaf) if f'level_{index}/down' in jax.tree_util.keystr(path, simple=True, separator='/') else leaf
    )
    return jax.tree_util.tree_map_with_path(silent, params)


def level_cosines(config: ModelConfig, params: Any, tokens: np.ndarray) -> dict[str, float]:
    """Mean cosine of what two levels add to the same token, over tokens and blocks, by 'i:j'."""
    rows, context = open_rows(config, params['embedding'], tokens), Context(None, None, True)
    found = [[] for _ in config.levels]
    for layer in range(config.num_layers):
        block = {'params': jax.tree.map(lambda leaf, layer=layer: leaf[layer], params['blocks'])}
        keep = dict(capture_intermediates=lambda module, _: isinstance(module, SwiGLU), mutable='intermediates')
        (rows, _), kept = Block(config).apply(block, rows, None, context, **keep)
        for index, added in enumerate(found):
            added.append(kept['intermediates']['channel'][f'level_{index}']['__call__'][0])
    unit = [jnp.stack(added) / jnp.linalg.norm(jnp.stack(added), axis=-1, keepdims=True) for added in found]
    return {f'{i}:{j}': float((unit[i] * unit[j]).sum(-1).mean()) for i, j in itertools.combinations(range(len(unit)), 2)}


def moved_memories(model: LanguageModel, params: Any, tokens: np.ndarray) -> dict[str, float]:
    """How far each meta-learned memory is from its initial state after a context, as a share of it, mean over rows and blocks."""
    _, state = jax.jit(lambda params: model.apply({'params': params}, tokens))(params)
    running, mixer = state['layers'].memories.running, params['blocks']['mixer']
    names = sorted(
        {name.removeprefix('initial_').removesuffix('_in').removesuffix('_out') for name in mixer if name.startswith('initial_')}
    )
    return {name: distance(*_one_memory(name, model.config, running, mixer)) for name in names}


def _one_memory(name: str, config: ModelConfig, running: Memories, mixer: dict) -> tuple[list, list]:
    """A memory's layers after the context, (B, blocks, H, ...), and where they began, of the same shapes."""
    wide = ('memory', 'key', 'value', 'query')[: 4 if config.memory.adaptive_query else 3]
    place, width = (*wide, 'eta', 'alpha').index(name), config.head_dim
    if config.memory.kind == 'matrix':
        start = place * width if name in wide else len(wide) * width + place - len(wide)
        after = [running.first[..., start : start + (width if name in wide else 1)]]
        before = [mixer[f'initial_{name}']]
    else:
        hidden = config.memory.hidden_dim or width
        second = running.wide[..., place, :, :] if name in wide else running.gate[..., place - len(wide), :, :]
        after = [running.first[..., place * hidden : (place + 1) * hidden], second]
        before = [mixer[f'initial_{name}_in'], mixer[f'initial_{name}_out']]
    return after, [jnp.broadcast_to(leaf[None], rows.shape) for leaf, rows in zip(before, after, strict=True)]


if __name__ == '__main__':
    sys.exit(main())
