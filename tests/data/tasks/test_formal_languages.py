"""Formal languages: membership, answers, lengths, splits, and the stored samples of the reference."""

import collections
import itertools

import numpy as np
import pytest

from nested_jax.data.tasks.formal_languages import _GENERATORS, BINS, LANGUAGES, FormalLanguage, _num_strings

MEMBERS = {
    'parity': lambda string: string.count('1') % 2 == 0,
    'aa-star': lambda string: string == 'aa' * (len(string) // 2),
    'abab-star': lambda string: string == 'abab' * (len(string) // 4),
    'counter-2': lambda string: string == ''.join(letter * (len(string) // 2) for letter in 'ab'),
    'counter-3': lambda string: string == ''.join(letter * (len(string) // 3) for letter in 'abc'),
    'shuffle-2': lambda string: all(balanced(''.join(letter for letter in string if letter in pair)) for pair in ('()', '[]')),
}


def balanced(string: str) -> bool:
    depths = np.cumsum([1 if letter in '([' else -1 for letter in string] or [0])
    return depths.min() >= 0 and depths[-1] == 0


def strings(task: FormalLanguage, split: str, count: int, seed: int = 0) -> list[str]:
    letters = LANGUAGES[task.language].letters
    tokens = task.batch(0, count, split=split, seed=seed)['tokens']
    return [''.join(letters[token] for token in row if token != task.padding) for row in tokens]


@pytest.mark.parametrize('language', LANGUAGES)
@pytest.mark.parametrize('split', BINS)
def test_strings_belong_and_the_solver_agrees(language, split):
    task = FormalLanguage(language)
    batch = task.batch(0, 60, split=split)
    assert batch['tokens'].shape == (60, BINS[split][1])
    assert {name: array.dtype.name for name, array in batch.items()} == dict(tokens='int32', targets='int32', weights='float32')
    assert batch['tokens'].max() == task.padding == task.vocab_size - 1
    assert all(MEMBERS[language](string) for string in strings(task, split, 60))
    for row in range(60):
        targets, weights = task.solve(batch['tokens'][row])
        np.testing.assert_array_equal(targets, batch['targets'][row])
        np.testing.assert_array_equal(weights, batch['weights'][row])
    lengths = batch['weights'].sum(1)
    np.testing.assert_array_equal(lengths, [len(string) for string in strings(task, split, 60)])
    assert set(lengths) <= set(task.lengths(split))


@pytest.mark.parametrize('language', LANGUAGES)
def test_every_length_comes_about_as_often(language):
    task = FormalLanguage(language)
    counts = collections.Counter(len(string) for string in strings(task, 'bin1', 1000))
    assert counts.keys() == set(task.lengths('bin1'))
    expected = 1000 / len(task.lengths('bin1'))
    assert all(abs(counts[length] - expected) < 6 * expected**0.5 for length in counts)


def test_lengths_of_the_splits():
    assert [len(FormalLanguage('aa-star').lengths(split)) for split in BINS] == [25, 25, 25, 25]
    assert [len(FormalLanguage('abab-star').lengths(split)) for split in BINS] == [12, 12, 13, 12]
    assert [len(FormalLanguage('counter-3').lengths(split)) for split in BINS] == [16, 16, 17, 17]
    assert [(lengths[0], lengths[-1]) for split in BINS for lengths in [FormalLanguage('parity').lengths(split)]] == list(BINS.values())


def test_shuffles_are_drawn_uniformly_and_may_cross():
    words = [''.join(word) for word in itertools.product('()[]', repeat=4) if MEMBERS['shuffle-2'](''.join(word))]
    rng, counts = np.random.default_rng(0), collections.Counter()
    for _ in range(2000):
        counts[''.join('()[]'[token] for token in _GENERATORS['shuffle-2'](rng, 4)[0])] += 1
    assert sorted(counts) == sorted(words)
    assert len(words) == 10 and '([)]' in words  # Catalan numbers 2 and 5
    assert all(abs(count - 200) < 6 * 200**0.5 for count in counts.values())
    assert [_num_strings('shuffle-2', length) for length in (2, 4, 6, 12)] == [shuffle_words(pairs) for pairs in (1, 2, 3, 6)]


def shuffle_words(pairs: int) -> int:
    """By counting paths: ways to end at (0, 0) after 2 n steps in the quarter plane."""
    ways = collections.Counter({(0, 0): 1})
    for _ in range(2 * pairs):
        further = collections.Counter()
        for (x, y), count in ways.items():
            for place in ((x + 1, y), (x - 1, y), (x, y + 1), (x, y - 1)):
                if min(place) >= 0:
                    further[place] += count
        ways = further
    return ways[0, 0]


@pytest.mark.parametrize('language', ['parity', 'shuffle-2'])
def test_training_and_bin0_share_no_string(language):
    task = FormalLanguage(language)
    train, bin0 = set(strings(task, 'train', 1500)), set(strings(task, 'bin0', 1500, seed=1))
    assert len(train) > 1000 and len(bin0) > 1000
    assert not train & bin0


def test_bin0_of_a_language_with_one_string_a_length_is_in_the_training_set():
    task = FormalLanguage('aa-star')
    assert set(strings(task, 'bin0', 300)) == set(strings(task, 'train', 300))
    assert task.num_strings('bin0') == 25


def test_baselines():
    parity = FormalLanguage().baselines(split='bin1')
    assert abs(parity['majority'].positions - 0.5) < 0.03 and abs(parity['token'].positions - 0.5) < 0.03
    assert FormalLanguage('aa-star').baselines(split='bin2')['alternate'].sequences == 1
    abab = FormalLanguage('abab-star').baselines(split='bin1')
    assert abab['majority'].positions == 0.75 and abab['majority'].sequences == 0
    # After each letter its own most frequent answer: all right but the last of the b's, one in 2 n.
    counter = FormalLanguage('counter-2').baselines(split='bin1', count=500)['token']
    assert abs(counter.positions - (1 - 1 / 76)) < 1e-3 and counter.sequences == 0


def test_wrong_arguments():
    with pytest.raises(ValueError, match="language='dyck'; allowed: parity"):
        FormalLanguage('dyck')
    with pytest.raises(ValueError, match="split='test'; allowed: one of"):
        FormalLanguage().example(0, split='test')


def test_stored_samples(read_samples):
    recomputed = 0
    for language, (letters, answers, _) in LANGUAGES.items():
        task = FormalLanguage(language)
        extra = {'a|b': {'counter-2': 'c', 'counter-3': 'd'}.get(language)}  # the reference's letter for it
        width = len(answers[0]) if language == 'shuffle-2' else 1
        files = read_samples(f'formal_languages/{language}_*')
        assert len(files) == 3
        for _, samples in files:
            for src, tgt in {(sample['src'], sample['tgt']) for sample in samples}:
                targets, weights = task.solve(np.array([letters.index(letter) for letter in src]))
                assert ''.join(extra.get(answers[target], answers[target]) for target in targets) == tgt
                assert weights.all() and len(tgt) == width * len(src)
            recomputed += len(samples)
    assert recomputed == 60_000 + 2 * 2000 + 50 + 25 + 50 + 32
