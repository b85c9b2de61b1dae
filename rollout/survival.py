"""How long something still lasts, estimated from ends that were seen and ends that were not.

A response that was cut or put aside after t tokens says only that its length is more than t: it is
right-censored. Leaving it out, or taking t for its length, makes long responses look rare. The
product-limit estimate (Kaplan and Meier, 1958) counts it among those at risk up to t:

    S(t) = P(length > t) = prod over lengths l <= t at which some ended of (1 - d_l / n_l)

with d_l ends of length l, and n_l observations of length l or more: what was cut at l was there
when those of length l ended. Beyond the largest observation, where that one was cut, S falls as an
exponential through S there, S(t) = S(last) ** (t / last) (Brown, Hollander and Korwar, 1974).

What is expected of one that has drawn t tokens and may draw c in all is the restricted mean
residual life

    E[min(length, c) - t | length > t] = sum over u in t..c-1 of S(u) / S(t).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SurvivalCurve:
    """The product-limit estimate of a set of lengths.

    Attributes:
        ends: int64 [k], distinct lengths at which some ended, ascending.
        survival: float64 [k], S at each of them.
        integral: float64 [k + 1], sum of S(u) over u < ends[i]; the last one over u < last.
        last: the largest observation, ended or not; 0 without any.
        rival_log_survival: log of S(last), had there been one more that outlived all.
    """

    ends: np.ndarray
    survival: np.ndarray
    integral: np.ndarray
    last: int
    rival_log_survival: float

    def at(self, lengths: np.ndarray | int) -> np.ndarray:
        """float64, S at each of ``lengths``."""
        times = np.asarray(lengths, np.float64)
        index = np.searchsorted(self.ends, times, side="right")
        steps = np.concatenate([[1.0], self.survival])[index]
        tail = np.exp(-self._tail_rate * np.maximum(times, 1))
        return np.where(times > self.last, tail, steps)

    def expected_remaining(self, drawn: np.ndarray | int, cap: np.ndarray | int) -> np.ndarray:
        """float64, tokens that each of some responses is still expected to draw.

        One that has outlived every observation is counted as one more that was cut there, so that
        the tail has a rate: with k lengths below t it is expected to draw about t / log(k + 1)
        more. Without any end among the observations it is expected to reach its cap.

        Args:
            drawn: tokens that each has drawn, >= 0.
            cap: tokens that each may draw in all, >= ``drawn``.
        """
        t, c = np.broadcast_arrays(np.asarray(drawn, np.float64), np.asarray(cap, np.float64))
        assert (c >= t).all() and (t >= 0).all(), "a response has drawn more than its cap"
        alive = self.at(t)
        outlived = (t > self.last) | (alive <= 0)
        within = self._sum_below(c) - self._sum_below(t)
        rate = np.where(t > 0, -self.rival_log_survival / np.maximum(t, 1), 0.0)
        beyond = _geometric(rate, np.zeros_like(t), c - t)
        return np.where(outlived, beyond, within / np.where(outlived, 1.0, alive))

    @property
    def _tail_rate(self) -> float:
        """Per token, of the exponential beyond ``last``; infinite where all are over."""
        left = float(self.survival[-1]) if len(self.survival) else 1.0
        if left <= 0:
            return np.inf
        return -np.log(left) / self.last if self.last else 0.0

    def _sum_below(self, times: np.ndarray) -> np.ndarray:
        """Sum of S(u) over integers u in 0..times-1."""
        inner = np.minimum(times, self.last)
        index = np.searchsorted(self.ends, inner, side="left")
        knots = np.concatenate([[0], self.ends])
        steps = np.concatenate([[1.0], self.survival])
        start = np.concatenate([[0.0], self.integral[:-1]])
        below = start[index] + steps[index] * (inner - knots[index])
        if np.isinf(self._tail_rate):
            return below
        return below + _geometric(self._tail_rate, inner, np.maximum(times, inner))


def product_limit(lengths: np.ndarray, has_ended: np.ndarray) -> SurvivalCurve:
    """The curve of some observations, in O(n log n).

    Args:
        lengths: int [n], >= 0; n may be 0.
        has_ended: bool [n], False where a response was cut or put aside at its length.
    """
    lengths = np.asarray(lengths, np.int64)
    ends, counts = np.unique(lengths[np.asarray(has_ended, bool)], return_counts=True)
    at_risk = len(lengths) - np.searchsorted(np.sort(lengths), ends, side="left")
    survival = np.cumprod(1.0 - counts / at_risk)
    last = int(lengths.max()) if len(lengths) else 0
    widths = np.diff(np.concatenate([[0], ends, [last]]))
    integral = np.cumsum(np.concatenate([[1.0], survival]) * widths)
    return SurvivalCurve(
        ends=ends,
        survival=survival,
        integral=integral,
        last=last,
        rival_log_survival=float(np.log1p(-counts / (at_risk + 1)).sum()),
    )


def _geometric(rate: np.ndarray | float, start: np.ndarray, stop: np.ndarray) -> np.ndarray:
    """Sum of exp(-rate * u) over integers u in start..stop-1, ``rate`` >= 0 and finite."""
    rate = np.asarray(rate, np.float64)
    falls = rate > 1e-12
    safe = np.where(falls, rate, 1.0)
    total = np.exp(-safe * start) * np.expm1(-safe * (stop - start)) / np.expm1(-safe)
    return np.where(falls, total, stop - start)
