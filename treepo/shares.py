"""How the trees of a call are dealt to the rollout workers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from rollout.growth import GrowthLimits


def deal(
    count: int, num_workers: int, expected_tokens: Sequence[float] | None = None
) -> list[list[int]]:
    """Indices of the trees of each worker; workers without any are left out.

    Without expectations the trees go round. With them the longest goes first, each to the worker
    with the least so far (longest processing time first; Graham 1969, "Bounds on multiprocessing
    timing anomalies": at most 4/3 of the shortest possible end).
    """
    num_workers = min(num_workers, count)
    if expected_tokens is None:
        return [list(range(rank, count, num_workers)) for rank in range(num_workers)]
    shares: list[list[int]] = [[] for _ in range(num_workers)]
    loads = [0.0] * num_workers
    for index in sorted(range(count), key=lambda i: -expected_tokens[i]):
        rank = min(range(num_workers), key=lambda r: (loads[r], len(shares[r])))
        shares[rank].append(index)
        loads[rank] += expected_tokens[index]
    return [sorted(share) for share in shares if share]


def limits_of_shares(limits: GrowthLimits, sizes: Sequence[int]) -> list[GrowthLimits]:
    """Each worker's limits. The trees after which a call stops are shared out by the sizes of the
    shares, whole parts first, then one each to the largest remainders; a worker stops after one at
    the earliest.
    """
    wanted, total = limits.stop_when_finished, sum(sizes)
    if not wanted:
        return [limits] * len(sizes)
    parts = [wanted * size // total for size in sizes]
    by_remainder = sorted(range(len(sizes)), key=lambda i: -(wanted * sizes[i] % total))
    for i in by_remainder[: wanted - sum(parts)]:
        parts[i] += 1
    return [replace(limits, stop_when_finished=max(1, part)) for part in parts]
