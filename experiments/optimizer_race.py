"""Optimizers of Nested Learning against tuned AdamW and Muon: `python -m experiments.optimizer_race`.

Four tasks (`experiments/race_tasks.py`), each with a fixed model, batch size, number of steps, clipping at norm 1, warm-up and decay:

    char-lm   bytes of the running Python's standard library, a Transformer of two layers of width 64
    digits    scikit-learn's digits, a vision transformer of two blocks of width 48; needs the extra `race`
    recall    associative recall, two to four pairs in 32 tokens
    stream    three regressions with orthogonal gradients, one after the other, judged on all three (Eq. 45, arXiv:2512.24695v1)

    adamw, muon, sgd           the baselines; sgd has momentum
    m3, m3-fast                M3 with a slow momentum of period 10 and weight 0.1, and with none: else they are the same, searched alike
    delta-momentum             heavy ball written by the delta rule, proximal form
    deep-momentum              DMGD, a network as momentum
    delta-gradient-descent     the cheap form on linear layers, not clipped, with momentum where the search wants it; a language model's
                               embedding and head, which are none, and norms and biases follow the gradient

Every optimizer has the same search (`racing.search`) and tries as many settings: 32, on the stream, whose runs take no time, 40; adamw four
more, and up to four more where the best rate would be at the edge of what was tried, which m3-fast had two of on digits. Learning rates
on a grid of half decades, extended while the best is at its edge, refined, then weight decay, one hyper-parameter of
its own, the decay of a moment, and the rate again, round by round until a round gains less than a hundredth of the loss, and finer rates
for what is left, in one seed. The grids of decay and hyper-parameter are extended in the same way, except below zero, which is the end of
what there is. The best setting runs with ten fresh seeds, of initial values and of data. The loss at the last step is what is searched
and, on other data, what is compared. A difference counts when it is 3.09 standard deviations of adamw's runs, times the root of 2 / 10,
and the test paired by seed agrees (p < 0.01). Beside it stand the steps, CPU seconds and FLOPs in which the mean curve comes to adamw's
last mean loss, as shares of adamw's whole run, the loss when adamw's seconds and FLOPs are spent, and the bytes of the state. A step has
1,024 tokens (the stream's 32 inputs), a quarter of what the race's protocol asks for, to save time; Muon's iterations are a sixth of the
FLOPs there. M3's FLOPs are the mean over a period of its slow momentum.

Two controls run at adamw's setting: adamw-again, with other seeds, must come out equal, and adamw-flipped, whose momentum has the wrong
sign, worse. The exit code is 1 where one does not, or where the best of what is searched is still at an edge. Rows are in
results/optimizer_race.jsonl. On two cores the race took 28 minutes in two processes, which `--tasks char-lm digits` and `--tasks recall
stream` make, 54 minutes of a core in all. A step's CPU seconds are those of the fastest call of the search, its held-out loss included.

What came out: M3 and muon are better than adamw on char-lm, digits and recall, worse on the stream, and not told apart. M3's slow momentum
makes no difference that counts on any task, the stream that it is meant for included: on digits the loss is higher with it in nine seeds of
ten, on recall lower in all ten. On the stream sgd, delta momentum and deep momentum are better than all others and not told apart; on the
other tasks they are behind adamw, but for delta momentum on char-lm; recall none of them learns. Delta gradient descent is last: its best
rate in the search's seed is at the edge of stability, and on char-lm seven of ten runs diverged there. Why was not measured; on the stream
the learning rate does not fall, so that updates of a fixed size, such as muon's, may not settle. M3's slow momentum has one period and one
weight in all of this, and a search has one seed.

`--scale paper` races on ImageNet-21K instead, the paper's Fig. 11, or on another set of tensorflow-datasets (`experiments/race_images.py`),
with the same search and the same verdicts; seconds are then by the wall clock. It is not run here.
"""

import concurrent.futures
import dataclasses
import functools
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import numpy as np
import optax
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.arguments import parse_arguments
from experiments.race_images import RUNS, ImageData, ImageRuns, Images, image_task
from experiments.race_tasks import STEPS, TASKS, check_digits, has_digits
from experiments.racing import POINTS, Optimizer, Runs, Setting, Task, compare, interval, loss_after_a_step, search, share_to_reach
from nested_jax.evaluation.rows import append_row, hardware_name, make_row, read_rows
from nested_jax.optim import deep_momentum, delta_gradient_descent, delta_momentum, m3, muon
from nested_jax.optim.matrix_specs import default_label
from nested_jax.training.optimizer import clip_by_global_norm

EXPERIMENT = 'optimizer_race'
RESULTS = pathlib.Path(__file__).parent / 'results' / f'{EXPERIMENT}.jsonl'
BASELINES = ('adamw', 'muon')
AGAIN, FLIPPED = 'adamw-again', 'adamw-flipped'
SEARCH_SEED, AGAIN_OFFSET = 2**20, 2**21  # apart from the seeds of the final runs
SENSITIVITY = (1 / 3, 3)  # factors of the learning rate
SLOW_PERIOD, SLOW_WEIGHT, SLOW_DECAY = 10, 0.1, 0.9


def matrices(params: Any) -> Any:
    """Marks what weight decay and delta momentum act on: what muon takes for a matrix."""
    name = functools.partial(jax.tree_util.keystr, simple=True, separator='/')
    return jax.tree_util.tree_map_with_path(lambda path, leaf: default_label(name(path), leaf) == 'matrix', params)


def _clipped(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    return optax.chain(clip_by_global_norm(1.0), optimizer)


def _adamw(sign: int, rate: optax.Schedule, weight_decay: jax.Array, b2: jax.Array) -> optax.GradientTransformation:
    return _clipped(optax.adamw(rate, sign * 0.9, b2, weight_decay=weight_decay, mask=matrices))


def _muon(rate, weight_decay, beta):
    return _clipped(muon(rate, beta, weight_decay, matrices, scaling='moonshot', adam_weight_decay=weight_decay))


def _m3(periods: tuple[int, ...], rate: optax.Schedule, weight_decay: jax.Array, b1: jax.Array) -> optax.GradientTransformation:
    slow = dict(periods=periods, alpha=(SLOW_WEIGHT,) * len(periods), b3=(SLOW_DECAY,) * len(periods))
    return _clipped(m3(rate, b1, weight_decay=weight_decay, weight_decay_mask=matrices, scaling='rms', **slow))


def _sgd(rate, weight_decay, decay):
    return _clipped(optax.chain(optax.trace(decay), optax.add_decayed_weights(weight_decay, matrices), optax.scale_by_learning_rate(rate)))


def _delta_momentum(rate, weight_decay, decay):
    decayed = dict(weight_decay=weight_decay, weight_decay_mask=matrices)
    return _clipped(delta_momentum(rate, decay, **decayed, form='proximal', mask=matrices))


def _deep_momentum(rate, weight_decay, decay):
    return _clipped(deep_momentum(rate, decay=decay, weight_decay=weight_decay, weight_decay_mask=matrices))


def _delta_gradient_descent(rate, weight_decay, decay):
    return optax.chain(optax.trace(decay), delta_gradient_descent(rate, 'mean', weight_decay, matrices, exact=False))


_MOMENTUM, _M3 = dict(knob='decay', knobs=(0.9, 0.8, 0.95)), dict(rate=1e-2, knob='b1', knobs=(0.95, 0.9, 0.98))
OPTIMIZERS = {
    'adamw': Optimizer(functools.partial(_adamw, 1), 3e-3, 'b2', (0.999, 0.95, 0.99)),
    'muon': Optimizer(_muon, 1e-2, 'beta', (0.95, 0.9, 0.98)),
    'm3': Optimizer(functools.partial(_m3, (SLOW_PERIOD,)), **_M3, period=SLOW_PERIOD),
    'm3-fast': Optimizer(functools.partial(_m3, ()), **_M3),
    'sgd': Optimizer(_sgd, 0.1, **_MOMENTUM),
    'delta-momentum': Optimizer(_delta_momentum, 0.1, **_MOMENTUM),
    'deep-momentum': Optimizer(_deep_momentum, 0.1, **_MOMENTUM),
    'delta-gradient-descent': Optimizer(_delta_gradient_descent, 0.1, 'decay', (0.0, 0.5, 0.9), delta=True),
}
CONTROL = Optimizer(functools.partial(_adamw, -1), OPTIMIZERS['adamw'].rate, 'b2', OPTIMIZERS['adamw'].knobs)


@dataclasses.dataclass(frozen=True)
class Args:
    """Race optimizers with equal budgets for their search, and say which differences count."""

    scale: Literal['cpu', 'paper'] = 'cpu'
    """The small tasks, or a vision transformer on prepared images (see images)."""
    tasks: tuple[Literal['char-lm', 'digits', 'recall', 'stream'], ...] = tuple(TASKS)
    """What is learned with --scale cpu."""
    optimizers: tuple[
        Literal['adamw', 'muon', 'm3', 'm3-fast', 'sgd', 'delta-momentum', 'deep-momentum', 'delta-gradient-descent'], ...
    ] = tuple(OPTIMIZERS)
    """Adamw is always run: differences are measured by its seeds."""
    seeds: int = 10
    """Final runs of each optimizer."""
    steps_share: float = 1.0
    """Of each task's steps."""
    images: Images = Images()
    """What is learned with --scale paper."""
    lanes: int = 2
    """Runs side by side in one compiled program; with --scale paper they follow one another."""
    results: pathlib.Path = RESULTS
    """File that a row for each task and optimizer is added to; the picture is written beside it."""
    smoke: bool = False
    """A few steps, no row and no picture, to see that everything works; its numbers mean nothing. The race is on the last of the tasks;
    the others, digits where scikit-learn is installed, see one step of the last optimizer."""

    def __post_init__(self):
        for name in ('tasks', 'optimizers'):
            self._check(name, len(getattr(self, name)) >= 1, 'at least one')
        self._check('seeds', 2 <= self.seeds < SEARCH_SEED, f'an integer from 2 to below {SEARCH_SEED}')
        self._check('lanes', self.lanes >= 1, 'an integer of at least 1')
        self._check('steps_share', self.steps_share > 0, 'a number above 0')
        self._check('tasks', self.scale == 'cpu' or self.tasks == tuple(TASKS), '--scale cpu for them')
        if 'digits' in self.raced:
            check_digits()
        if self.scale == 'paper':
            ImageData(self.images)

    def _check(self, name: str, holds: bool, allowed: str) -> None:
        if not holds:
            raise ValueError(f'{name} is {getattr(self, name)!r}, allowed is {allowed}')

    @property
    def raced(self) -> tuple[str, ...]:
        """The tasks; of a smoke run the last."""
        if self.scale == 'paper':
            return (self.images.task,)
        return self.tasks[-1:] if self.smoke else self.tasks

    @property
    def tried(self) -> tuple[str, ...]:
        """The other tasks of a smoke run that can run here."""
        others = [name for name in self.tasks if self.smoke and name not in self.raced]
        return tuple(name for name in others if name != 'digits' or has_digits()) if self.scale == 'cpu' else ()

    @property
    def entrants(self) -> tuple[str, ...]:
        """Adamw and the others, each once."""
        return tuple(dict.fromkeys(('adamw', *self.optimizers)))

    def steps_of(self, task: str) -> int:
        """A multiple of the points of a curve."""
        steps = self.images.steps if self.scale == 'paper' else STEPS[task]
        return POINTS * max(1, round(self.steps_share * steps / POINTS))


def main(argv: list[str] | None = None) -> int:
    """Races on every task, prints, stores and draws what it measures; returns the exit code."""
    args = parse_arguments(Args, argv, __doc__)
    if args.smoke:
        args = dataclasses.replace(args, seeds=2, steps_share=1e-9)
    rows = []
    with concurrent.futures.ThreadPoolExecutor(1) as beside:  # most of a smoke run is compilation, which takes one core
        tries = beside.map(functools.partial(_try, args), args.tried)
        for name in args.raced:
            rows += _race(args, name)
            print('\n'.join(table(rows, name)), flush=True)
        for line in tries:
            print(line)
    if args.smoke:
        return 0
    draw(read_rows(args.results), args.results.with_suffix('.png'))
    for problem in (found := problems(rows)):
        print(problem, file=sys.stderr)
    return int(bool(found))


def _try(args: Args, name: str) -> str:
    """One step of the last optimizer on a task, as a line."""
    label, (task, _) = args.entrants[-1], _open(args, name)
    return f'{name:<24}{label:<24}{loss_after_a_step(task, OPTIMIZERS[label]):.4f}'


def _race(args: Args, name: str) -> list[dict]:
    (task, runs_of), rows = _open(args, name), []
    for optimizer in args.entrants:
        runs = runs_of(OPTIMIZERS[optimizer], optimizer)
        rows.append(_stored(args, name, optimizer, task, *_enter(args, runs, optimizer)))
        if optimizer == 'adamw':
            setting = Setting(**rows[0]['metrics']['setting'])
            rows += _controls(args, name, setting, {AGAIN: runs, FLIPPED: runs_of(CONTROL, FLIPPED)})
    return rows


def _open(args: Args, name: str) -> tuple[Task, Callable[[Optimizer, str], Runs | ImageRuns]]:
    """A task, and what makes the runs of an optimizer and its label."""
    steps = args.steps_of(name)
    if args.scale == 'cpu':
        task = TASKS[name](steps)
        return task, lambda optimizer, label: Runs(task, optimizer, args.lanes)
    data = ImageData(args.images, (jax.process_index(), jax.process_count()))
    task = image_task(args.images, steps, data.classes, data.source)
    stored = None if args.smoke else args.results.with_name(f'{RUNS}.jsonl')
    return task, lambda optimizer, label: ImageRuns(task, optimizer, label, data, stored)


def _enter(args: Args, runs: Runs | ImageRuns, name: str) -> tuple[dict, float]:
    began, optimizer = time.monotonic(), runs.optimizer
    evaluate = lambda settings: runs([SEARCH_SEED] * len(settings), settings, curve=False).search
    trials = search(evaluate, optimizer, runs.task.budget, extra=name == 'adamw')
    metrics = measure(runs, trials.best, range(args.seeds)) | runs.costs()
    shifted = [trials.best._replace(rate=trials.best.rate * factor) for factor in SENSITIVITY]
    few = range(2)
    pairs = [(seed, setting) for setting in shifted for seed in few]
    around = runs(*zip(*pairs, strict=True)).curve[:, -1].reshape(len(SENSITIVITY), len(few)).mean(1)
    searched = [[*setting, loss] for setting, loss in trials.losses.items()]
    sensitivity = [float(around[0]), float(np.mean(metrics['losses'][: len(few)])), float(around[1])]
    found = dict(setting=trials.best._asdict(), knob=optimizer.knob, searched=searched, at_edge=trials.at_edge, sensitivity=sensitivity)
    return metrics | found, time.monotonic() - began


def _controls(args: Args, name: str, setting: Setting, controls: dict[str, Runs | ImageRuns]) -> list[dict]:
    seeds = {AGAIN: range(AGAIN_OFFSET, AGAIN_OFFSET + args.seeds), FLIPPED: range(args.seeds)}
    rows = []
    for label, runs in controls.items():
        began = time.monotonic()
        metrics = measure(runs, setting, seeds[label]) | dict(setting=setting._asdict())
        rows.append(_stored(args, name, label, runs.task, metrics, time.monotonic() - began))
    return rows


def measure(runs: Runs | ImageRuns, setting: Setting, seeds: Sequence[int]) -> dict[str, Any]:
    """At one setting: held-out losses by seed, the mean curve that leads to them, and how many diverged."""
    curves = runs(seeds, [setting] * len(seeds)).curve
    losses = curves[:, -1]
    return dict(losses=losses.tolist(), curve=curves.mean(0).tolist(), diverged=int((losses >= runs.task.ceiling).sum()))


def _stored(args: Args, task_name: str, label: str, task: Task, metrics: dict, wall_s: float) -> dict:
    fixed = dict(steps=task.steps, budget=task.budget, decay_share=task.decay_share, source=task.source)
    how = dict(lanes=args.lanes) if args.scale == 'cpu' else dict(images=args.images.config())
    config = dict(task=task_name, optimizer=label, seeds=args.seeds) | how | fixed
    row = make_row(
        experiment=EXPERIMENT, model=label, seed=0, config=config, metrics=metrics, hardware=hardware_name(jax.devices()), wall_s=wall_s
    )  # fmt: skip
    if not args.smoke and jax.process_index() == 0:
        append_row(args.results, row)
    return row


def latest(rows: list[dict], task: str) -> dict[str, dict]:
    """Metrics of a task's rows by optimizer; the latest of each count."""
    return {row['model']: row['metrics'] for row in rows if row['config']['task'] == task}


def judged(entries: dict[str, dict], name: str, baseline: str) -> dict[str, Any] | None:
    """`racing.compare` of two entries of a task; None where one is missing, or they are the same."""
    if name == baseline or not {name, baseline, 'adamw'} <= set(entries):
        return None
    sigma = float(np.std(entries['adamw']['losses'], ddof=1))
    return compare(entries[name]['losses'], entries[baseline]['losses'], sigma)


def problems(rows: list[dict]) -> list[str]:
    """What makes a race void: a control that did not come out as it must, or the best of what is searched at its grid's edge."""
    found = []
    for task in dict.fromkeys(row['config']['task'] for row in rows):
        entries = latest(rows, task)
        for label, due in ((AGAIN, 'equal'), (FLIPPED, 'worse')):
            result = judged(entries, label, 'adamw')
            if result and result['verdict'] != due:
                found.append(f'{task}: the control {label} came out {result["verdict"]}, not {due}')
        at_edge = {name: metrics['at_edge'] for name, metrics in entries.items() if metrics.get('at_edge')}
        found += [f'{task}: {name} has its best {" and ".join(fields)} at the edge of its grid' for name, fields in at_edge.items()]
    return found


def table(rows: list[dict], task: str) -> list[str]:
    """Lines for a task, best mean first; against a baseline: verdict, and seeds won."""
    entries = latest(rows, task)
    lines = [
        f'{task:<24}held-out loss      {"adamw":<11}{"muon":<11}{"at rate x 1/3, 1, 3":<24}{"rate":<10}{"decay":<7}{"own":<15}runs '
        "ms/step      MFLOP/step  state bytes/parameter  to adamw's loss: steps, time, FLOPs"
    ]
    for name, metrics in sorted(entries.items(), key=lambda entry: np.mean(entry[1]['losses'])):
        mean, half = interval(metrics['losses'])
        verdicts = ''.join(f'{_verdict(judged(entries, name, baseline)):<11}' for baseline in BASELINES)
        lines.append(f'{name:<24}{mean:.4f} ± {half:<10.4f}{verdicts}{_details(metrics, entries["adamw"])}'.rstrip())
    return lines


def shares_to_reach(metrics: dict, adamw: dict) -> dict[str, float] | None:
    """Steps, CPU seconds and FLOPs to adamw's last mean loss, over those of adamw's whole run; None where it is not reached."""
    steps = share_to_reach(float(np.mean(adamw['losses'])), metrics['curve'])
    if steps is None:
        return None
    return dict(steps=steps) | {cost: steps * metrics[cost] / adamw[cost] for cost in ('step_seconds', 'flops')}


def losses_at_equal_cost(metrics: dict, adamw: dict) -> dict[str, float]:
    """Of the mean curve, straight between its points, when adamw's whole run is paid; the last loss where the whole run costs less.

    The learning rate has not fallen to zero there.
    """
    places = np.arange(1, len(metrics['curve']) + 1) / len(metrics['curve'])
    return {cost: float(np.interp(adamw[cost] / metrics[cost], places, metrics['curve'])) for cost in ('step_seconds', 'flops')}


def _verdict(result: dict | None) -> str:
    return '-' if result is None else f'{result["verdict"]} {result["wins"]}'


def _details(metrics: dict, adamw: dict) -> str:
    if 'sensitivity' not in metrics:  # a control
        return ''
    around = ' '.join(f'{loss:.3f}' for loss in metrics['sensitivity'])
    setting, own = metrics['setting'], f'{metrics["knob"]} {metrics["setting"]["knob"]:g}'
    shares = shares_to_reach(metrics, adamw)
    reached = ', '.join(f'{share:.2f}' for share in shares.values()) if shares else 'not reached'
    return (
        f'{around:<24}{setting["rate"]:<10.3g}{setting["weight_decay"]:<7g}{own:<15}{len(metrics["searched"]):<5}'
        f'{1e3 * metrics["step_seconds"]:<13.3g}{metrics["flops"] / 1e6:<12.4g}{metrics["state_bytes"]:<23.3g}{reached}'
    )


def draw(rows: list[dict], path: pathlib.Path) -> None:
    """Draws the losses of every task as a PNG; the latest rows count.

    Args:
        rows: of this experiment.
        path: of the picture.
    """
    tasks = list(dict.fromkeys(row['config']['task'] for row in rows))
    figure = Figure(figsize=(3.6 * len(tasks) + 1.6, 3.8), layout='constrained')
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        _draw_task(axes, task, latest(rows, task))
    figure.savefig(path, dpi=110)


def _draw_task(axes: Axes, task: str, entries: dict[str, dict]) -> None:
    names = sorted(entries, key=lambda name: -np.mean(entries[name]['losses']))
    for place, name in enumerate(names):
        losses, (mean, half) = entries[name]['losses'], interval(entries[name]['losses'])
        axes.plot(losses, [place] * len(losses), 'o', markersize=4, alpha=0.3, color='C0', markeredgewidth=0)
        axes.errorbar(mean, place, xerr=half, fmt='k|', capsize=3)
    if 'adamw' in entries:
        axes.axvline(np.mean(entries['adamw']['losses']), color='k', linewidth=0.6, linestyle=':')
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set(title=task, xlabel='held-out loss at the last step')
    if np.ptp(np.log([entry['losses'] for entry in entries.values()])) > np.log(30):  # ticks of a shorter range overlap
        axes.set_xscale('log')
    axes.grid(alpha=0.3, axis='x')


if __name__ == '__main__':
    sys.exit(main())
