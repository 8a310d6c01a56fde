"""Settings of a training run, as a frozen dataclass. Imports no JAX, so that bad input is met early."""

import contextlib
import dataclasses
import fcntl
import json
import os
import pathlib
import stat
from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args

from nested_jax.config import KernelSet, ModelConfig, added, check, redacted

# What may change between two halves of a run: none of it touches a number that is learnt or reported. Blocks that are scanned or unrolled
# have the same parameters, and differ by rounding, as meshes do.
FREE_FIELDS = (
    'data.name', 'model.scan_layers', 'train.output', 'train.log_every', 'train.checkpoint_every', 'train.keep', 'train.watchdog_s'
)  # fmt: skip
# What else may change when it is asked for: which text is read, in which order, how much of it a step.
DATA_FIELDS = ('data.digest', 'train.batch_size', 'train.seed')

OptimizerName = Literal['adamw', 'muon', 'm3']


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One training run.

    Raises:
        ValueError: naming the field, its value and what is allowed.
    """

    steps: int = 3000  # optimizer steps
    batch_size: int = 2  # sequences a step, over all devices and microbatches
    sequence_length: int = 256  # tokens a sequence
    learning_rate: float = 3e-3  # at the end of the warm-up; the cosine ends at a tenth of it
    warmup_steps: int = 100
    weight_decay: float = 0.1
    clip_norm: float = 1.0  # global norm the gradient is clipped to
    accumulation: int = 1  # microbatches a step
    beta1: float = 0.9  # of Adam, which Muon and M3 leave embeddings, gates, norms and learned memories to
    beta2: float = 0.95
    seed: int = 0
    eval_every: int = 1000  # steps between two evaluations on held-out text; the last step is always evaluated
    eval_tokens: int = 32_768  # held-out tokens of an evaluation during the run
    final_eval_tokens: int | None = None  # held-out tokens of the last evaluation; None: all
    checkpoint_every: int = 500  # steps; the last step is always saved
    keep: int = 2  # checkpoints kept
    log_every: int = 50  # steps
    on_nonfinite: Literal['abort', 'skip'] = added('abort')  # what is done where a loss, gradient or new value is not finite
    spike_sigma: float | None = added(6.0)  # with 'skip': deviations above the last 128 that skip a loss or gradient norm; None: none do
    max_skips: int = added(10)  # with 'skip': so many in a row go back to the last checkpoint and pass over the batches since
    optimizer: OptimizerName = added('adamw')  # learning rates are those of AdamW for all three
    slow_period: int = added(100)  # with 'm3': steps between two updates of the slow momentum
    watchdog_s: float | None = added(1800.0)  # a step that takes longer ends the process, all stacks on standard error; None: no limit
    kernels: KernelSet = added('plain')  # what layers compute with: see nested_jax.layers.kernels
    output: str = 'runs/hope_pretrain'  # folder of the run; the same command with the same folder goes on where it stopped

    def __post_init__(self):
        for name in (
            'steps',
            'batch_size',
            'sequence_length',
            'accumulation',
            'eval_every',
            'eval_tokens',
            'checkpoint_every',
            'keep',
            'log_every',
            'max_skips',
            'slow_period',
        ):
            self._check(name, getattr(self, name) >= 1, 'an integer of at least 1')
        self._check('final_eval_tokens', self.final_eval_tokens is None or self.final_eval_tokens >= 1, 'an integer of at least 1 or None')
        for name in ('learning_rate', 'clip_norm'):
            self._check(name, getattr(self, name) > 0, 'a number above 0')
        for name in ('beta1', 'beta2'):
            self._check(name, 0 <= getattr(self, name) < 1, 'a number from 0 to below 1')
        self._check('weight_decay', self.weight_decay >= 0, 'a number of at least 0')
        self._check('warmup_steps', 0 <= self.warmup_steps < self.steps, f'an integer from 0 to below steps={self.steps}')
        self._check('accumulation', self.batch_size % self.accumulation == 0, f'a divisor of batch_size={self.batch_size}')
        self._check('seed', 0 <= self.seed < 2**32, 'an integer from 0 to below 2**32')
        self._check('optimizer', self.optimizer in get_args(OptimizerName), f'one of {get_args(OptimizerName)}')
        unused = TrainConfig.slow_period
        self._check('slow_period', self.slow_period == unused or self.optimizer == 'm3', f"{unused} unless optimizer='m3'")
        self._check('on_nonfinite', self.on_nonfinite in ('abort', 'skip'), "'abort' or 'skip'")
        self._check('kernels', self.kernels in get_args(KernelSet), f'one of {get_args(KernelSet)}')
        for name in ('spike_sigma', 'watchdog_s'):
            self._check(name, getattr(self, name) is None or getattr(self, name) > 0, 'a number above 0 or None')
        unused = TrainConfig.spike_sigma
        self._check('spike_sigma', self.spike_sigma == unused or self.on_nonfinite == 'skip', f"{unused} unless on_nonfinite='skip'")
        self._check('output', bool(self.output.strip()) and self.output.isprintable(), 'a folder, in characters that can be printed')

    @property
    def tokens_per_step(self) -> int:
        """Tokens one optimizer step reads."""
        return self.batch_size * self.sequence_length

    def _check(self, name: str, holds: bool, allowed: str) -> None:
        if not holds:
            raise ValueError(f'train.{name} is {getattr(self, name)!r}, allowed is {allowed}')


def check_devices(config: TrainConfig, num_devices: int) -> None:
    """Raises ValueError unless each of the devices that split a batch gets as many rows of every microbatch."""
    if config.batch_size % (config.accumulation * num_devices):
        allowed = f'a multiple of accumulation x devices = {config.accumulation} x {num_devices}'
        raise ValueError(f'train.batch_size is {config.batch_size}, allowed is {allowed}')


def check_kernels(config: TrainConfig, num_devices: int) -> None:
    """Raises ValueError for kernels that do not split over so many devices."""
    if config.kernels in ('tpu', 'gpu_unverified') and num_devices > 1:
        raise ValueError(f'train.kernels is {config.kernels!r}, allowed on {num_devices} devices is what splits over them: plain or gpu')


def check_model(config: TrainConfig, model: ModelConfig, vocab_size: int, stretches: int = 1) -> None:
    """Raises ValueError unless the model can read the run's sequences and tokens.

    Args:
        config: of the run.
        model: of the model.
        vocab_size: of the tokenizer.
        stretches: devices that share a sequence, each with whole chunks.
    """
    periods = tuple(level.period for level in model.levels)
    if model.in_sequence is not None and min(periods) >= config.sequence_length:
        allowed = f'some below train.sequence_length={config.sequence_length}: no level would learn within a sequence'
        raise ValueError(f'model.periods is {periods}, allowed is {allowed}')
    if config.sequence_length % (stretches * model.grid):
        allowed = f"the mesh's sequence x the model's chunk grid = {stretches} x" if stretches > 1 else "the model's chunk grid,"
        raise ValueError(f'train.sequence_length is {config.sequence_length}, allowed is a multiple of {allowed} {model.grid}')
    if model.vocab_size < vocab_size:
        raise ValueError(f"model.vocab_size is {model.vocab_size}, allowed is at least the tokenizer's, {vocab_size}")


def claim_folder(folder: str | os.PathLike, run_config: dict, allow_data_change: bool = False) -> None:
    """Writes the configuration into a new output folder, without secrets.

    Args:
        folder: of the run.
        run_config: JSON.
        allow_data_change: whether `DATA_FIELDS` may differ from what the folder holds.

    Raises:
        ValueError: naming the first field in which the folder's configuration is another one, or the folder that cannot be written or is
            somebody else's symbolic link.
    """
    path = pathlib.Path(folder) / 'config.json'
    for link in (path.parent, path.with_name('checkpoints')):
        allowed = 'a folder, or a symbolic link that is your own'
        check(not (link.is_symlink() and _of_another(link.lstat())), 'train.output', str(link), allowed)
    if path.exists():
        try:
            saved = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f'{path} is damaged ({error}); restore it or use another output folder') from error
        check_same_config(saved, run_config, folder, allow_data_change)
        return
    temporary = path.with_suffix('.tmp')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(_stored(run_config))
        temporary.replace(path)
    except OSError as error:
        raise ValueError(f'train.output is {str(folder)!r}, allowed is a folder that can be written ({error})') from error


@contextlib.contextmanager
def lock_folder(folder: str | os.PathLike) -> Iterator[None]:
    """Keeps other runs out of a claimed folder; the system lets go of it when the process ends, however it ends.

    Raises:
        ValueError: when another run holds it, or the file system has no locks.
    """
    path = pathlib.Path(folder) / 'config.json'
    with open(path, 'r+') as file:  # written by nobody here: NFS locks a file for one holder only where it is open for writing
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f'train.output is {str(folder)!r}, which is in use by another run; allowed is a folder of its own') from None
        except OSError as error:
            allowed = 'a folder of a file system with locks: mount it with them (Lustre: flock; NFS: a lock service), or use another one'
            raise ValueError(f'train.output is {str(folder)!r}, which cannot be locked ({error}); allowed is {allowed}') from error
        yield


def private_cache(environment: Mapping[str, str] = os.environ) -> None:
    """Makes the folder in which JAX keeps compiled programs, for this user alone: what somebody else puts there would be run.

    Args:
        environment: variables of the process; without JAX_COMPILATION_CACHE_DIR, or with an address there, nothing is done.

    Raises:
        ValueError: when others can write to the folder, or it is somebody else's, or cannot be made.
    """
    variable = 'JAX_COMPILATION_CACHE_DIR'
    folder = environment.get(variable, '')
    if not folder or '://' in folder:
        return
    try:
        pathlib.Path(folder).mkdir(mode=0o700, parents=True, exist_ok=True)
        status = os.stat(folder)
    except OSError as error:
        raise ValueError(f'{variable} is {folder!r}, allowed is a folder that can be made ({error})') from error
    private = not _of_another(status) and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    check(private, variable, folder, 'a folder of your own that nobody else can write to (chmod go-w)')


def _of_another(status: os.stat_result) -> bool:
    """Whether a file is neither this user's nor the administrator's."""
    return status.st_uid not in (0, os.geteuid())


def renew_claim(folder: str | os.PathLike, run_config: dict) -> None:
    """Puts the configuration that a run goes on with in place of the one that its folder, which it holds, was claimed with."""
    path, text = pathlib.Path(folder) / 'config.json', _stored(run_config).encode()
    with open(path, 'r+b', buffering=0) as file:  # in place: the run's lock is on this file, a new one would have none
        file.write(text.ljust(path.stat().st_size))  # in one call, with blanks where the old text was longer: whole whenever killed


def _stored(run_config: dict) -> str:
    return json.dumps(redacted(run_config), indent=1)


def check_same_config(saved: dict, current: dict, folder: str | os.PathLike, allow_data_change: bool = False) -> None:
    """Raises ValueError naming the first field in which two configurations differ, those that may change excepted."""
    saved, current = _flat(saved), _flat(redacted(current))
    free = FREE_FIELDS + DATA_FIELDS if allow_data_change else FREE_FIELDS
    for field in dict.fromkeys([*saved, *current]):
        if field not in free and saved.get(field) != current.get(field):
            asked = ', or --allow-data-change' if field in DATA_FIELDS else ''
            raise ValueError(
                f'{field} is {current.get(field)!r}, but {folder} holds a run with {field} = {saved.get(field)!r}: '
                f'allowed is the same value, or another output folder{asked}'
            )


def _flat(tree: Any, prefix: str = '') -> dict[str, Any]:
    """Dotted name -> value, lists and dictionaries taken apart; tuples count as the lists that JSON makes of them."""
    if isinstance(tree, list | tuple):
        tree = {str(index): value for index, value in enumerate(tree)}
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {name: value for key, child in tree.items() for name, value in _flat(child, f'{prefix}.{key}' if prefix else key).items()}
