"""What becomes of a response that the length limit cut (``algorithm.overlong``). Pure functions.

| rule | reward | in the loss | source |
|---|---|---|---|
| keep | the verifier's | yes | |
| zero | 0, not correct | yes | UloRL, arXiv 2507.19766, section 2 |
| mask | the verifier's, which counts in its group | no | DAPO, arXiv 2503.14476, section 3.4 |

DAPO's soft punishment is the reward part ``length`` and goes with any of these.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from rewards.records import RewardResult
from rollout.tree import TRUNCATED, Tree


def is_overlong(tree: Tree) -> np.ndarray:
    """Which leaves the length limit cut, bool [L]."""
    return np.array([tree.segments[i].finish_reason == TRUNCATED for i in tree.leaves], dtype=bool)


def overlong_verdicts(
    tree: Tree, verdicts: Sequence[RewardResult], rule: str
) -> list[RewardResult]:
    """The verdicts under the rule, in the order of ``tree.leaves``; one that failed stays so."""
    if rule != "zero":
        return list(verdicts)
    return [
        replace(verdict, score=0.0, correct=False) if cut and verdict.has_verdict else verdict
        for verdict, cut in zip(verdicts, is_overlong(tree), strict=True)
    ]


def overlong_in_loss(tree: Tree, rule: str) -> np.ndarray | None:
    """Which leaves are trained on, bool [L]; None: all."""
    return ~is_overlong(tree) if rule == "mask" else None
