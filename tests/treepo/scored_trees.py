"""Small scored trees for tests of advantages: by hand and at random."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from rewards.records import SCORED, TIMEOUT, RewardResult
from rollout.tree import Segment, Tree
from treepo.advantages import ScoredTree, estimate, scored_tree
from treepo.algorithm_settings import AdvantageSettings

# The prompt (0); two paths (1, 2) that fork into two leaves each (3, 4 and 5, 6); and a leaf (7)
# that a fallback started at the prompt.
PARENTS = [-1, 0, 0, 1, 1, 2, 2, 0]
LENGTHS = [3, 4, 2, 1, 3, 2, 2, 5]
REWARDS = [1.0, 0.0, 1.0, 1.0, 0.0]
# TreePO's averages: root mean .6; below 1: mean .5; below 2: mean 1; leaf 7 has company at the
# root alone
AVERAGES = [(0.4 + 0.5) / 2, (-0.6 - 0.5) / 2, (0.4 + 0.0) / 2, (0.4 + 0.0) / 2, -0.6]
SQUARES = 3 * 0.4**2 + 2 * 0.6**2 + 2 * 0.5**2  # of the nine level advantages, whose mean is 0


def build(parents, lengths=None, forced=()):
    lengths = lengths or [1] * len(parents)
    levels: list[int] = []
    segments = []
    for index, (parent, length) in enumerate(zip(parents, lengths, strict=True)):
        levels.append(0 if parent < 0 else levels[parent] + 1)
        segments.append(
            Segment(
                parent=parent,
                level=levels[index],
                path_key=index,
                token_ids=np.arange(length, dtype=np.int32) + 10 * index,
                logprobs=np.zeros(length, np.float32),
                sampling_logprobs=np.zeros(length, np.float32),
                sampled=index > 0 and index not in forced,
                policy_versions=np.zeros(length, np.int32),
                finish_reason="" if index in parents or index == 0 else "eos",
            )
        )
    leaves = tuple(i for i in range(1, len(parents)) if i not in parents)
    return Tree(problem_id="p", segments=tuple(segments), leaves=leaves, temperature=1.0)


def verdict(score, outcome=SCORED):
    return RewardResult(score=score, parts={}, outcome=outcome, correct=score >= 1)


def group(rewards=REWARDS, parents=PARENTS, lengths=LENGTHS, **kwargs):
    """None among the rewards stands for a verdict that failed."""
    results = [verdict(math.nan, TIMEOUT) if r is None else verdict(r) for r in rewards]
    return scored_tree(build(parents, lengths, **kwargs), results)


def flat(rewards, lengths=None):
    size = len(rewards)
    return group(rewards, [-1, *[0] * size], [2, *(lengths or [3] * size)])


def leaf_advantages(groups, **settings):
    return [a.leaf_advantage for a in estimate(groups, AdvantageSettings(**settings))]


def random_group(rng, *, num_segments=14, failures=0.2, shortest=0, forced=0.0):
    parents = [-1, *(int(rng.integers(0, i)) for i in range(1, num_segments))]
    lengths = [2, *(int(rng.integers(shortest, 4)) for _ in range(1, num_segments))]
    num_leaves = build(parents).num_leaves
    rewards = [
        None if rng.random() < failures else float(rng.integers(0, 3)) for _ in range(num_leaves)
    ]
    carried = tuple(i for i in range(1, num_segments) if rng.random() < forced)
    return group(rewards, parents, lengths, forced=carried)


# An irregular tree. Below the prompt (0): segment 1, whose children are a leaf (3) and a fork (4)
# into two leaves (5, 6); segment 2, which 7, forced, carries on without a fork, into a leaf (8) and
# one whose verdict failed (9); a leaf (10) that a fallback started at the prompt.
IRREGULAR_PARENTS = [-1, 0, 0, 1, 1, 4, 4, 2, 7, 7, 0]
IRREGULAR_LENGTHS = [3, 2, 3, 1, 2, 4, 1, 2, 2, 5, 3]
IRREGULAR_REWARDS = [1.0, 0.0, 1.0, 0.0, None, 1.0]  # of 3, 5, 6, 8, 9, 10


def irregular():
    return group(IRREGULAR_REWARDS, IRREGULAR_PARENTS, IRREGULAR_LENGTHS, forced=(7,))


def segment_advantages(groups, **settings):
    return [a.segment_advantage for a in estimate(groups, AdvantageSettings(**settings))]


def permuted(scored: ScoredTree, rng) -> tuple[ScoredTree, list[int]]:
    """The same tree with its arena in another topological order, and the place in it of each of
    the old one's segments.
    """
    segments = scored.tree.segments
    order, waiting = [], [0]
    while waiting:
        order.append(waiting.pop(int(rng.integers(len(waiting)))))
        waiting += [i for i, s in enumerate(segments) if s.parent == order[-1]]
    place = [order.index(i) for i in range(len(segments))]
    moved = tuple(
        replace(segments[i], parent=place[segments[i].parent] if i else -1) for i in order
    )
    leaves = sorted(place[leaf] for leaf in scored.tree.leaves)
    rows = [scored.tree.leaves.index(order[leaf]) for leaf in leaves]
    return (
        ScoredTree(
            tree=replace(scored.tree, segments=moved, leaves=tuple(leaves)),
            rewards=scored.rewards[rows],
            valid=scored.valid[rows],
            correct=scored.correct[rows],
        ),
        place,
    )
