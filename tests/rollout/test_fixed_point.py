"""Integer weights and their inverse cumulative distribution, against Python's integers."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch

from rollout.fixed_point import BIAS, UNIT, biased_weights, inverse_cdf


def brute_force(weights, u):
    """The first column whose cumulative weight exceeds u of the total, the product rounded to
    float64 and down to an integer below the total.
    """
    total = sum(weights)
    target = min(int(u * float(total)), total - 1)
    running = 0
    for i, weight in enumerate(weights):
        running += weight
        if running > target:
            return i
    raise AssertionError


@pytest.mark.parametrize("columns", [*range(1, 41), 63, 64, 65, 1000, 4096])
def test_every_column_count_gives_the_brute_force_column(columns):
    rng = np.random.default_rng(columns)
    n = 12
    weights = rng.integers(0, 1 << 50, (n, columns)) * (rng.random((n, columns)) < 0.3)
    weights[0] = weights[1] = 0
    weights[0, -1] = weights[1, 0] = 1  # one column alone, of the least weight
    weights[2:, rng.integers(columns)] += 1
    weights = weights >> max(0, columns.bit_length() - 3)  # sums below 2^53
    weights[:2] = np.maximum(weights[:2], 0)
    weights[0, -1] = weights[1, 0] = 1
    weights[2:, 0] += 1
    u = np.where(np.arange(n) % 3 == 0, 1 - 2.0**-53, rng.random(n))
    u = np.where(np.arange(n) % 4 == 1, 2.0**-53, u)
    expected = [brute_force(row.tolist(), x) for row, x in zip(weights, u, strict=True)]
    for bias in (0, BIAS):
        found = inverse_cdf(torch.from_numpy(weights + bias), torch.from_numpy(u), bias=bias)
        assert found.tolist() == expected
    assert (weights[np.arange(n), expected] > 0).all()


def test_the_draw_nearest_one_takes_the_last_column_that_has_weight():
    weights = torch.tensor([[0, 1 << 49, 0, 1 << 49, 0]]).expand(5, 5)
    edges = torch.tensor([2.0**-53, 0.5 - 2.0**-53, 0.5, 1 - 2.0**-53, 1.0], dtype=torch.float64)
    assert inverse_cdf(weights, edges).tolist() == [1, 1, 3, 3, 3]


def test_weights_are_probabilities_rounded_to_the_grid():
    rng = np.random.default_rng(0)
    probs = np.concatenate([rng.random(500), 2.0 ** -rng.uniform(0, 60, 500), [0.0, 1.0]])
    weights = biased_weights(torch.from_numpy(probs)[None])[0] - BIAS
    for p, weight in zip(probs.tolist(), weights.tolist(), strict=True):
        assert abs(Fraction(p) - weight * Fraction(UNIT)) <= Fraction(UNIT) / 2


def test_sums_of_weights_are_the_same_in_any_order():
    probs = torch.softmax(
        torch.randn(3, 9999, generator=torch.Generator().manual_seed(0)).double(), 1
    )
    weights = biased_weights(probs) - BIAS
    exact = [sum(row) for row in weights.tolist()]
    shuffled = weights[:, torch.randperm(9999, generator=torch.Generator().manual_seed(1))]
    assert weights.sum(1).tolist() == shuffled.flip(1).cumsum(1)[:, -1].tolist() == exact
    assert all(abs(total * UNIT - 1) < 9999 * UNIT for total in exact)
