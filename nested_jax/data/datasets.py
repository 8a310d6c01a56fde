"""Open a source of text, whatever its kind, as tokens to train and to evaluate on."""

import dataclasses
import os
import pathlib
from typing import Any

from nested_jax.data import corpora, shards, tokenizers
from nested_jax.data.documents import TokenDocuments, tokenize

# Of an identity, what another text, another order of it or more of it a step changes.
_MAY_CHANGE = ('batch_size', 'corpus', 'seed', 'tokens')


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Tokenized text, split into training and held-out documents."""

    name: str
    digest: str  # of the corpus, whatever the tokenizer
    tokenizer: tokenizers.Tokenizer
    train: TokenDocuments
    heldout: TokenDocuments
    corpus: corpora.Corpus | None  # the text; None where only tokens are at hand


def open_dataset(
    source: str | os.PathLike = corpora.EMBEDDED,
    tokenizer: str | os.PathLike | None = None,
    *,
    data_dir: str | os.PathLike | None = None,
    field: str = 'text',
    verify: bool = True,
) -> Dataset:
    """Open text in memory, or shards written by `nested_jax.data.prepare`.

    Args:
        source: 'embedded', a folder, file or glob of text or JSONL, 'tfds:<name>', or a prepared folder.
        tokenizer: 'bytes', 'bpe:<vocab_size>', or the path of a tokenizer.json; None: a prepared folder's own, and bytes otherwise.
        data_dir: see `corpora.load_corpus`.
        field: see `corpora.load_corpus`.
        verify: read prepared shards through once and compare their digests.

    Raises:
        ValueError: for a source or tokenizer that is missing, damaged or empty, or a tokenizer a prepared folder was not made with.
    """
    if (pathlib.Path(source).expanduser() / shards.MANIFEST).is_file():
        return _open_prepared(pathlib.Path(source).expanduser(), tokenizer, verify)
    corpus = corpora.load_corpus(source, data_dir=data_dir, field=field)
    coder = tokenizers.load_tokenizer(tokenizer or 'bytes', (document.text for document in corpus.train))
    return Dataset(corpus.name, corpus.digest, coder, tokenize(corpus.train, coder), tokenize(corpus.heldout, coder), corpus)


def _open_prepared(folder: pathlib.Path, tokenizer: str | os.PathLike | None, verify: bool) -> Dataset:
    manifest = shards.read_manifest(folder)
    coder = shards.load_prepared_tokenizer(folder, manifest)
    asked = manifest['settings']['tokenizer']
    if tokenizer is not None and str(tokenizer) != asked:
        if str(tokenizer).startswith('bpe:') or tokenizers.load_tokenizer(tokenizer).digest != coder.digest:
            raise ValueError(f'tokenizer={str(tokenizer)!r}: {folder} was prepared with {asked!r}')
    parts = {side: shards.ShardedDocuments(folder, entries, coder.dtype, verify=verify) for side, entries in manifest['shards'].items()}
    return Dataset(manifest['settings']['source'], manifest['corpus_digest'], coder, parts['train'], parts['heldout'], None)


def data_identity(dataset: Dataset, *, length: int, batch_size: int, grid: int = 1, seed: int = 0) -> dict[str, Any]:
    """What the order and content of training batches depend on, to be stored with a checkpoint (JSON)."""
    tokens, text = dataset.train.digest, dataset.digest
    return dict(corpus=text, tokenizer=dataset.tokenizer.digest, tokens=tokens, length=length, batch_size=batch_size, grid=grid, seed=seed)


def check_same_data(saved: dict[str, Any], current: dict[str, Any], *, allow_change: bool = False) -> tuple[str, ...]:
    """Refuse to go on with other data than a checkpoint was made with.

    Args:
        saved: `data_identity` of the checkpoint.
        current: of this run.
        allow_change: whether text, batch size and seed may differ. Tokens mean the same and rows have the same form in any case.

    Returns:
        What differs, each with both values.

    Raises:
        ValueError: naming the field that differs.
    """
    changes = []
    for name in sorted(saved.keys() | current.keys()):
        if saved.get(name) != current.get(name):
            change = f'data.{name}={current.get(name)!r}; the checkpoint was made with {saved.get(name)!r}'
            if not (allow_change and name in _MAY_CHANGE):
                raise ValueError(change + ('; allowed with --allow-data-change' if name in _MAY_CHANGE else ''))
            changes.append(change)
    return tuple(changes)
