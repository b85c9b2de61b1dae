"""TreePO's variants and the flat estimators, by numbers worked out by hand and by definition."""

import math

import numpy as np
import pytest
from scored_trees import flat, group, irregular, leaf_advantages, random_group

from treepo.advantages import leaf_num_tokens

THIRD = 1 / 3
# The irregular tree's leaves 3, 5, 6, 8, 9 (no verdict), 10. Against the tree: mean .6. Below
# segment 1 are 3, 5, 6: mean 2/3. Below 4 are 5, 6: mean 1/2. 8 is alone below 2: 9 doesn't count.
BY_HAND = {
    "treepo": [
        (0.4 + THIRD) / 2, (-0.6 - 2 * THIRD - 0.5) / 3, (0.4 + THIRD + 0.5) / 3, -0.6, 0, 0.4,
    ],
    "treepo_size_weighted": [
        (5 * 0.4 + 3 * THIRD) / 8, (5 * -0.6 + 3 * -2 * THIRD + 2 * -0.5) / 10,
        (5 * 0.4 + 3 * THIRD + 2 * 0.5) / 10, -0.6, 0, 0.4,
    ],
    "treepo_no_root": [THIRD, (-2 * THIRD - 0.5) / 2, (THIRD + 0.5) / 2, 0, 0, 0],
    # against the others: of the tree 1 - 2/4 and 0 - 3/4; below 1, 1 - 1/2 and 0 - 1; in the pair 1
    "treepo_loo": [
        (0.5 + 0.5) / 2, (-0.75 - 1 - 1) / 3, (0.5 + 0.5 + 1) / 3, -0.75, 0, 0.5,
    ],
    "grpo": [0.4, -0.6, 0.4, -0.6, 0, 0.4],
    "rloo": [0.5, -0.75, 0.5, -0.75, 0, 0.5],
    "tree_grpo": [0.4 + THIRD, -0.6 - 2 * THIRD, 0.4 + THIRD, -0.6, 0, 0.4],
}  # fmt: skip


@pytest.mark.parametrize("estimator", BY_HAND)
def test_undivided_advantages_of_an_irregular_tree_are_those_worked_out_by_hand(estimator):
    (advantage,) = leaf_advantages([irregular()], adv_estimator=estimator, normalisation="none")
    np.testing.assert_allclose(advantage, BY_HAND[estimator], atol=1e-12)


def test_groups_whose_rewards_are_all_the_same_are_dropped_where_asked_for():
    """Leaves 5 and 6 of the first tree score the same: 0 of that level counts in the average."""
    (plain,) = leaf_advantages([group()], adv_estimator="treepo", normalisation="none")
    (dropped,) = leaf_advantages(
        [group()], adv_estimator="treepo_drop_degenerate", normalisation="none"
    )
    np.testing.assert_allclose(plain, [0.45, -0.55, 0.2, 0.2, -0.6])
    np.testing.assert_allclose(dropped, [0.45, -0.55, 0.4, 0.4, -0.6])
    # nor in the deviation: of .4, -.6, .4, .4, -.6 and .5, -.5, whose mean is 0
    (divided,) = leaf_advantages([group()], adv_estimator="treepo_drop_degenerate")
    scale = math.sqrt((3 * 0.16 + 2 * 0.36 + 2 * 0.25) / 6) + 1e-6
    np.testing.assert_allclose(divided, dropped / scale)


def test_tree_grpo_divides_each_of_its_terms_by_its_own_deviation():
    (advantage,) = leaf_advantages([irregular()], adv_estimator="tree_grpo")
    inter = math.sqrt((3 * 0.16 + 2 * 0.36) / 4) + 1e-6
    intra = math.sqrt((2 / 9 + 4 / 9) / 2) + 1e-6
    win, loss = 0.4 / inter, -0.6 / inter
    expected = [
        win + THIRD / intra, loss - 2 * THIRD / intra, win + THIRD / intra, loss, 0, win,
    ]  # fmt: skip
    np.testing.assert_allclose(advantage, expected)


def test_dr_grpo_is_the_difference_to_the_mean():
    (advantage,) = leaf_advantages([irregular()], adv_estimator="dr_grpo")
    np.testing.assert_allclose(advantage, BY_HAND["grpo"], atol=1e-12)
    (switched,) = leaf_advantages(
        [irregular()], adv_estimator="grpo", norm_adv_by_std_in_grpo=False
    )
    np.testing.assert_array_equal(advantage, switched)


def test_reinforce_pp_compares_with_the_batch_and_divides_by_its_deviation():
    """Rewards 1 0 1 0 - 1 and 1 0 0: mean 1/2 of eight."""
    groups = [irregular(), flat([1, 0, 0])]
    one, two = leaf_advantages(groups, adv_estimator="reinforce_pp")
    unit = 0.5 / (math.sqrt(8 * 0.25 / 7) + 1e-6)
    np.testing.assert_allclose(one, [unit, -unit, unit, -unit, 0, unit])
    np.testing.assert_allclose(two, [unit, -unit, -unit])


def test_reinforce_pp_over_tokens_is_whitening_of_the_rewards():
    groups = [flat([1, 0, 0.5], [1, 2, 7]), flat([0, 1], [3, 4])]
    tokens = np.repeat([1, 0, 0.5, 0, 1], [1, 2, 7, 3, 4])
    one, two = leaf_advantages(groups, adv_estimator="reinforce_pp", normalisation="release")
    expected = (np.array([1, 0, 0.5, 0, 1]) - tokens.mean()) / np.sqrt(tokens.var(ddof=1) + 1e-8)
    np.testing.assert_allclose([*one, *two], expected)


def test_reinforce_pp_baseline_compares_with_the_prompt_and_divides_over_the_batch():
    one, two = leaf_advantages(
        [irregular(), flat([1, 0, 0])], adv_estimator="reinforce_pp_baseline"
    )
    plain = [0.4, -0.6, 0.4, -0.6, 0.4, 2 * THIRD, -THIRD, -THIRD]
    scale = math.sqrt(sum(a * a for a in plain) / 7) + 1e-6
    np.testing.assert_allclose([*np.delete(one, 4), *two], np.array(plain) / scale)
    assert one[4] == 0


def brute_force(scored, estimator):
    """Undivided advantages straight from the definitions, leaf by leaf on sets of leaves."""
    tree, rewards = scored.tree, scored.rewards
    paths = [tree.path(leaf) for leaf in tree.leaves]
    trains = scored.valid & (leaf_num_tokens(tree) > 0)
    result = []
    for i, path in enumerate(paths):
        terms = []
        for level, node in enumerate(path):
            others = [
                rewards[m]
                for m, other in enumerate(paths)
                if m != i and scored.valid[m] and node in other
            ]
            whole = [rewards[i], *others]
            if level and not others:
                continue
            if estimator == "treepo_loo":
                terms.append((1, rewards[i] - np.mean(others) if others else 0.0))
            elif estimator == "treepo_size_weighted":
                terms.append((len(whole), rewards[i] - np.mean(whole)))
            elif estimator == "treepo_no_root":
                terms += [(1, rewards[i] - np.mean(whole))] if level else []
            elif estimator == "treepo_drop_degenerate":
                terms += [(1, rewards[i] - np.mean(whole))] if np.ptp(whole) > 0 else []
            elif estimator == "tree_grpo":
                terms += [rewards[i] - np.mean(whole)] if level < 2 else []
        if estimator == "tree_grpo":
            result.append(sum(terms))
        else:
            weights = sum(w for w, _ in terms)
            result.append(sum(w * a for w, a in terms) / weights if terms else 0.0)
    return np.array(result) * trains


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize(
    "estimator",
    ["treepo_loo", "treepo_size_weighted", "treepo_no_root", "treepo_drop_degenerate", "tree_grpo"],
)
def test_variants_agree_with_their_definitions_on_random_trees(estimator, seed):
    scored = random_group(np.random.default_rng(seed), num_segments=18, forced=0.1)
    (advantage,) = leaf_advantages([scored], adv_estimator=estimator, normalisation="none")
    np.testing.assert_allclose(advantage, brute_force(scored, estimator), atol=1e-12)
