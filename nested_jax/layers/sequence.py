"""One long sequence over the devices of the mesh axis `sequence`, each with its stretch of neighbouring tokens.

`split` runs a function of a batch's rows (B, T) on the stretches, (B, T / n) on each of n devices, and adds up what it returns; the other
axes of the mesh stay XLA's, with what they split. What looks at one token at a time (norms, MLPs, projections, losses) is computed as on
one device. What looks back is one of two kinds:

    softmax attention  keys and values of all stretches are gathered (`gather`), queries stay; positions are those of the whole sequence,
                       and a short convolution gets the tokens before its stretch from the left (`tokens_before`)
    all other mixers   a stretch is a call of a stream that goes on with the state of the stretch before it (`pass_state`): one mechanism
                       for matrix memories, MLP memories, self-modification, convolutions and windows of attention, exact by the streaming
                       invariant. Where a document ends between two stretches the state is the one before a first token

A state takes n - 1 steps from the first device to the last. So that the devices do not wait for one another for all of that time, the rows
that a device holds, m of them, go through one at a time: device i is at row j in round i + j. Of the m + n - 1 rounds a device does m of
its own, and in the others what is thrown away: the share (n - 1) / (m + n - 1) is lost, all but 1 / n with a single row, whose memory is
split over the devices but whose mixers take no less time than on one. A memory with a chunk grid goes over one chunk more in each stretch,
the open one of a stream, which is empty here.

Gradients go the same ways back. Collectives: a `collective-permute` of one row's state for each mixer and round, or gathered keys and
values for each layer of attention; and one sum of the parameters' gradients over the axis, after all layers.

Rows are by hand on the axes of the batch too, within a mixer's rounds and around what is gathered; heads stay whole where a state is
handed on, so the axis `tensor` goes with attention alone. No state comes out of a call whose sequences are split.

Letters: B batch, T tokens, n devices along the axis, m rows of a device.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

from nested_jax.layers.common import Context
from nested_jax.layers.mesh import SEQUENCE_AXIS, axis_size, batch_axes

PyTree = Any


def is_split() -> bool:
    """Whether this is traced inside of `split`."""
    return axis_size(SEQUENCE_AXIS, AxisType.Manual) > 1


def stretches() -> int:
    """Devices that a call of `split` would share its sequences over; 1 without such an axis and inside of `split`."""
    return axis_size(SEQUENCE_AXIS, AxisType.Auto)


def split(function: Callable[[PyTree, PyTree], PyTree], params: PyTree, rows: PyTree, *, grid: int) -> PyTree:
    """function(params, rows), with the rows split over the axis, which the mesh of `jax.set_mesh` has.

    Args:
        function: of parameters and rows to sums over the rows' tokens.
        params: whole on each device of the axis.
        rows: pytree of (B, T, ...).
        grid: tokens between the places where a stretch may start.

    Raises:
        ValueError: for a T that is no multiple of n x grid.
    """
    count, length = stretches(), jax.tree.leaves(rows)[0].shape[1]
    if length % (count * grid):
        raise ValueError(f'the rows have {length} tokens, allowed is a multiple of {SEQUENCE_AXIS} x grid = {count} x {grid} on this mesh')
    total = lambda params, rows: jax.lax.psum(function(params, rows), SEQUENCE_AXIS)
    specs = (jax.P(), jax.P(None, SEQUENCE_AXIS))
    # Unchecked: memories start from zeros, which the check takes for the same on all devices, and go on as what is not.
    return jax.shard_map(total, in_specs=specs, out_specs=jax.P(), axis_names={SEQUENCE_AXIS}, check_vma=False)(params, rows)


def gather(rows: PyTree) -> PyTree:
    """Whole rows (B, T, ...) of the stretches (B, T / n, ...); as they are outside of `split`."""
    if not is_split():
        return rows
    whole = lambda rows: jax.tree.map(lambda x: jax.lax.all_gather(x, SEQUENCE_AXIS, axis=1, tiled=True), rows)
    names, tensor = batch_axes(jax.tree.leaves(rows)[0].shape[0]), axis_size('tensor', AxisType.Auto)
    # What is split over other axes, the batch and heads (B, T / n, H, D), is by hand as well: XLA would make it whole first.
    heads = lambda x: 'tensor' if tensor > 1 and x.ndim == 4 and x.shape[2] % tensor == 0 else None
    specs = jax.tree.map(lambda x: jax.P(names or None, None, heads(x)) if x.ndim > 2 else jax.P(names or None), rows)
    axes = {*names, 'tensor'} if tensor > 1 else set(names)
    return jax.shard_map(whole, in_specs=(specs,), out_specs=specs, axis_names=axes, check_vma=False)(rows) if axes else whole(rows)


def first_token(length: int) -> jax.Array:
    """() int32 tokens of the sequence before this device's stretch of `length`. Only inside of `split`."""
    return jax.lax.axis_index(SEQUENCE_AXIS) * length


def stretch(rows: jax.Array, length: int) -> jax.Array:
    """This device's stretch of `length` tokens of whole rows (B, T, ...); all of them outside of `split`."""
    return jax.lax.dynamic_slice_in_dim(rows, first_token(length), length, 1) if is_split() else rows


def tokens_before(x: jax.Array, segment_ids: jax.Array | None, count: int) -> jax.Array:
    """The `count` tokens before this device's stretch, (B, T / n, D) -> (B, count, D); zeros before the first and of other documents.

    Raises:
        ValueError: for stretches of fewer tokens.
    """
    if x.shape[1] < count:
        raise ValueError(f'a device along {SEQUENCE_AXIS} has {x.shape[1]} tokens, allowed are at least {count} before a convolution')
    if segment_ids is None:
        return _to_the_right(x[:, -count:])
    before, ids = _to_the_right((x[:, -count:], segment_ids[:, -count:]))
    return jnp.where((ids == segment_ids[:, :1])[..., None], before, 0)


def pass_state(call: Callable, params: PyTree, rows: PyTree, segment_ids: jax.Array | None) -> PyTree:
    """What a token mixer makes of the stretches, the state after each handed on to the next device. Only inside of `split`.

    Args:
        call: (params, rows, state, context) -> (outputs, state) of a mixer, with a state of all zeros before the first token; rows and
            outputs are pytrees of (B, T, ...), and of scalars that are the same for all rows.
        params: of the mixer.
        rows: (B, T / n, ...).
        segment_ids: (B, T / n) int32, from 0 at the sequence's start, one more at each new document.

    Returns:
        The outputs, (B, T / n, ...).
    """
    names = batch_axes(jax.tree.leaves(rows)[0].shape[0])
    if not names:
        return _rounds(call, params, rows, segment_ids)
    # Each device has its own rows by hand: XLA would gather the parameters, and sum their gradients, over them in every round.
    specs = lambda tree: jax.tree.map(lambda x: jax.P(names) if x.ndim else jax.P(), tree)
    function = jax.shard_map(
        lambda *given: _rounds(call, *given), in_specs=(jax.P(), specs(rows), specs(segment_ids)), out_specs=specs(rows),
        axis_names=set(names), check_vma=False,
    )  # fmt: skip
    return function(params, rows, segment_ids)


def _rounds(call: Callable, params: PyTree, rows: PyTree, segment_ids: jax.Array | None) -> PyTree:
    """`pass_state` of the rows of a device."""
    index, count = jax.lax.axis_index(SEQUENCE_AXIS), axis_size(SEQUENCE_AXIS, AxisType.Manual)
    num_rows, length = jax.tree.leaves(rows)[0].shape[:2]
    of_row = lambda row: jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, row, 1) if x.ndim else x, (rows, segment_ids))

    def work(received, number):
        mine, ids = of_row(jnp.clip(number - index, 0, num_rows - 1))
        state, position, last = received if ids is None else _continued(received, ids)
        within = None if ids is None else ids - ids[:, :1]  # a call counts its own documents
        outputs, state = call(params, mine, state, Context(position, within, update=True))
        return _to_the_right((state, position + length, None if ids is None else ids[:, -1])), outputs

    mine, ids = of_row(0)
    shapes = jax.eval_shape(lambda mine: call(params, mine, None, Context(None, ids, update=True))[1], mine)
    state, zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes), jnp.zeros(1, jnp.int32)
    _, outputs = jax.lax.scan(work, (state, zero, None if ids is None else zero), jnp.arange(num_rows + count - 1))
    own = lambda x: jax.lax.dynamic_slice_in_dim(x, index, num_rows)[:, 0] if x.ndim > 1 else x[0]
    return jax.tree.map(own, outputs)


def _continued(received: PyTree, segment_ids: jax.Array) -> PyTree:
    """What the left neighbour sent, (state, position, document); nothing was read where another document begins."""
    goes_on = segment_ids[:, 0] == received[-1]
    return jax.tree.map(lambda x: jnp.where(jnp.expand_dims(goes_on, range(1, x.ndim)), x, jnp.zeros_like(x)), received)


def _to_the_right(tree: PyTree) -> PyTree:
    """Each device gets what its left neighbour holds, the first one zeros."""
    count = axis_size(SEQUENCE_AXIS, AxisType.Manual)
    return jax.lax.ppermute(tree, SEQUENCE_AXIS, [(device, device + 1) for device in range(count - 1)])
