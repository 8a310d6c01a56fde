"""Where a run's numbers go: JSON lines, TensorBoard, a line on the screen, a picture."""

import dataclasses
import json
import math
import os
import pathlib
import time
from types import TracebackType
from typing import Any

import jax
import rich.console
import rich.progress
from matplotlib.figure import Figure
from tensorboardX import SummaryWriter

from nested_jax.training.guard import DivergedError


@dataclasses.dataclass
class LossWindow:
    """Sums of the training loss since the last line of the log."""

    nats: float = 0.0
    tokens: float = 0.0
    num_bytes: int = 0  # of the rows that this process counts
    seconds: float = 0.0
    grad_norm: float = 0.0  # of the last step
    skipped: int = 0  # steps that changed nothing

    def add(self, step: int, metrics: dict[str, jax.Array], num_bytes: int) -> None:
        """Adds a step; raises DivergedError where its loss or gradient, or by 'finite' its new state, is not finite."""
        loss, grad_norm, tokens = (float(metrics[name]) for name in ('loss', 'grad_norm', 'tokens'))
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise DivergedError(f'at step {step} the loss is {loss} and the norm of the gradient {grad_norm}; the step is not saved')
        if not metrics.get('finite', True):
            raise DivergedError(f'a parameter or optimizer value is not finite after step {step}, which is not saved')
        self.nats += loss * tokens
        self.tokens += tokens
        self.num_bytes += num_bytes
        self.grad_norm = grad_norm

    def figures(self) -> dict[str, float]:
        """Of one line of the log: loss (nats a target), bits_per_byte, grad_norm, tokens_per_second; there is at least one step."""
        bits = self.nats / math.log(2) / max(self.num_bytes, 1)
        speed = self.tokens / self.seconds if self.seconds else 0.0
        return dict(loss=self.nats / self.tokens, bits_per_byte=bits, grad_norm=self.grad_norm, tokens_per_second=speed)


class MetricLog:
    """Appends one JSON object a line to <folder>/metrics.jsonl, flushed, and the same scalars to <folder>/tensorboard.

    Args:
        folder: made when absent; None, in processes but the first, keeps nothing.
        step: steps done so far; lines of later steps, written after the checkpoint that is being resumed, are dropped.
    """

    def __init__(self, folder: str | os.PathLike | None, step: int = 0):
        self._file = None
        if folder is None:
            return
        folder = pathlib.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / 'metrics.jsonl'
        self._drop_after(step)
        self._file = open(self.path, 'a')
        self._board = SummaryWriter(str(folder / 'tensorboard'), purge_step=step + 1)

    def write(self, step: int, **metrics: float) -> None:
        """Writes the metrics of one step, if there are any."""
        if self._file is None or not metrics:
            return
        self._file.write(json.dumps(dict(step=step, **metrics)) + '\n')
        self._file.flush()
        for name, value in metrics.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Flushes and closes the files."""
        if self._file is not None:
            self._file.close()
            self._board.close()

    def __enter__(self) -> 'MetricLog':
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _drop_after(self, step: int) -> None:
        kept = [record for record in read_metrics(self.path) if record['step'] <= step]
        temporary = self.path.with_name(self.path.name + '.tmp')
        temporary.write_text(''.join(json.dumps(record) + '\n' for record in kept))
        os.replace(temporary, self.path)


def read_metrics(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The records of a metrics file, oldest first; a last line cut off by a crash is left out, an absent file is empty."""
    path = pathlib.Path(path)
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith('\n')]


class Progress:
    """One line on standard output about how far a run is: redrawn on a terminal, printed once per call elsewhere.

    Args:
        steps: of the whole run.
        console: where to; None is standard output.
    """

    def __init__(self, steps: int, console: rich.console.Console | None = None):
        self.console = console or rich.console.Console()
        self._steps = steps
        self.start_at(0)
        columns = [rich.progress.TextColumn('{task.description}'), rich.progress.BarColumn(bar_width=20)]
        self._bar = rich.progress.Progress(*columns, console=self.console) if self.console.is_terminal else None
        if self._bar is not None:
            self._task = self._bar.add_task('', total=steps)

    def start_at(self, step: int) -> None:
        """Starts the clock that the time left is told from, with `step` steps done before."""
        self._first, self._started = step, time.monotonic()

    def update(self, step: int, *, loss: float, bits_per_byte: float, tokens_per_second: float, **_: float) -> None:
        """Shows the state after `step` steps; further figures have no place in the line."""
        seconds = (time.monotonic() - self._started) / max(step - self._first, 1) * (self._steps - step)
        text = (
            f'step {step}/{self._steps}  loss {loss:.3f}  {bits_per_byte:.3f} bits/byte  '
            f'{tokens_per_second:,.0f} tokens/s  {clock(seconds)} left'
        )
        if self._bar is None:
            self.say(text)
        else:
            self._bar.update(self._task, completed=step, description=text)

    def say(self, text: str) -> None:
        """Prints a line of its own."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def __enter__(self) -> 'Progress':
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss."""
    minutes, second = divmod(int(max(seconds, 0)), 60)
    hours, minute = divmod(minutes, 60)
    return f'{hours}:{minute:02d}:{second:02d}' if hours else f'{minute}:{second:02d}'


def loss_curve(records: list[dict[str, Any]], path: str | os.PathLike, title: str = '') -> None:
    """Draws bits per byte of training and held-out text against the step, as a PNG.

    Args:
        records: of `read_metrics`. The last evaluation reads all of the held-out text, the ones before it a part, whose figures
            compare with one another only: they are drawn apart.
        path: of the picture.
        title: above it.
    """
    figure = Figure(figsize=(7, 4.2), layout='constrained')
    axes = figure.add_subplot()
    for name, label, style in (('', 'training', '-'), ('heldout_part_', 'held out, a part', 'o-'), ('heldout_', 'held out', 's')):
        field = f'{name}bits_per_byte'
        points = [(record['step'], record[field]) for record in records if math.isfinite(record.get(field, math.nan))]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, linewidth=1.2, markersize=3.5)
    axes.set(xlabel='step', ylabel='bits per byte', title=title)
    axes.grid(alpha=0.3)
    if axes.has_data():
        axes.legend()
    figure.savefig(path, dpi=120)
