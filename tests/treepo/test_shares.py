"""Trees are dealt to workers each exactly once, evenly, and stop as one call would."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from rollout.growth import GrowthLimits
from treepo.shares import deal, limits_of_shares


def test_trees_go_round_without_expectations():
    assert deal(7, 3) == [[0, 3, 6], [1, 4], [2, 5]]
    assert deal(2, 5) == [[0], [1]]
    assert deal(0, 3) == deal(0, 3, []) == []


def test_the_longest_go_first_to_whoever_has_least():
    assert deal(6, 2, [1, 9, 2, 8, 3, 4]) == [[1, 2, 4], [0, 3, 5]]  # 14 and 13


@pytest.mark.parametrize("seed", range(20))
def test_expected_loads_are_within_four_thirds_of_the_best_split(seed):
    rng = np.random.default_rng(seed)
    expected = rng.lognormal(3, 1, size=8).tolist()
    num_workers = int(rng.integers(2, 4))
    shares = deal(8, num_workers, expected)
    assert sorted(i for share in shares for i in share) == list(range(8))
    best = min(
        max(sum(e for e, w in zip(expected, who, strict=True) if w == rank) for rank in range(3))
        for who in product(range(num_workers), repeat=8)
    )
    assert max(sum(expected[i] for i in share) for share in shares) <= best * 4 / 3


def test_workers_share_the_trees_after_which_a_call_stops():
    limits = GrowthLimits(segment_length=4, stop_when_finished=8)
    parts = limits_of_shares(limits, [5, 4, 4])
    assert [part.stop_when_finished for part in parts] == [3, 3, 2]  # 3.08, 2.46, 2.46
    assert {part.segment_length for part in parts} == {4}
    few = limits_of_shares(GrowthLimits(stop_when_finished=1), [2, 2, 2])
    assert [part.stop_when_finished for part in few] == [1, 1, 1]
    assert limits_of_shares(GrowthLimits(), [2, 2]) == [GrowthLimits()] * 2
