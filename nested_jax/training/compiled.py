"""What a compiled program needs of each device: memory, collectives and matrix products, read off before it has ever run."""

import collections
import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

import jax
from jax.interpreters import partial_eval

KINDS = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'collective-permute')
# XLA's partitioner says so when it can move an array to another layout only by making it whole on every device.
REMATERIALISED = 'nvoluntary full rematerialization'

_BYTES = dict(pred=1, s8=1, u8=1, s16=2, u16=2, bf16=2, f16=2, s32=4, u32=4, f32=4, s64=8, u64=8, f64=8, c64=8, c128=16)
_HEAD = re.compile(r'^(?:ENTRY )?%?([\w.-]+) \(.*\{$')
_COLLECTIVE = re.compile(rf' = (.*?) ({"|".join(KINDS)})(-start)?\(')
_CALLS = re.compile(r'(?:body|condition|to_apply|calls|true_computation|false_computation|branch_computations)=\{?([^},]+(?:, %[\w.-]+)*)')
_CHANNEL = re.compile(r'channel_id=(\d+)')
_BY_HAND = re.compile(r'op_name="[^"]*/(?:ppermute|psum|all_gather|psum_scatter|reduce_scatter)"')
_CONDITION = re.compile(r'condition=%?([\w.-]+)')
_CONSTANT = re.compile(r' = s32\[\]\S* constant\((\d+)\)')
_TRIPS = re.compile(r'known_trip_count"?:\{"?n"?:"?(\d+)')
_ARRAY = re.compile(r'\b(\w+)\[([\d,]*)\]')


@dataclasses.dataclass(frozen=True)
class Collective:
    """One instruction of a program."""

    kind: str  # one of KINDS
    shapes: tuple[tuple[str, tuple[int, ...]], ...]  # dtype and shape of each array it results in, on one device
    runs: int  # times a step runs it; of a loop whose length XLA does not know, once

    @property
    def num_bytes(self) -> int:
        """Bytes of one run's result on one device."""
        return sum(_BYTES.get(dtype, 1) * math.prod(shape) for dtype, shape in self.shapes)


def collectives(text: str) -> list[Collective]:
    """The collectives of an optimized HLO module, `compiled.as_text()`, with the loops they stand in multiplied out.

    A TPU's compiler splits a collective into a start and a done, of which the start counts, or into kernels that do a part of it each:
    all that are of one channel count as one. Such parts may stand in a loop that the collective overlaps with, as one of each block's
    parameters does with the scan over the chunks, so those in kernels named async_collective_fusion say how often it runs only where
    no other does, and then the one that runs least often. A sum of which each device keeps a part stands as an all-reduce in a kernel
    named all-reduce-scatter; it is a reduce-scatter here, with the arrays that go in. Those that a function calls by name, in a
    `jax.shard_map`, have one channel all of them, and each counts.
    """
    bodies, entry = _computations(text)
    runs = _runs(bodies, entry)
    channels = collections.defaultdict(lambda: ([], []))  # copies that are whole, and parts
    for name, lines in bodies.items():
        for line in lines if runs[name] else ():
            match = _COLLECTIVE.search(line)
            if match:
                each, channel = _collective(match, name, runs[name]), _CHANNEL.search(line)
                # Kernels of the name have channel 1 all of them, which another collective has too.
                alone = not channel or 'all-reduce-scatter' in name or _BY_HAND.search(line)
                key = (name, line) if alone else channel[1]
                channels[key][name.startswith('async_collective_fusion')].append(each)
    often = lambda each: each.runs
    return [max(whole, key=often) if whole else min(parts, key=often) for whole, parts in channels.values()]


def matrix_flops(jaxpr: Any, branch: Callable[..., float] = max) -> float:
    """Operations of the matrix products and QR decompositions that a traced function's results need, two for a multiplication and a sum.

    Loops count as often as they run. XLA's own count takes a loop's body once, and a scan over 24 blocks and 256 chunks is all body; nor
    does it see into LAPACK.

    Args:
        jaxpr: as of `jax.jit(function).trace(...)`; of a step it has what the backward pass computes again too.
        branch: of a conditional that counts, by their operations; the dearest by default, `min` for the cheapest. Of what is written for
            several platforms the dearest always.
    """
    jaxpr = getattr(jaxpr, 'jaxpr', jaxpr)
    return _needed_flops(partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0], branch)


def _needed_flops(jaxpr: Any, branch: Callable[..., float]) -> float:
    return sum(_flops(equation, branch) for equation in jaxpr.eqns)


def _flops(equation: Any, branch: Callable[..., float]) -> float:
    name, params = equation.primitive.name, equation.params
    if name == 'dot_general':
        contracted = params['dimension_numbers'][0][0]
        return 2 * equation.outvars[0].aval.size * math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
    if name == 'qr':
        *batch, rows, columns = equation.invars[0].aval.shape
        return math.prod(batch) * (4 * rows - 4 * columns / 3) * columns**2  # the factor and its orthonormal columns
    parts = [part for value in params.values() for part in (value if isinstance(value, tuple | list) else (value,))]
    bodies = [_needed_flops(body, branch) for part in parts if hasattr(body := getattr(part, 'jaxpr', part), 'eqns')]
    if name == 'cond':
        return (max if params.get('branches_platforms') else branch)(bodies, default=0)
    return sum(bodies) * (params['length'] if name == 'scan' else 1)


def report(compiled: jax.stages.Compiled) -> dict:
    """Needs of one device, JSON.

    Returns:
        memory: bytes of arguments, of results that do not take the place of a donated argument, of temporaries, and of all three.
        collectives: kind -> count (runs a step) and bytes (of their results, a step).
    """
    memory = compiled.memory_analysis()
    arguments, temporaries = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    sums = collections.defaultdict(lambda: dict(count=0, bytes=0))
    for each in collectives(compiled.as_text()):
        sums[each.kind]['count'] += each.runs
        sums[each.kind]['bytes'] += each.runs * each.num_bytes
    total = arguments + results + temporaries
    sizes = dict(arguments=arguments, results=results, temporaries=temporaries, total=total)
    return dict(memory=sizes, collectives={kind: sums[kind] for kind in KINDS if kind in sums})


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """Computation's name -> its lines, and the name of the entry."""
    bodies, entry, lines = {}, '', []
    for line in text.splitlines():
        head = _HEAD.match(line)
        if head:
            lines = bodies.setdefault(head[1], [])
            entry = head[1] if line.startswith('ENTRY') else entry
        else:
            lines.append(line)
    return bodies, entry


def _collective(match: re.Match, computation: str, runs: int) -> Collective:
    result, kind, started = match.groups()
    shapes = tuple((dtype, tuple(map(int, filter(None, sizes.split(','))))) for dtype, sizes in _ARRAY.findall(result))
    if started and kind == 'all-gather':  # (what goes in, what comes out)
        shapes = shapes[len(shapes) // 2 :]
    if started and kind == 'collective-permute':  # the same, and two counters
        shapes = shapes[1:2]
    return Collective('reduce-scatter' if 'all-reduce-scatter' in computation else kind, shapes, runs)


def _runs(bodies: dict[str, list[str]], entry: str) -> collections.Counter:
    """How often each computation runs in a step. Callees are printed before their callers."""
    runs = collections.Counter({entry: 1})
    for name in reversed(bodies):
        for line in bodies[name] if runs[name] else ():
            times = _trips(line, bodies) if ' while(' in line else 1
            for callees in _CALLS.findall(line):
                for callee in callees.split(', '):
                    runs[callee.lstrip('%')] += runs[name] * times
    return runs


def _trips(line: str, bodies: dict[str, list[str]]) -> int:
    """Length of a loop: as XLA noted it, else the one number its condition compares with; 1 where that is not one."""
    known = _TRIPS.search(line)
    if known:
        return int(known[1])
    condition = _CONDITION.search(line)
    found = [match[1] for match in map(_CONSTANT.search, bodies.get(condition[1], []) if condition else ()) if match]
    return int(found[0]) if len(found) == 1 else 1
