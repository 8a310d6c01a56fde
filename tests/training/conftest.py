"""What tests of runs share."""

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from nested_jax.data import open_dataset


@pytest.fixture(scope='module')
def compilations_on_disk(tmp_path_factory):
    """Runs of one shape compile once between them: compiling is most of what tests of runs do."""
    settings = dict(
        jax_compilation_cache_dir=str(tmp_path_factory.mktemp('compilations')),
        jax_persistent_cache_min_compile_time_secs=0,
        jax_persistent_cache_min_entry_size_bytes=-1,
    )
    before = {name: getattr(jax.config, name) for name in settings}
    for values in (settings, before):
        for name, value in values.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        if values is settings:
            yield


@pytest.fixture(scope='module')
def texts_of(tmp_path_factory):
    """Makes forty short texts of a word, some of which fall to the held-out side."""

    def make(word):
        folder = tmp_path_factory.mktemp('texts')
        for number in range(40):
            (folder / f'{number}.txt').write_text(f'{word} {number} ' * 12)
        return open_dataset(folder)

    return make


@pytest.fixture(scope='module')
def data(texts_of):
    return texts_of('document')


@pytest.fixture
def libtpu(monkeypatch, tmp_path):
    """A package of this name, which nothing imports."""
    (tmp_path / 'libtpu').mkdir()
    (tmp_path / 'libtpu' / '__init__.py').touch()
    monkeypatch.syspath_prepend(tmp_path)
