"""Which processes a run has: as the command line says, or as the environment of what started them does. Imports no JAX.

jax.distributed reads SLURM, Open MPI and Cloud TPU itself, and where it finds nothing of them says the same as where it finds half of
it. A run that then went on alone would be one of many that write the same folder. So what is detected here has to be joined, half an
environment is an error, and one process is what is left when nothing says that there are more.

On Kubernetes JAX asks the API server, where the package kubernetes is installed. What else may start processes (torchrun, MPICH, Flux)
it cannot join: what their variables say of several is an error too.

scripts/launch_local.py says what to join in variables of its own, NESTED_JAX_COORDINATOR, _NUM_PROCESSES and _PROCESS_ID.
"""

import dataclasses
import importlib.util
import os
import pathlib
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal, NoReturn

from nested_jax.config import check

Mode = Literal['auto', 'off', 'explicit']
MODES = ('auto', 'off', 'explicit')
LOCAL = ('NESTED_JAX_COORDINATOR', 'NESTED_JAX_NUM_PROCESSES', 'NESTED_JAX_PROCESS_ID')
FAILED = 75  # exit code of a process that an error nobody expected ended
_SLURM = ('SLURM_JOB_ID', 'SLURM_STEP_NODELIST', 'SLURM_NTASKS', 'SLURM_PROCID', 'SLURM_LOCALID')
_OPEN_MPI = ('OMPI_COMM_WORLD_SIZE', 'OMPI_COMM_WORLD_RANK', 'OMPI_COMM_WORLD_LOCAL_RANK', 'OMPI_MCA_orte_hnp_uri')
_POD = 'JOB_COMPLETION_INDEX'  # of a Kubernetes Job: how many pods there are it does not say, and the first may be the only one
_COUNTS = {  # variables with a number of processes -> who sets them
    'SLURM_STEP_NUM_TASKS': 'SLURM',
    'PMI_SIZE': 'MPICH or Intel MPI',
    'MV2_COMM_WORLD_SIZE': 'MVAPICH2',
    'FLUX_JOB_SIZE': 'Flux',
    'WORLD_SIZE': 'torchrun or what takes its place',
    'JAX_NUM_PROCESSES': 'Kubeflow or a script',
    'MEGASCALE_NUM_SLICES': 'Cloud TPU',
}
_TPU_CHIPS = ('0x0027', '0x005e', '0x0062', '0x0063', '0x006f', '0x0076')  # v2 and v3, v4, v5p, v5e, v6e, v7x, as JAX knows them
_INDICES = {_POD: 'a Kubernetes Job', 'TPU_WORKER_ID': 'Cloud TPU', 'MEGASCALE_SLICE_ID': 'Cloud TPU'}  # from 0


class ClusterError(RuntimeError):
    """There are other processes, and this one cannot join them."""


@dataclasses.dataclass(frozen=True)
class ProcessConfig:
    """Where the other processes are, and how long to wait for them.

    Raises:
        ValueError: naming the field, its value and what is allowed.
    """

    coordinator: str | None = None  # host:port at which process 0 listens; with --distributed=explicit
    count: int | None = None  # processes; with --distributed=explicit
    index: int | None = None  # of this one, from 0; with --distributed=explicit
    start_s: int = 300  # until all are there
    heartbeat_s: int = 100  # without a heartbeat after which a process counts as dead, and the others end
    shutdown_s: int = 300  # that a process which has finished waits for the others

    def __post_init__(self):
        host, _, port = (self.coordinator or 'host:1').rpartition(':')
        holds = dict(
            coordinator=(bool(host) and port.isdecimal() and 0 < int(port) < 2**16, 'host:port'),
            count=(self.count is None or self.count >= 1, 'an integer of at least 1'),
            index=(self.index is None or 0 <= self.index < (self.count or 2**31), f'from 0 to below count={self.count}'),
        )
        holds |= {name: (getattr(self, name) >= 1, 'an integer of at least 1') for name in ('start_s', 'heartbeat_s', 'shutdown_s')}
        for name, (hold, allowed) in holds.items():
            check(hold, f'processes.{name}', getattr(self, name), allowed)


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Processes to join."""

    name: str  # what said that they exist
    count: int | None  # None: only jax.distributed can find out
    arguments: dict[str, Any]  # of jax.distributed.initialize


def find_cluster(mode: Mode, config: ProcessConfig, environment: Mapping[str, str], on_tpu: bool) -> Cluster | None:
    """What this process belongs to; None where it is the only one.

    Args:
        mode: 'explicit': what `config` says. 'auto': what the environment says. 'off': this process is alone, whatever that is.
        config: coordinator, count and index go with 'explicit' only.
        environment: variables of the process.
        on_tpu: whether the machine has a TPU, see `has_tpu`.

    Raises:
        ValueError: for another mode, and a `config` that does not fit it.
        ClusterError: for an environment that says there are more processes and not how to join them.
    """
    check(mode in MODES, 'distributed', mode, f'one of {", ".join(MODES)}')
    given = {name: getattr(config, name) for name in ('coordinator', 'count', 'index')}
    for name, value in given.items():
        allowed = 'a value, with distributed=explicit' if value is None else 'None, unless distributed=explicit'
        check((value is None) != (mode == 'explicit'), f'processes.{name}', value, allowed)
    if mode == 'explicit':
        return _told('the command line', *given.values())
    return None if mode == 'off' else _detect(environment, on_tpu)


def has_tpu(root: str | os.PathLike = '/') -> bool:
    """Whether this machine has TPU chips: known ones on its PCI bus; or, beside their library, files of devices that others have too.

    Args:
        root: of the file system.
    """
    root = pathlib.Path(root)
    named = lambda device, file: (device / file).read_text().strip() if (device / file).is_file() else None
    buses = (root / 'sys/bus/pci/devices').glob('*')
    if any(named(device, 'vendor') == '0x1ae0' and named(device, 'device') in _TPU_CHIPS for device in buses):
        return True
    files = [*(root / 'dev').glob('accel[0-9]*'), *(root / 'dev/vfio').glob('[0-9]*')]
    return bool(files) and importlib.util.find_spec('libtpu') is not None


def _detect(environment: Mapping[str, str], on_tpu: bool) -> Cluster | None:
    if any(name in environment for name in LOCAL):
        _require('scripts/launch_local.py', environment, LOCAL)
        coordinator, count, index = (environment[name] for name in LOCAL)
        return _told('scripts/launch_local.py', coordinator, _number(environment, LOCAL[1]), _number(environment, LOCAL[2]))
    hosts = environment.get('TPU_PROCESS_ADDRESSES') or environment.get('TPU_WORKER_HOSTNAMES')
    if hosts and (slices := _tpu_with(hosts, environment)) is not None:
        return slices
    for name, method, variables, size in (
        ('SLURM', 'slurm', _SLURM, 'SLURM_NTASKS'),
        ('Open MPI', 'ompi', _OPEN_MPI, 'OMPI_COMM_WORLD_SIZE'),
    ):
        if size in environment and _number(environment, size) > 1:
            _require(name, environment, variables)
            return Cluster(name, _number(environment, size), dict(cluster_detection_method=method))
    if on_tpu and not hosts and 'TPU_SKIP_MDS_QUERY' not in environment:
        if importlib.util.find_spec('libtpu') is None:
            raise ClusterError(
                'this machine has TPU chips, and without the package libtpu neither they nor other hosts can be found: install "jax[tpu]", '
                'or say that this process is alone, on the CPU, with --distributed=off'
            )
        return Cluster('Cloud TPU', None, {})  # its metadata server, which jax.distributed asks, knows the other hosts
    if not hosts and {_POD, 'KUBERNETES_SERVICE_HOST'} <= environment.keys() and importlib.util.find_spec('kubernetes') is not None:
        return Cluster('Kubernetes', None, {})  # its API server, which jax.distributed asks, knows the other pods
    _refuse_to_leave_others(environment)
    if not hosts:
        _say_if_in_doubt(environment)
    return None


def _refuse_to_leave_others(environment: Mapping[str, str]) -> None:
    """Raises ClusterError for a variable by which there are processes that cannot be joined."""
    told = {name: ('0', '1') for name in _COUNTS} | {name: ('0',) for name in _INDICES}
    found = [name for name, alone in told.items() if environment.get(name) and environment[name] not in alone]
    if environment.get('JAX_COORDINATOR_ADDRESS') and environment.get('JAX_NUM_PROCESSES') != '1':
        found.append('JAX_COORDINATOR_ADDRESS')
    if found:
        who = (_COUNTS | _INDICES).get(found[0], 'Kubeflow or a script')
        raise ClusterError(
            f'{found[0]} is {environment[found[0]]!r}, as {who} sets it where there are several processes, and they cannot be found by it: '
            'say where they are with --distributed=explicit, or that this one is alone with --distributed=off'
        )


def _say_if_in_doubt(environment: Mapping[str, str]) -> None:
    """Warns where this may be the first of several pods: the others have an index above 0, or wait for the lock of the run's folder."""
    name = next((name for name in environment if name == _POD or name.startswith('JOBSET_')), None)
    if name is not None:
        warnings.warn(
            f'{name} is set, so this pod may be one of several, which cannot be found (the package kubernetes is not installed): '
            'going on alone, as --distributed=off does without this warning',
            stacklevel=1,
        )


def _tpu_with(hosts: str, environment: Mapping[str, str]) -> Cluster | None:
    """The hosts of all slices, one process on each."""
    slices = _number(environment, 'MEGASCALE_NUM_SLICES') if environment.get('MEGASCALE_NUM_SLICES') else 1
    count = len(hosts.split(',')) * slices
    if count == 1:
        return None
    needed = ('TPU_WORKER_ID',) if slices == 1 else ('TPU_WORKER_ID', 'MEGASCALE_SLICE_ID', 'MEGASCALE_COORDINATOR_ADDRESS')
    _require('Cloud TPU', environment, needed)
    return Cluster('Cloud TPU', count, {})


def _told(name: str, coordinator: str, count: int, index: int) -> Cluster | None:
    if not 0 <= index < count:
        raise ClusterError(f'{name} says that this is process {index} of {count}, allowed is 0 to {count - 1}')
    arguments = dict(coordinator_address=coordinator, num_processes=count, process_id=index, cluster_detection_method='deactivate')
    return Cluster(name, count, arguments) if count > 1 else None


def _require(name: str, environment: Mapping[str, str], variables: tuple[str, ...]) -> None:
    missing = [variable for variable in variables if not environment.get(variable)]
    if missing:
        raise ClusterError(
            f'{name} says that there are several processes, but {", ".join(missing)} is not set: '
            'start every process through it (srun, mpirun), say where they are with --distributed=explicit, or that this one is alone '
            'with --distributed=off'
        )


def _number(environment: Mapping[str, str], variable: str) -> int:
    if not environment[variable].isdecimal():
        raise ClusterError(f'{variable} is {environment[variable]!r}, allowed is an integer')
    return int(environment[variable])


def run_to_exit(main: Callable[[], int]) -> NoReturn:
    """Ends the process with main's exit code.

    Where there are other processes, one that failed ends at once: an ordinary exit waits for them, and they wait for it.
    """
    try:
        code = main()
    except Exception:
        if not _joined():
            raise
        traceback.print_exc()
        code = FAILED
    if code and _joined():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _joined() -> bool:
    jax = sys.modules.get('jax')
    return jax is not None and jax.distributed.is_initialized()
