"""Questions that come again. The first stays, unless their answers differ: then one is wrong and a
rule cannot know which.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from treepo.cleaning.records import CleanItem, Drop, Outcome
from treepo.cleaning.settings import RuleSettings
from treepo.cleaning.texts import bare, normalised


def exact_duplicate(items: Sequence[CleanItem], settings: RuleSettings) -> list[Outcome]:
    """Drop questions that stood before, to the letter."""
    return _repeated(items, settings, lambda item: item.question)


def near_duplicate(items: Sequence[CleanItem], settings: RuleSettings) -> list[Outcome]:
    """Drop questions that stood before but for case, spacing, punctuation and dollar signs."""
    return _repeated(items, settings, lambda item: normalised(item.question) or item.question)


def _repeated(
    items: Sequence[CleanItem], settings: RuleSettings, key: Callable[[CleanItem], str]
) -> list[Outcome]:
    groups: dict[tuple[str, str], list[int]] = {}
    for index, item in enumerate(items):
        groups.setdefault((item.context, key(item)), []).append(index)
    outcomes: list[Outcome] = [None] * len(items)
    for indices in groups.values():
        if len(indices) < 2:
            continue
        first = items[indices[0]]
        answers = {item.truth if item.answer is None else bare(item.answer) or item.answer
                   for item in (items[i] for i in indices)}  # fmt: skip
        if len(answers) > 1 and settings.duplicates.on_conflict == "drop_all":
            for i in indices:
                other = items[indices[0] if i != indices[0] else indices[1]]
                outcomes[i] = Drop(reason="the same question, other answers", detail=other.where)
        else:
            for i in indices[1:]:
                outcomes[i] = Drop(reason="the same question", detail=first.where)
    return outcomes
