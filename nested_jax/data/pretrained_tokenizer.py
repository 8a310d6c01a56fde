"""The tokenizer of a pre-trained model in Hugging Face's format: the ids that the model was trained on."""

import json
import os
import pathlib

import numpy as np

from nested_jax.data.tokenizers import BPETokenizer

DOCUMENT_ENDS = ('<|endoftext|>', '<|end_of_text|>')  # Qwen's, Llama 3's


class PretrainedTokenizer(BPETokenizer):
    """A tokenizer.json as `transformers` reads it: byte-level BPE, with NFC where the file asks for it (Qwen).

    A text and its NFC form then have the same tokens, and decoding gives the latter; bytes are counted after it.

    Attributes:
        stop: ids that end what the model generates, for `generate`.

    Args:
        content: of the tokenizer.json.
        stop: ids.

    Raises:
        ValueError: for another kind of tokenizer.
    """

    _normalizers = (None, 'NFC')

    def __init__(self, content: str, stop: tuple[int, ...] = ()):
        import tokenizers

        super().__init__(content)
        self._prompt_tokenizer = tokenizers.Tokenizer.from_str(content)
        self.end = next((i for i in map(self._prompt_tokenizer.token_to_id, DOCUMENT_ENDS) if i is not None), None)
        self.stop = stop

    def encode_prompt(self, text: str) -> np.ndarray:
        """Tokens of a prompt, (N,): special tokens may be spelled out, and those that the model expects in front are added.

        `encode` does neither: text from elsewhere cannot smuggle in a special token.
        """
        return np.array(self._prompt_tokenizer.encode(text).ids, self.dtype)


def load_pretrained_tokenizer(folder: str | os.PathLike) -> PretrainedTokenizer:
    """The tokenizer in a pre-trained model's folder.

    Args:
        folder: with tokenizer.json, and generation_config.json or config.json for the ids that end a text.

    Raises:
        FileNotFoundError: if there is no tokenizer.json.
        ValueError: for a tokenizer that is not byte-level BPE, or a file that is not JSON.
    """
    path = pathlib.Path(folder) / 'tokenizer.json'
    if not path.is_file():
        raise FileNotFoundError(f'{path} is not there, allowed is the folder of a pre-trained model')
    try:
        return PretrainedTokenizer(path.read_text(encoding='utf-8'), _stop_ids(path.parent))
    except ValueError as error:
        raise ValueError(f'{path.parent}: {error}') from None


def _stop_ids(folder: pathlib.Path) -> tuple[int, ...]:
    """As `transformers` generates: the generation's settings go before the model's."""
    for name in ('generation_config.json', 'config.json'):
        path = folder / name
        try:
            ids = json.loads(path.read_text(encoding='utf-8')).get('eos_token_id') if path.is_file() else None
        except (ValueError, AttributeError) as error:
            raise ValueError(f'{name} is no JSON object ({error})') from None
        if ids is not None:
            return (ids,) if isinstance(ids, int) else tuple(ids)
    return ()
