"""From rewards of a tree's leaves to advantages of its nodes.

An estimator sees a whole batch of groups (one prompt's tree each), since some normalisations span
the batch: ``estimator(groups, settings) -> one TreeAdvantages per group``. Leaves without a verdict
stay out of every baseline and get weight 0. All arithmetic is in float64.

Notation: R_i reward of leaf i; G_ij the leaves with a verdict that share i's ancestor at level j
(G_i0: the whole tree); Â_ij = R_i - mean(R over G_ij).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from rewards.records import RewardResult
from rollout.tree import Tree
from treepo.algorithm_settings import AdvantageSettings
from treepo.base.registry import Registry

WHITEN_EPS = 1e-8  # of normalisation 'release': added to the variance
SPREAD_TOLERANCE = 1e-9  # rewards that differ by less are the same


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ScoredTree:
    """A tree and the verdicts on its leaves, in the order of ``tree.leaves`` (L of them)."""

    tree: Tree
    rewards: np.ndarray  # float64 [L]; 0 where there is no verdict
    valid: np.ndarray  # bool [L], whether there is a verdict
    correct: np.ndarray  # bool [L]; False where there is no verdict


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TreeAdvantages:
    """Advantages A and weights w of one tree with L leaves and S segments.

    The two sums stand apart because a clipped loss treats positive and negative advantages
    differently: with them the loss of a shared token is the sum of its leaves' losses, exactly. An
    estimator whose advantage differs by node sets the sums itself.
    """

    leaf_advantage: np.ndarray  # float64 [L]
    leaf_weight: np.ndarray  # float64 [L], w; 0: no verdict or nothing to train
    advantage_pos: np.ndarray  # float64 [S], sum over leaves below of w * max(A, 0)
    advantage_neg: np.ndarray  # float64 [S], sum over leaves below of w * min(A, 0)
    weight: np.ndarray  # float64 [S], sum over leaves below of w; 0 where not sampled


Estimator = Callable[[Sequence[ScoredTree], AdvantageSettings], list[TreeAdvantages]]
ADVANTAGES: Registry[Estimator] = Registry("advantage estimator")


# --- groups -----------------------------------------------------------------------------------


def scored_tree(tree: Tree, results: Sequence[RewardResult]) -> ScoredTree:
    """A tree with the verdicts on its leaves, in the order of ``tree.leaves``."""
    assert len(results) == tree.num_leaves, f"{len(results)} verdicts, {tree.num_leaves} leaves"
    valid = np.array([result.has_verdict for result in results], dtype=bool)
    scores = np.array([result.score for result in results], dtype=np.float64)
    assert np.isfinite(scores[valid]).all(), f"{tree.problem_id}: a verdict has no finite score"
    correct = np.array([result.correct for result in results], dtype=bool)
    return ScoredTree(
        tree=tree, rewards=np.where(valid, scores, 0.0), valid=valid, correct=correct & valid
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class FilterCounts:
    """What :func:`filter_groups` saw. ``num_kept`` may be 0: then there is nothing to learn from
    and the update is to be skipped.
    """

    num_groups: int
    num_kept: int
    num_zero_std: int  # groups with verdicts that are all the same (a single one is)
    num_without_verdict: int  # groups whose every verdict failed

    @property
    def frac_reward_zero_std(self) -> float:
        return self.num_zero_std / self.num_groups if self.num_groups else 0.0


def filter_groups(
    groups: Sequence[ScoredTree], metric: str = "score"
) -> tuple[list[ScoredTree], FilterCounts]:
    """Drop the groups that carry no signal (dynamic sampling of DAPO, arXiv 2503.14476): those
    whose verdicts are all the same by ``metric`` ('score' or 'acc').
    """
    spreads = [has_spread(group, metric) for group in groups]
    without = sum(not group.valid.any() for group in groups)
    kept = [group for group, spread in zip(groups, spreads, strict=True) if spread]
    counts = FilterCounts(
        num_groups=len(groups),
        num_kept=len(kept),
        num_zero_std=len(groups) - len(kept) - without,
        num_without_verdict=without,
    )
    return kept, counts


def has_spread(group: ScoredTree, metric: str = "score") -> bool:
    """Whether two verdicts of the group differ."""
    values = (group.rewards if metric == "score" else group.correct.astype(float))[group.valid]
    return len(values) > 1 and bool(np.ptp(values) > SPREAD_TOLERANCE)


# --- trees ------------------------------------------------------------------------------------


def sum_over_leaves_below(tree: Tree, leaf_values: np.ndarray) -> np.ndarray:
    """Broadcast leaves' values up their paths: [..., L] -> [..., S], each segment's sum over the
    leaves at or below it.
    """
    sums = np.zeros((*leaf_values.shape[:-1], len(tree.segments)))
    sums[..., list(tree.leaves)] = leaf_values
    for index in range(len(tree.segments) - 1, 0, -1):  # children stand after their parents
        sums[..., tree.segments[index].parent] += sums[..., index]
    return sums


def leaf_num_tokens(tree: Tree) -> np.ndarray:
    """Trained (sampled) tokens of each leaf's path, int64 [L]."""
    totals = np.zeros(len(tree.segments), dtype=np.int64)
    for index, segment in enumerate(tree.segments):
        above = totals[segment.parent] if segment.parent >= 0 else 0
        totals[index] = above + segment.num_tokens * segment.sampled
    return totals[list(tree.leaves)]


def leaf_ancestors(tree: Tree) -> np.ndarray:
    """Arena index of each leaf's ancestor at each level, int64 [L, max level + 1]; -1 beyond the
    leaf's own level. Where a level consists of several segments, the last stands for it.
    """
    depth = max(segment.level for segment in tree.segments) + 1
    ancestors = np.full((tree.num_leaves, depth), -1, dtype=np.int64)
    for row, leaf in enumerate(tree.leaves):
        for index in tree.path(leaf):
            ancestors[row, tree.segments[index].level] = index
    return ancestors


def level_advantages(group: ScoredTree) -> tuple[np.ndarray, np.ndarray]:
    """Â_ij of every leaf i and level j, from the root (j = 0) down.

    Returns:
        Â float64 [L, levels], 0 where it doesn't count; and which (i, j) count, bool [L, levels]:
        those of leaves with a verdict, at the root always and below it where G_ij has another leaf
        (a group of one says nothing about its leaf).
    """
    ancestors = leaf_ancestors(group.tree)
    counts = (ancestors >= 0) & group.valid[:, None]
    sums = np.zeros(len(group.tree.segments))
    sizes = np.zeros(len(group.tree.segments))
    rewards = np.broadcast_to(group.rewards[:, None], ancestors.shape)
    np.add.at(sums, ancestors[counts], rewards[counts])
    np.add.at(sizes, ancestors[counts], 1.0)
    counts[:, 1:] &= sizes[ancestors[:, 1:]] > 1
    means = sums / np.maximum(sizes, 1.0)
    return np.where(counts, rewards - means[ancestors], 0.0), counts


def spread_over_leaves(
    group: ScoredTree, leaf_advantage: np.ndarray, loss_weighting: str
) -> TreeAdvantages:
    """The record for an estimator that gives each leaf one advantage for all of its tokens."""
    tree = group.tree
    lengths = leaf_num_tokens(tree)
    trains = group.valid & (lengths > 0)
    per_token = 1.0 / np.maximum(lengths, 1) if loss_weighting == "sequence_mean" else 1.0
    leaf_weight = np.where(trains, per_token, 0.0)
    leaf_advantage = np.where(trains, leaf_advantage, 0.0)
    weighted = leaf_weight * leaf_advantage
    pos, neg, weight = sum_over_leaves_below(
        tree, np.stack([np.maximum(weighted, 0.0), np.minimum(weighted, 0.0), leaf_weight])
    )
    sampled = np.array([segment.sampled for segment in tree.segments])
    return TreeAdvantages(
        leaf_advantage=leaf_advantage,
        leaf_weight=leaf_weight,
        advantage_pos=np.where(sampled, pos, 0.0),
        advantage_neg=np.where(sampled, neg, 0.0),
        weight=np.where(sampled, weight, 0.0),
    )


# --- normalisation ----------------------------------------------------------------------------


def std(values: np.ndarray) -> float:
    """Standard deviation with Bessel's correction (as verl's GRPO); 0 for fewer than two values."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def whiten_over_tokens(
    groups: Sequence[ScoredTree], leaf_advantages: Sequence[np.ndarray]
) -> list[np.ndarray]:
    """Mean 0 and variance 1 (Bessel, plus 1e-8) over all trained tokens of the batch, a shared
    token counted once for each of its leaves: (A - m) / sqrt(v + 1e-8). All tokens of a leaf have
    one advantage, so that lengths are enough.
    """
    if not groups:
        return []
    valid = np.concatenate([group.valid for group in groups])
    lengths = np.concatenate([leaf_num_tokens(group.tree) for group in groups]) * valid
    values = np.concatenate(leaf_advantages)
    total = max(int(lengths.sum()), 1)
    mean = float((lengths * values).sum()) / total
    variance = float((lengths * (values - mean) ** 2).sum()) / max(total - 1, 1)
    scale = 1.0 / np.sqrt(variance + WHITEN_EPS)
    return [(values - mean) * scale for values in leaf_advantages]


def _normalised(
    groups: Sequence[ScoredTree],
    by_level: Sequence[tuple[np.ndarray, np.ndarray]],
    settings: AdvantageSettings,
    normalisation: str,
) -> list[TreeAdvantages]:
    """Average each leaf's Â_ij over its levels and divide as the settings say."""
    averages = [values.sum(axis=1) / np.maximum(mask.sum(axis=1), 1) for values, mask in by_level]
    if normalisation == "release":
        averages = whiten_over_tokens(groups, averages)
    elif normalisation == "tree":
        stds = [std(values[mask]) for values, mask in by_level]
        averages = [a / (s + settings.adv_eps) for a, s in zip(averages, stds, strict=True)]
    elif normalisation == "batch" and groups:
        whole = std(np.concatenate([values[mask] for values, mask in by_level]))
        averages = [average / (whole + settings.adv_eps) for average in averages]
    return [
        spread_over_leaves(group, average, settings.loss_weighting)
        for group, average in zip(groups, averages, strict=True)
    ]


def estimate(groups: Sequence[ScoredTree], settings: AdvantageSettings) -> list[TreeAdvantages]:
    """Advantages of a batch by the estimator that the settings name.

    Raises:
        ValueError: no such estimator.
    """
    return ADVANTAGES.get(settings.adv_estimator)(groups, settings)


# --- estimators -------------------------------------------------------------------------------


@ADVANTAGES.register("treepo")
def treepo(groups: Sequence[ScoredTree], settings: AdvantageSettings) -> list[TreeAdvantages]:
    """TreePO (arXiv 2508.17445, Eq. 5): Â_i = sum over j in J_i of Â_ij / (|J_i| * std).

    J_i: the root's level always, and each level below at which leaf i has company (groups of one
    are skipped, as in the published code). The paper leaves open what the std ranges over:

    - 'tree': over all Â_ij of the tree, leaves and levels together, with Bessel's correction; a
      tree that forks at the prompt alone gives GRPO.
    - 'batch': the same over the batch.
    - 'release': no division here, but whitening over the batch's tokens, as the published code
      does. It also shifts the mean, so a leaf of average reward may get an advantage.
    - 'none': no division.

    Leaves of one tree are correlated, and the fallback favours prefixes that end early: the
    baselines are biased by both. 'rloo' offers a baseline without the leaf itself.
    """
    by_level = [level_advantages(group) for group in groups]
    return _normalised(groups, by_level, settings, settings.normalisation)


@ADVANTAGES.register("grpo")
def grpo(groups: Sequence[ScoredTree], settings: AdvantageSettings) -> list[TreeAdvantages]:
    """GRPO (arXiv 2402.03300): A_i = (R_i - mean(R)) / (std(R) + eps) over the tree's leaves.

    ``norm_adv_by_std_in_grpo=False`` leaves the division out (Dr.GRPO); other normalisations than
    'tree' are those of :func:`treepo` with the root's level alone. One leaf has advantage 0.
    """
    by_level = [_root_level(level_advantages(group)) for group in groups]
    return _normalised(groups, by_level, settings, _grpo_normalisation(settings))


@ADVANTAGES.register("rloo")
def rloo(groups: Sequence[ScoredTree], settings: AdvantageSettings) -> list[TreeAdvantages]:
    """Leave-one-out baseline (arXiv 2402.14740): A_i = R_i - mean(R of the other leaves)
    = n / (n - 1) * (R_i - mean(R)), with the divisions of :func:`grpo` if asked for.
    """
    by_level = []
    for group in groups:
        values, mask = _root_level(level_advantages(group))
        n = int(mask.sum())
        by_level.append((values * (n / (n - 1) if n > 1 else 1.0), mask))
    return _normalised(groups, by_level, settings, _grpo_normalisation(settings))


def _root_level(by_level: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    return by_level[0][:, :1], by_level[1][:, :1]


def _grpo_normalisation(settings: AdvantageSettings) -> str:
    return settings.normalisation if settings.norm_adv_by_std_in_grpo else "none"
