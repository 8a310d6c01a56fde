"""Runs a command as several processes on this machine, which share its simulated devices: what a pod does, on a laptop.

    python scripts/launch_local.py --processes 2 --devices 4 -- \\
        python -m experiments.hope_pretrain --smoke --train.watchdog-s 300

A process that dies, of SIGKILL too, takes the others with it, and all are started again from the newest checkpoint that verifies: ten
times at most without a newer one, and not after ending at the same step three times in a row. Ctrl-C or SIGTERM saves and stops all at
one step; a second one does not wait for that. Process 0's output is shown, everyone's is in --logs. The exit code is 0 when all
ended well, else that of the process that did not (128 + its number for a signal), 2 for wrong input.
"""

import dataclasses
import pathlib
import shlex
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import tyro

from nested_jax.training.supervisor import Supervisor


@dataclasses.dataclass(frozen=True)
class Args:
    """Run a command as several processes on this machine."""

    processes: int = 2
    devices: int | None = None
    """Simulated CPU devices of each; None: as JAX_NUM_CPU_DEVICES says."""
    logs: pathlib.Path = pathlib.Path('runs/launch_local')
    restarts: int = 10
    """Without a newer checkpoint."""
    dry_run: bool = False
    """Say what would be started, and start nothing."""


def main(argv: list[str]) -> int:
    """Runs the job; returns the exit code."""
    end = argv.index('--') if '--' in argv else len(argv)
    own, command = argv[:end], argv[end + 1 :]
    args = tyro.cli(Args, args=own, description=__doc__)
    try:
        supervisor = Supervisor(command, args.processes, devices=args.devices, logs=args.logs, restarts=args.restarts, say=_say)
    except ValueError as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    if args.dry_run:
        devices = '' if args.devices is None else f' with {args.devices} devices each'
        print(f'{args.processes} processes{devices}, logs in {args.logs}: {shlex.join(command)}')
        return 0
    return supervisor.run()


def _say(line: str) -> None:
    print(f'launch_local: {line}', flush=True)


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
