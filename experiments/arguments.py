"""The command line of an experiment."""

import sys
from typing import TypeVar

import tyro

from nested_jax.training.config import private_cache

T = TypeVar('T')


def parse_arguments(kind: type[T], argv: list[str] | None, description: str) -> T:
    """Arguments as a dataclass; checks first that nobody else can write to where compiled programs are kept.

    Args:
        kind: dataclass, whose fields are the flags.
        argv: without the program's name; None: the process's.
        description: for --help.

    Raises:
        SystemExit: after --help, and with code 2, the message on standard error, for wrong arguments or another's cache.
    """
    try:
        private_cache()
    except ValueError as error:
        print(f'error: {error}', file=sys.stderr)
        raise SystemExit(2) from None
    return tyro.cli(kind, args=argv, description=description)
