"""Long short-term memory: a vector that gates keep, write and read, the standard cell with a forget gate.

    i, f, o = sigmoid(.),  g = tanh(.)    of    x_t U + h_{t-1} V + bias
    c_t = f c_{t-1} + i g,    h_t = o tanh(c_t)

(Hochreiter and Schmidhuber, 1997, with the forget gate of Gers et al., 2000.) The gates depend on h_{t-1} through nonlinearities: no
chunk-parallel form, tokens are read one after another.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from nested_jax.memory.grid import where_rows

GATES = 4  # input i, forget f, candidate g, output o


class LSTMState(NamedTuple):
    """After the last token; zeros before the first."""

    memory: jax.Array  # (B, D) c
    hidden: jax.Array  # (B, D) h


def lstm(
    preactivations: jax.Array,
    recurrent: jax.Array,
    *,
    state: LSTMState | None = None,
    segment_ids: jax.Array | None = None,
    valid: jax.Array | None = None,
) -> tuple[jax.Array, LSTMState]:
    """The recurrence of the module's header.

    Args:
        preactivations: (B, T, 4 D) x_t U + bias, in the order i, f, g, o.
        recurrent: (D, 4 D) V.
        state: what an earlier call returned, or None for zeros.
        segment_ids: (B, T) integers; the state restarts from zeros at each token whose id differs from the token's before.
            The first token of a call continues `state`.
        valid: (B, T) bool, False for tokens that read and write nothing: their output is o tanh(c_{t-1}). Default all write.

    Returns:
        (B, T, D) h_t and the last state, in the dtype of `preactivations`.

    Raises:
        ValueError: for shapes that don't fit one another.
    """
    batch, length, width = preactivations.shape
    if recurrent.shape != (width // GATES, width):
        raise ValueError(f'recurrent must have shape {(width // GATES, width)}, got {recurrent.shape}')
    if state is None:
        state = LSTMState(*(jnp.zeros((batch, width // GATES), preactivations.dtype) for _ in LSTMState._fields))
    begins = jnp.zeros((batch, length), bool)
    if segment_ids is not None:
        begins = begins.at[:, 1:].set(segment_ids[:, 1:] != segment_ids[:, :-1])
    writes = jnp.ones((batch, length), bool) if valid is None else valid

    def step(state: LSTMState, token: tuple) -> tuple[LSTMState, jax.Array]:
        inputs, begins, writes = token
        state = where_rows(begins, jax.tree.map(jnp.zeros_like, state), state)
        gates = inputs + jnp.matmul(state.hidden, recurrent, precision=jax.lax.Precision.HIGHEST)
        write, keep, candidate, read = jnp.split(gates, GATES, axis=-1)
        memory = jax.nn.sigmoid(keep) * state.memory + jax.nn.sigmoid(write) * jnp.tanh(candidate)
        memory = where_rows(writes, memory, state.memory)
        hidden = jax.nn.sigmoid(read) * jnp.tanh(memory)
        return LSTMState(memory, where_rows(writes, hidden, state.hidden)), hidden

    state, hidden = jax.lax.scan(step, state, jax.tree.map(lambda rows: jnp.moveaxis(rows, 1, 0), (preactivations, begins, writes)))
    return jnp.moveaxis(hidden, 0, 1), state
