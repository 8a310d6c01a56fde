"""What the suite 'gpu' measures, a cell at a time, the most telling first; each is checked before it is timed.

Floating-point operations are stated in two ways. Model FLOPs of a token are six for each parameter of a matrix product, the head's too,
and those of causal attention, half of the square, forward and backward; writes and reads of memories count nothing. Algorithmic FLOPs are
the matrix products of the traced gradient of the plain program: with the inner gradients, the whole square of attention, and what the
backward pass computes again. MFU is the former's share of the card's peak in dense bfloat16.

A small form of every cell runs on any device, to see that it works; its numbers mean nothing.
"""

import contextlib
import dataclasses
import importlib
import importlib.util
import time
import unittest.mock
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nested_jax.config import LevelConfig, ModelConfig
from nested_jax.layers.kernels import use_kernels
from nested_jax.memory import chunk, matrix, matrix_chunks, triangular
from nested_jax.memory.kernels.chunk_scan import WRITES, fits
from nested_jax.models import LanguageModel, preset
from nested_jax.models.loss import model_loss
from nested_jax.training.compiled import matrix_flops
from nested_jax.training.config import TrainConfig
from nested_jax.training.optimizer import make_optimizer
from nested_jax.training.state import init_state
from nested_jax.training.step import make_train_step
from scripts.benchmarks.timing import Settings, compile_timed, measure, num_parameters

PEAK_FLOPS = {'H100': 989e12, 'H200': 989e12}  # dense bfloat16, SXM
TRAINING_S = 15.0  # of a model's steps: no further one begins after these
_TINY = dict(num_layers=1, width=16, num_heads=1, head_dim=16, levels=(LevelConfig(16, 512),), vocab_size=32)


class Cell(NamedTuple):
    """One measurement."""

    name: str
    budget_s: float  # after which it is given up
    run: Callable[[Settings], list[dict]]
    slow_to_compile: bool = False  # has programs of its own to prepare


# Kernels. Shapes are (batch, time, heads, dim)


class Shape(NamedTuple):
    """Of queries, keys and values."""

    batch: int
    time: int
    heads: int
    dim: int


SHAPES = (Shape(8, 4096, 12, 64), Shape(2, 16_384, 16, 128))  # of the 124m presets, and one that flash-linear-attention publishes


def shapes(settings: Settings) -> tuple[Shape, ...]:
    """Of this run."""
    return (Shape(1, 64, 1, 16),) if settings.smoke else SHAPES


def delta_rule_inputs(shape: Shape, dtype) -> tuple[jax.Array, ...]:
    """Queries and keys of norm 1 and values in `dtype`; beta and log decays in float32."""
    keys = jax.random.split(jax.random.key(0), 5)
    rows = lambda key: jax.random.normal(key, shape)
    unit = lambda x: (x / jnp.linalg.norm(x, axis=-1, keepdims=True)).astype(dtype)
    gate = lambda key: jax.random.uniform(key, shape[:3])
    return unit(rows(keys[0])), unit(rows(keys[1])), rows(keys[2]).astype(dtype), gate(keys[3]), jnp.log1p(-0.1 * gate(keys[4]))


def delta_rule_reference(shape: Shape, gated: bool = True) -> tuple[tuple[jax.Array, ...], list[jax.Array]]:
    """Inputs of at most 256 tokens, and the outputs and gradients of the token-by-token form in float32."""
    inputs = delta_rule_inputs(shape._replace(batch=1, time=min(shape.time, 256)), jnp.float32)[: 5 if gated else 4]
    rule = lambda *args: matrix.delta_rule_reference(*args)[0]
    with jax.default_matmul_precision('highest'):
        return inputs, jax.jit(lambda inputs: [rule(*inputs), *gradients(rule, inputs)])(inputs)


def gradients(rule: Callable, inputs: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """Those of the sum of a rule's squared outputs with respect to every input."""
    return jax.grad(lambda inputs: jnp.sum(rule(*inputs).astype(jnp.float32) ** 2))(inputs)


def largest_error(got, expected) -> float:
    """Over arrays, the largest difference relative to the array's largest value; RuntimeError at 5e-2, more than bfloat16 explains."""
    wide = lambda x: np.asarray(x, np.float32)
    error = max(
        float(np.abs(wide(a) - wide(b)).max() / np.abs(wide(b)).max()) for a, b in zip(got, expected, strict=True)
    )  # NaN is no number below the limit either
    if not error < 5e-2:
        raise RuntimeError(f'differs from the float32 reference by {error:.1e}')
    return error


def plain_delta_rule(chunk_size: int, dtype: str, precision: str) -> Callable[[Settings], list[dict]]:
    """The plain-JAX form, forward and backward. `precision` is that of the products that are otherwise computed at the highest."""

    def run(settings: Settings) -> list[dict]:
        rule = lambda *args: matrix.delta_rule(*args, chunk_size=chunk_size)[0]
        name = f'jax, chunk {chunk_size}, {dtype}, {precision}'
        with all_products(precision):
            return [time_rule(rule, name, shape, settings, dtype=dtype) for shape in shapes(settings)]

    return run


def kernel_delta_rule(gated: bool) -> Callable[[Settings], list[dict]]:
    """With the kernel of a GPU."""

    def run(settings: Settings) -> list[dict]:
        rule = lambda *args: matrix.delta_rule(*args, implementation='pallas_gpu')[0]
        sizes = [shape for shape in shapes(settings) if fits(WRITES, shape.dim, shape.dim) and jax.default_backend() == 'gpu']
        return [time_rule(rule, 'kernel', shape, settings, gated=gated) for shape in sizes]

    return run


def time_rule(rule: Callable, name: str, shape: Shape, settings: Settings, *, dtype: str = 'bfloat16', gated: bool = True) -> dict:
    """A row of one of our forms, forward and backward, checked against the reference."""
    inputs, expected = delta_rule_reference(shape, gated)
    as_given = lambda inputs: (*(x.astype(dtype) for x in inputs[:3]), *inputs[3:])
    both = jax.jit(lambda inputs: [rule(*inputs), *gradients(rule, inputs)])
    error = largest_error(both(as_given(inputs)), expected)
    inputs = delta_rule_inputs(shape, dtype)[: len(inputs)]
    forward, _ = compile_timed(lambda inputs: rule(*inputs), inputs)
    backward, seconds = compile_timed(lambda inputs: gradients(rule, inputs), inputs)
    return kernel_row(rule_name(gated), name, shape, error) | kernel_times(
        lambda: jax.block_until_ready(forward(inputs)), lambda: jax.block_until_ready(backward(inputs)), settings
    ) | dict(temporary_mib=backward.memory_analysis().temp_size_in_bytes / 2**20, compile_s=seconds)  # fmt: skip


def rule_name(gated: bool) -> str:
    """What a row is of."""
    return 'gated delta rule' if gated else 'delta rule'


@contextlib.contextmanager
def all_products(precision: str):
    """Puts another precision in the place of the highest, in the chunk-parallel forms."""
    value = jax.lax.Precision[precision.upper()]
    jax.clear_caches()  # what was traced before has the other one
    with contextlib.ExitStack() as stack:
        for module in (chunk, matrix_chunks, triangular):
            stack.enter_context(unittest.mock.patch.object(module, '_HIGHEST', value))
        yield
    jax.clear_caches()


def kernel_row(what: str, model: str, shape: Shape, error: float) -> dict:
    """What says which kernel it is."""
    return dict(what=what, model=model, **shape._asdict(), tokens=shape.batch * shape.time, error=error)


def kernel_times(forward: Callable, backward: Callable | None, settings: Settings) -> dict:
    """Milliseconds of a synchronised forward pass, and of a forward and backward one."""
    first = measure(forward, settings.repeats)
    if backward is None:
        return dict(forward_ms=1e3 * first.median, fastest_ms=1e3 * first.fastest, slowest_ms=1e3 * first.slowest)
    both = measure(backward, settings.repeats)
    return dict(forward_ms=1e3 * first.median, both_ms=1e3 * both.median, fastest_ms=1e3 * both.fastest, slowest_ms=1e3 * both.slowest)


def fla_delta_rule(shape: Shape, gated: bool, backward: bool = True) -> Callable[[Settings], list[dict]]:
    """flash-linear-attention's Triton kernels, checked against our reference. `backward`: forward and backward, else forward alone.

    Its gated backward pass raises with Triton 3.4 to 3.7.0 on Hopper, where it would be wrong, unless TileLang is there to do it.
    """

    def run(settings: Settings) -> list[dict]:
        if any(importlib.util.find_spec(name) is None for name in ('torch', 'fla')):
            print('flash-linear-attention cannot be imported here: that comparison is left out', flush=True)
            return []
        return [time_fla(shapes(settings)[0] if settings.smoke else shape, settings, gated, backward)]

    return run


def time_fla(shape: Shape, settings: Settings, gated: bool, backward: bool) -> dict:
    """A row of flash-linear-attention's kernel."""
    import torch

    # By name: no extra offers it, since it is of use with CUDA only (fla-core on the package index).
    module, name = ('gated_delta_rule', 'chunk_gated_delta_rule') if gated else ('delta_rule', 'chunk_delta_rule')
    kernel = getattr(importlib.import_module(f'fla.ops.{module}'), name)

    def tensors(inputs):
        made = [torch.tensor(np.asarray(x, np.float32), device='cuda') for x in inputs]
        return [x.to(torch.bfloat16).requires_grad_() for x in made[:3]] + [x.requires_grad_() for x in made[3:]]

    def rule(q, k, v, beta, *log_decay):
        return kernel(q=q, k=k, v=v, beta=beta, scale=1.0, **({'g': log_decay[0]} if gated else {}))[0]

    def synchronised(function):
        def call():
            function()
            torch.cuda.synchronize()

        return call

    inputs, expected = delta_rule_reference(shape, gated)
    gradients_of = lambda given, y: torch.autograd.grad((y.float() ** 2).sum(), given)
    given = tensors(inputs)
    y = rule(*given)
    got = [y, *gradients_of(given, y)] if backward else [y]
    error = largest_error([x.detach().float().cpu().numpy() for x in got], expected[: len(got)])
    given = tensors(delta_rule_inputs(shape, jnp.bfloat16)[: len(inputs)])
    both = synchronised(lambda: gradients_of(given, rule(*given))) if backward else None
    times = kernel_times(synchronised(lambda: rule(*given)), both, settings)
    return kernel_row(rule_name(gated), 'flash-linear-attention', shape, error) | times


def attention(implementation: str) -> Callable[[Settings], list[dict]]:
    """Causal softmax attention in bfloat16."""

    def run(settings: Settings) -> list[dict]:
        name = implementation if jax.default_backend() == 'gpu' else 'xla'
        attend = lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=name)
        plain = lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation='xla')
        both = lambda rule: jax.jit(lambda inputs: [rule(*inputs), *gradients(rule, inputs)])
        shape = shapes(settings)[0]
        inputs = delta_rule_inputs(shape._replace(batch=1, time=min(shape.time, 512)), jnp.float32)[:3]
        with jax.default_matmul_precision('highest'):
            expected = both(plain)(inputs)
        error = largest_error(both(attend)(tuple(x.astype(jnp.bfloat16) for x in inputs)), expected)
        inputs = delta_rule_inputs(shape, jnp.bfloat16)[:3]
        forward, _ = compile_timed(lambda inputs: attend(*inputs), inputs)
        backward, seconds = compile_timed(lambda inputs: gradients(attend, inputs), inputs)
        times = kernel_times(
            lambda: jax.block_until_ready(forward(inputs)), lambda: jax.block_until_ready(backward(inputs)), settings
        )  # fmt: skip
        return [kernel_row('attention', name, shape, error) | times | dict(compile_s=seconds)]

    return run


# Training


class Training(NamedTuple):
    """A model's training step: AdamW at every step, in bfloat16, on a GPU with its kernels."""

    name: str
    batch: int
    length: int
    accumulation: int = 1
    remat: str = 'block'
    chunk_size: int | None = None  # of the memories; the preset's where None
    scan_layers: bool = True  # False: all layers one after another in the program, which takes longer to compile
    kernels: str = 'gpu'  # of `nested_jax.layers.kernels`

    def __call__(self, settings: Settings) -> list[dict]:
        """The row of tokens a second."""
        job = self if not settings.smoke else self._replace(batch=2 * self.accumulation, length=32)
        options = dict(dtype='bfloat16', max_length=job.length, remat=self.remat, scan_layers=self.scan_layers)
        config = preset(self.name, **options, **(_TINY if settings.smoke else {}))
        if self.chunk_size is not None:
            memory = dataclasses.replace(config.memory, chunk_size=self.chunk_size, projection_chunk_size=self.chunk_size)
            config = dataclasses.replace(config, memory=memory)
        with use_kernels(self.kernels if jax.default_backend() == 'gpu' else 'plain'):
            # Two layers are checked: their programs, of which there are three, compile sooner than those of all layers one by one.
            error = check_loss(dataclasses.replace(config, num_layers=min(config.num_layers, 2)), min(job.length, 512))
            step, sizes = job.compile(config)
        if settings.prepare:
            return []
        seconds = measure(step, settings.repeats, TRAINING_S)
        tokens = job.batch * job.length
        flops = flops_of(config, job.length)
        rates = dict(
            tokens_per_second=tokens / seconds.median, slowest=tokens / seconds.slowest, fastest=tokens / seconds.fastest, runs=seconds.runs
        )
        stats = jax.devices()[0].memory_stats() or {}
        return [
            dict(what='training', model=self.name) | job._asdict() | dict(tokens_per_step=tokens, error=error) | rates | sizes | flops
            | shares(flops, rates['tokens_per_second']) | dict(device_peak_gib=stats.get('peak_bytes_in_use', 0) / 2**30)
        ]  # fmt: skip

    def compile(self, config: ModelConfig) -> tuple[Callable[[], object], dict]:
        """A step that goes on from the last one's state, synchronised; and what it needs."""
        model = LanguageModel(config)
        train = TrainConfig(batch_size=self.batch, sequence_length=self.length, accumulation=self.accumulation)
        optimizer = make_optimizer(train)
        tokens = jax.random.randint(jax.random.key(1), (self.batch, self.length), 0, config.vocab_size)
        state = jax.jit(lambda: init_state(lambda key: model.init(key, tokens[:1, :16])['params'], optimizer, 0))()
        step = make_train_step(lambda params, batch: model_loss(model, params, *batch), optimizer, self.accumulation)
        begun = time.perf_counter()
        compiled = jax.jit(step, donate_argnums=0).lower(state, (tokens, tokens)).compile()
        seconds, memory = time.perf_counter() - begun, compiled.memory_analysis()
        sizes = dict(
            compile_s=seconds, cache_enabled=jax.config.jax_compilation_cache_dir is not None, parameters=num_parameters(state.params),
            temporary_gib=memory.temp_size_in_bytes / 2**30, arguments_gib=memory.argument_size_in_bytes / 2**30,
        )  # fmt: skip
        held = [state]
        del state

        def run() -> None:
            after, metrics = compiled(held.pop(), (tokens, tokens))
            held.append(after)
            if not np.isfinite(float(metrics['loss'])):
                raise RuntimeError(f'the loss is {metrics["loss"]}')

        return run, sizes


def check_loss(config: ModelConfig, length: int) -> float:
    """Relative difference of a sequence's loss from that of the plain program in float32; RuntimeError at 1e-2 or more."""
    tokens = jax.random.randint(jax.random.key(2), (1, length), 0, config.vocab_size)
    wide = LanguageModel(dataclasses.replace(config, dtype='float32'))
    params = jax.jit(wide.init)(jax.random.key(0), tokens[:, :16])['params']
    loss = lambda model: float(jax.jit(lambda p: model_loss(model, p, tokens, tokens)[0])(params))
    got = loss(LanguageModel(config))
    with use_kernels('plain'), jax.default_matmul_precision('highest'):
        expected = loss(wide)
    error = abs(got - expected) / abs(expected)
    if not error < 1e-2:
        raise RuntimeError(f'the loss differs from that in float32 by {error:.1e}')
    return error


def flops_of(config: ModelConfig, length: int) -> dict[str, float]:
    """Operations of a token's forward and backward pass, by both counts of the module's header."""
    model, tokens = LanguageModel(config), jnp.zeros((1, length), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens[:, :16])['params']
    in_products = num_parameters(params) - params['embedding'].size
    causal = 6 * config.num_layers * config.num_heads * config.head_dim * length if config.mixer == 'attention' else 0
    with use_kernels('plain'):
        jaxpr = jax.make_jaxpr(jax.grad(lambda p: model_loss(model, p, tokens, tokens)[0]))(params)
    return dict(model_flops_per_token=6 * in_products + causal, algorithmic_flops_per_token=matrix_flops(jaxpr) / length)


def shares(flops: dict[str, float], tokens_per_second: float) -> dict[str, float]:
    """Of the card's peak; none on a device whose peak is not known."""
    peak = next((peak for name, peak in PEAK_FLOPS.items() if name in jax.devices()[0].device_kind), None)
    if peak is None:
        return {}
    used = lambda name: flops[f'{name}_flops_per_token'] * tokens_per_second / peak
    return dict(mfu=used('model'), algorithmic_utilisation=used('algorithmic'))


def _training(name: str, length: int, budget_s: float, batch: int = 8, **options) -> Cell:
    job = Training(name, batch, length, **options)
    ways = [f'chunk {job.chunk_size}'] * bool(job.chunk_size) + ['layers one by one'] * (not job.scan_layers)
    ways += [f'kernels {job.kernels}'] * (job.kernels != 'gpu')
    return Cell(', '.join([f'{name} at {length}', *ways]), budget_s, job, slow_to_compile=True)


def _fla(name: str, budget_s: float, **options) -> list[Cell]:
    """A cell of each shape: the searches of its kernels take a minute or two."""
    form = lambda shape: f'{name}, flash-linear-attention, heads of {shape.dim}'
    return [Cell(form(shape), budget_s, fla_delta_rule(shape, **options), slow_to_compile=True) for shape in SHAPES]


def _plain(chunk_size: int, dtype: str, precision: str) -> Cell:
    return Cell(f'delta rule, chunk {chunk_size}, {dtype}, {precision}', 40, plain_delta_rule(chunk_size, dtype, precision))


_FAST = dict(remat='none', scan_layers=False)

CELLS = (
    Cell('delta rule, kernel', 90, kernel_delta_rule(gated=True), slow_to_compile=True),
    *_fla('delta rule', 120, gated=True),
    _training('transformer-124m', 4096, 120, **_FAST),
    _training('hope-linear-124m', 4096, 120, batch=32, chunk_size=64),
    _training('hope-124m', 4096, 120, batch=16, chunk_size=64),
    _training('transformer-124m', 1024, 90, batch=512, accumulation=16, **_FAST),
    _training('transformer-340m', 4096, 75, **_FAST),
    _training('hope-340m', 4096, 120, batch=8, chunk_size=64),
    _training('transformer-124m', 32_768, 60, batch=1, **_FAST),
    _training('hope-linear-124m', 32_768, 90, batch=4, chunk_size=64),
    _plain(64, 'bfloat16', 'highest'),
    Cell('delta rule without gate, kernel', 60, kernel_delta_rule(gated=False), slow_to_compile=True),
    *_fla('delta rule without gate', 90, gated=False),
    _training('gated-deltanet-124m', 4096, 75, scan_layers=False),
    Cell('attention, cudnn', 30, attention('cudnn')),
    _training('transformer-124m', 4096, 60, remat='none'),
    _training('titans-124m', 4096, 75),
    _training('hope-linear-124m', 4096, 75),
    _training('hope-124m', 4096, 180),
    _training('hope-124m', 32_768, 180, batch=1),
    _training('hope-linear-124m', 4096, 180, batch=32, chunk_size=64, kernels='gpu_unverified'),
    *_fla('delta rule forward', 60, gated=True, backward=False),
    _plain(64, 'bfloat16', 'default'),
    _plain(32, 'bfloat16', 'highest'),
    _plain(128, 'bfloat16', 'highest'),
    _plain(128, 'bfloat16', 'default'),
    _plain(64, 'float32', 'highest'),
    Cell('attention, xla', 30, attention('xla')),
)
