"""Selective state spaces: decaying memories, one for each channel, whose step, key and read depend on the token (Mamba).

A channel d with input x_t holds N numbers that forget at rates of their own,

    h_t[n, d] = exp(-dt_t[d] rate[n, d]) h_{t-1}[n, d] + dt_t[d] b_t[n] x_t[d],    y_t[d] = sum_n c_t[n] h_t[n, d]

which is Eq. (2a) and (2b) with Algorithm 2, arXiv:2312.00752v2, for A = -rate. Inputs are discretised by the Euler step dt B, as in the
authors' implementation, and not by the second half of Eq. (4).

Einsum letters: b batch, c tokens of a chunk, n state, d channel. The channels come last: there are thousands of them, and of the rest few.
"""

import jax
import jax.numpy as jnp

from nested_jax.memory import grid

_HIGHEST = jax.lax.Precision.HIGHEST


def selective_scan(
    x: jax.Array,
    dt: jax.Array,
    rate: jax.Array,
    b: jax.Array,
    c: jax.Array,
    *,
    state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    chunk_size: int = 32,
) -> tuple[jax.Array, jax.Array]:
    """The recurrence of the module's header, chunk by chunk: tokens of a chunk in a parallel scan over products of decays.

    Decays are multiplied, never divided by, so nothing overflows whatever the steps. The backward pass keeps one state for each chunk and
    computes a chunk's own states anew.

    Args:
        x: (B, T, D) inputs.
        dt: (B, T, D) steps, at least 0. A token with a step of 0 writes nothing.
        rate: (N, D) rates of forgetting, at least 0.
        b: (B, T, N) keys.
        c: (B, T, N) queries.
        state: (B, N, D) what an earlier call returned, or None for zeros.
        segment_ids: (B, T) integers; the state restarts from zeros at each token whose id differs from the token's before.
            The first token of a call continues `state`.
        chunk_size: tokens computed in parallel; does not change the result.

    Returns:
        (B, T, D) y and the last (B, N, D) state, in float32 (float64 for float64 inputs).

    Raises:
        ValueError: for shapes that don't fit one another or a chunk_size below 1.
    """
    _check(x, dt, rate, b, c, state, segment_ids, chunk_size)
    if x.shape[1] == 1:
        return selective_scan_reference(x, dt, rate, b, c, state=state, segment_ids=segment_ids)
    state, rate = _start(x, dt, rate, state)

    def read_and_write(state: jax.Array, tokens: tuple) -> tuple[jax.Array, jax.Array]:
        keep, write, query = _terms(rate, *tokens)
        states = _states(keep, write, state)
        return states[:, -1], jnp.einsum('bcnd,bcn->bcd', states, query, precision=_HIGHEST)

    # Padding has steps of zero: it writes nothing.
    laid = grid.lay_out((x, dt, b, c, _begins(segment_ids)), min(chunk_size, x.shape[1]))
    state, y = jax.lax.scan(jax.checkpoint(read_and_write), state, laid.chunks)
    return grid.gather_outputs(laid, y, x.shape[1]), state


def selective_scan_reference(
    x: jax.Array,
    dt: jax.Array,
    rate: jax.Array,
    b: jax.Array,
    c: jax.Array,
    *,
    state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    chunk_size: int = 32,
) -> tuple[jax.Array, jax.Array]:
    """Token-by-token twin of `selective_scan`: same arguments, results and errors."""
    _check(x, dt, rate, b, c, state, segment_ids, chunk_size)
    state, rate = _start(x, dt, rate, state)

    def step(state: jax.Array, token: tuple) -> tuple[jax.Array, jax.Array]:
        keep, write, query = (term[:, 0] for term in _terms(rate, *token))
        state = keep * state + write
        return state, jnp.einsum('bnd,bn->bd', state, query, precision=_HIGHEST)

    tokens = jax.tree.map(lambda rows: jnp.moveaxis(rows[:, :, None], 1, 0), (x, dt, b, c, _begins(segment_ids)))
    state, y = jax.lax.scan(step, state, tokens)
    return jnp.moveaxis(y, 0, 1), state


def _check(x, dt, rate, b, c, state, segment_ids, chunk_size) -> None:
    if x.ndim != 3 or x.shape[1] < 1:
        raise ValueError(f'x must be (batch, time >= 1, channels), got {x.shape}')
    if rate.ndim != 2 or rate.shape[1] != x.shape[2]:
        raise ValueError(f'rate must be a state size and {x.shape[2]} channels, got {rate.shape}')
    rows, size = x.shape[:2], rate.shape[0]
    expected = {'dt': (dt, x.shape), 'b': (b, (*rows, size)), 'c': (c, (*rows, size))}
    expected |= {'state': (state, (rows[0], *rate.shape)), 'segment_ids': (segment_ids, rows)}
    for name, (array, shape) in expected.items():
        if array is not None and array.shape != shape:
            raise ValueError(f'{name} must have shape {shape}, got {array.shape}')
    if chunk_size < 1:
        raise ValueError(f'chunk_size must be an integer of at least 1, got {chunk_size!r}')


def _start(x: jax.Array, dt: jax.Array, rate: jax.Array, state: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """The first state and the rates in the dtype of states."""
    dtype = jnp.promote_types(jnp.result_type(x, dt), jnp.float32)
    state = jnp.zeros((x.shape[0], *rate.shape), dtype) if state is None else state.astype(dtype)
    return state, rate.astype(dtype)


def _begins(segment_ids: jax.Array | None) -> jax.Array | None:
    """(B, T) whether a segment begins at the token."""
    return None if segment_ids is None else jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))


def _terms(rate: jax.Array, x: jax.Array, dt: jax.Array, b: jax.Array, c: jax.Array, begins: jax.Array | None):
    """Factors on the state, what is added to it, both (B, C, N, D), and the (B, C, N) queries of some tokens."""
    x, dt, b, c = (rows.astype(rate.dtype) for rows in (x, dt, b, c))
    keep = jnp.exp(-dt[:, :, None] * rate[None, None])
    if begins is not None:
        keep = jnp.where(begins[:, :, None, None], 0.0, keep)
    return keep, b[..., None] * (dt * x)[:, :, None], c


@jax.custom_vjp
def _states(keep: jax.Array, write: jax.Array, start: jax.Array) -> jax.Array:
    """States h_t = keep_t h_{t-1} + write_t of a chunk, (B, C, N, D) twice and the (B, N, D) state before it -> (B, C, N, D).

    Its gradient is the same recurrence run backwards. The stock one would keep and reverse every level of the parallel scan.
    """
    first = write[:, :1] + keep[:, :1] * start[:, None]
    return _run(keep, jnp.concatenate([first, write[:, 1:]], 1))


def _states_forward(keep: jax.Array, write: jax.Array, start: jax.Array):
    states = _states(keep, write, start)
    return states, (keep, states, start)


def _states_backward(residuals: tuple, cotangents: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    keep, states, start = residuals
    keep_next = jnp.concatenate([keep[:, 1:], jnp.zeros_like(keep[:, :1])], 1)
    reached = _run(keep_next[:, ::-1], cotangents[:, ::-1])[:, ::-1]  # the gradient with respect to each state
    before = jnp.concatenate([start[:, None], states[:, :-1]], 1)
    return reached * before, reached, keep[:, 0] * reached[:, 0]


_states.defvjp(_states_forward, _states_backward)


def _run(keep: jax.Array, write: jax.Array) -> jax.Array:
    """h_t = keep_t h_{t-1} + write_t from zeros, over axis 1."""
    return jax.lax.associative_scan(_then, (keep, write), axis=1)[1]


def _then(first: tuple[jax.Array, jax.Array], second: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Two spans of tokens, one after the other: (product of the factors, state left of zeros)."""
    return first[0] * second[0], second[0] * first[1] + second[1]
