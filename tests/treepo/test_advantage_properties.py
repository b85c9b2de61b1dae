"""What holds of advantages on any tree."""

from itertools import product

import numpy as np
import pytest
from scored_trees import (
    build,
    flat,
    irregular,
    leaf_advantages,
    permuted,
    random_group,
    segment_advantages,
    verdict,
)

from treepo.advantages import (
    estimate,
    leaf_num_tokens,
    level_advantages,
    scored_tree,
    sum_over_leaves_below,
)
from treepo.advantages.trees import fork_above, mean_over_leaves, num_leaves_below, run_starts
from treepo.algorithm_settings import ESTIMATOR_TRAITS, AdvantageSettings

SEEDS = range(8)


def tree_of(seed, **kwargs):
    return random_group(np.random.default_rng(seed), num_segments=18, **kwargs)


# --- baselines ---


@pytest.mark.parametrize("seed", SEEDS)
def test_over_each_group_of_each_level_the_advantages_add_up_to_zero(seed):
    scored = tree_of(seed)
    levels = level_advantages(scored)
    for level in range(levels.values.shape[1]):
        sums = sum_over_leaves_below(scored.tree, levels.values[:, level])
        at_level = [i for i, s in enumerate(scored.tree.segments) if s.level == level]
        np.testing.assert_allclose(sums[at_level], 0, atol=1e-12)


@pytest.mark.parametrize("estimator", ["grpo", "dr_grpo", "rloo", "reinforce_pp_baseline"])
@pytest.mark.parametrize("seed", SEEDS)
def test_over_a_prompt_advantages_against_its_baseline_add_up_to_zero(seed, estimator):
    groups = [tree_of(seed, shortest=1), tree_of(50 + seed, shortest=1)]
    for advantage in leaf_advantages(groups, adv_estimator=estimator):
        assert advantage.sum() == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("seed", SEEDS)
def test_over_a_batch_advantages_against_its_baseline_have_mean_zero_and_deviation_one(seed):
    groups = [tree_of(seed, shortest=1), tree_of(50 + seed, shortest=1)]
    advantages = leaf_advantages(groups, adv_estimator="reinforce_pp")
    values = np.concatenate([a[g.valid] for a, g in zip(advantages, groups, strict=True)])
    assert values.mean() == pytest.approx(0, abs=1e-9)
    assert values.std(ddof=1) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("estimator", ["treepo", "reinforce_pp", "spo", "treerl"])
@pytest.mark.parametrize("seed", SEEDS)
def test_whitened_advantages_have_mean_zero_and_variance_one_over_the_trained_tokens(
    seed, estimator
):
    groups = [tree_of(seed, forced=0.1), tree_of(50 + seed)]
    settings = AdvantageSettings(adv_estimator=estimator, normalisation="release")
    total = squares = tokens = 0.0
    for scored, a in zip(groups, estimate(groups, settings), strict=True):
        lengths = np.array([s.num_tokens * s.sampled for s in scored.tree.segments])
        total += (lengths * (a.advantage_pos + a.advantage_neg)).sum()
        tokens += (lengths * a.weight).sum()
        if a.segment_advantage is None:
            squares += (leaf_num_tokens(scored.tree) * a.leaf_weight * a.leaf_advantage**2).sum()
        else:
            squares += (lengths * a.weight * a.segment_advantage**2).sum()
    assert total == pytest.approx(0, abs=1e-8)
    assert squares / (tokens - 1) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("seed", SEEDS)
def test_what_spos_runs_change_adds_up_to_what_the_response_gained(seed):
    scored = tree_of(seed)
    values, forks, starts = mean_over_leaves(scored), fork_above(scored), run_starts(scored)
    for row, leaf in enumerate(scored.tree.leaves):
        if scored.valid[row]:
            gain = sum((values - values[forks])[i] for i in scored.tree.path(leaf) if starts[i])
            assert gain == pytest.approx(scored.rewards[row] - values[0])


@pytest.mark.parametrize("estimator", ["sibling", "treerpo"])
@pytest.mark.parametrize("seed", SEEDS)
def test_siblings_add_up_to_zero(seed, estimator):
    scored = tree_of(seed, shortest=1)
    (advantage,) = segment_advantages([scored], adv_estimator=estimator)
    forks, starts = fork_above(scored), run_starts(scored)
    for fork in set(forks[starts].tolist()) - set(scored.tree.leaves):
        assert advantage[starts & (forks == fork)].sum() == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("seed", SEEDS)
def test_children_weighed_by_their_leaves_gain_nothing_over_their_parent(seed):
    scored = tree_of(seed, shortest=1)
    (advantage,) = segment_advantages([scored], adv_estimator="child_minus_parent")
    below = num_leaves_below(scored)
    for parent in range(len(below)):
        children = [i for i, s in enumerate(scored.tree.segments) if s.parent == parent]
        weighted = (below[children] * advantage[children]).sum()
        assert weighted == pytest.approx(0, abs=1e-9)


# --- the shape of the tree ---


@pytest.mark.parametrize("estimator", ESTIMATOR_TRAITS)
@pytest.mark.parametrize("seed", range(3))
def test_the_order_of_siblings_in_the_arena_changes_nothing(seed, estimator):
    rng = np.random.default_rng(seed)
    scored = tree_of(seed, forced=0.1)
    moved, place = permuted(scored, rng)
    settings = AdvantageSettings(adv_estimator=estimator)
    (one,), (other,) = estimate([scored], settings), estimate([moved], settings)
    for name in ("advantage_pos", "advantage_neg", "weight"):
        np.testing.assert_allclose(getattr(other, name)[place], getattr(one, name), atol=1e-12)
    rows = [moved.tree.leaves.index(place[leaf]) for leaf in scored.tree.leaves]
    np.testing.assert_allclose(other.leaf_advantage[rows], one.leaf_advantage, atol=1e-12)


@pytest.mark.parametrize("estimator", sorted(set(ESTIMATOR_TRAITS) - {"child_minus_parent"}))
@pytest.mark.parametrize("normalisation", ["auto", "tree"])
def test_a_segment_cut_in_two_at_one_level_changes_no_tokens_advantage(estimator, normalisation):
    """The irregular tree's fork 4, above two leaves."""
    from dataclasses import replace

    if normalisation not in ("auto", *ESTIMATOR_TRAITS[estimator].uses):
        return
    scored = irregular()
    cut = 4  # a fork: its first token stays, its second moves to a segment of its own
    segments = list(scored.tree.segments)
    old = segments[cut]
    first, second = (
        replace(
            old,
            parent=old.parent if part == 0 else cut,
            token_ids=old.token_ids[part : part + 1],
            logprobs=old.logprobs[part : part + 1],
            sampling_logprobs=old.sampling_logprobs[part : part + 1],
        )
        for part in (0, 1)
    )

    def moved(index):
        return index + 1 if index > cut else index

    children = [
        replace(s, parent=cut + 1 if s.parent == cut else moved(s.parent))
        for s in segments[cut + 1 :]
    ]
    tree = replace(
        scored.tree,
        segments=(*segments[:cut], first, second, *children),
        leaves=tuple(map(moved, scored.tree.leaves)),
    )
    settings = AdvantageSettings(adv_estimator=estimator, normalisation=normalisation)
    (whole,) = estimate([scored], settings)
    (parts,) = estimate([replace(scored, tree=tree)], settings)
    owner = [*range(cut + 1), cut, *range(cut + 1, len(segments))]
    for name in ("advantage_pos", "advantage_neg", "weight"):
        np.testing.assert_allclose(
            getattr(parts, name), getattr(whole, name)[owner], atol=1e-12, err_msg=name
        )


@pytest.mark.parametrize(
    "estimator", ["treepo", "treepo_size_weighted", "treepo_drop_degenerate", "child_minus_parent",
                  "sibling", "treerpo", "spo"],
)  # fmt: skip
def test_a_tree_that_forks_at_the_prompt_alone_gives_grpo(estimator):
    groups = [flat([1, 0, 0.5, 0, None]), flat([0, 0, 1])]
    settings = dict(normalisation="tree")
    expected = leaf_advantages(groups, adv_estimator="grpo", **settings)
    for a, b in zip(
        leaf_advantages(groups, adv_estimator=estimator, **settings), expected, strict=True
    ):
        np.testing.assert_allclose(a, b, atol=1e-12)


def test_leave_one_out_on_such_a_tree_is_rloo():
    groups = [flat([1, 0, 0.5, 0, None]), flat([0, 0, 1])]
    for normalisation in ("none", "tree", "tokens"):
        for a, b in zip(
            leaf_advantages(groups, adv_estimator="treepo_loo", normalisation=normalisation),
            leaf_advantages(groups, adv_estimator="rloo", normalisation=normalisation),
            strict=True,
        ):
            np.testing.assert_array_equal(a, b)


# --- what must always hold ---


@pytest.mark.parametrize("estimator", ESTIMATOR_TRAITS)
def test_failed_verdicts_and_forced_tokens_have_no_part_in_anything(estimator):
    """Leaf 9 has no verdict, segment 7 is forced: any reward in place of it changes nothing."""
    for normalisation in ESTIMATOR_TRAITS[estimator].uses:
        settings = AdvantageSettings(adv_estimator=estimator, normalisation=normalisation)
        scored = irregular()
        (a,) = estimate([scored], settings)
        for index in (0, 7, 9):
            assert a.weight[index] == a.advantage_pos[index] == a.advantage_neg[index] == 0
        assert a.leaf_weight[4] == a.leaf_advantage[4] == 0
        scored.rewards[4] = 1e6
        (b,) = estimate([scored], settings)
        np.testing.assert_allclose(a.advantage_pos, b.advantage_pos)
        np.testing.assert_allclose(a.advantage_neg, b.advantage_neg)


@pytest.mark.parametrize("estimator", ESTIMATOR_TRAITS)
@pytest.mark.parametrize("rewards", [[None] * 5, [1.0] * 5, [None, None, 0.3, None, None]])
def test_without_signal_every_advantage_is_zero_and_finite(estimator, rewards):
    from scored_trees import group

    for normalisation in ESTIMATOR_TRAITS[estimator].uses:
        settings = AdvantageSettings(adv_estimator=estimator, normalisation=normalisation)
        (a,) = estimate([group(rewards)], settings)
        for values in (a.advantage_pos, a.advantage_neg, a.leaf_advantage):
            np.testing.assert_allclose(values, 0, atol=1e-9)
        assert estimate([], settings) == []


# --- the gradient that advantages stand for ---

FIRST = 0.3  # probability that the first token of a path is 1
SECOND = (0.6, 0.2)  # that the second is 1, after 0 and after 1
PAYS = np.array([[0.1, 1.0], [0.5, 0.2]])  # reward of (first, second)


def expected_gradient(**settings):
    """Mean over all 64 outcomes of two first tokens with two second ones each, of the sum over
    tokens of d log-prob * advantage; by logits (first, second after 0, second after 1).
    """
    tree = build([-1, 0, 0, 1, 1, 2, 2])
    total = np.zeros(3)
    for tokens in product((0, 1), repeat=6):
        first, second = tokens[:2], tokens[2:]
        parents = (0, 0, 1, 1)
        chance = np.prod([FIRST if t else 1 - FIRST for t in first])
        slopes = [(0, i + 1, t - FIRST) for i, t in enumerate(first)]
        for leaf, (t, above) in enumerate(zip(second, parents, strict=True)):
            p = SECOND[first[above]]
            chance *= p if t else 1 - p
            slopes.append((1 + first[above], 3 + leaf, t - p))
        rewards = [PAYS[first[above], t] for t, above in zip(second, parents, strict=True)]
        (a,) = estimate([scored_tree(tree, list(map(verdict, rewards)))],
                        AdvantageSettings(normalisation="none", **settings))  # fmt: skip
        for logit, segment, slope in slopes:
            advantage = a.advantage_pos[segment] + a.advantage_neg[segment]
            total[logit] += chance * slope * advantage
    return total


def true_gradient():
    values = [(1 - p) * PAYS[a, 0] + p * PAYS[a, 1] for a, p in enumerate(SECOND)]
    reach = (1 - FIRST, FIRST)
    return np.array(
        [
            FIRST * (1 - FIRST) * (values[1] - values[0]),
            *(reach[a] * p * (1 - p) * (PAYS[a, 1] - PAYS[a, 0]) for a, p in enumerate(SECOND)),
        ]
    )


@pytest.mark.parametrize(
    ("estimator", "shared", "own"),
    [
        # n = 4 leaves, of which m = 2 share a first token: (n - m)/(n - 1) = 2/3 there
        ("rloo", 2 / 3, 1.0),
        # levels: the tree's 2/3 and 1, the pair's 0 and 1
        ("treepo_loo", (2 / 3 + 0) / 2, 1.0),
        # the plain mean: (n - m)/n = 1/2 and 3/4 in the tree, 0 and 1/2 in the pair
        ("dr_grpo", 1 / 2, 3 / 4),
        ("treepo", (1 / 2 + 0) / 2, (3 / 4 + 1 / 2) / 2),
    ],
)
def test_baselines_shrink_the_gradient_of_shared_and_of_own_tokens_as_documented(
    estimator, shared, own
):
    gradient = 4 * true_gradient()  # of four leaves
    np.testing.assert_allclose(
        expected_gradient(adv_estimator=estimator), gradient * [shared, own, own], atol=1e-12
    )


def test_spo_has_the_direction_of_the_gradient_and_the_treepo_baselines_shrink():
    """V(end) - V(start), both estimated from the same leaves: tokens of m of n leaves get 1 - m/n,
    here one half for the first (of the tree's four) and for the second (of the pair)."""
    np.testing.assert_allclose(
        expected_gradient(adv_estimator="spo"), 4 * true_gradient() / 2, atol=1e-12
    )
