"""Write a source of text as shards of tokens: python -m nested_jax.data.prepare --source ... --out FOLDER.

Run the same command again after an interruption: it goes on after the last shard, and the shards come out identical.
"""

import dataclasses
import sys

import tyro

from nested_jax.data import shards


@dataclasses.dataclass(frozen=True)
class PrepareConfig:
    """Write a source of text as shards of tokens, or go on where an earlier run was interrupted."""

    source: str  # 'embedded', a folder, file or glob of text or JSONL, 'tfds:<name>', or 'hf:<owner>/<name>[/<configuration>]'
    out: str  # folder to write to
    tokenizer: str = 'bytes'  # 'bytes', 'bpe:<vocab_size>' (trained on the first 100 MB), or the path of a tokenizer.json
    shard_tokens: int = 2**26  # tokens after which a shard ends
    max_documents: int | None = None  # stop after so many
    data_dir: str | None = None  # tfds: the folder that holds the prepared data set
    field: str = 'text'  # of a JSONL line or a record: the one that holds the text


def main() -> None:
    """Read the command line, prepare, and say what was written."""
    config = tyro.cli(PrepareConfig, description=__doc__)
    options = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    source, out = options.pop('source'), options.pop('out')
    try:
        manifest = shards.prepare_shards(source, out, **options, report=print)
    except ValueError as error:
        sys.exit(f'error: {error}')
    for side, entries in manifest['shards'].items():
        print(f'{side}: {len(entries)} shards, {sum(entry["tokens"] for entry in entries)} tokens')
    print(f'corpus digest: {manifest["corpus_digest"]}')


if __name__ == '__main__':
    main()
