"""How many leaves a tree may have, when tokens are to be saved.

A rule is a function ``rule(tally, settings) -> leaves``, asked at the end of each level and before
each fallback. Its number, at most ``settings.n``, takes the place of the width w in TreePO's budget
(``branching.level_budget``) and says how many leaves a fallback has to fill up. Active paths always
go on, whatever it says.
"""

from __future__ import annotations

from dataclasses import dataclass

from rollout.strategies.settings import TreePOSettings


@dataclass(frozen=True, kw_only=True, slots=True)
class Tally:
    """A tree at the end of a level.

    Attributes:
        finished: number of leaves.
        finished_tokens: tokens of their responses, each counted whole.
        mean_length: tokens of an active path's response on average; of a leaf's where nothing is
            active.
    """

    finished: int
    finished_tokens: int
    mean_length: float


def width(tally: Tally, settings: TreePOSettings) -> int:
    """No other limit than the width."""
    return settings.n


def level_tokens(tally: Tally, settings: TreePOSettings) -> int:
    """``budget_tokens`` a level: at most floor(budget_tokens / segment_length) paths are active at
    a time. The tree still fills its width, in more rounds.
    """
    return tally.finished + settings.budget_tokens // settings.segment_length


def response_tokens(tally: Tally, settings: TreePOSettings) -> int:
    """``budget_tokens`` for the responses of a prompt together, a shared token counted once for
    each; a response to come is taken to be as long as the active ones and a segment:

    clamp(finished + floor((budget - finished_tokens) / (mean_length + l)), budget_min_n, n).

    The tree may stay narrower than n.
    """
    left = settings.budget_tokens - tally.finished_tokens
    more = int(left // (tally.mean_length + settings.segment_length))
    return max(settings.budget_min_n, min(tally.finished + more, settings.n))
