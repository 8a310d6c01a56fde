"""Compiles a preset's training step for a TPU topology, on a machine that has none: `python scripts/compile_for_tpu.py --preset hope-1.3b`.

Says what each chip would need: memory, collectives by kind and bytes, operations, and whether XLA had to make an array whole on every
chip to move it (involuntary full rematerialization). Nothing runs, so nothing here is a speed. Each report is a row of
experiments/results/compile_for_tpu.jsonl.

The TPU compiler is libtpu (700 MB), which must not lie beside a JAX that shall use the CPU, so it gets an environment of its own:

    python -m venv .venv-tpu
    .venv-tpu/bin/pip install -r requirements.txt "jax[tpu]==0.10.2"
    .venv-tpu/bin/python scripts/compile_for_tpu.py --preset hope-1.3b --topology v5e:16x16 --mesh data=8,fsdp=16,tensor=2
"""

import contextlib
import dataclasses
import os
import pathlib
import resource
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
# Before jax is imported: a TPU's topology without asking Google's metadata server for one, and no device but the CPU.
os.environ.update(TPU_SKIP_MDS_QUERY='1', TPU_WORKER_HOSTNAMES='localhost', JAX_PLATFORMS='cpu')
os.environ.setdefault('TPU_STDERR_LOG_LEVEL', '1')  # warnings, among them that of a full rematerialization

import jax
import jax.numpy as jnp
import tyro
from jax.experimental import topologies

from nested_jax.config import ModelConfig, as_dict
from nested_jax.evaluation.rows import append_row, commit, make_row
from nested_jax.models import LanguageModel, preset
from nested_jax.training.compiled import REMATERIALISED, matrix_flops, report
from nested_jax.training.config import OptimizerName, TrainConfig, check_devices, check_model, private_cache
from nested_jax.training.mesh_sizes import batch_shares, choose_mesh, count_slices
from nested_jax.training.optimizer import level_periods, make_optimizer
from nested_jax.training.sharding import Placement, make_mesh
from nested_jax.training.state import init_state
from nested_jax.training.step import make_loss, make_train_step

EXPERIMENT = 'compile_for_tpu'
RESULTS = ROOT / 'experiments' / 'results' / f'{EXPERIMENT}.jsonl'


@dataclasses.dataclass(frozen=True)
class Args:
    """Compile a preset's training step for a TPU topology."""

    preset: str = 'hope-tiny'
    """Family and size."""
    topology: str = 'v5e:2x4'
    """Generation and torus: v5e:16x16, v5p:4x4x4, v6e:16x16, ..."""
    slices: int = 1
    """Of this topology, joined by a data centre's network; the mesh's replica is a multiple of them."""
    mesh: str | None = None
    """As of experiments.hope_pretrain."""
    batch_size: int = 128
    """Sequences a step."""
    sequence_length: int = 4096
    """Tokens a sequence."""
    accumulation: int = 1
    """Microbatches a step."""
    optimizer: OptimizerName = 'adamw'
    """As of experiments.hope_pretrain."""
    dtype: str = 'bfloat16'
    """Of activations and matrix products."""
    remat: str = 'block'
    """What the backward pass computes again: none, block or dots."""
    results: pathlib.Path = RESULTS
    """File the report is added to."""


def main() -> int:
    """Compiles, prints and stores; returns the exit code."""
    args = tyro.cli(Args, description=__doc__)
    began, head = time.monotonic(), commit()  # of the code that is compiled; the tree may move on meanwhile
    try:
        private_cache()
        train = TrainConfig(
            batch_size=args.batch_size, sequence_length=args.sequence_length, accumulation=args.accumulation, optimizer=args.optimizer
        )  # fmt: skip
        config = preset(args.preset, dtype=args.dtype, remat=args.remat)
        devices = topologies.get_topology_desc(platform='tpu', topology_name=args.topology, num_slices=args.slices).devices
        sizes = choose_mesh(args.mesh, config, len(devices), count_slices(devices))
        check_devices(train, batch_shares(sizes))
        check_model(train, config, 0, sizes.get('sequence', 1))
    except (ValueError, RuntimeError) as error:  # the latter without libtpu, for an unknown topology, or while another compiles
        print(f'error: {error}', file=sys.stderr)
        return 2
    with logged() as log:
        traced = trace_step(config, train, Placement.on(make_mesh(sizes, list(devices))))
        compiled, flops = traced.lower().compile(), matrix_flops(traced.jaxpr)
    seconds = time.monotonic() - began
    metrics = report(compiled) | dict(
        chips=len(devices),
        matrix_flops_per_chip=flops / len(devices),
        full_rematerialisations=sum(REMATERIALISED in line for line in log),
        host_peak_bytes=1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    )
    show(metrics, seconds)
    topology = args.topology if args.slices == 1 else f'{args.slices} x {args.topology}'
    model = args.preset if args.optimizer == 'adamw' else f'{args.preset} with {args.optimizer}'
    settings = dict(model=as_dict(config), train=as_dict(train), topology=topology, mesh=sizes, jax=jax.__version__)
    row = make_row(
        experiment=EXPERIMENT, model=model, seed=0, config=settings, metrics=metrics,
        hardware=f'compiled for {len(devices)} x {devices[0].device_kind}, not run', wall_s=seconds,
    )  # fmt: skip
    append_row(args.results, row | dict(commit=head))
    return 0


def trace_step(config: ModelConfig, train: TrainConfig, placement: Placement) -> jax.stages.Traced:
    """The trainer's step for shapes alone; no array is made."""
    model = LanguageModel(config)
    tokens = jnp.zeros((1, train.sequence_length), jnp.int32)
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), tokens)['params'])
    optimizer = make_optimizer(train, level_periods(config, train.sequence_length), placement.params(params))
    shapes = jax.eval_shape(lambda params: init_state(lambda _: params, optimizer, 0), params)
    shardings = placement.state(optimizer, shapes.params)
    state = jax.tree.map(lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), shapes, shardings)
    rows = lambda dtype: jax.ShapeDtypeStruct((train.batch_size, train.sequence_length), dtype, sharding=placement.rows)
    batch = {name: rows(jnp.float32 if name == 'weights' else jnp.int32) for name in ('tokens', 'targets', 'segment_ids', 'weights')}
    step = make_train_step(make_loss(model), optimizer, train.accumulation)
    with jax.set_mesh(placement.mesh):
        return jax.jit(step, donate_argnums=0, out_shardings=(shardings, placement.replicated)).trace(state, batch)


@contextlib.contextmanager
def logged():
    """Keeps what XLA writes to standard error, which passes Python by, and lets it through at the end."""
    lines = []
    sys.stderr.flush()
    before = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield lines
        finally:
            os.dup2(before, 2)
            os.close(before)
            file.seek(0)
            text = file.read().decode(errors='replace')
            sys.stderr.write(text)
            lines.extend(text.splitlines())


def show(metrics: dict, seconds: float) -> None:
    """Prints a report."""
    gib = lambda count: f'{count / 2**30:.2f} GiB'
    memory = metrics['memory']
    print(f'a chip: {gib(memory["total"])} = arguments {gib(memory["arguments"])} + temporaries {gib(memory["temporaries"])} + results')
    for kind, sums in metrics['collectives'].items():
        print(f'  {kind:<20}{sums["count"]:>8} a step   {gib(sums["bytes"])}')
    print(f'  matrix products     {metrics["matrix_flops_per_chip"]:.4g} operations a step')
    print(f'full rematerialisations: {metrics["full_rematerialisations"]}')
    print(f'compiled in {seconds:.0f} s, host memory {gib(metrics["host_peak_bytes"])}', flush=True)


if __name__ == '__main__':
    sys.exit(main())
