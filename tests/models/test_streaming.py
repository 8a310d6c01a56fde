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


def make(mixer='attention', dtype='float64', seed=0, levels=LEVELS, **in_sequence):
    """A model of three blocks of which the middle one learns while reading, random non-zero parameters and tokens."""
    config = ModelConfig(
        mixer,
        num_layers=3,
        width=8,
        num_heads=2,
        head_dim=4,
        levels=levels,
        vocab_size=7,
        max_length=32,
        memory=MemoryConfig(kind='matrix', chunk_size=2, projection_chunk_size=2),
        dtype=dtype,
        in_sequence=InSequenceConfig(**{'blocks': (1,), 'learning_rate': 0.1, **in_sequence}),
    )
    model, keys = LanguageModel(config), jax.random.split(jax.random.key(seed), 3)
    tokens = jax.random.randint(keys[0], (BATCH, LENGTH + 1), 0, 7, jnp.int32)
    params = jax.jit(model.init)(keys[1], tokens[:, :2])['params']
    noise = lambda leaf: (leaf + 0.1 * jax.random.normal(keys[2], leaf.shape)).astype(dtype)
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


def assert_close(actual, expected, tolerance=1e-8):
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol=tolerance, atol=tolerance), actual, expected)


@pytest.mark.parametrize('mixer, bptt', [('attention', None), ('attention', 2), ('gated-delta-rule', None), ('gated-delta-rule', 1)])
def test_loss_and_gradient_equal_the_loop(x64, mixer, bptt):
    model, params, tokens, targets = make(mixer, bptt=bptt)
    tokens, targets = tokens[:, :9], targets[:, :9]
    weights = jnp.asarray(np.random.default_rng(0).integers(0, 2, tokens.shape), jnp.float64)
    actual = lambda params: streaming.in_sequence_loss(model, params, tokens, targets, None, weights)
    expected = lambda params: sum(reference(model, params, *row, bptt) for row in zip(tokens, targets, weights, strict=True))
    (total, count), gradient = jax.jit(jax.value_and_grad(actual, has_aux=True))(params)
    assert_close((total, gradient), jax.jit(jax.value_and_grad(expected))(params))
    assert count == weights.sum()


@pytest.mark.parametrize('mixer', ['attention', 'self-modifying'])
def test_gradient_of_every_initial_level_equals_finite_differences(x64, mixer):
    """Over six chunks: six updates of the fast level, three of the slow one."""
    model, params, tokens, targets = make(mixer)
    loss = jax.jit(lambda params: streaming.in_sequence_loss(model, params, tokens, targets)[0])
    gradient = jax.jit(jax.grad(loss))(params)['blocks']['channel']
    for name in ('level_0', 'level_1'):
        direction = jax.tree.map(lambda leaf: jnp.zeros_like(leaf).at[1].set(jnp.sign(leaf[1])), params['blocks']['channel'][name])
        expected = jax.tree.reduce(jnp.add, jax.tree.map(jnp.vdot, gradient[name], direction))
        losses = []
        for step in (1e-5, -1e-5):
            moved = jax.tree.map(lambda leaf, way, step=step: leaf + step * way, params['blocks']['channel'][name], direction)
            channel = {**params['blocks']['channel'], name: moved}
            losses.append(loss({**params, 'blocks': {**params['blocks'], 'channel': channel}}))
        np.testing.assert_allclose((losses[0] - losses[1]) / 2e-5, expected, rtol=1e-5)
        assert all((jnp.abs(leaf[1]) > 0).any() for leaf in jax.tree.leaves(gradient[name]))


def test_without_learning_it_is_the_models_loss(x64):
    expected = None
    for change in (dict(learning_rate=0.0), dict(levels=(LevelConfig(6, LENGTH), LevelConfig(6, 2 * LENGTH)))):
        model, params, tokens, targets = make(**change)
        expected = model_loss(model, params, tokens, targets) if expected is None else expected
        assert_close(streaming.in_sequence_loss(model, params, tokens, targets), expected)


def test_small_rates_approach_the_models_loss(x64):
    distances = []
    for rate in (1e-5, 1e-6):
        model, params, tokens, targets = make(learning_rate=rate)
        learned, static = (loss(model, params, tokens, targets)[0] for loss in (streaming.in_sequence_loss, model_loss))
        distances.append(float(jnp.abs(learned - static)))
    assert 9.9 < distances[0] / distances[1] < 10.1


@pytest.mark.parametrize('mixer, variant', [('attention', 'nested'), ('gated-delta-rule', 'sequential'), ('self-modifying', 'sequential')])
def test_stream_equals_the_loss_at_every_cut(x64, mixer, variant):
    model, params, tokens, targets = make(mixer, variant=variant, blocks=(0, 2))
    start = streaming.init_stream(model, params, BATCH)
    whole, end = streaming.read(model, params, start, tokens)
    assert_close(nats(whole, targets).sum(), streaming.in_sequence_loss(model, params, tokens, targets)[0])
    for cut in range(LENGTH + 1):
        first, stream = streaming.read(model, params, start, tokens[:, :cut])
        second, stream = streaming.read(model, params, stream, tokens[:, cut:])
        assert_close(jnp.concatenate([first, second], 1), whole)
        assert_close((stream.fast, stream.state, stream.start, stream.length), (end.fast, end.state, end.start, end.length))
    stream, pieces = start, []
    for place in range(LENGTH):
        piece, stream = streaming.read(model, params, stream, tokens[:, place : place + 1])
        pieces.append(piece)
    assert_close(jnp.concatenate(pieces, 1), whole)


def test_stream_learns_once_a_period(x64):
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


def test_saved_stream_continues(x64):
    model, params, tokens, _ = make()
    whole, _ = streaming.read(model, params, streaming.init_stream(model, params, BATCH), tokens)
    _, stream = streaming.read(model, params, streaming.init_stream(model, params, BATCH), tokens[:, :7])
    leaves, structure = jax.tree.flatten(stream)
    restored = jax.tree.unflatten(structure, [np.array(leaf) for leaf in leaves])
    assert_close(streaming.read(model, params, restored, tokens[:, 7:])[0], whole[:, 7:])


def test_documents_of_a_row_are_independent(x64):
    model, params, tokens, targets = make('gated-delta-rule')
    segment_ids = jnp.broadcast_to(jnp.where(jnp.arange(LENGTH) < 6, 1, 2)[None], tokens.shape)
    weights = jnp.ones(tokens.shape).at[:, 5].set(0.0)  # the target of a document's last token is of the next
    packed = streaming.in_sequence_loss(model, params, tokens, targets, segment_ids, weights)
    apart = [
        streaming.in_sequence_loss(model, params, tokens[:, p], targets[:, p], None, weights[:, p]) for p in (slice(6), slice(6, None))
    ]
    assert_close(packed, jax.tree.map(jnp.add, *apart))
    joined = streaming.in_sequence_loss(model, params, tokens, targets, None, weights)
    assert abs(packed[0] - joined[0]) > 1e-3


def test_document_that_starts_with_the_last_chunk(x64):
    model, params, tokens, targets = make()
    segment_ids = jnp.broadcast_to((jnp.arange(LENGTH) >= 12).astype(jnp.int32)[None], tokens.shape)
    weights = jnp.ones(tokens.shape).at[:, :12].set(0.0)
    packed, _ = streaming.in_sequence_loss(model, params, tokens, targets, segment_ids, weights)
    assert_close(packed, streaming.in_sequence_loss(model, params, tokens[:, 12:], targets[:, 12:])[0])


def test_rows_are_independent(x64):
    model, params, tokens, targets = make()
    apart = [streaming.in_sequence_loss(model, params, tokens[row : row + 1], targets[row : row + 1])[0] for row in range(BATCH)]
    assert_close(streaming.in_sequence_loss(model, params, tokens, targets)[0], sum(apart))


def test_learning_rates_can_be_learned(x64):
    model, params, tokens, targets = make()
    loss = jax.jit(lambda logs: streaming.in_sequence_loss(model, params, tokens, targets, learning_rates=jnp.exp(logs))[0])
    logs = jnp.log(jnp.array([0.1, 0.02]))
    gradient = jax.grad(loss)(logs)
    for level in range(2):
        ends = [loss(logs.at[level].add(step)) for step in (1e-5, -1e-5)]
        np.testing.assert_allclose((ends[0] - ends[1]) / 2e-5, gradient[level], rtol=1e-6)


def test_chunks_without_targets_leave_gradients_finite():
    model, params, tokens, targets = make(dtype='float32')
    for weights in (jnp.zeros(tokens.shape), jnp.ones(tokens.shape).at[:, 2:8].set(0.0)):
        loss = lambda params, weights=weights: streaming.in_sequence_loss(model, params, tokens, targets, None, weights)[0]
        assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.jit(jax.grad(loss))(params)))


def test_compiled_once_a_length_of_piece():
    model, params, tokens, _ = make(dtype='float32')
    stream = streaming.init_stream(model, params, BATCH)
    streaming.read(model, params, stream, tokens[:, :1])
    streaming.read(model, params, stream, tokens)
    before = streaming._learn._cache_size(), streaming._extend._cache_size()
    for cut in range(1, LENGTH):
        _, halfway = streaming.read(model, params, stream, tokens[:, :cut])
        streaming.read(model, params, halfway, tokens[:, cut:])
    assert (streaming._learn._cache_size(), streaming._extend._cache_size()) == before


def test_fast_weight_bytes():
    model, params, _, _ = make(dtype='float32', blocks=(0, 2))
    fast = streaming.init_stream(model, params, BATCH).fast
    held = sum(leaf.nbytes for leaf in jax.tree.leaves((fast.weights, fast.sums)))
    assert streaming.fast_weight_bytes(model, BATCH) == held == BATCH * 2 * 4 * 3 * (3 * 8 * 6 + 8)
    assert streaming.fast_weight_bytes(model, BATCH, LENGTH) == held * (6 + 3)
    assert streaming.fast_weight_bytes(model, BATCH, 4) == held / 3 * (1 + 3)  # only the fast level is updated
    assert streaming.fast_weight_bytes(model, BATCH, 2) == 0


def test_bad_input_is_named():
    model, params, tokens, targets = make(dtype='float32')
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
