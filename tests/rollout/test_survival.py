"""The product-limit estimate against other ways to the same number."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest

from rollout.survival import product_limit


def masses(lengths: list[int], ended: list[bool]) -> tuple[dict[int, Fraction], Fraction]:
    """P(length = l), and what is left beyond all, by redistribution to the right (Efron, 1967):
    each observation weighs 1/n, and one that was cut hands its weight to all that went on.
    """
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], not ended[i]))
    weight = [Fraction(1, len(order))] * len(order)
    found: dict[int, Fraction] = {}
    left = Fraction(0)
    for place, i in enumerate(order):
        if ended[i]:
            found[lengths[i]] = found.get(lengths[i], Fraction(0)) + weight[place]
        elif place + 1 < len(order):
            share = weight[place] / (len(order) - place - 1)
            weight[place + 1 :] = [w + share for w in weight[place + 1 :]]
        else:
            left = weight[place]
    return found, left


def survival(lengths: list[int], ended: list[bool], t: int) -> float:
    found, left = masses(lengths, ended)
    if t > max(lengths):
        return float(left) ** (t / max(lengths)) if max(lengths) else float(left)
    return float(1 - sum(mass for length, mass in found.items() if length <= t))


def random_sample(seed: int) -> tuple[list[int], list[bool]]:
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 12))
    ended = rng.random(n) < (0.3, 0.7, 1.0)[seed % 3]
    return rng.integers(1, 9, n).tolist(), ended.tolist()


@pytest.mark.parametrize("seed", range(60))
def test_the_curve_is_that_of_redistribution_to_the_right(seed):
    lengths, ended = random_sample(seed)
    curve = product_limit(np.array(lengths), np.array(ended))
    for t in range(15):
        assert float(curve.at(t)) == pytest.approx(survival(lengths, ended, t), abs=1e-12)


@pytest.mark.parametrize("seed", range(60))
def test_what_is_expected_to_remain_is_the_sum_of_the_curve(seed):
    lengths, ended = random_sample(seed)
    curve = product_limit(np.array(lengths), np.array(ended))
    for t in range(max(lengths) + 1):
        alive = survival(lengths, ended, t)
        if alive == 0:
            continue
        for cap in (t, t + 1, t + 3, 20):
            by_hand = sum(survival(lengths, ended, u) for u in range(t, cap)) / alive
            assert float(curve.expected_remaining(t, cap)) == pytest.approx(by_hand, abs=1e-9)


def test_the_textbook_s_small_example_comes_out():
    # Ends at 3, 5 (two) and 9, cuts at 5 and 7: at risk 6, 5, 1.
    curve = product_limit(np.array([3, 5, 5, 5, 7, 9]), np.array([1, 1, 1, 0, 0, 1], bool))
    assert curve.at(np.array([2, 3, 4, 5, 8, 9])).tolist() == pytest.approx(
        [1, 5 / 6, 5 / 6, 1 / 2, 1 / 2, 0]
    )
    # From 4 on: 5 tokens for half of the 3 in 5 that outlive 5, else 1.
    assert float(curve.expected_remaining(4, 100)) == pytest.approx(1 + 4 * 3 / 5)
    assert float(curve.expected_remaining(4, 6)) == pytest.approx(1 + 3 / 5)


def test_a_response_that_outlived_all_counts_as_one_that_was_cut():
    curve = product_limit(np.array([10, 20, 30]), np.array([True, True, True]))
    alone = float(curve.expected_remaining(60, 10**6))
    assert alone == pytest.approx(60 / math.log(4), rel=0.02)
    # The same number, the response itself being among the observations.
    among = product_limit(np.array([10, 20, 30, 60]), np.array([True, True, True, False]))
    assert float(among.expected_remaining(60, 10**6)) == pytest.approx(alone)
    assert float(curve.expected_remaining(60, 61)) == pytest.approx(1, rel=0.03)


def test_without_an_end_every_response_is_expected_to_reach_its_cap():
    for lengths in ([], [5, 8]):
        curve = product_limit(np.array(lengths, int), np.zeros(len(lengths), bool))
        assert curve.expected_remaining(np.array([0, 3, 30]), 40).tolist() == [40, 37, 10]


def test_exponential_lengths_are_forgotten_however_many_are_cut():
    rng = np.random.default_rng(0)
    mean = 200
    lengths, cuts = rng.geometric(1 / mean, 40_000), rng.integers(1, 600, 40_000)
    curve = product_limit(np.minimum(lengths, cuts), lengths <= cuts)
    found = curve.expected_remaining(np.array([0, 50, 200, 400]), 10**6)
    assert found == pytest.approx(mean, rel=0.05)
    naive = np.minimum(lengths, cuts).mean()
    assert naive < 0.75 * mean  # what taking cuts for ends would say


@pytest.mark.parametrize("t", [0, 100, 400, 1500])
def test_lognormal_lengths_have_the_mean_residual_life_of_the_formula(t):
    mu, sigma = 5.0, 1.0
    rng = np.random.default_rng(1)
    lengths = np.ceil(rng.lognormal(mu, sigma, 200_000)).astype(int)
    cuts = np.where(rng.random(200_000) < 0.3, rng.integers(1, 1500, 200_000), 10**7)
    curve = product_limit(np.minimum(lengths, cuts), lengths <= cuts)

    def above(x: float) -> float:  # P(a standard normal > x)
        return math.erfc(x / math.sqrt(2)) / 2

    z = (math.log(t) - mu) / sigma if t else -math.inf
    expected = math.exp(mu + sigma**2 / 2) * above(z - sigma) / above(z) - t
    assert float(curve.expected_remaining(t, 10**7)) == pytest.approx(expected, rel=0.08)


def test_a_cap_bounds_what_is_expected():
    rng = np.random.default_rng(2)
    lengths = rng.integers(1, 100, 500)
    curve = product_limit(lengths, rng.random(500) < 0.8)
    drawn = rng.integers(0, 300, 200)
    caps = drawn + rng.integers(0, 100, 200)
    found = curve.expected_remaining(drawn, caps)
    assert (found >= 0).all() and (found <= caps - drawn + 1e-9).all()
