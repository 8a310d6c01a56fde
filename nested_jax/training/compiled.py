"""What a compiled program needs of each device: memory, collectives and operations, read off before it has ever run."""

import collections
import dataclasses
import math
import re

import jax

KINDS = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'collective-permute')
# XLA's partitioner says so when it can move an array to another layout only by making it whole on every device.
REMATERIALISED = 'nvoluntary full rematerialization'

_BYTES = dict(pred=1, s8=1, u8=1, s16=2, u16=2, bf16=2, f16=2, s32=4, u32=4, f32=4, s64=8, u64=8, f64=8, c64=8, c128=16)
_HEAD = re.compile(r'^(?:ENTRY )?%?([\w.-]+) \(.*\{$')
_COLLECTIVE = re.compile(rf' = (.*?) ({"|".join(KINDS)})(-start)?\(')
_CALLS = re.compile(r'(?:body|condition|to_apply|calls|true_computation|false_computation|branch_computations)=\{?([^},]+(?:, %[\w.-]+)*)')
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

    On a TPU XLA splits some into a start and a done, of which the start counts, with the last of its arrays; and runs some as a kernel
    that is called by the name of the computation that holds the collective.
    """
    bodies, entry = _computations(text)
    runs = _runs(bodies, entry)
    found = []
    for name, lines in bodies.items():
        for match in filter(None, map(_COLLECTIVE.search, lines)):
            result, kind, started = match.groups()
            shapes = tuple((dtype, tuple(map(int, filter(None, sizes.split(','))))) for dtype, sizes in _ARRAY.findall(result))
            if started and kind in ('all-gather', 'collective-permute'):
                shapes = shapes[len(shapes) // 2 :] if kind == 'all-gather' else shapes[1:2]
            found.append(Collective(kind, shapes, runs[name]))
    return [each for each in found if each.runs]


def report(compiled: jax.stages.Compiled) -> dict:
    """Needs of one device, JSON.

    Returns:
        memory: bytes of arguments, of results that do not take the place of a donated argument, of temporaries, and of all three.
        collectives: kind -> count (runs a step) and bytes (of their results, a step).
        flops: floating-point operations of one step as XLA counts them; a kernel's are not in it. None where it does not count.
    """
    memory = compiled.memory_analysis()
    arguments, temporaries = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    sums = collections.defaultdict(lambda: dict(count=0, bytes=0))
    for each in collectives(compiled.as_text()):
        sums[each.kind]['count'] += each.runs
        sums[each.kind]['bytes'] += each.runs * each.num_bytes
    cost = compiled.cost_analysis() or {}
    total = arguments + results + temporaries
    sizes = dict(arguments=arguments, results=results, temporaries=temporaries, total=total)
    return dict(memory=sizes, collectives={kind: sums[kind] for kind in KINDS if kind in sums}, flops=cost.get('flops'))


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


def _runs(bodies: dict[str, list[str]], entry: str) -> collections.Counter:
    """How often each computation runs in a step. Callees are printed before their callers."""
    runs = collections.Counter({entry: 1})
    for name in reversed(bodies):
        for line in bodies[name]:
            trips = _TRIPS.search(line)
            times = int(trips[1]) if trips and ' while(' in line else 1
            for callees in _CALLS.findall(line):
                for callee in callees.split(', '):
                    runs[callee.lstrip('%')] += runs[name] * times
    return runs
