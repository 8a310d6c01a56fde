"""Self-modifying memories: chunked form against the token loop, streams, outer gradients, bounds and special cases."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nested_jax.memory import matrix, mlp
from nested_jax.memory.self_modifying import Inputs, Memories, Rule, SelfModifyingState, self_modifying, self_modifying_reference

BATCH, LENGTH, HEADS, WIDTH, HIDDEN = 2, 26, 2, 4, 3
# Documents on the coarser grid of eight tokens, and padding (0) that begins inside a chunk.
IDS = np.array([[1] * 5 + [0] * 3 + [2] * 18, [3] * 16 + [4] * 10])


CASES = {
    'matrix-token': (dict(kind='matrix', gradient='token', chunk_size=8, projection_chunk_size=4, decay_to='init'), False),
    'matrix-chunk': (
        dict(kind='matrix', gradient='chunk', chunk_size=4, projection_chunk_size=8, read='anchor', adaptive_query=True),
        True,
    ),
    'mlp': (dict(kind='mlp', chunk_size=4, projection_chunk_size=4), True),
    'mlp-ablated': (
        dict(kind='mlp', chunk_size=4, projection_chunk_size=4, retention=False, self_modified=('value', 'eta')),
        True,
    ),
    'mlp-two-grids': (
        dict(kind='mlp', chunk_size=8, projection_chunk_size=4, dgd='input_only', decay_to='init', adaptive_query=True),
        False,
    ),
    'mixed': (
        dict(kind='mlp', matrix_memories=('memory', 'value', 'eta'), chunk_size=4, projection_chunk_size=8, decay_to='init'),
        True,
    ),
}


def _slow_cases():
    sizes = ((4, 4), (8, 4), (4, 8))
    for index, (kind, dgd, read, decay_to) in enumerate(
        (kind, dgd, read, decay_to)
        for kind in ('matrix-token', 'matrix-chunk', 'mlp')
        for dgd in ('per_layer', 'input_only', 'none')
        for read in ('running', 'anchor')
        for decay_to in ('zero', 'init')
    ):
        kind, _, gradient = kind.partition('-')
        chunk_size, projection_chunk_size = sizes[index % 3]
        options = dict(kind=kind, gradient=gradient or 'chunk', dgd=dgd, read=read, decay_to=decay_to)
        options |= dict(chunk_size=chunk_size, projection_chunk_size=projection_chunk_size)
        options |= dict(adaptive_query=index % 4 < 2, positive_eigenvalues=index % 5 == 0)
        yield pytest.param(options, options['gradient'] != 'token' and index % 2 == 0, marks=pytest.mark.exhaustive)


def _unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def _make(rule: Rule, momentum: bool, length: int = LENGTH, seed: int = 0, heads: int = HEADS):
    """Random inputs, retention scales and initial memories, in float64 if enabled."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.normal(size=shape)
    rows, gates = (BATCH, length, heads, WIDTH), (BATCH, length, heads)
    inputs = Inputs(
        _unit(normal(*rows)), _unit(normal(*rows)), normal(*rows), normal(*gates), normal(*gates) - 2, normal(*gates) if momentum else None
    )
    matrices, (wide, gates) = _matrix_columns(rule), ((), ()) if rule.kind == 'matrix' else rule.places('mlp')
    first = 0.5 * normal(heads, WIDTH, len(matrices))
    if wide or gates:
        first = np.concatenate([normal(heads, WIDTH, (len(wide) + len(gates)) * HIDDEN), first], -1)
    initial = Memories(first, None, None)
    if wide or gates:
        initial = Memories(first, normal(heads, len(wide), HIDDEN, WIDTH), normal(heads, len(gates), HIDDEN, 1))
    return jax.tree.map(jnp.asarray, (inputs, np.array([1.0, 3.0])[:heads], initial))


def _matrix_columns(rule: Rule) -> list[int]:
    """The memory, wide ones first, then eta and alpha, that each column of the matrix memories belongs to."""
    if rule.kind == 'matrix':
        wide, gates = range(rule.wide), range(2)
    else:
        wide, gates = rule.places('matrix')
    return [index for index in wide for _ in range(WIDTH)] + [rule.wide + index for index in gates]


def _weights(y):
    return jnp.asarray(np.random.default_rng(7).normal(size=y.shape), y.dtype)


def _with_gradients(function, rule: Rule):
    """Jitted (inputs, scale, initial, ids) -> ((scalar, y), gradients with respect to the first three)."""

    def objective(inputs, scale, initial, ids):
        y = function(inputs, scale, initial, rule=rule, segment_ids=ids)
        y = y[0] if isinstance(y, tuple) else y
        return (y * _weights(y)).sum(), y

    return jax.jit(jax.value_and_grad(objective, (0, 1, 2), has_aux=True))


@functools.cache
def _chunked(name: str):
    options, momentum = CASES[name]
    return _with_gradients(self_modifying, Rule(**options)), *_make(Rule(**options), momentum)


def _assert_equal_to_reference(chunked, arguments, rule: Rule):
    ids = jnp.asarray(IDS)
    (_, y), gradients = chunked(*arguments, ids)
    (_, expected), expected_gradients = _with_gradients(self_modifying_reference, rule)(*arguments, ids)
    assert y.dtype == jnp.float64 and float(jnp.abs(expected).max()) > 0.01
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-12 * max(1.0, float(jnp.abs(expected).max())))
    for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected_gradients), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-10 * float(jnp.abs(b).max()) + 1e-14)


@pytest.mark.parametrize('name', CASES)
def test_chunked_equals_the_token_loop(x64, name):
    chunked, *arguments = _chunked(name)
    _assert_equal_to_reference(chunked, arguments, Rule(**CASES[name][0]))


@pytest.mark.parametrize(('options', 'momentum'), list(_slow_cases()))
def test_chunked_equals_the_token_loop_for_all_options(x64, options, momentum):
    rule = Rule(**options)
    _assert_equal_to_reference(_with_gradients(self_modifying, rule), _make(rule, momentum), rule)


# One token a chunk is Eq. 88 step by step; one head is the paper's form.
_LITERAL = {
    'matrix-token': (dict(kind='matrix', gradient='token'), False),
    'matrix-chunk': (dict(kind='matrix', gradient='chunk'), True),
    'mlp': (dict(kind='mlp'), True),
}


@pytest.mark.parametrize(('sizes', 'heads'), [((1, 1), 2), ((8, 4), 1)], ids=['one token', 'one head'])
@pytest.mark.parametrize('name', ['matrix-token', *(pytest.param(name, marks=pytest.mark.slow) for name in ('matrix-chunk', 'mlp'))])
def test_chunks_of_one_token_and_single_heads_equal_the_token_loop(x64, name, sizes, heads):
    """Identity 12."""
    options, momentum = _LITERAL[name]
    rule = Rule(**options, chunk_size=sizes[0], projection_chunk_size=sizes[1])
    _assert_equal_to_reference(_with_gradients(self_modifying, rule), _make(rule, momentum, heads=heads), rule)


def test_with_chunks_of_one_token_gradients_at_the_token_and_at_the_chunks_start_are_the_same(x64):
    """Identity 12."""
    rules = [Rule(kind='matrix', gradient=gradient, chunk_size=1, projection_chunk_size=1) for gradient in ('token', 'chunk')]
    token, chunk = (jax.jit(functools.partial(self_modifying, rule=rule))(*_make(rule, False))[0] for rule in rules)
    np.testing.assert_allclose(token, chunk, rtol=0, atol=1e-12)


def _of_memory(rule: Rule, index: int, direction: Memories) -> Memories:
    """`direction` on the weights of one memory (wide ones first, then eta and alpha), zero on the others."""
    wide, gates = ((), ()) if rule.kind == 'matrix' else rule.places('mlp')
    mlps = [*wide, *(rule.wide + index for index in gates)]
    owner = np.array([index for index in mlps for _ in range(HIDDEN)] + _matrix_columns(rule))
    chosen = Memories(jnp.where(owner == index, direction.first, 0.0), None, None)
    if not mlps:
        return chosen
    of = lambda rows, names: rows * (np.array(names, int) == index)[None, :, None, None]
    return chosen._replace(wide=of(direction.wide, wide), gate=of(direction.gate, mlps[len(wide) :]))


@pytest.mark.parametrize('name', [name for name in CASES if name != 'mlp-ablated'])
def test_outer_gradients_reach_every_initial_memory_and_equal_finite_differences(x64, name):
    chunked, inputs, scale, initial = _chunked(name)
    rule, rng = Rule(**CASES[name][0]), np.random.default_rng(3)
    value = lambda weights: float(chunked(inputs, scale, weights, jnp.zeros_like(IDS))[0][0])
    gradient = chunked(inputs, scale, initial, jnp.zeros_like(IDS))[1][2]
    whole = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape)), initial)
    for index in range(rule.wide + 2):
        direction, step = _of_memory(rule, index, whole), 1e-5
        moved = [value(jax.tree.map(lambda w, d, s=sign * step: w + s * d, initial, direction)) for sign in (-2, -1, 1, 2)]
        difference = (8 * (moved[2] - moved[1]) - (moved[3] - moved[0])) / (12 * step)
        slope = sum(float((g * d).sum()) for g, d in zip(jax.tree.leaves(gradient), jax.tree.leaves(direction), strict=True))
        assert abs(slope) > 1e-4, f'memory {index} gets no gradient'
        np.testing.assert_allclose(slope, difference, rtol=1e-6, atol=1e-9, err_msg=f'memory {index}')


# Streams


@functools.cache
def _piece(name: str):
    """Jitted call on a piece of a stream: (inputs, scale, initial, state, position) -> (y, state)."""
    rule = Rule(**CASES[name][0])
    run = lambda inputs, scale, initial, state, position: self_modifying(inputs, scale, initial, rule=rule, state=state, position=position)
    return jax.jit(run)


def _empty_state(name: str, initial: Memories) -> SelfModifyingState:
    """What the stream looks at nothing of, as its position is zero."""
    rule, momentum = Rule(**CASES[name][0]), CASES[name][1]
    repeated = jax.tree.map(lambda x: jnp.full((BATCH, *x.shape), 7.0), initial)
    inputs = jax.tree.map(lambda x: jnp.full((BATCH, rule.base, *x.shape[2:]), 7.0), _make(rule, momentum)[0])
    return SelfModifyingState(
        repeated, repeated if momentum else None, repeated if rule.chunk_size != rule.projection_chunk_size else None, inputs
    )


def _stream(name: str, pieces):
    """Outputs, and the state and position after every piece."""
    inputs, scale, initial = _chunked(name)[1:]
    state, done, outputs, states = _empty_state(name, initial), 0, [], {}
    for length in pieces:
        part = jax.tree.map(lambda x, a=done, b=done + length: x[:, a:b], inputs)
        y, state = _piece(name)(part, scale, initial, state, jnp.full(BATCH, done, jnp.int32))
        done += length
        outputs.append(y)
        states[done] = state
    return jnp.concatenate(outputs, 1), states


@pytest.mark.parametrize(
    'name',
    ['matrix-chunk', 'mlp-two-grids', 'mixed', *(pytest.param(name, marks=pytest.mark.exhaustive) for name in ('matrix-token', 'mlp'))],
)
def test_a_stream_may_be_cut_anywhere(x64, name):
    chunked, *arguments = _chunked(name)
    expected = chunked(*arguments, jnp.zeros_like(IDS))[0][1]
    last = {}
    scale = max(1.0, float(jnp.abs(expected).max()))
    # Pieces of five begin at every phase of both grids; single tokens are decoding.
    for pieces in ([5] * 5 + [1], [1] + [5] * 5, [1] * 3 + [5] * 4, [1] * 26, [5, 1, 1, 5, 1, 1, 1, 1, 5, 5]):
        y, states = _stream(name, pieces)
        np.testing.assert_allclose(y, expected[:, : y.shape[1]], rtol=0, atol=1e-12 * scale, err_msg=str(pieces))
        last[tuple(pieces)] = states.get(26)
    states = [jax.tree.leaves(state[:3]) for state in last.values() if state is not None]
    for other in states[1:]:
        for a, b in zip(states[0], other, strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-12 * float(jnp.abs(b).max()) + 1e-12)


@pytest.mark.parametrize('name', ['matrix-chunk', 'mlp-two-grids'])
def test_rows_of_a_stream_may_stand_at_different_positions(x64, name):
    chunked, inputs, scale, initial = _chunked(name)
    expected = chunked(inputs, scale, initial, jnp.zeros_like(IDS))[0][1]
    states = _stream(name, [1] + [5] * 4)[1]
    mixed = jax.tree.map(lambda a, b: jnp.stack([a[0], b[1]]), states[1], states[11])
    part = jax.tree.map(lambda x: jnp.stack([x[0, 1:6], x[1, 11:16]]), inputs)
    y = _piece(name)(part, scale, initial, mixed, jnp.array([1, 11], jnp.int32))[0]
    np.testing.assert_allclose(y, jnp.stack([expected[0, 1:6], expected[1, 11:16]]), rtol=1e-12, atol=1e-12)


def test_a_state_needs_its_position():
    rule = Rule(**CASES['mlp'][0])
    inputs, scale, initial = _make(rule, True)
    with pytest.raises(ValueError, match='position'):
        self_modifying(inputs, scale, initial, rule=rule, state=_empty_state('mlp', initial))


def test_momentum_needs_gradients_taken_at_the_chunks_start():
    """Token-wise gradients and erasures are one term of the closed form; a momentum would hold the one and not the other."""
    rule = Rule(kind='matrix', gradient='token', chunk_size=4, projection_chunk_size=4)
    with pytest.raises(ValueError, match='momentum'):
        self_modifying(*_make(rule, True), rule=rule)


# Bounds (invariant 9)

BOUNDED = {
    'matrix-token': dict(kind='matrix', gradient='token'),
    'matrix-token-gd': dict(kind='matrix', gradient='token', dgd='none'),
    'matrix-chunk': dict(kind='matrix', gradient='chunk'),
    'matrix-chunk-gd': dict(kind='matrix', gradient='chunk', dgd='none'),
    'mlp': dict(kind='mlp'),
    'mlp-gd': dict(kind='mlp', dgd='none'),
    'mlp-input-only': dict(kind='mlp', dgd='input_only'),
    'matrix-chunk-gd-slow-projections': dict(kind='matrix', gradient='chunk', dgd='none', chunk_size=4, projection_chunk_size=20),
    'mixed': dict(kind='mlp', matrix_memories=('key', 'value', 'eta', 'alpha')),
    'mixed-gd': dict(kind='mlp', matrix_memories=('memory',), dgd='none'),
    'mlp-slow-projections': dict(kind='mlp', chunk_size=5, projection_chunk_size=20),
}
_HARD = ('random', 'one key', 'one key, full rate', 'correlated, full rate', 'flipping values', 'two keys, some retention', 'wild gates')


def _hard_inputs(length: int) -> Inputs:
    """One row of each kind of `_HARD`; gates from forgetting nothing at full rate to random."""
    rng = np.random.default_rng(5)
    rows = (len(_HARD), length, HEADS, WIDTH)
    query, key, value = _unit(rng.normal(size=rows)), _unit(rng.normal(size=rows)), rng.normal(size=rows)
    key[1:3] = key[1:3, :1]
    key[3] = _unit(key[3, :1] + 0.1 * key[3])
    key[4] = key[4, :1]
    value[4] = value[4, :1] * (1 - 2 * (np.arange(length) % 2))[:, None, None]
    key[5] = key[5, np.arange(length) % 2]
    eta, alpha = rng.normal(size=rows[:3]), rng.normal(size=rows[:3]) - 3
    eta[2:5], alpha[2:5] = 20.0, -30.0
    eta[5], alpha[5] = 20.0, 0.0
    eta[6], alpha[6] = 10 * eta[6], 10 * alpha[6]
    momentum = rng.normal(size=rows[:3])
    momentum[2:4] = 4.0
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), Inputs(query, key, value, eta, alpha, momentum))


@pytest.mark.parametrize('name', BOUNDED)
def test_memories_stay_bounded_over_two_thousand_tokens(name):
    rule = Rule(**(dict(chunk_size=16, projection_chunk_size=16) | BOUNDED[name]))
    _, scale, initial = _make(rule, False)
    inputs = _hard_inputs(2000)
    inputs = inputs if rule.gradient == 'chunk' else inputs._replace(momentum=None)
    pieces = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(len(_HARD), 4, 500, *x.shape[2:]), 1, 0), inputs)
    run = functools.partial(self_modifying, retention_scale=scale, initial=initial, rule=rule)

    def read(state, xs):
        piece, start = xs
        _, state = run(piece, state=state, position=jnp.full(len(_HARD), start, jnp.int32))
        largest = [jnp.abs(x).reshape(len(_HARD), -1).max(1) for x in jax.tree.leaves(state.running) if x.size]
        return state, jnp.stack(largest).max(0)

    first = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(run, jax.tree.map(lambda x: x[0], pieces))[1])
    largest = jax.jit(lambda pieces: jax.lax.scan(read, first, (pieces, 500 * jnp.arange(4)))[1])(pieces)
    found = np.log10(np.maximum(np.asarray(largest), 1e-3))  # of the largest weight after every 500 tokens, (4, rows)
    limit = 2 if rule.kind == 'matrix' else 4  # two layers may share a product unevenly
    assert np.isfinite(found).all() and found.max() < limit, dict(zip(_HARD, found.T.round(2).tolist(), strict=True))


# Identities of section 7 of the specification


def _static(kind: str, **options):
    """A rule, inputs and initial states whose projections' memories are zero and never read again."""
    rule = Rule(kind=kind, chunk_size=4, projection_chunk_size=16, **options)
    inputs, scale, initial = _make(rule, rule.gradient == 'chunk', length=14)
    if kind == 'matrix':
        initial = Memories(initial.first.at[..., WIDTH:].set(0.0), None, None)
    else:
        initial = initial._replace(wide=initial.wide.at[:, 1:].set(0.0), gate=jnp.zeros_like(initial.gate))
    return rule, inputs, scale, initial


def _self_generated(value, read):
    """v_hat of a memory whose source is its initial state throughout."""
    value = value / jnp.linalg.norm(value, axis=-1, keepdims=True)
    value = value + read(value)
    return value / jnp.linalg.norm(value, axis=-1, keepdims=True)


def _gates(inputs: Inputs, scale, largest):
    """eta, log alpha and log momentum as functions of the logits, written out again."""
    log_alpha = -scale[None, None] * jax.nn.softplus(inputs.alpha)
    momentum = None if inputs.momentum is None else jax.nn.log_sigmoid(inputs.momentum)
    return jax.nn.sigmoid(inputs.eta) * largest(jnp.exp(log_alpha)), log_alpha, momentum


@pytest.mark.parametrize(
    ('options', 'oracle', 'largest'),
    [
        (dict(gradient='token', dgd='none'), dict(objective='dot', gradient='token'), lambda a: 1 + a),  # a gated delta rule
        (dict(gradient='token'), dict(objective='l2', gradient='token'), lambda a: (1 + a) / 2),
        (dict(gradient='token', positive_eigenvalues=True), dict(objective='l2', gradient='token'), lambda a: a / 2),
        (dict(gradient='chunk', read='anchor'), dict(objective='l2', gradient='chunk', read='anchor'), lambda a: (1 + a) / 2),
    ],
)
def test_static_matrix_memory_is_delta_gradient_descent(x64, options, oracle, largest):
    rule, inputs, scale, initial = _static('matrix', **options)
    inputs = inputs._replace(momentum=None)
    eta, log_alpha, _ = _gates(inputs, scale, largest)
    memory = initial.first[..., :WIDTH]
    value = _self_generated(inputs.value, lambda x: jnp.einsum('bthd,hde->bthe', x, memory))
    expected, _ = jax.jit(functools.partial(matrix.delta_gradient_descent_reference, chunk_size=4, **oracle))(
        inputs.query, inputs.key, value, eta, log_alpha, initial=memory
    )
    y, _ = jax.jit(functools.partial(self_modifying, rule=rule))(inputs, scale, initial)
    np.testing.assert_allclose(y, expected, rtol=0, atol=5e-5)  # norms are those of 1e-6 + |x|^2


@pytest.mark.parametrize('dgd', ['per_layer', 'none'])
def test_static_mlp_memory_is_the_deep_memory_and_without_dgd_titans(x64, dgd):
    rule, inputs, scale, initial = _static('mlp', dgd=dgd)
    largest = (lambda a: 0 * a + 1 / 16) if dgd == 'none' else (lambda a: (1 + a) / 2)
    eta, log_alpha, log_momentum = _gates(inputs, scale, largest)
    weights = mlp.MLPWeights(initial.first[..., :HIDDEN], initial.wide[:, 0])
    hidden = lambda x: jax.nn.silu(jnp.einsum('bthd,hdf->bthf', x, weights.w_in))
    value = _self_generated(inputs.value, lambda x: jnp.einsum('bthf,hfd->bthd', hidden(x), weights.w_out))
    expected, _ = jax.jit(functools.partial(mlp.mlp_memory_reference, chunk_size=4, dgd=dgd, residual=False))(
        inputs.query, inputs.key, value, eta * -jnp.expm1(log_momentum), log_alpha, log_momentum,
        erase=None if dgd == 'none' else eta, damping=16 * eta if dgd == 'none' else eta, initial=weights,
    )  # fmt: skip
    y, _ = jax.jit(functools.partial(self_modifying, rule=rule))(inputs, scale, initial)
    np.testing.assert_allclose(y, expected, rtol=0, atol=5e-5)


@pytest.mark.parametrize('kind', ['matrix', 'mlp'])
def test_an_identity_memory_generates_the_value_itself(x64, kind):
    """Identity 15: a memory that reads zero is the identity in v_hat = v + M(v), and v_hat = v is what no memory generates."""
    rule, inputs, scale, initial = _static(kind)
    own = dataclasses.replace(rule, self_modified=tuple(name for name in rule.self_modified if name != 'target'))
    if kind == 'matrix':
        identity = jax.tree.map(jnp.zeros_like, initial)
    else:
        identity = initial._replace(wide=jnp.zeros_like(initial.wide))
    generated, given = (jax.jit(functools.partial(self_modifying, rule=each)) for each in (rule, own))
    y = generated(inputs, scale, identity)[0]
    assert float(jnp.abs(y).max()) > 1e-2
    np.testing.assert_allclose(y, given(inputs, scale, identity)[0], rtol=0, atol=1e-12)
    assert float(jnp.abs(generated(inputs, scale, initial)[0] - given(inputs, scale, initial)[0]).max()) > 1e-2


@pytest.mark.parametrize('name', ['matrix-chunk', 'mlp'])
def test_without_writes_the_memories_are_static_layers(x64, name):
    inputs, scale, initial = _chunked(name)[1:]
    never = jnp.full_like(inputs.eta, -jnp.inf)
    y, state = jax.jit(functools.partial(self_modifying, rule=Rule(**CASES[name][0])))(
        inputs._replace(eta=never, alpha=never), scale, initial
    )
    for a, b in zip(jax.tree.leaves(state.running), jax.tree.leaves(initial), strict=True):
        np.testing.assert_array_equal(a, jnp.broadcast_to(b[None], a.shape))
    if name == 'mlp':
        hidden = jax.nn.silu(jnp.einsum('bthd,hdf->bthf', inputs.query, initial.first[..., :HIDDEN]))
        np.testing.assert_allclose(y, jnp.einsum('bthf,hfd->bthd', hidden, initial.wide[:, 0]), rtol=0, atol=1e-12)


def test_zero_retention_forgets_everything_and_decay_to_init_returns_there(x64):
    for decay_to in ('zero', 'init'):
        rule = Rule(kind='mlp', chunk_size=4, projection_chunk_size=4, decay_to=decay_to)
        inputs, scale, initial = _make(rule, False)
        alpha = jnp.where((jnp.arange(LENGTH) == LENGTH - 1)[None, :, None], 1e5, inputs.alpha)
        eta = jnp.where((jnp.arange(LENGTH) == LENGTH - 1)[None, :, None], -jnp.inf, inputs.eta)
        _, state = jax.jit(functools.partial(self_modifying, rule=rule))(
            *(jax.tree.map(lambda x: x[:, :24], inputs._replace(alpha=jnp.roll(alpha, -2, 1), eta=jnp.roll(eta, -2, 1))), scale, initial)
        )
        for a, b in zip(jax.tree.leaves(state.running), jax.tree.leaves(initial), strict=True):
            np.testing.assert_allclose(a, jnp.broadcast_to((b if decay_to == 'init' else 0 * b)[None], a.shape), rtol=0, atol=1e-12)


@pytest.mark.parametrize(('part', 'position'), [('key', 1), ('value', 2), ('eta', -2), ('alpha', -1)])
@pytest.mark.parametrize('kind', ['matrix', 'mlp'])
def test_what_is_not_self_modified_comes_from_the_static_projections(x64, kind, part, position):
    full = Rule(kind=kind, chunk_size=4, projection_chunk_size=4)
    inputs, scale, initial = _make(full, False)

    def difference(rule: Rule) -> float:
        """What another initial state of the part's memory changes."""
        model = jax.jit(functools.partial(self_modifying, rule=rule))
        return float(jnp.abs(model(inputs, scale, initial)[0] - model(inputs, scale, _disturbed(initial, position))[0]).max())

    assert difference(full) > 1e-3
    assert difference(dataclasses.replace(full, self_modified=tuple(name for name in full.self_modified if name != part))) == 0.0


def _disturbed(initial: Memories, position: int) -> Memories:
    """The initial states with another memory at `position` of memory, key, value, eta, alpha."""
    width = WIDTH if initial.wide is None else HIDDEN
    gates = 1 if initial.wide is None else HIDDEN
    columns = slice(position * width, (position + 1) * width)
    if position < 0:
        end = initial.first.shape[-1]
        columns = slice(end + position * gates, end + (position + 1) * gates)
    return initial._replace(first=initial.first.at[..., columns].multiply(-0.7))


def test_without_retention_nothing_decays(x64):
    rule = Rule(kind='matrix', chunk_size=4, projection_chunk_size=4, gradient='token', retention=False)
    inputs, scale, initial = _make(rule, False)
    inputs = inputs._replace(eta=jnp.full_like(inputs.eta, -jnp.inf))
    _, state = jax.jit(functools.partial(self_modifying, rule=rule))(inputs, scale, initial)
    np.testing.assert_array_equal(state.running.first, jnp.broadcast_to(initial.first[None], state.running.first.shape))


def test_positive_eigenvalues_never_flip_the_memory_and_others_do(x64):
    for dgd in ('none', 'per_layer'):
        for positive in (True, False):
            rule, inputs, scale, initial = _static('matrix', gradient='token', dgd=dgd, positive_eigenvalues=positive)
            key = jnp.broadcast_to(inputs.key[:, :1], inputs.key.shape)
            full = jnp.full_like(inputs.eta, 20.0)
            inputs = Inputs(key, key, 0 * inputs.value, full, full - 22.0, None)
            y, _ = jax.jit(functools.partial(self_modifying, rule=rule))(inputs, scale, initial)
            start = jnp.einsum('bhd,hde->bhe', key[:, 0], initial.first[..., :WIDTH])
            ratio = y / start[:, None]
            assert float(ratio.min()) > -1e-6 if positive else float(ratio.min()) < -0.5


@pytest.mark.parametrize('name', ['matrix-chunk', 'mlp'])
def test_zero_inner_gradients_give_finite_outer_gradients(x64, name):
    chunked, *arguments = _chunked(name)
    (_, y), gradients = chunked(*jax.tree.map(jnp.zeros_like, tuple(arguments)), jnp.asarray(IDS))
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves((y, gradients)))


@pytest.mark.parametrize('name', ['matrix-token', 'mlp'])
def test_outputs_do_not_depend_on_later_tokens_nor_on_other_rows(x64, name):
    chunked, inputs, scale, initial = _chunked(name)
    gradients = chunked(inputs, scale, initial, jnp.asarray(IDS))  # shares the compiled function
    changed = jax.tree.map(lambda x: x.at[:, 13:].multiply(-1.5).at[0].add(0.0), inputs)
    y, late = gradients[0][1], chunked(changed, scale, initial, jnp.asarray(IDS))[0][1]
    np.testing.assert_array_equal(y[:, :13], late[:, :13])
    assert float(jnp.abs(y[:, 13:] - late[:, 13:]).max()) > 1e-3
    other = chunked(jax.tree.map(lambda x: x.at[1].multiply(0.5), inputs), scale, initial, jnp.asarray(IDS))[0][1]
    np.testing.assert_array_equal(y[0], other[0])
