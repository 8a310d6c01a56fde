"""Programs of small matrices on Hopper: evaluates a traced function of 64 x 64 arrays inside a Mosaic GPU kernel.

A warpgroup holds a tile in its registers as its matrix unit leaves products there. Elementwise operations then need no other thread, and
threads exchange numbers only in products: sums over rows or columns, slices and transposes are products with constant tiles. Columns
(64, 1), rows (1, 64) and scalars are tiles that repeat them.

Products are those of bfloat16 parts, summed in float32: two parts of each factor, or three of one whose other factor is exact in bfloat16,
so that at least 16 bits of the factors count.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

TILE = 64
LAYOUT = plgpu.Layout.WGMMA
_PARTS = 4  # of both factors of a product
# Of a `Multiplier`: rows of 128 bytes, as the matrix unit reads them.
SCRATCH = plgpu.SMEM((2, _PARTS, TILE, TILE), jnp.bfloat16, transforms=(plgpu.TilingTransform((8, TILE)), plgpu.SwizzleTransform(2 * TILE)))


@dataclasses.dataclass
class Tile:
    """A value of the program.

    Attributes:
        make: gives the tile, once.
        varies: axes of the tile along which it is not constant.
        exact: whether bfloat16 holds its numbers.
        transposed: gives the transposed tile without making this one, where that is known.
    """

    make: Callable[[], jax.Array]
    varies: frozenset[int] = frozenset((0, 1))
    exact: bool = False
    transposed: Callable[[], jax.Array] | None = None

    @functools.cached_property
    def array(self) -> jax.Array:
        """(64, 64)."""
        return self.make()


class Multiplier:
    """Products of tiles through shared memory, one after another.

    Args:
        scratch: `SCRATCH`. A product fills one half while threads may still read that of the product before in the other.
    """

    def __init__(self, scratch):
        self._scratch, self._half = scratch, 0
        plgpu.commit_smem()  # a barrier, behind the last product of another multiplier

    def __call__(self, a: Tile, b: Tile, a_axis: int = 1, b_axis: int = 0) -> jax.Array:
        """The product that sums over these axes."""
        factors = [plgpu.layout_cast(tile.array, LAYOUT) for tile in (a, b)]  # which may take products first
        half, self._half = self._scratch.at[self._half], 1 - self._half
        counts = (1, 1 if b.exact else 3) if a.exact else (3, 1) if b.exact else (2, 2)
        for first, rest, count in zip((0, counts[0]), factors, counts, strict=True):
            for index in range(first, first + count):
                part = rest.astype(jnp.bfloat16)
                half[index] = part
                rest = rest - part.astype(jnp.float32)
        plgpu.commit_smem()
        turned = lambda part, axis, summed: half.at[part] if axis == summed else half.at[part].transpose((1, 0))

        def multiply(total):
            for i in range(counts[0]):
                for j in range(counts[1]):
                    if i + j < max(counts):  # the product of two second parts is below what counts
                        plgpu.wgmma(total, turned(i, a_axis, 1), turned(counts[0] + j, b_axis, 0))
            return total[...]

        return pl.run_scoped(multiply, plgpu.ACC((TILE, TILE), jnp.float32))


def trace(function: Callable, *arguments):
    """What `evaluate` takes: the program of a function that closes over no array, for arguments of these shapes, each axis of 1 or 64."""
    return jax.make_jaxpr(function)(*arguments)


def evaluate(program, tiles: Sequence[Tile], multiply: Multiplier) -> list[Tile]:
    """Results of a traced program.

    Args:
        program: of `trace`.
        tiles: its arguments, flat.
        multiply: what makes products.

    Raises:
        NotImplementedError: for a step that tiles cannot do.
    """
    return _evaluate(program.jaxpr, tiles, multiply)


def _evaluate(jaxpr, tiles: Sequence[Tile], multiply: Multiplier) -> list[Tile]:
    known = dict(zip(jaxpr.invars, tiles, strict=True))
    read = lambda x: _constant(np.asarray(x.val, x.aval.dtype)) if hasattr(x, 'val') else known[x]
    for step in _needed(jaxpr):
        inner = next((step.params[name] for name in ('jaxpr', 'call_jaxpr', 'fun_jaxpr') if name in step.params), None)
        given = [read(x) for x in step.invars]
        if inner is not None:
            results = _evaluate(inner.jaxpr, given, multiply)
        else:
            results = [_step(step, given, multiply)]
        known |= zip(step.outvars, results, strict=True)
    return [read(x) for x in jaxpr.outvars]


def _needed(jaxpr) -> list:
    """Steps that a result depends on, in order."""
    wanted, steps = {x for x in jaxpr.outvars if not hasattr(x, 'val')}, []
    for step in reversed(jaxpr.eqns):
        if not wanted.isdisjoint(step.outvars):
            steps.append(step)
            wanted.update(x for x in step.invars if not hasattr(x, 'val'))
    return steps[::-1]


def _step(step, given: list[Tile], multiply: Multiplier) -> Tile:
    name, params = step.primitive.name, step.params
    shapes, shape = [x.aval.shape for x in step.invars], step.outvars[0].aval.shape
    if name in _ELEMENTWISE | _REPLACED.keys():
        apply = functools.partial(_REPLACED.get(name, step.primitive.bind), **params)
        arrays = [tile.array for tile in given]
        exact = name == 'convert_element_type' and step.invars[0].aval.dtype == jnp.bool
        return Tile(lambda: apply(*arrays), frozenset().union(*(tile.varies for tile in given)), exact)
    if name == 'iota' and shape == (TILE, TILE):
        return indices(params['dimension'])
    if name == 'dot_general' and params['dimension_numbers'][1] == ((), ()):
        (a, b), (((a_axis,), (b_axis,)), _) = given, params['dimension_numbers']
        return Tile(lambda: multiply(a, b, a_axis, b_axis), transposed=lambda: multiply(b, a, b_axis, a_axis))
    (tile,) = given
    if name == 'transpose' and len(shape) == 2:
        return _transpose(tile, multiply)
    if name == 'reduce_sum':
        for axis in params['axes']:
            tile = _sum(tile, shapes[0], axis, multiply)
        return tile
    if name == 'slice':
        for axis, (size, start) in enumerate(zip(shape, params['start_indices'], strict=True)):
            tile = tile if size == shapes[0][axis] else pick(tile, axis, start, multiply)
        return tile
    if name in ('broadcast_in_dim', 'reshape', 'squeeze') and _keeps_axes(tile, shapes[0], shape, params.get('broadcast_dimensions')):
        return tile
    raise NotImplementedError(f'{name} of {shapes} to {shape}')


def _constant(value: np.generic | np.ndarray) -> Tile:
    exact = value.dtype == np.float32 and value == value.astype(jnp.bfloat16)
    return Tile(lambda: jax.lax.full((TILE, TILE), value, value.dtype), frozenset(), exact)


def indices(axis: int) -> Tile:
    """Numbers of the tile's rows, axis 0, or columns, axis 1."""
    return Tile(lambda: plgpu.broadcasted_iota(jnp.int32, (TILE, TILE), axis, layout=LAYOUT), frozenset((axis,)))


def _where(tile: Tile, test: Callable[[jax.Array], jax.Array]) -> Tile:
    """1 where a number of the tile passes, 0 elsewhere."""
    return Tile(lambda: test(tile.array).astype(jnp.float32), tile.varies, exact=True)


def _transpose(tile: Tile, multiply: Multiplier) -> Tile:
    if not tile.varies:
        return tile
    eye = _where(Tile(lambda: indices(0).array - indices(1).array), lambda difference: difference == 0)
    return Tile(tile.transposed or (lambda: multiply(tile, eye, 0, 0)), frozenset(1 - axis for axis in tile.varies), tile.exact)


def _sum(tile: Tile, shape: tuple[int, ...], axis: int, multiply: Multiplier) -> Tile:
    """Over an axis of the array (of 1 or 64 numbers), which remains as one along which the tile is constant."""
    if shape[axis] == 1:
        return tile
    if len(shape) == 1:
        (axis,) = tile.varies or (0,)
    if axis not in tile.varies:
        return Tile(lambda: TILE * tile.array, tile.varies)
    ones = _constant(np.float32(1.0))
    return Tile(lambda: multiply(tile, ones) if axis == 1 else multiply(ones, tile), tile.varies - {axis})


def pick(tile: Tile, axis: int, index: int, multiply: Multiplier) -> Tile:
    """One row or column of the array, in all places of that axis."""
    if axis not in tile.varies:
        return tile
    chosen = _where(indices(1 - axis), lambda number: number == index)
    return Tile(lambda: multiply(tile, chosen) if axis == 1 else multiply(chosen, tile), tile.varies - {axis})


def _keeps_axes(tile: Tile, shape: tuple[int, ...], new: tuple[int, ...], places: tuple[int, ...] | None) -> bool:
    """Whether the tile is that of an array of a new shape, too, whose axes `places` are the old ones; None: those of equal size."""
    if len(new) < 2:
        return True
    if places is None:
        return shape == new or len(shape) < 2 and all(new[axis] == TILE and new[1 - axis] == 1 for axis in tile.varies)
    return all(places[axis if len(shape) == 2 else 0] == axis for axis in tile.varies)


_ELEMENTWISE = frozenset(
    'abs add and convert_element_type div eq exp ge gt le log logistic lt max min mul ne neg not or rsqrt select_n '
    'shift_right_arithmetic sign sqrt square sub tanh'.split()
)
_REPLACED = {  # which Mosaic has not, or not for all parameters
    'add_any': jax.lax.add,
    'integer_pow': lambda x, y: _power(x, y) if y > 0 else 1.0 / _power(x, -y),
    'log1p': lambda x, accuracy: jnp.log(1.0 + x),
    'one_minus_square': lambda x: 1.0 - x * x,
}


def _power(x: jax.Array, exponent: int) -> jax.Array:
    return functools.reduce(jax.lax.mul, [x] * exponent)
