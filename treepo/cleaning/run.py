"""Rules over problems, one after the other, with a record of everything that they did."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from treepo.cleaning.records import Change, CleanItem, Drop, Rule
from treepo.cleaning.settings import RuleSettings


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """What one rule did to one problem."""

    rule: str
    reason: str
    detail: str
    before: CleanItem
    after: CleanItem | None  # None: dropped

    def as_dict(self) -> dict[str, Any]:
        """A row of ``changes.jsonl``."""
        row: dict[str, Any] = {
            "where": self.before.where,
            "problem_id": self.before.id,
            "rule": self.rule,
            "action": "dropped" if self.after is None else "changed",
            "reason": self.reason,
            "detail": self.detail,
            "question": self.before.question,
            "answer": self.before.answer,
        }
        if self.after is not None:
            row |= {"new_question": self.after.question, "new_answer": self.after.answer}
        return row


@dataclass(frozen=True, kw_only=True, slots=True)
class Cleaned:
    """What is left, and what happened.

    Attributes:
        items: as they are now, in order, None where one was dropped.
        events: in the order of the rules, then of the problems.
        looked_at: problems that each rule saw.
    """

    items: tuple[CleanItem | None, ...]
    events: tuple[Event, ...]
    looked_at: Mapping[str, int]

    def counts(self) -> dict[str, Any]:
        """Numbers for ``report.json``; ``unchanged + changed + dropped == read``, a problem that
        was changed and then dropped counting as dropped.
        """
        dropped = {event.before.id for event in self.events if event.after is None}
        touched = {event.before.id for event in self.events} - dropped
        found = {
            "read": len(self.items),
            "unchanged": len(self.items) - len(dropped) - len(touched),
            "changed": len(touched),
            "dropped": len(dropped),
            "without_single_answer": sum(i is not None and i.answer is None for i in self.items),
            "rules": {name: self._of_rule(name) for name in self.looked_at},
        }
        assert len(dropped) == sum(item is None for item in self.items), "a problem was lost"
        return found

    def _of_rule(self, name: str) -> dict[str, Any]:
        events = [event for event in self.events if event.rule == name]
        return {
            "looked_at": self.looked_at[name],
            "changed": sum(event.after is not None for event in events),
            "dropped": sum(event.after is None for event in events),
            "reasons": dict(Counter(event.reason for event in events)),
        }


def clean(items: Sequence[CleanItem], rules: Mapping[str, Rule], settings: RuleSettings) -> Cleaned:
    """Run ``rules`` in order, each on what those before it left.

    Raises:
        ValueError: a rule's own, or one that does not give an outcome a problem.
    """
    now: list[CleanItem | None] = list(items)
    events: list[Event] = []
    looked_at: dict[str, int] = {}
    for name, rule in rules.items():
        left = [(index, item) for index, item in enumerate(now) if item is not None]
        outcomes = rule([item for _, item in left], settings)
        looked_at[name] = len(left)
        if len(outcomes) != len(left):
            raise ValueError(
                f"cleaning rule {name!r} gave {len(outcomes)} outcomes for {len(left)} problems: "
                "it must give one each, None where it has nothing to say"
            )
        for (index, item), outcome in zip(left, outcomes, strict=True):
            if outcome is None:
                continue
            after = _after(item, outcome, name)
            if after == item:
                continue
            now[index] = after
            detail = outcome.detail if isinstance(outcome, Drop) else ""
            events.append(
                Event(rule=name, reason=outcome.reason, detail=detail, before=item, after=after)
            )
    return Cleaned(items=tuple(now), events=tuple(events), looked_at=looked_at)


def _after(item: CleanItem, outcome: object, rule: str) -> CleanItem | None:
    if isinstance(outcome, Drop):
        return None
    if not isinstance(outcome, Change):
        raise ValueError(
            f"cleaning rule {rule!r} gave {type(outcome).__name__} for {item.where}: it must be a "
            "Drop, a Change or None (treepo.cleaning.records)"
        )
    question = item.question if outcome.question is None else outcome.question
    answer = item.answer if outcome.answer is None else outcome.answer
    if not question.strip() or (answer is not None and not answer.strip()):
        raise ValueError(f"cleaning rule {rule!r} left {item.where} without question or answer")
    return replace(item, question=question, answer=answer)
