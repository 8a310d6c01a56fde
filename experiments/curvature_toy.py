r"""Delta momentum against heavy ball on a curved valley: `python -m experiments.curvature_toy`.

The toy of Fig. 4 (Eq. 53, arXiv:2512.24695v1), in which momentum written by the delta rule reaches the minimum first:

.. math::
  \psi(r, \theta) = r^2 + k (r - \theta + a \sin \omega r)^2, \qquad (r_0, \theta_0) = (-3.5, 2)

Its only stationary point is the minimum at the origin. The paper gives neither k, a, omega nor the learning rate; all are swept here, with
its momentum of 0.9. A run has arrived at the first of 10 steps in a row with psi below 1e-6.

    heavy-ball        m <- 0.9 m + g
    printed           0.9 m - eta g (g . m) + g, Eq. (49) with the learning rate eta on the erased part too
    clipped           the same with min(eta, 0.9 / |g|^2) in the place of eta
    normalised        the same with eta / |g|^2
    normalised-half   the same with 0.5 / |g|^2
    proximal          0.9 m + g, times the inverse of I + eta g g'

Nor does the paper say whether (r, theta) is a column of weights, so that the momentum is erased along the gradient (layout column, as
above), or a row, all of which one gradient erases: |g|^2 m in the place of g (g . m).

Measured in 36 landscapes at 41 learning rates, at most 10,000 steps, as a column (rows in results/curvature_toy.jsonl; a row of weights
gives the same order). Steps are relative to heavy ball's, with the median's 95 % interval; the last column is a reproduction's setting:

                     arrives in   each at its best rate             both at every rate                steps at k = 10, a = 1,
                                  faster/slower  median             faster/slower  median             omega = 2, rate 0.004
    heavy-ball       35                                                                               670
    printed          17           0 / 17         8.26 [4.36, 28.6]  1 / 90         1.03 [1.02, 1.03]  diverges
    clipped          35           32 / 3         0.73 [0.69, 0.76]  310 / 247      1.00 [0.96, 1.01]  719
    normalised       35           28 / 6         0.90 [0.84, 0.97]  176 / 387      1.01 [1.00, 1.01]  740
    normalised-half  33           10 / 23        2.09 [1.18, 2.70]  30 / 325       5.71 [5.25, 5.94]  4556
    proximal         35           2 / 33         1.75 [1.34, 2.29]  6 / 555        1.27 [1.18, 1.42]  1121

So delta momentum is faster in two of its forms, clipped and normalised, once each method has its own learning rate (clipped takes a
larger one in 19 landscapes, a smaller one in 4); at equal rates their median is heavy ball's within 1 %. The printed form is stable for
eta |g|^2 <= 1.9, which steep landscapes allow to rates too small to arrive with. Erasing half of the momentum along every gradient
costs more steps than it saves, and so does the proximal form, which never diverges: it shortens the gradient too. No best rate is at the
grid's edge; no method arrives at k = 30, a = 2, omega = 3. Half a minute on one CPU core.
"""

import dataclasses
import functools
import itertools
import math
import os
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from experiments.arguments import parse_arguments
from nested_jax.evaluation.rows import append_row, hardware_name, make_row, read_rows
from nested_jax.optim import delta_momentum

EXPERIMENT = 'curvature_toy'
RESULTS = pathlib.Path(__file__).parent / 'results' / f'{EXPERIMENT}.jsonl'
START, DECAY, TOLERANCE, HELD = (-3.5, 2.0), 0.9, 1e-6, 10
DIVERGED = 1e12  # psi is below 1500 at the start of every landscape of the sweep
BASELINE = 'heavy-ball'
METHODS: dict[str, tuple[str, Callable[[Any, jax.Array], Any]]] = {  # form, and the erase rate from the learning rate and |g|^2
    BASELINE: ('printed', lambda rate, squared: 0.0),
    'printed': ('printed', lambda rate, squared: rate),
    'clipped': ('printed', lambda rate, squared: jnp.minimum(rate, DECAY / jnp.where(squared > 0, squared, 1))),
    'normalised': ('normalised', lambda rate, squared: rate),
    'normalised-half': ('normalised', lambda rate, squared: 0.5),
    'proximal': ('proximal', lambda rate, squared: rate),
}
LAYOUTS = {'column': (2, 1), 'row': (1, 2)}
# An independent reproduction's setting (k, a, omega) and learning rate, and the steps it published. That its normalised form erases half,
# and that it has a column, is inferred: with these all three numbers come out.
SETTING, RATE, PUBLISHED = (10.0, 1.0, 2.0), 0.004, {BASELINE: 670, 'clipped': 719, 'normalised-half': 4556}
PATH_STEPS = 200


@dataclasses.dataclass(frozen=True)
class Args:
    """Race delta momentum against heavy ball over landscapes and learning rates."""

    k: tuple[float, ...] = (3.0, 10.0, 30.0)
    """Steepness of the valley's walls."""
    a: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0)
    """Amplitude of its bends."""
    omega: tuple[float, ...] = (1.0, 2.0, 3.0)
    """Their frequency."""
    rates: tuple[float, float] = (1e-5, 1.0)
    """Lowest and highest learning rate."""
    rates_a_decade: int = 8
    """Learning rates between a power of ten and the next, evenly in their logarithm."""
    steps: int = 10_000
    """At most."""
    layouts: tuple[Literal['column', 'row'], ...] = tuple(LAYOUTS)
    """How (r, theta) is a matrix."""
    seed: int = 0
    """Of the bootstrap."""
    results: pathlib.Path = RESULTS
    """File that a row for each method and layout is added to; the picture is written beside it."""
    smoke: bool = False
    """One landscape, few steps, no row and no picture, to see that everything works; its numbers mean nothing."""

    def __post_init__(self):
        for name in ('k', 'a', 'omega'):
            values = getattr(self, name)
            self._check(name, len(values) > 0 and all(value > 0 for value in values), 'at least one number, all above 0')
        self._check('rates', 0 < self.rates[0] < self.rates[1], 'two numbers above 0, the lower first')
        self._check('rates_a_decade', self.rates_a_decade >= 1, 'an integer of at least 1')
        self._check('steps', self.steps >= HELD, f'an integer of at least {HELD}')
        self._check('layouts', len(self.layouts) >= 1, 'at least one')
        self._check('seed', self.seed >= 0, 'an integer of at least 0')

    def _check(self, name: str, holds: bool, allowed: str) -> None:
        if not holds:
            raise ValueError(f'{name} is {getattr(self, name)!r}, allowed is {allowed}')

    @property
    def landscapes(self) -> np.ndarray:
        """All (k, a, omega), shape (landscapes, 3)."""
        return np.array(list(itertools.product(self.k, self.a, self.omega)))

    @property
    def learning_rates(self) -> np.ndarray:
        """Shape (rates,)."""
        low, high = np.log10(self.rates)
        return np.logspace(low, high, round((high - low) * self.rates_a_decade) + 1)


def main(argv: list[str] | None = None) -> int:
    """Runs every method in every landscape, prints, stores and draws what it measures; returns the exit code."""
    args = parse_arguments(Args, argv, __doc__)
    if args.smoke:
        args = dataclasses.replace(args, k=args.k[:1], a=args.a[:1], omega=args.omega[:1], rates_a_decade=1, steps=50)
    print(f'{"layout":<8}{"method":<17}{"arrived":<9}{"diverged":<10}faster / slower and median ratio of steps at best (equal) rates')
    # Near the stability limit rounding decides the path: in float64 fewer of the steps depend on the machine.
    with jax.enable_x64(True):
        for layout in args.layouts:
            _race_all(args, layout)
    if not args.smoke:
        draw(read_rows(args.results), args.results.with_suffix('.png'), layout=args.layouts[0])
    return 0


def height(position: jax.Array, setting: jax.Array) -> jax.Array:
    """psi of Eq. (53).

    Args:
        position: (r, theta), two numbers in any shape.
        setting: (k, a, omega), shape (3,).

    Returns:
        A scalar.
    """
    (r, theta), (k, a, omega) = position.reshape(-1), setting
    return r**2 + k * (r - theta + a * jnp.sin(omega * r)) ** 2


def advance(method: str, setting: jax.Array, rate: jax.Array, position: jax.Array, state: optax.OptState) -> tuple:
    """One step of a method; returns the position and the state."""
    gradient = jax.grad(height)(position, setting)
    updates, state = _optimizer(method, rate, jnp.sum(gradient**2)).update(gradient, state, position)
    return optax.apply_updates(position, updates), state


def race(method: str, layout: str, landscapes: np.ndarray, rates: np.ndarray, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """Steps of one method until it has arrived, at every learning rate in every landscape.

    Args:
        method: of `METHODS`.
        layout: of `LAYOUTS`.
        landscapes: (k, a, omega), shape (landscapes, 3).
        rates: shape (rates,).
        limit: on the steps.

    Returns:
        Steps, float (landscapes, rates), inf where it has not arrived, and where it has diverged, bool (landscapes, rates).
    """
    one = functools.partial(_race, method, layout, limit)
    every = jax.jit(jax.vmap(jax.vmap(one, (None, 0)), (0, None)))
    steps, held, last = map(np.asarray, every(jnp.asarray(landscapes), jnp.asarray(rates)))
    return np.where(held == HELD, steps - HELD + 1, np.inf), ~(last < DIVERGED)


def trace(method: str, layout: str, setting: tuple, rate: float, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """The path of a method in one landscape.

    Returns:
        (r, theta) after each step, shape (steps, 2), and psi there, shape (steps,).
    """
    setting = jnp.asarray(setting)

    def step(carry, _):
        position, state = advance(method, setting, rate, *carry)
        return (position, state), (position.reshape(-1), height(position, setting))

    positions, heights = jax.jit(lambda: jax.lax.scan(step, _begin(layout), length=steps)[1])()
    return np.asarray(positions), np.asarray(heights)


def arrival(heights: np.ndarray) -> float:
    """The first of `HELD` steps in a row below the tolerance, counted from 1; inf when there is none."""
    held = 0
    for step, value in enumerate(heights, start=1):
        held = held + 1 if value < TOLERANCE else 0
        if held == HELD:
            return step - HELD + 1
    return math.inf


def reproduce(method: str, layout: str, limit: int) -> dict[str, Any]:
    """Steps at the reproduction's setting, beside the published ones, and the path's start; None: not arrived or not published."""
    positions, heights = trace(method, layout, SETTING, RATE, limit)
    published = PUBLISHED.get(method) if layout == 'column' else None
    path = [START, *(position for position in positions[:PATH_STEPS].tolist() if max(map(abs, position)) < DIVERGED)]
    steps = arrival(heights)
    return dict(
        reproduction=dict(setting=SETTING, learning_rate=RATE, steps=_stored(steps), published=published),
        path=[[round(coordinate, 4) for coordinate in position] for position in path],
    )


def summarise(steps: np.ndarray, diverged: np.ndarray, baseline: np.ndarray, args: Args) -> dict[str, Any]:
    """What is stored of a method's race, against heavy ball's; steps (landscapes, rates) as from `race`."""
    best, arrived = steps.argmin(1), np.isfinite(steps.min(1))
    chosen = args.learning_rates[best[arrived]]
    return dict(
        steps=[[_stored(value) for value in row] for row in steps],
        landscapes=len(steps),
        arrived=int(arrived.sum()),
        runs=dict(arrived=int(np.isfinite(steps).sum()), diverged=int(diverged.sum()), all=steps.size),
        best_rates=[float(chosen.min()), float(chosen.max())] if len(chosen) else None,
        best_at_edge=int(np.isin(best[arrived], (0, steps.shape[1] - 1)).sum()),
        at_best_rates=compare(steps.min(1, keepdims=True), baseline.min(1, keepdims=True), args.seed),
        at_equal_rates=compare(steps, baseline, args.seed),
    )


def compare(steps: np.ndarray, baseline: np.ndarray, seed: int) -> dict[str, Any]:
    """Which of two methods arrives first.

    Args:
        steps: of a method, (landscapes, rates), inf where it has not arrived.
        baseline: of the other, likewise.
        seed: of the bootstrap.

    Returns:
        Numbers of runs in which the method was 'faster', 'slower' or 'equal', and in which it, the baseline or 'neither' alone arrived;
        'ratios': each landscape's median ratio of steps over the rates where both arrived, None without such a rate; their 'median',
        with a 95 % bootstrap 'interval' over landscapes, and of how many they are below 1 ('landscapes_faster') or above.
    """
    both, mine, other = np.isfinite(steps) & np.isfinite(baseline), np.isfinite(steps), np.isfinite(baseline)
    ratios = [_median_ratio(*pair) for pair in zip(steps, baseline, strict=True)]
    finite = np.array([ratio for ratio in ratios if ratio is not None])
    median, interval = _bootstrap(finite, seed) if len(finite) else (None, None)
    return dict(
        faster=int((both & (steps < baseline)).sum()), slower=int((both & (steps > baseline)).sum()),
        equal=int((both & (steps == baseline)).sum()), only_method=int((mine & ~other).sum()), only_baseline=int((other & ~mine).sum()),
        neither=int((~mine & ~other).sum()), ratios=ratios, median=median, interval=interval,
        landscapes_faster=int((finite < 1).sum()), landscapes_slower=int((finite > 1).sum()),
    )  # fmt: skip


def draw(rows: list[dict], path: str | os.PathLike, layout: str = 'column') -> None:
    """Draws the valley with two paths, and the ratios of steps, as a PNG.

    Args:
        rows: of this experiment; the latest of each method counts.
        path: of the picture.
        layout: whose rows are drawn.
    """
    latest = {row['model']: row for row in rows if row['config']['layout'] == layout}
    figure = Figure(figsize=(10.5, 4.4), layout='constrained')
    valley, ratios = figure.subplots(1, 2)
    _draw_paths(valley, latest)
    _draw_ratios(ratios, {name: row['metrics'] for name, row in latest.items() if name != BASELINE})
    figure.savefig(path, dpi=110)


def _race_all(args: Args, layout: str) -> None:
    baseline = None
    for method in METHODS:  # heavy ball is the first
        began = time.monotonic()
        steps, diverged = race(method, layout, args.landscapes, args.learning_rates, args.steps)
        baseline = steps if baseline is None else baseline
        metrics = summarise(steps, diverged, baseline, args) | reproduce(method, layout, args.steps)
        print(f'{layout:<8}{method:<17}{_summary(metrics)}', flush=True)
        if not args.smoke:
            append_row(args.results, _row(args, method, layout, metrics, time.monotonic() - began))


def _optimizer(method: str, rate: Any, squared: jax.Array) -> optax.GradientTransformation:
    form, erase_rate = METHODS[method]
    return delta_momentum(rate, DECAY, erase_rate(rate, squared), form=form)


def _begin(layout: str) -> tuple[jax.Array, optax.OptState]:
    position = jnp.asarray(START).reshape(LAYOUTS[layout])
    return position, delta_momentum(1.0).init(position)


def _race(method: str, layout: str, limit: int, setting: jax.Array, rate: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    def running(carry):
        step, held, last, *_ = carry
        return (step < limit) & (held < HELD) & (last < DIVERGED)

    def body(carry):
        step, held, _, position, state = carry
        position, state = advance(method, setting, rate, position, state)
        reached = height(position, setting)
        return step + 1, jnp.where(reached < TOLERANCE, held + 1, 0), reached, position, state

    position, state = _begin(layout)
    return jax.lax.while_loop(running, body, (0, 0, height(position, setting), position, state))[:3]


def _median_ratio(steps: np.ndarray, baseline: np.ndarray) -> float | None:
    both = np.isfinite(steps) & np.isfinite(baseline)
    return float(np.median(steps[both] / baseline[both])) if both.any() else None


def _bootstrap(values: np.ndarray, seed: int, resamples: int = 10_000) -> tuple[float, list[float]]:
    drawn = np.random.default_rng(seed).choice(values, (resamples, len(values)))
    return float(np.median(values)), np.quantile(np.median(drawn, 1), (0.025, 0.975)).tolist()


def _stored(steps: float) -> int | None:
    return int(steps) if math.isfinite(steps) else None


def _summary(metrics: dict) -> str:
    def one(result: dict) -> str:
        ratio = '-' if result['median'] is None else f'{result["median"]:.2f} [{result["interval"][0]:.2f}, {result["interval"][1]:.2f}]'
        return f'{result["faster"]} / {result["slower"]}, {ratio}'

    runs, reproduction = metrics['runs'], metrics['reproduction']
    return (
        f'{metrics["arrived"]:>3}/{metrics["landscapes"]:<5}{runs["diverged"] / runs["all"]:<10.0%}{one(metrics["at_best_rates"])} '
        f'({one(metrics["at_equal_rates"])})   one setting: {reproduction["steps"]}, published {reproduction["published"]}'
    )


def _row(args: Args, method: str, layout: str, metrics: dict, wall_s: float) -> dict:
    grid = {name: getattr(args, name) for name in ('k', 'a', 'omega', 'rates', 'rates_a_decade', 'steps')}
    config = grid | dict(layout=layout, start=START, decay=DECAY, tolerance=TOLERANCE, held=HELD, dtype='float64', seed=args.seed)
    return make_row(
        experiment=EXPERIMENT, model=method, seed=args.seed, config=config, metrics=metrics, hardware=hardware_name(jax.devices()),
        wall_s=wall_s,
    )  # fmt: skip


def _draw_paths(axes: Axes, latest: dict[str, dict], drawn: tuple[str, ...] = (BASELINE, 'clipped')) -> None:
    paths = {name: np.array(latest[name]['metrics']['path']) for name in drawn}
    every = np.concatenate(list(paths.values()))
    low, high = every.min(0) - np.array([0.7, 1.6]), every.max(0) + 0.7  # room for the legend below
    r, theta = np.meshgrid(np.linspace(low[0], high[0], 300), np.linspace(low[1], high[1], 300))
    k, a, omega = SETTING
    axes.contour(r, theta, r**2 + k * (r - theta + a * np.sin(omega * r)) ** 2, np.geomspace(0.1, 1000, 13), cmap='Greys_r', linewidths=0.6)
    for (name, points), style in zip(paths.items(), ('o-', 's-'), strict=True):
        steps = latest[name]['metrics']['reproduction']['steps']
        axes.plot(*points.T, style, markersize=2.2, linewidth=0.9, label=f'{name}: {steps} steps')
    axes.plot(*START, 'k>', markersize=6)
    axes.plot(0, 0, 'k*', markersize=9)
    axes.set(xlabel='r', ylabel='theta', title=f'k = {k:g}, a = {a:g}, omega = {omega:g}, learning rate {RATE}')
    axes.legend(loc='lower right')


def _draw_ratios(axes: Axes, methods: dict[str, dict]) -> None:
    for field, label, offset, marker in (('at_best_rates', 'best rate of each', 0.16, 'o'), ('at_equal_rates', 'equal rates', -0.16, 's')):
        rows = [[ratio for ratio in metrics[field]['ratios'] if ratio is not None] for metrics in methods.values()]
        points = [(ratio, place + offset) for place, ratios in enumerate(rows) for ratio in ratios]
        medians = [(np.median(ratios), place + offset) for place, ratios in enumerate(rows) if ratios]
        dots = axes.plot(*zip(*points, strict=True), marker, label=label, markersize=4, alpha=0.4, markeredgewidth=0)[0] if points else None
        if dots:
            axes.plot(*zip(*medians, strict=True), '|', color=dots.get_color(), markersize=15, markeredgewidth=2)
    axes.axvline(1, color='k', linewidth=0.8)
    axes.set_xscale('log')
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter('{x:g}')
    axes.xaxis.set_minor_formatter(NullFormatter())
    labels = [f'{name}\n{metrics["arrived"]} of {metrics["landscapes"]} arrive' for name, metrics in methods.items()]
    axes.set_yticks(range(len(methods)), labels)
    axes.set(xlabel='steps relative to heavy ball, by landscape; bars: medians', title='left of 1 delta momentum is faster')
    axes.grid(alpha=0.3, axis='x')
    axes.legend(loc='upper right')


if __name__ == '__main__':
    sys.exit(main())
