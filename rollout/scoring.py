"""Scorers: functions from paths to numbers, such as a process reward model or a mean log-prob."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np


class Scorer(Protocol):
    """Scores of paths (int32 token ids from the root, prompt included), one number each; the
    engine asks once for all paths that are due.
    """

    def __call__(self, paths: Sequence[np.ndarray]) -> Sequence[float]: ...


def score_all(scored: Sequence[tuple[np.ndarray, Scorer]]) -> list[float]:
    """Each path's score, with one call a scorer.

    Raises:
        ValueError: a scorer gave another number of scores than it got paths.
    """
    by_scorer: list[
        tuple[Scorer, list[int]]
    ] = []  # few; equal ones, such as bound methods, are one
    for index, (_, scorer) in enumerate(scored):
        for known, indices in by_scorer:
            if known == scorer:
                indices.append(index)
                break
        else:
            by_scorer.append((scorer, [index]))
    found = [0.0] * len(scored)
    for scorer, indices in by_scorer:
        values = [float(value) for value in scorer([scored[i][0] for i in indices])]
        if len(values) != len(indices):
            raise ValueError(
                f"scorer {getattr(scorer, '__name__', type(scorer).__name__)} gave {len(values)} "
                f"scores for {len(indices)} paths: it must give one a path, in order"
            )
        for index, value in zip(indices, values, strict=True):
            found[index] = value
    return found
