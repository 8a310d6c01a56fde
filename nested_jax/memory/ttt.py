"""Test-time training: a model for each head that learns the tokens it reads, mini-batch by mini-batch (arXiv:2407.04620).

    f(x; W) = x + LN(x W_1 + b_1)                        TTT-Linear
    f(x; W) = x + LN(gelu(x W_1 + b_1) W_2 + b_2)        TTT-MLP, gelu by tanh
    g_j = d/dW 1/2 |f(k_j; W_0) - v_j|^2                 at the weights W_0 of the mini-batch's start
    W_i = W_0 - s_i G_i,  G_i = sum_{j <= i} eta_j g_j   (Sec. 2.4; s_i is 1 / i plus what is learned, Sec. 2.7)
    y_i = f(q_i; W_i)                                    its own token included

The next mini-batch starts from the last W_i. `ttt` computes a mini-batch by the dual form (Sec. 2.5): no W_i but the last is ever formed.
`ttt_reference` is the loop over tokens.

Mini-batches are counted from a sequence's start. A state may be handed on at any position: within a mini-batch W_0 and G_i are all there
is. A token with eta = 0 writes nothing and takes a place in its mini-batch.

Letters: B batch, T time, H head, n mini-batches, C tokens of one, D width of a head, F hidden units. Inside, arrays are head-first,
(B, H, C, D), and stacked over mini-batches, (n, B, H, C, D). Everything is float32, or float64 for float64 inputs.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from nested_jax.memory import grid

_EPSILON = 1e-6  # of the inner norm
# The backward pass keeps the weights at the start of each group of so many mini-batches and computes those between again: for four heads of
# 64 of TTT-MLP and 4,096 tokens, 60 MiB of temporaries on a CPU against 807 with all of them kept, and 147 with groups of one.
_GROUP = 8


class Layer(NamedTuple):
    """One affine layer of the inner model, with any leading axes; inputs are rows."""

    kernel: jax.Array  # (..., D_in, D_out)
    bias: jax.Array  # (..., 1, D_out)


Weights = tuple[Layer, ...]  # one layer: TTT-Linear; two, with gelu between them: TTT-MLP


class Norm(NamedTuple):
    """Learned scale and shift of the inner norm; not written."""

    scale: jax.Array  # (..., D)
    shift: jax.Array  # (..., D)


class TTTState(NamedTuple):
    """What `ttt` carries between calls. Float32, or float64 for float64 inputs."""

    anchor: Weights  # (B, H, ...) W_0 of the open mini-batch
    gradient: Weights  # (B, H, ...) G, the sum of eta_j g_j over the open mini-batch
    position: jax.Array  # (B,) int32 number of tokens so far


class _Chunk(NamedTuple):
    """The tokens of one mini-batch."""

    q: jax.Array  # (B, H, C, D)
    k: jax.Array  # (B, H, C, D)
    v: jax.Array  # (B, H, C, D)
    eta: jax.Array  # (B, H, C)
    reset: jax.Array | None  # (B,) bool: a new segment starts here; None without segments
    complete: jax.Array | None  # (B,) bool: its last token is known; None: in all of them


class _Rule(NamedTuple):
    """What all mini-batches share."""

    token_scale: jax.Array  # (C,)
    norm: Norm  # (1, H, 1, D)
    initial: Weights  # (1, H, ...)


def inner_model(weights: Weights, x: jax.Array, norm: Norm) -> jax.Array:
    """f(x; W) = x + LN(x W_1 + b_1), or of two layers with gelu between them. Sec. 2.7, arXiv:2407.04620.

    Args:
        weights: one or two `Layer` with leading axes (...).
        x: rows (..., C, D).
        norm: `Norm` that broadcasts against x.

    Returns:
        (..., C, D).
    """
    z = _affine(x, weights[0])
    for layer in weights[1:]:
        z = _affine(_gelu(z), layer)
    return x + _layer_norm(z, norm)


def ttt_initial_state(initial: Weights, batch_size: int) -> TTTState:
    """State of `batch_size` sequences before their first token.

    Args:
        initial: `Layer` of kernels (H, D_in, D_out) and biases (H, 1, D_out).
        batch_size: number of rows.

    Returns:
        `TTTState`, float32 or wider.
    """
    repeat = lambda w: jnp.broadcast_to(w.astype(jnp.promote_types(w.dtype, jnp.float32))[None], (batch_size, *w.shape))
    anchor = jax.tree.map(repeat, initial)
    return TTTState(anchor, jax.tree.map(jnp.zeros_like, anchor), jnp.zeros(batch_size, jnp.int32))


def ttt(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    eta: jax.Array,
    token_scale: jax.Array,
    *,
    norm: Norm,
    initial: Weights,
    state: TTTState | None = None,
    segment_ids: jax.Array | None = None,
) -> tuple[jax.Array, TTTState]:
    """Learn and read, in parallel inside each mini-batch by the dual form. Sec. 2.4, 2.5 and 2.7, arXiv:2407.04620.

    Args:
        q, k: (B, T, H, D) queries and keys, any float dtype. Neither is scaled or normalised.
        v: (B, T, H, D) targets.
        eta: (B, T, H) inner learning rate of each token's own gradient, at least 0; 0 writes nothing.
        token_scale: (C,) factors s_i, at least 0, of the sum of the gradients up to the i-th token of C, a mini-batch's size.
        norm: scale and shift (H, D) of the inner norm.
        initial: weights every sequence and every segment starts from: one `Layer` (TTT-Linear) or two (TTT-MLP), kernels
            (H, D_in, D_out) and biases (H, 1, D_out).
        state: of an earlier call with the same options; None starts new sequences.
        segment_ids: (B, T) integers. A change at a mini-batch's first position resets the weights; documents start on this grid. The
            first token of a call with a state continues the state's document.

    Returns:
        y (B, T, H, D) in v's dtype, and the `TTTState` after the last token.

    Raises:
        ValueError: for shapes that do not fit.
    """
    _check(q, k, v, eta, token_scale, norm, initial, state, segment_ids)
    rule, tokens, state = _prepare(q, k, v, eta, token_scale, norm, initial, state)
    stacked, phase = _stack(tokens, segment_ids, state, token_scale.shape[0])
    step = functools.partial(_step, rule)
    if state is None:
        start = ttt_initial_state(jax.tree.map(lambda w: w[0], rule.initial), q.shape[0])
        (anchor, gradient), y = _scan(step, (start.anchor, start.gradient), stacked)
        position = start.position + q.shape[1]
    else:  # the first mini-batch is the only one whose gradients are known in part
        first = jax.tree.map(lambda x: x[0], stacked)
        carry, y_first = _step(rule, (state.anchor, state.gradient), first, begun=True)
        (anchor, gradient), y = _scan(step, carry, jax.tree.map(lambda x: x[1:], stacked))
        y, position = jnp.concatenate([y_first[None], y]), state.position + q.shape[1]
    return grid.from_chunks(y, phase, q.shape[1]).astype(v.dtype), TTTState(anchor, gradient, position)


def ttt_reference(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    eta: jax.Array,
    token_scale: jax.Array,
    *,
    norm: Norm,
    initial: Weights,
    state: TTTState | None = None,
    segment_ids: jax.Array | None = None,
) -> tuple[jax.Array, TTTState]:
    """`ttt` as a loop over tokens, gradients by `jax.grad`. Same arguments, results, errors and mini-batches."""
    _check(q, k, v, eta, token_scale, norm, initial, state, segment_ids)
    rule, (*rows, eta), state = _prepare(q, k, v, eta, token_scale, norm, initial, state)
    if state is None:
        state = ttt_initial_state(jax.tree.map(lambda w: w[0], rule.initial), q.shape[0])
    size = token_scale.shape[0]
    # Of one head of one sequence, whose token is the only row.
    loss = lambda weights, key, value, norm: 0.5 * jnp.sum((inner_model(weights, key, norm) - value) ** 2)
    slope = jax.vmap(jax.vmap(jax.grad(loss)), (0, 0, 0, None))
    norm = jax.tree.map(lambda x: x[0], rule.norm)

    def step(state: TTTState, token):
        query, key, value, eta, changed = token
        slot = state.position % size
        anchor = state.anchor if changed is None else grid.where_rows(changed & (slot == 0), rule.initial, state.anchor)
        gradient = jax.tree.map(lambda sum_, g: sum_ + eta[..., None] * g, state.gradient, slope(anchor, key, value, norm))
        weights = _descend(anchor, gradient, rule.token_scale[slot])
        y = inner_model(weights, query, rule.norm)
        done = slot == size - 1
        gradient = grid.where_rows(done, jax.tree.map(jnp.zeros_like, gradient), gradient)
        return TTTState(grid.where_rows(done, weights, anchor), gradient, state.position + 1), y

    rows = (*(x[:, :, :, None] for x in rows), eta[..., None])  # (B, T, H, 1, ...)
    state, y = jax.lax.scan(step, state, jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (*rows, _changes(segment_ids))))
    return jnp.moveaxis(y, 0, 1)[:, :, :, 0].astype(v.dtype), state


# Arguments


def _check(q, k, v, eta, token_scale, norm, initial, state, segment_ids) -> None:
    if q.ndim != 4 or 0 in q.shape:
        raise ValueError(f'q has shape {q.shape}: expected (batch, time, heads, dim), none of them 0')
    batch, time, heads, width = q.shape
    if token_scale.ndim != 1 or 0 in token_scale.shape:
        raise ValueError(f'token_scale has shape {token_scale.shape}: expected (tokens of a mini-batch,), at least one')
    if len(initial) not in (1, 2):
        raise ValueError(f'initial has {len(initial)} layers: allowed are 1 and 2')
    widths = (width, *(layer.kernel.shape[-1] for layer in initial[:-1]), width)
    expected = {'k': (k, q.shape), 'v': (v, q.shape), 'eta': (eta, (batch, time, heads)), 'segment_ids': (segment_ids, (batch, time))}
    expected |= {f'norm.{name}': (leaf, (heads, width)) for name, leaf in norm._asdict().items()}
    for i, (layer, d_in, d_out) in enumerate(zip(initial, widths[:-1], widths[1:], strict=True)):
        expected[f'initial[{i}].kernel'] = layer.kernel, (heads, d_in, d_out)
        expected[f'initial[{i}].bias'] = layer.bias, (heads, 1, d_out)
    for name, (array, shape) in expected.items():
        if array is not None and array.shape != shape:
            raise ValueError(f'{name} has shape {array.shape}: expected {shape}')
    if state is not None:
        want = jax.eval_shape(functools.partial(ttt_initial_state, batch_size=batch), initial)
        shapes = lambda tree: jax.tree.map(lambda x: x.shape, tree)
        if shapes(state) != shapes(want):
            raise ValueError(f'state has shapes {shapes(state)}: expected {shapes(want)}')


def _prepare(q, k, v, eta, token_scale, norm, initial, state):
    """Cast to the memory's dtype; shared arrays with the axes to broadcast."""
    dtype = jnp.promote_types(jnp.result_type(q, k, v), jnp.float32)
    cast = lambda tree: jax.tree.map(lambda x: x.astype(dtype), tree)
    norm = jax.tree.map(lambda x: x[None, :, None], cast(norm))
    rule = _Rule(cast(token_scale), norm, jax.tree.map(lambda w: w[None], cast(initial)))
    return rule, cast((q, k, v, eta)), state and cast(state)._replace(position=state.position)


def _changes(segment_ids: jax.Array | None) -> jax.Array | None:
    """(B, T) bool: the segment differs from the previous token's."""
    return None if segment_ids is None else jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], [(0, 0), (1, 0)])


# The inner model


def _affine(x: jax.Array, layer: Layer) -> jax.Array:
    return x @ layer.kernel + layer.bias


def _gelu(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=True)


def _normalize(z: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rows of mean zero and variance one, and the factor that made it one."""
    centred = z - jnp.mean(z, -1, keepdims=True)
    factor = jax.lax.rsqrt(jnp.mean(centred**2, -1, keepdims=True) + _EPSILON)
    return centred * factor, factor


def _layer_norm(z: jax.Array, norm: Norm) -> jax.Array:
    return _normalize(z)[0] * norm.scale + norm.shift


def _loss_gradient(z: jax.Array, target: jax.Array, norm: Norm) -> jax.Array:
    """d/dz 1/2 |LN(z) - target|^2."""
    normed, factor = _normalize(z)
    pull = (normed * norm.scale + norm.shift - target) * norm.scale
    return factor * (pull - jnp.mean(pull, -1, keepdims=True) - normed * jnp.mean(pull * normed, -1, keepdims=True))


def _descend(weights: Weights, gradient: Weights, rate: jax.Array) -> Weights:
    """W - rate G, with one rate (B,) for each row."""
    return jax.tree.map(lambda w, g: w - rate[:, None, None, None] * g, weights, gradient)


# Mini-batch by mini-batch


def _stack(tokens, segment_ids: jax.Array | None, state: TTTState | None, size: int) -> tuple[_Chunk, jax.Array | None]:
    """Cut a call into mini-batches, each row moved right by the tokens of its open one; also returns these numbers."""
    batch, time = tokens[0].shape[:2]
    phase = None if state is None else state.position % size
    begun = 0 if state is None else 1  # mini-batches outside the scan
    count = -(-(time + begun * (size - 1)) // size) - begun
    groups = max(1, -(-count // _GROUP))
    count = begun + groups * -(-count // groups)
    q, k, v, eta = (grid.to_chunks(grid.align(x, phase, count * size), size) for x in tokens)
    changes = _changes(segment_ids)
    reset = None if changes is None else grid.align(changes, phase, count * size)[:, ::size].T
    complete = None
    if state is not None or count * size != time:
        end = jnp.full(batch, time) if phase is None else phase + time
        complete = (jnp.arange(count)[:, None] + 1) * size <= end[None]
    return _Chunk(q, k, v, eta, reset, complete), phase


def _scan(step, carry, chunks: _Chunk):
    """Scan over mini-batches; the backward pass keeps the weights of one in `_GROUP`."""
    count = chunks.q.shape[0]
    groups = -(-count // _GROUP)
    if groups <= 1:
        return jax.lax.scan(step, carry, chunks)
    split = jax.tree.map(lambda x: x.reshape(groups, -1, *x.shape[1:]), chunks)
    group = jax.checkpoint(lambda carry, chunks: jax.lax.scan(step, carry, chunks), prevent_cse=False)
    carry, y = jax.lax.scan(group, carry, split)
    return carry, y.reshape(count, *y.shape[2:])


def _step(rule: _Rule, carry: tuple[Weights, Weights], chunk: _Chunk, *, begun: bool = False):
    """One mini-batch: (W_0, G) -> (W_0 of the next, 0), or (W_0, G) where its last token is not known yet; and the outputs.

    `begun` says that G holds gradients of earlier tokens of this mini-batch; else it is zero, or the row's tokens have ended before.
    """
    anchor, gradient = carry
    if chunk.reset is not None:
        anchor = grid.where_rows(chunk.reset, rule.initial, anchor)
    y, new = _dual_form(rule, chunk, anchor, gradient if begun else None)
    last = jnp.broadcast_to(rule.token_scale[-1], chunk.q.shape[:1])
    if chunk.complete is None:
        return (_descend(anchor, new, last), gradient), y
    gradient = jax.tree.map(jnp.add, gradient, new)
    anchor = _descend(anchor, gradient, jnp.where(chunk.complete, last, 0.0))
    return (anchor, grid.where_rows(chunk.complete, jax.tree.map(jnp.zeros_like, gradient), gradient)), y


def _dual_form(rule: _Rule, chunk: _Chunk, anchor: Weights, begun: Weights | None) -> tuple[jax.Array, Weights]:
    """Outputs (B, H, C, D) of a mini-batch, and the sum of its eta_j g_j."""
    inputs, gradients = _gradients(rule, chunk, anchor)
    scale = rule.token_scale[None, None, :, None]
    rates = jnp.tril(scale * chunk.eta[:, :, None])
    z = chunk.q
    for i, (layer, x, g) in enumerate(zip(anchor, inputs, gradients, strict=True)):
        query = _gelu(z) if i else z
        z = _affine(query, layer) - (rates * (query @ x.mT + 1.0)) @ g  # the bias is the weight of a constant input 1
        if begun is not None:
            z -= scale * _affine(query, begun[i])
    weighted = [chunk.eta[..., None] * g for g in gradients]
    new = tuple(Layer(x.mT @ g, g.sum(-2, keepdims=True)) for x, g in zip(inputs, weighted, strict=True))
    return chunk.q + _layer_norm(z, rule.norm), new


def _gradients(rule: _Rule, chunk: _Chunk, anchor: Weights) -> tuple[list[jax.Array], list[jax.Array]]:
    """Each layer's inputs for the keys, and the losses' gradients with respect to its outputs."""
    if len(anchor) == 1:
        return [chunk.k], [_loss_gradient(_affine(chunk.k, anchor[0]), chunk.v - chunk.k, rule.norm)]
    hidden, pull_back = jax.vjp(_gelu, _affine(chunk.k, anchor[0]))
    last = _loss_gradient(_affine(hidden, anchor[1]), chunk.v - chunk.k, rule.norm)
    return [chunk.k, hidden], [*pull_back(last @ anchor[1].kernel.mT), last]
