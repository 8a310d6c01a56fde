"""Documents of tokens with random access: what packing reads, be it from memory or from shards on disk."""

import hashlib
from collections.abc import Sequence

import numpy as np

from nested_jax.data import corpora, tokenizers


class TokenDocuments:
    """Documents of tokens.

    Attributes:
        lengths: tokens of each document, (N,) int64.
        digest: tells contents apart, tokenizer included.
    """

    lengths: np.ndarray
    digest: str

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents."""
        return int(self.lengths.sum())

    def read(self, index: int, start: int, stop: int) -> np.ndarray:
        """Tokens start to stop of one document; fewer where it ends before."""
        raise NotImplementedError


class TokenizedDocuments(TokenDocuments):
    """Documents of tokens in memory, in the narrowest dtype.

    Args:
        documents: one array of tokens for each.
        dtype: of the tokens.
    """

    def __init__(self, documents: Sequence[np.ndarray], dtype: np.dtype):
        self.lengths = np.array([len(tokens) for tokens in documents], np.int64)
        self._ends = np.cumsum(self.lengths)
        self._tokens = np.concatenate([np.zeros(0, dtype), *documents]).astype(dtype, copy=False)
        self.digest = hashlib.sha256(self.lengths.astype('<i8').tobytes() + self._tokens.astype('<u4').tobytes()).hexdigest()

    def read(self, index: int, start: int, stop: int) -> np.ndarray:
        """See `TokenDocuments.read`."""
        end = self._ends[index]
        first = end - self.lengths[index]
        return self._tokens[first + start : min(first + stop, end)]


def tokenize(documents: Sequence[corpora.Document], tokenizer: tokenizers.Tokenizer) -> TokenizedDocuments:
    """Tokenize documents in memory, each with its end-of-document token if the tokenizer has one."""
    return TokenizedDocuments(tokenizer.encode_documents([document.text for document in documents]), tokenizer.dtype)
