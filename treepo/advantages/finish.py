"""From advantages of leaves or segments to the record: divide, weigh, sum over the tree."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from treepo.advantages.normalisation import RawAdvantages, normalise
from treepo.advantages.records import ScoredTree, TreeAdvantages
from treepo.advantages.trees import (
    leaf_num_tokens,
    num_leaves_below,
    run_starts,
    segment_num_tokens,
    sum_over_leaves_below,
    sum_over_path,
)
from treepo.algorithm_settings import AdvantageSettings


def finish_leaves(
    groups: Sequence[ScoredTree],
    leaf_advantages: Sequence[np.ndarray],
    spreads: Sequence[np.ndarray],
    settings: AdvantageSettings,
) -> list[TreeAdvantages]:
    """Records of an estimator that gives each leaf one advantage.

    Args:
        leaf_advantages: of each tree, float64 [L].
        spreads: of each tree the values that normalisations 'tree' and 'batch' look at.
    """
    raw = [
        RawAdvantages(
            advantage=values,
            counts=group.valid,
            num_tokens=leaf_num_tokens(group.tree) * group.valid,
            spread=spread,
        )
        for group, values, spread in zip(groups, leaf_advantages, spreads, strict=True)
    ]
    divided = normalise(raw, settings.divides_by, settings.adv_eps)
    return [
        spread_over_leaves(group, values, settings.loss_weighting)
        for group, values in zip(groups, divided, strict=True)
    ]


def finish_segments(
    groups: Sequence[ScoredTree],
    segment_advantages: Sequence[np.ndarray],
    settings: AdvantageSettings,
) -> list[TreeAdvantages]:
    """Records of an estimator at node level. 'tree' and 'batch' look at each run of segments once.

    Args:
        segment_advantages: of each tree, float64 [S].
    """
    raw = []
    for group, values in zip(groups, segment_advantages, strict=True):
        below = num_leaves_below(group)
        raw.append(
            RawAdvantages(
                advantage=values,
                counts=below > 0,
                num_tokens=segment_num_tokens(group.tree) * below,
                spread=values[run_starts(group)],
            )
        )
    divided = normalise(raw, settings.divides_by, settings.adv_eps)
    return [
        spread_over_segments(group, values, settings.loss_weighting)
        for group, values in zip(groups, divided, strict=True)
    ]


def spread_over_leaves(
    group: ScoredTree, leaf_advantage: np.ndarray, loss_weighting: str
) -> TreeAdvantages:
    """The record for an estimator that gives each leaf one advantage for all of its tokens."""
    tree = group.tree
    leaf_weight = leaf_weights(group, loss_weighting)
    leaf_advantage = np.where(leaf_weight > 0, leaf_advantage, 0.0)
    weighted = leaf_weight * leaf_advantage
    pos, neg, weight = _where_sampled(group) * sum_over_leaves_below(
        tree, np.stack([np.maximum(weighted, 0.0), np.minimum(weighted, 0.0), leaf_weight])
    )
    return TreeAdvantages(
        leaf_advantage=leaf_advantage,
        leaf_weight=leaf_weight,
        advantage_pos=pos,
        advantage_neg=neg,
        weight=weight,
    )


def spread_over_segments(
    group: ScoredTree, segment_advantage: np.ndarray, loss_weighting: str
) -> TreeAdvantages:
    """The record for an estimator that gives each segment one advantage A_s for all leaves below:
    sums w * max(A_s, 0) and w * min(A_s, 0), with w the leaves' weights together.
    """
    tree = group.tree
    leaf_weight = leaf_weights(group, loss_weighting)
    weight = _where_sampled(group) * sum_over_leaves_below(tree, leaf_weight)
    segment_advantage = np.where(weight > 0, segment_advantage, 0.0)
    totals = sum_over_path(tree, segment_num_tokens(tree) * segment_advantage)
    means = totals / np.maximum(leaf_num_tokens(tree), 1)
    return TreeAdvantages(
        leaf_advantage=np.where(leaf_weight > 0, means, 0.0),
        leaf_weight=leaf_weight,
        advantage_pos=weight * np.maximum(segment_advantage, 0.0),
        advantage_neg=weight * np.minimum(segment_advantage, 0.0),
        weight=weight,
        segment_advantage=segment_advantage,
    )


def leaf_weights(group: ScoredTree, loss_weighting: str) -> np.ndarray:
    """Weight of each of a leaf's tokens, float64 [L]: 0 without a verdict or anything to train, and
    where ``group.in_loss`` is False; 1 / length under 'sequence_mean', else 1 (what the loss is
    divided by makes the difference between 'token_mean' and 'fixed_length').
    """
    lengths = leaf_num_tokens(group.tree)
    per_token = 1.0 / np.maximum(lengths, 1) if loss_weighting == "sequence_mean" else 1.0
    return np.where(group.trains & (lengths > 0), per_token, 0.0)


def _where_sampled(group: ScoredTree) -> np.ndarray:
    return np.array([segment.sampled for segment in group.tree.segments], dtype=np.float64)
