"""Sampling from a language model, its state streamed from token to token."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp


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

    Returns:
        (B, max_new_tokens) int32.

    Raises:
        ValueError: for an empty prompt or an argument out of range.
    """
    if prompt.ndim != 2 or prompt.shape[1] < 1:
        raise ValueError(f'prompt has shape {prompt.shape}, allowed is (batch, time) with at least one token')
    if max_new_tokens < 1:
        raise ValueError(f'max_new_tokens is {max_new_tokens}, allowed is an integer of at least 1')
    if temperature < 0:
        raise ValueError(f'temperature is {temperature}, allowed is a number of at least 0')
    if not 0 < top_p <= 1:
        raise ValueError(f'top_p is {top_p}, allowed is a number above 0 and at most 1')
    stop = (stop,) if isinstance(stop, int) else tuple(stop)
    return _generate(model, variables, prompt, key, max_new_tokens, float(temperature), float(top_p), stop)


@partial(jax.jit, static_argnums=(0, 4, 5, 6, 7))
def _generate(model, variables, prompt, key, max_new_tokens: int, temperature: float, top_p: float, stop: tuple[int, ...]):
    logits, state = model.apply(variables, prompt)
    stops = jnp.asarray(stop, prompt.dtype)

    def step(carry, key):
        logits, state, last, done = carry
        token = jnp.where(done, last, sample(logits, key, temperature=temperature, top_p=top_p).astype(prompt.dtype))
        done |= (token[:, None] == stops[None]).any(1)
        logits, state = model.apply(variables, token[:, None], state)
        return (logits[:, -1], state, token, done), token

    start = logits[:, -1], state, prompt[:, -1], jnp.zeros(prompt.shape[0], bool)
    _, tokens = jax.lax.scan(step, start, jax.random.split(key, max_new_tokens))
    return tokens.T


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
