"""Score one response with all parts of the reward, in the process that calls it."""

from __future__ import annotations

import math
import traceback
from dataclasses import dataclass

from rewards.records import ERROR, SCORED, UNPARSABLE, RewardItem, RewardResult
from rewards.registry import SHAPING, Part, PartResult, check_parts, make_part
from rewards.settings import RewardSettings

_LONGEST_ANSWER = 1000  # characters kept of what a model calls its answer
_LONGEST_DETAIL = 1000


@dataclass(frozen=True, kw_only=True, slots=True)
class _WeightedPart:
    label: str
    part: Part
    weight: float
    verdict: bool


class Scorer:
    """The parts of the reward, made and ready.

    Raises:
        ValueError: an unknown part or option, or user code that does not fit (see
            :func:`rewards.registry.make_part`).
    """

    def __init__(self, settings: RewardSettings) -> None:
        check_parts(settings)
        self._threshold = settings.correct_threshold
        self._parts = [
            _WeightedPart(
                label=label,
                part=make_part(part.name or label, part.options),
                weight=part.weight,
                verdict=(part.name or label) not in SHAPING
                if part.verdict is None
                else part.verdict,
            )
            for label, part in settings.parts_in_force().items()
        ]

    def score(self, item: RewardItem) -> RewardResult:
        """The verdict on one response. What a part raises becomes outcome ``error``: a verifier
        that fails is never a silent 0.
        """
        score, parts = 0.0, {}
        outcome, correct, answer, details = SCORED, True, None, []
        verdicts = 0
        for weighted in self._parts:
            result = _call(weighted, item)
            if result.outcome not in (SCORED, UNPARSABLE):
                return failure(result.outcome, f"{weighted.label}: {result.detail}")
            if result.detail:
                details.append(f"{weighted.label}: {result.detail}")
            if result.value is None:
                continue
            score += weighted.weight * result.value
            parts[weighted.label] = result.value
            parts.update({f"{weighted.label}/{key}": v for key, v in result.extras.items()})
            if not weighted.verdict:
                continue
            verdicts += 1
            right = result.value >= self._threshold if result.correct is None else result.correct
            correct = correct and right and result.outcome == SCORED
            answer = result.answer if answer is None else answer
            if result.outcome == UNPARSABLE:
                outcome = UNPARSABLE
        if not verdicts:
            return failure(
                ERROR, f"no verdict: no verifying part applies to data_source {item.data_source!r}"
            )
        return RewardResult(
            score=score,
            parts=parts,
            outcome=outcome,
            correct=correct,
            answer=None if answer is None else answer[:_LONGEST_ANSWER],
            detail="; ".join(details)[:_LONGEST_DETAIL],
        )


def failure(outcome: str, detail: str) -> RewardResult:
    """A result without a verdict."""
    return RewardResult(score=math.nan, parts={}, outcome=outcome, detail=detail[:_LONGEST_DETAIL])


def _call(weighted: _WeightedPart, item: RewardItem) -> PartResult:
    try:
        result = weighted.part(item)
    except (Exception, SystemExit) as error:  # whatever a verifier raises is its outcome
        return PartResult(value=None, outcome=ERROR, detail=describe(error))
    if result.value is not None and not math.isfinite(result.value):
        return PartResult(
            value=None, outcome=ERROR, detail=f"value {result.value} is not a finite number"
        )
    return result


def describe(error: BaseException) -> str:
    """One line for people: the error and where it was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    hint = ""
    if isinstance(error, MemoryError):
        hint = " (the limit is reward.memory_limit_mb)"
    return f"{type(error).__name__}: {str(error)[:500]}{hint}{where}"
