"""What goes into an advantage estimator and what comes out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from rewards.records import RewardResult
from rollout.tree import Tree
from treepo.algorithm_settings import AdvantageSettings


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ScoredTree:
    """A tree and the verdicts on its leaves, in the order of ``tree.leaves`` (L of them)."""

    tree: Tree
    rewards: np.ndarray  # float64 [L]; 0 where there is no verdict
    valid: np.ndarray  # bool [L], whether there is a verdict
    correct: np.ndarray  # bool [L]; False where there is no verdict
    # bool [L], False: counts in baselines and spreads, but is not trained on; None: all True
    in_loss: np.ndarray | None = None

    @property
    def trains(self) -> np.ndarray:
        """bool [L], whether there is a verdict, and it counts in the loss."""
        return self.valid if self.in_loss is None else self.valid & self.in_loss


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TreeAdvantages:
    """Advantages A and weights w of one tree with L leaves and S segments.

    The two sums stand apart because a clipped loss treats positive and negative advantages
    differently: with them the loss of a shared token is the sum of its leaves' losses, exactly.

    An estimator either gives a leaf one advantage for all of its tokens, or each segment one for
    all leaves that pass through it (``segment_advantage``, node level).
    """

    # float64 [L]; at node level the mean over the leaf's trained tokens, for people to look at
    leaf_advantage: np.ndarray
    leaf_weight: np.ndarray  # float64 [L], w; 0: no verdict or nothing to train
    advantage_pos: np.ndarray  # float64 [S], sum over leaves below of w * max(A, 0)
    advantage_neg: np.ndarray  # float64 [S], sum over leaves below of w * min(A, 0)
    weight: np.ndarray  # float64 [S], sum over leaves below of w; 0 where not sampled
    # float64 [S], A of each segment's tokens, 0 where nothing trains; None: one advantage a leaf
    segment_advantage: np.ndarray | None = None


Estimator = Callable[[Sequence[ScoredTree], AdvantageSettings], list[TreeAdvantages]]


def scored_tree(
    tree: Tree, results: Sequence[RewardResult], in_loss: np.ndarray | None = None
) -> ScoredTree:
    """A tree with the verdicts on its leaves, in the order of ``tree.leaves``."""
    assert len(results) == tree.num_leaves, f"{len(results)} verdicts, {tree.num_leaves} leaves"
    valid = np.array([result.has_verdict for result in results], dtype=bool)
    scores = np.array([result.score for result in results], dtype=np.float64)
    assert np.isfinite(scores[valid]).all(), f"{tree.problem_id}: a verdict has no finite score"
    correct = np.array([result.correct for result in results], dtype=bool)
    return ScoredTree(
        tree=tree,
        rewards=np.where(valid, scores, 0.0),
        valid=valid,
        correct=correct & valid,
        in_loss=in_loss,
    )
