"""Rows of measured results."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

from nested_jax.evaluation import rows

ROW = dict(experiment='toy', model='hope-tiny', seed=1, config={'a': 1}, metrics={'bits_per_byte': 1.5}, hardware='1 x cpu', wall_s=2.34)


def test_row_has_the_fields_of_the_contract_and_survives_a_file(tmp_path):
    row = rows.make_row(**ROW)
    fields = 'experiment model seed config config_digest metrics hardware commit command wall_s date'
    assert set(row) == set(fields.split())
    path = tmp_path / 'new' / 'toy.jsonl'
    rows.append_row(path, row)
    rows.append_row(path, row | {'seed': 2})
    assert [found['seed'] for found in rows.read_rows(path)] == [1, 2]
    assert rows.read_rows(path)[0] == json.loads(json.dumps(row))
    assert rows.read_rows(tmp_path / 'absent.jsonl') == []


def test_config_digest_ignores_order_and_sees_values():
    assert rows.config_digest({'a': 1, 'b': {'c': 2, 'd': 3}}) == rows.config_digest({'b': {'d': 3, 'c': 2}, 'a': 1})
    assert rows.config_digest({'a': 1}) != rows.config_digest({'a': 2})
    assert re.fullmatch('[0-9a-f]{16}', rows.config_digest({}))


def test_commit_is_unknown_outside_a_repository(monkeypatch, tmp_path):
    monkeypatch.setenv('PATH', str(tmp_path))  # no git to be found
    assert rows.commit() == 'unknown'


def test_an_archive_knows_its_commit(tmp_path):
    """Also in a folder of another repository, as a home folder may be one: that one's commit is not the source's."""
    root, source = pathlib.Path(__file__).parents[2], tmp_path / 'source'
    for name in ('.gitattributes', 'nested_jax/config.py', 'nested_jax/evaluation/rows.py'):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root / name, source / name)

    def ask(folder):
        command = [sys.executable, '-c', 'from nested_jax.evaluation.rows import commit; print(commit())']
        return subprocess.run(command, cwd=folder, env=os.environ | {'PYTHONPATH': '.'}, capture_output=True, text=True).stdout.strip()

    def git(folder, *words):
        who = ['-c', 'user.name=a', '-c', 'user.email=a@b']
        return subprocess.run(['git', *who, *words], cwd=folder, check=True, capture_output=True, text=True).stdout.strip()

    assert ask(source) == 'unknown'
    for folder in (source, tmp_path):
        git(folder, 'init', '-q')
        git(folder, 'add', '--all') if folder == source else None
        git(folder, 'commit', '-q', '--allow-empty', '-m', folder.name)
    head = git(source, 'rev-parse', 'HEAD')
    assert ask(source) == head
    git(source, 'archive', '--format=zip', '--output=../archive.zip', 'HEAD')
    shutil.unpack_archive(tmp_path / 'archive.zip', tmp_path / 'unpacked')
    assert ask(tmp_path / 'unpacked') == head
    (source / 'nested_jax/config.py').write_text('redacted = dict')
    assert ask(source) == head + '+changes'
    git(source, 'checkout', 'nested_jax/config.py')
    (source / 'experiments/results').mkdir(parents=True)
    (source / 'experiments/results/rows.jsonl').touch()
    git(source, 'add', '--all')
    git(source, 'commit', '-q', '-m', 'a row')
    (source / 'experiments/results/rows.jsonl').write_text('{}')  # as the run before this one left it
    assert ask(source) == git(source, 'rev-parse', 'HEAD')


def test_rows_hold_no_secrets(monkeypatch):
    words = ['--api-key', 'x1', '--model', 'hf_' + 'x2' * 17, '--wandb.token=x3', '--smoke', 'a=b', '--', '--steps=3']
    monkeypatch.setattr('sys.argv', ['run.py', *words])
    row = rows.make_row(**ROW | dict(config={'a': 1, 'hf_token': 'x4'}))
    assert row['command'].endswith(' --api-key redacted --model redacted --wandb.token=redacted --smoke a=b -- --steps=3')
    assert row['config'] == {'a': 1, 'hf_token': 'redacted'} and not any(f'x{n}' in json.dumps(row) for n in (1, 2, 3, 4))
    assert row['config_digest'] == rows.config_digest(row['config']) == rows.config_digest({'a': 1, 'hf_token': 'another'})


def test_rows_are_added_in_one_write(tmp_path, monkeypatch):
    """Whatever their size: a process that is killed leaves all of them or none."""
    writes, write_all = [], open
    many = [{'text': 'x' * 10_000, 'seed': seed} for seed in range(5)]

    class Counted:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, text):
            writes.append(text)
            return self.file.write(text)

    monkeypatch.setattr('builtins.open', lambda *args, **options: Counted(write_all(*args, **options)))
    rows.append_rows(tmp_path / 'toy.jsonl', many)
    monkeypatch.undo()
    assert len(writes) == 1 and rows.read_rows(tmp_path / 'toy.jsonl') == many
