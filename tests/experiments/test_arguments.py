"""Command lines of the experiments: compiled programs are read from a folder that is the user's alone, or the job does not begin."""

import pathlib

import pytest

from experiments import parity
from scripts import bench

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.parametrize('main', [parity.main, bench.main])
def test_a_cache_that_others_can_write_to_ends_the_job_before_it_begins(main, tmp_path, monkeypatch, capsys):
    tmp_path.chmod(0o777)
    monkeypatch.setenv('JAX_COMPILATION_CACHE_DIR', str(tmp_path))
    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 2 and 'allowed is a folder of your own that nobody else can write to' in capsys.readouterr().err


def test_every_job_that_compiles_checks_it():
    jobs = [path for folder in ('experiments', 'scripts') for path in (ROOT / folder).glob('*.py') if 'def main(' in path.read_text()]
    assert len(jobs) > 20
    others = {'launch_local', 'make_tables', 'environment'}  # start processes that check, or compile nothing
    unchecked = {path.stem for path in jobs if 'parse_arguments(' not in path.read_text() and 'private_cache(' not in path.read_text()}
    assert unchecked <= others
