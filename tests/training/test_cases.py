"""Each case of what a run must survive is shown by a test that CI runs, in whose docstring, or that of its file, its name stands."""

import ast
import pathlib
import re
import subprocess
import sys

import pytest

TESTS = pathlib.Path(__file__).parents[1]
COUNTS = dict(R=8, C=10, S=7, N=5, F=6)  # resuming and data, checkpoints, signals, numbers, configuration
CASES = {f'{letter}{number}' for letter, count in COUNTS.items() for number in range(1, count + 1)}
GROUPS = TESTS / 'data' / 'tasks'  # where S5 is a group of permutations
BY_HAND = re.compile(r'pytest\.mark\.(exhaustive|gpu)\b')


def runs_in_ci(test: ast.FunctionDef) -> bool:
    """Whether some form of a test is run: neither it nor everything that it is parametrized by is marked."""
    for decorator in test.decorator_list:
        values = decorator.args[1] if isinstance(decorator, ast.Call) and len(decorator.args) > 1 else None
        each = values.elts if isinstance(values, ast.List | ast.Tuple) else [decorator]
        if all(BY_HAND.search(text) and ' if ' not in text for text in map(ast.unparse, each)):
            return False
    return True


def named(node: ast.FunctionDef | ast.Module) -> set[str]:
    """Cases in a docstring."""
    return CASES & set(re.findall(r'\b[A-Z]\d+\b', ast.get_docstring(node) or ''))


def cases_of(text: str) -> set[str]:
    """Cases that a file's tests show in CI, by its own docstring and theirs."""
    module = ast.parse(text)
    tests = [node for node in module.body if isinstance(node, ast.FunctionDef) and node.name.startswith('test_')]
    marks = [node for node in module.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == 'pytestmark']
    if any(BY_HAND.search(ast.unparse(mark.value)) for mark in marks):
        return set()
    shown = [test for test in tests if runs_in_ci(test)]
    return set().union(*map(named, [module, *shown])) if shown else set()


def test_every_case_is_shown_in_ci():
    files = [path for path in TESTS.rglob('test_*.py') if not path.is_relative_to(GROUPS) and path != pathlib.Path(__file__)]
    assert len(CASES) == 36
    assert CASES - set().union(*(cases_of(path.read_text()) for path in files)) == set()


def test_ci_runs_six_tests_of_several_processes_at_most():
    files = [path for path in TESTS.rglob('test_*.py') if 'pytest.mark.multiprocess' in path.read_text()]
    chosen = ['-m', 'multiprocess and not exhaustive and not gpu', '--collect-only', '-q', '-p', 'no:cacheprovider']
    listed = subprocess.run([sys.executable, '-m', 'pytest', *chosen, *files], cwd=TESTS.parent, capture_output=True, text=True)
    found = re.findall(r'^tests/.*::.*$', listed.stdout, re.M)
    assert listed.returncode == 0 and 0 < len(found) <= 6, found


SHOWN = '''
@pytest.mark.slow
def test_it():
    """R1: so."""
'''


@pytest.mark.parametrize(
    ('text', 'shown'),
    [
        (SHOWN, {'R1'}),
        (f'"""C10, and R11 is none."""{SHOWN}', {'C10', 'R1'}),
        (f'pytestmark = [pytest.mark.gpu]{SHOWN}', set()),
        (SHOWN.replace('slow', 'exhaustive'), set()),
        ('"""S1."""' + SHOWN.replace('slow', 'exhaustive'), set()),
        (SHOWN.replace('slow', "parametrize('index', [1, pytest.param(0, marks=pytest.mark.exhaustive)])"), {'R1'}),
        (SHOWN.replace('slow', "parametrize('index', [pytest.param(0, marks=pytest.mark.exhaustive)])"), set()),
        (SHOWN.replace('test_it', 'it'), set()),
    ],
)
def test_only_what_ci_runs_counts(text, shown):
    assert cases_of(text) == shown
