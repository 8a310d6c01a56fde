"""The deep memories of Miras: a two-layer MLP per head, one gradient step a token, any objective, any retention.

    M(x) = x + scale * LN(gelu(x W_in) W_out)
    A_t = alpha_t A_{t-1} + (1 - alpha_t) A_0 - eta_t grad_t,    W_t = R(A_t)                   (Eq. 24-27, arXiv:2504.13173v1)

where grad_t is the gradient of an objective of M(k_t) and v_t with respect to the weights W at the chunk's start (Eq. 28). It has
rank one in each layer, so a chunk's reads and writes are matrix products (`chunk.py`), for every objective alike:

    'l2'     1/2 |M(k) - v|^2
    'huber'  the same up to |M(k) - v| = delta_t, and delta_t |M(k) - v| - delta_t^2 / 2 beyond   (Yaad, Eq. 15 and 26)
    'lp'     |M(k) - v|_3^3, its sign and modulus smoothed: tanh(10 x), sqrt(x^2 + 1e-6)          (Moneta, Eq. 11 and 25)

and for every retention R, which only meets whole weights and only at a chunk's start:

    'l2'     W = A                                     decays as every forget gate does            (Yaad)
    'lq'     W = A / max(|A|_4, 1)^2                   per head and layer                          (Moneta, Eq. 24, q = 4)
    'kl'     W = D_in softmax(A) over a unit's inputs  positive, each unit's weights mean 1        (Memora, Eq. 21 and 27)

The numbers of the equations are those of secondary sources; these readings are ours:
* Eq. 27 takes softmax(alpha log W - eta grad). A softmax does not see what is added to all its logits, so A = log W gives the same W.
* Inside a chunk weights move linearly from the exact ones of its start: by the first weights' norm for 'lq', by the derivative of the
  softmax at equal weights for 'kl'. At the chunk's end R is exact again, and no rounding or negative weight is carried on.
* |A|_4 below 1 does not divide: the rule as printed gives |W|_4 = 1 / |A|_4, which forgetting would let grow without bound.
* alpha_t and eta_t are scalars of each head, where the paper has one for each channel. Retention decays to the learned A_0: at zero
  weights the gradients of both layers vanish, for good. `decay_to='zero'` is the rule as printed.
* Rates may be damped (`deep_memory`): LN makes gradients large where its inputs are small, and steps of a chunk add up.
* Eq. 26's l1 term is read as the norm of the error, as in Eq. 15: its gradient is continuous where the cases meet.

Einsum letters and axes: b batch, t time, h head, c token of the chunk, d head width, f hidden unit. Inside, arrays are head-first,
(b, h, c, dim). Everything is float32, or float64 for float64 inputs.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from nested_jax.memory import chunk as chunks
from nested_jax.memory import grid
from nested_jax.memory.mlp import ACTIVATIONS, MLPWeights
from nested_jax.memory.rows import scale_rows, square_norms

OBJECTIVES = ('l2', 'huber', 'lp')
RETENTIONS = ('l2', 'lq', 'kl')
_ACTIVATE = ACTIVATIONS['gelu']
_SMALL = 1e-6


class DeepTokens(NamedTuple):
    """What a memory is read and written with, (B, T, H, ...)."""

    query: jax.Array  # (B, T, H, D)
    key: jax.Array  # (B, T, H, D), |k| = 1
    value: jax.Array  # (B, T, H, D)
    eta: jax.Array  # (B, T, H) inner learning rate; 0 writes nothing
    log_alpha: jax.Array  # (B, T, H) log of the retention, at most 0
    damping: jax.Array | None = None  # (B, T, H) see `deep_memory`; None for rates as given
    threshold: jax.Array | None = None  # (B, T, H) delta of 'huber', above 0


class DeepState(NamedTuple):
    """A stream's memory at the start of its open chunk, and that chunk's inputs."""

    accumulated: MLPWeights  # (B, H, ...) A
    opened: DeepTokens  # (B, c, H, ...)


class _Layer(NamedTuple):
    """One layer during a chunk."""

    accumulated: jax.Array  # (..., D_in, D_out) A at the chunk's start
    weight: jax.Array  # (..., D_in, D_out) R(A)
    rest: jax.Array | None  # (..., D_in, D_out) what A decays to; None for zero
    writes: chunks.LayerWrites


class _Step(NamedTuple):
    """Gradients of a chunk's tokens: each is the outer product of a layer's input and its error, times the rate."""

    hidden: jax.Array  # (..., C, F) inputs of W_out
    error_in: jax.Array  # (..., C, F)
    error_out: jax.Array  # (..., C, D)
    rate_in: jax.Array  # (..., C)
    rate_out: jax.Array  # (..., C)


def deep_read(weights: MLPWeights, x: jax.Array, scale: jax.Array) -> jax.Array:
    """M(x) = x + scale * LN(gelu(x W_in) W_out), (..., C, D) and (..., 1, D) -> (..., C, D)."""
    return x + scale * _layer_norm(_ACTIVATE(x @ weights.w_in) @ weights.w_out)[0]


def deep_memory(
    tokens: DeepTokens,
    scale: jax.Array,
    initial: MLPWeights,
    *,
    objective: Literal['l2', 'huber', 'lp'] = 'l2',
    retention: Literal['l2', 'lq', 'kl'] = 'l2',
    decay_to: Literal['zero', 'init'] = 'init',
    chunk_size: int = 16,
    state: DeepState | None = None,
    position: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
) -> tuple[jax.Array, DeepState]:
    """Write and read a deep memory, in parallel inside each chunk. Eq. (24)-(28), arXiv:2504.13173v1.

    With damping d, eta is divided by 1 + d s |x|^2 |dM/dy|^2 for a layer y = x W, where s bounds the ratio of the objective's gradient
    to M(k) - v. With d = chunk_size eta a whole chunk's steps do not overshoot where W moves as A does; by 'lq' it moves less.

    Args:
        tokens: (B, T, H, ...), any float dtype.
        scale: (H, D) of the normalised outputs.
        initial: A that sequences and documents start from, (H, D, F) and (H, F, D).
        objective, retention: of the module's header; 'huber' needs `tokens.threshold`.
        decay_to: what retention lets A decay to, zero or `initial`.
        chunk_size: tokens between two times that gradients and R are taken anew.
        state: of an earlier call with the same options, or None.
        position: (B,) int32 tokens before this call; needed with `state`. Where it is zero the state is not looked at.
        segment_ids: (B, T) int32; documents start on the chunk grid, where a change starts the memory anew.

    Returns:
        (B, T, H, D) y_t = M_t(q_t), which holds token t's own write, in the memory's dtype, and the `DeepState`.

    Raises:
        ValueError: for an unknown choice, or shapes that do not fit.
    """
    tokens, scale, initial = _prepare(tokens, scale, initial, objective, retention, decay_to)
    fresh = jax.tree.map(lambda w: jnp.broadcast_to(w[None], (tokens.key.shape[0], *w.shape)), initial)
    rest = fresh if decay_to == 'init' else MLPWeights(None, None)

    def step(accumulated: MLPWeights, rows: DeepTokens):
        rows = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 2), rows)
        y, accumulated = _run_chunk(objective, retention, scale[None, :, None], rest, accumulated, rows)
        return jnp.moveaxis(y, 2, 1), accumulated

    y, state = grid.scan_chunks(step, tokens, fresh, chunk_size, state=state, position=position, segment_ids=segment_ids)
    return y, DeepState(*state)


def weights_of(accumulated: jax.Array, retention: str) -> jax.Array:
    """R(A) of one layer, (..., D_in, D_out) -> the same."""
    if retention == 'kl':
        return accumulated.shape[-2] * jax.nn.softmax(accumulated, axis=-2)
    return accumulated * _metric(accumulated, retention)[..., None]


def _metric(accumulated: jax.Array, retention: str) -> jax.Array:
    """What a step of A moves W by inside a chunk, (..., 1)."""
    if retention == 'lq':
        return jax.lax.rsqrt(jnp.maximum(jnp.sum(accumulated**4, axis=(-2, -1)), 1.0))[..., None]
    return jnp.ones((*accumulated.shape[:-2], 1), accumulated.dtype)


def output_error(objective: str, difference: jax.Array, threshold: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """The objective's gradient with respect to M(k).

    Args:
        objective: one of `OBJECTIVES`.
        difference: (..., C, D) M(k) - v.
        threshold: (..., C) delta, for 'huber'.

    Returns:
        The gradient (..., C, D), and (..., C) a bound of the ratios of its entries to those of `difference`.
    """
    squares = square_norms(difference)
    if objective == 'lp':
        return 3.0 * jnp.tanh(10.0 * difference) * (difference**2 + _SMALL), 3.0 * jnp.sqrt(squares + _SMALL)
    ratio = jnp.ones_like(squares)
    if objective == 'huber':
        far = squares > threshold**2
        ratio = jnp.where(far, threshold * jax.lax.rsqrt(jnp.where(far, squares, 1.0)), 1.0)
    return scale_rows(difference, ratio), ratio


def _layer_norm(rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rows of mean 0 and variance 1, (..., D), and what they were multiplied by, (...)."""
    centred = _centred(rows)
    factor = jax.lax.rsqrt(square_norms(centred) / rows.shape[-1] + _SMALL)
    return scale_rows(centred, factor), factor


def _centred(rows: jax.Array, axis: int = -1) -> jax.Array:
    return rows - jnp.mean(rows, axis=axis, keepdims=True)


def _gradients(objective: str, scale: jax.Array, weights: MLPWeights, rows: DeepTokens) -> _Step:
    """Errors and rates of all tokens of a chunk, at the chunk's first weights.

    Args:
        objective: one of `OBJECTIVES`.
        scale: (..., 1, D).
        weights: (..., D, F) and (..., F, D).
        rows: (..., C, D), gates (..., C).
    """
    to_hidden = rows.key @ weights.w_in
    hidden, pull_hidden = jax.vjp(_ACTIVATE, to_hidden)
    normed, pull_norm, factor = jax.vjp(_layer_norm, hidden @ weights.w_out, has_aux=True)
    error, steepness = output_error(objective, rows.key + scale * normed - rows.value, rows.threshold)
    (error_out,) = pull_norm(scale * error)
    (error_in,) = pull_hidden(error_out @ weights.w_out.mT)
    if rows.damping is None:
        return _Step(hidden, error_in, error_out, rows.eta, rows.eta)
    (slope,) = pull_hidden(jnp.ones_like(hidden))
    gain = rows.damping * steepness * jnp.max(scale**2, axis=-1) * factor**2
    passed = jnp.einsum('...cf,...f->...c', slope**2, square_norms(weights.w_out))
    rate_in = rows.eta / (1.0 + gain * square_norms(rows.key) * passed)
    rate_out = rows.eta / (1.0 + gain * square_norms(hidden))
    return _Step(hidden, error_in, error_out, rate_in, rate_out)


def _run_chunk(objective: str, retention: str, scale, rest: MLPWeights, accumulated: MLPWeights, rows: DeepTokens):
    """Outputs (B, H, C, D) of one chunk and A after it."""
    weights = MLPWeights(*(weights_of(a, retention) for a in accumulated))
    step = _gradients(objective, scale, weights, rows)
    decays = chunks.chunk_decays(rows.log_alpha)
    pushes = ((rows.key, step.error_in, step.rate_in), (step.hidden, step.error_out, step.rate_out))
    writes = [chunks.layer_writes(decays, *push, weight) for push, weight in zip(pushes, weights, strict=True)]
    layers = [_Layer(*parts) for parts in zip(accumulated, weights, rest, writes, strict=True)]
    hidden = _ACTIVATE(_read(retention, decays, layers[0], rows.query))
    y = rows.query + scale * _layer_norm(_read(retention, decays, layers[1], hidden))[0]
    return y, MLPWeights(*(chunks.weight_after(decays, layer.writes, layer.accumulated, rest=layer.rest)[0] for layer in layers))


def _read(retention: str, decays: chunks.ChunkDecays, layer: _Layer, queries: jax.Array) -> jax.Array:
    """Rows q_t W_t, each with its own token's write, (..., C, D_in) -> (..., C, D_out)."""
    read = lambda rows: chunks.read_running(decays, layer.writes, rows, layer.accumulated, rest=layer.rest)
    if retention == 'kl':
        # A unit's weights move by the step less its mean over the inputs: the centre is taken of the queries instead.
        shifted = _centred(queries)
        return queries @ layer.weight + read(shifted) - shifted @ layer.accumulated
    return _metric(layer.accumulated, retention)[..., None] * read(queries)


def _prepare(tokens: DeepTokens, scale, initial: MLPWeights, objective: str, retention: str, decay_to: str):
    """Check the arguments and cast them to the memory's dtype."""
    choices = (('objective', objective, OBJECTIVES), ('retention', retention, RETENTIONS), ('decay_to', decay_to, ('zero', 'init')))
    for name, value, allowed in choices:
        if value not in allowed:
            raise ValueError(f'{name} is {value!r}: allowed are {allowed}')
    if (objective == 'huber') != (tokens.threshold is not None):
        raise ValueError("tokens.threshold has to be given with objective='huber' and with no other")
    rows = tokens.key.shape
    if len(rows) != 4 or 0 in rows:
        raise ValueError(f'tokens.key has shape {rows}: expected (batch, time, heads, dim), none of them 0')
    shapes = {'query': rows, 'value': rows} | dict.fromkeys(('eta', 'log_alpha', 'damping', 'threshold'), rows[:3])
    hidden = initial.w_in.shape[-1]
    expected = [(f'tokens.{name}', getattr(tokens, name), shape) for name, shape in shapes.items()]
    expected += [('scale', scale, rows[2:]), ('initial.w_in', initial.w_in, (*rows[2:], hidden))]
    expected += [('initial.w_out', initial.w_out, (rows[2], hidden, rows[3]))]
    for name, array, shape in expected:
        if array is not None and array.shape != shape:
            raise ValueError(f'{name} has shape {array.shape}: expected {shape}')
    dtype = jnp.promote_types(jnp.result_type(tokens.query, tokens.key, tokens.value), jnp.float32)
    return jax.tree.map(lambda x: x.astype(dtype), (tokens, scale, initial))


# Token by token


def deep_memory_reference(
    tokens: DeepTokens,
    scale: jax.Array,
    initial: MLPWeights,
    *,
    objective: Literal['l2', 'huber', 'lp'] = 'l2',
    retention: Literal['l2', 'lq', 'kl'] = 'l2',
    decay_to: Literal['zero', 'init'] = 'init',
    chunk_size: int = 16,
    segment_ids: jax.Array | None = None,
) -> jax.Array:
    """`deep_memory` without a carried state as a loop over tokens that holds all weights; gradients by automatic differentiation.

    Returns:
        (B, T, H, D).
    """
    tokens, scale, initial = _prepare(tokens, scale, initial, objective, retention, decay_to)
    length = tokens.key.shape[1]

    def one_head(rows: DeepTokens, ids: jax.Array | None, scale: jax.Array, start: MLPWeights) -> jax.Array:
        changes = jnp.zeros(length, bool) if ids is None else jnp.concatenate([jnp.zeros(1, bool), ids[1:] != ids[:-1]])
        firsts = jnp.arange(length) % chunk_size == 0
        rest = start if decay_to == 'init' else jax.tree.map(jnp.zeros_like, start)
        step = lambda carry, item: _token(objective, retention, scale[None], start, rest, carry, item)
        rows = jax.tree.map(lambda x: x[:, None], rows)  # a chunk's axis, of one token
        return jax.lax.scan(step, (start, start), (rows, firsts, changes & firsts))[1]

    heads = jax.vmap(one_head, in_axes=(1, None, 0, 0), out_axes=1)
    return jax.vmap(heads, in_axes=(0, 0, None, None))(tokens, segment_ids, scale, initial)


def _token(objective: str, retention: str, scale: jax.Array, start: MLPWeights, rest: MLPWeights, carry, item):
    """One token of one head; carry is A and the A of the chunk's start."""
    (accumulated, anchor), (row, first, fresh) = carry, item
    choose = lambda flag, new, old: jax.tree.map(lambda a, b: jnp.where(flag, a, b), new, old)
    accumulated = choose(fresh, start, accumulated)
    anchor = choose(first, accumulated, anchor)
    weights = MLPWeights(*(weights_of(a, retention) for a in anchor))
    output, pull = jax.vjp(lambda w: deep_read(w, row.key, scale), weights)
    (gradient,) = pull(output_error(objective, output - row.value, row.threshold)[0])
    step = _gradients(objective, scale, weights, row)
    alpha = jnp.exp(row.log_alpha)[0]
    write = lambda a, r, g, rate: alpha * a + (1.0 - alpha) * r - rate[0] * g
    accumulated = MLPWeights(*map(write, accumulated, rest, gradient, (step.rate_in, step.rate_out)))
    seen = MLPWeights(*(_moved(retention, *parts) for parts in zip(accumulated, anchor, weights, strict=True)))
    return (accumulated, anchor), deep_read(seen, row.query, scale)[0]


def _moved(retention: str, accumulated: jax.Array, anchor: jax.Array, weight: jax.Array) -> jax.Array:
    """Weights inside a chunk, from A and from A and W at its start."""
    if retention == 'kl':
        return weight + _centred(accumulated - anchor, axis=-2)
    return _metric(anchor, retention)[..., None] * accumulated
