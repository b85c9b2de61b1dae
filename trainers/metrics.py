"""Metrics of an update as sums, so that they are exact over rows, ranks and optimiser steps."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist

from trainers.quantile import global_quantile


class MetricSums:
    """Accumulates on the device; communicates once, in :meth:`reduce`."""

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}  # added up over ranks
        self._maxima: dict[str, torch.Tensor] = {}
        self._weight_of: dict[str, str] = {}  # of _sums, those that are means -> their weights' sum
        self._where_any: set[str] = set()  # of the means, those left out where there is no weight
        self._eff_sample_sizes: set[str] = set()
        self._quantiles: dict[str, tuple[float, list[torch.Tensor]]] = {}
        self._rank_equal: dict[str, list[float]] = {}
        self._counts: dict[str, int] = {}

    def add_weighted(
        self,
        values: Mapping[str, torch.Tensor],
        weight: torch.Tensor,
        group: str = "weight",
        *,
        where_any: bool = False,
    ) -> None:
        """Values a token [M], reported as means weighted by ``weight`` [M].

        Args:
            group: of values that always come together and share a weight.
            where_any: not reported where all weights are 0 (else: 0).
        """
        self._add_means(values, weight, f"_{group}")
        if where_any:
            self._where_any.update(values)

    def add_sequences(self, values: Mapping[str, torch.Tensor]) -> None:
        """Values a trained response [N], reported as means."""
        if values:
            ones = torch.ones_like(next(iter(values.values())))
            self._add_means(values, ones, "_num_sequences")

    def add_rank_sum(self, name: str, value: torch.Tensor) -> None:
        """A rank's share of a value of the whole update; reported as the mean over updates."""
        self._add(name, value.double())

    def add_difference(self, name: str, values: torch.Tensor, separator: str = "_") -> None:
        """Values a token [M], reported as ``name_mean`` and ``name_max`` over tokens."""
        means = {f"{name}{separator}mean": values}
        self._add_means(means, torch.ones_like(values), f"_{name}_tokens")
        largest = values.max().double() if len(values) else torch.zeros((), dtype=torch.float64)
        name = f"{name}{separator}max"
        self._maxima[name] = torch.maximum(self._maxima.get(name, largest), largest)

    def add_masked_share(self, name: str, weight: torch.Tensor, left: torch.Tensor) -> None:
        """Weight of tokens [K], and what is left of it [M]; reported as the share that is gone."""
        gone = weight.sum(dtype=torch.float64) - left.sum(dtype=torch.float64)
        self._add(name, gone)
        self._weight_of[name] = f"_{name}_of"
        self._add(f"_{name}_of", weight.sum(dtype=torch.float64))

    def add_quantile(self, name: str, values: torch.Tensor, q: float) -> None:
        """Values >= 0 [M], reported as their exact quantile over all ranks."""
        self._quantiles.setdefault(name, (q, []))[1].append(values.detach().float())

    def add_eff_sample_size(self, name: str, weights: torch.Tensor, measure: torch.Tensor) -> None:
        """Importance weights w [M] of samples that count ``measure`` m [M] each; reported as the
        share of them that equally weighted samples would be worth (Kish):
        ``(sum m w)^2 / (sum m * sum m w^2)``, in (0, 1].
        """
        wide, measure = weights.double(), measure.double()
        self._eff_sample_sizes.add(name)
        for part, value in enumerate((measure, measure * wide, measure * wide.square())):
            self._add(f"_{name}_{part}", value.sum())

    def add_rank_equal(self, name: str, value: float) -> None:
        """A value that is the same on all ranks; reported as the mean over updates."""
        self._rank_equal.setdefault(name, []).append(value)

    def add_count(self, name: str, count: int) -> None:
        """A count that is the same on all ranks."""
        self._counts[name] = self._counts.get(name, 0) + count

    def reduce(self, num_updates: int, device: torch.device) -> dict[str, float]:
        """The metrics, the same on all ranks. Collective."""
        maxima = list(self._maxima)
        sums = all_reduced(self._sums, device)
        largest = _all_reduce(self._maxima, device, dist.ReduceOp.MAX)
        metrics: dict[str, float] = {}
        for name, total in sums.items():
            if name.startswith("_"):
                continue
            if name in self._weight_of:
                weight = sums[self._weight_of[name]]
                if weight or name not in self._where_any:
                    metrics[name] = total / weight if weight else 0.0
            else:
                metrics[name] = total / num_updates
        for name in self._eff_sample_sizes:
            count, first, second = (sums[f"_{name}_{part}"] for part in range(3))
            metrics[name] = first**2 / (count * second) if second else 0.0
        metrics.update(zip(maxima, largest, strict=True))
        for name, (q, values) in self._quantiles.items():
            metrics[name] = global_quantile(torch.cat(values), q)
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


def all_reduced(values: Mapping[str, torch.Tensor], device: torch.device) -> dict[str, float]:
    """Scalars added up over ranks. Collective."""
    return dict(zip(values, _all_reduce(values, device, dist.ReduceOp.SUM), strict=True))


def _all_reduce(
    values: Mapping[str, torch.Tensor], device: torch.device, op: dist.ReduceOp.RedOpType
) -> list[float]:
    if not values:
        return []
    stacked = torch.stack([value.to(device) for value in values.values()])
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(stacked, op=op)
    return stacked.tolist()
