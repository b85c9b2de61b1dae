"""Metrics of an update as sums, so that they are exact over rows, ranks and optimiser steps."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist


class MetricSums:
    """Accumulates on the device; communicates once, in :meth:`reduce`."""

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}  # added up over ranks
        self._maxima: dict[str, torch.Tensor] = {}
        self._weight_of: dict[str, str] = {}  # of _sums, those that are means -> their weights' sum
        self._rank_equal: dict[str, list[float]] = {}
        self._counts: dict[str, int] = {}

    def add_weighted(self, values: Mapping[str, torch.Tensor], weight: torch.Tensor) -> None:
        """Values a token [M], reported as means weighted by ``weight`` [M]."""
        self._add_means(values, weight, "_weight")

    def add_sequences(self, values: Mapping[str, torch.Tensor]) -> None:
        """Values a trained response [N], reported as means."""
        if values:
            ones = torch.ones_like(next(iter(values.values())))
            self._add_means(values, ones, "_num_sequences")

    def add_rank_sum(self, name: str, value: torch.Tensor) -> None:
        """A rank's share of a value of the whole update; reported as the mean over updates."""
        self._add(name, value.double())

    def add_difference(self, name: str, values: torch.Tensor) -> None:
        """Values a token [M], reported as ``name_mean`` and ``name_max`` over tokens."""
        self._add_means({f"{name}_mean": values}, torch.ones_like(values), f"_{name}_tokens")
        largest = values.max().double() if len(values) else torch.zeros((), dtype=torch.float64)
        name = f"{name}_max"
        self._maxima[name] = torch.maximum(self._maxima.get(name, largest), largest)

    def add_rank_equal(self, name: str, value: float) -> None:
        """A value that is the same on all ranks; reported as the mean over updates."""
        self._rank_equal.setdefault(name, []).append(value)

    def add_count(self, name: str, count: int) -> None:
        """A count that is the same on all ranks."""
        self._counts[name] = self._counts.get(name, 0) + count

    def reduce(self, num_updates: int, device: torch.device) -> dict[str, float]:
        """The metrics, the same on all ranks. Collective."""
        names, maxima = list(self._sums), list(self._maxima)
        sums = dict(zip(names, _all_reduce(self._sums, device, dist.ReduceOp.SUM), strict=True))
        largest = _all_reduce(self._maxima, device, dist.ReduceOp.MAX)
        metrics: dict[str, float] = {}
        for name, total in sums.items():
            if name.startswith("_"):
                continue
            if name in self._weight_of:
                weight = sums[self._weight_of[name]]
                metrics[name] = total / weight if weight else 0.0
            else:
                metrics[name] = total / num_updates
        metrics.update(zip(maxima, largest, strict=True))
        metrics.update({name: sum(all_) / len(all_) for name, all_ in self._rank_equal.items()})
        metrics.update({name: float(count) for name, count in self._counts.items()})
        return metrics

    def _add_means(
        self, values: Mapping[str, torch.Tensor], weight: torch.Tensor, weight_name: str
    ) -> None:
        for name, value in values.items():
            self._add(name, (value.double() * weight).sum())
            self._weight_of[name] = weight_name
        self._add(weight_name, weight.sum(dtype=torch.float64))

    def _add(self, name: str, value: torch.Tensor) -> None:
        self._sums[name] = self._sums[name] + value if name in self._sums else value


def _all_reduce(
    values: Mapping[str, torch.Tensor], device: torch.device, op: dist.ReduceOp.RedOpType
) -> list[float]:
    if not values:
        return []
    stacked = torch.stack([value.to(device) for value in values.values()])
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(stacked, op=op)
    return stacked.tolist()
