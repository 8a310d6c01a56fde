"""Titans' memory as context of attention (MAC): Sec. 4.1, arXiv:2501.00663v1.

The sequence is cut into segments of C = `attention.segment` tokens. For a segment S, with M before it and persistent tokens P:

    h_t = M*(q(S_t))                      read from the memory of the earlier segments, never of this one           (Eq. 21)
    y_t = Attn([P; h; S])_t               t sees P, h_j and S_j for j <= t                                          (Eq. 22-23)
    M_t = M_{t-1} written with y_t        token by token, gradients at the memory's own chunks' starts              (Eq. 24)
    o_t = norm(y_t) * silu(norm(M_t*(q(y_t))))                                                                      (Eq. 25)

Where the paper's equations leave a choice, or would look ahead:
- h is read with the segment's own tokens, so h_j of j > t would tell t of later tokens: h_j is seen from token j on.
- The paper reads o from the memory after the whole segment, which holds later tokens too: here from M_t, token t included.
- M* takes its queries by one projection, the memory's own, of S and of y alike. h is normed per head, to be of the size of S and P, and
  goes through the projections of attention's keys and values as S does, at the C positions in front of S.
- y is normed per head before it is written, read and gated, so that no scale is lost to the memory's unit keys.
- P has no position, see `attention.py`, and is not written into the memory, whose learned initial weights stand for that.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from nested_jax.config import ModelConfig
from nested_jax.layers.attention import Persistent, attend, persistent_memory, persistent_tokens, rotate
from nested_jax.layers.common import CONVOLUTION_WIDTH, Context, Projection, RMSNorm, split_heads
from nested_jax.layers.memory_block import MemoryBlock, initial_mlp
from nested_jax.layers.titans import TITANS_GATES, write_and_read
from nested_jax.memory import grid
from nested_jax.memory.mlp import MLPState, MLPWeights, mlp_initial_state, mlp_read


class ContextState(NamedTuple):
    """What one layer carries from call to call. The open segment's tokens lie at their places in it; the rest is of no meaning."""

    memory: MLPState
    memory_before: MLPWeights  # (B, H, ...) at the open segment's start
    key: jax.Array  # (B, C, 2, H_kv, D) compute dtype, rotated: of h_t and of S_t
    value: jax.Array  # (B, C, 2, H_kv, D) compute dtype
    query_convolution: jax.Array  # (B, 3, H * D) inputs of the convolution of the queries of S
    convolution: tuple[jax.Array, ...]  # (B, 3, H * D) inputs of the convolutions of q, k and v of y


class _Piece(NamedTuple):
    """Tokens of one segment, (B, L, ...)."""

    query: jax.Array  # (B, L, H, D) attention's, not rotated
    key: jax.Array  # (B, L, H_kv, D)
    value: jax.Array  # (B, L, H_kv, D)
    memory_query: jax.Array  # (B, L, H, D) of S
    changed: jax.Array | None  # (B, L) bool: a document begins; None without documents


class MemoryAsContext(nn.Module):
    """Token mixer MAC; documents start on segments."""

    config: ModelConfig

    def setup(self):
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        inner = config.num_kv_heads * config.head_dim
        self.query, self.key, self.value = (Projection(size, dtype) for size in (config.width, inner, inner))
        self.block = MemoryBlock(config, gates=TITANS_GATES, gated=False)
        self.heads_norm_read, self.heads_norm_attention, self.heads_norm_memory = (RMSNorm(config.norm_epsilon) for _ in range(3))
        self.output = Projection(config.width, dtype, scale=(2 * config.num_layers) ** -0.5)
        wide = jnp.promote_types(dtype, jnp.float32)
        self.initial = jax.tree.map(lambda weight: weight.astype(wide), initial_mlp(self, config))
        self.persistent = None if config.attention.num_persistent is None else persistent_tokens(self, config)

    def __call__(self, x: jax.Array, state: ContextState | None, context: Context) -> tuple[jax.Array, ContextState]:
        """(B, T, width) -> (B, T, width), and the state after the call's last token."""
        before = self._first_state(x.shape[0]) if state is None else self._begun(state, context)
        heads = {'query': self.config.num_heads, 'key': self.config.num_kv_heads, 'value': self.config.num_kv_heads}
        rows = (split_heads(getattr(self, name)(x), n) for name, n in heads.items())
        memory_query, query_convolution = self.block.queries(x, before.query_convolution, context)
        changed = None
        if context.segment_ids is not None:
            changed = jnp.pad(context.segment_ids[:, 1:] != context.segment_ids[:, :-1], ((0, 0), (1, 0)))
        piece = _Piece(*rows, memory_query, changed)
        pieces = grid.cut_pieces(piece, self.config.attention.segment, None if state is None else context.position)
        scan = nn.scan(
            lambda module, carry, part: module._read_piece(carry, *part, update=context.update),
            variable_broadcast='params', split_rngs={'params': False},
        )  # fmt: skip
        after, y = scan(self, before, (pieces.rows, pieces.phase, pieces.lengths))
        y = self.output(grid.join_pieces(pieces, y, x.shape[1]).reshape(*x.shape[:2], -1))
        return y, after._replace(query_convolution=query_convolution) if context.update else state

    def _read_piece(self, state: ContextState, piece: _Piece, phase, lengths, *, update: bool) -> tuple[ContextState, jax.Array]:
        """One piece of a segment: the state after it, and its gated outputs (B, L, H, D)."""
        if piece.changed is not None:
            state = self._reset(state, piece.changed[:, 0] if lengths is None else piece.changed[:, 0] & (lengths > 0))
        memory_before = state.memory.running
        if phase is not None:
            memory_before = grid.where_rows((phase == 0) & (lengths > 0), memory_before, state.memory_before)
        y, key, value = self._attend(state, memory_before, piece, phase)
        y = self.heads_norm_attention(y)
        context = Context(None, None, update)
        inputs = self.block.inputs(y.reshape(*y.shape[:2], -1), state.convolution, context, lengths)
        read, memory = write_and_read(
            self.config, inputs, self.initial, state.memory, update, lengths=lengths, aligned=phase is None
        )  # fmt: skip
        y *= jax.nn.silu(self.heads_norm_memory(read))
        return ContextState(memory, memory_before, key, value, state.query_convolution, inputs.convolution), y

    def _attend(self, state: ContextState, memory_before: MLPWeights, piece: _Piece, phase) -> tuple[jax.Array, jax.Array, jax.Array]:
        """What the piece's queries see of P, h and S, (B, L, H, D), and the segment's keys and values with the piece's."""
        config, size = self.config, self.config.attention.segment
        batch, columns = piece.query.shape[:2]
        place = jnp.broadcast_to(jnp.arange(columns)[None], (batch, columns))
        place = place if phase is None else place + phase[:, None]
        read = mlp_read(memory_before, jnp.swapaxes(piece.memory_query, 1, 2), residual=False)
        read = self.heads_norm_read(jnp.swapaxes(read, 1, 2)).reshape(batch, columns, -1)
        turn = lambda rows, position: rotate(rows, position, config.attention.rope_theta)
        split = lambda rows: split_heads(rows, config.num_kv_heads)
        key = jnp.stack([turn(split(self.key(read)), place - size), turn(piece.key, place)], 2)
        value = jnp.stack([split(self.value(read)), piece.value], 2)
        key, value = _placed(state.key, key, phase), _placed(state.value, value, phase)
        visible = jnp.repeat(jnp.arange(key.shape[1])[None, None] <= place[:, :, None], 2, axis=2)
        flat = lambda rows: rows.reshape(batch, -1, *rows.shape[3:])
        # Scores take more room than anything else here, and little work to find again.
        y = jax.checkpoint(attend)(turn(piece.query, place), flat(key), flat(value), visible, self._seen(piece.query))
        return y, _filled(key, size), _filled(value, size)

    def _seen(self, query: jax.Array) -> Persistent | None:
        if self.persistent is None:
            return None
        key, value = (split_heads(project(self.persistent), self.config.num_kv_heads) for project in (self.key, self.value))
        return persistent_memory(query, key, value)

    def _first_state(self, batch: int) -> ContextState:
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        memory = mlp_initial_state(self.initial, batch, momentum=True)
        rows = jnp.zeros((batch, config.attention.segment, 2, config.num_kv_heads, config.head_dim), dtype)
        convolution = jnp.zeros((batch, CONVOLUTION_WIDTH - 1, config.width), dtype)
        return ContextState(memory, memory.running, rows, rows, convolution, (convolution,) * 3)

    def _begun(self, state: ContextState, context: Context) -> ContextState:
        """The state given, whose memory is all zeros before a document's first token."""
        start = mlp_initial_state(self.initial, state.key.shape[0], momentum=True)
        return state._replace(memory=grid.where_rows(context.position == 0, start, state.memory))

    def _reset(self, state: ContextState, flags: jax.Array) -> ContextState:
        """A new document in the rows whose flag (B,) is set."""
        start = mlp_initial_state(self.initial, flags.shape[0], momentum=True)._replace(position=state.memory.position)
        nothing = jax.tree.map(jnp.zeros_like, state.convolution)
        memory, convolution = grid.where_rows(flags, (start, nothing), (state.memory, state.convolution))
        return state._replace(memory=memory, convolution=convolution)


def _placed(known: jax.Array, new: jax.Array, phase: jax.Array | None) -> jax.Array:
    """The segment's rows (B, C, ...) with a piece's (B, L, ...) behind the first `phase` of them; at its start, the piece alone."""
    if phase is None:
        return new
    behind = jnp.arange(known.shape[1])[None] >= phase[:, None]
    return jnp.where(jnp.expand_dims(behind, range(2, known.ndim)), grid.align(new, phase, known.shape[1]), known)


def _filled(rows: jax.Array, size: int) -> jax.Array:
    return jnp.pad(rows, [(0, 0), (0, size - rows.shape[1])] + [(0, 0)] * (rows.ndim - 2))
