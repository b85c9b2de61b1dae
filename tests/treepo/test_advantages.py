"""TreePO's, GRPO's and leave-one-out advantages, what fails, and sums over the tree."""

import math
from dataclasses import replace

import numpy as np
import pytest
from scored_trees import (
    AVERAGES,
    PARENTS,
    REWARDS,
    SQUARES,
    build,
    flat,
    group,
    leaf_advantages,
    random_group,
    verdict,
)

from rewards.records import ERROR, UNPARSABLE
from treepo.advantages import (
    ADVANTAGES,
    estimate,
    filter_groups,
    leaf_num_tokens,
    scored_tree,
    std,
    sum_over_leaves_below,
)
from treepo.algorithm_settings import AdvantageSettings

# --- TreePO ---


def test_treepo_averages_over_levels_from_the_root_down():
    (advantage,) = leaf_advantages([group()], normalisation="none")
    np.testing.assert_allclose(advantage, AVERAGES, atol=1e-15)


def test_tree_normalisation_divides_by_the_std_over_leaves_and_levels_of_the_tree():
    (advantage,) = leaf_advantages([group()], normalisation="tree")
    np.testing.assert_allclose(advantage, np.array(AVERAGES) / (math.sqrt(SQUARES / 8) + 1e-6))


def test_batch_normalisation_divides_by_the_std_over_the_batch():
    advantages = leaf_advantages([group(), flat([1, 0, 0, 0])], normalisation="batch")
    # the flat tree adds .75 and three times -.25
    scale = math.sqrt((SQUARES + 0.75**2 + 3 * 0.25**2) / 12) + 1e-6
    np.testing.assert_allclose(advantages[0], np.array(AVERAGES) / scale)
    np.testing.assert_allclose(advantages[1], np.array([0.75, -0.25, -0.25, -0.25]) / scale)


def test_release_normalisation_whitens_over_tokens_counted_once_a_leaf():
    groups = [group(), flat([1, 0, 0], [1, 2, 7])]
    plain = [AVERAGES, [2 / 3, -1 / 3, -1 / 3]]
    lengths = [[5, 7, 4, 4, 5], [1, 2, 7]]
    tokens = np.concatenate([np.repeat(a, n) for a, n in zip(plain, lengths, strict=True)])
    for advantage, values in zip(
        leaf_advantages(groups, normalisation="release"), plain, strict=True
    ):
        expected = (np.array(values) - tokens.mean()) / np.sqrt(tokens.var(ddof=1) + 1e-8)
        np.testing.assert_allclose(advantage, expected)


def test_release_normalisation_leaves_tokens_without_a_verdict_out():
    groups = [flat([1, 0, None, 0], [1, 2, 50, 7])]
    tokens = np.repeat([2 / 3, -1 / 3, -1 / 3], [1, 2, 7])
    (advantage,) = leaf_advantages(groups, normalisation="release")
    expected = (np.array([2 / 3, -1 / 3, -1 / 3]) - tokens.mean()) / np.sqrt(tokens.var(ddof=1))
    np.testing.assert_allclose(advantage[[0, 1, 3]], expected, rtol=1e-6)
    assert advantage[2] == 0


@pytest.mark.parametrize("seed", range(20))
def test_treepo_agrees_with_the_definition_on_random_trees(seed):
    scored = random_group(np.random.default_rng(seed))
    tree = scored.tree
    paths = [tree.path(leaf) for leaf in tree.leaves]
    by_leaf = []
    for i, path in enumerate(paths):
        terms = []
        for level, node in enumerate(path):
            members = [
                m for m, other in enumerate(paths) if scored.valid[m] and node in other
            ]  # the leaves that share the ancestor at this level
            if scored.valid[i] and (level == 0 or len(members) > 1):
                terms.append(scored.rewards[i] - np.mean(scored.rewards[members]))
        by_leaf.append(terms)
    scale = std(np.array([term for terms in by_leaf for term in terms]))
    trains = scored.valid & (leaf_num_tokens(tree) > 0)
    plain = np.array([np.mean(terms) if terms else 0.0 for terms in by_leaf]) * trains
    (none,) = leaf_advantages([scored], normalisation="none")
    (by_tree,) = leaf_advantages([scored], normalisation="tree")
    np.testing.assert_allclose(none, plain, atol=1e-12)
    np.testing.assert_allclose(by_tree, plain / (scale + 1e-6), atol=1e-12)


def test_a_fallback_leaf_at_the_prompt_is_compared_with_the_whole_tree_alone():
    (advantage,) = leaf_advantages([group()], normalisation="none")
    assert advantage[4] == pytest.approx(0.0 - 0.6)


def test_a_level_of_several_segments_counts_once():
    """Segment 2 carries on segment 1 at the same level, as a cut inside a segment would."""
    tree = build([-1, 0, 1, 2, 2, 0])
    levels = [0, 1, 1, 2, 2, 1]
    tree = replace(
        tree,
        segments=tuple(replace(s, level=n) for s, n in zip(tree.segments, levels, strict=True)),
    )
    scored = scored_tree(tree, [verdict(1.0), verdict(0.0), verdict(0.0)])
    (advantage,) = leaf_advantages([scored], normalisation="none")
    np.testing.assert_allclose(advantage, [(2 / 3 + 1 / 2) / 2, (-1 / 3 - 1 / 2) / 2, -1 / 3])


@pytest.mark.parametrize("normalisation", ["tree", "batch", "none", "release"])
def test_a_tree_that_forks_at_the_prompt_alone_gives_grpo(normalisation):
    groups = [flat([1, 0, 0.5, 0]), flat([0, 0, 1])]
    of_tree = leaf_advantages(groups, adv_estimator="treepo", normalisation=normalisation)
    of_grpo = leaf_advantages(groups, adv_estimator="grpo", normalisation=normalisation)
    for a, b in zip(of_tree, of_grpo, strict=True):
        np.testing.assert_array_equal(a, b)


# --- GRPO and leave-one-out ---


def test_grpo_divides_by_the_groups_std_with_bessels_correction():
    (advantage,) = leaf_advantages([group()], adv_estimator="grpo")
    expected = np.array([0.4, -0.6, 0.4, 0.4, -0.6]) / (math.sqrt(1.2 / 4) + 1e-6)
    np.testing.assert_allclose(advantage, expected)


def test_grpo_without_std_is_the_difference_to_the_mean():
    (advantage,) = leaf_advantages([group()], adv_estimator="grpo", norm_adv_by_std_in_grpo=False)
    np.testing.assert_allclose(advantage, [0.4, -0.6, 0.4, 0.4, -0.6])


def test_leave_one_out_compares_with_the_other_leaves():
    (advantage,) = leaf_advantages([group()], adv_estimator="rloo", normalisation="none")
    np.testing.assert_allclose(advantage, [1 - 0.5, 0 - 0.75, 1 - 0.5, 1 - 0.5, 0 - 0.75])


# --- what fails and what has no signal ---


@pytest.mark.parametrize("estimator", ["treepo", "grpo", "rloo"])
@pytest.mark.parametrize("normalisation", ["tree", "batch", "none", "release"])
def test_a_failed_verdict_stays_out_of_every_baseline(estimator, normalisation):
    settings = dict(adv_estimator=estimator, normalisation=normalisation)
    with_failure = group([1.0, None, 1.0, 0.0, 0.0])
    (advantage,) = estimate([with_failure], AdvantageSettings(**settings))
    assert advantage.leaf_advantage[1] == 0 and advantage.leaf_weight[1] == 0
    assert advantage.weight[4] == advantage.advantage_pos[4] == advantage.advantage_neg[4] == 0
    # the same tree without that leaf; segment 1 then has a single leaf
    without = group([1.0, 1.0, 0.0, 0.0], [-1, 0, 0, 1, 2, 2, 0], [3, 4, 2, 1, 2, 2, 5])
    (expected,) = leaf_advantages([without], **settings)
    np.testing.assert_allclose(advantage.leaf_advantage[[0, 2, 3, 4]], expected, atol=1e-12)


def test_an_unreadable_answer_is_a_verdict_and_an_error_is_none():
    results = [verdict(0.0, UNPARSABLE), verdict(math.nan, ERROR), verdict(1.0)]
    scored = scored_tree(build([-1, 0, 0, 0]), results)
    assert scored.valid.tolist() == [True, False, True]
    assert scored.rewards.tolist() == [0.0, 0.0, 1.0]
    assert scored.correct.tolist() == [False, False, True]


@pytest.mark.parametrize("estimator", ["treepo", "grpo", "rloo"])
@pytest.mark.parametrize("normalisation", ["tree", "batch", "none", "release"])
@pytest.mark.parametrize(
    "rewards", [[0.1] * 5, [1.0] * 5, [None] * 5, [None, None, 0.3, None, None]]
)
def test_groups_without_signal_have_advantage_zero(estimator, normalisation, rewards):
    settings = AdvantageSettings(adv_estimator=estimator, normalisation=normalisation)
    (advantage,) = estimate([group(rewards)], settings)
    np.testing.assert_allclose(advantage.leaf_advantage, 0.0, atol=1e-9)
    np.testing.assert_allclose(advantage.advantage_pos, 0.0, atol=1e-9)
    assert np.isfinite(advantage.leaf_advantage).all()
    assert ((advantage.leaf_weight > 0) == [r is not None for r in rewards]).all()


@pytest.mark.parametrize("estimator", ["treepo", "grpo", "rloo"])
@pytest.mark.parametrize("normalisation", ["tree", "batch", "none", "release"])
def test_one_leaf_has_nothing_to_be_compared_with(estimator, normalisation):
    settings = AdvantageSettings(adv_estimator=estimator, normalisation=normalisation)
    for parents in ([-1, 0], [-1, 0, 1, 2]):
        (advantage,) = estimate([group([1.0], parents, [2] * len(parents))], settings)
        assert advantage.leaf_advantage.tolist() == [0.0]
        assert advantage.leaf_weight.tolist() == [1.0]


@pytest.mark.parametrize("normalisation", ["tree", "batch", "none", "release"])
def test_an_empty_batch_has_no_advantages(normalisation):
    assert estimate([], AdvantageSettings(normalisation=normalisation)) == []


def test_a_leaf_without_a_token_of_its_own_to_train_has_weight_zero():
    """The prompt forces segment 1, and leaf 1 has nothing else."""
    scored = group([1.0, 0.0], [-1, 0, 0], [2, 3, 4], forced=(1,))
    for weighting in ("token_mean", "sequence_mean"):
        (advantage,) = estimate([scored], AdvantageSettings(loss_weighting=weighting))
        assert advantage.leaf_weight[0] == 0 and advantage.leaf_weight[1] > 0
        assert advantage.weight[1] == 0


# --- weights and sums over the tree ---


def test_values_are_summed_over_the_leaves_below():
    tree = build(PARENTS)
    sums = sum_over_leaves_below(tree, np.array([1.0, 10.0, 100.0, 1000.0, 10000.0]))
    assert sums.tolist() == [11111, 11, 1100, 1, 10, 100, 1000, 10000]


def test_segments_carry_the_positive_and_negative_parts_of_their_leaves():
    (advantage,) = estimate([group()], AdvantageSettings(normalisation="none"))
    np.testing.assert_allclose(
        advantage.advantage_pos, [0.0, 0.45, 0.4, 0.45, 0.0, 0.2, 0.2, 0.0], atol=1e-12
    )
    np.testing.assert_allclose(
        advantage.advantage_neg, [0.0, -0.55, 0.0, 0.0, -0.55, 0.0, 0.0, -0.6], atol=1e-12
    )
    assert advantage.weight.tolist() == [0, 2, 2, 1, 1, 1, 1, 1]


def test_under_the_sequence_mean_every_response_weighs_the_same():
    scored = group()
    (advantage,) = estimate([scored], AdvantageSettings(loss_weighting="sequence_mean"))
    np.testing.assert_allclose(advantage.leaf_weight, [1 / 5, 1 / 7, 1 / 4, 1 / 4, 1 / 5])
    lengths = [segment.num_tokens for segment in scored.tree.segments]
    assert (advantage.weight * lengths).sum() == pytest.approx(5)  # five responses


@pytest.mark.parametrize("seed", range(10))
def test_the_trees_total_is_the_sum_over_its_responses(seed):
    scored = random_group(np.random.default_rng(seed))
    lengths = [segment.num_tokens for segment in scored.tree.segments]
    for weighting in ("token_mean", "sequence_mean"):
        (a,) = estimate([scored], AdvantageSettings(loss_weighting=weighting))
        per_leaf = a.leaf_weight * leaf_num_tokens(scored.tree)
        assert (a.weight * lengths).sum() == pytest.approx(per_leaf.sum())
        total = ((a.advantage_pos + a.advantage_neg) * lengths).sum()
        assert total == pytest.approx((per_leaf * a.leaf_advantage).sum())
        assert (a.advantage_pos >= 0).all() and (a.advantage_neg <= 0).all()


# --- filter ---


def test_groups_without_spread_are_dropped_and_counted():
    groups = [flat([1, 0, 0]), flat([1, 1, 1]), flat([None, 1, 1]), flat([None, None]), flat([0])]
    kept, counts = filter_groups(groups)
    assert kept == [groups[0]]
    assert (counts.num_groups, counts.num_kept) == (5, 1)
    assert (counts.num_zero_std, counts.num_without_verdict) == (3, 1)
    assert counts.frac_reward_zero_std == 3 / 5


def test_a_batch_in_which_every_group_has_no_signal_is_an_empty_list():
    kept, counts = filter_groups([flat([1, 1]), flat([0, 0])])
    assert kept == [] and counts.num_kept == 0 and counts.frac_reward_zero_std == 1.0
    assert filter_groups([])[1].frac_reward_zero_std == 0.0


def test_the_filter_can_ask_for_spread_in_correctness():
    """Shaping parts spread the scores of two wrong answers; nothing is right or wrong in it."""
    groups = [flat([0.0, 0.2]), flat([0.2, 1.2])]
    assert filter_groups(groups, "score")[0] == groups
    assert filter_groups(groups, "acc")[0] == groups[1:]


# --- names and settings ---


def test_a_wrong_estimator_lists_the_known_ones():
    assert {"grpo", "rloo", "treepo"} <= set(ADVANTAGES)
    with pytest.raises(ValueError, match="unknown advantage estimator 'tree'.*rloo.*treepo"):
        estimate([group()], AdvantageSettings(adv_estimator="tree"))


def test_your_own_estimator_goes_in_by_path(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from treepo.advantages import spread_over_leaves\n"
        "def raw_rewards(groups, settings):\n"
        "    return [spread_over_leaves(g, g.rewards, settings.loss_weighting) for g in groups]\n"
    )
    (advantage,) = leaf_advantages([group()], adv_estimator=f"{file}:raw_rewards")
    assert advantage.tolist() == REWARDS
