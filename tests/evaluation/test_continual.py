"""Metrics of a stream, by hand and on SEAL's published matrix of eight passages."""

import json

import numpy as np
import pytest

from nested_jax.evaluation.continual import continual_metrics, gain_by_lag, intransigence, regressions

MATRIX = np.array([[0.8, 0.3, 0.1], [0.6, 0.9, 0.2], [0.7, 0.5, 1.0]])
BEFORE = np.array([0.1, 0.1, 0.1])
LOWER = np.tril(np.ones((3, 3), bool))


def test_by_hand():
    found = continual_metrics(MATRIX, BEFORE)
    np.testing.assert_allclose(found, (2.2 / 3, 0.9, (-0.1 - 0.4) / 2, (0.2 + 0.1) / 2, (0.1 + 0.4) / 2))
    np.testing.assert_allclose(gain_by_lag(MATRIX, BEFORE), [0.8, (0.5 + 0.4) / 2, 0.6])
    assert intransigence(MATRIX, np.array([0.8, 1.0, 1.0])) == pytest.approx(0.1 / 3)
    assert continual_metrics(np.where(LOWER, MATRIX, np.nan), BEFORE).forward_transfer is None


def test_forgetting_is_from_the_best_and_not_from_the_first():
    matrix = np.array([[0.5, 0.0, 0.0], [0.9, 0.5, 0.0], [0.7, 0.5, 0.5]])
    found = continual_metrics(matrix, BEFORE)
    assert found.forgetting == pytest.approx(0.1) and found.backward_transfer == pytest.approx(0.1)


def test_seals_published_stream(shared_data):
    stream = json.loads((shared_data / 'seal_squad' / 'published_results.json').read_text())['continual_self_edits']
    rows = np.array(stream['mean_over_sequences'])
    rows[1:][np.triu_indices(8, 1)] = np.nan  # stored as 0: not measured
    found = continual_metrics(rows[1:], rows[0])
    assert found.average_accuracy == pytest.approx(0.247, abs=6e-4) and rows[0].mean() == pytest.approx(0.307, abs=1.2e-3)
    assert found.learning_accuracy == pytest.approx(0.415, abs=6e-4)
    assert found.backward_transfer == pytest.approx(-0.191, abs=6e-4)
    published = [0.107, 0.052, -0.026, -0.066, -0.069, -0.100, -0.124, -0.142]
    np.testing.assert_allclose(gain_by_lag(rows[1:], rows[0]), published, rtol=0, atol=2e-3)


def test_regressions():
    assert regressions([1, 1, 0, 0, 1], [1, 0, 1, 0, 1]) == (0.2, 0.2)
    with pytest.raises(ValueError, match='after has shape'):
        regressions([1], [1, 0])


def test_bad_matrices_are_named():
    with pytest.raises(ValueError, match=r'matrix has shape \(3, 3\), allowed is \(2, 2\)'):
        continual_metrics(MATRIX, BEFORE[:2])
    with pytest.raises(ValueError, match='NaN in its lower triangle'):
        gain_by_lag(np.where(LOWER.T, MATRIX, np.nan), BEFORE)
