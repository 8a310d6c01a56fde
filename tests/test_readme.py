"""The README says what is true: its commands run, its flags exist, its links lead somewhere.

The language after the fence says how a block is checked: `bash` is run here with --smoke, `bash pod` is parsed and its settings
are checked against each other, `python` is run as it stands, and `sh` (installing) is only read for extras.
"""

import os
import pathlib
import re
import shlex
import subprocess
import sys
import tomllib

import pytest

from nested_jax.models.presets import preset_names

ROOT = pathlib.Path(__file__).resolve().parent.parent
TEXT = (ROOT / 'README.md').read_text()
MAIN_JOB = ['python', '-m', 'experiments.hope_pretrain']


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf'^```{language}\n(.*?)^```$', text, re.MULTILINE | re.DOTALL)


def commands(text: str, language: str) -> list[list[str]]:
    """Commands of the blocks, as words, with the main job in the place of the script that starts it."""
    lines = '\n'.join(blocks(text, language)).replace('\\\n', ' ').splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    return [MAIN_JOB + line[1:] if line[0] == 'scripts/demo.sh' else line for line in words if line]


def run(words: list[str], as_user: bool = True) -> subprocess.CompletedProcess:
    """Runs a command from the checkout on one device, optimised as a user would, or else compiled as fast as tests are."""
    unset = ('JAX_NUM_CPU_DEVICES', 'XLA_FLAGS') if as_user else ('JAX_NUM_CPU_DEVICES',)
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    return subprocess.run([sys.executable, *words[1:]], cwd=ROOT, env=environment, capture_output=True, text=True)


LOCAL = [words for words in commands(TEXT, 'bash') if words[0] != 'scripts/test.sh']
POD = commands(TEXT, 'bash pod')


def test_blocks_are_found():
    sample = '```bash\nscripts/demo.sh --a \\\n  "b c"  # why\n\npython -m x\n```\n```bash pod\npython -m y\n```\n'
    assert commands(sample, 'bash') == [[*MAIN_JOB, '--a', 'b c'], ['python', '-m', 'x']]
    assert commands(sample, 'bash pod') == [['python', '-m', 'y']]
    assert ['scripts/test.sh'] in commands(TEXT, 'bash') and MAIN_JOB in LOCAL and POD
    assert all(words[:2] == ['python', '-m'] for words in [*LOCAL, *POD])
    assert 'exec "$python" -m experiments.hope_pretrain "$@"' in (ROOT / 'scripts' / 'demo.sh').read_text()


def test_every_family_has_a_line_in_the_table_of_models_and_its_tests_exist():
    table = [line for line in TEXT.partition('\n## Models\n')[2].partition('\n## ')[0].splitlines() if line.startswith('| `')]
    named = set()
    for line in table:
        first, *others = re.findall(r'`([a-z0-9-]+)`', line.split('|')[1])
        named |= {first, *(first.split('-')[0] + other if other.startswith('-') else other for other in others)}
        assert all((ROOT / 'tests' / path).is_file() for path in re.findall(r'`(\w+/test_\w+\.py)`', line)), line
    assert named | {'transformer-conv'} == {name.rpartition('-')[0] for name in preset_names()}


@pytest.mark.slow
@pytest.mark.parametrize('words', LOCAL, ids=' '.join)
def test_local_commands_run(words, tmp_path):
    rows = {path: path.read_bytes() for path in (ROOT / 'experiments' / 'results').rglob('*.jsonl')}
    whole = [word for word in words if not word.startswith('runs/') and word != '--train.output']
    folder = '--train.output' if words[:3] == MAIN_JOB else '--runs'
    result = run([*whole, '--smoke', folder, str(tmp_path / 'run')], as_user=words == MAIN_JOB)
    assert result.returncode == 0, result.stdout + result.stderr
    assert any((tmp_path / 'run').iterdir())
    after = {path: path.read_bytes() for path in (ROOT / 'experiments' / 'results').rglob('*.jsonl')}
    assert after == rows, 'a smoke run leaves no result'


@pytest.mark.parametrize('words', [*LOCAL, *POD], ids=' '.join)
def test_flags_exist(words):
    result = run([*words[:3], '--help'])
    assert result.returncode == 0, result.stderr
    offered = set(re.findall(r'--[\w.-]+', result.stdout))
    flags = {word.split('=')[0].replace('_', '-') for word in words if word.startswith('--')}
    assert flags <= {flag.replace('_', '-') for flag in offered}


@pytest.mark.parametrize('words', [words for words in [*LOCAL, *POD] if words[:3] == MAIN_JOB], ids=' '.join)
def test_settings_fit(words):
    from experiments.hope_pretrain import parse
    from nested_jax.models.presets import preset
    from nested_jax.training.config import check_model

    args = parse(words[3:])
    check_model(args.train, preset(args.model.preset), vocab_size=256)


@pytest.mark.parametrize('code', blocks(TEXT, 'python'))
def test_python_runs(code):
    result = run(['python', '-W', 'error', '-c', code])
    assert result.returncode == 0, result.stderr


def test_links_and_extras_exist():
    for target in re.findall(r'\]\((?!https?://)([^)#]+)\)', re.sub('<!--.*?-->', '', TEXT, flags=re.DOTALL)):
        assert (ROOT / target).exists(), target
    offered = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']['optional-dependencies']
    assert set(re.findall(r"'\.\[(\w+)\]'", TEXT)) <= set(offered)
