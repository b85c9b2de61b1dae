"""Texts compared by what they say, not by how they are set."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from itertools import pairwise

_WORDS = re.compile(r"\d+(?:\.\d+)?|\.\d+|[^\W\d_]+|[-+*/^=<>%!|(){}\[\]]")


def normalised(text: str) -> str:
    """A text's words, numbers and operators, without case, spacing, punctuation and dollar signs.
    Brackets stay, as they change what a formula means; those around one word or number go.
    """
    text = unicodedata.normalize("NFKC", text).casefold()
    text = re.sub(r"(?<=\d)(?:,|\{,\})(?=\d{3}(?!\d))", "", text)
    text = re.sub(r"\\(?:left|right|displaystyle|,|;|!|quad|qquad)\b", " ", text)
    text = re.sub(r"\{\s*(\w+)\s*\}", r" \1 ", text)
    return " ".join(_WORDS.findall(text))


def bare(text: str) -> str:
    """As ``normalised``, of an answer: without what LaTeX wraps around words."""
    return normalised(re.sub(r"\\(?:text|mathrm|textbf|mathbf|textrm|boxed)\b", "", text))


def between(text: str, spans: Sequence[tuple[int, int]]) -> list[str]:
    """What follows each of ``spans``, up to the next one or the end of ``text``."""
    starts = [*spans, (len(text), len(text))]
    return [text[one[1] : after[0]] for one, after in pairwise(starts)]
