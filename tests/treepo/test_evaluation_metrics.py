from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from treepo.evaluation_metrics import (
    bootstrap_interval,
    confidence_interval,
    maj_at_k,
    majority,
    mean_at_k,
    pass_at_k,
    wilson_interval,
)

SAMPLES = st.lists(st.booleans(), min_size=1, max_size=9)


def test_mean_is_the_share_of_correct_samples() -> None:
    assert mean_at_k([True, False, False, True, False]) == 0.4


@pytest.mark.parametrize(
    ("correct", "n", "k", "expected"),
    [
        (0, 4, 2, 0.0),
        (1, 4, 1, 1 / 4),
        (1, 4, 2, 1 / 2),  # 3 of 6 pairs hold the right one
        (2, 4, 2, 5 / 6),  # only the pair of the two wrong ones fails
        (3, 4, 2, 1.0),
        (2, 5, 3, 9 / 10),  # 1 of 10 triples is all wrong
        (4, 4, 4, 1.0),
        (1, 4, 4, 1.0),
    ],
)
def test_pass_at_k_of_small_cases_by_hand(correct: int, n: int, k: int, expected: float) -> None:
    assert pass_at_k([True] * correct + [False] * (n - correct), k) == pytest.approx(expected)


@given(SAMPLES, st.data())
@settings(max_examples=60, deadline=None)
def test_pass_at_k_is_the_mean_over_all_subsets(correct: list[bool], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(correct)))
    subsets = list(combinations(correct, k))
    assert pass_at_k(correct, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_pass_at_k_stays_exact_where_binomials_overflow() -> None:
    assert pass_at_k([True] + [False] * 4095, 2048) == pytest.approx(0.5)


def test_the_majority_is_the_most_frequent_answer() -> None:
    assert majority(["3", "7", "7"]) == 1


def test_of_equally_frequent_answers_the_first_seen_wins() -> None:
    assert majority(["9", "7", "7", "9"]) == 0
    assert majority([None, "5", "4", "4", "5"]) == 1


def test_samples_without_an_answer_do_not_vote() -> None:
    assert majority([None, None, "4"]) == 2
    assert majority([None, None]) is None
    assert maj_at_k([None, None], [False, False], 2) == 0.0


def test_maj_at_n_is_the_one_vote() -> None:
    answers = ["4", "5", "5", "6"]
    assert maj_at_k(answers, [a == "5" for a in answers], 4) == 1.0
    assert maj_at_k(answers, [a == "4" for a in answers], 4) == 0.0


def test_maj_at_k_of_a_small_case_by_hand() -> None:
    # Pairs of (4, 5, 5) in order: 4,5 -> 4 (tie, first seen); 4,5 -> 4; 5,5 -> 5. Right is 5.
    assert maj_at_k(["4", "5", "5"], [False, True, True], 2) == pytest.approx(1 / 3)
    # All triples of (5, 4, 5, 4): 5,4,5 -> 5; 5,4,4 -> 4; 5,5,4 -> 5; 4,5,4 -> 4.
    assert maj_at_k(list("5454"), [True, False] * 2, 3) == pytest.approx(1 / 2)


@given(SAMPLES)
@settings(max_examples=40, deadline=None)
def test_maj_at_1_is_the_mean(correct: list[bool]) -> None:
    answers = ["right" if c else "wrong" for c in correct]
    assert maj_at_k(answers, correct, 1) == pytest.approx(mean_at_k(correct))


def test_drawn_subsets_come_near_the_expected_vote() -> None:
    answers = ["r"] * 18 + ["w"] * 12  # C(30, 5) subsets are too many to list
    correct = [a == "r" for a in answers]
    # Hypergeometric: at least 3 of 5 from 18 right of 30.
    from math import comb

    expected = sum(comb(18, i) * comb(12, 5 - i) for i in (3, 4, 5)) / comb(30, 5)
    value = maj_at_k(answers, correct, 5)
    assert value == pytest.approx(expected, abs=0.04)  # 4 standard deviations of 2000 draws
    assert value == maj_at_k(answers, correct, 5)  # the same draws each time


@pytest.mark.parametrize("k", [0, 4, -1])
def test_more_samples_than_there_are_is_an_error(k: int) -> None:
    with pytest.raises(ValueError, match=f"k={k} of n=3"):
        pass_at_k([True, False, True], k)
    with pytest.raises(ValueError, match=f"k={k} of n=3"):
        maj_at_k(["1", "2", "3"], [True, False, True], k)


def test_wilson_agrees_with_published_values() -> None:
    # Newcombe 1998, "Two-sided confidence intervals for the single proportion", table I, method 3.
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert wilson_interval(0, 20) == pytest.approx((0.0000, 0.1611), abs=5e-5)
    assert wilson_interval(1, 29) == pytest.approx((0.0061, 0.1718), abs=5e-5)


def test_the_bootstrap_of_a_large_sample_is_the_normal_interval() -> None:
    values = [0.0, 0.25, 0.5, 1.0] * 250
    mean = sum(values) / len(values)
    half = 1.96 * (sum((v - mean) ** 2 for v in values) / len(values)) ** 0.5 / len(values) ** 0.5
    low, high = bootstrap_interval(values)
    assert (low, high) == pytest.approx((mean - half, mean + half), abs=0.002)
    assert (low, high) == bootstrap_interval(values)


def test_the_interval_of_a_perfect_score_has_a_width() -> None:
    low, high = confidence_interval([1.0] * 50)
    assert (low, high) == wilson_interval(50, 50)
    assert low < 0.95 and high == pytest.approx(1.0)


def test_fractions_get_the_bootstrap() -> None:
    values = [0.5, 1.0, 0.25]
    assert confidence_interval(values) == bootstrap_interval(values)
