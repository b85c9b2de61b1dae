"""Estimators of an evaluation: mean@k, pass@k, maj@k, and confidence intervals. Pure functions.

Each takes one problem's samples and gives a number of 0..1; a score is the mean over problems.
Where several samples a problem were drawn than k, the estimators average over all k-subsets, so
that no sample is wasted and the order of drawing does not matter.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from math import comb, prod, sqrt
from statistics import NormalDist

import numpy as np

_MOST_SUBSETS = 2000  # maj@k enumerates up to so many subsets and draws so many beyond


def mean_at_k(correct: Sequence[bool]) -> float:
    """Share of correct samples: the expected accuracy of one sample, for any k."""
    _check_samples(len(correct), 1)
    return sum(correct) / len(correct)


def pass_at_k(correct: Sequence[bool], k: int) -> float:
    """Probability that at least one of k samples is correct, without bias from n >= k samples.

    1 - C(n-c, k) / C(n, k) = 1 - prod_{i=n-c+1}^{n} (1 - k / i) for c correct ones (Chen et al.
    2021, "Evaluating large language models trained on code", equation 1). The product is the stable
    form.
    """
    n, c = len(correct), sum(correct)
    _check_samples(n, k)
    return 1.0 - prod(1.0 - k / i for i in range(n - c + 1, n + 1)) if n - c >= k else 1.0


def majority(answers: Sequence[str | None]) -> int | None:
    """Index of the first sample that gave the most frequent answer.

    None answers (nothing readable) do not vote. Of equally frequent answers the one seen first
    wins. None if nobody votes.
    """
    votes = Counter(answer for answer in answers if answer is not None)
    if not votes:
        return None
    winner, _ = votes.most_common(1)[0]  # Counter keeps the order of first occurrence among equals
    return answers.index(winner)


def maj_at_k(
    answers: Sequence[str | None], correct: Sequence[bool], k: int, *, seed: int = 0
) -> float:
    """Probability that the majority answer of k samples is correct, from n >= k samples.

    For k = n it is the one majority vote. For k < n it is the mean over all k-subsets, each in the
    order of drawing; beyond 2000 subsets over 2000 of them, drawn with ``seed``.

    Args:
        answers: canonical answers, so that equal ones are equal text; None: none was readable.
        correct: verdicts; samples with one answer have one verdict (the first's counts).
    """
    n = len(answers)
    _check_samples(n, k)
    assert len(correct) == n, f"{n} answers but {len(correct)} verdicts"
    if comb(n, k) <= _MOST_SUBSETS:
        subsets = list(combinations(range(n), k))
    else:
        generator = np.random.default_rng(seed)
        subsets = [
            tuple(sorted(generator.choice(n, k, replace=False))) for _ in range(_MOST_SUBSETS)
        ]
    return sum(_vote(answers, correct, subset) for subset in subsets) / len(subsets)


def _vote(answers: Sequence[str | None], correct: Sequence[bool], subset: Sequence[int]) -> bool:
    winner = majority([answers[i] for i in subset])
    return winner is not None and correct[subset[winner]]


def wilson_interval(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Score interval of a proportion (Wilson 1927): sound for few trials and near 0 and 1."""
    _check_samples(n, 1)
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share, z2n = successes / n, z * z / n
    middle = (share + z2n / 2) / (1 + z2n)
    half = z / (1 + z2n) * sqrt(share * (1 - share) / n + z2n / (4 * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def bootstrap_interval(
    values: Sequence[float], confidence: float = 0.95, *, num_resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of the mean over problems (Efron 1979), by resampling problems: the
    samples of one problem are not independent, the problems are.
    """
    _check_samples(len(values), 1)
    array = np.asarray(values, dtype=np.float64)
    draws = np.random.default_rng(seed).integers(len(array), size=(num_resamples, len(array)))
    tail = (1 - confidence) / 2
    low, high = np.quantile(array[draws].mean(axis=1), [tail, 1 - tail])
    return float(low), float(high)


def confidence_interval(
    values: Sequence[float], confidence: float = 0.95, *, seed: int = 0
) -> tuple[float, float]:
    """Of the mean over problems: Wilson's where every problem's value is 0 or 1 (its width does not
    collapse when all are equal), the bootstrap's otherwise.
    """
    if all(value in (0.0, 1.0) for value in values):
        return wilson_interval(round(sum(values)), len(values), confidence)
    return bootstrap_interval(values, confidence, seed=seed)


def _check_samples(n: int, k: int) -> None:
    if not 1 <= k <= n:
        raise ValueError(f"k={k} of n={n} samples: 1 <= k <= n is needed; draw more samples")
