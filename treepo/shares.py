"""How the trees of a call are dealt to the rollout workers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from rollout.growth import GrowthLimits


def deal(
    homes: Sequence[int | None], num_workers: int, expected_tokens: Sequence[float] | None = None
) -> list[list[int]]:
    """Indices of the trees of each worker.

    Each tree goes to the worker with the least so far, the longest first where lengths are expected
    (longest processing time first; Graham 1969, "Bounds on multiprocessing timing anomalies": at
    most 4/3 of the shortest possible end); otherwise all count alike and they go round.

    Args:
        homes: of each tree the worker that holds its keys and values, to which it goes before all
            others; None: any.
    """
    weights = [1.0] * len(homes) if expected_tokens is None else expected_tokens
    shares: list[list[int]] = [[] for _ in range(num_workers)]
    loads = [0.0] * num_workers
    for index in sorted(range(len(homes)), key=lambda i: (homes[i] is None, -weights[i])):
        rank = homes[index]
        if rank is None:
            rank = min(range(num_workers), key=lambda r: (loads[r], len(shares[r])))
        shares[rank].append(index)
        loads[rank] += weights[index]
    return [sorted(share) for share in shares]


def limits_of_shares(limits: GrowthLimits, sizes: Sequence[int]) -> list[GrowthLimits]:
    """Each worker's limits. The trees after which a call stops are shared out by the sizes of the
    shares, whole parts first, then one each to the largest remainders; a worker stops after one at
    the earliest.
    """
    wanted, total = limits.stop_when_finished, sum(sizes)
    if not wanted or not total:
        return [limits] * len(sizes)
    parts = [wanted * size // total for size in sizes]
    by_remainder = sorted(range(len(sizes)), key=lambda i: -(wanted * sizes[i] % total))
    for i in by_remainder[: wanted - sum(parts)]:
        parts[i] += 1
    return [replace(limits, stop_when_finished=max(1, part)) for part in parts]
