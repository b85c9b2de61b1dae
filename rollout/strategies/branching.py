"""How many paths leave each active path at the end of a level (TreePO, section 2.2).

A rule is a function ``rule(paths, budget, settings) -> copies``: how many children each of the
active ``paths`` gets. Every path gets at least one and together they get ``budget``. A rule that
reads entropies says so by ``@reads_entropy``; only then are they computed.

The rules that weigh paths give each path one fork and share the rest by
weight = softmax(s * (x - min x) / T) with largest remainders, ties by path key. T:
``rollout.strategies.branching_temperature``.

============== ==== ===============================================================
rule           s    x
============== ==== ===============================================================
low_logprob    -1   log-prob of the response by ``branching_score``: improbable paths get more
high_logprob   +1   the same: probable paths get more
entropy        +1   mean entropy of the last segment (nats): uncertain paths get more (not in the
                    paper)
============== ==== ===============================================================
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from rollout.strategies.branching_temperature import branching_temperature
from rollout.strategies.rule_settings import BRANCHING_SCORES
from rollout.strategies.settings import TreePOSettings
from treepo.base.keys import Purpose, draw_word

# Scores are rounded to this grid: log-probs of equal tokens differ in their last digits with the
# batch that computed them, and a tie must stay a tie.
SCORE_GRID = 2.0**-10


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ActivePath:
    """A path that goes on. Its last segment has m >= 1 tokens, its response n >= m.

    Attributes:
        path_key: of the last segment.
        level: of the last segment.
        logprobs: float32 [n], of the response's tokens under softmax(logits / temperature).
        segment_logprobs: float32 [m], of the last segment's.
        segment_entropy: float32 [m], nats, of their distributions; None where no rule reads it.
    """

    path_key: int
    level: int
    logprobs: np.ndarray
    segment_logprobs: np.ndarray
    segment_entropy: np.ndarray | None = None


BranchingRule = Callable[[Sequence[ActivePath], int, TreePOSettings], list[int]]


def reads_entropy(rule: BranchingRule) -> BranchingRule:
    """Mark a rule that needs ``ActivePath.segment_entropy``."""
    rule.reads_entropy = True  # type: ignore[attr-defined]
    return rule


def level_budget(*, active: int, finished: int, finished_this_step: int, width: int) -> int:
    """How many paths go on: every active path forks in two, and each path that ended in this step
    hands two more on, as far as the width ``w`` has room:

    B = max(active, min(w - finished, 2 * finished_this_step + 2 * active)).
    """
    return max(active, min(width - finished, 2 * finished_this_step + 2 * active))


# --- rules ------------------------------------------------------------------------------------


def even(paths: Sequence[ActivePath], budget: int, settings: TreePOSettings) -> list[int]:
    """Split the budget evenly; what is left over goes one each to paths drawn by their keys."""
    share, left_over = divmod(budget, len(paths))
    order = sorted(range(len(paths)), key=lambda k: _lot(paths[k].path_key))
    copies = [share] * len(paths)
    for k in order[:left_over]:
        copies[k] += 1
    return copies


def low_logprob(paths: Sequence[ActivePath], budget: int, settings: TreePOSettings) -> list[int]:
    """More copies of improbable paths."""
    return _by_logprob(paths, budget, settings, sign=-1.0)


def high_logprob(paths: Sequence[ActivePath], budget: int, settings: TreePOSettings) -> list[int]:
    """More copies of probable paths."""
    return _by_logprob(paths, budget, settings, sign=1.0)


@reads_entropy
def entropy(paths: Sequence[ActivePath], budget: int, settings: TreePOSettings) -> list[int]:
    """More copies of uncertain paths."""
    scores = []
    for path in paths:
        assert path.segment_entropy is not None, "entropies were not asked for"
        scores.append(_mean(path.segment_entropy))
    temperature = branching_temperature([path.level for path in paths], settings)
    return _share_out(paths, budget, _weights(scores, 1.0, temperature))


def _by_logprob(
    paths: Sequence[ActivePath], budget: int, settings: TreePOSettings, sign: float
) -> list[int]:
    score = BRANCHING_SCORES.get(settings.branching_score)
    temperature = branching_temperature([path.level for path in paths], settings)
    return _share_out(paths, budget, _weights([score(path) for path in paths], sign, temperature))


# --- scores -----------------------------------------------------------------------------------


def cumulative(path: ActivePath) -> float:
    """Log-prob of the response so far."""
    return float(path.logprobs.sum(dtype=np.float64))


def mean(path: ActivePath) -> float:
    """The same a token."""
    return _mean(path.logprobs)


def last_segment(path: ActivePath) -> float:
    """Mean log-prob of the last segment's tokens."""
    return _mean(path.segment_logprobs)


# --- shares -----------------------------------------------------------------------------------


def _weights(scores: Sequence[float], sign: float, temperature: float) -> np.ndarray:
    """softmax(sign * (x - min x) / T), float64 [A]."""
    x = np.round(np.array(scores, dtype=np.float64) / SCORE_GRID) * SCORE_GRID
    distances = sign * x - (sign * x).max()  # at most 0: no temperature makes them overflow
    weights = np.exp(distances / temperature)
    return weights / weights.sum()


def _share_out(paths: Sequence[ActivePath], budget: int, weights: np.ndarray) -> list[int]:
    """One copy each, then budget - A more by weight: whole shares first, then one each to the
    largest remainders, ties by path key.
    """
    extra = budget - len(paths)
    # Rounded, so that shares that are equal but for arithmetic are equal.
    shares = [round(extra * float(weight), 9) for weight in weights]
    copies = [1 + math.floor(share) for share in shares]
    order = sorted(
        range(len(paths)), key=lambda k: (math.floor(shares[k]) - shares[k], paths[k].path_key)
    )
    for k in order[: budget - sum(copies)]:
        copies[k] += 1
    return copies


def _mean(values: np.ndarray) -> float:
    return float(values.mean(dtype=np.float64))


def _lot(path_key: int) -> tuple[int, int]:
    return draw_word(path_key, 0, Purpose.BRANCH), path_key
