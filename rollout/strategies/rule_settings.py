"""The named rules of TreePO's sampling, each by its registry; user code goes in as
``module:function``. A rule is imported at its first use.
"""

from __future__ import annotations

from typing import Any

from treepo.base.registry import Registry


def _rules(kind: str, module: str, *names: str) -> Registry[Any]:
    return Registry(kind, builtin={n: f"rollout.strategies.{module}:{n}" for n in names})


# name -> rule that shares a budget among active paths
BRANCHINGS = _rules("branching rule", "branching", "even", "low_logprob", "high_logprob", "entropy")
# name -> what low_logprob and high_logprob weigh a path by
BRANCHING_SCORES = _rules("branching score", "branching", "last_segment", "mean", "cumulative")
# name -> how the temperature of the weights changes with the level
BRANCHING_SCHEDULES = _rules(
    "branching schedule", "branching_temperature", "constant", "linear", "sinusoidal"
)
# the temperatures of each schedule in the paper; as many as it takes
PAPER_TEMPERATURES = {"constant": [2.0], "linear": [5.0, 1.0], "sinusoidal": [0.5, 10.0]}
# name -> how many leaves a tree may have
BUDGETS = _rules("budget rule", "budgets", "width", "level_tokens", "response_tokens")
# name -> which finished responses go on
FALLBACKS = _rules("fallback chooser", "fallback", "random", "finished_first", "longer_first")
# name -> where they are cut
FALLBACK_CUTS = _rules(
    "fallback cut",
    "fallback_cuts",
    "segment",
    "from_start",
    "lowest_logprob",
    "block_softmax",
    "block_softmax_inverse",
    "misaligned",
)
SOFTMAX_BLOCK = 128  # tokens of a block of the block_softmax cuts, as published
