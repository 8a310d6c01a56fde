"""Reading the stored reference samples."""

import json
import lzma
import pathlib

import pytest


@pytest.fixture
def read_samples(shared_data):
    """Function from a pattern below the shared data to (file name, samples) of every file it matches; fails where there is none."""

    def read(pattern: str) -> list[tuple[str, list[dict]]]:
        paths = sorted(shared_data.glob(pattern))
        assert paths, pattern
        return [(path.name, [json.loads(line) for line in _open(path)]) for path in paths]

    return read


def _open(path: pathlib.Path) -> list[str]:
    text = lzma.decompress(path.read_bytes()).decode() if path.suffix == '.xz' else path.read_text()
    return text.splitlines()
