"""Sums, lengths and values over a tree. Arrays over segments are [S], over leaves [L]."""

from __future__ import annotations

import numpy as np

from rollout.tree import Tree
from treepo.advantages.records import ScoredTree


def sum_over_leaves_below(tree: Tree, leaf_values: np.ndarray) -> np.ndarray:
    """Broadcast leaves' values up their paths: [..., L] -> [..., S], each segment's sum over the
    leaves at or below it.
    """
    sums = np.zeros((*leaf_values.shape[:-1], len(tree.segments)))
    sums[..., list(tree.leaves)] = leaf_values
    for index in range(len(tree.segments) - 1, 0, -1):  # children stand after their parents
        sums[..., tree.segments[index].parent] += sums[..., index]
    return sums


def sum_over_path(tree: Tree, segment_values: np.ndarray) -> np.ndarray:
    """Sums of segments' values from the root down to each leaf, [S] -> float64 [L]."""
    sums = np.array(segment_values, dtype=np.float64)
    for index in range(1, len(tree.segments)):
        sums[index] += sums[tree.segments[index].parent]
    return sums[list(tree.leaves)]


def segment_num_tokens(tree: Tree) -> np.ndarray:
    """Trained (sampled) tokens of each segment, int64 [S]."""
    return np.array([s.num_tokens * s.sampled for s in tree.segments], dtype=np.int64)


def leaf_num_tokens(tree: Tree) -> np.ndarray:
    """Trained (sampled) tokens of each leaf's path, int64 [L]."""
    return sum_over_path(tree, segment_num_tokens(tree)).astype(np.int64)


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


# --- values -----------------------------------------------------------------------------------


def num_leaves_below(group: ScoredTree) -> np.ndarray:
    """Leaves with a verdict at or below each segment, int64 [S]."""
    return sum_over_leaves_below(group.tree, group.valid.astype(float)).astype(np.int64)


def mean_over_leaves(group: ScoredTree) -> np.ndarray:
    """V(s) = mean reward of the leaves with a verdict at or below s, float64 [S]; 0 where there is
    none.
    """
    rewards = np.where(group.valid, group.rewards, 0.0)
    return sum_over_leaves_below(group.tree, rewards) / np.maximum(num_leaves_below(group), 1)


def members(group: ScoredTree, values: np.ndarray) -> list[list[float]]:
    """For each segment the values of its children that have a leaf with a verdict, and its own
    reward if a trajectory ends there: what a fork has to choose among.
    """
    below = num_leaves_below(group)
    found: list[list[float]] = [[] for _ in group.tree.segments]
    for row, leaf in enumerate(group.tree.leaves):
        if group.valid[row]:
            found[leaf].append(float(group.rewards[row]))
    for index in range(1, len(group.tree.segments)):
        if below[index]:
            found[group.tree.segments[index].parent].append(float(values[index]))
    return found


def mean_over_children(group: ScoredTree) -> np.ndarray:
    """V(s) = mean over s's children of V, and its own reward at the end of a trajectory: each
    branch counts the same, however many leaves it has. float64 [S]; 0 without a verdict below.
    """
    tree, below = group.tree, num_leaves_below(group)
    sums, sizes = np.zeros(len(tree.segments)), np.zeros(len(tree.segments))
    leaves = np.array(tree.leaves)[group.valid]
    sums[leaves], sizes[leaves] = group.rewards[group.valid], 1
    for index in range(len(tree.segments) - 1, -1, -1):
        sums[index] /= max(sizes[index], 1)
        parent = tree.segments[index].parent
        if parent >= 0 and below[index]:
            sums[parent] += sums[index]
            sizes[parent] += 1
    return sums


# --- runs -------------------------------------------------------------------------------------


def fork_above(group: ScoredTree) -> np.ndarray:
    """The fork at which each segment's run begins, int64 [S].

    A run is a longest piece of path without a fork, of one segment or several: its segments share
    their leaves with a verdict. The fork above it is the nearest ancestor with more of them; the
    prompt (0) where there is none.
    """
    tree, below = group.tree, num_leaves_below(group)
    forks = np.zeros(len(tree.segments), dtype=np.int64)
    for index in range(1, len(tree.segments)):
        parent = tree.segments[index].parent
        forks[index] = parent if below[parent] > below[index] else forks[parent]
    return forks


def run_starts(group: ScoredTree) -> np.ndarray:
    """Which segments are the first of a run below a fork, and have a verdict below: bool [S]."""
    below = num_leaves_below(group)
    parents = np.array([segment.parent for segment in group.tree.segments])
    starts = (below > 0) & (below[parents] > below)
    starts[0] = False
    return starts
