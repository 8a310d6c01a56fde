"""Tokenizers: bytes, and byte-level BPE. Both are exact: decoding an encoded text gives it back, whatever its bytes.

Every token has a length in bytes, so a loss in nats a token becomes bits a byte without approximation.
"""

import hashlib
import json
import os
import pathlib
from collections.abc import Iterable, Sequence

import numpy as np

END_OF_DOCUMENT = '<|endoftext|>'


class Tokenizer:
    """What both tokenizers share.

    Attributes:
        vocab_size: number of tokens.
        end: id of the token that ends a document, or None where a document ends without one.
        digest: tells tokenizers apart.
        dtype: the narrowest unsigned dtype that holds every id.
    """

    end: int | None = None
    digest: str

    def __init__(self, spellings: Sequence[bytes]):
        self._spellings = list(spellings)
        self.vocab_size = len(self._spellings)
        self.byte_lengths = np.array([len(spelling) for spelling in self._spellings], np.int64)  # (V,)
        self.dtype = np.dtype(np.uint8 if self.vocab_size <= 2**8 else np.uint16 if self.vocab_size <= 2**16 else np.uint32)

    def encode(self, text: bytes | str) -> np.ndarray:
        """Tokens of a text, (N,), without an end-of-document token."""
        raise NotImplementedError

    def encode_documents(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        """Tokens of whole documents, each with the end-of-document token if there is one."""
        end = np.array([] if self.end is None else [self.end], self.dtype)
        return [np.concatenate([tokens, end]) for tokens in self._encode_batch(texts)]

    def _encode_batch(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def decode(self, tokens: Iterable[int]) -> bytes:
        """Text of tokens. An end-of-document token has none.

        Raises:
            ValueError: for an id outside the vocabulary.
        """
        ids = np.asarray(list(tokens), np.int64)
        if ids.size and (ids.min() < 0 or ids.max() >= self.vocab_size):
            raise ValueError(f'tokens hold {ids.min()} to {ids.max()}; allowed: 0 to {self.vocab_size - 1}')
        return b''.join(self._spellings[i] for i in ids)

    def count_bytes(self, targets: np.ndarray, weights: np.ndarray) -> int:
        """Bytes that the targets of weight above zero stand for: what a loss over them is divided by to get bits per byte."""
        return int(self.byte_lengths[np.asarray(targets)][np.asarray(weights) > 0].sum())


class ByteTokenizer(Tokenizer):
    """A token for each byte. Documents are told apart by their segments alone."""

    digest = 'bytes'

    def __init__(self):
        super().__init__([bytes([value]) for value in range(256)])

    def encode(self, text: bytes | str) -> np.ndarray:
        """See `Tokenizer.encode`."""
        return np.frombuffer(text.encode() if isinstance(text, str) else text, np.uint8)


class BPETokenizer(Tokenizer):
    """Byte-level BPE of the `tokenizers` package.

    Bytes that are no UTF-8 become the tokens of single bytes, so nothing is lost or replaced. A text that spells out a special
    token is encoded as ordinary text.

    Args:
        content: a tokenizer.json: a BPE model behind a ByteLevel pre-tokenizer, without a normalizer (it would change the text).

    Raises:
        ValueError: for any other tokenizer.
    """

    _normalizers: tuple[str | None, ...] = (None,)

    def __init__(self, content: str):
        import tokenizers  # not needed for bytes

        _check_byte_level(content, self._normalizers)
        self._content = content
        self._tokenizer = tokenizers.Tokenizer.from_str(content)
        self._tokenizer.encode_special_tokens = True
        spellings = [b''] * (max(self._tokenizer.get_vocab().values()) + 1)
        added = self._tokenizer.get_added_tokens_decoder()
        for token, i in self._tokenizer.get_vocab().items():
            if i in added:  # one that is not special is found in ordinary text, whatever the merges
                spellings[i] = b'' if added[i].special else token.encode()
            else:
                spellings[i] = bytes(_BYTE_OF_CHARACTER[character] for character in token)
        super().__init__(spellings)
        self._byte_ids = {spelling[0]: i for i, spelling in enumerate(spellings) if len(spelling) == 1 and i not in added}
        if len(self._byte_ids) < 256:
            raise ValueError(f'tokenizer has tokens for {len(self._byte_ids)} single bytes; all 256 are needed')
        self.end = self._tokenizer.token_to_id(END_OF_DOCUMENT)
        self.digest = hashlib.sha256(content.encode()).hexdigest()

    def encode(self, text: bytes | str) -> np.ndarray:
        """See `Tokenizer.encode`."""
        text = text.encode() if isinstance(text, str) else text
        ids = []
        while text:
            try:
                valid, bad, text = text.decode(), b'', b''
            except UnicodeDecodeError as error:
                valid, bad, text = text[: error.start].decode(), text[error.start : error.end], text[error.end :]
            ids += self._tokenizer.encode(valid, add_special_tokens=False).ids
            ids += [self._byte_ids[value] for value in bad]
        return np.array(ids, self.dtype)

    def _encode_batch(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        """All texts at once, in parallel, unless one is not UTF-8."""
        try:
            decoded = [text.decode() for text in texts]
        except UnicodeDecodeError:
            return [self.encode(text) for text in texts]
        return [np.array(item.ids, self.dtype) for item in self._tokenizer.encode_batch_fast(decoded, add_special_tokens=False)]

    def save(self, path: str | os.PathLike) -> None:
        """Write the tokenizer.json it was made from."""
        pathlib.Path(path).write_text(self._content, encoding='utf-8')


def train_bpe(texts: Iterable[bytes], vocab_size: int) -> BPETokenizer:
    """Train byte-level BPE with an end-of-document token.

    Args:
        texts: to train on.
        vocab_size: tokens, the 256 bytes and the end of a document included.

    Raises:
        ValueError: if the vocabulary is too small, or larger than the text supports.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    if vocab_size < 257:
        raise ValueError(f'vocab_size={vocab_size}; allowed: at least 257 (256 bytes and the end of a document)')
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[END_OF_DOCUMENT], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator((text.decode(errors='ignore') for text in texts), trainer)
    if tokenizer.get_vocab_size() < vocab_size:
        raise ValueError(f'vocab_size={vocab_size}: the text supports only {tokenizer.get_vocab_size()} tokens')
    return BPETokenizer(tokenizer.to_str())


def load_tokenizer(name: str | os.PathLike, texts: Iterable[bytes] = ()) -> Tokenizer:
    """The tokenizer of a name: 'bytes', 'bpe:<vocab_size>' (trained on `texts`), or the path of a tokenizer.json.

    Raises:
        ValueError: for any other name, or a file that is not there or not a byte-level BPE.
    """
    name = str(name)
    if name == 'bytes':
        return ByteTokenizer()
    if name.startswith('bpe:'):
        if not name[4:].isdigit():
            raise ValueError(f'tokenizer={name!r}; allowed: bpe:<vocab_size>, for example bpe:4096')
        return train_bpe(texts, int(name[4:]))
    path = pathlib.Path(name).expanduser()
    if not path.is_file():
        raise ValueError(f"tokenizer={name!r}: no such file; allowed: 'bytes', 'bpe:<vocab_size>' or the path of a tokenizer.json")
    try:
        return BPETokenizer(path.read_text(encoding='utf-8'))
    except ValueError as error:
        raise ValueError(f'tokenizer={name!r}: {error}') from None


def _check_byte_level(content: str, normalizers: tuple[str | None, ...]) -> None:
    try:
        parts = json.loads(content)
        kind, normalizer, splitting = parts['model']['type'], parts['normalizer'], parts['pre_tokenizer'] or {}
    except (ValueError, KeyError, TypeError):
        raise ValueError('not a tokenizer.json') from None
    steps = splitting.get('pretokenizers', [splitting])
    byte_level = [step for step in steps if step.get('type') == 'ByteLevel']
    prefixed = any(step.get('add_prefix_space') for step in byte_level)
    if kind != 'BPE' or not byte_level or (normalizer or {}).get('type') not in normalizers or prefixed:
        known = ' or '.join('no normalizer' if name is None else name for name in normalizers)
        raise ValueError(f'only byte-level BPE with {known} and without an added prefix space gives every text back')


def _byte_characters() -> dict[str, int]:
    """GPT-2's spelling of bytes: printable Latin-1 as itself, the others in order from U+0100."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [value for value in range(256) if value not in printable]
    return {chr(value): value for value in printable} | {chr(256 + i): value for i, value in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_characters()
