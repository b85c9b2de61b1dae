"""What becomes of responses that the length limit cut."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from scored_trees import build, verdict

from rewards.records import TIMEOUT
from rollout.tree import EOS, TRUNCATED
from treepo.advantages import estimate, scored_tree
from treepo.algorithm_settings import AdvantageSettings
from treepo.overlong import overlong_in_loss, overlong_verdicts

REWARDS = [1.0, 0.0, 1.0, 1.0]


def cut_tree(cut):
    """Four responses below the prompt; those of ``cut`` end at the length limit."""
    tree = build([-1, 0, 0, 0, 0], [2, 3, 3, 3, 3])
    ends = ["", *(TRUNCATED if i in cut else EOS for i in range(4))]
    segments = zip(tree.segments, ends, strict=True)
    return replace(tree, segments=tuple(replace(s, finish_reason=end) for s, end in segments))


def advantages(cut, rule, estimator="grpo"):
    tree = cut_tree(cut)
    verdicts = overlong_verdicts(tree, [verdict(r) for r in REWARDS], rule)
    scored = scored_tree(tree, verdicts, overlong_in_loss(tree, rule))
    (found,) = estimate([scored], AdvantageSettings(adv_estimator=estimator))
    return found


def test_keep_changes_nothing():
    assert np.array_equal(
        advantages([2], "keep").leaf_advantage, advantages([], "keep").leaf_advantage
    )


def test_zero_takes_the_reward_and_the_correctness_of_what_was_cut():
    tree = cut_tree([1, 2])
    found = overlong_verdicts(tree, [verdict(r) for r in REWARDS], "zero")
    assert [(v.score, v.correct) for v in found] == [(1, True), (0, False), (0, False), (1, True)]
    # rewards 1, 0, 0, 1: mean 1/2, deviation with Bessel's correction sqrt(1/3)
    a = 0.5 * 3**0.5
    assert advantages([2], "zero").leaf_advantage == pytest.approx([a, -a, -a, a], rel=1e-5)


def test_a_failed_verdict_on_what_was_cut_stays_a_failure():
    (failed,) = overlong_verdicts(build([-1, 0]), [verdict(math.nan, TIMEOUT)], "zero")
    tree = cut_tree([0])
    found = overlong_verdicts(tree, [failed, *(verdict(r) for r in REWARDS[1:])], "zero")
    assert found[0] == failed and not found[0].has_verdict


@pytest.mark.parametrize("estimator", ["grpo", "treepo", "spo", "rloo", "treerl"])
def test_masked_responses_count_in_the_baseline_and_train_nothing(estimator):
    masked, kept = advantages([2], "mask", estimator), advantages([2], "keep", estimator)
    trains = np.array([True, True, False, True])
    assert np.array_equal(masked.leaf_advantage, np.where(trains, kept.leaf_advantage, 0.0))
    assert masked.leaf_weight.tolist() == [1, 1, 0, 1] and kept.leaf_weight.tolist() == [1] * 4
    for name in ("advantage_pos", "advantage_neg", "weight"):
        of_segments = np.where([True, *trains], getattr(kept, name), 0.0)
        assert np.array_equal(getattr(masked, name), of_segments), name


def test_an_unknown_rule_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match="algorithm.overlong='cut' is unknown.*keep, zero, mask"):
        AdvantageSettings(overlong="cut")
