"""Trees are dealt to workers each exactly once, evenly, and stop as one call would."""

from __future__ import annotations

from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest

import treepo.cluster
from rollout.growth import Growth, GrowthLimits, nothing_drawn
from rollout.metrics import CostLedger
from rollout.strategies.base import Prompt
from rollout.strategies.flat import Flat
from rollout.strategies.settings import FlatSettings
from treepo.cluster import Cluster
from treepo.config import ClusterConfig
from treepo.shares import deal, limits_of_shares


def test_trees_go_round_without_expectations():
    assert deal([None] * 7, 3) == [[0, 3, 6], [1, 4], [2, 5]]
    assert deal([None] * 2, 4) == [[0], [1], [], []]
    assert deal([], 2) == deal([], 2, []) == [[], []]


def test_trees_go_home_and_the_others_to_whoever_has_least():
    assert deal([1, None, 1, None, None], 2) == [[1, 3, 4], [0, 2]]
    assert deal([1, None, 0, None], 2, [9, 1, 1, 7]) == [[1, 2, 3], [0]]


def test_the_longest_go_first_to_whoever_has_least():
    assert deal([None] * 6, 2, [1, 9, 2, 8, 3, 4]) == [[1, 2, 4], [0, 3, 5]]  # 14 and 13


@pytest.mark.parametrize("seed", range(20))
def test_expected_loads_are_within_four_thirds_of_the_best_split(seed):
    rng = np.random.default_rng(seed)
    expected = rng.lognormal(3, 1, size=8).tolist()
    num_workers = int(rng.integers(2, 4))
    shares = deal([None] * 8, num_workers, expected)
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


@pytest.mark.parametrize("keeps_kv", [True, False])
def test_unfinished_trees_go_back_to_the_worker_that_kept_their_keys_and_values(
    monkeypatch, keeps_kv
):
    """Workers that put everything aside; the second call has the work in another order."""
    seen: list[list[str]] = []

    def worker_of(rank):
        def grow(work, *_):
            seen[-1][rank] = "".join(item.problem_id for item in work)
            return [unfinished(item) for item in work], CostLedger(generated_tokens=len(work))

        return SimpleNamespace(grow=SimpleNamespace(remote=grow))

    flat = Flat(FlatSettings(n=1, max_response_length=4))

    def unfinished(item):
        if isinstance(item, Growth):
            return item
        state, requests = flat.start(item)
        partials = tuple(map(nothing_drawn, requests))
        return Growth(problem_id=item.problem_id, state=state, partials=partials)

    cluster = Cluster(config=ClusterConfig(num_rollout_workers=2))
    cluster.rollout = [worker_of(rank) for rank in range(2)]
    cluster._keeps_kv = keeps_kv
    monkeypatch.setattr(treepo.cluster, "answers", lambda role, refs, timeout: refs)
    work: list = [
        Prompt(problem_id=name, token_ids=np.array([5], np.int32), root_key=i)
        for i, name in enumerate("abcd")
    ]
    for _ in range(2):
        seen.append(["", ""])
        work, ledger = cluster.grow(work, "flat", flat.settings, 0, GrowthLimits(segment_length=1))
        assert ledger.generated_tokens == 4
        assert sorted(tree.problem_id for tree in work) == list("abcd")
        work = [work[i] for i in (1, 0, 3, 2)]
    assert seen == [["ac", "bd"], ["ac", "bd"] if keeps_kv else ["bd", "ac"]]
