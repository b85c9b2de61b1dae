"""String equality of the extracted answer and the ground truth."""

from __future__ import annotations

from rewards.extract import check_form, extract_answer
from rewards.records import UNPARSABLE, RewardItem
from rewards.registry import Part, PartResult


def make(extraction: str = "auto", ignore_case: bool = False) -> Part:
    """A part worth 1 where the answer equals the ground truth (runs of white space count as one
    space), else 0. A list of ground truths means any of them.

    Args:
        extraction: how the answer is found, see :mod:`rewards.extract`.
    """
    check_form(extraction)

    def normal(text: object) -> str:
        joined = " ".join(str(text).split())
        return joined.casefold() if ignore_case else joined

    def exact(item: RewardItem) -> PartResult:
        found = extract_answer(item.solution_str, extraction)
        if found is None:
            return PartResult(value=0.0, outcome=UNPARSABLE)
        truths = item.ground_truth if isinstance(item.ground_truth, list) else [item.ground_truth]
        answer = normal(found)
        right = any(answer == normal(truth) for truth in truths)
        return PartResult(value=float(right), answer=answer)

    return exact
