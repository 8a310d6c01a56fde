"""Deep memory: a two-layer residual MLP per head, written by delta gradient descent with momentum and retention.

    M(x) = x + act(x W_in) W_out                                     (Eq. 89 and 91, arXiv:2512.24695v1, transposed)
    grad_t = d/dM 1/2 |M(k_t) - v_t|^2 at the weights of the chunk's start, the anchor                        (Eq. 90)
                 or of -M(k_t).v_t with objective='dot'
    S_t = beta_t S_{t-1} - eta_t grad_t                              (momentum, Eq. 9-10, arXiv:2501.00663v1)
    W_t = alpha_t W_{t-1} - epsilon_t x_t^T (x_t W_{t-1}) + S_t      (delta gradient descent, Eq. 57 and 88)

where x_t is the layer's own input at the anchor: the key for W_in, the hidden activation h_t = act(k_t W_in) for W_out. The
norm of h_t is not one, so the rates of W_out are those of Eq. 57 for any norm: eta / (1 + epsilon |h|^2) and
epsilon / (1 + epsilon |h|^2). `mlp_memory` computes a chunk in closed form (`chunk.py`); `mlp_memory_reference` is the loop.

A sequence is cut into chunks of `chunk_size` positions, counted from its start. A state may be handed on at any position: it
keeps the anchor of the open chunk. Tokens marked as not valid take a position and change nothing.

Einsum letters and axes: b batch, t time, h head, n chunks, c chunk, k key dim, v value dim. Inside, arrays are head-first,
(b, h, c, dim), and stacked over chunks, (n, b, h, c, dim). Everything is float32, or float64 for float64 inputs.
"""

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from nested_jax.memory import chunk as chunks
from nested_jax.memory import grid

ACTIVATIONS = {
    'silu': jax.nn.silu,
    'gelu': lambda x: jax.nn.gelu(x, approximate=True),
    'gelu_exact': lambda x: jax.nn.gelu(x, approximate=False),
}


class MLPWeights(NamedTuple):
    """Weights of one memory, with any leading axes; inputs are rows."""

    w_in: jax.Array  # (..., D_in, F)   the paper's W_2 transposed
    w_out: jax.Array  # (..., F, D_out)  the paper's W_1 transposed


class MLPState(NamedTuple):
    """What `mlp_memory` carries between calls. Float32, or float64 for float64 inputs."""

    running: MLPWeights  # (B, H, ...) weights after the last token
    momentum: MLPWeights | None  # (B, H, ...) S after the last token; None without momentum
    anchor: MLPWeights  # (B, H, ...) weights at the start of the open chunk
    position: jax.Array  # (B,) int32 number of tokens so far; modulo chunk_size: tokens of the open chunk


class _Options(NamedTuple):
    """The choices that shape the program."""

    activation: str
    dgd: str
    read: str
    decay_to: str
    residual: bool
    objective: str
    chunk_size: int
    aligned: bool


class _Inputs(NamedTuple):
    """The arrays of a call, as given."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    eta: jax.Array
    log_alpha: jax.Array
    log_momentum: jax.Array | None
    erase: jax.Array | None
    damping: jax.Array | None
    initial: MLPWeights
    state: MLPState | None
    segment_ids: jax.Array | None
    valid: jax.Array | None
    lengths: jax.Array | None


class _Gates(NamedTuple):
    """Per-token scalars in the memory's dtype; a null token has zeros."""

    eta: jax.Array  # (B, T, H)
    log_alpha: jax.Array  # (B, T, H)
    log_momentum: jax.Array | None  # (B, T, H)
    erase: jax.Array | None  # (B, T, H)
    damping: jax.Array | None  # (B, T, H)
    push: jax.Array  # (B, T, 1) 1 for a token, 0 for a null token
    moves: jax.Array  # (B, T) int32: 1 for a token that takes a place on the grid, 0 past its row's length
    changed: jax.Array | None  # (B, T) bool: the segment differs from the previous token's; None without segments


def mlp_read(weights: MLPWeights, x: jax.Array, *, activation: str = 'silu', residual: bool = True) -> jax.Array:
    """Apply the memory: M(x) = x + act(x W_in) W_out. Eq. (89) and (91), arXiv:2512.24695v1.

    Args:
        weights: `MLPWeights` with leading axes (...).
        x: rows (..., C, D_in) with the same leading axes, or one row (D_in,) for weights without any.
        activation: a key of `ACTIVATIONS`.
        residual: without it, the first term is left out.

    Returns:
        (..., C, D_out).
    """
    y = ACTIVATIONS[activation](x @ weights.w_in) @ weights.w_out
    return x + y if residual else y


def mlp_initial_state(initial: MLPWeights, batch_size: int, *, momentum: bool) -> MLPState:
    """State of `batch_size` sequences before their first token.

    Args:
        initial: weights (H, D_in, F) and (H, F, D_out).
        batch_size: number of rows.
        momentum: whether the memory is called with `log_momentum`.

    Returns:
        `MLPState`, float32 or wider.
    """
    start = jax.tree.map(lambda w: _repeat(w.astype(jnp.promote_types(w.dtype, jnp.float32)), batch_size), initial)
    return MLPState(start, jax.tree.map(jnp.zeros_like, start) if momentum else None, start, jnp.zeros(batch_size, jnp.int32))


def mlp_memory(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    eta: jax.Array,
    log_alpha: jax.Array,
    log_momentum: jax.Array | None = None,
    *,
    erase: jax.Array | None = None,
    damping: jax.Array | None = None,
    initial: MLPWeights,
    state: MLPState | None = None,
    segment_ids: jax.Array | None = None,
    valid: jax.Array | None = None,
    lengths: jax.Array | None = None,
    chunk_size: int = 16,
    activation: Literal['silu', 'gelu', 'gelu_exact'] = 'silu',
    dgd: Literal['per_layer', 'input_only', 'none'] = 'per_layer',
    read: Literal['running', 'anchor'] = 'running',
    decay_to: Literal['zero', 'init'] = 'zero',
    residual: bool = True,
    objective: Literal['l2', 'dot'] = 'l2',
    aligned: bool = False,
) -> tuple[jax.Array, MLPState]:
    """Write and read a deep memory, in parallel inside each chunk. Eq. (88)-(91) and (57), arXiv:2512.24695v1.

    Bounded for |k| = 1 if, per token, eta <= (1 + alpha) / 2 with one-token chunks and DGD, and if the sum of eta over a chunk
    stays below about 1 without DGD (less with momentum).

    Args:
        q, k, v: (B, T, H, D_in) queries, used as they are, and keys, (B, T, H, D_out) targets; D_out = D_in with `residual`.
        eta, log_alpha: (B, T, H) inner learning rate, and log of the retention, at most 0; -inf wipes the memory.
        log_momentum: (B, T, H) log of the momentum beta, or None for S_t = -eta_t grad_t.
        erase: (B, T, H) rate epsilon of DGD's erasure, of W_out over 1 + epsilon |h|^2; `eta` when None.
        damping: (B, T, H) rates d, or None for rates as given: eta is divided by 1 + d |act'(z) W_out|^2 for W_in, and with W_out's
            erasure by 1 + d |h|^2 for W_out, so that no step overshoots. Eta, times chunk_size where nothing is erased, is enough.
        initial: weights (H, D_in, F) and (H, F, D_out) every sequence and every segment starts from.
        state: of an earlier call with the same options; None starts new sequences.
        segment_ids: (B, T) integers. A change at a chunk's first position resets weights and momentum; documents start on the chunk
            grid. The first token of a call with a state continues the state's document.
        valid: (B, T) bool, True when None. Tokens that are not valid change nothing (eta = 0 and alpha = 1 alone would add S once more),
            but take a place on the grid. Padding that takes none follows the `lengths`, (B,) int32, of each row; None: T.
        chunk_size: positions between two anchors; `aligned` promises that each row of `state` stands at one, to save moving rows.
        dgd: which layers are erased: 'per_layer' both, W_out with normalised rates; 'input_only' W_in; 'none' (Titans).
        read: 'running' reads q_t from M_t, its own token included; 'anchor' from the chunk's first weights (Eq. 90).
        decay_to, activation, residual: what retention decays to; of the hidden layer ('gelu' by tanh); whether M has the identity term.
        objective: 'l2' is 1/2 |M(k) - v|^2; 'dot' is -M(k).v, whose steps do not shrink near the target: retention alone bounds it.

    Returns:
        y (B, T, H, D_out) in v's dtype, and the `MLPState` after the last token.

    Raises:
        ValueError: for an unknown choice, or shapes that do not fit.
    """
    options = _Options(activation, dgd, read, decay_to, residual, objective, chunk_size, aligned)
    inputs = _Inputs(q, k, v, eta, log_alpha, log_momentum, erase, damping, initial, state, segment_ids, valid, lengths)
    _check(options, inputs)
    run = _run_tokens if 4 * q.shape[1] <= chunk_size else _run_chunks  # a few tokens are not worth a whole chunk
    y, state = run(options, *_prepare(options, inputs))
    return y.astype(v.dtype), state


def mlp_memory_reference(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    eta: jax.Array,
    log_alpha: jax.Array,
    log_momentum: jax.Array | None = None,
    *,
    erase: jax.Array | None = None,
    damping: jax.Array | None = None,
    initial: MLPWeights,
    state: MLPState | None = None,
    segment_ids: jax.Array | None = None,
    valid: jax.Array | None = None,
    lengths: jax.Array | None = None,
    chunk_size: int = 16,
    activation: Literal['silu', 'gelu', 'gelu_exact'] = 'silu',
    dgd: Literal['per_layer', 'input_only', 'none'] = 'per_layer',
    read: Literal['running', 'anchor'] = 'running',
    decay_to: Literal['zero', 'init'] = 'zero',
    residual: bool = True,
    objective: Literal['l2', 'dot'] = 'l2',
    aligned: bool = False,
) -> tuple[jax.Array, MLPState]:
    """`mlp_memory` as a loop over tokens, gradients by `jax.grad`. Same arguments, results, errors and chunk grid."""
    options = _Options(activation, dgd, read, decay_to, residual, objective, chunk_size, aligned)
    inputs = _Inputs(q, k, v, eta, log_alpha, log_momentum, erase, damping, initial, state, segment_ids, valid, lengths)
    _check(options, inputs)
    y, state = _run_tokens(options, *_prepare(options, inputs))
    return y.astype(v.dtype), state


# Arguments


def _check(options: _Options, inputs: _Inputs) -> None:
    _check_options(options)
    q, v, initial, state = inputs.q, inputs.v, inputs.initial, inputs.state
    if q.ndim != 4 or 0 in q.shape:
        raise ValueError(f'q has shape {q.shape}: expected (batch, time, heads, dim), none of them 0')
    batch, time, heads, width = q.shape
    _check_shape('k', inputs.k, q.shape)
    _check_shape('v', v, (batch, time, heads, v.shape[-1] if v.ndim == 4 else 'D_out'))
    for name in ('eta', 'log_alpha', 'log_momentum', 'erase', 'damping'):
        _check_shape(name, getattr(inputs, name), (batch, time, heads))
    for name in ('segment_ids', 'valid'):
        _check_shape(name, getattr(inputs, name), (batch, time))
    hidden = initial.w_in.shape[-1]
    _check_shape('lengths', inputs.lengths, (batch,))
    _check_shape('initial.w_in', initial.w_in, (heads, width, hidden))
    _check_shape('initial.w_out', initial.w_out, (heads, hidden, v.shape[-1]))
    if options.residual and v.shape[-1] != width:
        raise ValueError(f'v has dim {v.shape[-1]}: with residual=True it has to be that of q and k, {width}')
    if inputs.erase is not None and options.dgd == 'none':
        raise ValueError("erase is given with dgd='none': nothing is erased then; pass None, or another dgd")
    if inputs.valid is not None and inputs.valid.dtype != bool:
        raise ValueError(f'valid has dtype {inputs.valid.dtype}: expected bool')
    if state is not None:
        _check_state(state, initial, batch, inputs.log_momentum is not None)


def _check_state(state: MLPState, initial: MLPWeights, batch: int, momentum: bool) -> None:
    if (state.momentum is not None) != momentum:
        raise ValueError('state.momentum and log_momentum have to be both given or both None')
    for name in ('running', 'anchor') + (('momentum',) if momentum else ()):
        for field, weight in getattr(state, name)._asdict().items():
            _check_shape(f'state.{name}.{field}', weight, (batch, *getattr(initial, field).shape))
    _check_shape('state.position', state.position, (batch,))


def _check_options(options: _Options) -> None:
    choices = {
        'activation': tuple(ACTIVATIONS),
        'dgd': ('per_layer', 'input_only', 'none'),
        'read': ('running', 'anchor'),
        'decay_to': ('zero', 'init'),
        'objective': ('l2', 'dot'),
    }
    for name, allowed in choices.items():
        if getattr(options, name) not in allowed:
            raise ValueError(f'{name} is {getattr(options, name)!r}: allowed are {allowed}')
    if not isinstance(options.chunk_size, int) or options.chunk_size < 1:
        raise ValueError(f'chunk_size is {options.chunk_size!r}: expected an integer of at least 1')


def _check_shape(name: str, array: jax.Array | None, shape: tuple) -> None:
    if array is not None and array.shape != shape:
        raise ValueError(f'{name} has shape {array.shape}: expected {shape}')


def _prepare(options: _Options, inputs: _Inputs):
    """Cast to the memory's dtype, and turn tokens that are not valid into null tokens."""
    dtype = jnp.promote_types(jnp.result_type(inputs.q, inputs.k, inputs.v), jnp.float32)

    def cast(tree):
        return jax.tree.map(lambda x: x.astype(dtype), tree)

    q, k, v, initial, state, segment_ids, valid, lengths = inputs[:3] + inputs[8:]
    gates = cast(inputs[3:8])
    if options.dgd != 'none' and inputs.erase is None:
        gates = (*gates[:3], gates[0], gates[4])
    push = jnp.ones((*q.shape[:2], 1), dtype)
    moves = jnp.ones(q.shape[:2], jnp.int32)
    if lengths is not None:
        inside = jnp.arange(q.shape[1])[None] < lengths[:, None]
        moves, valid = inside.astype(jnp.int32), inside if valid is None else inside & valid
    if valid is not None:
        gates = jax.tree.map(lambda gate: jnp.where(valid[:, :, None], gate, 0.0), gates)
        push = valid.astype(dtype)[:, :, None]
    changed = None if segment_ids is None else jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], [(0, 0), (1, 0)])
    state = state and cast(state)._replace(position=state.position)
    return cast(q), cast(k), cast(v), _Gates(*gates, push, moves, changed), cast(initial), state


def _repeat(weight: jax.Array, batch_size: int) -> jax.Array:
    return jnp.broadcast_to(weight[None], (batch_size, *weight.shape))


def _select(flag: jax.Array, new: MLPWeights, old: MLPWeights) -> MLPWeights:
    """`new` in the rows whose flag (B,) is set, else `old`; both with a leading batch axis (1 for shared weights)."""
    return jax.tree.map(lambda a, b: jnp.where(flag[:, None, None, None], a, b), new, old)


# Token by token


def _run_tokens(options, q, k, v, gates, initial, state):
    """Loop over tokens; also the cheaper way for a few of them."""
    if state is None:
        state = mlp_initial_state(initial, q.shape[0], momentum=gates.log_momentum is not None)
    shared = jax.tree.map(lambda w: w[None], initial)
    write = jax.vmap(jax.vmap(_write_token, (None, *[0] * 12)), (None, None, *[0] * 11))
    look = jax.vmap(jax.vmap(lambda weights, x: mlp_read(weights, x, activation=options.activation, residual=options.residual)))

    def step(state: MLPState, token):
        query, key, value, gate = token
        first = state.position % options.chunk_size == 0
        reset = None if gate.changed is None else gate.changed & first
        running, momentum = _reset(reset, shared, state.running, state.momentum)
        anchor = _select(first, running, state.anchor)
        push = jnp.broadcast_to(gate.push, gate.eta.shape)
        running, momentum = write(
            options,
            initial,
            anchor,
            running,
            momentum,
            key,
            value,
            gate.eta,
            gate.log_alpha,
            gate.log_momentum,
            gate.erase,
            gate.damping,
            push,
        )
        return MLPState(running, momentum, anchor, state.position + gate.moves), look(
            anchor if options.read == 'anchor' else running, query
        )

    tokens = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (q, k, v, gates))
    state, y = jax.lax.scan(step, state, tokens)
    return jnp.moveaxis(y, 0, 1), _close(options, state)


def _write_token(options, initial, anchor, running, momentum, key, value, eta, log_alpha, log_momentum, erase, damping, push):
    """One token's write to one head's memory, without batch and head axes. Returns the weights and the momentum."""

    def objective(weights: MLPWeights) -> jax.Array:
        output = mlp_read(weights, key, activation=options.activation, residual=options.residual)
        return -jnp.sum(output * value) if options.objective == 'dot' else 0.5 * jnp.sum((output - value) ** 2)

    to_hidden = key @ anchor.w_in
    hidden, slope = jax.jvp(ACTIVATIONS[options.activation], (to_hidden,), (jnp.ones_like(to_hidden),))
    shrink_in, shrink_out = (factor[0] for factor in _shrink(options, erase, damping, hidden[None], slope[None], anchor.w_out))
    erased = {'per_layer': (True, True), 'input_only': (True, False), 'none': (False, False)}[options.dgd]
    parts = zip(
        (key, hidden),
        jax.grad(objective)(anchor),
        (shrink_in, shrink_out),
        (1.0, shrink_out),
        erased,
        running,
        momentum or running,
        initial,
        strict=True,
    )
    written = [
        _write_layer(options, x, grad, eta * factor, erase * shrink if on else None, log_alpha, log_momentum, push, weight, last, start)
        for x, grad, factor, shrink, on, weight, last, start in parts
    ]
    weights, momenta = (MLPWeights(*pair) for pair in zip(*written, strict=True))
    return weights, None if momentum is None else momenta


def _shrink(options, erase, damping, hidden, slope, w_out) -> tuple[jax.Array, jax.Array]:
    """Factors (..., C) of the rates of W_in and W_out, from rows (..., C, F) of hidden units and the activation's slope."""
    inputs = jnp.sum(hidden**2, -1)
    if damping is not None:
        outputs = jnp.sum(slope**2 * jnp.sum(w_out**2, -1)[..., None, :], -1)
        return 1.0 / (1.0 + damping * outputs), 1.0 / (1.0 + damping * inputs)
    one = jnp.ones_like(inputs)
    return one, 1.0 / (1.0 + erase * inputs) if options.dgd == 'per_layer' else one


def _write_layer(options, x, grad, eta, erase, log_alpha, log_momentum, push, weight, momentum, initial):
    """W_t = alpha W + (1 - alpha) rest - epsilon x^T (x W) + push S_t, with S_t = beta S - eta grad. Returns W_t and S_t."""
    alpha = jnp.exp(log_alpha)
    momentum = -eta * grad + (0.0 if log_momentum is None else jnp.exp(log_momentum) * momentum)
    new = alpha * weight + push * momentum
    if options.decay_to == 'init':
        new += (1.0 - alpha) * initial
    if erase is not None:
        new -= erase * jnp.outer(x, x @ weight)
    return new, momentum


def _close(options: _Options, state: MLPState) -> MLPState:
    """When the last token ended a chunk, the next chunk's anchor is known already."""
    return state._replace(anchor=_select(state.position % options.chunk_size == 0, state.running, state.anchor))


# Chunk by chunk


class _Chunk(NamedTuple):
    """What one chunk of the scan reads, stacked over chunks before it; everything that does not need the weights."""

    q: jax.Array  # (B, H, C, D_in)
    k: jax.Array  # (B, H, C, D_in)
    v: jax.Array  # (B, H, C, D_out)
    eta: jax.Array  # (B, H, C)
    erase: jax.Array | None  # (B, H, C)
    damping: jax.Array | None  # (B, H, C)
    decays: chunks.ChunkDecays
    gram: jax.Array | None  # (B, H, C, C) of the keys, and the inverse of their erasures; None without DGD
    inverse: jax.Array | None
    overlap: jax.Array | None  # (B, H, C, C) of queries and keys; None when the anchor is read
    reset: jax.Array | None  # (B,) bool: a new segment starts here; None without segments


def _run_chunks(options, q, k, v, gates, initial, state):
    """Scan over chunks. With a state that isn't aligned, each row is moved right, so that its open chunk fills up first."""
    batch, time, size = *q.shape[:2], options.chunk_size
    phase = None if state is None or options.aligned else state.position % size
    slots = -(-(time if phase is None else time + size - 1) // size) * size
    lengths = gates.moves.sum(1, dtype=jnp.int32)
    q, k, v, gates = jax.tree.map(lambda x: grid.align(x, phase, slots), (q, k, v, gates))
    stacked = _stack_chunks(options, q, k, v, gates)
    shared = jax.tree.map(lambda w: w[None], initial)
    end = lengths if phase is None else phase + lengths

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def run_chunk(item, running, momentum, anchor=None):
        return _run_chunk(options, item, running, momentum, anchor, shared if options.decay_to == 'init' else MLPWeights(None, None))

    def step(carry: MLPState, item: _Chunk):
        running, momentum = _reset(item.reset, shared, carry.running, carry.momentum)
        # Chunks after a row's last token hold null tokens only: the one before is the open chunk.
        anchor = _select(carry.position < end, running, carry.anchor)
        y, running, momentum = run_chunk(item, running, momentum)
        return MLPState(running, momentum, anchor, carry.position + size), y

    if phase is None:
        before = mlp_initial_state(initial, batch, momentum=gates.log_momentum is not None) if state is None else state
        carry, y = jax.lax.scan(step, before._replace(position=jnp.zeros_like(before.position)), stacked)
        return grid.from_chunks(y, None, time), _close(options, carry._replace(position=before.position + lengths))
    # The first chunk is the only one whose anchor is not the weights it starts with.
    anchor = _select(phase == 0, state.running, state.anchor)
    y_first, running, momentum = run_chunk(jax.tree.map(lambda x: x[0], stacked), state.running, state.momentum, anchor)
    carry = MLPState(running, momentum, anchor, jnp.full_like(state.position, size))
    carry, y = jax.lax.scan(step, carry, jax.tree.map(lambda x: x[1:], stacked))
    y = grid.from_chunks(jnp.concatenate([y_first[None], y]), phase, time)
    return y, _close(options, carry._replace(position=state.position + lengths))


def _run_chunk(options, item, running, momentum, anchor, rest):
    """One chunk of all heads. Returns its outputs (B, H, C, D_out), and weights and momentum after it."""
    start = running if anchor is None else anchor
    momentum_in, momentum_out = momentum or (None, None)
    activate = ACTIVATIONS[options.activation]
    to_hidden = item.k @ start.w_in
    hidden, pull_back = jax.vjp(activate, to_hidden)
    output = hidden @ start.w_out
    error_out = -item.v if options.objective == 'dot' else output - item.v + (item.k if options.residual else 0.0)
    (error_in,) = pull_back(error_out @ start.w_out.mT)
    (slope,) = pull_back(jnp.ones_like(hidden))
    shrink_in, shrink_out = _shrink(options, item.erase, item.damping, hidden, slope, start.w_out)
    erase_out = item.erase * shrink_out if options.dgd == 'per_layer' else None
    # Rows that the erasures would compute again, if the weights are those of the anchor.
    known = (to_hidden, output) if anchor is None else (None, None)

    layer_in = item.decays, chunks.layer_writes(
        item.decays, item.k, error_in, item.eta * shrink_in, running.w_in, momentum_in,
        erase=item.erase, inverse=item.inverse, gram=item.gram, outputs=known[0], rest=rest.w_in,
    )  # fmt: skip
    layer_out = (
        item.decays,
        chunks.layer_writes(
            item.decays,
            hidden,
            error_out,
            item.eta * shrink_out,
            running.w_out,
            momentum_out,
            erase=erase_out,
            outputs=known[1],
            rest=rest.w_out,
        ),
    )
    if options.read == 'anchor':
        y = mlp_read(start, item.q, activation=options.activation, residual=options.residual)
    else:
        read_hidden = activate(chunks.read_running(*layer_in, item.q, running.w_in, momentum_in, overlap=item.overlap, rest=rest.w_in))
        y = chunks.read_running(*layer_out, read_hidden, running.w_out, momentum_out, rest=rest.w_out)
        y = item.q + y if options.residual else y
    new_in, momentum_in = chunks.weight_after(*layer_in, running.w_in, momentum_in, rest=rest.w_in)
    new_out, momentum_out = chunks.weight_after(*layer_out, running.w_out, momentum_out, rest=rest.w_out)
    return y, MLPWeights(new_in, new_out), None if momentum is None else MLPWeights(momentum_in, momentum_out)


def _reset(flag, initial, running, momentum):
    """Initial weights and no momentum in the rows whose flag (B,) is set."""
    if flag is None:
        return running, momentum
    return _select(flag, initial, running), momentum and _select(flag, jax.tree.map(jnp.zeros_like, initial), momentum)


def _stack_chunks(options, q, k, v, gates: _Gates) -> _Chunk:
    """Cut (B, slots, H, ...) into chunks, and compute for all at once what needs no weights."""

    cut = lambda x: grid.to_chunks(x, options.chunk_size)
    q, k, v = cut(q), cut(k), cut(v)
    eta, log_alpha, log_momentum, erase, damping, push = (None if x is None else cut(x) for x in gates[:6])
    decays = chunks.chunk_decays(log_alpha, log_momentum, push)
    gram = None if erase is None else chunks.overlaps(k, k)
    inverse = None if erase is None else chunks.erasure_inverse(decays, gram, erase)
    overlap = None if options.read == 'anchor' else chunks.overlaps(q, k)
    reset = None if gates.changed is None else gates.changed[:, :: options.chunk_size].T
    return _Chunk(q, k, v, eta, erase, damping, decays, gram, inverse, overlap, reset)
