"""What the processes of a run do together: join, agree, count, leave.

Every function here is to be called by all of them, in the same order; in a run of one process each is what it says for one. Processes
agree on small integers only, by one collective over all devices, so that each of them takes the same decision.

A process that fails leaves the others waiting in a collective. That is all right: it ends (`cluster.run_to_exit`), whereupon theirs
fails or the supervisor ends them, and all are started again from a checkpoint. `jax_enable_recoverability` stays off: with it, the
process that is last to shut down dies of SIGABRT when process 0 was quicker (measured, jax 0.10.2), after a run that went well.
"""

import os
import sys
from collections.abc import Callable, Mapping
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from nested_jax.training.cluster import ClusterError, Mode, ProcessConfig, find_cluster, has_tpu

T = TypeVar('T')


def join(mode: Mode = 'auto', config: ProcessConfig | None = None, environment: Mapping[str, str] = os.environ) -> None:
    """Joins the other processes, if there are any; before anything else that needs a device.

    Says first on standard error that it does: JAX ends a process that waits for process 0 in vain with SIGABRT, not with an exception.

    Args:
        mode: see `find_cluster`.
        config: where they are and how long to wait for them.
        environment: variables of the process.

    Raises:
        ValueError: see `find_cluster`.
        ClusterError: when there are other processes and this one cannot join them.
    """
    config = config or ProcessConfig()
    cluster = find_cluster(mode, config, environment, has_tpu())
    if cluster is None:
        return
    whom = f'the {cluster.count or ""} processes that {cluster.name} says there are'.replace('  ', ' ')
    print(f'joining {whom}, for {config.start_s} s at most', file=sys.stderr, flush=True)
    limits = dict(
        initialization_timeout=config.start_s, heartbeat_timeout_seconds=config.heartbeat_s, shutdown_timeout_seconds=config.shutdown_s
    )
    try:
        jax.distributed.initialize(**cluster.arguments, **limits)
    except Exception as error:  # of many types, by what the cluster is
        message = ' '.join(str(error).split())
        raise ClusterError(f'cannot join {whom}: {message}') from error
    if cluster.count not in (None, jax.process_count()):
        raise ClusterError(f'{cluster.name} says that there are {cluster.count} processes, but {jax.process_count()} joined')


def leave() -> None:
    """Waits until all processes are here, then parts with them: what follows is done alone, and on the host."""
    if jax.distributed.is_initialized():
        jax.distributed.shutdown()


def several() -> bool:
    """Whether there are other processes."""
    return jax.process_count() > 1


def is_first() -> bool:
    """Whether this is process 0, which writes and prints what a run writes and prints once."""
    return jax.process_index() == 0


def gather(value: int) -> list[int]:
    """The value of each process, of 64 bits with sign; none is known before all have said theirs."""
    if not several():
        return [value]
    # As bytes: JAX has no int64 unless asked to.
    stacked = multihost_utils.process_allgather(np.asarray([value], np.int64).view(np.uint8))
    return [int(row.view(np.int64)[0]) for row in np.ascontiguousarray(stacked)]


def wait() -> None:
    """Until all processes are here."""
    gather(0)


def total(value: int) -> int:
    """The sum over processes."""
    return sum(gather(value))


def first_says(value: int) -> int:
    """The value of process 0."""
    return gather(value)[0]


def first_to_fail(failed: bool) -> int | None:
    """The lowest index of a process that failed; None where none did."""
    return next((index for index, value in enumerate(gather(int(failed))) if value), None)


def first_then_others(action: Callable[[], T]) -> T:
    """Does what may not be done at the same time: process 0 does it, then, if that went well, the others.

    Raises:
        ClusterError: in the others, when process 0 could not do it.
    """
    result, error = None, None
    if is_first():
        try:
            result = action()
        except Exception as caught:
            error = caught
    if first_to_fail(error is not None) is not None:
        raise error or ClusterError('process 0 failed, and says why')
    return result if is_first() else action()


def check_same(name: str, value: int) -> None:
    """Raises ClusterError, in all processes, unless they all pass the same value.

    Args:
        name: what is compared, for the message.
        value: a number, or the leading bits of a digest.
    """
    values = gather(value)
    if len(set(values)) > 1:
        odd = next(index for index, other in enumerate(values) if other != values[0])
        raise ClusterError(f'processes 0 and {odd} were started with another {name}; allowed is the same for all')
