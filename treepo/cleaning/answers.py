r"""Ground truths that a verifier can be trusted with: short, and no matrices.

An answer is shortened by what can be taken off without changing what it says: the solution before
``\boxed{}``, ``####`` or ``<answer>``, "The answer is", dollar signs and ``\text{}`` around all of
it, a full stop, and the left side of "x = 5" before a number.
"""

from __future__ import annotations

import re

from rewards.extract import extract_answer
from treepo.cleaning.records import Change, CleanItem, Drop, Outcome, each
from treepo.cleaning.settings import RuleSettings

_WRAPPERS = (
    re.compile(r"\$\$([^$]*)\$\$|\$([^$]*)\$", re.DOTALL),
    re.compile(r"\\\((.*)\\\)|\\\[(.*)\\\]", re.DOTALL),
    re.compile(r"\\(?:text|mathrm|textbf|mathbf|textrm)\s*\{([^{}]*)\}"),
    re.compile(r"\*\*([^*]*)\*\*"),
)
_LEAD = re.compile(
    r"(?:so\s+|thus\s*,?\s+|therefore\s*,?\s+|hence\s*,?\s+)?(?:the\s+)?(?:final\s+|correct\s+)?"
    r"answer\s*(?:is|:|=)\s*:?\s*",
    re.IGNORECASE,
)
_SIDE = re.compile(r"\\?[a-zA-Z]\w*(?:_\{?\w+\}?)?(?:\(\w\))?\s*=\s*(.+)", re.DOTALL)
_MATRIX = re.compile(
    r"\\begin\s*\{(?:[bBpvV]?matrix\*?|smallmatrix|array)\}|\\[bp]?matrix\b"
    r"|\[\s*\[.*?\]\s*,\s*\[|\(\s*\(.*?\)\s*,\s*\(",
    re.DOTALL,
)
_WORD = re.compile(r"(?<![\\A-Za-z])[^\W\d_]{2,}")
_MORE = 20  # rounds at most: each takes something off


def shortened(answer: str) -> str:
    """``answer`` without what it can do without."""
    if any(mark in answer for mark in ("\\boxed", "\\fbox", "####", "</answer>")):
        answer = extract_answer(answer, "auto") or answer
    for _ in range(_MORE):
        shorter = _once(answer.strip())
        if shorter == answer or not shorter:
            break
        answer = shorter
    return answer


def _once(answer: str) -> str:
    lead = _LEAD.match(answer)
    if lead is not None:
        return answer[lead.end() :].strip()
    for wrapper in _WRAPPERS:
        found = wrapper.fullmatch(answer)
        if found is not None:
            return next(group for group in found.groups() if group is not None).strip()
    if answer.endswith(".") and not answer.endswith(".."):
        return answer[:-1].rstrip()
    side = _SIDE.fullmatch(answer)
    if side is not None and not re.search(r"[a-zA-Z=,;]", _without_functions(side[1])):
        return side[1].strip()
    return answer


def _without_functions(formula: str) -> str:
    return re.sub(r"\\(?:[dt]?frac|sqrt|pi|cdot|times|left|right)(?![a-zA-Z])", "", formula)


def shorten(item: CleanItem, settings: RuleSettings) -> Outcome:
    """Take off an answer what it can do without."""
    if item.answer is None:
        return None
    shorter = shortened(item.answer)
    if shorter == item.answer.strip():
        return None
    return Change(reason="shortened", answer=shorter)


def is_long(item: CleanItem, settings: RuleSettings) -> Outcome:
    """Drop answers of many characters or words."""
    if item.answer is None:
        return None
    limits, answer = settings.long_answer, item.answer.strip()
    if len(answer) > limits.max_characters:
        return Drop(reason="many characters", detail=f"{len(answer)} characters")
    words = len(_WORD.findall(answer))
    if words > limits.max_words:
        return Drop(reason="many words", detail=f"{words} words")
    return None


def is_matrix(item: CleanItem, settings: RuleSettings) -> Outcome:
    """Drop answers that are matrices, or lists of lists."""
    if item.answer is None:
        return None
    found = _MATRIX.search(item.answer)
    return None if found is None else Drop(reason="a matrix", detail=item.answer[:200])


shorten_answer = each(shorten)
long_answer = each(is_long)
matrix_answer = each(is_matrix)
