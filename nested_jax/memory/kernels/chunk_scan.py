"""Mosaic GPU kernel for Hopper: the states that chunks of a matrix memory start from, forward and backward.

All chunk-parallel forms of `memory/matrix_chunks.py` come down to one recurrence over chunks,

    R_n = U_n + A_n S_n,    S_{n+1} = keep_n S_n + B_n^T R_n,

with the net writes R_n (C, D_v) of chunk n, and it is all that has to wait for the chunk before; U, A and B are products over all chunks at
once, which XLA does well. So is its derivative, with A and B in each other's place and a term added to the state:

    dR_n = R'_n + B_n dS_{n+1},    dS_n = keep_n dS_{n+1} + A_n^T dR_n + S'_n,

for the cotangents R', S' of its results. One kernel does both: a program for each head of a batch row and 64 columns of the state, which
stays in registers in float32 from the first chunk to the last, while the copy engine brings the next chunks' operands. Products take
bfloat16.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.custom_partitioning import custom_partitioning
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import NamedSharding, PartitionSpec

WRITES = 64  # of a chunk
DIMS = (64, 128)  # D_k; like the writes, rows of a warpgroup's matrix product
COLUMNS = 64  # of the state a program holds
_STAGES = 3  # chunks whose operands are in shared memory: 225 of 227 KiB for D_k = 128, backwards


def fits(writes: int, dim_k: int, dim_v: int) -> bool:
    """Whether the kernel takes chunks of so many writes to states (dim_k, dim_v)."""
    return writes == WRITES and dim_k in DIMS and dim_v % COLUMNS == 0


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def chunk_scan(a: jax.Array, b: jax.Array, u: jax.Array, keep: jax.Array, state: jax.Array, interpret: bool = False):
    """The recurrence of the module's header. Batch and heads may be split over devices.

    Args:
        a, b: (B, H, N, C, D_k) bfloat16, C = `WRITES` and D_k of `DIMS`.
        u: (B, H, N, C, D_v) bfloat16, D_v a multiple of `COLUMNS`.
        keep: (B, H, N, D_k) float32.
        state: (B, H, D_k, D_v) float32 S_0.
        interpret: run it step by step on any platform; needs jax 0.11.

    Returns:
        S_n (B, H, N, D_k, D_v) and R_n (B, H, N, C, D_v) in bfloat16, and S_N (B, H, D_k, D_v) in float32.
    """
    return _upwards(a, b, u, keep, state, interpret)


def chunk_scan_reference(a: jax.Array, b: jax.Array, u: jax.Array, keep: jax.Array, state: jax.Array):
    """Twin of `chunk_scan` in plain JAX: the same arguments and results, in float32 between."""
    wide = lambda x: jnp.moveaxis(x, 2, 0).astype(jnp.float32)

    def step(memory, chunk):
        a, b, u, keep = chunk
        written = u + jnp.einsum('bhck,bhkv->bhcv', a, memory, precision='highest')
        return keep[..., None] * memory + jnp.einsum('bhck,bhcv->bhkv', b, written, precision='highest'), (memory, written)

    last, results = jax.lax.scan(step, state, tuple(map(wide, (a, b, u, keep))))
    return *(jnp.moveaxis(x, 0, 2).astype(jnp.bfloat16) for x in results), last


def _chunk_scan_forward(a, b, u, keep, state, interpret):
    starts, rows, last = _upwards(a, b, u, keep, state, interpret)
    return (starts, rows, last), (a, b, keep, starts, rows)


def _chunk_scan_backward(interpret, saved, cotangents):
    a, b, keep, starts, rows = saved
    starts_bar, rows_bar, last_bar = cotangents
    after_bar, rows_bar, state_bar = _downwards(b, a, rows_bar, starts_bar, keep, last_bar, interpret)
    product = lambda x, y: jnp.einsum('bhncv,bhnkv->bhnck', x, y, preferred_element_type=jnp.float32).astype(jnp.bfloat16)
    keep_bar = jnp.einsum('bhnkv,bhnkv->bhnk', after_bar, starts, preferred_element_type=jnp.float32)
    return product(rows_bar, starts), product(rows, after_bar), rows_bar, keep_bar, state_bar


chunk_scan.defvjp(_chunk_scan_forward, _chunk_scan_backward)


def _by_batch_and_head(operands: str):
    """Decorator: a program for several devices calls the function on each one's batches and heads, but where it is interpreted."""

    def decorate(function):
        whole = lambda *arrays: function(*arrays, False)
        split = custom_partitioning(whole)

        def partition(mesh, arguments, results):
            here = lambda x: NamedSharding(mesh, PartitionSpec(*(*x.sharding.spec, None, None)[:2]))
            return mesh, whole, jax.tree.map(here, results), jax.tree.map(here, arguments)

        rule = f'{operands} -> b h n k v, b h n c v, b h k v'
        split.def_partition(partition, sharding_rule=rule, need_replication_factors=('n', 'c', 'k', 'v'))
        return lambda *args: function(*args) if args[-1] else split(*args[:-1])

    return decorate


@_by_batch_and_head('b h n c k, b h n c k, b h n c v, b h n k, b h k v')
def _upwards(a, b, u, keep, state, interpret):
    """The recurrence from the first chunk to the last."""
    return _scan(a, b, u, None, keep, state, False, interpret)


@_by_batch_and_head('b h n c k, b h n c k, b h n c v, b h n k v, b h n k, b h k v')
def _downwards(a, b, u, added, keep, state, interpret):
    """The same from the last chunk to the first, with a term `added` to every state."""
    return _scan(a, b, u, added, keep, state, True, interpret)


def _scan(a, b, u, added, keep, state, backwards: bool, interpret: bool):
    """R_n = U_n + A_n S_n and S_{n+1} = keep_n S_n + B_n^T R_n + `added`_n on one device: all S_n, all R_n, the last S."""
    batch, heads, count, writes, dim_k = a.shape
    dim_v = u.shape[4]
    operands, widths = [a, b, u], [(writes, dim_k), (writes, dim_k), (writes, COLUMNS)]
    if added is not None:
        operands, widths = [*operands, added], [*widths, (dim_k, COLUMNS)]
    operands, widths = [*operands, keep], [*widths, (dim_k,)]
    merge = lambda x: x.reshape(batch * heads, *x.shape[2:])
    stages = min(_STAGES, count)
    kernel = plgpu.kernel(
        functools.partial(_kernel, count=count, stages=stages, backwards=backwards),
        out_type=[
            jax.ShapeDtypeStruct((batch * heads, count, dim_k, dim_v), jnp.bfloat16),
            jax.ShapeDtypeStruct((batch * heads, count, writes, dim_v), jnp.bfloat16),
            jax.ShapeDtypeStruct((batch * heads, dim_k, dim_v), jnp.float32),
        ],
        grid=(dim_v // COLUMNS, batch * heads),
        grid_names=('columns', 'row'),
        scratch_types=dict(
            loaded=[plgpu.SMEM((stages, *width), x.dtype) for x, width in zip(operands, widths, strict=True)],
            memory=plgpu.SMEM((dim_k, COLUMNS), jnp.bfloat16),
            written=plgpu.SMEM((writes, COLUMNS), jnp.bfloat16),
            wide=plgpu.SMEM((dim_k, COLUMNS), jnp.float32),
            arrived=plgpu.Barrier(num_arrivals=len(operands), num_barriers=stages),
            begun=plgpu.Barrier(),
        ),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
    )
    return tuple(x.reshape(batch, heads, *x.shape[1:]) for x in kernel(*map(merge, operands), merge(state)))


def _kernel(*refs, loaded, memory, written, wide, arrived, begun, count: int, stages: int, backwards: bool):
    *operands, state, starts, rows, last = refs
    row, columns = jax.lax.axis_index('row'), pl.ds(jax.lax.axis_index('columns') * COLUMNS, COLUMNS)
    a, b, u, *added, keep = loaded
    chunk = lambda step: count - 1 - step if backwards else step

    def load(step, slot):
        for source, target in zip(operands, loaded, strict=True):
            whole = target.shape[-1] == source.shape[-1]  # else these columns of it
            part = (row, chunk(step)) if whole else (row, chunk(step), slice(None), columns)
            plgpu.copy_gmem_to_smem(source.at[part], target.at[slot], arrived.at[slot])

    plgpu.copy_gmem_to_smem(state.at[row, :, columns], wide, begun)
    for step in range(stages):
        load(step, step)
    plgpu.barrier_wait(begun)

    def body(step, value):
        slot = jax.lax.rem(step, stages)
        memory[...] = value.astype(jnp.bfloat16)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(memory, starts.at[row, chunk(step), :, columns])
        plgpu.barrier_wait(arrived.at[slot])
        recalled = _product(a.at[slot], memory, (a.shape[1], COLUMNS))
        written[...] = (recalled + u[slot].astype(jnp.float32)).astype(jnp.bfloat16)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(written, rows.at[row, chunk(step), :, columns])
        value = jax.lax.broadcast_in_dim(keep[slot], value.shape, (0,)) * value
        value += _product(b.at[slot].transpose((1, 0)), written, value.shape)
        for extra in added:
            value += extra[slot].astype(jnp.float32)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # and a barrier: all threads have read the slot that is filled anew

        @pl.when(step + stages < count)
        def _():
            load(step + stages, slot)

        return value

    value = jax.lax.fori_loop(0, count, body, wide[...])
    wide[...] = value
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(wide, last.at[row, :, columns])
    plgpu.wait_smem_to_gmem(0)


def _product(left, right, shape: tuple[int, int]):
    """Of two matrices in shared memory, in float32."""

    def multiply(sum_ref):
        plgpu.wgmma(sum_ref, left, right)
        return sum_ref[...]

    return pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))
