import math

import numpy as np
import pytest

from rewards.records import ERROR, SCORED, TIMEOUT, UNPARSABLE, RewardResult
from rollout.tree import EOS, TRUNCATED, Segment, Tree, TreeCounters
from treepo.step_metrics import reward_metrics, tree_metrics


def segment(
    parent: int, level: int, num_tokens: int, reason: str = "", forced: bool = False
) -> Segment:
    zeros = np.zeros(num_tokens, np.float32)
    return Segment(
        parent=parent,
        level=level,
        path_key=0,
        token_ids=np.zeros(num_tokens, np.int32),
        logprobs=zeros,
        sampling_logprobs=zeros,
        sampled=parent >= 0 and not forced,
        policy_versions=np.zeros(num_tokens, np.int32),
        finish_reason=reason,
    )


@pytest.fixture
def tree() -> Tree:
    """A prompt of 5 tokens; a segment of 4 below it; leaves of 3 and 0 tokens below that, and one
    of 2 tokens at the prompt, below one of 6 forced tokens.
    """
    segments = (
        segment(-1, 0, 5),
        segment(0, 1, 4),
        segment(1, 2, 3, EOS),
        segment(1, 2, 0, TRUNCATED),
        segment(0, 1, 6, forced=True),
        segment(4, 1, 2, EOS),
    )
    counters = TreeCounters(branches=3, fallbacks=5, restarts=2)
    return Tree(
        problem_id="p", segments=segments, leaves=(2, 3, 5), temperature=1.0, counters=counters
    )


def verdict(score: float, outcome: str = SCORED, correct: bool = False) -> RewardResult:
    return RewardResult(score=score, parts={"auto": score}, outcome=outcome, correct=correct)


def test_tree_metrics_equal_the_numbers_worked_out_by_hand_over_sampled_tokens(tree):
    metrics = tree_metrics([tree])
    assert metrics["response_length/mean"] == pytest.approx(13 / 3)
    assert metrics["response_length/max"] == 7
    assert metrics["response_length/clip_ratio"] == pytest.approx(1 / 3)
    assert metrics["tree/shared_token_ratio"] == pytest.approx(1 - 9 / 13)
    assert (metrics["tree/width"], metrics["tree/depth"]) == (3, 2)
    assert (metrics["tree/branches"], metrics["tree/fallbacks"]) == (3, 5)
    assert metrics["tree/restarts"] == 2


def test_failed_verdicts_are_counted_and_stay_out_of_the_means():
    metrics = reward_metrics(
        [
            [verdict(1.0, correct=True), verdict(math.nan, TIMEOUT), verdict(0.0)],
            [verdict(0.0, UNPARSABLE), verdict(math.nan, ERROR), verdict(0.0)],
        ]
    )
    assert metrics["critic/score/mean"] == pytest.approx(1 / 4)
    assert metrics["critic/accuracy"] == pytest.approx(1 / 4)
    assert metrics["frac_reward_zero_std"] == 0.5
    counts = {
        name: metrics[f"reward/outcome/{name}"] for name in (SCORED, UNPARSABLE, TIMEOUT, ERROR)
    }
    assert counts == {SCORED: 3, UNPARSABLE: 1, TIMEOUT: 1, ERROR: 1}


def test_a_batch_without_any_verdict_has_no_score_rather_than_zero():
    metrics = reward_metrics([[verdict(math.nan, ERROR)]])
    assert math.isnan(metrics["critic/score/mean"]) and metrics["reward/outcome/error"] == 1
