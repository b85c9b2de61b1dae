"""How many rows make a row's result independent of its company."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers.pytorch_utils import Conv1D

from rollout.fused_layers import fused_layers
from rollout.linear import Fp32Head, PackedLinear

_Product = Callable[[torch.Tensor], torch.Tensor]
_MOST_ROWS = 40  # any remainder a kernel may treat apart, and full blocks
_MOST_COLUMNS = 4096  # of the layers it tries


@dataclass(frozen=True, slots=True)
class RowRule:
    """Row counts at which a row's result does not depend on how many rows there are: multiples of
    ``multiple`` from ``least`` on.
    """

    least: int
    multiple: int

    def padding(self, num_rows: int) -> int:
        """Rows to add to ``num_rows`` >= 1."""
        return max(self.least - num_rows, -num_rows % self.multiple)


_RULES = [RowRule(1, 1), RowRule(2, 1), RowRule(4, 1), RowRule(2, 2), RowRule(4, 4), RowRule(8, 8)]
_TRIED_ROWS = (*range(1, 13), 16, 17, 24, 31)


def row_rule(model: torch.nn.Module) -> RowRule:
    """The cheapest rule that the model's linear layers obey on this machine, found by trying one
    layer of each shape with random rows. (Experts of a mixture see what rows the router sends them:
    no rule helps there.)
    """
    generator = torch.Generator().manual_seed(0)
    unequal: set[int] = set()  # row counts that give other rows
    for product, weight, width in _products(model):
        rows = torch.randn(_MOST_ROWS, width, generator=generator)
        rows = rows.to(weight.device, weight.dtype)
        with torch.inference_mode():
            expected = product(rows)
            counts = [n for n in _TRIED_ROWS if n not in unequal]
            unequal |= {n for n in counts if not torch.equal(product(rows[:n]), expected[:n])}
    return next((r for r in _RULES if all(r.padding(n) for n in unequal)), _RULES[-1])


def _products(model: torch.nn.Module) -> Iterator[tuple[_Product, torch.Tensor, int]]:
    """One of each shape: what it does to rows, a weight of it, the number of its inputs."""
    fused = fused_layers(model)
    by_shape = {tuple(linear.weight.shape for linear in f.linear_layers()): f for f in fused}
    for layer in by_shape.values():
        weight = next(layer.linear_layers()).weight
        yield layer.through, weight, weight.shape[1]
    inside = {id(linear) for f in fused for linear in f.linear_layers()}
    alone: dict[tuple[Any, ...], torch.nn.Linear | Conv1D] = {}
    for module in model.modules():
        if isinstance(module, torch.nn.Linear | Conv1D) and id(module) not in inside:
            alone.setdefault((type(module), *module.weight.shape), module)
    for linear in alone.values():
        product, width = _narrow(linear)
        yield product, linear.weight, width


def _narrow(
    layer: torch.nn.Linear | Conv1D,
) -> tuple[_Product, int]:
    """The layer's product, with so few outputs that it is quick, and the number of its inputs."""
    weight = layer.weight.detach()
    if isinstance(layer, Conv1D):
        columns = weight[:, :_MOST_COLUMNS].contiguous()
        bias = columns.new_zeros(columns.shape[1])
        return lambda rows: torch.addmm(bias, rows, columns), weight.shape[0]
    weight = weight[:_MOST_COLUMNS]
    if not isinstance(layer, PackedLinear | Fp32Head):
        return lambda rows: F.linear(rows, weight), weight.shape[1]
    small = type(layer)(1, 1, bias=False, device="meta")  # draws nothing
    small.weight = torch.nn.Parameter(weight, requires_grad=False)
    return small, weight.shape[1]
