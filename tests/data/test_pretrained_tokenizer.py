"""Tokenizers of pre-trained models: normal form, special tokens, what stands in front, and what ends a text."""

import json
import unicodedata

import pytest

from nested_jax.data.pretrained_tokenizer import load_pretrained_tokenizer
from nested_jax.data.tokenizers import BPETokenizer, train_bpe

TRAINING = [b'the quick brown fox and the lazy dog, and the other quick dogs\n' * 3, 'déjà vu, déjà lu\n'.encode() * 3]
SPLIT = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
DECOMPOSED = unicodedata.normalize('NFD', 'déjà vu')


def added(i: int, content: str, special: bool) -> dict:
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False)
    return dict(id=i, content=content, special=special, **flags)


def make(folder, *, first: str | None = None, **changes):
    """A folder whose tokenizer.json has the parts of Qwen's, or with `first` those of Llama 3's."""
    train_bpe(TRAINING, 290).save(folder / 'tokenizer.json')
    parts = json.loads((folder / 'tokenizer.json').read_text())
    parts['added_tokens'] += [added(290, '<|im_end|>', True), added(291, '<tool_call>', False)]
    level = dict(type='ByteLevel', add_prefix_space=False, trim_offsets=True, use_regex=False)
    split = dict(type='Split', pattern=dict(Regex=SPLIT), behavior='Isolated', invert=False)
    parts['pre_tokenizer'] = dict(type='Sequence', pretokenizers=[split, level])
    if first is None:
        parts['normalizer'] = dict(type='NFC')
    else:
        parts['added_tokens'].append(added(292, first, True))
        text = [dict(SpecialToken=dict(id=first, type_id=0)), dict(Sequence=dict(id='A', type_id=0))]
        special = {first: dict(id=first, ids=[292], tokens=[first])}
        parts['post_processor'] = dict(type='TemplateProcessing', single=text, pair=text, special_tokens=special)
    (folder / 'tokenizer.json').write_text(json.dumps(parts | changes))
    return folder


def test_text_comes_back_in_its_normal_form(tmp_path):
    coder = load_pretrained_tokenizer(make(tmp_path))
    for text in ('the quick fox', 'naïve — 数学 🙂\n\t 12345', 'a<|im_end|>b<tool_call>c', '<|endoftext|>'):
        assert coder.decode(coder.encode(text)).decode() == text
    assert coder.encode(DECOMPOSED).tolist() == coder.encode('déjà vu').tolist()
    assert coder.decode(coder.encode(DECOMPOSED)).decode() == 'déjà vu' != DECOMPOSED
    assert coder.decode(coder.encode(b'\xff half')) == b'\xff half'


def test_special_tokens_count_in_prompts_only(tmp_path):
    coder = load_pretrained_tokenizer(make(tmp_path))
    prompt = coder.encode_prompt('the dog<|im_end|>')
    assert prompt[-1] == 290 and prompt[:-1].tolist() == coder.encode('the dog').tolist()
    assert 290 not in coder.encode('the dog<|im_end|>') and coder.decode(prompt) == b'the dog'
    assert coder.encode_prompt('<tool_call>').tolist() == [291]
    assert coder.byte_lengths[290] == 0 and coder.byte_lengths[291] == len('<tool_call>')


def test_what_llama_has_in_front(tmp_path):
    coder = load_pretrained_tokenizer(make(tmp_path, first='<|begin_of_text|>'))
    assert coder.encode_prompt('the dog').tolist() == [292, *coder.encode('the dog').tolist()]
    assert coder.decode(coder.encode(DECOMPOSED)).decode() == DECOMPOSED  # no normal form
    assert coder.vocab_size == 293


def test_ends(tmp_path):
    coder = load_pretrained_tokenizer(make(tmp_path))
    assert coder.stop == () and coder.end == coder.encode_prompt('<|endoftext|>')[0]
    (tmp_path / 'config.json').write_text('{"eos_token_id": 5}')
    assert load_pretrained_tokenizer(tmp_path).stop == (5,)
    (tmp_path / 'generation_config.json').write_text('{"eos_token_id": [7, 5]}')
    assert load_pretrained_tokenizer(tmp_path).stop == (7, 5)
    named = json.loads((tmp_path / 'tokenizer.json').read_text().replace('<|endoftext|>', '<|end_of_text|>'))
    (tmp_path / 'tokenizer.json').write_text(json.dumps(named))
    again = load_pretrained_tokenizer(tmp_path)
    assert again.end == coder.end and again.encode_documents([b'fox'])[0][-1] == coder.end


def test_bad_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match='tokenizer.json is not there, allowed is the folder of a pre-trained model'):
        load_pretrained_tokenizer(tmp_path)
    make(tmp_path, normalizer=dict(type='Lowercase'))
    with pytest.raises(ValueError, match='only byte-level BPE with no normalizer or NFC'):
        load_pretrained_tokenizer(tmp_path)
    make(tmp_path)
    with pytest.raises(ValueError, match='with no normalizer and without'):
        BPETokenizer((tmp_path / 'tokenizer.json').read_text())
    (tmp_path / 'config.json').write_text('{')
    with pytest.raises(ValueError, match=str(tmp_path)):
        load_pretrained_tokenizer(tmp_path)
