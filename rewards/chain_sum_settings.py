"""How many terms a chain sum has, where that is to have a long tail: most sums are short, a few
take many times as many steps, as lengths of reasoning do.
"""

from __future__ import annotations

import math
import random


def check_term_counts(min_terms: int, max_terms: int, median_terms: float, log_sd: float) -> None:
    """
    Raises:
        ValueError: the median is not between the bounds, or the spread is not positive.
    """
    if not min_terms <= median_terms <= max_terms:
        raise ValueError(
            f"chain_sum: median_terms={median_terms} must be within min_terms={min_terms} and "
            f"max_terms={max_terms}"
        )
    if not (0 < log_sd < math.inf):
        raise ValueError(
            f"chain_sum: log_sd={log_sd} must be > 0 (such as 0.7) with median_terms; leave out "
            "both for numbers of terms that are all alike likely"
        )


def draw_term_count(
    rng: random.Random, min_terms: int, max_terms: int, median_terms: float, log_sd: float
) -> int:
    """round(median_terms * exp(log_sd * z)), z normal, drawn again until it is within the bounds:
    a lognormal without what lies beyond them.
    """
    while True:
        count = round(median_terms * math.exp(log_sd * rng.gauss(0.0, 1.0)))
        if min_terms <= count <= max_terms:
            return count
