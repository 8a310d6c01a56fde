"""Atlas' memory: a two-layer MLP per head, written for a window of tokens at once by an orthogonalised momentum.

    M(x) = silu(phi(x) W_in) W_out
    S_t = beta_t S_{t-1} + push_t sum_{i=t-c+1..t} gamma_i grad 1/2 |M(k_i) - v_i|^2     (Omega rule and momentum, Eq. 9 and 33)
    M_t = alpha_t M_{t-1} + (1 - alpha_t) M_0 - eta_t NS(S_t)                            (Eq. 32, arXiv:2505.23735v1)

for each layer alone; NS makes all singular values of a matrix about one. The equations' numbers are those of secondary sources. Where
they leave room, these readings are ours:
* Gradients are taken at the weights of the chunk's start, those of tokens of the window before it too, as the window crosses chunks:
  the state keeps the c - 1 last tokens of the chunk before the open one. A token's write has rank one, so S after a chunk is a product.
* Each token's gradient of a layer is clipped to norm one, so that S is bounded whatever the weights are: NS drops the size of S, not the
  sizes of its parts.
* NS is taken once a chunk, of S at its end, in place of each token's: M moves by sum_t (prod_{i>t} alpha_i) eta_t NS(S_C).
* Tokens read the weights of their chunk's start, the last ones that are orthogonalised. A stream's weights change at chunk ends only.
* phi takes x_i and x_i^2 of each channel, with fixed coefficients, where the polynomial kernel has all products x_i x_j: keys are learned
  projections, and a product of two is a difference of squares of two others.

Einsum letters and axes: b batch, t time, h head, c token of the chunk, d head width, f hidden unit. Inside, arrays are head-first,
(b, h, c, dim). Everything is float32, or float64 for float64 inputs.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from nested_jax.memory import chunk as chunks
from nested_jax.memory import grid
from nested_jax.memory.mlp import ACTIVATIONS, MLPWeights, mlp_read
from nested_jax.memory.rows import normalize, scale_rows, square_norms


class OmegaTokens(NamedTuple):
    """What the window's gradients are made of, (B, T, H, ...)."""

    key: jax.Array  # (B, T, H, D_in)
    value: jax.Array  # (B, T, H, D)
    gamma: jax.Array  # (B, T, H) weight of the token in every window it is in


class OmegaGates(NamedTuple):
    """Scalars of each token and head, (B, T, H). A token changes nothing with eta = push = gamma = log_alpha = log_momentum = 0."""

    eta: jax.Array  # step of M along the orthogonalised momentum
    push: jax.Array  # weight of the window's gradient in the momentum
    log_alpha: jax.Array  # log of the retention, at most 0
    log_momentum: jax.Array  # log of beta, at most 0


class OmegaMemories(NamedTuple):
    """Weights and momentum, (B, H, ...)."""

    weights: MLPWeights
    momentum: MLPWeights


class OmegaState(NamedTuple):
    """A stream's memory at the start of its open chunk, the tokens just before it, and the open chunk's inputs."""

    memories: OmegaMemories
    recent: OmegaTokens  # (B, window - 1, H, ...)
    opened: tuple[jax.Array, OmegaTokens, OmegaGates]  # (B, c, H, ...)


Orthogonalize = Callable[[jax.Array], jax.Array]


def polynomial_features(x: jax.Array) -> jax.Array:
    """phi(x): each channel and its square, of norm 1, (..., D) -> (..., 2 D).

    Weighted as in the exponential's series, x + x^2 / 2, at channels of mean square one.
    """
    return normalize(jnp.concatenate([x, 0.5 * x.shape[-1] ** 0.5 * x**2], -1))


def omega_memory(
    queries: jax.Array,
    tokens: OmegaTokens,
    gates: OmegaGates,
    initial: MLPWeights,
    *,
    orthogonalize: Orthogonalize,
    window: int,
    decay_to: Literal['zero', 'init'] = 'init',
    chunk_size: int = 16,
    state: OmegaState | None = None,
    position: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
) -> tuple[jax.Array, OmegaState]:
    """Read and write a memory by the Omega rule, a chunk at once. Eq. (9), (32) and (33), arXiv:2505.23735v1.

    Every step of M has singular values of at most about eta, so M is bounded by the steps' sum, which retention bounds.

    Args:
        queries: (B, T, H, D_in), features already, as the keys.
        tokens: keys (B, T, H, D_in), values (B, T, H, D) and gamma (B, T, H).
        gates: (B, T, H).
        initial: weights that sequences and documents start from, (H, D_in, F) and (H, F, D).
        orthogonalize: (..., m, n) -> the same with singular values near one; zero stays zero, with finite derivatives.
        window: c, the tokens each momentum step is a gradient of, from 1 to chunk_size + 1.
        decay_to: what retention lets the weights decay to, zero or `initial`.
        chunk_size: tokens between two changes of the weights.
        state: of an earlier call with the same options, or None.
        position: (B,) int32 tokens before this call; needed with `state`. Where it is zero the state is not looked at.
        segment_ids: (B, T) int32; documents start on the chunk grid, where a change starts memory and window anew.

    Returns:
        (B, T, H, D) outputs in the memory's dtype, and the `OmegaState`.

    Raises:
        ValueError: for a window that does not fit the chunk, an unknown `decay_to`, or shapes that do not fit.
    """
    queries, tokens, gates, initial = _prepare(queries, tokens, gates, initial, window, chunk_size, decay_to)
    fresh = _fresh(initial, tokens, window)
    rest = fresh[0].weights if decay_to == 'init' else jax.tree.map(jnp.zeros_like, fresh[0].weights)

    def step(memory: tuple[OmegaMemories, OmegaTokens], item):
        queries, tokens, gates = item
        (memories, recent), last = memory, tokens.gamma.shape[1] - (window - 1)
        seen = jax.tree.map(lambda old, new: jnp.concatenate([old, new], 1), recent, tokens)
        y = mlp_read(memories.weights, jnp.moveaxis(queries, 1, 2), residual=False)
        memories = _write_chunk(orthogonalize, window, rest, memories, *_heads_first((seen, gates)))
        return jnp.moveaxis(y, 2, 1), (memories, jax.tree.map(lambda x: x[:, last:], tokens))

    if state is not None:
        state = ((state.memories, state.recent), state.opened)
    y, (memory, opened) = grid.scan_chunks(
        step, (queries, tokens, gates), fresh, chunk_size, state=state, position=position, segment_ids=segment_ids
    )
    return y, OmegaState(*memory, opened)


def _heads_first(tree):
    return jax.tree.map(lambda x: jnp.moveaxis(x, 1, 2), tree)


def _fresh(initial: MLPWeights, tokens: OmegaTokens, window: int) -> tuple[OmegaMemories, OmegaTokens]:
    """What sequences start from: the initial weights, no momentum, and a window of tokens without weight."""
    weights = jax.tree.map(lambda w: jnp.broadcast_to(w[None], (tokens.key.shape[0], *w.shape)), initial)
    recent = jax.tree.map(lambda x: jnp.zeros((x.shape[0], window - 1, *x.shape[2:]), x.dtype), tokens)
    return OmegaMemories(weights, jax.tree.map(jnp.zeros_like, weights)), recent


def _write_chunk(
    orthogonalize: Orthogonalize, window: int, rest: MLPWeights, memories: OmegaMemories, seen: OmegaTokens, gates: OmegaGates
):
    """Weights and momentum after a chunk; `seen` are its tokens after the window - 1 before it."""
    alpha, beta = chunks.chunk_decays(gates.log_alpha), chunks.chunk_decays(gates.log_momentum)
    size = gates.eta.shape[-1]
    # Age of a seen token at each token of the chunk; its gradient enters the momentum while it is in the window.
    age = jnp.arange(size)[:, None] + (window - 1) - jnp.arange(size + window - 1)[None]
    inside = ((age >= 0) & (age < window)).astype(gates.eta.dtype)
    weight = seen.gamma * ((beta.spans[..., -1, :] * gates.push) @ inside)
    moved = (alpha.spans[..., -1, :] * gates.eta).sum(-1)[..., None, None]
    kept, kept_momentum = alpha.kept[..., -1:, None], beta.kept[..., -1:, None]
    gradients = _window_gradient(memories.weights, seen, weight)
    momentum = jax.tree.map(lambda s, g: kept_momentum * s + g, memories.momentum, gradients)
    step = lambda w, r, s: kept * w + (1.0 - kept) * r - moved * orthogonalize(s)
    return OmegaMemories(jax.tree.map(step, memories.weights, rest, momentum), momentum)


def _window_gradient(weights: MLPWeights, seen: OmegaTokens, weight: jax.Array) -> MLPWeights:
    """Sum of weight_i times the clipped gradient of 1/2 |M(k_i) - v_i|^2; rows (..., R, D), weight (..., R)."""
    hidden, pull_back = jax.vjp(ACTIVATIONS['silu'], seen.key @ weights.w_in)
    error_out = hidden @ weights.w_out - seen.value
    (error_in,) = pull_back(error_out @ weights.w_out.mT)
    summed = lambda x, error: x.mT @ scale_rows(error, weight * _clip(square_norms(x) * square_norms(error)))
    return MLPWeights(summed(seen.key, error_in), summed(hidden, error_out))


def _clip(squares: jax.Array) -> jax.Array:
    """Factor that leaves a gradient a norm of at most one, from its squared norm."""
    long = squares > 1.0
    return jnp.where(long, jax.lax.rsqrt(jnp.where(long, squares, 1.0)), 1.0)


def _prepare(queries, tokens: OmegaTokens, gates: OmegaGates, initial: MLPWeights, window: int, chunk_size: int, decay_to: str):
    """Check the arguments and cast them to the memory's dtype."""
    if decay_to not in ('zero', 'init'):
        raise ValueError(f"decay_to is {decay_to!r}: allowed are ('zero', 'init')")
    if not 1 <= window <= chunk_size + 1:
        raise ValueError(f'window is {window!r}: expected 1 to chunk_size + 1, {chunk_size + 1}')
    rows = tokens.key.shape
    if len(rows) != 4 or 0 in rows:
        raise ValueError(f'tokens.key has shape {rows}: expected (batch, time, heads, dim), none of them 0')
    hidden, width = initial.w_in.shape[-1], initial.w_out.shape[-1]
    expected = [('queries', queries, rows), ('tokens.value', tokens.value, (*rows[:3], width)), ('tokens.gamma', tokens.gamma, rows[:3])]
    expected += [(f'gates.{name}', gate, rows[:3]) for name, gate in gates._asdict().items()]
    expected += [('initial.w_in', initial.w_in, (*rows[2:], hidden)), ('initial.w_out', initial.w_out, (rows[2], hidden, width))]
    for name, array, shape in expected:
        if array.shape != shape:
            raise ValueError(f'{name} has shape {array.shape}: expected {shape}')
    dtype = jnp.promote_types(jnp.result_type(queries, tokens.key, tokens.value), jnp.float32)
    return jax.tree.map(lambda x: x.astype(dtype), (queries, tokens, gates, initial))


# Token by token


def omega_memory_reference(
    queries: jax.Array,
    tokens: OmegaTokens,
    gates: OmegaGates,
    initial: MLPWeights,
    *,
    orthogonalize: Orthogonalize,
    window: int,
    decay_to: Literal['zero', 'init'] = 'init',
    chunk_size: int = 16,
    segment_ids: jax.Array | None = None,
) -> jax.Array:
    """`omega_memory` without a carried state as a loop over tokens, gradients by `jax.grad`.

    Returns:
        (B, T, H, D).
    """
    queries, tokens, gates, initial = _prepare(queries, tokens, gates, initial, window, chunk_size, decay_to)
    length = queries.shape[1]

    def one_head(rows, ids: jax.Array | None, start: MLPWeights) -> jax.Array:
        changes = jnp.zeros(length, bool) if ids is None else jnp.concatenate([jnp.zeros(1, bool), ids[1:] != ids[:-1]])
        place = jnp.arange(length) % chunk_size
        rest = start if decay_to == 'init' else jax.tree.map(jnp.zeros_like, start)
        none = jax.tree.map(lambda x: jnp.zeros((window, *x.shape[1:]), x.dtype), rows[1])
        fresh = (start, jax.tree.map(jnp.zeros_like, start), none, jnp.ones(()), jnp.zeros(()))
        step = lambda carry, item: _token(orthogonalize, chunk_size, fresh, rest, carry, item)
        return jax.lax.scan(step, fresh, (*rows, place, changes & (place == 0)))[1]

    heads = jax.vmap(one_head, in_axes=(1, None, 0), out_axes=1)
    return jax.vmap(heads, in_axes=(0, 0, None))((queries, tokens, gates), segment_ids, initial)


def _token(orthogonalize: Orthogonalize, chunk_size: int, fresh, rest: MLPWeights, carry, item):
    """One token of one head; carry is (weights, momentum, the window's tokens, alpha's product, eta's decayed sum)."""
    query, token, gate, place, begins = item
    carry = jax.tree.map(lambda a, b: jnp.where(begins, a, b.astype(a.dtype)), fresh, carry)
    weights, momentum, recent, kept, moved = carry
    recent = jax.tree.map(lambda old, new: jnp.concatenate([old[1:], new[None]]), recent, token)

    def objective(weights: MLPWeights, key: jax.Array, value: jax.Array) -> jax.Array:
        return 0.5 * jnp.sum((mlp_read(weights, key[None], residual=False)[0] - value) ** 2)

    gradients = jax.vmap(jax.grad(objective), (None, 0, 0))(weights, recent.key, recent.value)
    clipped = jax.tree.map(lambda g: jnp.einsum('i,i,ikf->kf', recent.gamma, _clip(jnp.sum(g**2, (1, 2))), g), gradients)
    momentum = jax.tree.map(lambda s, g: jnp.exp(gate.log_momentum) * s + gate.push * g, momentum, clipped)
    alpha = jnp.exp(gate.log_alpha)
    kept, moved = kept * alpha, alpha * moved + gate.eta
    y = mlp_read(weights, query[None], residual=False)[0]
    step = lambda w, r, s: kept * w + (1.0 - kept) * r - moved * orthogonalize(s)
    ends = place == chunk_size - 1
    new = jax.tree.map(step, weights, rest, momentum)
    weights = jax.tree.map(lambda a, b: jnp.where(ends, a, b), new, weights)
    return (weights, momentum, recent, jnp.where(ends, 1.0, kept), jnp.where(ends, 0.0, moved)), y
