"""Fair races of optimizers: many runs as lanes of one compiled program, an equal search for each, and what counts as a difference."""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy import stats

from nested_jax.layers.delta_descent import delta_dense
from nested_jax.training.compiled import matrix_flops

PyTree = Any
WARMUP_SHARE = 0.1  # of the steps
GRID_STEP, FINE_STEP = 10**0.5, 10**0.125  # between learning rates, first and around the best
MAX_EXTENSIONS = 8  # of the learning rates' grid, and of the other grids
FINE, AROUND = (-2, -1, 1, 2), (-4, -1, 1, 4)  # fine steps from the best learning rate, at first and in each round; four are a step
EXTRA = 4  # settings tried for the baseline beyond those of the others
OVERTIME = 4  # settings at most beyond the budget, where it ends with the best rate at the edge of what was tried
PLATEAU = 0.01  # of the loss; a gain below counts for nothing, so an edge is none there: delta gradient descent has no largest useful rate
WEIGHT_DECAYS, DECAY_STEP = (0.0, 0.01, 0.1), 10
OTHERS = ('weight_decay', 'knob')  # what is searched beside the rate
HORIZON_STEP = 2  # between the steps, 1 / (1 - decay), that a momentum remembers
DEVIATIONS = 3.09  # one-sided p = 0.001 of a normal distribution
P_LIMIT = 0.01  # of the paired t-test
POINTS = 10  # of a run's curve of losses; they divide its steps


class Setting(NamedTuple):
    """What is searched."""

    rate: float
    weight_decay: float
    knob: float


@dataclasses.dataclass(frozen=True)
class Task:
    """A model, its data and a number of steps, the same for every optimizer."""

    steps: int
    data: PyTree  # arrays that all runs read
    init: Callable[[jax.Array], PyTree]  # key -> parameters
    # Both None where the runs read their batches from files.
    draw: Callable[[PyTree, jax.Array, jax.Array], PyTree] | None  # data, the run's key, step -> batch
    heldout: Callable[[PyTree, jax.Array], tuple[PyTree, PyTree]] | None  # data, the run's key -> batches for search and comparison
    loss: Callable[[PyTree, PyTree], jax.Array]  # parameters, batch -> scalar
    ceiling: float  # the loss of knowing nothing, with which a diverged run counts
    decay_share: float  # of the steps, at the end, over which the learning rate falls to zero
    budget: int = 32  # settings tried for every optimizer
    source: str = ''  # digest of data that are not the same everywhere


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """An optimizer and where its search begins."""

    make: Callable[[optax.Schedule, jax.Array, jax.Array], optax.GradientTransformation]  # learning rate, weight decay, knob
    rate: float  # in the middle of the first grid
    knob: str  # name of its own hyper-parameter, the decay of a moment
    knobs: tuple[float, ...]  # the default, then what is tried in its place
    period: int = 1  # steps of which one takes the dearer branch of its conditionals
    delta: bool = False  # delta gradient descent: the gradient of linear layers is that of the cheap form


class Losses(NamedTuple):
    """Of one run, on text, images or sequences that it was not trained on."""

    search: jax.Array  # at the last step, for choosing a setting
    curve: jax.Array  # (POINTS,), on other data, at equal distances and the last step, for comparing optimizers


class Trials(NamedTuple):
    """What a search has found."""

    best: Setting
    losses: dict[Setting, float]
    at_edge: tuple[str, ...]  # of the best setting, what lies at an edge of its grid, however far that was extended


class Runs:
    """Runs of one optimizer on one task: `lanes` of them side by side, in one compiled program."""

    def __init__(self, task: Task, optimizer: Optimizer, lanes: int):
        self.task, self.optimizer, self.lanes = task, optimizer, lanes
        self._seconds: list[float] = []  # of the processor for a step, in each call without a curve
        one = functools.partial(train_one, task, optimizer)
        self._together = jax.jit(jax.vmap(one, (None, 0, Setting(0, 0, 0), None)))

    def __call__(self, seeds: Sequence[int], settings: Sequence[Setting], *, curve: bool = True) -> Losses:
        """Losses, stacked, one for each pair of a seed and a setting; a last call of too few is filled up with its last run.

        Without `curve`, whose losses take longer than many steps, it has no points.
        """
        parts = []
        for start in range(0, len(seeds), self.lanes):
            chosen = [min(index, len(seeds) - 1) for index in range(start, start + self.lanes)]
            stacked = Setting(*(np.array([settings[index][field] for index in chosen], np.float32) for field in range(3)))
            began = time.process_time()
            lanes = self._together(self.task.data, np.array([seeds[index] for index in chosen], np.uint32), stacked, curve)
            parts.append(jax.block_until_ready(lanes))
            if not curve:
                self._seconds.append((time.process_time() - began) / (self.lanes * self.task.steps))
        losses = jax.tree.map(lambda *part: np.concatenate(part)[: len(seeds)].astype(float), *parts)
        return losses if curve else losses._replace(curve=losses.curve[:, :0])

    def costs(self) -> dict[str, float]:
        """What one step of one run costs, after a search: CPU seconds of all threads, FLOPs, and what it keeps in memory.

        The seconds are those of the fastest call without a curve, with its one held-out loss.
        """
        carry = jax.eval_shape(functools.partial(begin, self.task, self.optimizer), jnp.uint32(0), _first_setting(self.optimizer))
        return dict(step_seconds=min(self._seconds), flops=step_flops(self.task, self.optimizer)) | sizes(*carry)


def train_one(task: Task, optimizer: Optimizer, data: PyTree, seed: jax.Array, setting: Setting, curve: jax.Array) -> Losses:
    """One run from its initial values to its last step; its loss is that of knowing nothing where it has diverged.

    Without `curve` that has NaN.
    """
    for_search, for_comparison = task.heldout(data, jax.random.key(seed))

    def loss(params, batch):
        value = task.loss(params, batch)
        return jnp.where(value < task.ceiling, value, task.ceiling)  # which NaN is not

    def to_next_point(carry, part):
        (start, stop), last = part, part[0] == part[1]
        carry = jax.lax.fori_loop(start, stop, lambda index, carry: advance(task, optimizer, data, seed, setting, carry, index), carry)
        batch = jax.tree.map(functools.partial(jnp.where, last), for_search, for_comparison)
        return carry, jax.lax.cond(curve | last, lambda: loss(carry[0], batch), lambda: jnp.nan)

    # The loss for the search is one more point, no step after the last: of a second call there would be more to compile.
    stops = jnp.minimum(jnp.arange(POINTS + 2) * (task.steps // POINTS), task.steps)
    _, points = jax.lax.scan(to_next_point, begin(task, optimizer, seed, setting), (stops[:-1], stops[1:]))
    return Losses(points[-1], points[:-1])


def begin(task: Task, optimizer: Optimizer, seed: jax.Array, setting: Setting) -> tuple[PyTree, PyTree]:
    """Parameters and the optimizer's state before the first step."""
    params = task.init(jax.random.fold_in(jax.random.key(seed), task.steps))
    return params, _transformation(task, optimizer, setting).init(params)


def advance(
    task: Task, optimizer: Optimizer, data: PyTree, seed: jax.Array, setting: Setting, carry: tuple[PyTree, PyTree], index: jax.Array
) -> tuple[PyTree, PyTree]:
    """One step of a run, with the batch that is its own."""
    return learn(task, optimizer, setting, carry, index, task.draw(data, jax.random.key(seed), index))


def learn(
    task: Task, optimizer: Optimizer, setting: Setting, carry: tuple[PyTree, PyTree], index: jax.Array, batch: PyTree
) -> tuple[PyTree, PyTree]:
    """One step on a batch: parameters and the optimizer's state, before and after."""
    params, state = carry
    if optimizer.delta:
        with nn.intercept_methods(delta_dense(rate_schedule(task, setting.rate)(index))):
            gradient = jax.grad(task.loss)(params, batch)
    else:
        gradient = jax.grad(task.loss)(params, batch)
    updates, state = _transformation(task, optimizer, setting).update(gradient, state, params)
    return optax.apply_updates(params, updates), state


def rate_schedule(task: Task, rate: jax.Array) -> optax.Schedule:
    """Linear warm-up, a plateau, and a linear decay to zero over the task's share of the steps."""
    warmup, decay = max(1, round(WARMUP_SHARE * task.steps)), max(1, round(task.decay_share * task.steps))
    ending = lambda count: jnp.minimum(1.0, (task.steps - count) / decay) if task.decay_share else 1.0
    return lambda count: rate * jnp.minimum(1.0, (count + 1) / warmup) * ending(count)


def search(evaluate: Callable[[list[Setting]], Sequence[float]], optimizer: Optimizer, budget: int, *, extra: bool = False) -> Trials:
    """The best of a number of settings.

    Five learning rates, extended by two wherever the best is at an edge, until it is not or the losses have levelled off, and four around
    the best. Then rounds, until one gains nothing that counts: two weight decays and two values of the optimizer's own
    hyper-parameter, each alone, and four learning rates, near and a step away, around the best of these. The grids of the former two are
    extended by two as well, except below zero: no weight decay and a moment that forgets at once are ends of what there is. Settings that
    are left then are rates ever nearer to the best. Where the budget ends before the other side of the best rate, OVERTIME goes there.

    Args:
        evaluate: settings -> losses.
        optimizer: whose settings are tried.
        budget: how many.
        extra: EXTRA settings more, for the baseline: the four combinations of decay and hyper-parameter too in the first round.
    """
    losses: dict[Setting, float] = {}
    budget += EXTRA * extra
    best = lambda: min(losses, key=losses.get)

    def measure(settings: list[Setting], budget: int = budget) -> None:
        new = [setting for setting in dict.fromkeys(settings) if setting not in losses][: budget - len(losses)]
        losses.update(zip(new, map(float, evaluate(new) if new else []), strict=True))

    first, grid = Setting(optimizer.rate, WEIGHT_DECAYS[0], optimizer.knobs[0]), [-2, -1, 0, 1, 2]
    measure(_rates(first, GRID_STEP, grid))
    while (edge := _edge(losses, _rate_line(losses, first))) and len(grid) < 5 + 2 * MAX_EXTENSIONS:
        beyond = [min(grid) - 2, min(grid) - 1] if edge < 0 else [max(grid) + 1, max(grid) + 2]
        grid += beyond
        measure(_rates(first, GRID_STEP, beyond))
    measure(_rates(best(), FINE_STEP, FINE))
    moving, rounds = True, 0
    while moving:
        center, rounds = best(), rounds + 1
        others = [center._replace(weight_decay=value) for value in WEIGHT_DECAYS]
        measure(others + [center._replace(knob=value) for value in optimizer.knobs])
        if extra and rounds == 1:
            measure([other._replace(knob=value) for other in others for value in optimizer.knobs])
        for _ in range(MAX_EXTENSIONS):
            measure([setting for field in OTHERS for setting in _past_edge(losses, best(), field)])
        measure(_rates(best(), FINE_STEP, AROUND))
        moving = losses[center] - losses[best()] > PLATEAU * abs(losses[best()])
    at_edge = [field for field in OTHERS if _past_edge(losses, center, field)]
    step = FINE_STEP
    while len(losses) < budget and step > 1 + 1e-4:
        step **= 0.5
        measure(_rates(best(), step, (-1, 1)))
    while (edge := _edge(losses, line := _rate_line(losses, best()))) and len(losses) < budget + OVERTIME:
        measure(_rates(line[0] if edge < 0 else line[-1], FINE_STEP, (edge, 4 * edge)), budget + OVERTIME)
    return Trials(best(), losses, (*(['rate'] if edge else []), *at_edge))


def _rate_line(losses: dict[Setting, float], setting: Setting) -> list[Setting]:
    """What was tried with a setting's weight decay and knob, by rate."""
    return sorted(other for other in losses if other[1:] == setting[1:])


def _past_edge(losses: dict[Setting, float], best: Setting, field: str) -> list[Setting]:
    """The best setting with the next two values of a field; none where it is between values that were tried, or at zero."""
    tried, here = sorted({getattr(setting, field) for setting in losses}), getattr(best, field)
    if here not in (tried[0], tried[-1]) or here == 0:
        return []
    line = [setting for setting in (best._replace(**{field: value}) for value in tried) if setting in losses]
    if len(line) > 2 and not _edge(losses, line):
        return []
    further = functools.partial(_further, field, 1 if here == tried[-1] else -1)
    return [best._replace(**{field: value}) for value in dict.fromkeys((further(here), further(further(here))))]


def _further(field: str, direction: int, value: float) -> float:
    """The next value of a grid."""
    if field == 'weight_decay':  # upwards: the grid begins at zero
        return _rounded(value * DECAY_STEP)
    return max(0.0, round(1 - (1 - value) * HORIZON_STEP**-direction, 9))


def _edge(losses: dict[Setting, float], grid: list[Setting]) -> int:
    """-1 where the lowest rate of a grid is the best, or all have diverged; 1 where the highest is; 0 where one between is as good."""
    ordered = [losses[setting] for setting in grid]
    lowest, highest, between = ordered[0], ordered[-1], min(ordered[1:-1], default=math.inf)
    if between - min(lowest, highest) <= PLATEAU * abs(between) and len(set(ordered)) > 1:
        return 0
    return 1 if highest < lowest else -1


def _rates(setting: Setting, ratio: float, exponents: Sequence[int]) -> list[Setting]:
    return [setting._replace(rate=_rounded(setting.rate * ratio**exponent)) for exponent in exponents]


def _rounded(value: float) -> float:
    """So that a value reached on two ways is one value."""
    return float(f'{value:.6g}')


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half the width of its 95 % confidence interval by Student's t; at least two values."""
    return float(np.mean(values)), float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))


def share_to_reach(target: float, curve: Sequence[float]) -> float | None:
    """Share of a run's steps after which its curve, straight between its points, first is at a loss or below; None where it never is."""
    for index, loss in enumerate(curve):
        if loss <= target:
            done = (curve[index - 1] - target) / (curve[index - 1] - loss) if index else 1.0
            return (index + done) / len(curve)
    return None


def compare(losses: Sequence[float], baseline: Sequence[float], sigma: float) -> dict[str, Any]:
    """Whether one optimizer's losses are another's, by seed.

    A is better than B only if :math:`(mean_B - mean_A) / \\sqrt{1/n_A + 1/n_B} \\ge 3.09 \\sigma` and the paired t-test agrees with p
    below 0.01; worse likewise.

    Args:
        losses: of A, one for each seed.
        baseline: of B, of the same seeds.
        sigma: standard deviation over seeds, of the runs of the race's baseline.

    Returns:
        'difference' of the means (above 0: A is better), the 'resolvable' one, 'wins' of A, 'p' of the paired t-test, and the
        'verdict': 'better', 'worse' or 'equal', the last for what cannot be told apart.
    """
    gaps = np.subtract(baseline, losses)
    difference = float(gaps.mean())
    resolvable = DEVIATIONS * sigma * math.sqrt(1 / len(losses) + 1 / len(baseline))
    p = paired_p(gaps)
    told = abs(difference) >= resolvable and p < P_LIMIT
    verdict = ('better' if difference > 0 else 'worse') if told else 'equal'
    return dict(difference=difference, resolvable=resolvable, wins=int((gaps > 0).sum()), p=p, verdict=verdict)


def paired_p(gaps: Sequence[float]) -> float:
    """Two-sided p of Student's t-test that the mean of the gaps is zero."""
    if np.ptp(gaps) <= 1e-9 * np.max(np.abs(gaps)):  # equal but for rounding, which the test is not made for
        return float(gaps[0] == 0)
    return float(stats.ttest_1samp(gaps, 0).pvalue)


def loss_after_a_step(task: Task, optimizer: Optimizer) -> float:
    """Of a run whose search has not begun, on its second batch."""
    setting, seed = _first_setting(optimizer), jnp.uint32(0)

    @jax.jit
    def second_loss(data):
        params, _ = advance(task, optimizer, data, seed, setting, begin(task, optimizer, seed, setting), jnp.int32(0))
        return task.loss(params, task.draw(data, jax.random.key(seed), jnp.int32(1)))

    return float(second_loss(task.data))


def step_flops(task: Task, optimizer: Optimizer) -> float:
    """`mean_flops` of one step of one run."""
    setting, index = _first_setting(optimizer), jnp.int32(0)
    carry = jax.eval_shape(functools.partial(begin, task, optimizer), jnp.uint32(0), setting)
    batch = jax.eval_shape(task.draw, task.data, jax.random.key(0), index)
    return mean_flops(jax.make_jaxpr(functools.partial(learn, task, optimizer))(setting, carry, index, batch), optimizer)


def mean_flops(step: Any, optimizer: Optimizer) -> float:
    """`matrix_flops` of a traced step, the mean over the optimizer's period."""
    usual, dearest = (matrix_flops(step, branch) for branch in (min, max))
    return usual + (dearest - usual) / optimizer.period


def sizes(params: PyTree, state: PyTree) -> dict[str, float]:
    """The number of parameters, and the state's bytes for each."""
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    return dict(state_bytes=sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)) / count, parameters=count)


def _first_setting(optimizer: Optimizer) -> Setting:
    return Setting(*map(jnp.float32, (optimizer.rate, WEIGHT_DECAYS[0], optimizer.knobs[0])))


def _transformation(task: Task, optimizer: Optimizer, setting: Setting) -> optax.GradientTransformation:
    return optimizer.make(rate_schedule(task, setting.rate), setting.weight_decay, setting.knob)
