"""Makes .venv and installs the requirements in it, for demo.sh and test.sh. A second run finds nothing to do.

Usage: python environment.py [extra ...], where an extra is a key of project.optional-dependencies in pyproject.toml.
Standard library only: this runs before anything is installed.

The stamp .venv/installed holds one digest for each group of requirements, over the lines and the Python they were
installed for. It is removed before an installation and written after it, so an interrupted one is made again from an
empty folder: pip takes a half-copied package for an installed one.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).resolve().parent.parent
VENV = ROOT / '.venv'
VENV_PYTHON = VENV / 'bin' / 'python'
STAMP = VENV / 'installed'


def read_requirements(extras: list[str]) -> dict[str, list[str]]:
    """Requirement lines by group: 'core' from requirements.txt, one group for each extra.

    Raises:
      KeyError: an extra is not in pyproject.toml.
    """
    lines = (line.split('#')[0].strip() for line in (ROOT / 'requirements.txt').read_text().splitlines())
    offered = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']['optional-dependencies']
    return {'core': [line for line in lines if line]} | {extra: offered[extra] for extra in extras}


def venv_version() -> str:
    """Version of the Python in .venv, '' where there is none that runs."""
    try:
        command = [VENV_PYTHON, '-c', 'import sys; print(sys.prefix, sys.version)']
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ''


def digests(groups: dict[str, list[str]]) -> dict[str, str]:
    """What the stamp holds once the groups are installed in .venv as it is."""
    version = venv_version()
    return {name: hashlib.sha256('\n'.join([version, *lines]).encode()).hexdigest() for name, lines in groups.items()}


def read_stamp() -> dict[str, str]:
    """Digests of the groups whose installation was completed."""
    try:
        return json.loads(STAMP.read_text())
    except (OSError, ValueError):
        return {}


@contextlib.contextmanager
def lock() -> Iterator[None]:
    """One installation at a time in this checkout; the system frees the lock however its holder ends."""
    with open(ROOT / '.venv.lock', 'w') as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print('environment: waiting for another installation', file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def has_uv() -> bool:
    """Whether uv is there and starts (a version manager may leave a name that does not)."""
    return shutil.which('uv') is not None and subprocess.run(['uv', '--version'], capture_output=True).returncode == 0


def make_venv(uv: bool) -> None:
    """An empty .venv, from the Python that runs this or, if that is in an environment itself, from the one it came from."""
    python = getattr(sys, '_base_executable', None) or sys.executable
    print(f'environment: making .venv with Python {sys.version.split()[0]} (once; 1 GB, a minute or two)', file=sys.stderr)
    if VENV.is_symlink() or VENV.is_file():
        VENV.unlink()
    shutil.rmtree(VENV, ignore_errors=True)
    # --seed puts pip in, for whoever adds a package by hand.
    venv = ['uv', 'venv', '--quiet', '--seed', '--python', python, VENV] if uv else [python, '-m', 'venv', VENV]
    subprocess.run(venv, check=True)


def install(groups: dict[str, list[str]], uv: bool) -> None:
    """Install what is missing, in a new .venv unless the present one holds the core requirements as they are now."""
    stamp = read_stamp()
    if stamp.get('core') != digests(groups)['core']:
        make_venv(uv)
        stamp = {}
    STAMP.unlink(missing_ok=True)
    # -qq: without it pip prints a warning for every local wheel folder that lacks a package. Errors still show.
    pip = ['uv', 'pip', 'install', '--quiet', '--python', VENV_PYTHON] if uv else [VENV_PYTHON, '-m', 'pip', 'install', '-qq']
    subprocess.run([*pip, *sum(groups.values(), [])], check=True)
    unfinished = VENV / 'installed.part'
    unfinished.write_text(json.dumps(stamp | digests(groups)))
    os.replace(unfinished, STAMP)


def install_with_uv_or_pip(groups: dict[str, list[str]]) -> None:
    """Install with uv where there is one, and with pip where there is none or it fails (it brings its own certificates, for one)."""
    if has_uv():
        try:
            return install(groups, uv=True)
        except subprocess.CalledProcessError:
            print('environment: uv failed; trying pip', file=sys.stderr)
    install(groups, uv=False)


def main(extras: list[str]) -> None:
    """Bring .venv up to date with the core requirements and the extras; quick when it is."""
    groups = read_requirements(extras)

    def up_to_date() -> bool:
        return digests(groups).items() <= read_stamp().items()

    if not up_to_date():
        with lock():
            if not up_to_date():
                install_with_uv_or_pip(groups)


if __name__ == '__main__':
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        sys.exit('environment: interrupted; run the same command again')
    except subprocess.CalledProcessError as error:
        sys.exit(f'environment: {" ".join(map(str, error.cmd[:4]))} ... failed, see above; then run the same command again')
    except OSError as error:
        sys.exit(f'environment: {error}')
