"""Steps that change nothing: what a training step does when its numbers are not to be trusted.

A guarded step computes the step as it is, then decides, inside the compiled program, whether to keep it. The decision is a
scalar reduced over all devices and processes, so all of them take the same one. A step that is not kept leaves parameters and
all of the optimizer's state as they were, to the bit; only `state.step` moves on, and with it the data.

Not kept are steps whose loss, gradient, new parameters or new optimizer state are not finite. What a memory inside the forward
pass holds reaches the loss or the gradient, or is read by nothing. On demand, not kept either are spikes: a loss or gradient norm
more than `spike_sigma` standard deviations above the mean of the last 128 finite ones, once there are 64.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nested_jax.training.state import TrainState
from nested_jax.training.step import Batch

WINDOW = 128  # values the mean and the deviation are taken over
ENOUGH = 64  # values below which nothing is a spike
_FIELDS = dict(losses=np.float32, norms=np.float32, recorded=np.int32, skipped=np.int32, consecutive=np.int32)


class DivergedError(RuntimeError):
    """A loss, gradient or parameter is not a finite number."""


class GoBack(Exception):
    """Too many steps in a row were not kept: the run goes on from the newest checkpoint."""

    def __init__(self, step: int):
        super().__init__(step)
        self.step = step  # steps done


class GuardState(NamedTuple):
    """What a guarded step remembers."""

    losses: jax.Array  # (WINDOW,) float32: the last finite ones, value n at n % WINDOW
    norms: jax.Array  # (WINDOW,) float32: of the gradients of the same steps
    recorded: jax.Array  # () int32: values recorded so far
    skipped: jax.Array  # () int32: steps not kept so far
    consecutive: jax.Array  # () int32: of them, those since the last one kept


GuardedStep = Callable[[TrainState, Batch, GuardState], tuple[TrainState, tuple[dict[str, jax.Array], GuardState]]]


def init_guard() -> GuardState:
    """The guard's state before the first step, in host memory."""
    zeros = lambda: np.zeros(WINDOW, np.float32)
    return GuardState(zeros(), zeros(), *(np.zeros((), np.int32) for _ in range(3)))


def guard_to_json(guard: GuardState) -> dict[str, Any]:
    """The state as JSON, exactly: every float32 is a double."""
    return {name: np.asarray(value).tolist() for name, value in guard._asdict().items()}


def guard_from_json(saved: dict[str, Any]) -> GuardState:
    """What `guard_to_json` was given, in host memory."""
    return GuardState(**{name: np.asarray(saved[name], dtype) for name, dtype in _FIELDS.items()})


def guarded(train_step: Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]], spike_sigma: float | None) -> GuardedStep:
    """Makes a step that keeps its result or leaves the state as it was, a pure function to compile.

    Args:
        train_step: of `make_train_step`; its metrics hold loss and grad_norm, () float32.
        spike_sigma: standard deviations above the mean from which a loss or gradient norm is a spike; None: nothing is.

    Returns:
        (state, batch, guard) -> (state, (metrics, guard)); metrics also hold `skipped`, in this step, and `consecutive`, () int32.

    Raises:
        ValueError: if spike_sigma is not above 0.
    """
    if spike_sigma is not None and not spike_sigma > 0:
        raise ValueError(f'spike_sigma is {spike_sigma!r}, allowed is a number above 0 or None')

    def step(state: TrainState, batch: Batch, guard: GuardState) -> tuple[TrainState, tuple[dict[str, jax.Array], GuardState]]:
        new, metrics = train_step(state, batch)
        loss, norm = metrics['loss'], metrics['grad_norm']
        measured = jnp.isfinite(loss) & jnp.isfinite(norm)
        keep = measured & all_finite((new.params, new.opt_state))
        if spike_sigma is not None:
            keep &= ~(
                _is_spike(loss, guard.losses, guard.recorded, spike_sigma) | _is_spike(norm, guard.norms, guard.recorded, spike_sigma)
            )
        choose = lambda now, before: jnp.where(keep, now, before)
        params, opt_state = jax.tree.map(choose, (new.params, new.opt_state), (state.params, state.opt_state))
        guard = _record(guard, loss, norm, measured, keep)
        metrics = metrics | dict(skipped=(~keep).astype(jnp.int32), consecutive=guard.consecutive)
        return TrainState(new.step, params, opt_state, new.key), (metrics, guard)

    return step


def all_finite(tree: Any) -> jax.Array:
    """() bool: whether every number of a pytree is finite; integers and keys are."""
    floats = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in floats])) if floats else jnp.bool_(True)


def _is_spike(value: jax.Array, window: jax.Array, recorded: jax.Array, sigma: float) -> jax.Array:
    """() bool: whether a value is above the mean of those recorded by more than sigma of their standard deviations."""
    count = jnp.clip(recorded, 1, WINDOW)
    filled = jnp.arange(WINDOW) < count
    mean = jnp.sum(jnp.where(filled, window, 0.0)) / count
    # Deviations are taken from the mean: the difference of two mean squares would cancel.
    deviation = jnp.sqrt(jnp.sum(jnp.where(filled, jnp.square(window - mean), 0.0)) / count)
    return (recorded >= ENOUGH) & (value > mean + sigma * deviation)


def _record(guard: GuardState, loss: jax.Array, norm: jax.Array, measured: jax.Array, keep: jax.Array) -> GuardState:
    """A spike is recorded too, so that a level the run has moved to is normal after a few steps; what is not finite is not."""
    place = guard.recorded % WINDOW
    write = lambda window, value: window.at[place].set(jnp.where(measured, value, window[place]))
    skipped = (~keep).astype(jnp.int32)
    consecutive = jnp.where(keep, 0, guard.consecutive + 1)
    recorded = guard.recorded + measured.astype(jnp.int32)
    return GuardState(write(guard.losses, loss), write(guard.norms, norm), recorded, guard.skipped + skipped, consecutive)


class Skips:
    """The host's side of a guarded run: the guard's state, and the batches that going back has passed over.

    The state travels in the checkpoints' data cursor, as JSON: their arrays are the same with and without a guard.

    Args:
        max_skips: steps not kept in a row after which the run goes back.
    """

    def __init__(self, max_skips: int):
        self.max_skips = max_skips
        self.state = init_guard()
        self.passed_over: list[list[int]] = []  # [first, end) of the batches, each range for one time of going back
        self._landed: dict[int, int] = {}

    @property
    def num_passed_over(self) -> int:
        """How far the batches are ahead of the steps."""
        return sum(end - first for first, end in self.passed_over)

    def to_json(self) -> dict[str, Any]:
        """For the data cursor."""
        return dict(state=guard_to_json(self.state), passed_over=self.passed_over)

    def load(self, saved: dict[str, Any] | None) -> None:
        """Reads the part of a data cursor; None, of a checkpoint without a guard, is a fresh one."""
        self.state = guard_from_json(saved['state']) if saved else init_guard()
        self.passed_over = [list(part) for part in saved['passed_over']] if saved else []

    def go_back(self, step: int, checkpoint: int, ahead: int) -> None:
        """Notes that the batches of the steps from `checkpoint` to `step` are passed over, and starts counting again.

        Args:
            step: steps done when the run gave up.
            checkpoint: steps done in the state it goes on from, whose cursor has been loaded.
            ahead: `num_passed_over` when the run gave up.

        Raises:
            DivergedError: the third time in a row that the run goes back to one checkpoint.
        """
        self._landed = {checkpoint: self._landed.get(checkpoint, 0) + 1}
        if self._landed[checkpoint] == 3:
            raise DivergedError(f'went back to step {checkpoint} three times, the last time after {self.max_skips} skipped steps at {step}')
        self.passed_over.append([checkpoint + self.num_passed_over, step + ahead])
        self.state = self.state._replace(consecutive=np.zeros((), np.int32))
