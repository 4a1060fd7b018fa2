"""The Frechet distance by hand, and features that tell pictures apart."""

import numpy as np
import pytest
import torch

from craftune.studies.distance import features, frechet


def test_it_is_zero_for_the_same_pictures() -> None:
    x = np.random.default_rng(0).normal(size=(50, 4))
    assert frechet(x, x) == pytest.approx(0, abs=1e-9)


def test_of_two_normal_laws_it_is_the_closed_form() -> None:
    """Shift 2 along one axis and spreads (1, 3) against (2, 1): 4 + (1 - 2)^2 + (3 - 1)^2."""
    square = np.array([[1, 1], [1, -1], [-1, 1], [-1, -1]]) * np.sqrt(3 / 4)
    first, second = square * [1, 3], square * [2, 1] + [2, 0]
    assert frechet(first, second) == pytest.approx(9)
    turn = np.array([[0.6, -0.8], [0.8, 0.6]])
    assert frechet(first @ turn, second @ turn) == pytest.approx(9)


def test_features_are_unit_vectors_of_a_tower() -> None:
    found = features("h", torch.rand(3, 3, 64, 64))
    assert found.shape == (3, 128)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-5)


def test_the_tower_that_reads_prompts_has_none() -> None:
    with pytest.raises(ValueError, match="'h' or 'p'"):
        features("i", torch.rand(1, 3, 64, 64))
