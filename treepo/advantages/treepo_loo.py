"""TreePO's advantage with leave-one-out baselines."""

from __future__ import annotations

from collections.abc import Sequence

from treepo.advantages.levels import finish_levels, level_advantages
from treepo.advantages.records import ScoredTree, TreeAdvantages
from treepo.algorithm_settings import AdvantageSettings


def treepo_loo(groups: Sequence[ScoredTree], settings: AdvantageSettings) -> list[TreeAdvantages]:
    """Eq. 5 with Â_ij = R_i - mean(R of the *other* leaves of G_ij).

    What is biased, and what this mends. Take a tree of fixed shape, no division, the gradient of
    log-probability times advantage, a group of n leaves and a token that m of them share.

    - With this baseline the group's term at that token is (n - m) / (n - 1) times the sum over the
      m leaves of (R_i - mean(R of the n - m others)), whose baseline doesn't depend on the token:
      unbiased where m = 1, shrunk but in the right direction for shared tokens, and 0 for tokens
      that the whole group shares.
    - With the plain mean of ``treepo`` the factor is (n - m) / n: everything is shrunk by another
      (n - 1) / n, most where groups are small, so that deep levels count for less than they say.
    - No baseline mends the shape: the budget of early finishers goes to others, and the fallback
      continues prefixes of *finished* leaves, so how many leaves a token has depends on what came
      after it. With unequal |J_i| the terms of shared tokens don't cancel either.

    Dividing by a std of the same rewards is a bias of its own, as in GRPO: 'none' avoids it.
    """
    by_level = [level_advantages(group).leave_one_out for group in groups]
    return finish_levels(groups, by_level, settings)
