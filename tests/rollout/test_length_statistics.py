"""What lengths seen so far say of responses to come, and what that is worth to a scheduler."""

from __future__ import annotations

import heapq
import json
import pickle

import numpy as np
import pytest

from rollout.length_statistics import (
    PAUSED,
    LengthStatistics,
    Observation,
    longest_first,
    relative_error,
)
from rollout.tree import ANSWER, DEPTH, EOS, REPETITION, TRUNCATED


def seen(prompt_id: str, length: int, finish_reason: str = EOS, **fields) -> Observation:
    known = {"policy_version": 3, "sampling": "t=1", "cap": 1000, **fields}
    return Observation(prompt_id=prompt_id, length=length, finish_reason=finish_reason, **known)


def test_a_prompt_is_predicted_by_its_own_history_and_another_by_all():
    statistics = LengthStatistics().add([seen("a", 10), seen("a", 20), seen("b", 300)])
    predictor = statistics.predictor("t=1")
    assert predictor.expected_remaining("a", [0, 10], 1000).tolist() == [15, 10]
    assert predictor.expected_remaining("b", [0, 100], 1000).tolist() == [300, 200]
    assert predictor.expected_remaining("c", 0, 1000) == pytest.approx(110)
    assert predictor.expected_remaining("c", 20, 1000) == pytest.approx(280)
    assert predictor.expected_remaining("c", 20, 120) == pytest.approx(100)


def test_before_anything_has_ended_the_cap_is_expected():
    predictor = LengthStatistics().predictor("t=1", [seen("a", 64, PAUSED)])
    assert predictor.expected_remaining("a", [64, 0], 512).tolist() == [448, 512]


def test_finished_siblings_predict_those_that_were_put_aside():
    # Of 8 siblings 4 ended at 40 and 4 were put aside at 64; of 8 others, 1 and 7.
    groups = [("even", 4), ("late", 1)]
    unfinished = [
        seen(prompt, 40 if i < count else 64, EOS if i < count else PAUSED)
        for prompt, count in groups
        for i in range(8)
    ]
    predictor = LengthStatistics().predictor("t=1", unfinished)
    even, late = (float(predictor.expected_remaining(name, 64, 10**6)) for name in ("even", "late"))
    # S(64) is 4/8 and 7/8; the tail through it loses 1 in 1 / (1 - S ** (1/64)) a token.
    assert even == pytest.approx(1 / (1 - 0.5 ** (1 / 64)))
    assert late == pytest.approx(1 / (1 - 0.875 ** (1 / 64)))
    assert late > 4 * even


def test_what_was_cut_counts_as_longer_than_it_is():
    cut = [seen("a", 50), *[seen("a", 100, reason, cap=100) for reason in (TRUNCATED, DEPTH)]]
    ended = [seen("a", 50), seen("a", 100, ANSWER), seen("a", 100, REPETITION)]
    of_cut, of_ended = (
        float(LengthStatistics().add(rows).predictor("t=1").expected_remaining("a", 50, 10**6))
        for rows in (cut, ended)
    )
    assert of_ended == pytest.approx(50) and of_cut > 100


def test_other_sampling_settings_and_older_weights_are_left_out_where_asked():
    rows = [
        seen("a", 10, policy_version=1),
        seen("a", 30, policy_version=5),
        seen("a", 900, sampling="t=0"),
    ]
    statistics = LengthStatistics().add(rows)
    assert statistics.predictor("t=1").expected_remaining("a", 0, 1000) == 20
    newer = statistics.predictor("t=1", since_version=4)
    assert newer.expected_remaining("a", 0, 1000) == 30


def test_the_newest_are_kept_and_older_statistics_stay_as_they_were():
    first = LengthStatistics(capacity=3).add([seen("a", i) for i in (1, 2)])
    second = first.add([seen("a", i) for i in (3, 4)])
    assert [o.length for o in first.observations] == [1, 2]
    assert [o.length for o in second.observations] == [2, 3, 4]


def test_statistics_survive_a_checkpoint_as_json_and_pickled():
    statistics = LengthStatistics(capacity=9).add([seen("ä", 7), seen("b", 9, PAUSED)])
    assert LengthStatistics.from_dict(json.loads(json.dumps(statistics.as_dict()))) == statistics
    assert pickle.loads(pickle.dumps(statistics)) == statistics
    with pytest.raises(ValueError, match="no length statistics"):
        LengthStatistics.from_dict({"rows": []})


def test_impossible_observations_are_refused():
    with pytest.raises(ValueError, match=r"length=12: must be in 0\.\.cap=10"):
        seen("a", 12, cap=10)
    with pytest.raises(ValueError, match="finish_reason='stop'"):
        seen("a", 1, "stop")
    with pytest.raises(ValueError, match="capacity=0"):
        LengthStatistics(capacity=0)


def test_the_longest_goes_first_and_equal_ones_as_they_come():
    assert longest_first([1.0, 7.0, 7.0, 3.0]).tolist() == [1, 2, 3, 0]


def test_the_relative_error_is_that_of_sums():
    assert relative_error([10, 20], [20, 20]) == pytest.approx(0.25)
    assert np.isnan(relative_error([], []))


# Scheduling: 64 prompts of 8 responses, served by 128 slots in a given order.

SLOTS, PROMPTS, GROUP = 128, 64, 8


def makespan(lengths: np.ndarray, order: np.ndarray) -> float:
    """When the last of ``lengths`` is over, if each free slot takes the next in ``order``."""
    free = [0.0] * SLOTS
    for i in order:
        heapq.heapreplace(free, free[0] + lengths[i])
    return max(free)


def over_lower_bound(lengths: np.ndarray, expected: np.ndarray) -> float:
    bound = max(lengths.sum() / SLOTS, lengths.max())
    return makespan(lengths, longest_first(expected)) / bound


def epochs(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """[epochs, prompts * GROUP] lognormal lengths, cut at 4 times their mean, and the cap: prompts
    differ by 0.7 in the logarithm, responses to one by 0.4.
    """
    rng = np.random.default_rng(seed)
    of_prompt = np.repeat(rng.normal(0, 0.7, PROMPTS), GROUP)
    lengths = 300 * np.exp(of_prompt + rng.normal(0, 0.4, (2, PROMPTS * GROUP)))
    cap = int(4 * lengths.mean())
    return np.minimum(np.ceil(lengths), cap).astype(int), cap


def test_the_better_the_prediction_the_nearer_the_makespan_comes_to_its_bound():
    found: dict[str, list[float]] = {}
    for seed in range(20):
        (before, lengths), cap = epochs(seed)
        rng = np.random.default_rng(100 + seed)
        names = [str(i // GROUP) for i in range(len(lengths))]
        statistics = LengthStatistics().add(
            seen(name, int(n), TRUNCATED if n == cap else EOS, cap=cap)
            for name, n in zip(names, before, strict=True)
        )
        predictor = statistics.predictor("t=1")
        guesses = {
            "fifo": np.zeros(len(lengths)),
            "noisy": lengths * np.exp(rng.normal(0, 0.7, len(lengths))),
            "group mean": np.repeat(lengths.reshape(PROMPTS, GROUP).mean(1), GROUP),
            "history": np.array([float(predictor.expected_remaining(n, 0, cap)) for n in names]),
            "oracle": lengths,
        }
        for name, guess in guesses.items():
            found.setdefault(name, []).append(over_lower_bound(lengths, guess))
    mean = {name: float(np.mean(values)) for name, values in found.items()}
    assert mean["fifo"] > mean["noisy"] > mean["group mean"] > mean["oracle"] >= 1
    assert 1.4 < mean["fifo"] < 1.7 and mean["oracle"] < 1.05
    # What a run knows after an epoch: less than the mean of these very lengths, more than noise.
    assert mean["group mean"] < mean["history"] < mean["noisy"] - 0.1
