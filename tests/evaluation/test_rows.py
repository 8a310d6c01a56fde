"""Rows of measured results."""

import json
import re

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
