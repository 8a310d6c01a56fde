"""The GPU's kernel of states between chunks, and the delta rules on it: interpreted, lowered for CUDA, and on a GPU where there is one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from nested_jax.memory import matrix
from nested_jax.memory.kernels import chunk_scan as kernel
from nested_jax.memory.kernels import delta_rule as kernels
from nested_jax.memory.kernels import delta_rule_gpu

INTERPRETED = pytest.mark.skipif(
    not hasattr(plgpu, 'InterpretGPUParams'), reason='jax before 0.11 has no public interpreter of GPU kernels'
)
ON_GPU = pytest.mark.gpu, pytest.mark.skipif(jax.default_backend() != 'gpu', reason='no GPU')
RULES = {
    'delta': ('delta_rule', {}),
    'dgd-l2': ('delta_gradient_descent', {'objective': 'l2'}),
    'dgd-dot': ('delta_gradient_descent', {'objective': 'dot'}),
}


def operands(heads: int, count: int, writes: int, dim_k: int, dim_v: int, batch: int = 1):
    """A, B, U, keep and S_0."""
    normal = lambda seed, *shape: jax.random.normal(jax.random.key(seed), (batch, heads, *shape))
    narrow = lambda x: x.astype(jnp.bfloat16)
    keep = jax.random.uniform(jax.random.key(3), (batch, heads, count, dim_k))
    a, b = (narrow(0.1 * normal(seed, count, writes, dim_k)) for seed in (0, 1))
    return a, b, narrow(normal(2, count, writes, dim_v)), keep, normal(4, dim_k, dim_v)


def with_gradients(scan, given):
    """Its results, and the gradients of a function that weighs each of their numbers differently."""

    def loss(given):
        results = scan(*given)
        weights = [jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape) for x in results]
        return sum(jnp.sum(weight * x) for weight, x in zip(weights, results, strict=True)), results

    gradients, results = jax.jit(jax.grad(loss, has_aux=True))(given)
    return *results, *gradients


def close(got, expected, tolerance: float):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        a, b = (np.asarray(x, np.float32) for x in (a, b))
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * max(np.abs(b).max(), 1e-6))


def test_twin_follows_the_equation():
    given = operands(2, 3, 4, 5, 6)
    starts, written, last = (x[0] for x in kernel.chunk_scan_reference(*given))
    wide = lambda x: np.asarray(x, np.float64)
    a, b, u, keep, state = (x[0] for x in given)
    for row in range(2):
        memory = wide(state)[row]
        for n in range(3):
            close(wide(starts[row, n]), memory, 1e-2)
            rows = wide(u)[row, n] + wide(a)[row, n] @ memory
            close(wide(written[row, n]), rows, 1e-2)
            memory = wide(keep)[row, n][:, None] * memory + wide(b)[row, n].T @ rows
        close(wide(last)[row], memory, 1e-5)


@pytest.mark.parametrize('place', [pytest.param('interpreted', marks=INTERPRETED), pytest.param('gpu', marks=ON_GPU)])
@pytest.mark.parametrize('shape', [(2, 5, 64, 64, 64), (1, 2, 64, 128, 128), (1, 1, 64, 128, 64)], ids=str)
def test_kernel_equals_twin_with_gradients(shape, place):
    given = operands(*shape)
    scan = functools.partial(kernel.chunk_scan, interpret=place == 'interpreted')
    close(with_gradients(lambda *given: scan(*given), given), with_gradients(kernel.chunk_scan_reference, given), 2e-2)


@pytest.mark.parametrize('dim', [64, 128])
def test_lowers_for_cuda(dim):
    given = operands(2, 5, 64, dim, dim)
    loss = lambda given: sum(jnp.sum(x.astype(jnp.float32)) for x in kernel.chunk_scan(*given))
    lowered = jax.jit(jax.grad(loss)).trace(given).lower(lowering_platforms=('cuda',)).as_text()
    assert lowered.count('custom_call @mosaic_gpu') == 2


def plain_scan(a, b, u, added, keep, state, backwards, interpret):
    """What the kernel computes, in both directions."""
    count, starts, written, wide = a.shape[2], {}, {}, lambda x: x.astype(jnp.float32)
    for n in reversed(range(count)) if backwards else range(count):
        starts[n] = state.astype(jnp.bfloat16)
        written[n] = wide(u[:, :, n]) + wide(a[:, :, n]) @ state
        state = keep[:, :, n, :, None] * state + wide(b[:, :, n]).mT @ written[n]
        state += 0.0 if added is None else wide(added[:, :, n])
    stack = lambda parts: jnp.stack([parts[n].astype(jnp.bfloat16) for n in range(count)], 2)
    return stack(starts), stack(written), state


@pytest.mark.parametrize('axes', [('data', 'tensor'), ('data', None), (None, 'tensor')], ids=str)
def test_derivative_is_the_twins_and_splits_by_batch_and_head(axes, monkeypatch):
    shapes = []
    scan = lambda *args: shapes.append(args[0].shape[:2]) or plain_scan(*args)
    monkeypatch.setattr(kernel, '_scan', scan)  # the kernel itself runs on GPUs only
    given = operands(4, 3, 4, 5, 6, batch=4)
    mesh = jax.make_mesh((2, 4), ('data', 'tensor'), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    split = jax.device_put(given, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes)))
    program = jax.jit(lambda given: with_gradients(kernel.chunk_scan, given)).lower(split).compile()
    assert 'all-gather' not in program.as_text()
    assert (4 // (2 if axes[0] else 1), 4 // (4 if axes[1] else 1)) in shapes
    close(program(split), with_gradients(kernel.chunk_scan_reference, given), 2e-2)


def delta_arguments(time: int = 130, dim: int = 64):
    """q, k, v, gate, log decay and state; keys of norm 1."""
    rng = np.random.default_rng(0)
    rows = (1, time, 2)
    k = rng.normal(size=(*rows, dim))
    log_decay = -np.exp(rng.normal(size=rows))
    gate = rng.uniform(0.1, 0.9, size=rows) * (1 + np.exp(log_decay)) / 2
    tokens = rng.normal(size=(*rows, dim)), k / np.linalg.norm(k, axis=-1, keepdims=True), rng.normal(size=(*rows, dim))
    state = rng.normal(size=(1, 2, dim, dim))
    return *(jnp.asarray(x, jnp.bfloat16) for x in tokens), *(jnp.asarray(x, jnp.float32) for x in (gate, log_decay, state))


def run_rule(module, rule: str, given, **options):
    """y, the last state and the gradients of a function of both."""
    name, more = RULES[rule]
    loss_of = lambda *given: getattr(module, name)(*given[:-1], state=given[-1], chunk_size=64, **more, **options)
    return with_gradients(loss_of, given)


@pytest.mark.parametrize('place', ['twin', pytest.param('gpu', marks=ON_GPU)])
@pytest.mark.parametrize('rule', RULES)
def test_delta_rules_equal_the_plain_form(rule, place, monkeypatch):
    if place == 'twin':
        monkeypatch.setattr(delta_rule_gpu, 'chunk_scan', lambda *given: kernel.chunk_scan_reference(*given[:-1]))
    given = delta_arguments()
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), given)
    with jax.default_matmul_precision('highest'):
        expected = run_rule(matrix, rule, wide)
    got = run_rule(kernels, rule, given, platform='gpu')
    assert [x.dtype for x in got[:2]] == [jnp.bfloat16, jnp.float32] and [x.dtype for x in got[2:]] == [x.dtype for x in given]
    close(jax.tree.map(lambda x: x.astype(jnp.float32), got), expected, 4e-2)


def test_memories_that_forget_all(monkeypatch):
    monkeypatch.setattr(delta_rule_gpu, 'chunk_scan', lambda *given: kernel.chunk_scan_reference(*given[:-1]))
    q, k, v, gate, log_decay, state = delta_arguments()
    given = q, k, v, gate, log_decay.at[:, 20].set(-jnp.inf), state
    got = run_rule(kernels, 'delta', given, platform='gpu')
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in got)
    close(got[0].astype(jnp.float32), matrix.delta_rule(*(x.astype(jnp.float32) for x in given[:-1]), state=state)[0], 4e-2)


def test_reads_have_the_dtype_of_queries(monkeypatch):
    monkeypatch.setattr(delta_rule_gpu, 'chunk_scan', lambda *given: kernel.chunk_scan_reference(*given[:-1]))
    q, k, v, gate, log_decay, _ = delta_arguments(time=70)
    narrow = kernels.delta_rule(q, k, v, gate, log_decay, platform='gpu')[0]
    wide = kernels.delta_rule(q.astype(jnp.float32), k.astype(jnp.float32), v, gate, log_decay, platform='gpu')[0]
    assert wide.dtype == jnp.float32
    np.testing.assert_array_equal(wide, narrow.astype(jnp.float32))


def test_what_it_does_not_take():
    q, k, v, gate, *_ = delta_arguments(time=4)
    with pytest.raises(ValueError, match="v must be bfloat16 on 'gpu', got float32"):
        kernels.delta_rule(q, k, v.astype(jnp.float32), gate, platform='gpu')
    with pytest.raises(ValueError, match="'gpu' takes chunk_size 64, D_k of .* got 32, 64 and 64"):
        kernels.delta_rule(q, k, v, gate, chunk_size=32, platform='gpu')
    with pytest.raises(ValueError, match="'gpu' takes chunk_size 64, D_k of .* got 64, 32 and 64"):
        kernels.delta_rule(q[..., :32], k[..., :32], v, gate, platform='gpu')
    with pytest.raises(ValueError, match="platform must be one of .* got 'cuda'"):
        kernels.delta_rule(q, k, v, gate, platform='cuda')
