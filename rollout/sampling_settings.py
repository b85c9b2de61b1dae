"""What sampling settings may be, said once for the engine's and the strategies'."""

from __future__ import annotations

import math
from collections.abc import Iterable

COOLEST = 1e-5  # temperature above greedy: logits are divided by it in float32
STRONGEST_PENALTY = 1000.0

TEMPERATURES_ALLOWED = f"0 (greedy) or >= {COOLEST}"
PENALTIES_ALLOWED = f"in [{1 / STRONGEST_PENALTY}, {STRONGEST_PENALTY}] (1: no penalty)"
STOP_STRINGS_ALLOWED = (
    "strings of at least one character, none of them U+FFFD (a character cut in two)"
)


def is_temperature(number: float) -> bool:
    """Whether logits can be divided by it, or it is 0 for greedy."""
    return number == 0 or COOLEST <= number < math.inf


def is_penalty(number: float) -> bool:
    """Whether logits can be divided and multiplied by it."""
    return 1 / STRONGEST_PENALTY <= number <= STRONGEST_PENALTY


def are_stop_strings(strings: Iterable[str]) -> bool:
    """Whether stops can be looked for in text: U+FFFD stands for a character that is not complete
    yet, so it cannot be part of one.
    """
    return all(string and "\ufffd" not in string for string in strings)
