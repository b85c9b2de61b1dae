"""Numbers of terms with a long tail, against the truncated lognormal's own quantiles."""

from __future__ import annotations

import math
import random
from statistics import NormalDist

import numpy as np
import pytest

from rewards.chain_sum_settings import draw_term_count
from rewards.reasoning_gym import make_dataset

LONG = {"min_terms": 8, "max_terms": 160, "median_terms": 32, "log_sd": 0.8}


def probability_up_to(count: int) -> float:
    """Of a lognormal with median 32 and log-sd 0.8, rounded, given that it is within 8..160."""

    def below(edge: float) -> float:
        return NormalDist(math.log(32), 0.8).cdf(math.log(edge))

    lowest, highest = below(7.5), below(160.5)
    return (below(count + 0.5) - lowest) / (highest - lowest)


def test_term_counts_follow_the_lognormal_between_their_bounds() -> None:
    rng = random.Random(0)
    counts = np.array([draw_term_count(rng, 8, 160, 32, 0.8) for _ in range(20_000)])
    assert counts.min() == 8 and counts.max() <= 160
    for count in (8, 16, 32, 64, 128):
        expected = probability_up_to(count)
        sd = math.sqrt(expected * (1 - expected) / len(counts))
        assert abs((counts <= count).mean() - expected) < 5 * sd


def test_chain_sums_have_such_numbers_of_terms_and_right_answers() -> None:
    config = {**LONG, "seed": 3, "size": 600, "min_value": 1, "max_value": 20}
    rows = [make_dataset("chain_sum", config)[i] for i in range(600)]
    counts = np.array([row["metadata"]["num_terms"] for row in rows])
    expressions = [row["metadata"]["expression"] for row in rows]
    assert [len(each.split()[::2]) for each in expressions] == counts.tolist()
    assert all(
        str(eval(each)) == row["answer"] for each, row in zip(expressions, rows, strict=True)
    )
    assert {int(term) for each in expressions for term in each.split()[::2]} == set(range(1, 21))
    for count in (16, 32, 64):
        expected = probability_up_to(count)
        assert abs((counts <= count).mean() - expected) < 0.1
    again = make_dataset("chain_sum", config)
    assert [again[i]["question"] for i in (0, 599, 0)] == [rows[i]["question"] for i in (0, 599, 0)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"median_terms": 200}, "median_terms=200 must be within min_terms=8 and max_terms=160"),
        ({"log_sd": -0.5}, "log_sd=-0.5 must be > 0"),
        ({"log_sd": 0}, "log_sd=0 must be > 0.*leave out"),
        ({"median_terms": 0}, "median_terms=0 must be within"),
    ],
)
def test_spreads_that_cannot_be_are_refused(changes: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_dataset("chain_sum", {**LONG, **changes, "seed": 0, "size": 1})


def test_another_task_has_no_such_settings() -> None:
    with pytest.raises(ValueError, match="'gcd' has no median_terms or log_sd"):
        make_dataset("gcd", {"median_terms": 5, "log_sd": 1.0, "seed": 0, "size": 1})
