"""Pre-trains a language model on text, end to end: `python -m experiments.hope_pretrain`.

The default trains hope-linear-tiny on the embedded corpus (the text of the running Python's standard library; no network) and ends
with its held-out bits per byte beside those of an n-gram, of xz and of a Transformer of equal size, a sample, a loss curve and a
checkpoint. It takes hope with matrix memories, since MLP memories read about 0.4 times as many tokens in the same minutes.

Ctrl-C saves and stops with exit code 130 (SIGTERM: 143; both 0 in each of several processes); the same command goes on from there and
ends with the same numbers. Exit code 2 says that the input was wrong, 1 that the run failed, 76 that a step took longer than
--train.watchdog-s, 75 that one of several processes failed otherwise, as they do when another one has.

    python -m experiments.hope_pretrain --model.preset transformer-tiny --train.output runs/transformer
    python -m experiments.hope_pretrain --data.corpus ~/texts --data.tokenizer bpe:8192 --train.steps 5000
"""

import contextlib
import dataclasses
import io
import os
import pathlib
import shlex
import signal
import sys
import time
import traceback
from typing import TYPE_CHECKING, Literal

import tyro

from nested_jax.config import InSequenceConfig, MemoryName, ModelConfig, as_dict
from nested_jax.models.presets import preset, with_periods, without
from nested_jax.training.cluster import ClusterError, Mode, ProcessConfig, find_cluster, has_tpu, run_to_exit
from nested_jax.training.config import TrainConfig, check_devices, check_kernels, check_model, claim_folder, private_cache
from nested_jax.training.faults import faults_of_environment

if TYPE_CHECKING:  # these import JAX or read the corpus: bad input is met before them
    from nested_jax.data import Dataset
    from nested_jax.training.loop import Result

EXPERIMENT = 'hope_pretrain'
RESULTS = pathlib.Path(__file__).parent / 'results'
_SMOKE = TrainConfig(
    steps=4,
    batch_size=8,
    sequence_length=64,
    warmup_steps=1,
    eval_every=2,
    eval_tokens=1024,
    final_eval_tokens=2048,
    checkpoint_every=2,
    log_every=1,
    output='runs/hope_pretrain_smoke',
)


@dataclasses.dataclass(frozen=True)
class ModelArgs:
    """The model."""

    preset: str = 'hope-linear-tiny'
    """Family and size, as hope-tiny or mamba2-340m; README.md has a table of the families."""
    vocab_size: int | None = None
    """Entries of the vocabulary; None: the tokenizer's."""
    dtype: Literal['float32', 'bfloat16'] | None = None
    """Of activations and matrix products."""
    remat: Literal['none', 'block', 'dots'] | None = None
    """What the backward pass computes again instead of keeping."""
    scan_layers: bool | None = None
    """Whether blocks are scanned (compiles once for all) or unrolled."""
    decay_to: Literal['zero', 'init'] | None = None
    """What retention lets memories decay to: zero, or their learned initial states; None: the preset's."""
    qk_norm: bool = False
    """RMSNorm of each head's queries and keys in softmax attention, against loss spikes."""
    dropout: float = 0.0
    """Share of the embeddings and of what each layer adds to them that training drops."""
    without: tuple[Literal['dgd', 'momentum', 'retention', 'cms', 'key', 'value', 'target', 'eta', 'alpha'], ...] = ()
    """Parts of Hope to leave out, for ablations; key to alpha: what static projections give instead of a memory."""
    matrix_memories: tuple[MemoryName, ...] = ()
    """Which of Hope's memories are matrices, beside MLPs."""
    periods: tuple[int, ...] = ()
    """Tokens between two updates of each CMS level, fastest first; none: the preset's."""
    nested_levels: bool = False
    """Whether a CMS level updated across steps starts anew when the next slower one is, from an initial state learned at its period."""
    in_sequence: InSequenceConfig = InSequenceConfig(blocks=())
    """CMS levels that learn within each sequence, by the next-token loss; without blocks all are updated across steps."""

    @property
    def name(self) -> str:
        """As rows call it."""
        changes = [f' without {part}' for part in self.without]
        if self.decay_to is not None:
            changes.append(f' decaying to {self.decay_to}')
        if self.qk_norm:
            changes.append(' with QK-norm')
        if self.dropout:
            changes.append(f' with dropout {self.dropout}')
        if self.matrix_memories:
            changes.append(' with matrices ' + ' '.join(self.matrix_memories))
        if self.periods:
            changes.append(' with periods ' + ' '.join(map(str, self.periods)))
        if self.nested_levels:
            changes.append(' with nested levels')
        if self.in_sequence.blocks:
            changes.append(' learning in sequence in blocks ' + ' '.join(map(str, self.in_sequence.blocks)))
            named = {name: getattr(self.in_sequence, name) for name in ('learning_rate', 'variant', 'bptt')}
            changes += [f' {name} {value}' for name, value in named.items() if value != getattr(InSequenceConfig, name)]
        return self.preset + ''.join(changes)


@dataclasses.dataclass(frozen=True)
class DataArgs:
    """The text."""

    corpus: str = 'embedded'
    """'embedded', a folder, file or glob of text or JSONL, 'tfds:<name>', or a folder written by nested_jax.data.prepare."""
    tokenizer: str | None = None
    """'bytes', 'bpe:<vocab_size>' (trained on the training text), or a tokenizer.json; None: a prepared folder's own, else bytes."""
    data_dir: str | None = None
    """Where a 'tfds:' data set was prepared."""
    field: str = 'text'
    """That holds the text of a JSONL line."""


@dataclasses.dataclass(frozen=True)
class Args:
    """Pre-train a language model on text and report its bits per byte on held-out text."""

    model: ModelArgs = ModelArgs()
    data: DataArgs = DataArgs()
    train: TrainConfig = TrainConfig()
    distributed: Mode = 'auto'
    """Who shares a run: what SLURM, Cloud TPU, Open MPI, Kubernetes or launch_local.py says; this one alone; as --processes says."""
    processes: ProcessConfig = ProcessConfig()
    mesh: str | None = None
    """How devices share the work, as data=2,fsdp=4, of replica, data, fsdp, sequence and tensor; None: data, for large models fsdp."""
    explicit: bool = False
    """Make the mesh's axes Explicit: types of arrays say how they are split. Else they are Auto."""
    allow_data_change: bool = False
    """Go on in a run's folder with another text, --train.seed or --train.batch-size; each step reads the batch of its number."""
    start_over: bool = False
    """Where every checkpoint in a run's folder is damaged, move them aside and begin at step 0; else that is an error."""
    smoke: bool = False
    """Other defaults for --train, for a run of a few seconds, to see that everything works; its numbers mean nothing."""


def main(argv: list[str] | None = None) -> int:
    """Runs the job; returns the exit code."""
    began = time.monotonic()
    try:
        args = parse(argv)
        model_config, data, run_config = prepare(args)
    except (ValueError, KeyError) as error:
        return _fail(error.args[0], 2)
    except ClusterError as error:
        return _fail(str(error), 1)
    from nested_jax.training.checkpoints import DamagedCheckpointsError, SaveError
    from nested_jax.training.distributed import several
    from nested_jax.training.loop import DivergedError, train

    _introduce(args, model_config, data)
    try:
        how = dict(mesh=args.mesh, explicit=args.explicit, allow_data_change=args.allow_data_change, start_over=args.start_over)
        result = train(args.train, model_config, data, run_config, **how, began=began)
    except (ClusterError, DivergedError, DamagedCheckpointsError, SaveError) as error:
        return _fail(str(error), 1)
    except ValueError as error:
        if not _is_told(error):
            raise
        return _fail(str(error), 2)
    except KeyboardInterrupt:
        return _fail(f'stopped; the same command goes on from the last checkpoint in {args.train.output}', 130)
    if result.stopped_by is not None:
        name = signal.Signals(result.stopped_by).name
        _print(f'{name}: saved step {result.step} to {result.checkpoint}; the same command goes on from there:\n  {_command()}')
        # Where a launcher or a scheduler stopped several processes, all is well with each of them.
        return 0 if several() else 128 + result.stopped_by
    report(args, data, run_config, result, time.monotonic() - began)
    return 0


def parse(argv: list[str] | None = None) -> Args:
    """Arguments from a command line; ValueError in one line for wrong ones, SystemExit after --help."""
    said = io.StringIO()
    argv = sys.argv[1:] if argv is None else argv
    default = Args(train=_SMOKE) if '--smoke' in argv else Args()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(Args, prog=f'python -m experiments.{EXPERIMENT}', args=argv, default=default, description=__doc__)
    except SystemExit as stop:
        if not stop.code:
            raise
        raise ValueError(_one_line(said.getvalue())) from None


def prepare(args: Args) -> tuple[ModelConfig, 'Dataset', dict]:
    """Checks everything that can be checked before a device is touched, then the devices; reads the text.

    Returns:
        The model's configuration, the text, and the configuration of the run as JSON.
    """
    faults_of_environment()
    private_cache()
    find_cluster(args.distributed, args.processes, os.environ, has_tpu())
    fields = ('vocab_size', 'dtype', 'remat', 'scan_layers', 'dropout', 'nested_levels')
    overrides = {name: getattr(args.model, name) for name in fields if getattr(args.model, name) is not None}
    model_config = preset(args.model.preset, **overrides)
    if args.model.decay_to is not None:
        model_config = dataclasses.replace(model_config, memory=dataclasses.replace(model_config.memory, decay_to=args.model.decay_to))
    if args.model.qk_norm:
        model_config = dataclasses.replace(model_config, attention=dataclasses.replace(model_config.attention, qk_norm=True))
    for part in args.model.without:
        model_config = without(model_config, part)
    if args.model.matrix_memories:
        memory = dataclasses.replace(model_config.memory, matrix_memories=args.model.matrix_memories)
        model_config = dataclasses.replace(model_config, memory=memory)
    if args.model.periods:
        model_config = with_periods(model_config, args.model.periods)
    if args.model.in_sequence != ModelArgs.in_sequence:
        model_config = dataclasses.replace(model_config, in_sequence=args.model.in_sequence)

    from nested_jax.data import open_dataset

    data = open_dataset(args.data.corpus, args.data.tokenizer, data_dir=args.data.data_dir, field=args.data.field)
    if args.model.vocab_size is None:
        model_config = dataclasses.replace(model_config, vocab_size=data.tokenizer.vocab_size)
    check_model(args.train, model_config, data.tokenizer.vocab_size)

    from nested_jax.training import distributed
    from nested_jax.training.mesh_sizes import batch_shares, choose_mesh, count_slices, parse_axes

    if args.mesh is not None:
        parse_axes(args.mesh)
    distributed.join(args.distributed, args.processes)
    import jax

    check_kernels(args.train, len(jax.devices()))
    if args.mesh is None:  # then all devices share the batch, whatever the model: said before the seconds that a model takes
        check_devices(args.train, len(jax.devices()))
    sizes = choose_mesh(args.mesh, model_config, len(jax.devices()), count_slices(jax.devices()))
    check_devices(args.train, batch_shares(sizes))
    check_model(args.train, model_config, data.tokenizer.vocab_size, sizes.get('sequence', 1))
    text = dict(name=data.name, digest=data.digest, tokenizer=args.data.tokenizer, tokenizer_digest=data.tokenizer.digest)
    settings = {'model': as_dict(model_config), 'data': text, 'train': as_dict(args.train)}
    distributed.first_then_others(lambda: claim_folder(args.train.output, settings, args.allow_data_change))
    return model_config, data, settings


def report(args: Args, data: 'Dataset', run_config: dict, result: 'Result', wall_s: float) -> None:
    """Adds the run's row to its results.jsonl, prints how it compares, and a sample: the first process, while the others go home."""
    from nested_jax.training.distributed import is_first, leave

    heldout, folder, text, first = result.heldout, pathlib.Path(args.train.output), sample(data, result), is_first()
    leave()
    if not first:
        return
    store_row(folder / 'results.jsonl', args, run_config, result, wall_s)
    print(f'\nbits per byte of the held-out text ({heldout.num_bytes:,} bytes; lower is better)')
    print(f'  {args.model.name:<25} {heldout.bits_per_byte:.4f}   perplexity {heldout.perplexity:.3f} per token')
    if not args.model.preset.startswith('transformer-'):
        print('  ' + stored_transformer(args, data.digest))
    for name, value in ({} if args.smoke else _yardsticks(data)).items():
        print(f'  {name:<26}{value:.4f}')
    print(f'\na sample, from the bar on:\n{text}\n')
    for name, path in (('loss curve', folder / 'loss.png'), ('checkpoint', result.checkpoint), ('results', folder / 'results.jsonl')):
        print(f'{name:<12}{path}', flush=True)


def store_row(path: pathlib.Path, args: Args, run_config: dict, result: 'Result', wall_s: float) -> None:
    """Adds the run's row to a file, unless a run of this configuration has one there."""
    import jax

    from nested_jax.evaluation.rows import append_row, config_digest, hardware_name, make_row, read_rows

    if any(row['config_digest'] == config_digest(run_config) for row in read_rows(path)):
        return
    metrics = dict(
        heldout_bits_per_byte=result.heldout.bits_per_byte,
        heldout_perplexity=result.heldout.perplexity,
        heldout_bytes=result.heldout.num_bytes,
        tokens=args.train.steps * args.train.tokens_per_step,
        parameters=sum(leaf.size for leaf in jax.tree.leaves(result.state.params)),
        resumed_from=result.resumed_from,
        rejected_checkpoints=result.rejected,
    )
    row = make_row(
        experiment=EXPERIMENT, model=args.model.name, seed=args.train.seed, config=run_config, metrics=metrics,
        hardware=hardware_name(jax.devices()), wall_s=wall_s,
    )  # fmt: skip
    append_row(path, row)


def stored_transformer(args: Args, digest: str, folder: pathlib.Path = RESULTS) -> str:
    """A line about the stored Transformer++ of equal size on the same text, or about why there is none."""
    from nested_jax.evaluation.rows import best_runs, mean_bits_per_byte, read_rows

    name = 'transformer-' + args.model.preset.rsplit('-', 1)[-1]
    rows = [row for path in sorted(folder.glob('*.jsonl')) for row in read_rows(path) if row['model'] == name]
    rows = [row for row in rows if 'heldout_bits_per_byte' in row['metrics']]
    same = [row for row in rows if row['config']['data']['digest'] == digest]
    if not same:
        other = ', only one for another text (another Python version has another library)' if rows else ''
        return f'{name}: no stored row for this text{other}; run --model.preset {name}'
    tokens = args.train.steps * args.train.tokens_per_step
    (nearest, _), runs = min(best_runs(same).items(), key=lambda item: abs(item[0][0] - tokens))
    trained = 'as many' if nearest == tokens else f'{nearest:,} instead of {tokens:,}'
    mean = mean_bits_per_byte(runs)
    return f'{name:<26}{mean:.4f}   Transformer++ of equal size, mean of {len(runs)} stored runs on {trained} tokens'


def sample(data: 'Dataset', result: 'Result', prompt_tokens: int = 64, new_tokens: int = 256) -> str:
    """The beginning of the first held-out document, gone on by the model; where one device has all parameters, by the first alone."""
    import jax
    import numpy as np

    from nested_jax.models.sampling import generate
    from nested_jax.training.distributed import is_first
    from nested_jax.training.state import step_key

    prompt = np.asarray(data.heldout.read(0, 0, prompt_tokens), np.int32)[None]
    params, key = result.state.params, step_key(result.state)
    if all(leaf.is_fully_replicated for leaf in jax.tree.leaves(params)):
        if not is_first():
            return ''
        params, key = jax.tree.map(lambda leaf: leaf.addressable_data(0), (params, key))
    tokens = generate(result.model, {'params': params}, prompt, key=key, max_new_tokens=new_tokens, temperature=0.8, top_p=0.95)
    show = lambda ids: data.tokenizer.decode(ids).decode(errors='replace')
    return f'{show(prompt[0])}|{show(np.asarray(tokens)[0])}'


def _yardsticks(data: 'Dataset') -> dict[str, float]:
    """Bits per byte of an n-gram and of xz, by the name to show; nothing where only tokens are at hand."""
    from nested_jax.evaluation.yardsticks import yardsticks

    if data.corpus is None:
        return {}
    cache = pathlib.Path(os.environ.get('XDG_CACHE_HOME') or '~/.cache').expanduser() / 'nested_jax' / 'yardsticks.json'
    figures = yardsticks(data.corpus.train_bytes(), data.corpus.heldout_bytes(), data.digest, cache)
    names = dict(witten_bell='Witten-Bell n-gram', xz='xz -9e', xz_with_train='xz -9e with training text')
    return {label: figures[name] for name, label in names.items()}


def _introduce(args: Args, model_config: ModelConfig, data: 'Dataset') -> None:
    import jax

    from nested_jax.optim.levels import steps_of
    from nested_jax.training.optimizer import level_periods

    if jax.process_index():
        return
    print(f'{args.model.preset}: {model_config.num_layers} blocks of width {model_config.width}, vocabulary {model_config.vocab_size}')
    print(f'{data.train.num_tokens:,} tokens of {data.name} to train on, {data.heldout.num_tokens:,} held out, digest {data.digest[:16]}')
    steps = [steps_of(period, args.train.tokens_per_step) for period in level_periods(model_config, args.train.sequence_length).values()]
    if len(steps) > 1:
        print(f'levels of the CMS are updated every {", ".join(map(str, steps))} steps')
    processes = f'{jax.process_count()} process(es), {len(jax.devices())} {jax.devices()[0].device_kind} device(s)'
    print(f'{processes}, output in {args.train.output}', flush=True)


def _print(text: str) -> None:
    """By one of several processes."""
    from nested_jax.training.distributed import is_first

    if is_first():
        print(text, flush=True)


def _command() -> str:
    return shlex.join(['python', '-m', f'experiments.{EXPERIMENT}', *sys.argv[1:]])


def _is_told(error: ValueError) -> bool:
    """Whether the project's own code raised it, to say what is wrong with what it was given: of others' errors the way there matters."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return frame.f_globals['__name__'].startswith('nested_jax.')


def _one_line(text: str) -> str:
    """tyro's box of several lines as one."""
    lines = (line.strip('│╭╮╰╯─ \n') for line in text.splitlines()[1:])
    return ' '.join(line for line in lines if line)


def _fail(message: str, code: int) -> int:
    print(f'error: {message}', file=sys.stderr, flush=True)
    return code


if __name__ == '__main__':
    run_to_exit(main)
