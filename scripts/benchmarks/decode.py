"""Decoding after short and long contexts."""

import jax
import jax.numpy as jnp
import numpy as np

from nested_jax.models import LanguageModel, preset
from nested_jax.models.sampling import Reading, decode, prefill
from scripts.benchmarks.timing import Settings, measure


def decoding(settings: Settings, new_tokens: int = 32, piece: int = 4096):
    """Time of a token after short and long contexts, alone and 64 side by side; recurrent models have read the context."""
    for name in ('gated-deltanet-tiny', 'titans-tiny', 'hope-linear-tiny', 'hope-tiny'):
        model = LanguageModel(preset(name))
        variables = {'params': jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 16), jnp.int32))['params']}
        tokens, reading = jax.random.randint(jax.random.key(1), (1, 65_536), 0, 256), None
        seconds = {}
        for context in (1024, 65_536):
            start = 0 if reading is None else 1024
            for begin in range(start, context, piece):
                reading = prefill(model, variables, tokens[:, begin : min(begin + piece, context)], reading and reading.state)
            if not np.isfinite(reading.logits).all():
                raise RuntimeError(f'{name} has logits that are not finite after {context} tokens')
            for batch in (1, 64):
                rows = jax.tree.map(lambda leaf, batch=batch: jnp.repeat(leaf, batch, 0), reading)
                run = Decoding(model, variables, rows, new_tokens)
                timing = measure(run, settings.repeats)
                seconds[context, batch] = timing.median
                yield dict(
                    what='decoding', model=name, context=context, batch=batch, tokens_per_second=batch * new_tokens / timing.median,
                    slowest=batch * new_tokens / timing.slowest, fastest=batch * new_tokens / timing.fastest,
                    ms_per_token=1e3 * timing.median / new_tokens, ratio_to_1k=timing.median / seconds[1024, batch],
                )  # fmt: skip


class Decoding:
    """Decodes on and on from a reading, whose memory each call takes and gives back."""

    def __init__(self, model: LanguageModel, variables: dict, reading: Reading, count: int):
        self.reading = reading
        self._decode = lambda reading: decode(model, variables, reading, key=jax.random.key(0), max_new_tokens=count)

    def __call__(self) -> object:
        tokens, self.reading = self._decode(self.reading)
        return jax.block_until_ready(tokens)


PARTS = (decoding,)
