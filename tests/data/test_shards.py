"""Preparation: shards that come out identical whatever interrupts it, hold the corpus exactly, and are checked when opened."""

import json
import pathlib
import shutil
import subprocess
import sys
import types

import numpy as np
import pytest

from nested_jax.data import corpora, datasets, pipelines, shards


@pytest.fixture(scope='module')
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp('text')
    random = np.random.default_rng(0)
    words = [bytes(random.integers(97, 123, 5, np.uint8)) + b' ' for _ in range(200)]
    for i in range(90):
        (folder / f'{i:03d}.txt').write_bytes(b''.join(words[j] for j in random.integers(0, 200, random.integers(0, 60))))
    return str(folder)


@pytest.fixture(scope='module', params=['bytes', 'bpe:400'])
def prepared(request, source, tmp_path_factory):
    folder = tmp_path_factory.mktemp('prepared')
    shards.prepare_shards(source, folder, tokenizer=request.param, shard_tokens=1500)
    return folder


def contents(folder):
    return {path.name: path.read_bytes() for path in pathlib.Path(folder).iterdir()}


@pytest.fixture
def copy(prepared, tmp_path):
    return pathlib.Path(shutil.copytree(prepared, tmp_path / 'copy'))


def test_shards_hold_the_corpus(source, prepared):
    manifest = shards.read_manifest(prepared)
    assert len(manifest['shards']['train']) > 3
    opened = datasets.open_dataset(prepared, manifest['settings']['tokenizer'])
    memory = datasets.open_dataset(source, manifest['settings']['tokenizer'])
    assert opened.digest == memory.digest
    assert opened.tokenizer.digest == memory.tokenizer.digest
    for one, two in ((opened.train, memory.train), (opened.heldout, memory.heldout)):
        kept = np.flatnonzero(two.lengths)  # an empty file has no tokens to write
        np.testing.assert_array_equal(one.lengths, two.lengths[kept])
        for i, j in enumerate(kept):
            np.testing.assert_array_equal(one.read(i, 0, 10**6), two.read(j, 0, 10**6))
            np.testing.assert_array_equal(one.read(i, 3, 9), two.read(j, 3, 9))
    assert opened.train.num_tokens == sum(shard['tokens'] for shard in manifest['shards']['train'])


def test_batches_from_shards_are_those_from_memory(source, prepared):
    manifest = shards.read_manifest(prepared)
    opened = datasets.open_dataset(prepared, manifest['settings']['tokenizer'])
    memory = datasets.open_dataset(source, manifest['settings']['tokenizer'])
    batches = [list(pipelines.evaluation_batches(data.heldout, length=32, batch_size=2, grid=8)) for data in (opened, memory)]
    for one, two in zip(*batches, strict=True):
        for name in one:
            np.testing.assert_array_equal(one[name], two[name])
    iterator = pipelines.batch_iterator(pipelines.training_batches(opened.train, length=32, batch_size=4), threads=4)
    assert sum(int(next(iterator)['weights'].sum()) for _ in range(30)) > 3000


class Stop(Exception):
    """In place of a kill."""


@pytest.mark.parametrize('writes', [1, 30, 55, 85])
@pytest.mark.parametrize('tokenizer', ['bytes', 'bpe:400'])
def test_an_interrupted_preparation_goes_on_to_identical_shards(source, tmp_path, monkeypatch, writes, tokenizer):
    arguments = dict(tokenizer=tokenizer, shard_tokens=1500)
    shards.prepare_shards(source, tmp_path / 'whole', **arguments)

    class Dying(shards.ArrayRecordWriter):
        left = writes

        def write(self, record):
            Dying.left -= 1
            if Dying.left < 0:
                self.close()
                raise Stop
            return super().write(record)

    with monkeypatch.context() as patch:
        patch.setattr(shards, 'ArrayRecordWriter', Dying)
        with pytest.raises(Stop):
            shards.prepare_shards(source, tmp_path / 'cut', **arguments)
    with pytest.raises(ValueError, match='preparation is not finished; run the same command again'):
        datasets.open_dataset(tmp_path / 'cut', tokenizer)
    written = []
    shards.prepare_shards(source, tmp_path / 'cut', **arguments, report=written.append)
    assert contents(tmp_path / 'cut') == contents(tmp_path / 'whole')
    if writes > 30:
        assert len(written) < len(list((tmp_path / 'whole').glob('*.array_record')))  # what was whole is not written again


def test_interruption_before_the_manifest_names_a_shard(source, tmp_path, monkeypatch):
    shards.prepare_shards(source, tmp_path / 'whole', shard_tokens=1500)
    write, calls = shards._write_json, []

    def dying(path, content):
        calls.append(path)
        if len(calls) == 3:
            raise Stop
        write(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(shards, '_write_json', dying)
        with pytest.raises(Stop):
            shards.prepare_shards(source, tmp_path / 'cut', shard_tokens=1500)
    shards.prepare_shards(source, tmp_path / 'cut', shard_tokens=1500)
    assert contents(tmp_path / 'cut') == contents(tmp_path / 'whole')


def test_a_finished_preparation_is_left_alone(source, copy):
    before = contents(copy)
    settings = shards.read_manifest(copy)['settings']
    shards.prepare_shards(source, copy, tokenizer=settings['tokenizer'], shard_tokens=1500)
    assert contents(copy) == before
    with pytest.raises(ValueError, match='shard_tokens=1600: .* was prepared with 1500; choose another folder'):
        shards.prepare_shards(source, copy, tokenizer=settings['tokenizer'], shard_tokens=1600)


@pytest.mark.parametrize('shard', ['train-00001.array_record', 'heldout-00000.array_record'])
@pytest.mark.parametrize('damage', ['flip', 'truncate', 'empty', 'delete'])
def test_damaged_shards_are_named(copy, shard, damage):
    path = copy / shard
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    if damage == 'delete':
        path.unlink()
    else:
        path.write_bytes({'flip': bytes(content), 'truncate': bytes(content[:-100]), 'empty': b''}[damage])
    with pytest.raises(ValueError, match=f'{shard}: damaged shard'):
        datasets.open_dataset(copy, shards.read_manifest(copy)['settings']['tokenizer'])


def test_damaged_manifests_are_named(copy):
    manifest = copy / 'manifest.json'
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(content | {'format': 9}))
    with pytest.raises(ValueError, match='manifest.json: format 9; allowed: 1'):
        datasets.open_dataset(copy)
    manifest.write_text('{')
    with pytest.raises(ValueError, match='manifest.json: damaged manifest'):
        datasets.open_dataset(copy)
    manifest.unlink()
    with pytest.raises(ValueError, match='no manifest.json; prepare a data set with'):
        shards.read_manifest(copy)
    with pytest.raises(ValueError, match='holds shards without a manifest.json'):
        shards.prepare_shards('embedded', copy)


def test_another_tokenizer_is_refused(copy):
    settings = shards.read_manifest(copy)['settings']
    if settings['tokenizer'] == 'bytes':
        with pytest.raises(ValueError, match="was prepared with 'bytes'"):
            datasets.open_dataset(copy, 'bpe:400')
    else:
        with pytest.raises(ValueError, match="tokenizer='bytes': .* was prepared with 'bpe:400'"):
            datasets.open_dataset(copy, 'bytes')
        assert datasets.open_dataset(copy, copy / 'tokenizer.json').digest
        path = copy / 'tokenizer.json'
        path.write_text(path.read_text() + '\n')
        with pytest.raises(ValueError, match='not the tokenizer the shards were made with'):
            datasets.open_dataset(copy, 'bpe:400')


def test_a_stream_is_prepared_and_resumed_without_reading_it_again(monkeypatch, tmp_path):
    served = []

    class Stream:
        def __init__(self, start=0):
            self.start = start

        def skip(self, count):
            return Stream(self.start + count)

        def __iter__(self):
            for i in range(self.start, 300):
                served.append(i)
                yield {'body': f'page {i} ' * (1 + i % 7)}

    load_dataset = lambda name, configuration, **_: Stream()
    monkeypatch.setitem(sys.modules, 'datasets', types.SimpleNamespace(load_dataset=load_dataset))
    arguments = dict(shard_tokens=2000, max_documents=250, field='body')
    whole = shards.prepare_shards('hf:owner/web', tmp_path / 'whole', **arguments)
    assert whole['documents_read'] == 250 and max(served) < 256

    def stop(line):
        if line.startswith('train-00001'):
            raise Stop

    with pytest.raises(Stop):
        shards.prepare_shards('hf:owner/web', tmp_path / 'cut', **arguments, report=stop)
    served.clear()
    shards.prepare_shards('hf:owner/web', tmp_path / 'cut', **arguments)
    assert min(served) > 50
    assert contents(tmp_path / 'cut') == contents(tmp_path / 'whole')
    opened = datasets.open_dataset(tmp_path / 'whole')
    assert opened.corpus is None and opened.digest == whole['corpus_digest']


def test_a_source_with_nothing_to_hold_out_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(corpora, 'is_held_out', lambda name: False)
    rows = types.SimpleNamespace(skip=lambda count: [{'text': 'page'}] * 5)
    monkeypatch.setitem(sys.modules, 'datasets', types.SimpleNamespace(load_dataset=lambda *_, **__: rows))
    with pytest.raises(ValueError, match="source='hf:owner/web': no heldout documents in 5: too small a corpus"):
        shards.prepare_shards('hf:owner/web', tmp_path)
    with pytest.raises(ValueError, match='max_documents=0'):
        shards.prepare_shards('hf:owner/web', tmp_path / 'other', max_documents=0)


def test_changed_data_is_named(source, prepared):
    data = datasets.open_dataset(prepared, shards.read_manifest(prepared)['settings']['tokenizer'])
    settings = dict(length=32, batch_size=4, grid=8, seed=1)
    saved = json.loads(json.dumps(datasets.data_identity(data, **settings)))
    datasets.check_same_data(saved, datasets.data_identity(data, **settings))
    for name, value in dict(length=16, batch_size=8, grid=4, seed=2).items():
        with pytest.raises(ValueError, match=f'data.{name}={value}; the checkpoint was made with {settings[name]}'):
            datasets.check_same_data(saved, datasets.data_identity(data, **(settings | {name: value})))
    other = datasets.open_dataset(source, 'bpe:401')
    with pytest.raises(ValueError, match='data.token'):
        datasets.check_same_data(saved, datasets.data_identity(other, **settings))
    changed = settings | dict(batch_size=8, seed=2)
    expected = 'data.batch_size=8; the checkpoint was made with 4', 'data.seed=2; the checkpoint was made with 1'
    assert datasets.check_same_data(saved, datasets.data_identity(data, **changed), allow_change=True) == expected
    for refused, name in ((datasets.data_identity(other, **settings), 'tokenizer'), (saved | dict(grid=4), 'grid')):
        with pytest.raises(ValueError, match=f'data.{name}='):
            datasets.check_same_data(saved, refused, allow_change=True)


def test_command_line(source, tmp_path):
    command = [sys.executable, '-m', 'nested_jax.data.prepare', '--out', str(tmp_path / 'out'), '--source']
    done = subprocess.run([*command, source, '--shard-tokens', '9000'], capture_output=True, text=True, check=True)
    assert 'train-00001.array_record:' in done.stdout
    assert f'corpus digest: {datasets.open_dataset(tmp_path / "out").digest}' in done.stdout
    failed = subprocess.run([*command, str(tmp_path / 'nowhere')], capture_output=True, text=True)
    assert failed.returncode == 1
    assert failed.stderr.startswith("error: source='") and failed.stderr.count('\n') == 1
