"""Bits per byte and perplexity from sums of nats."""

import math

import numpy as np
import pytest

from nested_jax.evaluation.perplexity import HeldOut, evaluate

BYTE_LENGTHS = np.array([1, 2, 3, 5])


def count_bytes(targets, weights):
    return int((BYTE_LENGTHS[targets] * weights.astype(np.int64)).sum())


def uniform_step(params, batch):
    """A model that gives every one of four tokens the probability 1/4."""
    return np.float32(math.log(4) * batch['weights'].sum()), np.float32(batch['weights'].sum())


def test_uniform_model_over_tokens_of_several_bytes():
    targets = np.array([[0, 1, 2], [3, 3, 0]])
    weights = np.array([[1, 1, 1], [1, 0, 0]], np.float32)
    result = evaluate(uniform_step, None, [dict(targets=targets, weights=weights)], count_bytes)
    assert (result.tokens, result.num_bytes) == (4, 11)
    np.testing.assert_allclose(result.perplexity, 4, rtol=1e-6)
    np.testing.assert_allclose(result.bits_per_byte, 4 * 2 / 11, rtol=1e-6)


def test_sums_do_not_depend_on_how_rows_are_batched():
    rng = np.random.default_rng(1)
    targets, weights = rng.integers(0, 4, (12, 5)), (rng.random((12, 5)) < 0.5).astype(np.float32)
    results = []
    for rows in (12, 4, 3):
        batches = [dict(targets=targets[i : i + rows], weights=weights[i : i + rows]) for i in range(0, 12, rows)]
        results.append(evaluate(uniform_step, None, batches, count_bytes))
    assert len({(result.tokens, result.num_bytes) for result in results}) == 1
    np.testing.assert_allclose([result.nats for result in results], results[0].nats, rtol=1e-6)


def test_many_small_sums_stay_exact():
    """float32 stops counting at 2**24."""
    big = lambda params, batch: (np.float32(1.0), np.float32(2**23 + 1))
    batches = [dict(targets=np.zeros((1, 1), int), weights=np.ones((1, 1), np.float32))] * 4
    assert evaluate(big, None, batches, count_bytes).tokens == 4 * (2**23 + 1)


def test_nothing_to_evaluate_on_is_an_error():
    with pytest.raises(ValueError, match='0 targets'):
        evaluate(uniform_step, None, [], count_bytes)
    with pytest.raises(ValueError, match='0 targets'):
        evaluate(uniform_step, None, [dict(targets=np.zeros((1, 2), int), weights=np.zeros((1, 2)))], count_bytes)


def test_perplexity_of_a_hopeless_model_is_infinite_not_an_error():
    assert HeldOut(nats=1e6, tokens=1, num_bytes=1).perplexity == math.inf
