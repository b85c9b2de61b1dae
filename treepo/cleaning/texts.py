"""Texts compared by what they say, not by how they are set."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from itertools import pairwise

# Primes of derivatives (not apostrophes within words), and Unicode's arrows and mathematical
# operators: without them f'(2) were f(2), and √2 were 2.
_WORDS = re.compile(
    r"\d+(?:\.\d+)?|\.\d+|[^\W\d_]+|[-+*/^=<>%!|(){}\[\]]"
    r"|(?<=[\w)'])'(?!\w)|[\u00ac\u00b1\u00d7\u00f7\u2190-\u22ff\u2a00-\u2aff]"
)
_SUPERSCRIPTS = re.compile("[\u00b2\u00b3\u00b9\u2070\u2074-\u2079]+")
_SAME = str.maketrans({"\u2212": "-", "\u2019": "'", "\u2032": "'"})  # minus, quote, prime


def normalised(text: str) -> str:
    """A text's words, numbers and operators, without case, spacing, punctuation and dollar signs.
    Brackets stay, as they change what a formula means; those around one word or number go.
    """
    text = _SUPERSCRIPTS.sub(r"^\g<0>", text)  # NFKC would make 32 of 3 squared
    text = unicodedata.normalize("NFKC", text).casefold().translate(_SAME)
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
