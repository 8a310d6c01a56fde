"""The trainer: from the first step to the last, resumed by calling it again.

A run that is stopped and resumed is bit for bit the run that was not: a batch depends on its step only, the state is saved
whole, and the half-filled window of the training loss is saved with it.
"""

import contextlib
import dataclasses
import os
import pathlib
import time
from collections.abc import Callable, Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import rich.console

from nested_jax.config import ModelConfig, as_dict
from nested_jax.data import Dataset, batch_iterator, check_same_data, data_identity, evaluation_batches, training_batches
from nested_jax.evaluation.perplexity import HeldOut, evaluate
from nested_jax.evaluation.rows import config_digest
from nested_jax.layers.kernels import use_kernels
from nested_jax.models.language_model import LanguageModel
from nested_jax.models.streaming import fast_weight_bytes
from nested_jax.training.checkpoints import Checkpoints, Restored
from nested_jax.training.config import TrainConfig, check_devices, check_kernels, check_model, claim_folder, lock_folder, renew_claim
from nested_jax.training.distributed import check_same, first_then_others, is_first, total
from nested_jax.training.faults import faults_of_environment
from nested_jax.training.goodput import Ledger, summary
from nested_jax.training.guard import DivergedError, GoBack, Skips, all_finite, guarded
from nested_jax.training.mesh_sizes import batch_shares, choose_mesh, count_slices
from nested_jax.training.metrics import LossWindow, MetricLog, Progress, loss_curve, read_metrics
from nested_jax.training.optimizer import level_periods, make_optimizer, warmup_cosine
from nested_jax.training.sharding import Placement, make_mesh, process_rows
from nested_jax.training.signals import StopSignals
from nested_jax.training.state import TrainState, init_state
from nested_jax.training.step import make_eval_step, make_loss, make_train_step
from nested_jax.training.supervisor import VARIABLE, Whereabouts
from nested_jax.training.watchdog import Watchdog


@dataclasses.dataclass(frozen=True)
class Result:
    """How a call of `train` ended."""

    model: LanguageModel
    state: TrainState
    step: int  # steps done
    heldout: HeldOut | None  # None when a signal stopped the run
    stopped_by: int | None  # the signal's number
    checkpoint: pathlib.Path
    resumed_from: int  # 0 for a fresh start
    rejected: tuple[str, ...]  # damaged checkpoints passed over


def train(
    config: TrainConfig,
    model_config: ModelConfig,
    data: Dataset,
    run_config: dict,
    *,
    devices: list | None = None,
    mesh: str | None = None,
    explicit: bool = False,
    allow_data_change: bool = False,
    start_over: bool = False,
    console: rich.console.Console | None = None,
    began: float | None = None,
) -> Result:
    """Trains a language model, or goes on where the folder `config.output` says a run stopped.

    SIGINT or SIGTERM ends the run after the step in hand, with a checkpoint; a second one ends the process at once.

    In a run of several processes (`distributed.join`) all call this with the same arguments and share `config.output`, a folder. Each reads
    its rows of a batch and writes its part of a checkpoint; decisions follow from sums over all. The first writes and prints the rest.

    Args:
        config: the run's settings.
        model_config: of the model; its vocabulary holds the tokenizer's.
        data: tokenized text.
        run_config: everything that decides what the numbers come out as, JSON; a folder of another one is refused.
        devices: that share the work; None for all.
        mesh: how, as 'data=2,fsdp=4'; None is `choose_mesh`'s default. A run may go on with other devices on another mesh.
        explicit: whether the mesh's axes are Explicit, where types of arrays say how they are split; else Auto.
        allow_data_change: go on with another text, seed or batch size; a step reads the batch of its number of what is there now.
        start_over: where all checkpoints are damaged, set them aside and begin at step 0.
        console: for progress; None is standard output.
        began: by time.monotonic, when the job did, for the account of its time; None: now.

    Raises:
        ValueError: for settings that don't fit each other, or don't fit the folder.
        ClusterError: when processes differ in what they are to do, or the first failed where the others wait for it.
        DivergedError: at the first step whose loss, gradient or new state is not finite; nothing of it is saved.
        DamagedCheckpointsError: when the folder has checkpoints and all are damaged, unless `start_over`.
    """
    devices = list(devices or jax.devices())
    sizes = choose_mesh(mesh, model_config, len(devices), count_slices(devices))
    check_devices(config, batch_shares(sizes))
    check_kernels(config, len(devices))
    check_model(config, model_config, data.tokenizer.vocab_size, sizes.get('sequence', 1))
    first_then_others(lambda: claim_folder(config.output, run_config, allow_data_change))
    placement = Placement.on(make_mesh(sizes, devices, explicit))
    with contextlib.ExitStack() as stack:
        first_then_others(lambda: stack.enter_context(lock_folder(config.output)) if is_first() else None)
        console = console if is_first() else rich.console.Console(quiet=True)
        progress = stack.enter_context(Progress(config.steps, console=console))
        ledger = Ledger(config.output, process=jax.process_index(), began=began)
        return _Trainer(config, model_config, data, run_config, placement, progress, ledger, allow_data_change, start_over).run()


class _Trainer:
    """One call of `train`: what it needs, made in order, then the loop."""

    def __init__(
        self, config: TrainConfig, model: ModelConfig, data: Dataset, run_config: dict, place: Placement, progress: Progress,
        ledger: Ledger, allow_data_change: bool, start_over: bool,
    ):  # fmt: skip
        self.config, self.run_config, self.progress = config, run_config, progress
        self.allow_data_change, self.start_over = allow_data_change, start_over
        self.folder, self.ledger, self.model = pathlib.Path(config.output), ledger, LanguageModel(model)
        tokens = jnp.zeros((1, config.sequence_length), jnp.int32)
        self.init_params = lambda key: self.model.init(key, tokens)['params']
        self.params_shape = jax.eval_shape(self.init_params, jax.random.key(0))
        levels = level_periods(model, config.sequence_length)
        self.optimizer = make_optimizer(config, levels, place.params(self.params_shape), nested_levels=model.nested_levels)
        self.schedule, self.loss_function = warmup_cosine(config), make_loss(self.model)
        self.faults, self.whereabouts = faults_of_environment(jax.process_index()), Whereabouts(os.environ.get(VARIABLE))
        saved = lambda step: self.whereabouts.say(saved=step)
        self.checkpoints = Checkpoints(self.folder / 'checkpoints', config.keep, self.faults, saved, place.mesh.shape)
        self.placement, self.tokenizer = place, data.tokenizer
        layout = dict(length=config.sequence_length, batch_size=config.batch_size, grid=model.grid)
        self.identity = data_identity(data, **layout, seed=config.seed)
        check_same('configuration or text', int(config_digest(dict(train=as_dict(config), data=self.identity))[:15], 16))
        share, self.own_rows = process_rows(place.rows, config.batch_size, jax.process_index())
        self.batches = training_batches(data.train, **layout, seed=config.seed, share=share)
        self.during, self.final = (
            evaluation_batches(data.heldout, **layout, max_tokens=count, share=share)
            for count in (config.eval_tokens, config.final_eval_tokens)
        )
        self.window = LossWindow()
        self.skips = Skips(config.max_skips) if config.on_nonfinite == 'skip' else None
        self.watchdog = Watchdog(config.watchdog_s)
        self.pending: Callable[[], None] | None = None

    def run(self) -> Result:
        if self.model.config.in_sequence is not None:
            rows = self.config.batch_size // self.config.accumulation // self.placement.num_shares
            copies = fast_weight_bytes(self.model, rows, self.config.sequence_length)
            self.progress.say(f'levels updated within each sequence: {copies / 2**20:,.1f} MiB of copies on each device')
        with self.watchdog, self.ledger:
            return self.run_watched()

    def run_watched(self) -> Result:
        with self.doing('restore'):
            restored = self.restore()
        self.start = restored.step if restored else 0
        self.ledger.begin(self.start)
        self.rejected = restored.rejected if restored else ()
        self.path = self.checkpoints.path(self.start)
        with self.doing('compile'):
            self.compile()
        stopped_by = self.loop() if self.start < self.config.steps else None
        if stopped_by is not None:
            self.ledger.close('stopped')
            return self.result(None, stopped_by)
        self.progress.say('evaluating on the held-out text')
        heldout = self.evaluate(self.final)
        with self.ledger.during('evaluate'):
            self.finish(heldout)
        self.ledger.close('finished')
        if is_first():
            self.progress.say(str(summary(self.folder)))
        return self.result(heldout, None)

    @contextlib.contextmanager
    def doing(self, cause: str) -> Iterator[None]:
        """What is no step has a limit and an account of its own."""
        with self.watchdog.other(cause), self.ledger.during(cause):
            yield

    def restore(self, prefer: Callable[[int], bool] = lambda step: True) -> Restored | None:
        """Makes the state, or reads it from the newest checkpoint that verifies, of the steps to prefer where there are such."""
        shapes = jax.eval_shape(lambda params: init_state(lambda _: params, self.optimizer, self.config.seed), self.params_shape)
        self.state_shardings = self.placement.state(self.optimizer, shapes.params)
        abstract = jax.tree.map(lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), shapes, self.state_shardings)
        asked = dict(allow_data_change=self.allow_data_change, start_over=self.progress.say if self.start_over else None)
        restored = self.checkpoints.restore(abstract, self.run_config, prefer, **asked)
        for reason in restored.rejected if restored else ():
            self.progress.say(f'passed over a damaged checkpoint: {reason}')
        cursor = restored.data if restored else {}
        if self.skips is not None:
            self.skips.load(cursor.get('guard'))
        self.window = LossWindow(**cursor.get('window', {}))
        if not is_first():
            self.window.num_bytes = 0  # what was read before counts once, in the first process
        if restored is None:
            if lost := [line['step'] for line in read_metrics(self.folder / 'metrics.jsonl')]:
                self.progress.say(f'starting over: {self.folder} has the metrics of step {max(lost)}, and no checkpoint')
            self.state = init_state(self.init_params, self.optimizer, self.config.seed, self.state_shardings)
            return None
        changes = check_same_data(restored.data['identity'], self.identity, allow_change=self.allow_data_change)
        if changes and is_first():
            renew_claim(self.folder, self.run_config)
        self.progress.say('\n'.join((f'going on from step {restored.step}', *changes, *restored.changes)))
        self.state = restored.state
        self.whereabouts.say(saved=restored.step)
        return restored

    def compile(self) -> None:
        """Compiles both steps ahead of the loop: a compiled function cannot compile again, it raises on other shapes."""
        began = time.monotonic()
        step = make_train_step(self.loss_function, self.optimizer, self.config.accumulation)
        if self.skips is not None:
            step = guarded(step, self.config.spike_sigma)
        replicated = self.placement.replicated
        step = jax.jit(step, donate_argnums=0, out_shardings=(self.state_shardings, replicated))
        eval_step = jax.jit(make_eval_step(self.loss_function), out_shardings=replicated)
        with jax.set_mesh(self.placement.mesh), use_kernels(self.config.kernels):  # the mesh: what the model splits its rows over
            self.step_function = step.lower(*self.arguments(self.batches[0])).compile()
            self.eval_step = eval_step.lower(self.state.params, self.place(self.during[0])).compile()
        jax.block_until_ready(_all_finite(self.state))  # compiled here, not within the limit of the first step
        self.progress.say(f'compiled in {time.monotonic() - began:.1f} s')

    def loop(self) -> int | None:
        """Runs the steps that are left; returns the signal that ended them early, if one did."""
        start = self.start
        with StopSignals() as stop:
            while True:
                try:
                    stopped_by = self.steps(start, stop)
                    with self.doing('save'):
                        self.checkpoints.wait()
                    return stopped_by
                except GoBack as found:
                    start = self.go_back(found.step)
                except BaseException as error:
                    with self.doing('save'):
                        self.checkpoints.end(self.progress.say, together=isinstance(error, DivergedError))
                    raise

    def steps(self, start: int, stop: StopSignals) -> int | None:
        """Runs the steps after `start`; returns the signal that ended them early, if one did."""
        with MetricLog(self.folder if is_first() else None, start) as self.log:
            self.write_passed_over(start)
            self.progress.start_at(start)
            self.ledger.step(start)
            iterator = batch_iterator(self.batches, start=start + (self.skips.num_passed_over if self.skips else 0))
            for step in range(start + 1, self.config.steps + 1):
                self.watchdog.step(step)
                self.whereabouts.say(step)
                with self.ledger.during('data'):
                    batch = next(iterator)
                self.train_step(step, self.disturb(step, batch))
                self.ledger.step(step)
                received, last = stop.reached(), step == self.config.steps
                if last or step % self.config.log_every == 0:
                    self.write(step)
                if not last and step % self.config.eval_every == 0:
                    self.write_heldout(step, self.evaluate(self.during), 'heldout_part')
                if last or step % self.config.checkpoint_every == 0 or received is not None:
                    self.save(step)
                if received is not None:
                    return received
        return None

    def go_back(self, step: int) -> int:
        """Reads the newest checkpoint again, with the batches since then passed over; returns its step."""
        self.pending, ahead = None, self.skips.num_passed_over
        self.ledger.go_back()
        with self.doing('restore'):
            # Not to where a signal stopped the run: it would go on otherwise than the run that was not stopped.
            restored = self.restore(lambda saved: saved % self.config.checkpoint_every == 0)
        checkpoint = restored.step if restored else 0
        self.ledger.begin(checkpoint)
        self.skips.go_back(step, checkpoint, ahead)
        first, end = self.skips.passed_over[-1]
        self.progress.say(
            f'{self.config.max_skips} steps skipped in a row: back to step {checkpoint}, without batches {first} to {end - 1}'
        )
        return checkpoint

    def write_passed_over(self, step: int) -> None:
        """One line of the log for each time of going back to this step; a resumed run goes back again, and finds the line there."""
        for first, end in self.skips.passed_over if self.skips and is_first() else ():
            record = dict(step=step, passed_over_from=first, passed_over_to=end)
            if first == step and record not in read_metrics(self.log.path):
                self.log.write(**record)

    def train_step(self, step: int, batch: dict[str, np.ndarray]) -> None:
        """Starts a step, then looks at the one before while it runs: every step is checked and the device never waits."""
        began = time.monotonic()
        num_bytes = self.count_bytes(batch['targets'], batch['weights'])
        self.state, metrics = self.run_step(batch)
        if self.skips is None:
            metrics['finite'] = _all_finite(self.state)  # a program of its own: that of the step stays as it was, to the bit
        self.window.seconds += time.monotonic() - began
        self.settle()
        self.pending = lambda: self.look_at(step, metrics, num_bytes)

    def disturb(self, step: int, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Does what tests planned for this step and its batch."""
        if self.faults is None:
            return batch
        self.faults.reach('step', step)
        return self.faults.batch(step + (self.skips.num_passed_over if self.skips else 0), batch)

    def arguments(self, batch: dict[str, np.ndarray]) -> tuple:
        """What the compiled step is called with."""
        guard = () if self.skips is None else (jax.device_put(self.skips.state, self.placement.replicated),)
        return self.state, self.place(batch), *guard

    def run_step(self, batch: dict[str, np.ndarray]) -> tuple[TrainState, dict[str, jax.Array]]:
        if self.skips is None:
            return self.step_function(*self.arguments(batch))
        state, (metrics, self.skips.state) = self.step_function(*self.arguments(batch))
        return state, metrics

    def look_at(self, step: int, metrics: dict[str, jax.Array], num_bytes: int) -> None:
        """Adds a finished step to the window, or says that it was skipped."""
        if self.skips is None or not metrics['skipped']:
            try:
                return self.window.add(step, metrics, num_bytes)
            except DivergedError:
                self.write(step - 1)  # what the log does not know of the steps before
                raise
        loss, grad_norm = (float(metrics[name]) for name in ('loss', 'grad_norm'))
        self.window.skipped += 1
        self.progress.say(f'step {step} is skipped: its loss is {loss:.6g}, the norm of its gradient {grad_norm:.6g}')
        if metrics['consecutive'] >= self.config.max_skips:
            raise GoBack(step)

    def settle(self) -> None:
        """Looks at the step that was started last."""
        if self.pending is not None:
            began, pending, self.pending = time.monotonic(), self.pending, None
            with self.ledger.waiting():
                pending()
            self.window.seconds += time.monotonic() - began

    def write(self, step: int) -> None:
        """One line of the log and of the screen, then a new window."""
        self.settle()
        window, self.window = self.window, LossWindow()
        window.num_bytes = total(window.num_bytes)
        counted = {} if self.skips is None else dict(skipped_steps=window.skipped)
        if not window.tokens:
            return self.log.write(step, **counted)
        updates = step - (0 if self.skips is None else int(self.skips.state.skipped))
        figures = window.figures() | dict(learning_rate=float(self.schedule(updates - 1)))  # skipped steps do not move the schedule
        self.log.write(step, **figures, **counted)
        self.progress.update(step, **figures)

    def write_heldout(self, step: int, heldout: HeldOut, name: str) -> None:
        self.log.write(step, **{f'{name}_bits_per_byte': heldout.bits_per_byte, f'{name}_perplexity': heldout.perplexity})
        self.progress.say(f'step {step}: {heldout.bits_per_byte:.4f} bits/byte on {heldout.num_bytes:,} held-out bytes')

    def evaluate(self, batches: Iterable[dict]) -> HeldOut:
        self.settle()
        with self.doing('evaluate'):
            if self.faults is not None:
                self.faults.reach('evaluate', int(self.state.step))
            return evaluate(self.eval_step, self.state.params, self.watchdog.each(batches), self.count_bytes, self.place, total)

    def save(self, step: int) -> None:
        self.settle()
        if not bool(_all_finite(self.state)):
            if self.skips is not None:
                raise GoBack(step)
            raise DivergedError(f'a parameter or optimizer value is not finite after step {step}, which is not saved')
        window = dataclasses.asdict(self.window) | dict(num_bytes=total(self.window.num_bytes))
        cursor = dict(identity=self.identity, window=window)
        if self.skips is not None:
            cursor['guard'] = self.skips.to_json()
        with self.doing('save'):
            self.path = self.checkpoints.save(step, self.state, config=self.run_config, data=cursor)

    def finish(self, heldout: HeldOut) -> None:
        """Logs the last evaluation, once however often a finished run is called again, and draws the loss curve."""
        if not is_first():
            return
        path, steps = self.folder / 'metrics.jsonl', self.config.steps
        if not any(record['step'] == steps and 'heldout_bits_per_byte' in record for record in read_metrics(path)):
            with MetricLog(self.folder, steps) as self.log:
                self.write_heldout(steps, heldout, 'heldout')
        loss_curve(read_metrics(path), self.folder / 'loss.png')

    def place(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        return self.placement.place(batch, self.config.batch_size)

    def count_bytes(self, targets: np.ndarray, weights: np.ndarray) -> int:
        """Bytes that targets of weight 1 stand for, in the rows that are this process's to count."""
        return self.tokenizer.count_bytes(targets[self.own_rows], weights[self.own_rows])

    def result(self, heldout: HeldOut | None, stopped_by: int | None) -> Result:
        return Result(self.model, self.state, int(self.state.step), heldout, stopped_by, self.path, self.start, self.rejected)


_all_finite = jax.jit(all_finite)
