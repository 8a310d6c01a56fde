"""Corpora: what is read, in which order, what is held out, and what each wrong source is told."""

import hashlib
import json
import sys
import types

import pytest

from nested_jax.data import corpora


@pytest.fixture(scope='module')
def embedded():
    return corpora.load_corpus()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / 'sub').mkdir()
    (tmp_path / '.hidden').mkdir()
    for i in range(30):
        (tmp_path / f'{i:02d}.txt').write_text(f'file {i}\n' * (i + 1))
    (tmp_path / 'sub' / 'notes.md').write_bytes(b'\xff not UTF-8')
    (tmp_path / 'picture.png').write_bytes(b'\x89PNG')
    (tmp_path / '.hidden' / 'secret.txt').write_text('no')
    return tmp_path


def write_lines(path, records):
    path.write_text(''.join(json.dumps(record) + '\n' for record in records))
    return path


# ---- the embedded corpus


def test_embedded_corpus_is_the_same_twice(embedded):
    again = corpora.load_corpus('embedded')
    assert again.digest == embedded.digest
    assert again == embedded


def test_embedded_corpus_leaves_out_tests_and_reads_topics(embedded):
    names = [document.name for document in embedded.train + embedded.heldout]
    assert len(set(names)) == len(names)
    excluded = {'test', 'tests', 'idle_test', 'ensurepip', 'site-packages'}
    assert not [name for name in names if excluded & set(name.split('/')[:-1])]
    assert not [name for name in names if name.startswith('pydoc_data') and not name.startswith('pydoc_data/topics/')]
    assert {'json/decoder.py', 'os.py', 'pydoc_data/topics/while'} <= set(names)
    assert 5e6 < len(embedded.train_bytes()) < 3e7


def test_held_out_documents_are_those_of_the_rule(embedded):
    rule = lambda name: int(hashlib.sha256(name.encode()).hexdigest(), 16) % 20 == 0
    assert all(rule(document.name) for document in embedded.heldout)
    assert not any(rule(document.name) for document in embedded.train)
    assert 0.02 < len(embedded.heldout_bytes()) / len(embedded.train_bytes()) < 0.2


@pytest.mark.skipif(sys.version_info[:3] != (3, 11, 7), reason='figures of spec/environment.md hold for CPython 3.11.7')
def test_embedded_sources_are_those_the_figures_were_measured_on(embedded):
    files = [document for document in corpora.embedded_documents() if not document.name.startswith('pydoc_data/')]
    assert len(files) == 729
    assert hashlib.sha256(b''.join(document.text for document in files)).hexdigest().startswith('8dcb2e89542daf15')
    topics = len(embedded.train) + len(embedded.heldout) - len(files)
    assert topics == 79


def test_python_without_sources_is_told_so(monkeypatch, tmp_path):
    monkeypatch.setattr('sysconfig.get_paths', lambda: {'stdlib': str(tmp_path)})
    with pytest.raises(ValueError, match='no sources under'):
        corpora.load_corpus()


# ---- digests


def test_digest_tells_names_texts_order_and_split_apart():
    one, two = corpora.Document('a', b'bc'), corpora.Document('ab', b'c')

    def digest(*labelled):
        value = ''
        for document, held_out in labelled:
            value = corpora.extend_digest(value, document, held_out)
        return value

    variants = [
        digest((one, False)),
        digest((two, False)),
        digest((one, True)),
        digest((one, False), (two, False)),
        digest((two, False), (one, False)),
    ]
    assert len(set(variants)) == len(variants)


# ---- folders, globs, files


def test_folder_is_read_in_order_with_bytes_as_they_are(folder):
    files = corpora.find_text_files(folder)
    assert [name for name, _ in files] == [f'{i:02d}.txt' for i in range(30)] + ['sub/notes.md']
    corpus = corpora.load_corpus(folder)
    assert b'\xff not UTF-8' in corpus.train_bytes() + corpus.heldout_bytes()
    assert all(corpora.is_held_out(document.name) for document in corpus.heldout)


def test_glob_and_file(folder):
    assert [name for name, _ in corpora.find_text_files(folder / '0*.txt')] == [f'{i:02d}.txt' for i in range(10)]
    assert [name for name, _ in corpora.find_text_files(folder / '**' / '*.md')] == ['notes.md']
    assert [name for name, _ in corpora.find_text_files(folder / 'picture.png')] == ['picture.png']


def test_few_documents_hold_out_their_ends_at_a_line(tmp_path):
    text = b''.join(b'line %d\n' % i for i in range(1000))
    (tmp_path / 'book.txt').write_bytes(text)
    corpus = corpora.load_corpus(tmp_path / 'book.txt')
    assert corpus.train_bytes() + corpus.heldout_bytes() == text
    assert corpus.train_bytes().endswith(b'\n')
    assert len(text) / 20 <= len(corpus.heldout_bytes()) < len(text) / 20 + 10
    assert [document.name for document in corpus.heldout] == ['book.txt#tail']


def test_json_lines(tmp_path):
    write_lines(tmp_path / 'data.jsonl', [{'text': f'document {i} é'} for i in range(200)])
    corpus = corpora.load_corpus(tmp_path)
    assert len(corpus.train) + len(corpus.heldout) == 200
    assert corpus.train[0] == ('data.jsonl#1', 'document 0 é'.encode())
    assert 2 <= len(corpus.heldout) <= 20


def test_skipping_is_dropping_the_first(folder):
    whole = list(corpora.labelled_documents(str(folder)))
    assert list(corpora.labelled_documents(str(folder), skip=7)) == whole[7:]


@pytest.mark.parametrize(
    ('lines', 'message'),
    [
        ('{"text": "a"}\n{"body": "b"}\n', "line 2: field='text' holds no text; fields: body"),
        ('{"text": "a"}\nnot json\n', 'line 2: not JSON'),
        ('[1, 2]\n', "line 1: expected an object with the field 'text', got list"),
        ('{"text": 3}\n', "line 1: field='text' holds no text"),
    ],
)
def test_bad_lines_are_named(tmp_path, lines, message):
    (tmp_path / 'data.jsonl').write_text(lines)
    with pytest.raises(ValueError, match=message):
        corpora.load_corpus(tmp_path / 'data.jsonl')


def test_sources_that_are_not_there(tmp_path):
    with pytest.raises(ValueError, match="'embeded': no such file or folder; allowed: 'embedded', a folder"):
        corpora.load_corpus('embeded')
    with pytest.raises(ValueError, match='no text in this folder'):
        corpora.load_corpus(tmp_path)
    with pytest.raises(ValueError, match='no file matches'):
        corpora.load_corpus(tmp_path / '*.txt')
    (tmp_path / 'empty.txt').touch()
    with pytest.raises(ValueError, match='no training text'):
        corpora.load_corpus(tmp_path)
    (tmp_path / 'empty.txt').write_text('short')
    with pytest.raises(ValueError, match='no held-out text'):
        corpora.load_corpus(tmp_path)


# ---- tensorflow-datasets


@pytest.fixture
def build():
    """Write a data set without TensorFlow, as its users do."""
    tfds = pytest.importorskip('tensorflow_datasets')

    class Toy(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version('1.0.0')

        def _info(self):
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({'text': tfds.features.Text()}))

        def _split_generators(self, dl_manager):
            return {'train': ((i, {'text': f'record {i} é'}) for i in range(60))}

        def _generate_examples(self):
            raise NotImplementedError

    def write(data_dir, file_format):
        Toy(data_dir=data_dir, file_format=file_format).download_and_prepare()

    return write


def test_prepared_data_set_is_read_whole_without_tensorflow(build, tmp_path):
    build(tmp_path, 'array_record')
    corpus = corpora.load_corpus('tfds:toy', data_dir=tmp_path)
    texts = [document.text.decode() for document in corpus.train + corpus.heldout]
    assert sorted(texts) == sorted(f'record {i} é' for i in range(60))
    assert 'tensorflow' not in sys.modules
    assert corpora.load_corpus('tfds:toy:1.0.0', data_dir=tmp_path).digest == corpus.digest
    with pytest.raises(ValueError, match="field='body' holds no text; fields: text"):
        corpora.load_corpus('tfds:toy', data_dir=tmp_path, field='body')


def test_data_sets_are_never_downloaded(tmp_path):
    with pytest.raises(ValueError, match='no prepared data set in'):
        corpora.load_corpus('tfds:mnist', data_dir=tmp_path)
    with pytest.raises(ValueError, match='data_dir=None'):
        corpora.load_corpus('tfds:mnist')
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(('file_format', 'why'), [('parquet', 'lose rows silently'), ('tfrecord', 'need TensorFlow')])
def test_other_formats_are_refused(tmp_path, file_format, why):
    version = tmp_path / 'toy' / '1.0.0'
    version.mkdir(parents=True)
    (version / 'dataset_info.json').write_text(json.dumps({'fileFormat': file_format, 'splits': [{'name': 'train'}]}))
    with pytest.raises(ValueError, match=f"file_format='{file_format}' .*{why}"):
        corpora.load_corpus('tfds:toy', data_dir=tmp_path)


def test_newest_version_is_taken(tmp_path):
    for version, split in (('1.9.0', 'old'), ('1.10.0', 'new')):
        (tmp_path / 'toy' / version).mkdir(parents=True)
        info = {'fileFormat': 'array_record', 'splits': [{'name': split}]}
        (tmp_path / 'toy' / version / 'dataset_info.json').write_text(json.dumps(info))
    with pytest.raises(ValueError, match="no split 'train'; allowed: new"):
        corpora.load_corpus('tfds:toy', data_dir=tmp_path)


# ---- Hugging Face


class Stream:
    """What `datasets.load_dataset(..., streaming=True)` gives."""

    def __init__(self, records):
        self.records = records

    def __iter__(self):
        return iter(self.records)

    def skip(self, count):
        return Stream(self.records[count:])


def test_hugging_face_data_set_is_streamed(monkeypatch):
    calls = []

    def load_dataset(name, configuration, *, split, streaming):
        calls.append((name, configuration, split, streaming))
        return Stream([{'text': f'page {i}'} for i in range(100)])

    monkeypatch.setitem(sys.modules, 'datasets', types.SimpleNamespace(load_dataset=load_dataset))
    whole = list(corpora.labelled_documents('hf:owner/web/sample'))
    assert calls == [('owner/web', 'sample', 'train', True)]
    assert [document.text for document, _ in whole] == [b'page %d' % i for i in range(100)]
    assert [held_out for _, held_out in whole] == [corpora.is_held_out(f'train/{i}') for i in range(100)]
    assert list(corpora.labelled_documents('hf:owner/web/sample', skip=40)) == whole[40:]


def test_hugging_face_errors(monkeypatch):
    monkeypatch.setitem(sys.modules, 'datasets', None)
    with pytest.raises(ValueError, match='pip install datasets'):
        list(corpora.labelled_documents('hf:owner/web'))
    with pytest.raises(ValueError, match='allowed: hf:owner/name'):
        list(corpora.labelled_documents('hf:web'))
    with pytest.raises(ValueError, match='python -m nested_jax.data.prepare --source hf:owner/web'):
        corpora.load_corpus('hf:owner/web')
