"""The row of a whole suite: what passed, failed and was skipped, and what tests measured."""

import os
import pathlib
import subprocess
import sys

import pytest

from nested_jax.evaluation.rows import read_rows
from scripts import full_suite

ROOT = pathlib.Path(__file__).resolve().parents[2]
SUITE = """
import pytest

def test_good(record_property):
    record_property('chaos', dict(goodput=0.5))

@pytest.mark.slow
def test_bad():
    assert 1 + 1 == 3, 'no'

@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.parametrize('n', [1, 2])
def test_left_out(n):
    pytest.skip('not here')

@pytest.fixture
def broken():
    yield
    raise OSError('full')

@pytest.mark.multiprocess
def test_that_fails_when_taken_down(broken):
    pass

@pytest.mark.gpu
def test_elsewhere():
    pass
"""


def run(folder, *arguments, **settings):
    command = [sys.executable, '-m', 'pytest', '-p', 'scripts.full_suite', '-c', str(ROOT / 'pyproject.toml'), '--rootdir', str(folder)]
    own = dict(NESTED_JAX_FULL='tests/a -x', NESTED_JAX_FULL_RESULTS=str(folder / 'rows.jsonl'), PYTHONPATH=str(ROOT))
    own = os.environ | own | settings
    done = subprocess.run([*command, '-m', 'not gpu', *arguments], cwd=folder, env=own, capture_output=True, text=True)
    rows = read_rows(folder / 'rows.jsonl')
    return done, rows[-1] if rows else None


@pytest.mark.slow
def test_everything_is_in_one_row(tmp_path):
    (tmp_path / 'tests' / 'a').mkdir(parents=True)
    (tmp_path / 'tests' / 'a' / 'test_a.py').write_text(SUITE)
    (tmp_path / 'tests' / 'test_b.py').write_text('import nowhere_to_be_found')
    # With workers and without: the reports of workers arrive at the one that started them.
    done, row = run(tmp_path, '-n', '2', '--continue-on-collection-errors', 'tests')
    assert done.returncode == 1, done.stderr
    assert (row['experiment'], row['command'], row['config']['tests']) == ('reliability', 'scripts/test.sh --full tests/a -x', 'tests/a -x')
    found = row['metrics']
    assert (found['passed'], found['skipped'], found['exit_status']) == (1, 2, 1) and found['failed'] >= 3
    counts = {name: (part['passed'], part['failed'], part['skipped']) for name, part in found['by_marker'].items() if name != 'collection'}
    assert counts == {'default': (1, 0, 0), 'slow': (0, 1, 0), 'slow+exhaustive': (0, 0, 2), 'multiprocess': (0, 1, 0)}
    assert found['by_folder']['tests/a']['failed'] == 2 and row['wall_s'] > 0
    last = {name.split('::')[-1]: line for name, line in found['failures'].items()}
    assert last['test_bad'].endswith('AssertionError') and last['test_that_fails_when_taken_down'].endswith('OSError')
    assert any('test_b.py' in name for name in found['failures'])
    assert [value for name, value in found['measured'].items()] == [dict(chaos=dict(goodput=0.5))]
    again, row = run(tmp_path, '-n', '0', '-k', 'good', 'tests/a')
    assert again.returncode == 0 and row['metrics']['passed'] == 1 and row['metrics']['failures'] == {}


INTERRUPTED = """
import os
import pytest

def test_bad():
    assert False

@pytest.mark.slow
def test_good(record_property):
    record_property('number', 1)

def test_that_is_interrupted():
    if 'STOP' in os.environ:
        raise KeyboardInterrupt

def test_last():
    pass
"""


@pytest.mark.slow
def test_a_run_that_was_cut_off_goes_on(tmp_path):
    """No test is run twice, one that failed neither; another commit begins anew."""
    (tmp_path / 'tests').mkdir()
    (tmp_path / 'tests' / 'test_a.py').write_text(INTERRUPTED)
    at = lambda commit: (tmp_path / 'conftest.py').write_text(f'from scripts import full_suite\nfull_suite.commit = lambda: {commit!r}')
    at('first')
    stopped, row = run(tmp_path, '-n', '0', 'tests', STOP='yes')
    assert stopped.returncode == 2 and row is None and 'the same command goes on' in stopped.stdout, stopped.stdout
    (noted,) = (tmp_path / '.pytest_cache' / 'd' / 'full_suite').iterdir()
    noted.write_text(noted.read_text() + '{"name": "tests/test_a.py::test_th')  # the process was killed
    assert run(tmp_path, '-n', '0', 'tests', STOP='yes')[1] is None  # and what went on, too
    done, row = run(tmp_path, '-n', '2', 'tests')
    assert '2 passed' in done.stdout and 'going on after the 2 tests' in done.stdout, done.stdout
    assert done.returncode == 1 and not noted.exists()
    found = row['metrics']
    assert (found['passed'], found['failed'], found['exit_status'], row['commit']) == (3, 1, 1, 'first')
    assert list(found['failures']) == ['tests/test_a.py::test_bad'] and found['measured'] == {'tests/test_a.py::test_good': dict(number=1)}
    assert found['by_marker']['slow']['passed'] == 1
    at('second')
    assert run(tmp_path, '-n', '0', '-x', 'tests')[1]['commit'] == 'first'  # the last row: there is none of a part
    at('third+changes')
    for settings in (dict(STOP='yes'), {}):
        done, row = run(tmp_path, '-n', '0', 'tests', **settings)
        assert 'going on' not in done.stdout and 'goes on' not in done.stdout
    assert row['metrics']['passed'] == 3 and row['commit'] == 'third+changes'


def test_a_group_behind_a_tests_name_is_cut_off():
    counted = full_suite.FullSuite('', 'rows.jsonl')
    for name in ('a.py::t[kill@3]@/b/c.py', 'a.py::t[kill@3]', 'a.py::u@/b/c.py'):
        outcome = dict(outcome='passed', longrepr=None, when='call', duration=1.0)
        counted.pytest_runtest_logreport(pytest.TestReport(name, ('a.py', 1, ''), {}, **outcome))
    assert {name: test['seconds'] for name, test in counted._tests.items()} == {'a.py::t[kill@3]': 2.0, 'a.py::u': 1.0}
