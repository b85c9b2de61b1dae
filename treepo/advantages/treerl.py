"""TreeRL: a step's global and local advantage."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from treepo.advantages.finish import finish_segments
from treepo.advantages.records import ScoredTree, TreeAdvantages
from treepo.advantages.trees import fork_above, mean_over_leaves, num_leaves_below
from treepo.algorithm_settings import AdvantageSettings


def treerl(groups: Sequence[ScoredTree], settings: AdvantageSettings) -> list[TreeAdvantages]:
    """TreeRL (arXiv 2506.11902): A_s = [(V(s) - V(root)) + (V(s) - V(parent))] / sqrt(n_s).

    V(s): mean reward of the n_s leaves below s. The paper's nodes run from fork to fork: all
    segments of a run without a fork have its advantage, and its parent is the fork above it. The
    root keeps shared steps from weighing n_s times as much as a leaf's own: their term of the
    update grows by sqrt(n_s) then. ``treerl_sqrt_leaves=False`` leaves it out.
    """
    advantages = []
    for group in groups:
        values, forks = mean_over_leaves(group), fork_above(group)
        both = (values - values[0]) + (values - values[forks])
        if settings.treerl_sqrt_leaves:
            both = both / np.sqrt(np.maximum(num_leaves_below(group), 1))
        advantages.append(both)
    return finish_segments(groups, advantages, settings)
