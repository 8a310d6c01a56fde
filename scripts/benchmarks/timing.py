"""What the suites of scripts/bench.py share: repeated timings, and a compiled training step."""

import dataclasses
import math
import os
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
import optax

from nested_jax.config import ModelConfig
from nested_jax.models import LanguageModel
from nested_jax.models.loss import model_loss
from nested_jax.training.sharding import Placement, make_mesh


class Settings(NamedTuple):
    """Of a run of bench.py."""

    repeats: int  # runs each figure is the median of
    smoke: bool = False  # the smallest sizes, to see that everything works
    prepare: bool = False  # compile alone, for the cache of programs: no figures


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of one run: median, minimum and maximum over repetitions, and the median of the processor's."""

    median: float
    fastest: float
    slowest: float
    processor: float  # of all threads
    runs: int

    def as_metrics(self) -> dict[str, float]:
        """Fields of a row."""
        return dict(seconds=self.median, fastest_s=self.fastest, slowest_s=self.slowest, cpu_seconds=self.processor)


class Step(NamedTuple):
    """A compiled training step."""

    run: Callable[[], object]  # synchronised
    compile_seconds: float
    temporary: int  # bytes
    parameters: int


class TooLargeError(MemoryError):
    """A program needs more memory than there is."""


def measure(run: Callable[[], object], repeats: int, limit_s: float = math.inf) -> Timing:
    """Times a synchronised call after one call that is not counted; no run but the first begins after `limit_s`."""
    run()
    seconds, processor, end = [], [], time.perf_counter() + limit_s
    while len(seconds) < repeats and (not seconds or time.perf_counter() < end):
        begun = time.perf_counter(), time.process_time()
        run()
        seconds.append(time.perf_counter() - begun[0])
        processor.append(time.process_time() - begun[1])
    return Timing(statistics.median(seconds), min(seconds), max(seconds), statistics.median(processor), len(seconds))


def by_turns(runs: dict[str, Callable[[], object]], repeats: int, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Seconds of synchronised calls, one after the other in each of the repeats, so that a machine that slows down slows all of them.

    A first round is not counted.
    """
    seconds = {name: [] for name in runs}
    for _ in range(1 + repeats):
        for name, run in runs.items():
            begun = clock()
            run()
            seconds[name].append(clock() - begun)
    return {name: spent[1:] for name, spent in seconds.items()}


def compile_timed(function: Callable, *args) -> tuple[jax.stages.Compiled, float]:
    """A compiled function and the seconds it took, tracing included.

    Raises:
        TooLargeError: if it does not fit the device.
    """
    begun = time.perf_counter()
    compiled = jax.jit(function).lower(*args).compile()
    seconds = time.perf_counter() - begun
    needed, free = compiled.memory_analysis().temp_size_in_bytes, free_bytes()
    if needed > free:
        raise TooLargeError(f'{needed / 2**30:.1f} GiB of temporaries do not fit the {free / 2**30:.1f} GiB that are free')
    return compiled, seconds


def free_bytes() -> int:
    """Bytes the first device has left."""
    stats = jax.devices()[0].memory_stats()
    if stats is None or 'bytes_limit' not in stats:
        return os.sysconf('SC_AVPHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
    return stats['bytes_limit'] - stats['bytes_in_use']


def train_step(config: ModelConfig, batch: int, length: int, devices: int = 1) -> Step:
    """A compiled AdamW step of a model, whose loss was seen to be finite; each of the devices has its rows of the batch."""
    model, optimizer = LanguageModel(config), optax.adamw(1e-3)
    placement = Placement.on(make_mesh({'data': devices}, jax.devices()[:devices]))
    tokens = jax.random.randint(jax.random.key(1), (batch, length), 0, config.vocab_size)
    params = jax.jit(model.init, out_shardings=placement.replicated)(jax.random.key(0), tokens[:1, :16])['params']
    tokens = jax.device_put(tokens, placement.rows)

    def step(params, state, tokens):
        loss = lambda p: model_loss(model, p, tokens, tokens)[0] / tokens.size
        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    state = jax.jit(optimizer.init, out_shardings=placement.replicated)(params)
    with jax.set_mesh(placement.mesh):
        compiled, seconds = compile_timed(step, params, state, tokens)
    value = float(compiled(params, state, tokens)[2])
    if not np.isfinite(value):
        raise RuntimeError(f'loss of {config} is {value}')
    run = lambda: jax.block_until_ready(compiled(params, state, tokens))
    return Step(run, seconds, compiled.memory_analysis().temp_size_in_bytes, num_parameters(params))


def num_parameters(params) -> int:
    """Numbers in a pytree."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def time_training(name: str, config: ModelConfig, batch: int, length: int, repeats: int, devices: int = 1) -> dict:
    """Training tokens a second of one model at one length."""
    step = train_step(config, batch, length, devices)
    timing = measure(step.run, repeats)
    return dict(
        what='training', model=name, batch=batch, length=length, devices=devices, tokens_per_step=batch * length,
        parameters=step.parameters, tokens_per_second=batch * length / timing.median, slowest=batch * length / timing.slowest,
        fastest=batch * length / timing.fastest, compile_s=step.compile_seconds, temporary_mib=step.temporary / 2**20,
    )  # fmt: skip
