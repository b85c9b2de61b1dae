"""What goes into the rewards room and what comes out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

SCORED = "scored"
# the response holds no answer the verifier can read: scored, with the verifier's value for it
UNPARSABLE = "unparsable"
TIMEOUT = "timeout"  # no verdict: killed
ERROR = "error"  # no verdict: the verifier raised or its process died
OUTCOMES = (SCORED, UNPARSABLE, TIMEOUT, ERROR)


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardItem:
    """One response to score.

    Attributes:
        data_source: picks the verifier where several are configured.
        solution_str: the response's text, without the prompt.
        num_tokens: its length in tokens.
        finish_reason: why it ended (one of ``rollout.tree.FINISH_REASONS``).
    """

    data_source: str
    prompt: str
    solution_str: str
    ground_truth: Any
    extra_info: Mapping[str, Any] = field(default_factory=dict)
    num_tokens: int = 0
    finish_reason: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardResult:
    """A verdict.

    Attributes:
        score: the weighted sum of the parts; meaningless (NaN) unless the outcome is scored or
            unparsable.
        parts: each part's own value before weighting.
        outcome: one of ``OUTCOMES``. A failed verdict (timeout, error) is never a silent 0: it has
            weight 0 in training.
        correct: whether the verifier calls the answer right (its main part >= its threshold); feeds
            accuracy metrics.
        answer: the canonical answer that was read, for majority votes; None if none.
        detail: what went wrong, for people; "" when scored.
    """

    score: float
    parts: Mapping[str, float]
    outcome: str
    correct: bool = False
    answer: str | None = None
    detail: str = ""

    @property
    def has_verdict(self) -> bool:
        return self.outcome in (SCORED, UNPARSABLE)
