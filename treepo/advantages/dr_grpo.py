"""Dr. GRPO: GRPO without its two divisions."""

from __future__ import annotations

from collections.abc import Sequence

from treepo.advantages.levels import finish_levels, level_advantages
from treepo.advantages.records import ScoredTree, TreeAdvantages
from treepo.algorithm_settings import AdvantageSettings


def dr_grpo(groups: Sequence[ScoredTree], settings: AdvantageSettings) -> list[TreeAdvantages]:
    """Dr. GRPO (arXiv 2503.20783): A_i = R_i - mean(R), never divided.

    The paper's other half is the loss: a response's terms are summed and divided by a constant, not
    by its own length. ``loss_weighting='fixed_length'`` is that exactly, with the constant
    rollout.max_response_length; 'token_mean' divides an update by its number of trained tokens,
    which leaves the same weights among its tokens; 'sequence_mean' is refused.
    """
    return finish_levels(groups, [level_advantages(group).root for group in groups], settings)
