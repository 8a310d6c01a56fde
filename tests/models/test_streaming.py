"""Learning while reading: identities 21 to 27 at model level, and invariants 2, 4, 6 and 8 for CMS within a sequence."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nested_jax.config import InSequenceConfig, LevelConfig, MemoryConfig, ModelConfig
from nested_jax.models import streaming
from nested_jax.models.language_model import LanguageModel
from nested_jax.models.loss import model_loss

BATCH, LENGTH = 2, 14
LEVELS = (LevelConfig(6, 2), LevelConfig(6, 4))
_GRID = MemoryConfig(kind='matrix', chunk_size=2, projection_chunk_size=2)
# Matrix memories with gradients of the chunk, hope-linear's own rule, and hope's.
MEMORIES = {
    'chunk': _GRID,
    'token': dataclasses.replace(_GRID, gradient='token', momentum=False, decay_to='init'),
    'mlp': dataclasses.replace(_GRID, kind='mlp', hidden_dim=3, decay_to='init'),
}
# Attention's softmax and the memories' gates are computed in float32 whatever the inputs.
TOLERANCE = 1e-5
pytestmark = pytest.mark.usefixtures('x64')

in_sequence_loss = jax.jit(streaming.in_sequence_loss, static_argnums=0)
static_loss = jax.jit(model_loss, static_argnums=0)


def make(mixer='attention', levels=LEVELS, memory='chunk', aggregation='chain', **in_sequence):
    """A model of two blocks that learn while reading, random non-zero parameters and tokens."""
    config = ModelConfig(
        mixer,
        num_layers=2,
        width=8,
        num_heads=2,
        head_dim=4,
        levels=levels,
        vocab_size=7,
        max_length=32,
        aggregation=aggregation,
        memory=MEMORIES[memory],
        dtype='float64',
        in_sequence=InSequenceConfig(**{'blocks': (0, 1), 'learning_rate': 0.1, **in_sequence}),
    )
    model, keys = LanguageModel(config), jax.random.split(jax.random.key(0), 3)
    tokens = jax.random.randint(keys[0], (BATCH, LENGTH + 1), 0, 7, jnp.int32)
    params = jax.jit(model.init)(keys[1], tokens[:, :2])['params']
    noise = lambda leaf: (leaf + 0.1 * jax.random.normal(keys[2], leaf.shape)).astype('float64')
    return model, jax.tree.map(noise, params), tokens[:, :-1], tokens[:, 1:]


def reference(model, params, tokens, targets, weights, bptt=None):
    """One row of `in_sequence_loss`, as a loop over chunks through the model's own `apply` (Eq. 71)."""
    config = model.config
    blocks, names = np.array(config.in_sequence.blocks), [f'level_{i}' for i in range(len(config.levels))]
    periods, rate, constant = [level.period for level in config.levels], config.in_sequence.learning_rate, jax.lax.stop_gradient
    initial = {name: jax.tree.map(lambda leaf: leaf[blocks], params['blocks']['channel'][name]) for name in names}
    fast, pending = dict(initial), {name: [] for name in names}

    def chunk_loss(fast, state, part):
        channel = dict(params['blocks']['channel'])
        for name in names:
            channel[name] = jax.tree.map(lambda leaf, new: leaf.at[blocks].set(new), channel[name], fast[name])
        changed = {**params, 'blocks': {**params['blocks'], 'channel': channel}}
        logits, state = model.apply({'params': changed}, tokens[None, part], state)
        losses = -jnp.take_along_axis(jax.nn.log_softmax(logits[0]), targets[part, None], 1)[:, 0]
        return jnp.sum(losses * weights[part]), state

    state, total = None, 0.0
    for start in range(0, len(tokens), periods[0]):
        if bptt is not None and (start // periods[0]) % bptt == 0:
            fast = jax.tree.map(lambda weight, first: first + constant(weight - first), fast, initial)
            pending = constant(pending)
        (loss, state), gradient = jax.value_and_grad(chunk_loss, has_aux=True)(fast, state, slice(start, start + periods[0]))
        total += loss
        for name, period in zip(names, periods, strict=True):
            pending[name].append(gradient[name])
            if (start + periods[0]) % period == 0:
                for one in pending[name]:
                    fast[name] = jax.tree.map(lambda weight, step: weight - rate * step, fast[name], one)
                pending[name] = []
    return total


def nats(logits, targets):
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)[..., 0]


def assert_close(actual, expected, tolerance=TOLERANCE):
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol=tolerance, atol=tolerance), actual, expected)


@pytest.mark.parametrize('mixer, bptt', [('attention', None), pytest.param('gated-delta-rule', 2, marks=pytest.mark.exhaustive)])
def test_loss_and_gradient_equal_the_loop(mixer, bptt):
    model, params, tokens, targets = make(mixer, bptt=bptt, blocks=(1,))
    tokens, targets = tokens[:1, :9], targets[:1, :9]
    weights = jnp.asarray(np.random.default_rng(0).integers(0, 2, tokens.shape), jnp.float64)
    actual = lambda params: streaming.in_sequence_loss(model, params, tokens, targets, None, weights)
    expected = lambda params: reference(model, params, tokens[0], targets[0], weights[0], bptt)
    (total, count), gradient = jax.jit(jax.value_and_grad(actual, has_aux=True))(params)
    assert_close((total, gradient), jax.jit(jax.value_and_grad(expected))(params))
    assert count == weights.sum()


@pytest.mark.parametrize(
    'mixer, memory',
    [
        pytest.param('self-modifying', 'token', marks=pytest.mark.slow),
        *(pytest.param('self-modifying', memory, marks=pytest.mark.exhaustive) for memory in ('chunk', 'mlp')),
        pytest.param('gated-delta-rule', None, marks=pytest.mark.exhaustive),
    ],
)
def test_gradient_of_every_initial_level_equals_finite_differences(mixer, memory):
    """Over six chunks: six updates of the fast level, three of the slow one; and of the rate of each level."""
    model, params, tokens, targets = make(mixer, memory=memory or 'chunk')
    channel, logs = params['blocks']['channel'], jnp.log(jnp.array([0.02, 0.01]))

    @jax.jit
    def loss(levels, logs):
        changed = {**params, 'blocks': {**params['blocks'], 'channel': {**channel, **levels}}}
        return streaming.in_sequence_loss(model, changed, tokens, targets, learning_rates=jnp.exp(logs))[0]

    levels = {name: channel[name] for name in ('level_0', 'level_1')}
    gradient, rates = jax.jit(jax.grad(loss, (0, 1)))(levels, logs)
    steps = [size * 3e-5 for size in (-2, -1, 1, 2)]
    slope = lambda values: (8 * (values[2] - values[1]) - (values[3] - values[0])) / (12 * 3e-5)
    for name, level in levels.items():
        assert all((leaf != 0).all() for leaf in jax.tree.leaves(gradient[name]))
        direction = jax.tree.map(lambda leaf: jnp.sign(leaf), level)
        moved = [jax.tree.map(lambda leaf, way, step=step: leaf + step * way, level, direction) for step in steps]
        expected = jax.tree.reduce(jnp.add, jax.tree.map(jnp.vdot, gradient[name], direction))
        np.testing.assert_allclose(slope([loss({**levels, name: end}, logs) for end in moved]), expected, rtol=1e-6)
    for level in range(2):
        values = [loss(levels, logs.at[level].add(step)) for step in steps]
        np.testing.assert_allclose(slope(values), rates[level], rtol=1e-6)


def test_without_learning_it_is_the_models_loss():
    model, params, tokens, targets = make()
    expected = static_loss(model, params, tokens, targets)
    learned = lambda rate: in_sequence_loss(model, params, tokens, targets, learning_rates=rate)
    assert_close(learned(0.0), expected)
    distances = [float(jnp.abs(learned(rate)[0] - expected[0])) for rate in (1e-5, 1e-6)]
    assert 9.9 < distances[0] / distances[1] < 10.1
    slow, *_ = make(levels=(LevelConfig(6, LENGTH), LevelConfig(6, 2 * LENGTH)))
    assert_close(in_sequence_loss(slow, params, tokens, targets), expected)


@pytest.mark.parametrize(
    'mixer, variant, aggregation, memory',
    [
        ('attention', 'sequential', 'chain', None),
        ('attention', 'nested', 'chain', None),
        ('attention', 'sequential', 'sum', None),
        pytest.param('gated-delta-rule', 'nested', 'chain', None, marks=pytest.mark.exhaustive),
        pytest.param('self-modifying', 'sequential', 'chain', 'chunk', marks=pytest.mark.slow),
        *(pytest.param('self-modifying', 'sequential', 'chain', memory, marks=pytest.mark.exhaustive) for memory in ('token', 'mlp')),
    ],
)
def test_stream_equals_the_loss_at_every_cut(mixer, variant, aggregation, memory):
    model, params, tokens, targets = make(mixer, memory=memory or 'chunk', aggregation=aggregation, variant=variant)
    start = streaming.init_stream(model, params, BATCH)
    whole, end = streaming.read(model, params, start, tokens)
    loss = in_sequence_loss(model, params, tokens, targets)[0]
    assert_close(nats(whole, targets).sum(), loss)
    if mixer == 'attention' and (variant, aggregation) != ('sequential', 'chain'):
        assert abs(in_sequence_loss(make()[0], params, tokens, targets)[0] - loss) > 1e-3
    for cut in range(LENGTH + 1):  # none compiles anything that another has not
        first, stream = streaming.read(model, params, start, tokens[:, :cut])
        second, stream = streaming.read(model, params, stream, tokens[:, cut:])
        assert_close(jnp.concatenate([first, second], 1), whole)
        assert_close((stream.fast, stream.state, stream.start, stream.length), (end.fast, end.state, end.start, end.length))
    stream, pieces = start, []
    for place in range(LENGTH):
        piece, stream = streaming.read(model, params, stream, tokens[:, place : place + 1])
        pieces.append(piece)
    assert_close(jnp.concatenate(pieces, 1), whole)


def test_stream_learns_once_a_period():
    model, params, tokens, _ = make()
    stream, moves = streaming.init_stream(model, params, BATCH), []
    for place in range(LENGTH):
        before = stream.fast.weights
        _, stream = streaming.read(model, params, stream, tokens[:, place : place + 1])
        same = [jax.tree.map(lambda a, b: bool((a == b).all()), *pair) for pair in zip(before, stream.fast.weights, strict=True)]
        moves.append([not all(jax.tree.leaves(level)) for level in same])
    read_before = np.arange(LENGTH)  # a chunk's update is made when the token after it, its last target, comes
    for level, period in enumerate((2, 4)):
        np.testing.assert_array_equal(np.array(moves)[:, level], (read_before % period == 0) & (read_before > 0))


@pytest.mark.parametrize('mixer', ['attention', pytest.param('self-modifying', marks=pytest.mark.slow)])
def test_saved_stream_continues(mixer):
    model, params, tokens, _ = make(mixer)
    whole, _ = streaming.read(model, params, streaming.init_stream(model, params, BATCH), tokens)
    _, stream = streaming.read(model, params, streaming.init_stream(model, params, BATCH), tokens[:, :7])
    leaves, structure = jax.tree.flatten(stream)
    restored = jax.tree.unflatten(structure, [np.array(leaf) for leaf in leaves])
    assert_close(streaming.read(model, params, restored, tokens[:, 7:])[0], whole[:, 7:])


def test_documents_of_a_row_are_independent():
    model, params, tokens, targets = make()
    tokens, targets = tokens[:, :12], targets[:, :12]

    def packed(start, weights):
        segment_ids = jnp.broadcast_to((jnp.arange(12) >= start).astype(jnp.int32)[None], tokens.shape)
        return in_sequence_loss(model, params, tokens, targets, segment_ids, weights)

    weights = jnp.ones(tokens.shape).at[:, 5].set(0.0)  # the target of a document's last token is of the next
    apart = [in_sequence_loss(model, params, tokens[:, p], targets[:, p], None, weights[:, p]) for p in (slice(6), slice(6, None))]
    assert_close(packed(6, weights), jax.tree.map(jnp.add, *apart))
    assert abs(packed(6, weights)[0] - packed(12, weights)[0]) > 1e-3
    # A document that starts with the last chunk, which is only read.
    last = packed(10, jnp.zeros(tokens.shape).at[:, 10:].set(1.0))
    assert_close(last, in_sequence_loss(model, params, tokens[:, 10:], targets[:, 10:], None, weights[:, 10:]))


def test_rows_are_independent():
    model, params, tokens, _ = make()
    start = streaming.init_stream(model, params, BATCH)
    before, _ = streaming.read(model, params, start, tokens)
    after, _ = streaming.read(model, params, start, tokens.at[1].set((tokens[1] + 1) % 7))
    np.testing.assert_array_equal(after[0], before[0])
    assert (after[1] != before[1]).any()


def test_chunks_without_targets_leave_gradients_finite():
    model, params, tokens, targets = make()
    gradient = jax.jit(jax.grad(lambda params, weights: streaming.in_sequence_loss(model, params, tokens, targets, None, weights)[0]))
    for weights in (jnp.zeros(tokens.shape), jnp.ones(tokens.shape).at[:, 2:8].set(0.0)):
        assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient(params, weights)))


def test_compiled_once_a_length_of_piece():
    model, params, tokens, _ = make()
    stream = streaming.init_stream(model, params, BATCH)
    streaming.read(model, params, stream, tokens[:, :1])
    streaming.read(model, params, stream, tokens)
    before = streaming._learn._cache_size(), streaming._extend._cache_size()
    for cut in range(1, LENGTH):
        _, halfway = streaming.read(model, params, stream, tokens[:, :cut])
        streaming.read(model, params, halfway, tokens[:, cut:])
    assert (streaming._learn._cache_size(), streaming._extend._cache_size()) == before


def test_fast_weight_bytes():
    model, params, _, _ = make()
    fast = streaming.init_stream(model, params, BATCH).fast
    held = sum(leaf.nbytes for leaf in jax.tree.leaves((fast.weights, fast.sums)))
    assert streaming.fast_weight_bytes(model, BATCH) == held == BATCH * 2 * 8 * 3 * (3 * 8 * 6 + 8)
    assert streaming.fast_weight_bytes(model, BATCH, LENGTH) == held * (6 + 3)
    assert streaming.fast_weight_bytes(model, BATCH, 4) == held / 3 * (1 + 3)  # only the fast level is updated
    assert streaming.fast_weight_bytes(model, BATCH, 2) == 0


def test_bad_input_is_named():
    model, params, tokens, targets = make()
    static = LanguageModel(dataclasses.replace(model.config, in_sequence=None))
    for call in (
        functools.partial(streaming.init_stream, batch_size=1),
        functools.partial(streaming.in_sequence_loss, tokens=tokens, targets=targets),
    ):
        with pytest.raises(ValueError, match='config.in_sequence is None'):
            call(static, params)
    stream = streaming.init_stream(model, params, BATCH)
    for wrong in (tokens[0], tokens[:1], tokens.astype(jnp.float32)):
        with pytest.raises(ValueError, match=r'tokens is .*, allowed is an integer array \(2, time\)'):
            streaming.read(model, params, stream, wrong)
    with pytest.raises(ValueError, match='batch_size is 0'):
        streaming.init_stream(model, params, 0)
