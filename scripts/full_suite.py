"""A pytest plugin that stores one row of what a run of the tests came to: `scripts/test.sh --full` loads it, nothing else does.

The row is added to experiments/results/reliability.jsonl when the run ends, whether tests failed or Ctrl-C ended it. It says what passed,
failed and was skipped, by marker and by folder, which tests failed and with what, and what tests measured (`record_property`).
NESTED_JAX_FULL holds the arguments after --full, NESTED_JAX_FULL_RESULTS another file for the row.
"""

import collections
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
_GROUP = re.compile(r'@[^@\]]*$')  # pytest-xdist puts a test's group behind its name, here a path of this machine


def pytest_configure(config: pytest.Config) -> None:
    """Counts where all reports arrive: not in the workers of pytest-xdist."""
    if not hasattr(config, 'workerinput'):
        config.pluginmanager.register(FullSuite(os.environ.get(ARGUMENTS, ''), os.environ.get(FILE) or RESULTS), 'full_suite_rows')


class FullSuite:
    """What the tests of a run came to.

    Args:
        arguments: that say which tests, as typed.
        results: file that the row is added to.
    """

    def __init__(self, arguments: str, results: str | os.PathLike):
        self.arguments, self.results = arguments, pathlib.Path(results)
        self._began, self._commit = time.monotonic(), commit()  # of the code that is tested; the tree may move on meanwhile
        self._tests: dict[str, dict] = {}
        self._failures: dict[str, str] = {}
        self._measured: dict[str, dict] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Each test is reported three times: when it is set up, called and taken down."""
        name = _GROUP.sub('', report.nodeid)
        marks = '+'.join(name for name in MARKERS if name in report.keywords) or 'default'
        folder = '/'.join(name.split('::')[0].split('/')[:2])
        test = self._tests.setdefault(name, dict(outcome='passed', marks=marks, folder=folder, seconds=0.0))
        test['seconds'] += report.duration
        if report.outcome != 'passed' and test['outcome'] != 'failed':
            test['outcome'] = report.outcome
        if report.failed:
            self._failures.setdefault(name, _last_line(report))
        if report.when == 'teardown' and report.user_properties:
            self._measured[name] = dict(report.user_properties)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A file that cannot be read has no tests to fail."""
        if report.failed:
            self._failures[report.nodeid] = _last_line(report)
            self._tests[report.nodeid] = dict(outcome='failed', marks='collection', folder=report.nodeid, seconds=0.0)

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        """Stores the row, unless no test was run."""
        if not self._tests:
            return
        metrics = _counts(self._tests.values()) | dict(
            exit_status=int(exitstatus),
            by_marker=self._by('marks'),
            by_folder=self._by('folder'),
            failures=self._failures,
            measured=self._measured,
        )
        settings = dict(tests=self.arguments or 'all', python=platform.python_version(), jax=jax.__version__)
        row = make_row(
            experiment=EXPERIMENT, model='tests', seed=0, config=settings, metrics=metrics,
            hardware=f'{platform.machine()}, {os.cpu_count()} CPU cores', wall_s=time.monotonic() - self._began,
            command=shlex.join(['scripts/test.sh', '--full', *shlex.split(self.arguments)]),
        )  # fmt: skip
        append_row(self.results, row | dict(commit=self._commit))

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
