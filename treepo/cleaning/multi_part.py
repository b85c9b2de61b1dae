"""Questions that ask for several answers: one reward cannot judge them."""

from __future__ import annotations

import re

from treepo.cleaning.records import CleanItem, Drop, Outcome, each
from treepo.cleaning.settings import RuleSettings
from treepo.cleaning.texts import between

# Markers of parts by their kind, each with its labels in order.
_ROMAN = ("i", "ii", "iii", "iv", "v", "vi", "vii", "viii")
_LETTERS = tuple("abcdefgh")
_NUMBERS = tuple("12345678")
_MARKERS = (
    (re.compile(r"(?:^|(?<=[\s:;.?]))\(([a-h])\)(?=\s)"), _LETTERS),
    (re.compile(r"(?:^|(?<=[\s:;.?]))\((i{1,3}|iv|vi{0,3})\)(?=\s)"), _ROMAN),
    (re.compile(r"(?:^|(?<=[\s:;.?]))\(([1-8])\)(?=\s)"), _NUMBERS),
    (re.compile(r"^[ \t]*([a-h])[.)](?=\s)", re.MULTILINE), _LETTERS),
    (re.compile(r"^[ \t]*([1-8])[.)](?=\s)", re.MULTILINE), _NUMBERS),
    (re.compile(r"\bpart\s+([a-h])\b\s*[:.)]", re.IGNORECASE), _LETTERS),
    (re.compile(r"\bpart\s+([1-8])\b\s*[:.)]", re.IGNORECASE), _NUMBERS),
)
_ASKS = re.compile(
    r"\?|^\W*(?:then\s+|hence\s+)?(?:find|compute|calculate|determine|evaluate|solve|prove|show"
    r"|what|how|which|who|when|where|why|write|give|state|express|list|name|draw|sketch|explain"
    r"|simplify|factor|estimate|verify|describe|deduce)\b",
    re.IGNORECASE,
)


def parts(question: str) -> list[str]:
    """The texts of a question's marked parts, of the marker that finds most; [] without any. Only
    labels that follow one another from the first count.
    """
    best: list[str] = []
    for pattern, labels in _MARKERS:
        spans: list[tuple[int, int]] = []
        for match in pattern.finditer(question):
            if len(spans) < len(labels) and match.group(1).lower() == labels[len(spans)]:
                spans.append(match.span())
        found = between(question, spans)
        if len(found) > len(best):
            best = found
    return best


def decide(item: CleanItem, settings: RuleSettings) -> Outcome:
    """Drop a question of which two or more marked parts ask for something, or that has more
    question marks than ``multi_part.max_questions``. Parts that only state conditions do not count.
    """
    limits = settings.multi_part
    asking = sum(bool(_ASKS.search(part.strip())) for part in parts(item.question))
    if asking >= limits.min_parts:
        return Drop(reason="several parts", detail=f"{asking} parts ask for something")
    marks = item.question.count("?")
    if limits.max_questions and marks > limits.max_questions:
        return Drop(reason="several questions", detail=f"{marks} question marks")
    return None


multi_part = each(decide)
