"""Tree-GRPO: within the tree, and over all trees of the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from treepo.advantages.finish import finish_leaves
from treepo.advantages.levels import level_advantages
from treepo.advantages.records import ScoredTree, TreeAdvantages
from treepo.algorithm_settings import AdvantageSettings


def tree_grpo(groups: Sequence[ScoredTree], settings: AdvantageSettings) -> list[TreeAdvantages]:
    """Tree-GRPO (arXiv 2509.21240): A_i = A_i,inter + A_i,intra, where

        A_i,inter = (R_i - mean(R over all leaves of the prompt)) / (their std + eps)
        A_i,intra = (R_i - mean(R over i's tree)) / (their std + eps).

    The paper grows several trees a prompt, each from a first response of its own. Here these are
    the subtrees below the prompt: i's tree is the leaves that share its first segment (level 1),
    "all leaves of the prompt" is one group of the batch. A tree of one leaf has no intra term, a
    leaf that ends at the prompt none either. Normalisation 'tree' divides both terms as above,
    'none' divides neither.
    """
    advantages = [_inter_plus_intra(group, settings) for group in groups]
    undivided = replace(settings, normalisation="none")  # what there is to divide is divided
    return finish_leaves(groups, advantages, advantages, undivided)


def _inter_plus_intra(group: ScoredTree, settings: AdvantageSettings) -> np.ndarray:
    levels = level_advantages(group)
    divisor = levels.std[:, :2] + settings.adv_eps if settings.divides_by == "tree" else 1.0
    return (levels.values[:, :2] / divisor).sum(axis=1)
