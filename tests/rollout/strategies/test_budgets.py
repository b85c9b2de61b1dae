"""Token budgets against numbers worked out by hand."""

from collections import Counter

import pytest

from rollout.strategies.budgets import Tally, level_tokens, response_tokens, width
from rollout.strategies.settings import TreePOSettings
from rollout.strategies.treepo import TreePO

SHORT = dict(
    n=16, segment_length=4, max_depth=5, max_response_length=20, stop_token_ids=[1],
    repetition_count=0,
)  # fmt: skip


def settings(**changes):
    return TreePOSettings(**{**SHORT, **changes})


def test_a_level_s_tokens_limit_the_active_paths():
    chosen = settings(budget="level_tokens", budget_tokens=27)  # 6 segments of 4
    assert level_tokens(Tally(finished=3, finished_tokens=40, mean_length=8.0), chosen) == 9
    assert width(Tally(finished=3, finished_tokens=40, mean_length=8.0), settings()) == 16


@pytest.mark.parametrize(
    ("finished", "tokens", "mean_length", "expected"),
    [
        (0, 0, 4.0, 12),  # floor(100 / (4 + 4)) = 12
        (2, 30, 10.0, 7),  # 2 + floor(70 / 14)
        (2, 30, 10.5, 6),  # 2 + floor(70 / 14.5) = 2 + 4
        (0, 0, 1.0, 16),  # 20, but n = 16
        (2, 99, 20.0, 3),  # 2 + 0, but at least 3
        (2, 130, 20.0, 3),  # overdrawn
        (8, 130, 20.0, 6),  # overdrawn: floor(-30 / 24) = -2
    ],
)
def test_the_cap_of_a_response_budget_by_hand(finished, tokens, mean_length, expected):
    chosen = settings(budget="response_tokens", budget_tokens=100, budget_min_n=3)
    tally = Tally(finished=finished, finished_tokens=tokens, mean_length=mean_length)
    assert response_tokens(tally, chosen) == expected


def test_a_tree_under_a_level_budget_stays_narrow_and_still_fills_its_width(drive):
    strategy = TreePO(settings(budget="level_tokens", budget_tokens=20))  # 5 paths
    for key in range(10):
        engine = drive.ScriptedEngine(drive.random_script(0.1))
        state, requests = strategy.start(drive.prompt(key))
        while requests:
            assert len(requests) <= 5
            results = [engine.extend(state.segments, request) for request in requests]
            state, requests = strategy.advance(state, results)
        assert strategy.tree(state).num_leaves == 16


def test_a_level_budget_by_hand(drive):
    """20 tokens are 5 segments of 4: 2, 4, then 5 paths to the end."""
    strategy = TreePO(settings(budget="level_tokens", budget_tokens=20, fallback="none"))
    tree = drive.grow(strategy, drive.prompt(), drive.ScriptedEngine(drive.random_script(0.0)))
    assert Counter(s.level for s in tree.segments) == {0: 1, 1: 2, 2: 4, 3: 5, 4: 5, 5: 5}
    strategy = TreePO(
        settings(budget="level_tokens", budget_tokens=20, fallback="finished_first",
                 fallback_cut="from_start")
    )  # fmt: skip
    tree = drive.grow(strategy, drive.prompt(), drive.ScriptedEngine(lambda c, r: [1]))
    # 2, then 4 more (two leaves cut once each), then 5 (more are not allowed), then 5
    assert tree.num_leaves == 16 and tree.counters.restarts == 14


def test_a_tree_under_a_response_budget_by_hand(drive):
    """Segments of 4 and no end before 20 tokens. 60 tokens: after level 1 the cap is floor(60 / 8)
    = 7 paths, B = min(7, 4) = 4; after level 2 floor(60 / 12) = 5, B = 5; then 5 go on alone,
    though floor(60 / 16) = 3. With 5 leaves of 20 tokens the budget is used up.
    """
    strategy = TreePO(settings(budget="response_tokens", budget_tokens=60))
    tree = drive.grow(strategy, drive.prompt(), drive.ScriptedEngine(drive.random_script(0.0)))
    assert Counter(s.level for s in tree.segments) == {0: 1, 1: 2, 2: 4, 3: 5, 4: 5, 5: 5}
    assert tree.num_leaves == 5 and tree.counters.fallbacks == 0


def test_a_response_budget_s_rest_goes_to_the_fallback(drive):
    """Responses of one token: the cap is 2 + floor((20 - 2) / (1 + 4)) = 5, then with 5 leaves
    5 + floor(15 / 5) = 8, 8 + floor(12 / 5) = 10, 10 + 2 = 12, 13, 14, 15; at 15 floor(5 / 5) = 1
    makes 16.
    """
    strategy = TreePO(settings(budget="response_tokens", budget_tokens=20))
    state, requests = strategy.start(drive.prompt())
    engine = drive.ScriptedEngine(lambda context, request: [1])
    asked = []
    while requests:
        asked.append(len(requests))
        results = [engine.extend(state.segments, request) for request in requests]
        state, requests = strategy.advance(state, results)
    assert asked == [2, 3, 3, 2, 2, 1, 1, 1, 1]
    few = TreePO(settings(budget="response_tokens", budget_tokens=3, budget_min_n=5))
    tree = drive.grow(few, drive.prompt(), drive.ScriptedEngine(lambda context, request: [1]))
    assert tree.num_leaves == 5


@pytest.mark.parametrize("eos_rate", [0.02, 0.1, 0.4])
def test_a_response_budget_is_overdrawn_only_by_what_active_paths_still_need(drive, eos_rate):
    """Paths once begun go on to their ends; each cost less than n * 20 tokens in all."""
    free, frugal = [], []
    for key in range(20):
        for budget, lengths in ((dict(), free), (dict(
            budget="response_tokens", budget_tokens=80), frugal)):  # fmt: skip
            engine = drive.ScriptedEngine(drive.random_script(eos_rate))
            tree = drive.grow(TreePO(settings(**budget)), drive.prompt(key), engine)
            tokens = [len(tree.path_token_ids(leaf, with_prompt=False)) for leaf in tree.leaves]
            lengths.append(sum(tokens))
    assert sum(frugal) < sum(free)
    assert sum(frugal) / len(frugal) < 2 * 80
