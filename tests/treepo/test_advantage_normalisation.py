"""What advantages are divided by, worked out by hand."""

import math

import numpy as np
import pytest
from scored_trees import (
    AVERAGES,
    flat,
    group,
    irregular,
    leaf_advantages,
    segment_advantages,
)

SPO = np.array([0, 2 / 3 - 0.6, -0.6, 1 / 3, -1 / 6, -0.5, 0.5, 0, -0.6, 0, 0.4])
# trained tokens of the irregular tree's segments (7 is forced) times the leaves that train on them
SPO_TOKENS = np.array([0, 2 * 3, 3, 1, 2 * 2, 4, 1, 0, 2, 0, 3])


def test_over_leaves_the_deviation_is_of_the_averages_of_the_batch():
    groups = [group(), flat([1, 0, 0, 0])]
    values = [*AVERAGES, 0.75, -0.25, -0.25, -0.25]
    one, two = leaf_advantages(groups, normalisation="leaves")
    np.testing.assert_allclose([*one, *two], np.array(values) / (np.std(values, ddof=1) + 1e-6))


def test_over_tokens_the_deviation_counts_a_shared_token_once_a_leaf_and_nothing_is_shifted():
    groups = [group(), flat([1, 0, None, 0], [1, 2, 50, 7])]
    values = [*AVERAGES, 2 / 3, -1 / 3, -1 / 3]
    tokens = np.repeat(values, [5, 7, 4, 4, 5, 1, 2, 7])
    one, two = leaf_advantages(groups, normalisation="tokens")
    expected = np.array(values) / (tokens.std(ddof=1) + 1e-6)
    np.testing.assert_allclose([*one, *np.delete(two, 2)], expected)
    assert two[2] == 0


def test_a_leaf_of_average_reward_keeps_advantage_zero_unless_the_release_shifts_it():
    groups = [flat([1, 0.5, 0, 0.5], [1, 1, 9, 1])]
    for normalisation in ("tree", "batch", "leaves", "tokens", "none"):
        (advantage,) = leaf_advantages(groups, normalisation=normalisation)
        assert advantage[1] == 0, normalisation
    (shifted,) = leaf_advantages(groups, normalisation="release")
    assert shifted[1] > 0.1


def test_at_node_level_a_tree_is_divided_by_the_deviation_of_its_runs():
    """Runs begin at 1, 2, 3, 4, 5, 6 and 10; 7 and 8 carry on 2."""
    (advantage,) = segment_advantages([irregular()], adv_estimator="spo", normalisation="tree")
    runs = SPO[[1, 2, 3, 4, 5, 6, 10]]
    np.testing.assert_allclose(advantage, SPO / (runs.std(ddof=1) + 1e-6), atol=1e-12)


def test_at_node_level_a_batch_is_divided_by_the_deviation_of_all_runs():
    one, two = segment_advantages(
        [irregular(), flat([1, 0])], adv_estimator="spo", normalisation="batch"
    )
    scale = np.std([*SPO[[1, 2, 3, 4, 5, 6, 10]], 0.5, -0.5], ddof=1) + 1e-6
    np.testing.assert_allclose(one, SPO / scale, atol=1e-12)
    np.testing.assert_allclose(two, np.array([0, 0.5, -0.5]) / scale)


@pytest.mark.parametrize("normalisation", ["tokens", "release"])
def test_at_node_level_tokens_count_once_for_each_leaf_that_trains_on_them(normalisation):
    (advantage,) = segment_advantages(
        [irregular()], adv_estimator="spo", normalisation=normalisation
    )
    tokens = np.repeat(SPO, SPO_TOKENS)
    if normalisation == "tokens":
        expected = SPO / (tokens.std(ddof=1) + 1e-6)
    else:
        expected = (SPO - tokens.mean()) / math.sqrt(tokens.var(ddof=1) + 1e-8)
    np.testing.assert_allclose(advantage, np.where(SPO_TOKENS > 0, expected, 0), atol=1e-12)


def test_siblings_divided_over_the_batch_are_not_divided_among_themselves():
    (plain,) = segment_advantages([irregular()], adv_estimator="sibling", normalisation="none")
    (advantage,) = segment_advantages([irregular()], adv_estimator="sibling", normalisation="batch")
    scale = np.std(plain[[1, 2, 3, 4, 5, 6, 10]], ddof=1) + 1e-6
    np.testing.assert_allclose(advantage, plain / scale, atol=1e-12)
