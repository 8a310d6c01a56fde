"""Text to train on: named documents, split into training and held-out text by a rule that depends on the names alone.

The default corpus needs no network: the sources of the running Python's standard library and its language reference (the pydoc
topics). It differs between Python versions, so every corpus has a digest, and results compare only where digests agree.
"""

import dataclasses
import glob
import hashlib
import importlib
import itertools
import json
import os
import pathlib
import re
import sysconfig
from collections.abc import Iterable, Iterator
from typing import NamedTuple

EMBEDDED = 'embedded'
SOURCES = "'embedded', a folder, file or glob of text or JSONL, 'tfds:<name>', or a folder written by nested_jax.data.prepare"
# Tests hold generated tables and foreign encodings, ensurepip bundles wheels, pydoc_data is read as topics instead of code.
_NOT_TEXT = frozenset({'test', 'tests', 'idle_test', 'ensurepip', 'pydoc_data', 'site-packages', 'dist-packages', '__pycache__'})
_TEXT_SUFFIXES = frozenset(
    '.txt .md .rst .tex .html .css .js .ts .jsonl .ndjson .py .pyi .c .h .cc .cpp .hpp .java .go .rs .jl .sh .toml .yaml .yml'.split()
)
_LINE_SUFFIXES = frozenset({'.jsonl', '.ndjson'})
_HELD_OUT_SHARE = 20  # one document, or one byte, in this many


class Document(NamedTuple):
    """A text with a name that is stable between machines."""

    name: str
    text: bytes


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Documents in memory."""

    name: str
    train: tuple[Document, ...]
    heldout: tuple[Document, ...]
    digest: str  # over the names, the texts, their order and the split

    def train_bytes(self) -> bytes:
        """The training documents, one after the other."""
        return b''.join(document.text for document in self.train)

    def heldout_bytes(self) -> bytes:
        """The held-out documents, one after the other."""
        return b''.join(document.text for document in self.heldout)


def is_held_out(name: str) -> bool:
    """Whether the document of this name is kept for evaluation: sha256(name) % 20 == 0."""
    return int(hashlib.sha256(name.encode(errors='surrogateescape')).hexdigest(), 16) % _HELD_OUT_SHARE == 0


def extend_digest(digest: str, document: Document, held_out: bool) -> str:
    """Digest of a sequence of documents with one more at its end, so that it can be stored half-way; starts from ''."""
    parts = (digest.encode(), b'held out' if held_out else b'train', document.name.encode(errors='surrogateescape'), document.text)
    return hashlib.sha256(b''.join(hashlib.sha256(part).digest() for part in parts)).hexdigest()


def load_corpus(source: str | os.PathLike = EMBEDDED, *, data_dir: str | os.PathLike | None = None, field: str = 'text') -> Corpus:
    """Read a whole corpus into memory.

    Args:
        source: 'embedded', a folder, file or glob of text or JSONL, or 'tfds:<name>'.
        data_dir: tensorflow-datasets only: the folder that holds the prepared data set.
        field: of a JSONL line or a data set's record: the one that holds the text.

    Raises:
        ValueError: for a source that does not exist or holds no text.
    """
    source = str(source)
    if source.startswith('hf:'):
        raise ValueError(
            f'source={source!r}: Hugging Face datasets are read once, by: python -m nested_jax.data.prepare --source {source} --out FOLDER'
        )
    digest, parts = '', {False: [], True: []}
    for document, held_out in labelled_documents(source, data_dir=data_dir, field=field):
        digest = extend_digest(digest, document, held_out)
        parts[held_out].append(document)
    for held_out, documents in parts.items():
        if not any(document.text for document in documents):
            raise ValueError(f'source={source!r}: no {"held-out" if held_out else "training"} text: too small a corpus')
    return Corpus(source, tuple(parts[False]), tuple(parts[True]), digest)


def labelled_documents(
    source: str, *, data_dir: str | os.PathLike | None = None, field: str = 'text', skip: int = 0
) -> Iterator[tuple[Document, bool]]:
    """Stream (document, held out) in a stable order.

    A document is held out where `is_held_out` says so. Where a folder has too few documents for that, the last twentieth of each
    is held out instead, as a document of its own.

    Args:
        source: as in `load_corpus`, or 'hf:<name>' or 'hf:<name>/<configuration>' after the owner, as 'hf:owner/name/configuration'.
        data_dir: see `load_corpus`.
        field: see `load_corpus`.
        skip: leave out this many at the start.

    Raises:
        ValueError: see `load_corpus`.
    """
    if source == EMBEDDED:
        stream = _by_name(embedded_documents())
    elif source.startswith('tfds:'):
        stream = _by_name(tfds_documents(source.removeprefix('tfds:'), data_dir, field=field))
    elif source.startswith('hf:'):
        return _by_name(hugging_face_documents(source.removeprefix('hf:'), field=field, skip=skip))
    else:
        files = find_text_files(source)
        few = _too_few_for_names(itertools.chain.from_iterable(_names(*file) for file in files))
        documents = itertools.chain.from_iterable(_read_text_file(*file, field) for file in files)
        stream = _by_tail(documents) if few else _by_name(documents)
    return itertools.islice(stream, skip, None)


def _by_name(documents: Iterable[Document]) -> Iterator[tuple[Document, bool]]:
    return ((document, is_held_out(document.name)) for document in documents)


def _by_tail(documents: Iterable[Document]) -> Iterator[tuple[Document, bool]]:
    """Hold out the last twentieth of each document, from the start of a line where there is one."""
    for name, text in documents:
        at = len(text) - len(text) // _HELD_OUT_SHARE
        cut = text.rfind(b'\n', 0, at) + 1 or at
        yield Document(name, text[:cut]), False
        yield Document(f'{name}#tail', text[cut:]), True


def _too_few_for_names(names: Iterable[str]) -> bool:
    """Whether the rule on names would leave a side with next to nothing: under 20 documents, or none of either kind."""
    total = held_out = 0
    for name in names:
        total, held_out = total + 1, held_out + is_held_out(name)
    return total < _HELD_OUT_SHARE or held_out in (0, total)


def embedded_documents() -> Iterator[Document]:
    """The standard library's sources without its tests, folder by folder, then the pydoc topics.

    Raises:
        ValueError: if this Python carries no sources.
    """
    root = pathlib.Path(sysconfig.get_paths()['stdlib'])
    names = list(_walk(root, frozenset({'.py'}), _NOT_TEXT))
    if not names:
        raise ValueError(f'source={EMBEDDED!r}: this Python has no sources under {root}; give a folder of text instead')
    for name in names:
        yield Document(name, (root / name).read_bytes())
    topics = importlib.import_module('pydoc_data.topics').topics
    for topic in sorted(topics):
        yield Document(f'pydoc_data/topics/{topic}', topics[topic].encode())


def _walk(root: pathlib.Path, suffixes: frozenset[str], excluded: frozenset[str] = frozenset()) -> Iterator[str]:
    """Relative names of the files below `root` that are not hidden, a folder's own files before its folders, each sorted."""
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in excluded and not name.startswith('.'))
        for file in sorted(files):
            if not file.startswith('.') and pathlib.PurePath(file).suffix.lower() in suffixes:
                yield (pathlib.Path(folder) / file).relative_to(root).as_posix()


def find_text_files(source: str | os.PathLike) -> list[tuple[str, pathlib.Path]]:
    """List (name, path) of the text files of a folder, a glob, or of one file, in a stable order.

    A folder is searched with everything below it for common suffixes of text and code; a glob or a file is taken as it is.

    Raises:
        ValueError: if nothing is there.
    """
    path = pathlib.Path(source).expanduser()
    if path.is_dir():
        found = [(name, path / name) for name in _walk(path, _TEXT_SUFFIXES)]
        if not found:
            raise ValueError(f'source={str(source)!r}: no text in this folder; it is searched for *{", *".join(sorted(_TEXT_SUFFIXES))}')
        return found
    if path.is_file():
        return [(path.name, path)]
    if not glob.has_magic(str(source)):
        raise ValueError(f'source={str(source)!r}: no such file or folder; allowed: {SOURCES}')
    paths = [pathlib.Path(name) for name in sorted(glob.glob(str(path), recursive=True)) if os.path.isfile(name)]
    if not paths:
        raise ValueError(f'source={str(source)!r}: no file matches')
    root = os.path.commonpath([file.parent for file in paths])
    return [(file.relative_to(root).as_posix(), file) for file in paths]


def _names(name: str, path: pathlib.Path) -> Iterator[str]:
    """Names of a file's documents: one, or one a line of JSONL."""
    if path.suffix.lower() not in _LINE_SUFFIXES:
        yield name
        return
    with path.open('rb') as file:
        yield from (f'{name}#{number}' for number, line in enumerate(file, 1) if line.strip())


def _read_text_file(name: str, path: pathlib.Path, field: str) -> Iterator[Document]:
    if path.suffix.lower() not in _LINE_SUFFIXES:
        yield Document(name, path.read_bytes())
        return
    with path.open('rb') as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield Document(f'{name}#{number}', _field_of_line(line, field, f'{path}, line {number}'))


def _field_of_line(line: bytes, field: str, where: str) -> bytes:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f'{where}: not JSON: {error}') from None
    if not isinstance(record, dict):
        raise ValueError(f'{where}: expected an object with the field {field!r}, got {type(record).__name__}')
    return _field_of_record(record, field, where)


def _field_of_record(record: dict, field: str, where: str) -> bytes:
    text = record.get(field)
    if not isinstance(text, str | bytes):
        raise ValueError(f'{where}: field={field!r} holds no text; fields: {", ".join(map(str, record))}')
    return text if isinstance(text, bytes) else text.encode(errors='surrogatepass')


def tfds_documents(name: str, data_dir: str | os.PathLike | None, *, field: str = 'text', split: str = 'train') -> Iterator[Document]:
    """Documents of a tensorflow-datasets data set that lies prepared in `data_dir`, read without TensorFlow and never downloaded.

    Args:
        name: 'name', 'name/configuration', 'name:version' or 'name/configuration:version'; the newest version by default.
        data_dir: folder that holds `name/version`.
        field: that holds the text.
        split: of the data set.

    Raises:
        ValueError: if it is not there, or not in the array_record format. Its parquet format loses rows silently.
    """
    folder = tfds_folder(name, data_dir)
    info = json.loads((folder / 'dataset_info.json').read_text())
    if split not in (splits := [entry['name'] for entry in info['splits']]):
        raise ValueError(f'tfds:{name}: no split {split!r}; allowed: {", ".join(splits)}')
    records = _import('tensorflow_datasets', 'tensorflow-datasets').builder_from_directory(folder).as_data_source(split)
    for index in range(len(records)):
        yield Document(f'{split}/{index}', _field_of_record(records[index], field, f'tfds:{name}, record {index}'))


def tfds_folder(name: str, data_dir: str | os.PathLike | None) -> pathlib.Path:
    """The prepared folder of a data set, newest version first.

    Args:
        name: see `tfds_documents`.
        data_dir: folder that holds `name/version`.

    Raises:
        ValueError: see `tfds_documents`.
    """
    if data_dir is None:
        raise ValueError(f'tfds:{name}: data_dir=None; allowed: the folder that holds the prepared data set')
    base, _, version = name.partition(':')
    root = pathlib.Path(data_dir).expanduser() / base
    versions = [path.parent for path in root.glob(f'{version or "*.*.*"}/dataset_info.json')]
    if not versions:
        command = f'tfds build {name} --file_format=array_record --data_dir={data_dir}'
        raise ValueError(f'tfds:{name}: no prepared data set in {root}; prepare it once, where TensorFlow is installed: {command}')
    folder = max(versions, key=lambda folder: [int(number) for number in re.findall(r'\d+', folder.name)])
    file_format = json.loads((folder / 'dataset_info.json').read_text()).get('fileFormat', 'tfrecord')
    if file_format != 'array_record':
        why = 'its parquet files lose rows silently' if file_format == 'parquet' else 'others need TensorFlow'
        raise ValueError(f"tfds:{name}: file_format={file_format!r} in {folder}; allowed: 'array_record' ({why})")
    return folder


def hugging_face_documents(name: str, *, field: str = 'text', split: str = 'train', skip: int = 0) -> Iterator[Document]:
    """Stream the documents of a Hugging Face data set, without storing it. Needs the package `datasets` and a network.

    Args:
        name: 'owner/name' or 'owner/name/configuration'.
        field: that holds the text.
        split: of the data set.
        skip: leave out this many at the start.

    Raises:
        ValueError: if the package is missing or a record has no such field.
    """
    parts = name.split('/')
    if len(parts) not in (2, 3) or not all(parts):
        raise ValueError(f'hf:{name}: allowed: hf:owner/name or hf:owner/name/configuration')
    configuration = parts[2] if len(parts) == 3 else None
    records = _import('datasets', 'datasets').load_dataset('/'.join(parts[:2]), configuration, split=split, streaming=True).skip(skip)
    for index, record in enumerate(records, skip):
        yield Document(f'{split}/{index}', _field_of_record(record, field, f'hf:{name}, record {index}'))


def _import(module: str, package: str):
    """Import an optional package, with a way out in the error."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ValueError(f'{package} cannot be imported ({error}); install it with: pip install {package}') from None
