"""What a cleaning rule sees of a problem, and what it may say."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from treepo.cleaning.settings import RuleSettings


@dataclass(frozen=True, kw_only=True, slots=True)
class CleanItem:
    """A problem as it is when a rule comes to it.

    Attributes:
        id: as training and evaluation have it for the data as it was read.
        where: file and line, for errors.
        question: the last message of the prompt.
        context: the messages before it, as text; "" for most problems.
        answer: the ground truth, where that is a single text or number; else None, and rules of
            answers leave it alone.
        truth: the whole ground truth as text, to compare.
        original_question: as it was read.
        columns: the row as it was read.
    """

    id: str
    where: str
    question: str
    context: str
    answer: str | None
    truth: str
    original_question: str
    columns: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Drop:
    """The problem goes.

    Attributes:
        reason: a few words, the same for all such problems: they are counted by it.
        detail: what it was in this one.
    """

    reason: str
    detail: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """The problem goes on in another form; None leaves question or answer as it is."""

    reason: str
    question: str | None = None
    answer: str | None = None


Outcome = Drop | Change | None  # None: nothing to say
Rule = Callable[[Sequence[CleanItem], RuleSettings], Sequence[Outcome]]


def each(decide: Callable[[CleanItem, RuleSettings], Outcome]) -> Rule:
    """A rule that looks at every problem by itself."""

    def rule(items: Sequence[CleanItem], settings: RuleSettings) -> list[Outcome]:
        return [decide(item, settings) for item in items]

    rule.__doc__ = decide.__doc__
    return rule
