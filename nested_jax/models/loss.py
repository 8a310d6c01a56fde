"""Next-token cross-entropy, in chunks of the vocabulary."""

import functools

import jax
import jax.numpy as jnp

from nested_jax.layers import sequence


def next_token_loss(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array | None = None, *, vocab_chunk: int = 8192
) -> jax.Array:
    """Sum of the cross-entropies of hidden @ head against the targets.

    Logits exist for one chunk of the vocabulary at a time and are computed again in the backward pass: in full, 0.5M
    tokens by a vocabulary of 32k are 64 GB.

    Args:
        hidden: (N, D) in the compute dtype.
        head: (D, V) float32.
        targets: (N,) int32 in [0, V).
        weights: (N,) float32 factors of each token's loss, None for ones.
        vocab_chunk: entries of the vocabulary at a time.

    Returns:
        Scalar float32 sum in nats.

    Raises:
        ValueError: for shapes that do not fit, or a chunk of no entries.
    """
    _check(hidden, head, targets, weights, vocab_chunk)
    vocab = head.shape[1]
    count = -(-vocab // vocab_chunk)
    chunk = vocab // count if vocab % count == 0 else vocab_chunk
    padded = count * chunk > vocab
    columns = jnp.pad(head.astype(hidden.dtype), ((0, 0), (0, count * chunk - vocab)))
    columns = columns.reshape(head.shape[0], count, chunk).swapaxes(0, 1)

    @jax.checkpoint
    def add_chunk(carry, inputs):
        largest, total, picked = carry
        first, block = inputs
        logits = _logits(hidden, block, total.dtype)
        if padded:
            logits = jnp.where((first + jnp.arange(chunk) < vocab)[None], logits, -jnp.inf)
        new_largest = jax.lax.stop_gradient(jnp.maximum(largest, logits.max(1)))
        total = total * jnp.exp(largest - new_largest) + jnp.exp(logits - new_largest[:, None]).sum(1)
        local = targets - first
        inside = (local >= 0) & (local < chunk)
        here = jnp.take_along_axis(logits, jnp.where(inside, local, 0)[:, None], 1)[:, 0]
        return (new_largest, total, picked + jnp.where(inside, here, 0.0)), None

    wide = jnp.promote_types(hidden.dtype, jnp.float32)
    rows = jnp.zeros(targets.shape, wide)
    start = (jnp.full_like(rows, jnp.finfo(wide).min), rows, rows)
    (largest, total, picked), _ = jax.lax.scan(add_chunk, start, (jnp.arange(count) * chunk, columns))
    losses = largest + jnp.log(total) - picked
    return losses.sum() if weights is None else (losses * weights).sum()


def _logits(hidden: jax.Array, block: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """(N, D) x (D, V) -> (N, V) in `dtype`, the sums' too."""
    return jnp.matmul(hidden, block) if hidden.dtype == dtype else _widened_product(hidden, block, dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _widened_product(hidden: jax.Array, block: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """The derivative multiplies in the operands' dtype, as every other product of such a model does: else GPUs multiply in `dtype`."""
    return jnp.matmul(hidden, block, preferred_element_type=dtype)


def _widened_product_backward(dtype: jnp.dtype, operands: tuple[jax.Array, jax.Array], cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
    hidden, block = operands
    cotangent = cotangent.astype(hidden.dtype)
    return cotangent @ block.T, hidden.T @ cotangent


_widened_product.defvjp(lambda hidden, block, dtype: (_widened_product(hidden, block, dtype), (hidden, block)), _widened_product_backward)


def _check(hidden: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array | None, vocab_chunk: int) -> None:
    if vocab_chunk < 1:
        raise ValueError(f'vocab_chunk is {vocab_chunk}, allowed is an integer of at least 1')
    if head.shape[:1] != hidden.shape[1:]:
        raise ValueError(f'head has shape {head.shape}, allowed is ({hidden.shape[-1]}, vocabulary)')
    for name, rows in (('targets', targets), ('weights', weights)):
        if rows is not None and rows.shape != hidden.shape[:1]:
            raise ValueError(f'{name} has shape {rows.shape}, allowed is {hidden.shape[:1]}')


def model_loss(
    model, params, tokens: jax.Array, targets: jax.Array, segment_ids=None, weights=None, *, key: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Sum of a language model's next-token losses over a batch, whose sequences are split where the mesh has an axis `sequence`.

    Args:
        model: a `LanguageModel`, or where sequences are not split what has its `apply` and `head`.
        params: its parameters.
        tokens, targets: (B, T) int32.
        segment_ids: (B, T) int32 documents of packed rows, or None.
        weights: (B, T) float32 factors of each token's loss, or None.
        key: () typed key of the model's dropout; None, as in evaluation: nothing is dropped.

    Returns:
        The sum in nats and the sum of the weights, float32 scalars.

    Raises:
        ValueError: for a length that does not split over the mesh (`sequence.split`).
    """
    if sequence.stretches() == 1:
        return _rows_loss(model, params, key, tokens, targets, segment_ids, weights)
    rows = (tokens, targets, segment_ids, weights)
    return sequence.split(lambda given, rows: _rows_loss(model, *given, *rows), (params, key), rows, grid=model.config.grid)


def _rows_loss(model, params, key, tokens, targets, segment_ids, weights) -> tuple[jax.Array, jax.Array]:
    rngs = None if key is None else {'dropout': key}
    hidden, _ = model.apply({'params': params}, tokens, segment_ids=segment_ids, method='hidden', rngs=rngs)
    flat = None if weights is None else weights.reshape(-1)
    total = next_token_loss(hidden.reshape(-1, hidden.shape[-1]), model.head(params), targets.reshape(-1), flat)
    return total, jnp.asarray(targets.size, total.dtype) if flat is None else flat.sum()
