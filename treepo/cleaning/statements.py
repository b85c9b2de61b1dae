r"""Proofs and true/false questions: into short answers where a rule can, else dropped.

The authors had a language model rewrite these. A rule reads two forms: "Prove that <something> is
<number>" asks for that number, and an answer "Yes, 12" to a question that asks for a value as well
holds that value. All others are dropped and counted.
"""

from __future__ import annotations

import re

from treepo.cleaning.answers import shortened
from treepo.cleaning.records import Change, CleanItem, Drop, Outcome, each
from treepo.cleaning.settings import RuleSettings

_SENTENCE = re.compile(r"(?<=[.?!])\s+|\n\s*\n?")
_PROVE = re.compile(
    r"\W*(?:(?:then|hence|now|and|please|also|therefore)\s*,?\s+)*"
    r"(?:prove|show|verify|demonstrate|deduce|establish)\b(?!\s+(?:your|all|the\s+work))",
    re.IGNORECASE,
)
_ASKS = re.compile(
    r"\?\s*$|\b(?:find|compute|calculate|determine|evaluate|solve|what|how\s+many|how\s+much)\b",
    re.IGNORECASE,
)
# A number as an answer: 12, -3/4, 1,000, 2\pi, \frac{3}{4}, \sqrt{2}, 3\sqrt{5}, 50\%
_NUMBER = (
    r"[-+]?\s*(?:\d[\d,]*(?:\.\d+)?(?:\s*/\s*\d+)?\s*(?:\\?%|°|\^\\circ)?"
    r"|\d*\s*\\[dt]?frac\s*\{-?\d+\}\s*\{-?\d+\})?\s*(?:\\sqrt\s*(?:\[\d+\])?\{\d+\}|\\pi\b|π)?"
)
_VALUE = re.compile(
    r"\W*(?:(?:then|hence|now|please|also)\s*,?\s+)*(?:prove|show|verify|demonstrate)\s+that\s+"
    r"(?P<what>the\s+.*?\S|\$[^$]+?\S|\\\([^$]+?\S)\s*"
    r"(?:\$?\s*=\s*\$?|\s+(?:is|are|equals)\s+(?:always\s+)?(?:equal\s+to\s+|exactly\s+)?)\s*"
    rf"\$?(?P<value>{_NUMBER})\s*\$?\s*[.!]?\s*",
    re.IGNORECASE | re.DOTALL,
)
_BOOLEAN = re.compile(r"\W*(true|false|yes|no)\W*", re.IGNORECASE)
_BOOLEAN_AND_VALUE = re.compile(r"\W*(?:true|yes)\s*[,;:.(]\s*(?P<value>[^()]+?)\s*\)?\W*$", re.I)
_TRUE_OR_FALSE = re.compile(r"\btrue\s+or\s+false\b|\(\s*t\s*/\s*f\s*\)", re.IGNORECASE)


def proof_or_value(item: CleanItem, settings: RuleSettings) -> Outcome:
    """Drop what asks for a proof, or ask for the value that was to be proved. A question whose last
    sentence asks for a value can be judged by that, and stays.
    """
    sentences = [s for s in _SENTENCE.split(item.question.strip()) if s.strip()]
    proving = [sentence for sentence in sentences if _PROVE.match(sentence)]
    if not proving:
        return None
    last = sentences[-1]
    if not _PROVE.match(last) and _ASKS.search(last):
        return None
    found = _VALUE.fullmatch(last)
    if found is None or not found["value"].strip() or len(proving) > 1:
        return Drop(reason="asks for a proof", detail=proving[0][:200])
    before = item.question.strip().removesuffix(last)
    what = found["what"].strip()
    if what.startswith("$") and what.count("$") % 2:
        what += "$"
    return Change(
        reason="the value to be proved is asked for",
        question=f"{before}Find {what}.",
        answer=found["value"].strip(),
    )


def boolean(item: CleanItem, settings: RuleSettings) -> Outcome:
    """Drop true/false and yes/no questions, whose answers can be guessed; where the answer holds a
    value that the question asks for, that is the answer.
    """
    answer = item.answer
    if answer is None:
        return None
    if _BOOLEAN.fullmatch(answer):
        return Drop(reason="the answer is true or false", detail=answer)
    if _TRUE_OR_FALSE.search(item.question):
        return Drop(reason="the question is true or false", detail=answer[:200])
    found = _BOOLEAN_AND_VALUE.fullmatch(answer)
    if found is None:
        return None
    if _ASKS.search(item.question.rstrip("?. ")):
        return Change(reason="the value beside yes is the answer", answer=shortened(found["value"]))
    return Drop(reason="the answer is true or false", detail=answer[:200])


proof = each(proof_or_value)
true_false = each(boolean)
