"""REINFORCE++: each response against the whole batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from treepo.advantages.finish import finish_leaves
from treepo.advantages.records import ScoredTree, TreeAdvantages
from treepo.algorithm_settings import AdvantageSettings


def reinforce_pp(groups: Sequence[ScoredTree], settings: AdvantageSettings) -> list[TreeAdvantages]:
    """REINFORCE++ (arXiv 2501.03262): A_i = (R_i - mean(R)) / (std(R) + eps) over all leaves of the
    batch: prompts have no baseline of their own.

    'leaves' ('auto') is the formula; 'batch' is the same here; 'release' takes mean and std over
    tokens, as verl does; 'tokens' the std alone. With ``filter_groups`` the batch is what it
    leaves. KL in the reward, part of the paper's method, is no part of this.
    """
    rewards = np.concatenate([np.zeros(0), *(group.rewards[group.valid] for group in groups)])
    mean = float(rewards.mean()) if len(rewards) else 0.0
    advantages = [group.rewards - mean for group in groups]
    spreads = [values[group.valid] for values, group in zip(advantages, groups, strict=True)]
    return finish_leaves(groups, advantages, spreads, settings)
