"""A pytest plugin that stores one row of what a run of the tests came to: `scripts/test.sh --full` loads it, nothing else does.

The row is added to experiments/results/reliability.jsonl when all tests have run. It says what passed, failed and was skipped, by marker
and by folder, which tests failed and with what, and what tests measured (`record_property`). NESTED_JAX_FULL holds the arguments after
--full, NESTED_JAX_FULL_RESULTS another file for the row.

What each test came to is kept in pytest's cache until then. A run that was cut off goes on when the same command is given again, as long
as no file of the commit but results was changed: no test is run twice, one that failed neither.
"""

import collections
import hashlib
import json
import os
import pathlib
import platform
import re
import shlex
import time
from collections.abc import Iterable

import jax
import pytest

from nested_jax.evaluation.rows import append_row, commit, make_row

EXPERIMENT = 'reliability'
ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / 'experiments' / 'results' / f'{EXPERIMENT}.jsonl'
ARGUMENTS, FILE = 'NESTED_JAX_FULL', 'NESTED_JAX_FULL_RESULTS'
MARKERS = ('slow', 'multiprocess', 'exhaustive')
_RUN_TO_THE_END = (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED)
_GROUP = re.compile(r'@[^@\]]*$')  # pytest-xdist puts a test's group behind its name, here a path of this machine


def pytest_configure(config: pytest.Config) -> None:
    """Counts where all reports arrive, not in the workers of pytest-xdist; leaves tests out where they are chosen, in those too."""
    if hasattr(config, 'workerinput'):
        done = config.workerinput['done']
    else:
        arguments = os.environ.get(ARGUMENTS, '')
        suite = FullSuite(arguments, os.environ.get(FILE) or RESULTS, _unfinished(config.cache, arguments))
        config.pluginmanager.register(suite, 'full_suite_rows')
        done = suite.done
    config.pluginmanager.register(_Rest(frozenset(done)), 'full_suite_rest')


def _unfinished(cache: pytest.Cache, arguments: str) -> pathlib.Path | None:
    """File for what the tests of a run came to so far; None where no commit says which code that was."""
    if (now := commit()) == 'unknown' or '+' in now:
        return None
    return cache.mkdir('full_suite') / f'{now[:16]}-{hashlib.sha256(arguments.encode()).hexdigest()[:16]}.jsonl'


class _Rest:
    """Leaves out the tests that were done before."""

    def __init__(self, done: frozenset[str]):
        self._done = done

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        is_done = lambda item: _GROUP.sub('', item.nodeid) in self._done
        config.hook.pytest_deselected(items=[item for item in items if is_done(item)])
        items[:] = [item for item in items if not is_done(item)]


class FullSuite:
    """What the tests of a run came to.

    Args:
        arguments: that say which tests, as typed.
        results: file that the row is added to.
        unfinished: file that each test is noted in, and read from; None: no run goes on.
    """

    def __init__(self, arguments: str, results: str | os.PathLike, unfinished: pathlib.Path | None = None):
        self.arguments, self.results = arguments, pathlib.Path(results)
        self._unfinished, self._commit = unfinished, commit()  # of the code that is tested; the tree may move on meanwhile
        self._tests: dict[str, dict] = {}
        wall_s = 0.0
        if unfinished is not None and unfinished.exists():
            wall_s = self._read(unfinished)
            print(f'going on after the {len(self._tests)} tests of a run that was cut off')
        self.done = list(self._tests)
        self._began = time.monotonic() - wall_s

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node) -> None:
        """Tells a worker of pytest-xdist what was done."""
        node.workerinput['done'] = self.done

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Each test is reported three times: when it is set up, called and taken down."""
        name = _GROUP.sub('', report.nodeid)
        marks = '+'.join(name for name in MARKERS if name in report.keywords) or 'default'
        folder = '/'.join(name.split('::')[0].split('/')[:2])
        empty = dict(outcome='passed', marks=marks, folder=folder, seconds=0.0, failure=None, measured={})
        test = self._tests.setdefault(name, empty)
        test['seconds'] += report.duration
        if report.outcome != 'passed' and test['outcome'] != 'failed':
            test['outcome'] = report.outcome
        if report.failed:
            test['failure'] = test['failure'] or _last_line(report)
        if report.when == 'teardown':
            test['measured'] = dict(report.user_properties)
            self._note(name)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A file that cannot be read has no tests to fail."""
        if report.failed:
            failure = _last_line(report)
            marks = dict(marks='collection', folder=report.nodeid)
            self._tests[report.nodeid] = dict(outcome='failed', seconds=0.0, failure=failure, measured={}, **marks)

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        """Stores the row, unless no test was run, or not all were."""
        if not self._tests:
            return
        if exitstatus not in _RUN_TO_THE_END or session.shouldfail:  # by -x
            print('\nno row: not all tests were run' + ('; the same command goes on with the others' if self._unfinished else ''))
            return
        failures = {name: test['failure'] for name, test in self._tests.items() if test['outcome'] == 'failed'}
        session.exitstatus = int(bool(failures))
        metrics = _counts(self._tests.values()) | dict(
            exit_status=session.exitstatus,
            by_marker=self._by('marks'),
            by_folder=self._by('folder'),
            failures=failures,
            measured={name: test['measured'] for name, test in self._tests.items() if test['measured']},
        )
        settings = dict(tests=self.arguments or 'all', python=platform.python_version(), jax=jax.__version__)
        row = make_row(
            experiment=EXPERIMENT, model='tests', seed=0, config=settings, metrics=metrics,
            hardware=f'{platform.machine()}, {os.cpu_count()} CPU cores', wall_s=time.monotonic() - self._began,
            command=shlex.join(['scripts/test.sh', '--full', *shlex.split(self.arguments)]),
        )  # fmt: skip
        append_row(self.results, row | dict(commit=self._commit))
        if self._unfinished is not None:
            self._unfinished.unlink(missing_ok=True)

    def _read(self, unfinished: pathlib.Path) -> float:
        """Takes over what is noted, and takes away a line that was cut off; returns the seconds that the run took so far."""
        wall_s, lines = 0.0, [line for line in unfinished.read_text().splitlines(keepends=True) if line.endswith('\n')]
        unfinished.write_text(''.join(lines))
        for test in map(json.loads, lines):
            wall_s = test.pop('wall_s')
            self._tests[test.pop('name')] = test
        return wall_s

    def _note(self, name: str) -> None:
        if self._unfinished is not None:
            with open(self._unfinished, 'a') as file:
                file.write(json.dumps(dict(name=name, wall_s=time.monotonic() - self._began, **self._tests[name])) + '\n')

    def _by(self, name: str) -> dict[str, dict]:
        groups = collections.defaultdict(list)
        for test in self._tests.values():
            groups[test[name]].append(test)
        return {key: _counts(tests) for key, tests in sorted(groups.items())}


def _counts(tests: Iterable[dict]) -> dict[str, float]:
    tests = list(tests)
    counted = collections.Counter(test['outcome'] for test in tests)
    return {name: counted[name] for name in ('passed', 'failed', 'skipped')} | dict(
        seconds=round(sum(test['seconds'] for test in tests), 1)
    )


def _last_line(report: pytest.TestReport | pytest.CollectReport) -> str:
    return (report.longreprtext.strip().splitlines() or [''])[-1]
