"""How cost grows: with the length, the chunk, the memory's width, the levels, the candidates and the parameters.

A curve is climbed from its cheapest point until the next one would take too long or would not fit the memory, which is said. Batches are
of one sequence, so that the length alone grows. Before a curve is timed, what it times is checked: chunks against tokens, blocks of
queries against all at once, levels against their schedule, candidates together against alone.

After a curve, slopes of log cost over log place are fitted, with 95 % intervals. A slope of one is proportional; `recent` is the slope
of the last three points, which for attention is the one that counts: at short lengths other work hides the quadratic part.
"""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from scipy import stats

from nested_jax.config import LevelConfig, ModelConfig
from nested_jax.models import LanguageModel, preset
from nested_jax.models.loss import model_loss
from nested_jax.training.compiled import matrix_flops
from nested_jax.training.config import TrainConfig
from nested_jax.training.optimizer import make_optimizer
from scripts.benchmarks.cpu import MODELS, attention_forms
from scripts.benchmarks.memories import Forms, disagreement, matrix_forms, memory_forms, memory_inputs, mlp_forms
from scripts.benchmarks.timing import Settings, Timing, TooLargeError, compile_timed, measure, num_parameters, train_step

LIMIT_S = 150.0  # of a point's runs: no point that is expected to take longer is begun
COSTS = ('seconds', 'cpu_seconds', 'temporary_mib')
Point = Callable[[int], dict]  # place on the axis -> metrics, with 'seconds' of one run


class Axis(NamedTuple):
    """Where a curve has points."""

    places: tuple[int, ...]
    length: int = 0  # tokens
    dim: int = 64  # of a head, or a level's hidden units


@dataclasses.dataclass(frozen=True)
class Extent:
    """How far the curves go."""

    models: tuple[str, ...] = MODELS
    options: dict = dataclasses.field(default_factory=dict)  # of the presets
    lengths: Axis = Axis(tuple(1024 << octave for octave in range(8)))
    chunks: Axis = Axis(tuple(8 << octave for octave in range(10)), 8192)
    widths: Axis = Axis((64, 128, 256, 512, 1024), 4096)
    levels: Axis = Axis((1, 2, 4, 8), 1024, 128)
    shapes: tuple[tuple[int, int], ...] = ((2, 128), (4, 256), (8, 384), (12, 512), (12, 768), (24, 1024), (24, 1536))  # layers, width


_TINY = dict(num_layers=1, width=16, num_heads=1, head_dim=16, levels=(LevelConfig(16, 512),))
_SMOKE = Extent(
    ('transformer-tiny',), _TINY, Axis((32, 64)), Axis((16, 32), 64, 16), Axis((8, 16), 32, 16), Axis((1, 2), 32, 16),
    ((1, 32), (1, 64)),
)  # fmt: skip


def extent(settings: Settings) -> Extent:
    """Of this run."""
    return _SMOKE if settings.smoke else Extent()


def lengths(settings: Settings) -> Iterator[dict]:
    """A training step of one sequence, by its tokens."""
    reach = extent(settings)
    inputs = memory_inputs(1, 64) if settings.smoke else memory_inputs()
    error = max(disagreement(name, forms, inputs) for name, forms in memory_forms().items())
    error = max(error, check_blocks(preset('transformer-tiny', max_length=512, **reach.options)))
    for name in reach.models:

        def point(length: int, name: str = name) -> dict:
            config = preset(name, max_length=length, **reach.options)
            if name.startswith('transformer'):
                *_, config = attention_forms(config).values()
            return training_point(config, length, settings)

        yield from climb('length', name, reach.lengths.places, point, settings, error)


def chunks(settings: Settings) -> Iterator[dict]:
    """Forward and backward of a memory at one length, by the tokens of its chunks."""
    places, length, dim = extent(settings).chunks
    for name, forms in {'delta_gradient_descent': matrix_forms, 'mlp_memory': functools.partial(mlp_forms, hidden=dim)}.items():
        point = lambda size, name=name, forms=forms: memory_point(name, forms(chunk_size=size), 2 * size, length, dim, settings)
        yield from climb('chunk', name, places, point, settings)


def widths(settings: Settings) -> Iterator[dict]:
    """Forward and backward of an MLP memory, by its hidden units: what a memory of more layers is elsewhere."""
    places, length, dim = extent(settings).widths
    point = lambda hidden: memory_point('mlp_memory', mlp_forms(16, hidden), 32, length, dim, settings)
    yield from climb('width', 'mlp_memory', places, point, settings)


def levels(settings: Settings) -> Iterator[dict]:
    """CMS levels of equal width, each updated half as often as the one before: gradients, and the mean update."""
    reach = extent(settings)
    places, length, hidden = reach.levels

    def config(count: int) -> ModelConfig:
        of_levels = tuple(LevelConfig(hidden, length << index) for index in range(count))
        return preset('hope-attention-tiny', max_length=length, **(reach.options | dict(levels=of_levels)))

    yield from climb('levels', 'gradient', places, lambda count: gradient_point(config(count), length, settings), settings)
    yield from climb('levels', 'update', places, lambda count: update_point(config(count), length, settings), settings)


def candidates(settings: Settings) -> Iterator[dict]:
    """SEAL's inner updates of candidates side by side; the suite 'seal', as a curve."""
    from scripts.benchmarks.seal import seal_candidates  # needs the data pipelines' packages

    for row in seal_candidates(settings):
        count = row['candidates']
        yield dict(
            what='point', curve='candidates', model='inner updates', place=count, seconds=count / row['candidates_per_second'],
            fastest_s=count / row['fastest'], slowest_s=count / row['slowest'], temporary_mib=row['temporary_mib'], error=row['error'],
        )  # fmt: skip


def parameters(settings: Settings) -> Iterator[dict]:
    """A training step of 512 tokens, by the parameters of the blocks; and what the step makes of the device."""
    length = 32 if settings.smoke else 512
    for family in ('hope-linear',) if settings.smoke else ('transformer', 'hope-linear'):
        configs = {}
        for layers, width in extent(settings).shapes:
            of_levels = (LevelConfig(8 * width // 3 // 8 * 8, 512),)
            options = dict(num_layers=layers, width=width, num_heads=width // 32, head_dim=32, levels=of_levels, max_length=length)
            config = preset(f'{family}-tiny', scan_layers=True, **options)
            shapes = jax.eval_shape(LanguageModel(config).init, jax.random.key(0), jnp.zeros((1, 16), jnp.int32))
            configs[num_parameters(shapes['params']['blocks'])] = config
        point = lambda count, configs=configs: training_point(configs[count], length, settings, flops=True)
        yield from climb('parameters', family, tuple(configs), point, settings)


CURVES = (lengths, chunks, widths, levels, candidates, parameters)


def with_slopes(curve: Callable[[Settings], Iterator[dict]]) -> Callable[[Settings], Iterator[dict]]:
    """The curve, followed by its slopes."""

    @functools.wraps(curve)
    def part(settings: Settings) -> Iterator[dict]:
        points = []
        for row in curve(settings):
            points.append(row)
            yield row
        yield from fits(points)

    return part


PARTS = tuple(map(with_slopes, CURVES))


def climb(curve: str, model: str, places: Sequence[int], point: Point, settings: Settings, error: float | None = None) -> Iterator[dict]:
    """Rows of a curve's points, as far as memory and patience reach; `error` is that of a check made before."""
    done: list[tuple[int, float]] = []
    for place in places:
        seconds = (settings.repeats + 1) * expected_seconds(done, place)
        if seconds > LIMIT_S:
            print(f'{curve}, {model}: left out from {place:,} on, which would take {seconds:,.0f} s', flush=True)
            return
        try:
            metrics = point(place)
        except TooLargeError as reason:
            print(f'{curve}, {model}: left out from {place:,} on: {reason}', flush=True)
            return
        done.append((place, metrics['seconds']))
        checked = {} if error is None else dict(error=error)
        yield dict(what='point', curve=curve, model=model, place=place) | checked | metrics


def expected_seconds(done: list[tuple[int, float]], place: int) -> float:
    """Of a run at `place`, by the growth between the last two points, at least proportional; 0 before there are two."""
    if len(done) < 2:
        return 0.0
    (first, before), (last, seconds) = done[-2:]
    growth = max(1.0, math.log(seconds / before) / math.log(last / first))
    return seconds * (place / last) ** growth


def training_point(config: ModelConfig, length: int, settings: Settings, *, flops: bool = False) -> dict:
    """An AdamW step of one sequence."""
    step = train_step(config, 1, length)
    metrics = of_timing(measure(step.run, settings.repeats), step.temporary, step.compile_seconds, length)
    if flops:
        tokens = jnp.zeros((1, length), jnp.int32)
        model = LanguageModel(config)
        params = jax.eval_shape(model.init, jax.random.key(0), tokens)['params']
        count = matrix_flops(jax.make_jaxpr(jax.grad(lambda p: model_loss(model, p, tokens, tokens)[0]))(params))
        metrics |= dict(matrix_flops=count, gflops_per_s=count / metrics['seconds'] / 1e9)
    return metrics | dict(parameters=step.parameters)


def memory_point(name: str, forms: Forms, checked: int, length: int, dim: int, settings: Settings) -> dict:
    """Forward and backward of a memory of 4 heads, after a check against its token-by-token form on `checked` tokens."""
    error = disagreement(name, forms, memory_inputs(1, checked, 4, dim))
    inputs = memory_inputs(1, length, 4, dim)
    gradient, seconds = compile_timed(jax.grad(lambda i: jnp.sum(forms[0](i) ** 2)), inputs)
    timing = measure(lambda: jax.block_until_ready(gradient(inputs)), settings.repeats)
    return of_timing(timing, gradient.memory_analysis().temp_size_in_bytes, seconds, length) | dict(error=error)


def gradient_point(config: ModelConfig, length: int, settings: Settings) -> dict:
    """The gradient of one sequence's loss."""
    model, params, tokens = model_inputs(config, length)
    gradient, seconds = compile_timed(jax.grad(lambda p: model_loss(model, p, tokens, tokens)[0] / length), params)
    timing = measure(lambda: jax.block_until_ready(gradient(params)), settings.repeats)
    return of_timing(timing, gradient.memory_analysis().temp_size_in_bytes, seconds, length)


def update_point(config: ModelConfig, length: int, settings: Settings) -> dict:
    """The optimizer's mean step over the slowest level's period, after a check that each level moved in its own steps only."""
    model, params, _ = model_inputs(config, length)
    train = TrainConfig(batch_size=1, sequence_length=length, warmup_steps=0)
    optimizer = make_optimizer(train, {f'level_{index}': level.period for index, level in enumerate(config.levels)})
    gradients, state = jax.tree.map(jnp.ones_like, params), optimizer.init(params)
    cycle = config.levels[-1].period // length
    compiled, seconds = compile_timed(optimizer.update, gradients, state, params)
    check_schedule(compiled, gradients, state, params, [level.period // length for level in config.levels])

    def run() -> object:
        after = state
        for _ in range(cycle):
            updates, after = compiled(gradients, after, params)
        return jax.block_until_ready((updates, after))

    timing = measure(run, settings.repeats)
    each = Timing(*(value / cycle for value in dataclasses.astuple(timing)[:-1]), timing.runs)
    return of_timing(each, compiled.memory_analysis().temp_size_in_bytes, seconds, length)


def check_schedule(update: Callable, gradients, state, params, periods: list[int]) -> None:
    """Raises RuntimeError unless every level of the channel mixer moves at the multiples of its period in steps and at no other."""
    for step in range(1, periods[-1] + 1):
        updates, state = update(gradients, state, params)
        for index, period in enumerate(periods):
            moved = any(bool(jnp.any(leaf)) for leaf in jax.tree.leaves(updates['blocks']['channel'][f'level_{index}']))
            if moved != (step % period == 0):
                raise RuntimeError(f'level {index} of period {period} {"moved" if moved else "did not move"} at step {step}')


def check_blocks(config: ModelConfig) -> float:
    """Relative difference of the loss with queries in blocks from that with all at once; RuntimeError at 1e-5 or more."""
    values = []
    for form in attention_forms(config).values():
        model, params, tokens = model_inputs(form, config.max_length)
        values.append(float(jax.jit(lambda p, model=model, tokens=tokens: model_loss(model, p, tokens, tokens)[0])(params)))
    error = abs(values[0] - values[1]) / abs(values[0])
    if not error < 1e-5:
        raise RuntimeError(f'attention in blocks of queries and at once differ by {error:.1e}')
    return error


def model_inputs(config: ModelConfig, length: int):
    """A model, its parameters and a sequence."""
    model = LanguageModel(config)
    tokens = jax.random.randint(jax.random.key(1), (1, length), 0, config.vocab_size)
    return model, jax.jit(model.init)(jax.random.key(0), tokens[:, :16])['params'], tokens


def of_timing(timing: Timing, temporary: int, compile_seconds: float, tokens: int) -> dict:
    """What every point has."""
    return timing.as_metrics() | dict(tokens_per_second=tokens / timing.median, temporary_mib=temporary / 2**20, compile_s=compile_seconds)


def fits(points: list[dict]) -> Iterator[dict]:
    """Slopes of each cost over the place, for each model of a curve with at least three points."""
    for model in dict.fromkeys(row['model'] for row in points):
        rows = [row for row in points if row['model'] == model]
        for cost in COSTS:
            values = [row[cost] for row in rows if row.get(cost)]
            if len(values) == len(rows) >= 3:
                yield dict(what='fit', curve=rows[0]['curve'], model=model, cost=cost, points=len(rows)) | fit(
                    [row['place'] for row in rows], values
                )


def fit(places: Sequence[float], values: Sequence[float]) -> dict[str, float]:
    """Least squares of logs: slope and 95 % interval; slope of the last three points; place of the least cost; R2 of a straight line.

    Args:
        places: at least three, above 0.
        values: costs there, above 0.
    """
    x, y = np.log(places), np.log(values)
    line = stats.linregress(x, y)
    half = float(stats.t.ppf(0.975, len(x) - 2) * line.stderr)
    return dict(
        slope=float(line.slope), low=float(line.slope) - half, high=float(line.slope) + half,
        recent=float(stats.linregress(x[-3:], y[-3:]).slope), best_place=places[int(np.argmin(values))],
        straight_r2=float(stats.linregress(places, values).rvalue ** 2),
    )  # fmt: skip


def draw(rows: list[dict], path: pathlib.Path) -> None:
    """A column for each curve of the rows' metrics, on logarithmic axes: seconds with their range above, temporary memory below."""
    points = [row['metrics'] for row in rows if row['metrics']['what'] == 'point']
    curves = list(dict.fromkeys(point['curve'] for point in points))
    figure = Figure(figsize=(3.6 * len(curves), 6.4), layout='constrained')
    grid = figure.subplots(2, len(curves), squeeze=False)
    for (above, below), curve in zip(grid.T, curves, strict=True):
        for model in dict.fromkeys(point['model'] for point in points if point['curve'] == curve):
            mine = {point['place']: point for point in points if (point['curve'], point['model']) == (curve, model)}  # the latest of each
            column = lambda name, mine=mine: np.array([point[name] for point in mine.values()])
            seconds = column('seconds')
            spread = seconds - column('fastest_s'), column('slowest_s') - seconds
            above.errorbar(list(mine), seconds, spread, label=model, marker='o', markersize=3, capsize=2, linewidth=1.2)
            below.plot(list(mine), column('temporary_mib'), label=model, marker='o', markersize=3, linewidth=1.2)
        above.set(title=curve, ylabel='seconds a run')
        below.set(xlabel=curve, ylabel='temporary memory, MiB')
        above.legend(fontsize='x-small')
        for axes in (above, below):
            axes.set_xscale('log', base=2)
            axes.set_yscale('log')
            axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
