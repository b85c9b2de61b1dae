"""A leaf against those that share its ancestor, level by level: what TreePO's estimators average.

R_i: reward of leaf i. G_ij: the leaves with a verdict that share i's ancestor at level j (G_i0: the
whole tree). Â_ij = R_i - mean(R over G_ij).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from treepo.advantages.finish import finish_leaves
from treepo.advantages.records import ScoredTree, TreeAdvantages
from treepo.advantages.trees import leaf_ancestors
from treepo.algorithm_settings import AdvantageSettings


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LevelAdvantages:
    """Â_ij of a tree with L leaves and J levels, from the root (j = 0) down."""

    values: np.ndarray  # float64 [L, J]; 0 where it doesn't count
    # bool [L, J], which count: those of leaves with a verdict, at the root always and below it
    # where G_ij has another leaf (a group of one says nothing about its leaf)
    counts: np.ndarray
    sizes: np.ndarray  # int64 [L, J], |G_ij|
    std: np.ndarray  # float64 [L, J], of the rewards of G_ij, with Bessel's correction

    def only(self, counts: np.ndarray) -> LevelAdvantages:
        """The same with no more than ``counts`` counting."""
        counts = self.counts & counts
        return replace(self, values=np.where(counts, self.values, 0.0), counts=counts)

    @property
    def root(self) -> LevelAdvantages:
        """The root's level alone: a leaf against all others of its tree."""
        return self.only(np.arange(self.values.shape[1]) == 0)

    @property
    def leave_one_out(self) -> LevelAdvantages:
        """R_i - mean(R of the others of G_ij) = n / (n - 1) * Â_ij, with n = |G_ij|; 0 where there
        are no others.
        """
        return replace(self, values=self.values * self.sizes / np.maximum(self.sizes - 1, 1))

    def averages(self, weights: np.ndarray | None = None) -> np.ndarray:
        """Each leaf's mean over its levels, weighted by ``weights`` [L, J]; 0 without any."""
        weights = self.counts * (1.0 if weights is None else weights)
        totals = weights.sum(axis=1)
        return (weights * self.values).sum(axis=1) / np.where(totals > 0, totals, 1.0)


def level_advantages(group: ScoredTree) -> LevelAdvantages:
    """Â_ij of every leaf and level of a tree."""
    ancestors = leaf_ancestors(group.tree)
    counts = (ancestors >= 0) & group.valid[:, None]
    size = len(group.tree.segments)
    rewards = np.broadcast_to(group.rewards[:, None], ancestors.shape)
    where, what = ancestors[counts], rewards[counts]
    sums, squares, sizes = np.zeros(size), np.zeros(size), np.zeros(size, dtype=np.int64)
    np.add.at(sums, where, what)
    np.add.at(sizes, where, 1)
    means = sums / np.maximum(sizes, 1)
    np.add.at(squares, where, (what - means[where]) ** 2)
    stds = np.sqrt(squares / np.maximum(sizes - 1, 1))
    counts[:, 1:] &= sizes[ancestors[:, 1:]] > 1
    return LevelAdvantages(
        values=np.where(counts, rewards - means[ancestors], 0.0),
        counts=counts,
        sizes=np.where(counts, sizes[ancestors], 0),
        std=np.where(counts, stds[ancestors], 0.0),
    )


def finish_levels(
    groups: Sequence[ScoredTree],
    by_level: Sequence[LevelAdvantages],
    settings: AdvantageSettings,
    averages: Sequence[np.ndarray] | None = None,
) -> list[TreeAdvantages]:
    """Average each leaf's Â_ij over its levels, unless done, and divide as the settings say:
    'tree' and 'batch' by the standard deviation of the Â_ij that count.
    """
    return finish_leaves(
        groups,
        [levels.averages() for levels in by_level] if averages is None else averages,
        [levels.values[levels.counts] for levels in by_level],
        settings,
    )
