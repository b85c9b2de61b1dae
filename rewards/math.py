r"""Mathematical equality of an answer and its ground truth, by math-verify.

Plain numbers (``1,000``, ``-3``, ``$2.50``), which are most answers, are compared as exact
rationals; anything else is parsed to SymPy and compared symbolically. math-verify's own time limits
use ``signal.alarm``, which fails off the main thread: they are off, since whoever calls this is
killable.
"""

from __future__ import annotations

import functools
import logging
import re
from fractions import Fraction
from typing import Any

import sympy
from math_verify import parse, verify

from rewards.extract import check_form, extract_answer
from rewards.records import UNPARSABLE, RewardItem
from rewards.registry import Part, PartResult

logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its time limits are off

_NUMBER = re.compile(r"([+-]?)\s*\$?\s*([+-]?)(\d[\d,]*|)(\.\d+|\.|)")
_GROUPS = re.compile(r"\d{1,3}(,\d{3})+|\d+|")
# "18 dollars": a number and its unit, unless the words mean something to mathematicians
_WITH_UNIT = re.compile(r"([^a-zA-Z]+)\s((?:[a-zA-Z]{2,}[ .]*)+)")
_NO_UNITS = frozenset({"pi", "sqrt", "sin", "cos", "tan", "log", "ln", "exp", "infinity", "inf"})
_LONGEST_NUMBER = 300  # digits; beyond it an answer is text
# The parser's time grows faster than the text: 200,000 characters of nonsense took 260 s.
_LONGEST_ANSWER = 2000  # characters; beyond it there is no answer
_LONGEST_SEARCH = 5000  # characters at the end of a response in which an unmarked answer is sought


def make(extraction: str = "auto") -> Part:
    r"""A part worth 1 where the answer equals the ground truth, else 0.

    A ground truth is a number, an answer in LaTeX, a whole GSM8K solution (``... #### 18``) or one
    with a ``\boxed{}``; a list means any of them.

    Args:
        extraction: how the answer is found, see :mod:`rewards.extract`. With ``auto``, where no
            marker is there, math-verify's own search is taken (the last number or formula).
    """
    check_form(extraction)

    def math(item: RewardItem) -> PartResult:
        truths = item.ground_truth if isinstance(item.ground_truth, list) else [item.ground_truth]
        golds = [_gold(truth) for truth in truths]
        found = extract_answer(item.solution_str, extraction)
        if found is None and extraction != "auto":
            return PartResult(value=0.0, outcome=UNPARSABLE)
        parsed = (
            _parse_text(item.solution_str[-_LONGEST_SEARCH:])
            if found is None
            else parse_answer(found)
        )
        if not parsed:
            return PartResult(value=0.0, outcome=UNPARSABLE)
        right = any(_equal(gold, parsed) for gold in golds)
        return PartResult(value=float(right), answer=canonical(parsed))

    return math


def _gold(truth: Any) -> list[Any]:
    if truth is None or not str(truth).strip():
        raise ValueError("the ground truth is empty")
    text = str(truth)
    answer = extract_answer(text, "auto")
    parsed = _parse_gold(text.strip() if answer is None else answer)
    if not parsed:
        raise ValueError(f"the ground truth {text[:200]!r} holds no answer that can be read")
    return parsed


@functools.lru_cache(maxsize=1024)
def _parse_gold(answer: str) -> list[Any]:
    return parse_answer(answer)


def parse_answer(answer: str) -> list[Any]:
    """What an extracted answer means: a list as math-verify makes it (an expression and the text
    it was read from), ``[Fraction]`` for a plain number, empty where it means nothing.
    """
    if len(answer) > _LONGEST_ANSWER:
        return []
    number = plain_number(_without_unit(answer))
    if number is not None:
        return [number]
    if answer.endswith("%"):  # inside \boxed{} math-verify does not read percentages
        plain = plain_number(answer.removesuffix("%").rstrip("\\ "))
        if plain is not None:
            return _parse_text(f"{sympy_number(plain)}%")
    return _parse_text("\\boxed{" + answer.strip("$ ") + "}") or _parse_text(answer)


def _without_unit(answer: str) -> str:
    match = _WITH_UNIT.fullmatch(answer) if len(answer) <= _LONGEST_NUMBER else None
    if match is None or _NO_UNITS & set(re.findall("[a-z]+", match.group(2).lower())):
        return answer
    return match.group(1)


def plain_number(text: str) -> Fraction | None:
    """Read an optional sign, an optional dollar sign, digits with or without thousands separators,
    and decimals; None for anything else.
    """
    text = text.strip().strip("$").rstrip(".").replace("\\$", "$").replace("{,}", ",")
    match = _NUMBER.fullmatch(text)
    if match is None or len(text) > _LONGEST_NUMBER:
        return None
    sign, inner_sign, whole, decimals = match.groups()
    if (sign and inner_sign) or not _GROUPS.fullmatch(whole) or not (whole or len(decimals) > 1):
        return None
    value = Fraction((whole.replace(",", "") or "0") + (decimals if len(decimals) > 1 else ""))
    return -value if "-" in (sign, inner_sign) else value


def _parse_text(text: str) -> list[Any]:
    try:
        return parse(text, parsing_timeout=None, raise_on_error=True)
    except MemoryError:
        raise
    except Exception:  # the parsers raise whatever they like at nonsense; nonsense is no answer
        return []


def _equal(gold: list[Any], parsed: list[Any]) -> bool:
    if isinstance(gold[0], Fraction) and isinstance(parsed[0], Fraction):
        if gold[0] == parsed[0]:
            return True
        if gold[0].denominator == parsed[0].denominator == 1:
            return False
    return verify(_for_library(gold), _for_library(parsed), timeout_seconds=None,
                  raise_on_error=True)  # fmt: skip


def _for_library(parsed: list[Any]) -> list[Any]:
    if not isinstance(parsed[0], Fraction):
        return parsed
    number = sympy_number(parsed[0])
    return [number, str(number)]


def sympy_number(value: Fraction) -> sympy.Expr:
    """As math-verify reads it: an integer stays exact, a decimal is a float, which it rounds
    before it compares.
    """
    if value.denominator == 1:
        return sympy.Integer(value.numerator)
    return sympy.Float(str(float(value)))


def canonical(parsed: list[Any]) -> str:
    """One spelling of equal answers, for votes: numbers as exact fractions, expressions as SymPy
    prints them. No simplification, which may take for ever.
    """
    first = parsed[0]
    if isinstance(first, sympy.Expr) and first.is_number and first.count_ops() <= 4:
        if all(number.is_Rational or number.is_Float for number in first.atoms(sympy.Number)):
            first = _as_fraction(first)
    return str(first)


def _as_fraction(expression: sympy.Expr) -> Any:
    """The value of a small quotient or product of numbers as a Fraction; else the expression."""
    value: Any = expression.doit()
    if value.is_Float:
        return Fraction(str(value)).limit_denominator(10**9)
    if value.is_Rational:
        return Fraction(value.p, value.q)
    return value
