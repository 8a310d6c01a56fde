"""Sampling from a language model, its state streamed from token to token."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nested_jax.config import check


class Reading(NamedTuple):
    """Where a model stands after the tokens it has read."""

    logits: jax.Array  # (B, V) float32 of the token after the last
    state: Any  # as `LanguageModel` returns it


def generate(
    model,
    variables,
    prompt: jax.Array,
    *,
    key: jax.Array,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    stop: int | Sequence[int] = (),
    segment_ids: jax.Array | None = None,
) -> jax.Array:
    """Continue a prompt.

    Args:
        model: a `LanguageModel`.
        variables: {'params': ...}.
        prompt: (B, T) int32, T at least 1.
        key: random key.
        max_new_tokens: tokens to add.
        temperature: divides the logits; 0 takes the likeliest token.
        top_p: sample from the fewest tokens that together have at least this probability.
        stop: tokens that end a row; the rest of the row repeats its stop token.
        segment_ids: (B, T) document of each token of the prompt; each row goes on with its last one. `pad_prompts` has them.

    Returns:
        (B, max_new_tokens) int32.

    Raises:
        ValueError: for an empty prompt or an argument out of range.
    """
    if prompt.ndim != 2 or prompt.shape[1] < 1:
        raise ValueError(f'prompt has shape {prompt.shape}, allowed is (batch, time) with at least one token')
    options = dict(key=key, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, stop=stop)
    reading = prefill(model, variables, prompt, segment_ids=segment_ids)
    return decode(model, variables, reading, **options)[0].astype(prompt.dtype)


def pad_prompts(prompts: Sequence[Sequence[int]], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Lays prompts of unequal lengths out in one array, for `generate`.

    What stands in front of a prompt is a document of its own, so the prompt is read as it is alone. Memories with a `config.grid` above 1
    would see it begin off their grid, and need prompts of one length.

    Args:
        prompts: (B,) tokens, at least one each.
        length: T, of the longest at least.

    Returns:
        (B, T) int32 tokens and segment_ids.

    Raises:
        ValueError: for a prompt without tokens or longer than `length`.
    """
    tokens, segment_ids = np.zeros((2, len(prompts), length), np.int32)
    for row, prompt in enumerate(prompts):
        check(1 <= len(prompt) <= length, 'prompts', f'{len(prompt)} tokens', f'prompts of 1 to {length} tokens')
        tokens[row, length - len(prompt) :], segment_ids[row, length - len(prompt) :] = prompt, 1
    return tokens, segment_ids


@partial(jax.jit, static_argnums=0)
def prefill(model, variables, tokens: jax.Array, state: Any = None, segment_ids: jax.Array | None = None) -> Reading:
    """Read tokens (B, T), of the documents `segment_ids` (B, T), at their start or after what `state` has read."""
    logits, state = model.apply(variables, tokens, state, segment_ids=segment_ids)
    return Reading(logits[:, -1], state)


def decode(
    model,
    variables,
    reading: Reading,
    *,
    key: jax.Array,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    stop: int | Sequence[int] = (),
) -> tuple[jax.Array, Reading]:
    """Continue from where a model stands, one fused step for each token.

    The reading is donated: its memory becomes that of the one returned, and it cannot be used again.

    Args:
        model, variables: as in `generate`.
        reading: of `prefill` or an earlier call.
        key, max_new_tokens, temperature, top_p, stop: as in `generate`.

    Returns:
        (B, max_new_tokens) int32, and where the model stands after them.

    Raises:
        ValueError: for an argument out of range.
    """
    if max_new_tokens < 1:
        raise ValueError(f'max_new_tokens is {max_new_tokens}, allowed is an integer of at least 1')
    if temperature < 0:
        raise ValueError(f'temperature is {temperature}, allowed is a number of at least 0')
    if not 0 < top_p <= 1:
        raise ValueError(f'top_p is {top_p}, allowed is a number above 0 and at most 1')
    stop = (stop,) if isinstance(stop, int) else tuple(stop)
    return _decode(model, variables, reading, key, max_new_tokens, float(temperature), float(top_p), stop)


@partial(jax.jit, static_argnums=(0, 4, 5, 6, 7), donate_argnums=2)
def _decode(
    model, variables, reading: Reading, key, max_new_tokens: int, temperature: float, top_p: float, stop: tuple[int, ...]
) -> tuple[jax.Array, Reading]:
    stops = jnp.asarray(stop, jnp.int32)

    def step(carry, key):
        reading, last, done = carry
        drawn = sample(reading.logits, key, temperature=temperature, top_p=top_p).astype(jnp.int32)
        token = jnp.where(done, last, drawn)
        done |= (token[:, None] == stops[None]).any(1)
        return (prefill(model, variables, token[:, None], reading.state), token, done), token

    rows = reading.logits.shape[0]
    start = reading, jnp.zeros(rows, jnp.int32), jnp.zeros(rows, bool)
    (reading, _, _), tokens = jax.lax.scan(step, start, jax.random.split(key, max_new_tokens))
    return tokens.T, reading


def sample(logits: jax.Array, key: jax.Array, *, temperature: float, top_p: float) -> jax.Array:
    """Draw one token a row from the nucleus of the distribution (Sec. 3.1, arXiv:1904.09751v2).

    Args:
        logits: (B, V) float32.
        key: random key.
        temperature: divides the logits; 0 takes the likeliest token.
        top_p: probability the nucleus holds at least, in (0, 1].

    Returns:
        (B,) int32 tokens.
    """
    if temperature == 0:
        return jnp.argmax(logits, -1)
    logits = logits / temperature
    if top_p < 1:
        ordered = jnp.sort(logits, -1, descending=True)
        before = jnp.cumsum(jax.nn.softmax(ordered, -1), -1) - jax.nn.softmax(ordered, -1)
        smallest = jnp.min(jnp.where(before < top_p, ordered, jnp.inf), -1, keepdims=True)
        logits = jnp.where(logits >= smallest, logits, -jnp.inf)
    return jax.random.categorical(key, logits)
