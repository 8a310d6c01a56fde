"""Self-modifying memories by Mosaic GPU kernels for Hopper: the calls that `self_modifying.py` makes there.

A program for each head of a batch row goes over its chunks of 64 tokens, and evaluates a chunk's function, or its derivative, on tiles of
64 x 64 numbers. Memories lie in the results, written anew after every chunk: they stay in the L2 cache.

Their products of tiles have run on an H100 and are right; a chunk's whole program has not: interpreted, and lowered for CUDA. It did not
compile there within a minute and a half.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from nested_jax.memory.kernels.hopper_tiles import LAYOUT, SCRATCH, TILE, Multiplier, Tile, evaluate, indices, pick, trace

_SHAPE = jax.ShapeDtypeStruct((TILE, TILE), jnp.float32)


def forward(chunk: Callable, q, k, v, scalars, start, running, *, keep_starts: bool):
    """Reads, the last memories, and with `keep_starts` the memories (N, B, H, 64, 64) that chunks start from.

    Args:
        chunk: memories, start, q, k, v and scalars of a chunk, arrays (64, 64) and rows (1, 64) -> memories and reads.
        q, k, v: (N, B, H, 64, 64) float32.
        scalars: (N, B, H, rows, 64) float32.
        start, running: tuples of (B, H, 64, 64) float32.
    """
    rows, heads = scalars.shape[3], q.shape[1:3]
    program = trace(chunk, _tiles(running), _tiles(start), *_tiles((q, k, v)), _rows(rows))
    kernel = functools.partial(_forward_kernel, program, rows, len(start), len(running))
    tokens = (_merge(q), _merge(k), _merge(v), _padded(scalars))
    shapes = [tokens[0], *map(_merge, running), *([tokens[0]] * len(running) * keep_starts)]
    y, *memories = _call(kernel, shapes)(*tokens, *map(_merge, start), *map(_merge, running))
    memories = [x.reshape(*x.shape[:-3], *heads, TILE, TILE) for x in memories]
    return y.reshape(q.shape), tuple(memories[: len(running)]), tuple(memories[len(running) :])


def backward(chunk: Callable, q, k, v, scalars, start, starts, y_bar, last_bar):
    """Cotangents of q, k, v, scalars, start and running.

    Args:
        chunk, q, k, v, scalars, start: as of `forward`.
        starts: what it kept.
        y_bar, last_bar: cotangents of the reads and of the last memories.
    """
    rows, heads = scalars.shape[3], q.shape[1:3]

    def derivative(memory, start, q, k, v, scalars, last_bar, y_bar):
        return jax.vjp(chunk, memory, start, q, k, v, scalars)[1]((last_bar, y_bar))

    program = trace(derivative, _tiles(starts), _tiles(start), *_tiles((q, k, v)), _rows(rows), _tiles(starts), _SHAPE)
    kernel = functools.partial(_backward_kernel, program, rows, len(start), len(starts))
    tokens = (_merge(q), _merge(k), _merge(v), _padded(scalars))
    shapes = [*tokens, *map(_merge, start), *map(_merge, last_bar)]
    results = _call(kernel, shapes)(*tokens, *map(_merge, start), *map(_merge, (*starts, y_bar, *last_bar)))
    results = [x.reshape(*x.shape[:-3], *heads, TILE, TILE) for x in results]
    memories = results[4:]
    return *results[:3], results[3][..., :rows, :], tuple(memories[: len(start)]), tuple(memories[len(start) :])


def _tiles(arrays) -> tuple:
    return (_SHAPE,) * len(arrays)


def _rows(count: int) -> tuple:
    return (jax.ShapeDtypeStruct((1, TILE), jnp.float32),) * count


def _merge(x: jax.Array) -> jax.Array:
    """(..., B, H, 64, 64) -> (..., B H, 64, 64)."""
    return x.reshape(*x.shape[:-4], -1, TILE, TILE)


def _padded(scalars: jax.Array) -> jax.Array:
    """Scalars as the first rows of tiles; those of -inf, which no difference survives, as what has the same gates."""
    finite = jnp.clip(scalars, -1e4, 1e4)
    return _merge(jnp.pad(finite, [(0, 0)] * 3 + [(0, TILE - scalars.shape[3]), (0, 0)]))


def _call(kernel: Callable, shapes: list):
    """Of a program for each head of a batch row."""
    return plgpu.kernel(
        kernel,
        out_type=[jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in shapes],
        grid=(shapes[0].shape[1],),
        grid_names=('row',),
        scratch_types=dict(scratch=SCRATCH),
    )


def _load(ref, *place) -> Tile:
    """What lies there in global memory, read when it is first needed."""
    where = (ref.at[place],) if jax.__version_info__ >= (0, 11) else (ref, place)  # plgpu.load takes no place of its own any more
    return Tile(lambda: plgpu.load(*where, layout=LAYOUT, optimized=False))


def _scalars(ref, count: int, *place, multiply: Multiplier) -> list[Tile]:
    together = _load(ref, *place)
    return [pick(together, 0, row, multiply) for row in range(count)]


def _forward_kernel(program, rows, start_count, count, *refs, scratch):
    q, k, v, scalars, *refs = refs
    start, running, (y, *refs) = refs[:start_count], refs[start_count : start_count + count], refs[start_count + count :]
    memory, starts, row = refs[:count], refs[count:], jax.lax.axis_index('row')
    for ref, first in zip(memory, running, strict=True):
        ref[row] = _load(first, row).array

    def body(n, _):
        multiply = Multiplier(scratch)
        before = [_load(ref, row) for ref in memory]
        for ref, tile in zip(starts, before, strict=bool(starts)):
            ref[n, row] = tile.array
        given = [*before, *(_load(ref, row) for ref in start), *(_load(ref, n, row) for ref in (q, k, v))]
        results = evaluate(program, [*given, *_scalars(scalars, rows, n, row, multiply=multiply)], multiply)
        for ref, tile in zip((*memory, y), [tile.array for tile in results], strict=True):
            ref[(row,) if ref is not y else (n, row)] = tile

    jax.lax.fori_loop(0, q.shape[0], body, None)


def _backward_kernel(program, rows, start_count, count, *refs, scratch):
    q, k, v, scalars, *refs = refs
    start, starts, (y_bar, *refs) = refs[:start_count], refs[start_count : start_count + count], refs[start_count + count :]
    last_bar, tokens_bar, scalars_bar, refs = refs[:count], refs[count : count + 3], refs[count + 3], refs[count + 4 :]
    start_bar, memory_bar, row = refs[:start_count], refs[start_count:], jax.lax.axis_index('row')
    for ref, last in zip(memory_bar, last_bar, strict=True):
        ref[row] = _load(last, row).array
    for total in start_bar:
        total[row] = jnp.zeros((TILE, TILE), jnp.float32)

    def body(step, _):
        n, multiply = q.shape[0] - 1 - step, Multiplier(scratch)
        given = [*(_load(ref, n, row) for ref in starts), *(_load(ref, row) for ref in start), *(_load(ref, n, row) for ref in (q, k, v))]
        given += _scalars(scalars, rows, n, row, multiply=multiply)
        given += [*(_load(ref, row) for ref in memory_bar), _load(y_bar, n, row)]
        results = [tile.array for tile in evaluate(program, given, multiply)]
        for ref, tile in zip(memory_bar, results[:count], strict=True):
            ref[row] = tile
        for total, tile in zip(start_bar, results[count : count + start_count], strict=True):
            total[row] = _load(total, row).array + tile
        *wide, last = range(count + start_count, count + start_count + 4)
        for ref, index in zip(tokens_bar, wide, strict=True):
            ref[n, row] = results[index]
        together, number = jnp.zeros((TILE, TILE), jnp.float32), indices(0).array
        for index in range(rows):
            together = jnp.where(number == index, results[last + index], together)
        scalars_bar[n, row] = together

    jax.lax.fori_loop(0, q.shape[0], body, None)
