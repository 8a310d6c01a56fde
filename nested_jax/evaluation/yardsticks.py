"""What a language model's bits per byte are held against: an n-gram model and a general-purpose compressor.

They take seconds, depend on the text alone, and are stored by its digest.
"""

import concurrent.futures
import json
import lzma
import os
import pathlib

import numpy as np

_NGRAM_TRAIN, _NGRAM_HELD_OUT = 2_000_000, 200_000  # bytes
_XZ_PRESET = 9 | lzma.PRESET_EXTREME
# It looks back 64 MiB: text further back cannot help it.
_XZ_WINDOW = 2**26


def witten_bell_bits_per_byte(train: bytes, heldout: bytes, order: int = 4) -> float:
    """Bits per byte of an interpolated Witten-Bell n-gram model.

    P(w | h) = (c(h w) + t(h) P(w | h')) / (c(h) + t(h)), with c counts in the training text, t(h) the number of different bytes
    seen after h, and h' the context h without its oldest byte; an unseen h leaves P(w | h'), and below the empty context P is 1 / 256.
    The first `order` bytes have shorter contexts.

    Args:
        train: text to count in.
        heldout: text to predict.
        order: bytes of context, at most 6.

    Raises:
        ValueError: for an empty text or an order outside [0, 6].
    """
    if not 0 <= order <= 6:
        raise ValueError(f'order={order}; allowed: 0 to 6')
    if len(train) <= order or len(heldout) <= order:
        raise ValueError(f'{len(train)} training and {len(heldout)} held-out bytes; allowed: more than the order {order}')
    probability = np.full(len(heldout), 1 / 256)
    for context in range(order + 1):
        grams, counts = np.unique(_codes(train, context + 1), return_counts=True)
        contexts, first, types = np.unique(grams >> 8, return_index=True, return_counts=True)
        totals = np.add.reduceat(counts, first)
        wanted = _codes(heldout, context + 1)
        gram, gram_seen = _find(grams, wanted)
        place, seen = _find(contexts, wanted >> 8)
        lower = probability[context:]
        interpolated = (counts[gram] * gram_seen + types[place] * lower) / (totals[place] + types[place])
        probability[context:] = np.where(seen, interpolated, lower)
    return float(-np.log2(probability).mean())


def _codes(text: bytes, size: int) -> np.ndarray:
    """Every run of `size` bytes as an integer, the oldest byte first, (len(text) - size + 1,) int64."""
    values = np.frombuffer(text, np.uint8).astype(np.int64)
    codes = np.zeros(len(values) - size + 1, np.int64)
    for offset in range(size):
        codes = (codes << 8) + values[offset : len(codes) + offset]
    return codes


def _find(table: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Place of each wanted value in a sorted table, and whether it is there."""
    place = np.minimum(np.searchsorted(table, wanted), len(table) - 1)
    return place, table[place] == wanted


def xz_bits_per_byte(heldout: bytes, train: bytes = b'') -> float:
    """Bits per byte of `xz -9e`: of the held-out text alone, or after the training text, xz(train + heldout) - xz(train).

    Raises:
        ValueError: for an empty held-out text.
    """
    if not heldout:
        raise ValueError('heldout holds no bytes')
    if not train:
        return len(lzma.compress(heldout, preset=_XZ_PRESET)) * 8 / len(heldout)
    train = train[-_XZ_WINDOW:]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:  # lzma works outside the interpreter's lock
        before, after = pool.map(lambda text: len(lzma.compress(text, preset=_XZ_PRESET)), (train, train + heldout))
    return (after - before) * 8 / len(heldout)


def yardsticks(train: bytes, heldout: bytes, digest: str, cache: str | os.PathLike | None = None) -> dict[str, float]:
    """Bits per byte of the n-gram model (2 MB of training, the first 200 kB of held-out text) and of xz without and with the training text.

    Args:
        train: training text.
        heldout: held-out text.
        digest: of the corpus.
        cache: JSON file that keeps the figures by digest; None: compute them each time.

    Returns:
        'witten_bell', 'xz', 'xz_with_train'.
    """
    path = None if cache is None else pathlib.Path(cache)
    known = json.loads(path.read_text()) if path is not None and path.is_file() else {}
    if digest not in known:
        figures = dict(
            witten_bell=witten_bell_bits_per_byte(train[:_NGRAM_TRAIN], heldout[:_NGRAM_HELD_OUT]),
            xz=xz_bits_per_byte(heldout),
            xz_with_train=xz_bits_per_byte(heldout, train),
        )
        known[digest] = {name: round(value, 4) for name, value in figures.items()}
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(f'.{os.getpid()}.tmp')
            temporary.write_text(json.dumps(known, indent=1, sort_keys=True) + '\n')
            os.replace(temporary, path)
    return known[digest]
