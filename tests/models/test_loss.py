"""Cross-entropy in chunks of the vocabulary against optax on full logits."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nested_jax.models.language_model import LanguageModel
from nested_jax.models.loss import model_loss, next_token_loss
from tests.models.small_models import random_params, small

TOKENS, WIDTH, VOCAB = 7, 6, 23


def _data(dtype='float64', scale: float = 1.0):
    rng = np.random.default_rng(0)
    hidden, head = rng.normal(size=(TOKENS, WIDTH)), scale * rng.normal(size=(WIDTH, VOCAB))
    targets = rng.integers(0, VOCAB, TOKENS).astype(np.int32)
    targets[:3] = 0, VOCAB - 1, 8  # the ends of the vocabulary and of a chunk
    return jnp.asarray(hidden, dtype), jnp.asarray(head, dtype), jnp.asarray(targets), jnp.asarray(rng.uniform(size=TOKENS), dtype)


def _full(hidden, head, targets, weights):
    losses = optax.softmax_cross_entropy_with_integer_labels(hidden @ head, targets)
    return losses.sum() if weights is None else (losses * weights).sum()


@pytest.mark.parametrize('vocab_chunk', [1, 8, VOCAB, 100])
def test_equals_optax_with_gradients(x64, vocab_chunk):
    hidden, head, targets, weights = _data()
    for factors in (None, weights):
        loss = lambda hidden, head, factors=factors: next_token_loss(hidden, head, targets, factors, vocab_chunk=vocab_chunk)
        full = lambda hidden, head, factors=factors: _full(hidden, head, targets, factors)
        value, gradients = jax.jit(jax.value_and_grad(loss, (0, 1)))(hidden, head)
        expected, expected_gradients = jax.jit(jax.value_and_grad(full, (0, 1)))(hidden, head)
        np.testing.assert_allclose(value, expected, rtol=1e-12)
        for a, b in zip(gradients, expected_gradients, strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-12)


def test_weights_are_differentiable_and_zero_ones_leave_tokens_out(x64):
    hidden, head, targets, weights = _data()
    gradient = jax.jit(jax.grad(lambda w: next_token_loss(hidden, head, targets, w, vocab_chunk=8)))(weights)
    np.testing.assert_allclose(gradient, optax.softmax_cross_entropy_with_integer_labels(hidden @ head, targets), rtol=1e-12)
    mask = jnp.asarray([1.0, 1, 1, 0, 0, 0, 0])
    part = jax.jit(jax.grad(lambda h: next_token_loss(h, head, targets.at[3:].set(-1), mask, vocab_chunk=8)))(hidden)
    np.testing.assert_array_equal(part[3:], 0)
    assert np.abs(part[:3]).min(1).max() > 0


@pytest.mark.parametrize('scale', [1e4, 1e20])
def test_very_large_logits_stay_finite(scale):
    hidden, head, targets, weights = _data('float32', scale)
    value, gradients = jax.jit(jax.value_and_grad(lambda h, w: next_token_loss(h, w, targets, weights, vocab_chunk=8), (0, 1)))(
        hidden, head
    )
    np.testing.assert_allclose(value, _full(hidden, head, targets, weights), rtol=1e-5)
    assert all(np.isfinite(leaf).all() for leaf in gradients)


def test_bfloat16_rows_give_a_float32_loss():
    hidden, head, targets, weights = _data('float32')
    value, gradient = jax.jit(jax.value_and_grad(lambda h: next_token_loss(h, head, targets, weights, vocab_chunk=8)))(
        hidden.astype(jnp.bfloat16)
    )
    assert value.dtype == jnp.float32 and gradient.dtype == jnp.bfloat16
    rounded = [x.astype(jnp.bfloat16).astype(jnp.float32) for x in (hidden, head)]
    np.testing.assert_allclose(value, _full(*rounded, targets, weights), rtol=1e-5)


def test_memory_grows_with_the_chunk_and_not_with_the_vocabulary():
    shape = lambda *s, dtype=jnp.float32: jax.ShapeDtypeStruct(s, dtype)

    def temporary(vocab: int, vocab_chunk: int) -> int:
        grad = jax.grad(lambda h, w, t: next_token_loss(h, w, t, vocab_chunk=vocab_chunk), (0, 1))
        compiled = jax.jit(grad).lower(shape(2048, 8), shape(8, vocab), shape(2048, dtype=jnp.int32)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    logits = 2048 * 16_384 * 4
    assert temporary(16_384, 16_384) > logits
    assert temporary(16_384, 512) < logits / 8
    assert temporary(32_768, 512) < 1.5 * temporary(16_384, 512)


@pytest.mark.parametrize('tie_embeddings', [False, True])
def test_a_models_loss_is_the_cross_entropy_of_its_logits(x64, tie_embeddings):
    # A family without attention, whose softmax is in float32 whatever the dtype.
    model = LanguageModel(small('linear-attention', dtype='float64', tie_embeddings=tie_embeddings))
    params, rng = random_params(model), np.random.default_rng(1)
    assert ('head' in params) != tie_embeddings
    tokens, targets = (jnp.asarray(rng.integers(0, 32, (2, 8)), jnp.int32) for _ in range(2))
    ids = jnp.asarray([[1] * 5 + [0] * 3, [2] * 8], jnp.int32)
    weights = jnp.asarray((np.asarray(ids) > 0) * rng.uniform(0.5, 1, (2, 8)))

    def full(params):
        logits, _ = model.apply({'params': params}, tokens, segment_ids=ids)
        return (optax.softmax_cross_entropy_with_integer_labels(logits, targets) * weights).sum()

    (value, count), gradients = jax.jit(jax.value_and_grad(lambda p: model_loss(model, p, tokens, targets, ids, weights), has_aux=True))(
        params
    )
    expected, expected_gradients = jax.jit(jax.value_and_grad(full))(params)
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    np.testing.assert_allclose(count, weights.sum(), rtol=1e-12)
    for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected_gradients), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-10)
    assert model_loss(model, params, tokens, targets)[1] == 16


def test_arguments_that_do_not_fit_are_named():
    hidden, head, targets, weights = _data('float32')
    with pytest.raises(ValueError, match='vocab_chunk'):
        next_token_loss(hidden, head, targets, vocab_chunk=0)
    with pytest.raises(ValueError, match='targets'):
        next_token_loss(hidden, head, targets[:3])
    with pytest.raises(ValueError, match='weights'):
        next_token_loss(hidden, head, targets, weights[:, None])
    with pytest.raises(ValueError, match='head'):
        next_token_loss(hidden, head.T, targets)


@pytest.mark.parametrize(('vocab', 'width'), [(24, 8), (23, 10)])
def test_chunks_are_of_equal_size_where_they_can_be(x64, vocab, width):
    """A vocabulary that chunks divide is not padded; both ways are exact."""
    hidden, head, targets, weights = _data()
    head = jnp.concatenate([head, head[:, :1]], 1)[:, :vocab]
    loss = lambda hidden, head: next_token_loss(hidden, head, targets, weights, vocab_chunk=10)
    shapes = {tuple(variable.aval.shape) for equation in jax.make_jaxpr(loss)(hidden, head).eqns for variable in equation.outvars}
    assert (3, WIDTH, width) in shapes
    got = jax.jit(jax.grad(loss, (0, 1)))(hidden, head)
    expected = jax.jit(jax.grad(lambda hidden, head: _full(hidden, head, targets, weights), (0, 1)))(hidden, head)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-12)


def test_half_precision_multiplies_in_its_dtype_backwards_too():
    hidden, head, targets, weights = _data('float32')
    loss = lambda hidden, head: next_token_loss(hidden, head, targets, weights, vocab_chunk=8)
    narrow = hidden.astype(jnp.bfloat16), head
    got, expected = jax.jit(jax.grad(loss, (0, 1)))(*narrow), jax.jit(jax.grad(loss, (0, 1)))(narrow[0].astype(jnp.float32), head)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a.astype(jnp.float32), b, atol=0.02 * float(jnp.abs(b).max()))
    assert [x.dtype for x in got] == [jnp.bfloat16, jnp.float32]
    dtypes = re.findall(r'(\w+)\[[^]]*\] = dot_general', str(jax.make_jaxpr(jax.grad(loss, (0, 1)))(*narrow)))
    assert dtypes == ['f32', 'f32', 'bf16', 'bf16']  # the logits, again, and their derivatives
