"""The cost ledger: what sampling took, in counts that carry no noise, and wall time; and gauges:
what the engine holds at the moment.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields

_PEAKS = ("peak_kv_slots", "peak_kv_bytes")


@dataclass(frozen=True, kw_only=True, slots=True)
class CostLedger:
    """Costs of some stretch of work. ``merge`` or ``+`` joins two: counts and seconds add up, peaks
    take the larger.

    Attributes:
        generated_tokens: drawn.
        sequential_steps: forwards of the model.
        query_tokens: rows forwarded, padding excluded.
        other_query_tokens: of these, the ones for drafts and scores.
        unique_tokens: the least number of query tokens that any engine needs: each distinct
            token of the finished trees whose next token was drawn, once.
        path_tokens: tokens above the segments that were started: what an engine that shares
            nothing would have to compute before it draws.
        cached_tokens: of these, the ones whose keys and values were there already, or were being
            computed for another request.
        segments: finished extend requests.
        cancelled: requests cancelled before they finished.
        preempted: requests put back for lack of slots.
        draft_tokens: tokens of draft trees that were forwarded.
        wasted_draft_tokens: of these, the ones that were not committed.
        scorer_passes: calls of a scorer, one a path.
        peak_kv_slots: most slots in use by live paths at one time (cached leftovers not counted).
        peak_kv_bytes: the same in bytes over all layers.
        wall_seconds: in the engine's calls.
    """

    generated_tokens: int = 0
    sequential_steps: int = 0
    query_tokens: int = 0
    other_query_tokens: int = 0
    unique_tokens: int = 0
    path_tokens: int = 0
    cached_tokens: int = 0
    segments: int = 0
    cancelled: int = 0
    preempted: int = 0
    draft_tokens: int = 0
    wasted_draft_tokens: int = 0
    scorer_passes: int = 0
    peak_kv_slots: int = 0
    peak_kv_bytes: int = 0
    wall_seconds: float = 0.0

    @property
    def hit_rate(self) -> float:
        """Share of the tokens above started segments that were not computed again."""
        return self.cached_tokens / self.path_tokens if self.path_tokens else 0.0

    @property
    def shared_token_ratio(self) -> float:
        """Share of an unsharing engine's query tokens that were saved. Such an engine computes the
        path above each segment and all but the last token drawn. Drafts and scores do not count.
        """
        alone = self.path_tokens + self.generated_tokens - self.segments
        spent = self.query_tokens - self.other_query_tokens
        return 1.0 - spent / alone if alone > 0 else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Tokens drawn a second of the engine's time."""
        return self.generated_tokens / self.wall_seconds if self.wall_seconds else 0.0

    def merge(self, other: CostLedger) -> CostLedger:
        """Both stretches together."""
        joined = {}
        for field in fields(self):
            ours, theirs = getattr(self, field.name), getattr(other, field.name)
            joined[field.name] = max(ours, theirs) if field.name in _PEAKS else ours + theirs
        return CostLedger(**joined)

    __add__ = merge

    def __sub__(self, before: CostLedger) -> CostLedger:
        """What a stretch took, from the ledgers after and before it; peaks are those after it."""
        taken = {
            field.name: getattr(self, field.name)
            - (0 if field.name in _PEAKS else getattr(before, field.name))
            for field in fields(self)
        }
        return CostLedger(**taken)


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineGauges:
    """What an engine holds at one moment.

    Attributes:
        num_waiting, num_running: requests.
        slots_free: of the pool.
        slots_held: of the pool; the live and the cached ones.
        slots_live: held by locked paths: handles and running requests.
        slots_cached: held by nobody, kept for whoever asks for the same tokens; evicted on demand.
        kv_bytes_per_slot: over all layers; 0 before the first forward.
        num_paused: trees that were put aside and whose keys and values are kept over new weights.
        kv_host_bytes: of keys and values that wait in the host's memory.
    """

    num_waiting: int
    num_running: int
    slots_free: int
    slots_held: int
    slots_live: int
    slots_cached: int
    kv_bytes_per_slot: int
    num_paused: int
    kv_host_bytes: int


class Meter:
    """Running totals that the parts of an engine add to, cheap enough for every step."""

    def __init__(self) -> None:
        self._totals: Counter[str] = Counter()
        self._peak_kv_slots = 0

    def count(self, **amounts: float) -> None:
        """Add to fields of the ledger that add up."""
        for name, amount in amounts.items():
            self._totals[name] += amount  # type: ignore[assignment]

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Count the time spent."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.count(wall_seconds=time.perf_counter() - began)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """As ``timed``; the rows forwarded meanwhile are for something else than drawing."""
        before = self._totals["query_tokens"]
        with self.timed():
            yield
        self.count(other_query_tokens=self._totals["query_tokens"] - before)

    def peak(self, kv_slots: int) -> None:
        """Slots in use by live paths now."""
        self._peak_kv_slots = max(self._peak_kv_slots, kv_slots)

    def add(self, costs: CostLedger) -> None:
        """Add a whole ledger."""
        self.count(
            **{f.name: getattr(costs, f.name) for f in fields(costs) if f.name not in _PEAKS}
        )
        self.peak(costs.peak_kv_slots)

    def reset(self) -> None:
        self._totals.clear()
        self._peak_kv_slots = 0

    def ledger(self, bytes_per_slot: int) -> CostLedger:
        """What was counted since the last ``reset``."""
        return CostLedger(
            **self._totals,
            peak_kv_slots=self._peak_kv_slots,
            peak_kv_bytes=self._peak_kv_slots * bytes_per_slot,
        )
