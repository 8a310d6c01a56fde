"""Tokenizers give every text back, and know how many bytes each token stands for."""

import json

import numpy as np
import pytest

from nested_jax.data import tokenizers

TEXTS = [
    b'',
    b'plain words, and words',
    'naïve café — 数学 🙂\n\ttabs  '.encode(),
    bytes(range(256)),
    b'\xff\xfe half \xe2\x82',
    b'a<|endoftext|>b\0',
]
TRAINING = [b'the quick brown fox and the lazy dog, and the other quick dogs\n' * 3, 'déjà vu, déjà lu\n'.encode() * 3]


@pytest.fixture(scope='module')
def bpe():
    return tokenizers.train_bpe(TRAINING, 290)


@pytest.mark.parametrize('text', TEXTS)
def test_bytes_round_trip(text):
    coder = tokenizers.ByteTokenizer()
    tokens = coder.encode(text)
    assert tokens.tolist() == list(text)
    assert tokens.dtype == coder.dtype == np.uint8
    assert coder.decode(tokens) == text
    assert (coder.vocab_size, coder.end) == (256, None)


@pytest.mark.parametrize('text', TEXTS)
def test_bpe_round_trip(bpe, text):
    tokens = bpe.encode(text)
    assert bpe.decode(tokens) == text
    assert bpe.end not in tokens
    assert bpe.byte_lengths[tokens].sum() == len(text)
    assert tokens.dtype == bpe.dtype == np.uint16


def test_bpe_shortens_what_it_was_trained_on(bpe):
    assert len(bpe.encode(TRAINING[0])) < len(TRAINING[0]) / 2


def test_documents_end_with_the_end_token_and_encode_alike_in_a_batch(bpe):
    for texts in (TEXTS, TEXTS[:3]):  # with and without bytes that are no UTF-8
        for text, tokens in zip(texts, bpe.encode_documents(texts), strict=True):
            assert tokens[-1] == bpe.end
            np.testing.assert_array_equal(tokens[:-1], bpe.encode(text))
    assert bpe.decode([bpe.end]) == b''


def test_strings_are_encoded_as_utf8(bpe):
    for coder in (bpe, tokenizers.ByteTokenizer()):
        np.testing.assert_array_equal(coder.encode('café'), coder.encode('café'.encode()))


def test_bytes_are_counted_where_weights_are(bpe):
    tokens = bpe.encode_documents([b'the quick fox'])[0]
    assert bpe.count_bytes(tokens, np.ones(len(tokens))) == 13
    assert bpe.count_bytes(tokens, np.arange(len(tokens)) == 0) == bpe.byte_lengths[tokens[0]]
    assert bpe.count_bytes(np.stack([tokens, tokens]), np.ones((2, len(tokens)))) == 26


def test_saving_and_loading_keeps_everything(bpe, tmp_path):
    bpe.save(tmp_path / 'tokenizer.json')
    again = tokenizers.load_tokenizer(tmp_path / 'tokenizer.json')
    assert (again.digest, again.end, again.vocab_size) == (bpe.digest, bpe.end, 290)
    assert again.encode(TEXTS[2]).tolist() == bpe.encode(TEXTS[2]).tolist()


def test_training_is_deterministic(bpe):
    assert tokenizers.load_tokenizer('bpe:290', TRAINING).digest == bpe.digest
    assert tokenizers.load_tokenizer('bpe:291', TRAINING).digest != bpe.digest


def change(content, **parts):
    return json.dumps(json.loads(content) | parts)


def test_tokenizers_that_change_the_text_are_refused(bpe, tmp_path):
    bpe.save(tmp_path / 'tokenizer.json')
    content = (tmp_path / 'tokenizer.json').read_text()
    spaced = {'type': 'ByteLevel', 'add_prefix_space': True, 'trim_offsets': True, 'use_regex': True}
    for parts in ({'normalizer': {'type': 'NFC'}}, {'pre_tokenizer': None}, {'pre_tokenizer': spaced}, {'model': {'type': 'WordPiece'}}):
        with pytest.raises(ValueError, match='only byte-level BPE'):
            tokenizers.BPETokenizer(change(content, **parts))
    (tmp_path / 'tokenizer.json').write_text('{}')
    with pytest.raises(ValueError, match='tokenizer.json.*not a tokenizer.json'):
        tokenizers.load_tokenizer(tmp_path / 'tokenizer.json')


def test_names_and_sizes_that_are_not_allowed():
    with pytest.raises(ValueError, match="tokenizer='byte': no such file; allowed: 'bytes'"):
        tokenizers.load_tokenizer('byte')
    with pytest.raises(ValueError, match="tokenizer='bpe:4k'; allowed: bpe:<vocab_size>"):
        tokenizers.load_tokenizer('bpe:4k')
    with pytest.raises(ValueError, match='vocab_size=256; allowed: at least 257'):
        tokenizers.train_bpe(TRAINING, 256)
    with pytest.raises(ValueError, match='vocab_size=5000: the text supports only'):
        tokenizers.train_bpe(TRAINING, 5000)
    with pytest.raises(ValueError, match='tokens hold 5 to 256; allowed: 0 to 255'):
        tokenizers.ByteTokenizer().decode([5, 256])
