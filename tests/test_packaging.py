"""The project as a whole: what it depends on, what imports what, how long files are, and the environment that the scripts make."""

import ast
import importlib.metadata
import importlib.util
import pathlib
import re
import subprocess
import sys
import tomllib

import pytest
from packaging.requirements import Requirement

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGE = ROOT / 'nested_jax'
MODULES = sorted(PACKAGE.rglob('*.py'))
SOURCES = [*MODULES, *sorted((ROOT / 'experiments').rglob('*.py')), *sorted((ROOT / 'scripts').rglob('*.py'))]
STANDARD = set(sys.stdlib_module_names)

# Imports point one way: a room may import itself and these. What shares a step (memory and optim, say) stays apart.
LIBRARY = {'config', 'memory', 'optim', 'data', 'layers', 'models'}
READERS = {'training', 'seal', 'evaluation'}
ROOMS = {
    'config': set(),
    'memory': {'memory'},
    'optim': {'optim'},
    'data': {'data'},
    'layers': {'config', 'memory', 'optim', 'layers'},
    'models': LIBRARY,
    **{room: LIBRARY | READERS for room in READERS},
}


def imported_modules(tree: ast.AST, package: tuple[str, ...] = ()) -> set[str]:
    """Dotted names of all modules imported anywhere in a file, also inside functions; `from a import b` counts as a.b."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) - node.level + 1], *filter(None, [node.module])] if node.level else [node.module]
            names |= {'.'.join([*base, alias.name]) for alias in node.names}
    return names


def imports_of(path: pathlib.Path) -> set[str]:
    return imported_modules(ast.parse(path.read_text()), path.relative_to(ROOT).parent.parts)


def room_of(path: pathlib.Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix('.py')


def long_functions(tree: ast.AST, limit: int) -> list[str]:
    functions = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
    return [f'{node.name}: {node.end_lineno - node.lineno + 1} lines' for node in functions if node.end_lineno - node.lineno + 1 > limit]


UNSAFE_MODULES = {'pickle', '_pickle', 'cloudpickle', 'dill', 'joblib', 'marshal', 'shelve'}
# What reads files safely only when told to: the last part of the call's name, the argument and its value.
TOLD = (('np.load', 'allow_pickle', False), ('torch.load', 'weights_only', True), ('.extractall', 'filter', 'data'))


def unsafe_uses(tree: ast.AST) -> list[str]:
    """Ways of running data as code."""
    found = [name for name in imported_modules(tree) if name.split('.')[0] in UNSAFE_MODULES]
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        for name, argument, value in TOLD:
            given = [getattr(keyword.value, 'value', None) for keyword in call.keywords if keyword.arg == argument]
            if ast.unparse(call.func).endswith(name) and given != [value]:
                found.append(name)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in {'eval', 'exec'}:
            found.append(node.func.id)
        if isinstance(node, ast.keyword) and node.arg == 'allow_pickle' and getattr(node.value, 'value', True) is not False:
            found.append('allow_pickle')
    return found


def private_uses(tree: ast.AST) -> set[str]:
    """Names with a leading underscore taken from jax, flax or optax."""
    names = imported_modules(tree) | {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return {name for name in names if re.match(r'(jax|jaxlib|flax|optax|jnp|lax|nn)\.(\w+\.)*_(?!_)', name)}


def requirements(lines: list[str]) -> list[Requirement]:
    return [Requirement(line.split('#')[0]) for line in lines if line.split('#')[0].strip()]


def core_requirements() -> list[str]:
    return (ROOT / 'requirements.txt').read_text().splitlines()


def project() -> dict:
    return tomllib.loads((ROOT / 'pyproject.toml').read_text())


def relative(path: pathlib.Path) -> str:
    return str(path.relative_to(ROOT))


# --- the checks above, on code that breaks the rules


def test_checks_see_what_they_look_for():
    assert imported_modules(ast.parse('def f():\n  from ..optim import levels'), ('nested_jax', 'layers')) == {'nested_jax.optim.levels'}
    assert imported_modules(ast.parse('from . import a'), ('nested_jax', 'memory')) == {'nested_jax.memory.a'}
    assert long_functions(ast.parse('def f():\n' + '  x = 1\n' * 3), limit=3) == ['f: 4 lines']
    told = [
        'np.load(p)',
        'jnp.load(p)',
        'torch.load(p)',
        'torch.load(p, weights_only=True)',
        'tar.extractall(p)',
        'from joblib import Memory',
    ]
    assert sorted(unsafe_uses(ast.parse('\n'.join(told)))) == ['.extractall', 'joblib.Memory', 'np.load', 'np.load', 'torch.load']
    unsafe = 'import pickle\nnp.load(p, allow_pickle=True)\nnp.load(p, allow_pickle=False)\neval(s)\nmodel.eval(s)'
    assert sorted(unsafe_uses(ast.parse(unsafe))) == ['allow_pickle', 'eval', 'np.load', 'pickle']
    assert private_uses(ast.parse('from jax._src import core\njax.numpy._x\nself._jax')) == {'jax._src.core', 'jax.numpy._x'}


# --- dependencies


def test_pyproject_takes_its_dependencies_from_requirements_txt():
    settings = project()
    assert settings['tool']['setuptools']['dynamic']['dependencies'] == {'file': ['requirements.txt']}
    assert settings['project']['dynamic'] == ['dependencies'] and 'dependencies' not in settings['project']


def test_every_requirement_has_a_range_and_a_reason():
    lines = [line for line in core_requirements() if line.split('#')[0].strip()]
    for line in lines:
        assert len(line.split('#', 1)[-1].strip()) > 10 and '#' in line, f'no reason: {line}'
    names = [requirement.name for requirement in requirements(lines)]
    assert len(set(names)) == len(names)
    for requirement in requirements([*lines, *project()['project']['optional-dependencies']['test']]):
        assert {clause.operator for clause in requirement.specifier} == {'>=', '<'}, requirement


def test_no_registry_address_is_written_down():
    for path in [ROOT / 'requirements.txt', ROOT / 'pyproject.toml', *sorted((ROOT / 'scripts').glob('*.sh')), ROOT / '.ci' / 'run']:
        assert not re.search(r'https?://|index-url|find-links', path.read_text()), relative(path)
    assert not (ROOT / 'uv.lock').exists()


def test_installed_versions_are_in_range():
    for requirement in requirements(core_requirements()):
        version = importlib.metadata.version(requirement.name)
        assert requirement.specifier.contains(version, prereleases=True), f'{requirement}: {version} is installed'


def test_every_import_is_declared():
    offered = project()['project']['optional-dependencies']
    declared = {re.sub('[-_.]+', '-', r.name).lower() for r in requirements([*core_requirements(), *sum(offered.values(), [])])}
    distributions = importlib.metadata.packages_distributions()
    for path in SOURCES:
        for name in {name.split('.')[0] for name in imports_of(path)} - STANDARD - {'nested_jax', 'experiments', 'scripts'}:
            providers = {re.sub('[-_.]+', '-', provider).lower() for provider in distributions.get(name, [name])}
            assert providers & declared, f'{relative(path)} imports {name}, which requirements.txt and the extras do not name'


# --- what imports what


@pytest.mark.parametrize('path', MODULES, ids=relative)
def test_imports_point_one_way(path):
    room = room_of(path)
    if room == '__init__':
        return
    assert room in ROOMS, f'a new room {room}: give it its place in ROOMS'
    ours = {name.split('.')[1] for name in imports_of(path) if name.startswith('nested_jax.')}
    assert ours <= ROOMS[room], f'{room} may import {sorted(ROOMS[room])} of nested_jax'
    others = {name.split('.')[0] for name in imports_of(path)} - STANDARD - {'nested_jax'}
    assert not others & {'experiments', 'scripts', 'tests', 'tensorflow', 'torch'}
    if room in ('memory', 'optim'):
        assert others <= {'jax', 'numpy', 'optax'}, f'{room} can be taken alone: it imports jax, numpy and optax only'


@pytest.mark.parametrize('path', SOURCES, ids=relative)
def test_nothing_private_and_nothing_unsafe(path):
    tree = ast.parse(path.read_text())
    assert not private_uses(tree)
    assert not unsafe_uses(tree)


@pytest.mark.parametrize('path', [*SOURCES, *sorted((ROOT / 'tests').rglob('*.py'))], ids=relative)
def test_files_and_functions_are_short(path):
    text = path.read_text()
    assert text.count('\n') <= 600
    if path in SOURCES:
        assert long_functions(ast.parse(text), limit=60) == []


@pytest.mark.parametrize('path', MODULES, ids=relative)
def test_every_module_imports(path):
    name = '.'.join(path.relative_to(ROOT).with_suffix('').parts).removesuffix('.__init__')
    optional = {'datasets', 'wandb', 'torch', 'titans_pytorch', 'lm_eval', 'transformers', 'safetensors'}
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name not in optional:
            raise
        pytest.skip(f'{name} needs the optional {error.name}')


def test_importing_the_package_imports_no_framework():
    code = 'import sys, nested_jax; print(*sorted({"jax", "flax", "numpy", "tensorflow"} & set(sys.modules)))'
    result = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.split() == []


# --- the environment that demo.sh and test.sh make


@pytest.fixture
def environment(tmp_path, monkeypatch):
    """scripts/environment.py over an empty checkout, with installers that only note what they were asked."""
    spec = importlib.util.spec_from_file_location('environment', ROOT / 'scripts' / 'environment.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in ('requirements.txt', 'pyproject.toml'):
        (tmp_path / name).write_text((ROOT / name).read_text())
    venv = tmp_path / '.venv'
    for name, value in {'ROOT': tmp_path, 'VENV': venv, 'VENV_PYTHON': venv / 'bin' / 'python', 'STAMP': venv / 'installed'}.items():
        monkeypatch.setattr(module, name, value)
    real_run, module.calls, module.failing = subprocess.run, [], None

    def run(command, **kwargs):
        text = ' '.join(map(str, command))
        if 'venv' in command or 'install' in command:
            module.calls.append('venv' if 'venv' in command else 'tests' if 'pytest>=' in text else 'core')
            if module.calls[-1] == module.failing:
                raise subprocess.CalledProcessError(1, command)
        if 'install' in command:
            return None
        command = [*command[:3], '--without-pip', *command[3:]] if 'venv' in command else command
        return real_run(command, **kwargs)

    monkeypatch.setattr(module.subprocess, 'run', run)
    monkeypatch.setattr(module, 'has_uv', lambda: False)
    return module


def test_environment_is_made_once(environment):
    environment.main([])
    environment.main([])
    assert environment.calls == ['venv', 'core']
    environment.main(['test'])
    environment.main([])
    environment.main(['test'])
    assert environment.calls == ['venv', 'core', 'tests']


def test_environment_is_made_again_after_an_interruption(environment):
    environment.failing = 'tests'
    environment.main([])
    with pytest.raises(subprocess.CalledProcessError):
        environment.main(['test'])
    environment.failing = None
    environment.main(['test'])
    assert environment.calls == ['venv', 'core', 'tests', 'venv', 'tests']


@pytest.mark.parametrize('damage', ['requirement', 'interpreter', 'stamp'])
def test_environment_is_made_again_when_it_no_longer_fits(environment, damage):
    environment.main([])
    if damage == 'requirement':
        (environment.ROOT / 'requirements.txt').write_text('jax>=0.11,<0.13  # newer')
    elif damage == 'interpreter':
        environment.VENV_PYTHON.unlink()
    else:
        environment.STAMP.write_text('{"core": "0')
    environment.main([])
    assert environment.calls == ['venv', 'core', 'venv', 'core']


@pytest.mark.parametrize('name', ['demo.sh', 'test.sh'])
def test_scripts_need_a_python_and_say_so(name, tmp_path):
    for tool in ('bash', 'dirname'):
        (tmp_path / tool).symlink_to(f'/usr/bin/{tool}')
    (tmp_path / 'scripts').mkdir()
    for script in (ROOT / 'scripts').glob('*.sh'):
        (tmp_path / 'scripts' / script.name).write_text(script.read_text())
    command = ['/usr/bin/bash', tmp_path / 'scripts' / name]
    result = subprocess.run(command, env={'PATH': str(tmp_path)}, cwd='/', capture_output=True, text=True)
    assert result.returncode == 1 and result.stdout == ''
    assert result.stderr.count('\n') == 1 and 'Python 3.11' in result.stderr
