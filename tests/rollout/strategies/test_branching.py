"""Branching budgets against numbers worked out by hand."""

import math
from collections import Counter

import numpy as np
import pytest

from rollout.strategies.branching import ActivePath
from rollout.strategies.branching_temperature import branching_temperature, progress
from rollout.strategies.rule_settings import BRANCHING_SCORES, BRANCHINGS
from rollout.strategies.settings import TreePOSettings
from rollout.strategies.treepo import TreePO
from treepo.base.keys import child_key

SHORT = dict(n=16, segment_length=4, max_depth=6, max_response_length=24, stop_token_ids=[1])


def settings(**changes):
    return TreePOSettings(**{**SHORT, **changes})


def active(key, segment, above=(), entropy=None, level=1):
    return ActivePath(
        path_key=key,
        level=level,
        logprobs=np.array([*above, *segment], np.float32),
        segment_logprobs=np.array(segment, np.float32),
        segment_entropy=None if entropy is None else np.array(entropy, np.float32),
    )


def copies(rule, paths, budget, **changes):
    return BRANCHINGS.get(rule)(paths, budget, settings(branching=rule, **changes))


# x = -1, -2, -4 at T = 2. low: exp(-(x - min)/2) = .2231, .3679, 1, over their sum .1402, .2312,
# .6285; of 7 forks beyond one each .9817, 1.6185, 4.3998: whole 0, 1, 4, two more to the largest
# remainders. high: exp(+...) = 4.4817, 2.7183, 1: .5466, .3315, .1220: 3.8259, 2.3205, .8537.
THREE = [active(30, [-1.5, -0.5]), active(20, [-2.0]), active(10, [-3.0, -5.0])]


def test_improbable_paths_get_more_by_hand():
    assert copies("low_logprob", THREE, 10) == [2, 3, 5]


def test_probable_paths_get_more_by_hand():
    assert copies("high_logprob", THREE, 10) == [5, 3, 2]


def test_uncertain_paths_get_more_by_hand():
    paths = [active(1, [0.0] * 2, entropy=h) for h in ([3.5, 2.5], [2.0, 2.0], [0.0, 0.0])]
    # 3, 2 and 0 nats at T = 2: the numbers of high_logprob above
    assert copies("entropy", paths, 10) == [5, 3, 2]


def test_a_low_temperature_gives_all_to_one_path_and_a_high_one_shares_evenly():
    assert copies("low_logprob", THREE, 12, branching_temperature=[1e-3]) == [1, 1, 10]
    assert copies("high_logprob", THREE, 12, branching_temperature=[1e-3]) == [10, 1, 1]
    assert copies("high_logprob", THREE, 12, branching_temperature=[1e-300]) == [10, 1, 1]
    assert copies("low_logprob", THREE, 12, branching_temperature=[1e6]) == [4, 4, 4]


def test_very_different_log_probs_do_not_overflow():
    paths = [active(1, [-1e5]), active(2, [0.0])]
    assert copies("low_logprob", paths, 9) == [8, 1]
    assert copies("high_logprob", paths, 9) == [1, 8]


def test_the_scores_by_hand():
    path = active(1, [-2.0, -6.0], above=[-1.0, -3.0])
    found = {name: BRANCHING_SCORES.get(name)(path) for name in BRANCHING_SCORES}
    assert found == {"cumulative": -12.0, "mean": -3.0, "last_segment": -4.0}


def test_each_score_may_favour_another_path():
    paths = [
        active(1, [-4.0] * 2, above=[-0.1] * 6),  # sum -8.6, mean -1.075, last -4
        active(2, [-1.5] * 2, above=[-1.5] * 6),  # sum -12, mean -1.5, last -1.5
        active(3, [-2.0] * 2, above=[-2.0]),  # sum -6, mean -2, last -2
    ]
    cold = dict(branching_temperature=[1e-3])
    favoured = {
        name: copies("low_logprob", paths, 7, branching_score=name, **cold).index(5)
        for name in BRANCHING_SCORES
    }
    assert favoured == {"cumulative": 1, "mean": 2, "last_segment": 0}


def test_ties_go_to_the_smaller_path_key_whatever_the_order_and_the_last_digits():
    paths = [active(9, [-1.0]), active(4, [-1.0 - 2e-7]), active(6, [-1.0 + 1e-7])]
    for turn in range(3):
        turned = paths[turn:] + paths[:turn]
        for rule in ("low_logprob", "high_logprob"):
            found = copies(rule, turned, 5)
            assert dict(zip([p.path_key for p in turned], found, strict=True)) == {4: 2, 6: 2, 9: 1}


def test_shares_agree_with_the_largest_remainder_method_on_random_paths():
    rng = np.random.default_rng(0)
    for _ in range(300):
        count = int(rng.integers(1, 9))
        paths = [active(int(key), rng.normal(-1, 1, 3)) for key in rng.permutation(100)[:count]]
        budget = count + int(rng.integers(0, 20))
        found = copies("low_logprob", paths, budget)
        grid = [round(float(np.float64(p.segment_logprobs).mean()) * 1024) / 1024 for p in paths]
        raw = [math.exp(-(x - min(grid)) / 2.0) for x in grid]
        exact = [(budget - count) * r / sum(raw) for r in raw]
        seats = [math.floor(e) for e in exact]
        by_remainder = sorted(range(count), key=lambda k: -(exact[k] - seats[k]))
        for k in by_remainder[: budget - count - sum(seats)]:
            seats[k] += 1
        assert found == [1 + seat for seat in seats]


# --- temperature ---


@pytest.mark.parametrize(
    ("schedule", "temperatures", "expected"),
    [
        ("constant", [], [2.0] * 5),
        ("constant", [3.0], [3.0] * 5),
        ("linear", [], [5.0, 4.0, 3.0, 2.0, 1.0]),
        ("linear", [1.0, 3.0], [1.0, 1.5, 2.0, 2.5, 3.0]),
        # 0.5 + 9.5 * sin(0, 45, 90, 135, 180 degrees)
        ("sinusoidal", [], [0.5, 7.217514421272202, 10.0, 7.217514421272202, 0.5]),
    ],
)
def test_the_temperature_s_schedule_over_the_levels_at_which_paths_fork(
    schedule, temperatures, expected
):
    chosen = settings(
        branching="low_logprob", branching_schedule=schedule, branching_temperature=temperatures
    )
    found = [branching_temperature([level], chosen) for level in range(1, 6)]  # max_depth is 6
    assert found == pytest.approx(expected, abs=1e-12)


def test_paths_of_different_levels_share_the_temperature_of_their_mean_level():
    assert progress([1, 3], 6) == progress([2], 6) == 0.25
    assert progress([1], 2) == progress([1], 1) == 0.0


def test_the_schedule_changes_the_shares():
    # At level 1 T = 5, at level 5 T = 1; x - min = 2 and 0.
    paths = [active(1, [-1.0]), active(2, [-3.0])]
    deep = [active(1, [-1.0], level=5), active(2, [-3.0], level=5)]
    linear = dict(branching_schedule="linear")
    assert copies("low_logprob", paths, 12, **linear) == [5, 7]  # exp(-.4): .4013 * 10
    assert copies("low_logprob", deep, 12, **linear) == [2, 10]  # exp(-2): .1192 * 10


# --- in a tree ---


@pytest.mark.parametrize(("rule", "expected"), [("low_logprob", [1, 3]), ("high_logprob", [3, 1])])
def test_a_tree_forks_by_its_paths_log_probs(drive, rule, expected):
    def script(context, request):  # tokens 71 have log-prob -0.05, tokens 30 -4.95
        return [71] * 4 if request.path_key == child_key(7, 0) else [30] * 4

    cold = settings(branching=rule, repetition_count=0, branching_temperature=[0.1])
    strategy = TreePO(cold)
    engine = drive.ScriptedEngine(script, by_token=True)
    state, requests = strategy.start(drive.prompt(7))
    results = [engine.extend(state.segments, request) for request in requests]
    state, requests = strategy.advance(state, results)
    forks = Counter(int(state.segments[r.parent].token_ids[0]) for r in requests)
    assert [forks[71], forks[30]] == expected


def test_entropies_are_asked_for_only_by_rules_that_read_them(drive):
    for rule in BRANCHINGS:
        _, requests = TreePO(settings(branching=rule)).start(drive.prompt())
        assert {r.spec.wants_entropy for r in requests} == {rule == "entropy"}


def test_a_rule_of_ones_own_may_read_entropies(drive, tmp_path):
    file = tmp_path / "most_uncertain.py"
    file.write_text(
        "from rollout.strategies.branching import reads_entropy\n"
        "@reads_entropy\n"
        "def rule(paths, budget, settings):\n"
        "    order = sorted(paths, key=lambda p: (-p.segment_entropy.mean(), p.path_key))\n"
        "    return [1 + (budget - len(paths)) * (p is order[0]) for p in paths]\n"
    )
    strategy = TreePO(settings(branching=f"{file}:rule"))
    tree = drive.grow(
        strategy, drive.prompt(), drive.ScriptedEngine(drive.random_script(0.02), by_token=True)
    )
    assert tree.num_leaves == 16
