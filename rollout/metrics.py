"""The cost ledger: what sampling took, in counts that carry no noise, and wall time."""

from __future__ import annotations

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
        unique_tokens: the least number of query tokens that any engine needs: each distinct
            token of the finished trees whose next token was drawn, once.
        segments: finished extend requests.
        preempted: requests put back for lack of slots.
        peak_kv_slots: most slots in use by live paths at one time (cached leftovers not counted).
        peak_kv_bytes: the same in bytes over all layers.
        wall_seconds: in the engine's steps.
    """

    generated_tokens: int = 0
    sequential_steps: int = 0
    query_tokens: int = 0
    unique_tokens: int = 0
    segments: int = 0
    preempted: int = 0
    peak_kv_slots: int = 0
    peak_kv_bytes: int = 0
    wall_seconds: float = 0.0

    def merge(self, other: CostLedger) -> CostLedger:
        """Both stretches together."""
        joined = {}
        for field in fields(self):
            ours, theirs = getattr(self, field.name), getattr(other, field.name)
            joined[field.name] = max(ours, theirs) if field.name in _PEAKS else ours + theirs
        return CostLedger(**joined)

    __add__ = merge
