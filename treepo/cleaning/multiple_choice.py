"""Multiple-choice questions into short answers.

A letter can be guessed, and a verifier of mathematics cannot judge it. Where the answer's option
holds an answer of its own, that becomes the ground truth and the options go; where the question
cannot stand without its options it is dropped. A rule sees only words that give that away ("which
of the following"); the authors had a language model rewrite such questions.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from treepo.cleaning.answers import shortened
from treepo.cleaning.records import Change, CleanItem, Drop, Outcome, each
from treepo.cleaning.settings import RuleSettings
from treepo.cleaning.texts import bare, between

_LABELS = "ABCDEFGH"
# (A) by itself, in bold, or as LaTeX text; A) A. A: at the start of a line. f(a) is no label.
_INLINE = re.compile(
    r"\\(?:textbf|text|mathrm|textrm|mathbf)\s*\{\s*\(\s*(?P<latex>[A-Ha-h])\s*\)\s*\}"
    r"|\*\*\(\s*(?P<bold>[A-Ha-h])\s*\)\*\*"
    r"|(?<![\w\\)}])\(\s*(?P<plain>[A-Ha-h])\s*\)"
)
_LINE = re.compile(r"^[ \t]*(?:\*\*)?(?P<plain>[A-Ha-h])[.):](?:\*\*)?(?=\s)", re.MULTILINE)
_INSTRUCTION = re.compile(
    r"\b(?:answer|choose|select|pick|letter|option|choice)s?\b", re.IGNORECASE
)
_LETTER = re.compile(
    r"(?:the\s+)?(?:correct\s+)?(?:answer|option|choice)?(?:\s+is)?\s*:?\s*\(?\s*([A-H])\s*\)?\.?",
    re.IGNORECASE,
)
_LETTER_AND_TEXT = re.compile(r"\(?\s*([A-H])\s*[).:]\s*(\S.*)", re.DOTALL)
_NEEDS_OPTIONS = re.compile(
    r"\b(?:of|from|among|in)\s+(?:the\s+)?(?:following|these|those|above|below)\b"
    r"|\bthe\s+following\s+(?:\w+\s+)?(?:is|are|options?|choices?|statements?|expressions?)\b"
    r"|\bwhich\s+(?:one\s+)?(?:option|choice|statement|answer)\b"
    r"|\b(?:closest|nearest)\s+to\b|\bbest\s+(?:describes?|approximat\w+)\b",
    re.IGNORECASE,
)
_HEADING = re.compile(r"\s*(?:answer\s+)?(?:options|choices)\s*:?\s*$", re.IGNORECASE)
_NO_ANSWER = re.compile(
    r"\b(?:none|all|any|both|either|neither)\b.*\b(?:above|these|those|following|other|[A-H])\b"
    r"|\bnone\b|cannot be determined|not enough information|insufficient",
    re.IGNORECASE,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Choices:
    """A question without its options, their texts in order, and what follows them."""

    stem: str
    options: tuple[str, ...]
    after: str


def choices(question: str, min_options: int) -> Choices | None:
    """The options of a question, labelled from A on without a gap; None if there are not so many.
    The last one ends with its line.
    """
    for pattern in (_INLINE, _LINE):
        spans: list[tuple[int, int]] = []
        for match in pattern.finditer(question):
            label = next(group for group in match.groups() if group)
            if label.upper() == _LABELS[len(spans) : len(spans) + 1]:
                spans.append(match.span())
        if len(spans) >= min_options:
            texts = between(question, spans)
            texts[-1], _, after = texts[-1].strip().partition("\n")
            stem = _HEADING.sub("", question[: spans[0][0]])
            return Choices(
                stem=_without_open_dollar(stem),
                options=tuple(_option(text) for text in texts),
                after=after.strip(),
            )
    return None


def decide(item: CleanItem, settings: RuleSettings) -> Outcome:
    """Turn a multiple-choice question into one with a short answer, or drop it."""
    found = choices(item.question, settings.multiple_choice.min_options)
    if found is None or item.answer is None:
        return None
    if found.after and not _INSTRUCTION.search(found.after):
        return Drop(reason="text after the options", detail=found.after[:200])
    answer = _chosen(item.answer, found)
    if answer is None:
        return Drop(reason="the answer is none of the options", detail=item.answer[:200])
    if not answer or _NO_ANSWER.search(answer):
        return Drop(reason="the option holds no answer of its own", detail=answer[:200])
    if not found.stem.strip() or _NEEDS_OPTIONS.search(found.stem):
        return Drop(reason="the question needs its options", detail=found.stem[-200:])
    return Change(
        reason="options taken off, the answer's text is the answer",
        question=found.stem,
        answer=shortened(answer),
    )


multiple_choice = each(decide)


def _chosen(answer: str, found: Choices) -> str | None:
    """The text of the option that an answer names by letter, by text, or by both."""
    letter = _LETTER.fullmatch(answer.strip())
    if letter is None:
        both = _LETTER_AND_TEXT.fullmatch(answer.strip())
        if both is not None and _index(both.group(1)) < len(found.options):
            named = found.options[_index(both.group(1))]
            return named if bare(named) == bare(both.group(2)) else None
        same = [option for option in found.options if bare(option) == bare(answer)]
        return same[0] if same else None
    index = _index(letter.group(1))
    return found.options[index] if index < len(found.options) else None


def _index(letter: str) -> int:
    return _LABELS.index(letter.upper())


def _option(text: str) -> str:
    """An option's text without the spacing and separators around it."""
    text = re.sub(r"\\(?:qquad|quad|hspace\{[^}]*\}|,|;|!|\\|\s)", " ", text)
    text = re.sub(r"^[\s:.]+|[\s;,.]+$", "", text.strip().strip("~"))
    text = re.sub(r"[\s;,]+(?:and|or)$", "", text)
    # $...$ around all the options leaves its halves at the first and the last
    return text.replace("$", "").strip() if text.count("$") % 2 else text.strip()


def _without_open_dollar(stem: str) -> str:
    stem = stem.rstrip()
    if stem.count("$") % 2 and stem.endswith("$"):
        stem = stem.rstrip("$").rstrip()
    return stem
