"""Decoding after short and long contexts."""

import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from nested_jax.models import LanguageModel, preset
from nested_jax.models.sampling import Reading, decode, prefill
from scripts.benchmarks.timing import Settings, by_turns

CONTEXTS = (1024, 65_536)


def decoding(settings: Settings, new_tokens: int = 32):
    """Time of a token after short and long contexts, by turns, alone and 64 side by side; recurrent models have read the context."""
    for name in ('gated-deltanet-tiny', 'titans-tiny', 'hope-linear-tiny', 'hope-tiny'):
        model = LanguageModel(preset(name))
        variables = {'params': jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 16), jnp.int32))['params']}
        readings = read_contexts(model, variables)
        for batch in (1, 64):
            rows = {
                context: jax.tree.map(lambda leaf, batch=batch: jnp.repeat(leaf, batch, 0), found) for context, found in readings.items()
            }
            runs = {context: Decoding(model, variables, reading, new_tokens) for context, reading in rows.items()}
            spent = by_turns(runs, settings.repeats, time.perf_counter)
            for context, seconds in spent.items():
                ratios = [each / short for each, short in zip(seconds, spent[CONTEXTS[0]], strict=True)]
                speed = lambda seconds, batch=batch: batch * new_tokens / seconds
                yield dict(
                    what='decoding', model=name, context=context, batch=batch, tokens_per_second=speed(statistics.median(seconds)),
                    slowest=speed(max(seconds)), fastest=speed(min(seconds)), ms_per_token=1e3 * statistics.median(seconds) / new_tokens,
                    ratio_to_1k=statistics.median(ratios),
                )  # fmt: skip


def read_contexts(model: LanguageModel, variables: dict, piece: int = 4096) -> dict[int, Reading]:
    """Where the model stands after each of `CONTEXTS`, of the same random tokens, read in pieces.

    Raises:
        RuntimeError: where logits are not finite.
    """
    tokens, found, reading, start = jax.random.randint(jax.random.key(1), (1, CONTEXTS[-1]), 0, 256), {}, None, 0
    for context in CONTEXTS:
        for begin in range(start, context, piece):
            reading = prefill(model, variables, tokens[:, begin : min(begin + piece, context)], reading and reading.state)
        if not np.isfinite(reading.logits).all():
            raise RuntimeError(f'logits are not finite after {context} tokens')
        found[context], start = reading, context
    return found


class Decoding:
    """Decodes on and on from a reading, whose memory each call takes and gives back."""

    def __init__(self, model: LanguageModel, variables: dict, reading: Reading, count: int):
        self.reading = reading
        self._decode = lambda reading: decode(model, variables, reading, key=jax.random.key(0), max_new_tokens=count)

    def __call__(self) -> object:
        tokens, self.reading = self._decode(self.reading)
        return jax.block_until_ready(tokens)


PARTS = (decoding,)
