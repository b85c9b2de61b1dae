"""A run of segments against those that leave the same fork: what ``sibling`` and ``treerpo`` do
with their values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from treepo.advantages.finish import finish_segments
from treepo.advantages.normalisation import std
from treepo.advantages.records import ScoredTree, TreeAdvantages
from treepo.advantages.trees import fork_above, members, num_leaves_below
from treepo.algorithm_settings import AdvantageSettings


def finish_siblings(
    groups: Sequence[ScoredTree], values: Sequence[np.ndarray], settings: AdvantageSettings
) -> list[TreeAdvantages]:
    """A_s = (V(s) - mean(V over siblings, s too)) / (std(V over siblings) + eps).

    Siblings are the runs that leave one fork and have a leaf with a verdict, each counted once, and
    a trajectory that ends at the fork itself. Normalisation 'tree' divides as above; another one
    divides the differences as it says instead.
    """
    own = settings.divides_by == "tree"
    advantages = [
        _against_siblings(group, of_tree, settings.adv_eps if own else None)
        for group, of_tree in zip(groups, values, strict=True)
    ]
    if own:
        settings = replace(settings, normalisation="none")  # what there is to divide is divided
    return finish_segments(groups, advantages, settings)


def _against_siblings(group: ScoredTree, values: np.ndarray, eps: float | None) -> np.ndarray:
    below, forks, choices = num_leaves_below(group), fork_above(group), members(group, values)
    advantage = np.zeros(len(values))
    for index in range(1, len(values)):
        fork = forks[index]
        if 0 < below[index] < below[fork]:
            siblings = np.array(choices[fork])
            difference = values[index] - siblings.mean()
            advantage[index] = difference if eps is None else difference / (std(siblings) + eps)
    return advantage
