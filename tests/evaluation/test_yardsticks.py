"""The figures a model is held against, from their definitions."""

import collections
import json
import lzma
import math
import sys

import numpy as np
import pytest

from nested_jax.data import corpora
from nested_jax.evaluation import yardsticks


def witten_bell_reference(train, heldout, order):
    """The definition, byte by byte."""
    counts = collections.defaultdict(collections.Counter)
    for size in range(order + 1):
        for i in range(size, len(train)):
            counts[train[i - size : i]][train[i]] += 1

    def probability(context, byte):
        lower = probability(context[1:], byte) if context else 1 / 256
        seen = counts.get(context)
        return lower if seen is None else (seen[byte] + len(seen) * lower) / (sum(seen.values()) + len(seen))

    bits = [-math.log2(probability(heldout[max(0, i - order) : i], byte)) for i, byte in enumerate(heldout)]
    return sum(bits) / len(bits)


@pytest.mark.parametrize('order', [0, 1, 4, 6])
def test_witten_bell_is_its_definition(order):
    train = b'abracadabra, the cat sat on the mat; a bra, a cad' * 3 + b'\x00\xff'
    heldout = b'the cad sat on a zebra \xff\xff\x00'
    expected = witten_bell_reference(train, heldout, order)
    assert yardsticks.witten_bell_bits_per_byte(train, heldout, order) == pytest.approx(expected, rel=1e-12)


def test_random_bytes_take_eight_bits():
    random = np.random.default_rng(0).integers(0, 256, 20_000, np.uint8).tobytes()
    assert yardsticks.witten_bell_bits_per_byte(random[:10_000], random[10_000:], 0) == pytest.approx(8, abs=0.05)
    assert yardsticks.xz_bits_per_byte(random) == pytest.approx(8, abs=0.2)


def test_xz_after_the_training_text_only_pays_for_what_is_new():
    words = np.random.default_rng(1).integers(97, 123, 4000, np.uint8).tobytes()
    assert yardsticks.xz_bits_per_byte(words) > 4
    assert yardsticks.xz_bits_per_byte(words, b'x' * 100 + words) < 0.2
    assert yardsticks.xz_bits_per_byte(words) == len(lzma.compress(words, preset=9 | lzma.PRESET_EXTREME)) * 8 / 4000


def test_figures_are_kept_by_digest(tmp_path, monkeypatch):
    cache = tmp_path / 'new' / 'yardsticks.json'
    train, heldout = b'some words to count ' * 20, b'some other words '
    first = yardsticks.yardsticks(train, heldout, 'one', cache)
    assert set(first) == {'witten_bell', 'xz', 'xz_with_train'}
    assert yardsticks.yardsticks(train, train, 'two', cache) != first
    monkeypatch.setattr(yardsticks, 'xz_bits_per_byte', lambda *_: pytest.fail('computed again'))
    assert yardsticks.yardsticks(train, heldout, 'one', cache) == first
    assert set(json.loads(cache.read_text())) == {'one', 'two'}
    assert [path.name for path in cache.parent.iterdir()] == ['yardsticks.json']


def test_what_is_not_allowed():
    with pytest.raises(ValueError, match='order=7; allowed: 0 to 6'):
        yardsticks.witten_bell_bits_per_byte(b'train', b'held out', 7)
    with pytest.raises(ValueError, match='5 training and 0 held-out bytes'):
        yardsticks.witten_bell_bits_per_byte(b'train', b'', 4)
    with pytest.raises(ValueError, match='heldout holds no bytes'):
        yardsticks.xz_bits_per_byte(b'', b'train')


@pytest.mark.skipif(sys.version_info[:3] != (3, 11, 7), reason='figures of spec/environment.md hold for CPython 3.11.7')
def test_stored_figures_of_the_standard_library():
    corpus = corpora.load_corpus()
    train, heldout = corpus.train_bytes(), corpus.heldout_bytes()
    assert yardsticks.witten_bell_bits_per_byte(train[:2_000_000], heldout[:200_000]) == pytest.approx(2.37, abs=0.005)
    assert yardsticks.xz_bits_per_byte(heldout) == pytest.approx(1.59, abs=0.005)


@pytest.mark.slow
@pytest.mark.skipif(sys.version_info[:3] != (3, 11, 7), reason='figures of spec/environment.md hold for CPython 3.11.7')
def test_stored_figure_after_the_training_text():
    corpus = corpora.load_corpus()
    assert yardsticks.xz_bits_per_byte(corpus.heldout_bytes(), corpus.train_bytes()) == pytest.approx(1.23, abs=0.005)
