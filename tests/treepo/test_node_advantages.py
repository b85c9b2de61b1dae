"""Estimators that give each segment an advantage of its own, by hand and by definition."""

import math

import numpy as np
import pytest
from scored_trees import group, irregular, random_group, segment_advantages

from treepo.advantages import estimate
from treepo.algorithm_settings import AdvantageSettings

# The irregular tree: V is .6 at the prompt, 2/3 at 1, 0 at 2 (9 has no verdict, so 2, 7 and 8 are
# one run), 1 at 3, .5 at 4, 0 and 1 at 5 and 6, 1 at 10. Segment 7 is forced, 9 has no verdict.
BY_HAND = {
    "spo": [0, 2 / 3 - 0.6, -0.6, 1 / 3, -1 / 6, -0.5, 0.5, 0, -0.6, 0, 0.4],
    "child_minus_parent": [0, 2 / 3 - 0.6, -0.6, 1 / 3, -1 / 6, -0.5, 0.5, 0, 0, 0, 0.4],
    # siblings: 1, 2 and 10 (mean 5/9), 3 and 4 (mean 3/4), 5 and 6
    "sibling": [0, 1 / 9, -5 / 9, 0.25, -0.25, -0.5, 0.5, 0, -5 / 9, 0, 4 / 9],
    # V is 3/4 at 1, the mean of 1 and 1/2; so the mean of 1, 2 and 10 is 7/12
    "treerpo": [0, 1 / 6, -7 / 12, 0.25, -0.25, -0.5, 0.5, 0, -7 / 12, 0, 5 / 12],
}
TREERL = [0, 2 / 15, -1.2, 0.4 + 1 / 3, -0.1 - 1 / 6, -1.1, 0.9, 0, -1.2, 0, 0.8]


@pytest.mark.parametrize("estimator", BY_HAND)
def test_undivided_advantages_of_an_irregular_tree_are_those_worked_out_by_hand(estimator):
    (advantage,) = segment_advantages([irregular()], adv_estimator=estimator, normalisation="none")
    np.testing.assert_allclose(advantage, BY_HAND[estimator], atol=1e-12)


def test_treerl_adds_the_gains_over_root_and_parent_and_divides_by_the_root_of_the_leaves():
    (plain,) = segment_advantages([irregular()], adv_estimator="treerl", treerl_sqrt_leaves=False)
    np.testing.assert_allclose(plain, TREERL, atol=1e-12)
    (divided,) = segment_advantages([irregular()], adv_estimator="treerl")
    expected = np.array(TREERL)
    expected[1] /= math.sqrt(3)
    expected[4] /= math.sqrt(2)
    np.testing.assert_allclose(divided, expected, atol=1e-12)


@pytest.mark.parametrize(
    ("estimator", "top"), [("sibling", [2 / 3, 0, 1]), ("treerpo", [0.75, 0, 1])]
)
def test_siblings_are_divided_by_their_own_deviation(estimator, top):
    (advantage,) = segment_advantages([irregular()], adv_estimator=estimator)
    first = (np.array(top) - np.mean(top)) / (np.std(top, ddof=1) + 1e-6)
    pair = 0.5 / (math.sqrt(0.5) + 1e-6)
    near = 0.25 / (math.sqrt(0.125) + 1e-6)
    expected = [0, first[0], first[1], near, -near, -pair, pair, 0, first[1], 0, first[2]]
    np.testing.assert_allclose(advantage, expected, atol=1e-12)


def test_segments_weigh_as_much_as_the_leaves_below_that_train():
    (a,) = estimate([irregular()], AdvantageSettings(adv_estimator="spo"))
    weight = [0, 3, 1, 1, 2, 1, 1, 0, 1, 0, 1]
    assert a.weight.tolist() == weight
    expected = np.array(BY_HAND["spo"]) * weight
    np.testing.assert_allclose(a.advantage_pos, np.maximum(expected, 0), atol=1e-12)
    np.testing.assert_allclose(a.advantage_neg, np.minimum(expected, 0), atol=1e-12)
    # a leaf's advantage is the mean over its tokens: 3 has two of segment 1 and one of its own
    np.testing.assert_allclose(a.leaf_advantage[0], (2 * (2 / 3 - 0.6) + 1 / 3) / 3)
    assert a.leaf_advantage[4] == a.leaf_weight[4] == 0


def test_a_trajectory_that_ends_at_a_fork_is_one_of_the_siblings():
    """Leaf 1 is itself continued by 2 and 3."""
    from dataclasses import replace

    scored = group([1.0, 0.0], [-1, 0, 1, 1], [1, 1, 1, 1])
    tree = replace(scored.tree, leaves=(1, 2, 3))
    scored = replace(scored, tree=tree, rewards=np.array([1.0, 1.0, 0.0]), valid=np.ones(3, bool))
    (advantage,) = segment_advantages([scored], adv_estimator="treerpo", normalisation="none")
    np.testing.assert_allclose(advantage, [0, 0, 1 / 3, -2 / 3], atol=1e-12)


# --- by definition ---


def leaf_sets(scored):
    """Rows of the leaves with a verdict below each segment."""
    paths = [set(scored.tree.path(leaf)) for leaf in scored.tree.leaves]
    return [
        frozenset(m for m, path in enumerate(paths) if scored.valid[m] and index in path)
        for index in range(len(scored.tree.segments))
    ]


def brute_force(scored, estimator):
    """Undivided advantages by recursion and on sets of leaves."""
    tree, sets = scored.tree, leaf_sets(scored)
    children = [
        [c for c, s in enumerate(tree.segments) if s.parent == i and sets[c]]
        for i in range(len(tree.segments))
    ]
    mean = [float(np.mean(scored.rewards[sorted(s)])) if s else 0.0 for s in sets]

    def choices(i, value):
        own = [scored.rewards[tree.leaves.index(i)]] if i in tree.leaves else []
        own = own if own and scored.valid[tree.leaves.index(i)] else []
        return [*own, *(value(c) for c in children[i])]

    def recursive(i):
        return float(np.mean(choices(i, recursive)))

    result = np.zeros(len(sets))
    for index, path in ((i, tree.path(i)) for i in range(1, len(sets))):
        if not sets[index] or not tree.segments[index].sampled:
            continue
        larger = [a for a in path if sets[a] > sets[index]]
        fork = larger[-1] if larger else 0
        if estimator == "spo":
            result[index] = mean[index] - mean[fork]
        elif estimator == "treerl":
            result[index] = 2 * mean[index] - mean[0] - mean[fork]
        elif estimator == "child_minus_parent":
            result[index] = mean[index] - mean[path[-2]]
        elif larger:
            value = recursive if estimator == "treerpo" else mean.__getitem__
            result[index] = value(index) - np.mean(choices(fork, value))
    return result


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("estimator", ["spo", "treerl", "child_minus_parent", "sibling", "treerpo"])
def test_node_advantages_agree_with_their_definitions_on_random_trees(estimator, seed):
    scored = random_group(np.random.default_rng(seed), num_segments=18, shortest=1, forced=0.1)
    settings = dict(treerl_sqrt_leaves=False) if estimator == "treerl" else {}
    (advantage,) = segment_advantages(
        [scored], adv_estimator=estimator, normalisation="none", **settings
    )
    np.testing.assert_allclose(advantage, brute_force(scored, estimator), atol=1e-12)
