"""Tokens on disk: ArrayRecord shards, written once, resumable, checked when they are opened.

A folder holds tokenizer.json (BPE only), manifest.json, and shards `train-00000.array_record`, `heldout-00000.array_record`, ...
A record is one document's tokens, little-endian; a shard's last record is the lengths of its documents. Shards are written in
rounds: a round reads documents until either side has `shard_tokens`, writes the shards of both and then the manifest, each under a
temporary name first. So what the manifest names is whole, and a preparation that is run again goes on after the last round.
"""

import concurrent.futures
import hashlib
import itertools
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter

from nested_jax.data import corpora, tokenizers
from nested_jax.data.documents import TokenDocuments

MANIFEST = 'manifest.json'
_FORMAT = 1
_SIDES = {False: 'train', True: 'heldout'}
_BPE_SAMPLE = 100_000_000  # bytes of training text a BPE is trained on
_ENCODED_AT_ONCE = 256  # documents


class _Encoded(NamedTuple):
    document: corpora.Document
    held_out: bool
    tokens: np.ndarray


class ShardedDocuments(TokenDocuments):
    """Documents of tokens in ArrayRecord shards.

    Args:
        folder: that holds the shards.
        shards: the manifest's entries of one side.
        dtype: of the tokens.
        verify: compare every shard's sha256 with the manifest's first.

    Raises:
        ValueError: naming the shard that is missing or damaged.
    """

    def __init__(self, folder: pathlib.Path, shards: list[dict[str, Any]], dtype: np.dtype, *, verify: bool = True):
        paths = [folder / shard['file'] for shard in shards]
        for path, shard in zip(paths, shards, strict=True):
            if not path.is_file() or path.stat().st_size != shard['bytes']:
                size = path.stat().st_size if path.is_file() else 'no'
                raise ValueError(f'{path}: damaged shard: {size} bytes where its manifest has {shard["bytes"]}')
        if verify:
            with concurrent.futures.ThreadPoolExecutor() as pool:
                list(pool.map(_verify, paths, [shard['sha256'] for shard in shards]))
        self._dtype = dtype.newbyteorder('<')
        self._source = ArrayRecordDataSource([str(path) for path in paths])
        # Each shard has one record more than documents, its lengths, which comes last.
        counts = np.array([shard['documents'] for shard in shards], np.int64)
        self._first = np.cumsum(counts) - counts
        last = np.cumsum(counts + 1) - 1
        self.lengths = np.concatenate([np.frombuffer(self._source[int(i)], '<i8') for i in last])
        self.digest = hashlib.sha256(''.join(shard['sha256'] for shard in shards).encode()).hexdigest()

    def read(self, index: int, start: int, stop: int) -> np.ndarray:
        """See `TokenDocuments.read`."""
        shard = int(np.searchsorted(self._first, index, 'right')) - 1
        return np.frombuffer(self._source[int(index) + shard], self._dtype)[start:stop]


def _verify(path: pathlib.Path, expected: str) -> None:
    if (found := _file_digest(path)) != expected:
        raise ValueError(f'{path}: damaged shard: sha256 {found} where its manifest has {expected}')


def _file_digest(path: pathlib.Path) -> str:
    with path.open('rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


def read_manifest(folder: str | os.PathLike) -> dict[str, Any]:
    """The manifest of a prepared folder.

    Raises:
        ValueError: if there is none, or the preparation is not finished.
    """
    path = pathlib.Path(folder).expanduser() / MANIFEST
    if not path.is_file():
        raise ValueError(f'{folder}: no {MANIFEST}; prepare a data set with: python -m nested_jax.data.prepare')
    manifest = _load_manifest(path)
    if not manifest['complete']:
        raise ValueError(f'{folder}: preparation is not finished; run the same command again')
    return manifest


def _load_manifest(path: pathlib.Path) -> dict[str, Any]:
    try:
        manifest = json.loads(path.read_text())
        version = manifest['format']
    except (ValueError, KeyError, TypeError):
        raise ValueError(f'{path}: damaged manifest') from None
    if version != _FORMAT:
        raise ValueError(f'{path}: format {version}; allowed: {_FORMAT}')
    return manifest


def prepare_shards(
    source: str,
    folder: str | os.PathLike,
    *,
    tokenizer: str = 'bytes',
    shard_tokens: int = 2**26,
    max_documents: int | None = None,
    data_dir: str | None = None,
    field: str = 'text',
    report: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Write a source as shards of tokens, or go on where an earlier call was interrupted.

    Args:
        source: see `corpora.labelled_documents`.
        folder: to write to.
        tokenizer: see `tokenizers.load_tokenizer`; a BPE is trained on the first 100 MB of training text.
        shard_tokens: tokens after which a shard ends, with the document that reaches them.
        max_documents: stop after so many.
        data_dir: see `corpora.load_corpus`.
        field: see `corpora.load_corpus`.
        report: called with a line for each shard.

    Returns:
        The manifest.

    Raises:
        ValueError: if the folder holds another preparation, or the source no text to train on or to hold out.
    """
    if shard_tokens < 1 or (max_documents is not None and max_documents < 1):
        raise ValueError(f'shard_tokens={shard_tokens}, max_documents={max_documents}; allowed: at least 1')
    folder = pathlib.Path(folder).expanduser()
    settings = dict(source=source, tokenizer=tokenizer, shard_tokens=shard_tokens, max_documents=max_documents, field=field)
    manifest = _start_or_resume(folder, settings)
    if manifest['complete']:
        return manifest
    open_source = lambda skip=0: corpora.labelled_documents(source, data_dir=data_dir, field=field, skip=skip)
    coder = _tokenizer_of(folder, manifest, tokenizer, open_source)
    documents = itertools.islice(open_source(manifest['documents_read']), _left(max_documents, manifest))
    for documents_of_round in _rounds(_encode(documents, coder), shard_tokens):
        for shard in _write_round(folder, manifest, documents_of_round, coder.dtype):
            report(f'{shard["file"]}: {shard["documents"]} documents, {shard["tokens"]} tokens')
    if empty := [side for side, shards in manifest['shards'].items() if not shards]:
        raise ValueError(f'source={source!r}: no {" and no ".join(empty)} documents in {manifest["documents_read"]}: too small a corpus')
    manifest['complete'] = True
    _write_json(folder / MANIFEST, manifest)
    return manifest


def load_prepared_tokenizer(folder: str | os.PathLike, manifest: dict[str, Any]) -> tokenizers.Tokenizer:
    """The tokenizer a folder was prepared with.

    Raises:
        ValueError: if it is missing or another.
    """
    path = pathlib.Path(folder).expanduser() / 'tokenizer.json'
    tokenizer = tokenizers.load_tokenizer('bytes' if manifest['tokenizer_digest'] == 'bytes' else path)
    if tokenizer.digest != manifest['tokenizer_digest']:
        raise ValueError(f'{path}: not the tokenizer the shards were made with (digest {tokenizer.digest})')
    return tokenizer


def _start_or_resume(folder: pathlib.Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The manifest of an unfinished or finished preparation with the same settings, or a new one."""
    path = folder / MANIFEST
    if path.is_file():
        manifest = _load_manifest(path)
        for name, value in settings.items():
            if (stored := manifest['settings'][name]) != value:
                raise ValueError(f'{name}={value!r}: {folder} was prepared with {stored!r}; choose another folder')
        return manifest
    if folder.is_dir() and any(file.suffix == '.array_record' for file in folder.iterdir()):
        raise ValueError(f'{folder}: holds shards without a {MANIFEST}; choose another folder')
    shards = {side: [] for side in _SIDES.values()}
    return dict(format=_FORMAT, complete=False, settings=settings, tokenizer_digest=None, corpus_digest='', documents_read=0, shards=shards)


def _tokenizer_of(folder: pathlib.Path, manifest: dict[str, Any], name: str, open_source: Callable[[], Iterator]) -> tokenizers.Tokenizer:
    """Load the tokenizer, or train and store it the first time."""
    if manifest['tokenizer_digest'] is not None:
        return load_prepared_tokenizer(folder, manifest)
    tokenizer = tokenizers.load_tokenizer(name, _sample(open_source()) if name.startswith('bpe:') else ())
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(tokenizer, tokenizers.BPETokenizer):
        tokenizer.save(folder / 'tokenizer.json')
    manifest['tokenizer_digest'] = tokenizer.digest
    _write_json(folder / MANIFEST, manifest)
    return tokenizer


def _sample(stream: Iterable[tuple[corpora.Document, bool]]) -> Iterator[bytes]:
    read = 0
    for document, held_out in stream:
        if not held_out:
            yield document.text
            read += len(document.text)
        if read >= _BPE_SAMPLE:
            return


def _left(max_documents: int | None, manifest: dict[str, Any]) -> int | None:
    return None if max_documents is None else max(max_documents - manifest['documents_read'], 0)


def _encode(stream: Iterator[tuple[corpora.Document, bool]], tokenizer: tokenizers.Tokenizer) -> Iterator[_Encoded]:
    """Tokenize a stream of documents, some at a time so that BPE runs in parallel."""
    while group := list(itertools.islice(stream, _ENCODED_AT_ONCE)):
        encoded = tokenizer.encode_documents([document.text for document, _ in group])
        yield from (_Encoded(*labelled, tokens) for labelled, tokens in zip(group, encoded, strict=True))


def _rounds(documents: Iterable[_Encoded], shard_tokens: int) -> Iterator[list[_Encoded]]:
    """Cut a stream of documents where either side has reached `shard_tokens`."""
    current, tokens = [], {False: 0, True: 0}
    for item in documents:
        current.append(item)
        tokens[item.held_out] += len(item.tokens)
        if tokens[item.held_out] >= shard_tokens:
            yield current
            current, tokens = [], {False: 0, True: 0}
    if current:
        yield current


def _write_round(folder: pathlib.Path, manifest: dict[str, Any], documents: list[_Encoded], dtype: np.dtype) -> list[dict[str, Any]]:
    """Write one round's shards, then the manifest that names them."""
    written = []
    for held_out, side in _SIDES.items():
        tokens = [item.tokens for item in documents if item.held_out == held_out and len(item.tokens)]
        if tokens:
            path = folder / f'{side}-{len(manifest["shards"][side]):05d}.array_record'
            written.append(_write_shard(path, tokens, dtype))
            manifest['shards'][side].append(written[-1])
    for item in documents:
        manifest['corpus_digest'] = corpora.extend_digest(manifest['corpus_digest'], item.document, item.held_out)
    manifest['documents_read'] += len(documents)
    _write_json(folder / MANIFEST, manifest)
    return written


def _write_shard(path: pathlib.Path, documents: list[np.ndarray], dtype: np.dtype) -> dict[str, Any]:
    """Write a shard and return its entry in the manifest."""
    temporary = path.with_suffix('.tmp')
    writer = ArrayRecordWriter(str(temporary), 'group_size:1')
    for tokens in documents:
        writer.write(tokens.astype(dtype.newbyteorder('<')).tobytes())
    lengths = np.array([len(tokens) for tokens in documents], '<i8')
    writer.write(lengths.tobytes())
    writer.close()
    os.replace(temporary, path)
    size, digest = path.stat().st_size, _file_digest(path)
    return dict(file=path.name, documents=len(documents), tokens=int(lengths.sum()), bytes=size, sha256=digest)


def _write_json(path: pathlib.Path, content: dict[str, Any]) -> None:
    temporary = path.with_suffix('.tmp')
    temporary.write_text(json.dumps(content, indent=1))
    os.replace(temporary, path)
