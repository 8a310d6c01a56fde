"""The gated delta rule and token-wise delta gradient descent by Pallas kernels, forward and backward: those for TPU, which are here, and
for NVIDIA GPUs (`delta_rule_gpu.py`).

Both rules are S_t = a_t S_{t-1} + k_t (rate_t v_t - erase_t S_{t-1}^T k_t)^T, y_t = S_t^T q_t. The delta rule decays S before it
erases, so its erase is e^{g_t} times the erasing strength; DGD erases from S as it was, so its erase is 2 eta, or eta for 'dot', with
no decay.

On TPU the grid is (batch x heads, chunks). The state stays in VMEM from chunk to chunk, and decays, triangular solve, write and read
of a chunk happen between one load of its tokens and one store of y. The backward kernel goes over the chunks in reverse, from the states
they started from, and differentiates the same chunk. All products are in float32.

Those for TPU have never run on one yet: tested in interpret mode, and compiled ahead of time for v5e.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from nested_jax.memory import matrix
from nested_jax.memory.kernels import chunk_scan, delta_rule_gpu, tiles
from nested_jax.memory.kernels.tiles import dot

_SUBLANES = 16  # rows of a bfloat16 tile


def delta_rule(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    beta: jax.Array,
    log_decay: jax.Array | None = None,
    *,
    erase: jax.Array | None = None,
    state: jax.Array | None = None,
    initial: jax.Array | None = None,
    chunk_size: int = 64,
    platform: str = 'tpu',
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """`nested_jax.memory.matrix.delta_rule` by kernels; arXiv:2412.06464v3, Eq. (10).

    Args:
        q, k, v, beta, log_decay, erase, state, initial: as there, in float32 or bfloat16. There are no segments. On 'gpu' v is bfloat16, to
            which q and k are rounded, D_k is 64 or 128 and D_v a multiple of 64.
        chunk_size: tokens computed in parallel, a multiple of 16, and 64 on 'gpu'.
        platform: 'tpu' or 'gpu'.
        interpret: run the kernels step by step on any platform.

    Returns:
        (B, T, H, D_v) y in q's dtype, and the last state (B, H, D_k, D_v) in float32.

    Raises:
        ValueError: for shapes that don't fit one another or the platform, another dtype or chunk_size.
    """
    gates = {'beta': beta, 'log_decay': log_decay, 'erase': erase}
    _check(q, k, v, gates, state, initial, chunk_size, platform)
    decay = jnp.zeros(beta.shape, jnp.float32) if log_decay is None else log_decay.astype(jnp.float32)
    erase = (beta if erase is None else erase).astype(jnp.float32) * jnp.exp(decay)
    return _run(q, k, v, (beta, erase, decay), state, initial, chunk_size, platform, interpret)


def delta_gradient_descent(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    eta: jax.Array,
    log_alpha: jax.Array,
    *,
    objective: str = 'l2',
    state: jax.Array | None = None,
    initial: jax.Array | None = None,
    chunk_size: int = 64,
    platform: str = 'tpu',
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """`nested_jax.memory.matrix.delta_gradient_descent` with gradient='token' and read='running' by kernels.

    Eq. (88), arXiv:2512.24695v1, transposed.

    Args:
        q, k, v, eta, log_alpha, objective, state, initial: as there, in dtypes and sizes as for `delta_rule`. There are no segments.
        chunk_size, platform, interpret: as in `delta_rule`.

    Returns:
        (B, T, H, D_v) y in q's dtype, and the last state (B, H, D_k, D_v) in float32.

    Raises:
        ValueError: for an unknown objective, and as in `delta_rule`.
    """
    if objective not in ('l2', 'dot'):
        raise ValueError(f"objective must be one of ('l2', 'dot'), got {objective!r}")
    _check(q, k, v, {'eta': eta, 'log_alpha': log_alpha}, state, initial, chunk_size, platform)
    gates = (eta, 2 * eta if objective == 'l2' else eta, log_alpha)
    return _run(q, k, v, gates, state, initial, chunk_size, platform, interpret)


def _check(q, k, v, gates, state, initial, chunk_size, platform) -> None:
    size = matrix.check_arguments(q, k, v, gates, state, initial, None, chunk_size, grid=False)
    if platform not in ('tpu', 'gpu'):
        raise ValueError(f"platform must be one of ('tpu', 'gpu'), got {platform!r}")
    if size % _SUBLANES:
        raise ValueError(f'chunk_size must be a multiple of {_SUBLANES}, got {chunk_size}')
    arrays = {'q': q, 'k': k, 'v': v, 'state': state, 'initial': initial} | gates
    for name, array in arrays.items():
        if array is not None and array.dtype not in (jnp.float32, jnp.bfloat16):
            raise ValueError(f'{name} must be float32 or bfloat16, got {array.dtype}')
    if platform == 'gpu':
        _check_gpu(k, v, size)


def _check_gpu(k, v, size: int) -> None:
    if v.dtype != jnp.bfloat16:
        raise ValueError(f"v must be bfloat16 on 'gpu', got {v.dtype}")
    if not chunk_scan.fits(size, k.shape[3], v.shape[3]):
        sizes = f'chunk_size {chunk_scan.WRITES}, D_k of {chunk_scan.DIMS} and D_v a multiple of {chunk_scan.COLUMNS}'
        raise ValueError(f"'gpu' takes {sizes}, got {size}, {k.shape[3]} and {v.shape[3]}")


def _run(q, k, v, gates, state, initial, chunk_size, platform, interpret) -> tuple[jax.Array, jax.Array]:
    """Pad to whole chunks with tokens that write nothing, put heads before time, and take both back."""
    batch, time, heads, dim_v = v.shape
    count = -(-time // chunk_size)
    pad = lambda x: jnp.pad(x, [(0, 0), (0, count * chunk_size - time)] + [(0, 0)] * (x.ndim - 2))
    rows = lambda x: jnp.moveaxis(pad(jnp.broadcast_to(x, (*x.shape[:2], heads, x.shape[3]))), 2, 1)
    gates = jnp.stack([jnp.moveaxis(pad(gate.astype(jnp.float32)), 2, 1) for gate in gates], 2)
    gates = jnp.moveaxis(gates.reshape(batch, heads, 3, count, chunk_size), 2, 3)
    if state is None:
        state = jnp.zeros((heads, k.shape[3], dim_v)) if initial is None else initial
    state = jnp.broadcast_to(state.astype(jnp.float32), (batch, heads, k.shape[3], dim_v))
    memory = delta_rule_gpu.memory if platform == 'gpu' else _memory_tpu
    y, last = memory(rows(q), rows(k), rows(v), gates, state, interpret)
    return jnp.moveaxis(y, 1, 2)[:, :time], last


def _memory_tpu(q, k, v, gates, state, interpret) -> tuple[jax.Array, jax.Array]:
    """`delta_rule_gpu.memory` on TPU."""
    merge = lambda x: x.reshape(-1, *x.shape[2:])
    results = _memory(*map(merge, (q, k, v, gates, state)), interpret)
    return tuple(x.reshape(*q.shape[:2], *x.shape[1:]) for x in results)


# The kernels for TPU. r batch x heads; q, k (R, T, D_k), v (R, T, D_v), gates (R, N, 3, C) rate, erase, log decay, state (R, D_k, D_v)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _memory(q, k, v, gates, state, interpret):
    return _forward(q, k, v, gates, state, interpret, keep_starts=False)


def _memory_forward(q, k, v, gates, state, interpret):
    y, last, starts = _forward(q, k, v, gates, state, interpret, keep_starts=True)
    return (y, last), (q, k, v, gates, starts)


def _memory_backward(interpret, saved, cotangents):
    q, k, v, gates, starts = saved
    count = gates.shape[1]
    blocks = _blocks(q, v, gates, lambda n: count - 1 - n)
    inputs = [blocks[name] for name in ('key', 'key', 'value', 'gates', 'starts', 'value', 'state')]
    outputs = [blocks[name] for name in ('key', 'key', 'value', 'gates', 'state')]
    state = jax.ShapeDtypeStruct((starts.shape[0], *starts.shape[2:]), jnp.float32)
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v, gates)] + [state]
    return tuple(
        _call(_backward_kernel, (q.shape[0], count), inputs, outputs, shapes, state, interpret)(q, k, v, gates, starts, *cotangents)
    )


_memory.defvjp(_memory_forward, _memory_backward)


def _forward(q, k, v, gates, state, interpret, *, keep_starts: bool):
    """y and the last state, and with `keep_starts` the states (R, N, D_k, D_v) that chunks start from."""
    grid = gates.shape[:2]
    blocks = _blocks(q, v, gates, lambda n: n)
    names = ['value', 'state'] + ['starts'] * keep_starts
    shapes = [jax.ShapeDtypeStruct(v.shape, q.dtype), jax.ShapeDtypeStruct(state.shape, jnp.float32)]
    shapes += [jax.ShapeDtypeStruct((*grid, *state.shape[1:]), jnp.float32)] * keep_starts
    inputs = [blocks[name] for name in ('key', 'key', 'value', 'gates', 'state')]
    call = _call(_forward_kernel, grid, inputs, [blocks[name] for name in names], shapes, state, interpret)
    return tuple(call(q, k, v, gates, state))


def _blocks(q, v, gates, order) -> dict[str, pl.BlockSpec]:
    """What one program sees of each array, when its n-th step is chunk order(n)."""
    size, dim_k, dim_v = gates.shape[3], q.shape[2], v.shape[2]
    return {
        'key': pl.BlockSpec((1, size, dim_k), lambda r, n: (r, order(n), 0)),
        'value': pl.BlockSpec((1, size, dim_v), lambda r, n: (r, order(n), 0)),
        'gates': pl.BlockSpec((1, 1, 3, size), lambda r, n: (r, order(n), 0, 0)),
        'starts': pl.BlockSpec((1, 1, dim_k, dim_v), lambda r, n: (r, order(n), 0, 0)),
        'state': pl.BlockSpec((1, dim_k, dim_v), lambda r, n: (r, 0, 0)),
    }


def _call(kernel, grid, inputs, outputs, shapes, state, interpret):
    return pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=inputs,
        out_specs=outputs,
        out_shape=shapes,
        scratch_shapes=[pltpu.VMEM(state.shape[1:], jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=('parallel', 'arbitrary')),
        interpret=interpret,
    )


def _forward_kernel(q, k, v, gates, state, y, last, *rest):
    *starts, memory = rest

    @pl.when(pl.program_id(1) == 0)
    def _():
        memory[...] = state[0]

    for start in starts:
        start[0, 0] = memory[...]
    memory[...], rows = _chunk(memory[...], *_load(q, k, v, gates))
    y[0] = rows.astype(y.dtype)
    last[0] = memory[...]


def _backward_kernel(q, k, v, gates, start, y_bar, last_bar, q_bar, k_bar, v_bar, gates_bar, state_bar, memory_bar):
    @pl.when(pl.program_id(1) == 0)
    def _():
        memory_bar[...] = last_bar[0]

    _, pull = jax.vjp(_chunk, start[0, 0], *_load(q, k, v, gates))
    memory, *tokens, rate, erase, log_decay = pull((memory_bar[...], y_bar[0].astype(jnp.float32)))
    for ref, value in zip((q_bar, k_bar, v_bar), tokens, strict=True):
        ref[0] = value.astype(ref.dtype)
    for row, value in enumerate((rate, erase, log_decay)):
        gates_bar[0, 0, row : row + 1] = value
    memory_bar[...] = memory
    state_bar[0] = memory


def _load(q, k, v, gates):
    """q, k, v (C, D) in float32 and the three gates (1, C)."""
    return *(x[0].astype(jnp.float32) for x in (q, k, v)), *(gates[0, 0, row : row + 1] for row in range(3))


def _chunk(memory, q, k, v, rate, erase, log_decay):
    """The memory (D_k, D_v) after a chunk, and its reads (C, D_v); gates are (1, C)."""
    row, column = tiles.indices(q.shape[0])
    log_decay = jnp.maximum(log_decay, tiles.LOG_ZERO)
    kept, before, after = (jnp.exp(tiles.sums(log_decay, mask)) for mask in (column <= row, column < row, column > row))
    spans, spans_before = tiles.spans(log_decay, column <= row), tiles.spans(log_decay, column < row)
    rate, erase = tiles.as_column(rate), tiles.as_column(erase)
    rows = rate * v - erase * before * dot(k, memory, 1, 0)
    writes = dot(tiles.invert(erase * spans_before * dot(k, k, 1, 1)), rows, 1, 0)
    y = kept * dot(q, memory, 1, 0) + dot(spans * dot(q, k, 1, 1), writes, 1, 0)
    kept_last = jnp.exp(jnp.sum(log_decay, 1, keepdims=True))
    return kept_last * memory + dot(after * k, writes, 0, 0), y
