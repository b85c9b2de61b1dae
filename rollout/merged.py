"""Pieces of a fused decoder layer: several linear layers as one product, a norm in few passes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from rollout.linear import pack, packed_product, packing_pays

_LEAST_PACKED_ALONE = 1 << 19  # weights: with a single row, torch's own path is faster below


@dataclass(frozen=True, slots=True)
class MergedProduct:
    """One or several linear layers on the same rows.

    Attributes:
        weight, bias: of all of them, one below the other; the weight packed if ``is_packed``.
        alone: (weight, bias) of each, if a single row takes those.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    is_packed: bool
    alone: list[tuple[torch.Tensor, torch.Tensor | None]] | None

    @classmethod
    def of(cls, *layers: torch.nn.Linear) -> MergedProduct:
        weights = [layer.weight.detach() for layer in layers]
        weight = torch.cat(weights) if len(weights) > 1 else weights[0]
        bias = None
        if any(layer.bias is not None for layer in layers):
            pairs = [(layer.bias, layer.out_features) for layer in layers]
            bias = torch.cat([weight.new_zeros(n) if b is None else b.detach() for b, n in pairs])
        is_packed = packing_pays(weight)
        is_small = weight.dtype == torch.float32 and weight.numel() < _LEAST_PACKED_ALONE
        alone: list[tuple[torch.Tensor, torch.Tensor | None]] | None = None
        if is_packed and is_small:
            alone = [(layer.weight.detach(), layer.bias) for layer in layers]
        return cls(
            weight=pack(weight) if is_packed else weight,
            bias=bias,
            is_packed=is_packed,
            alone=alone,
        )

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """[N, inputs], contiguous, to [N, outputs of all]."""
        if not self.is_packed:
            return F.linear(rows, self.weight, self.bias)
        if self.alone is None or len(rows) > 1:
            return packed_product(rows, self.weight, self.bias)
        parts = [F.linear(rows, weight, bias) for weight, bias in self.alone]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


class RMSNorm:
    """weight * x / sqrt(mean(x^2) + eps) over the last axis.

    In four passes: |x|, then hypot(|x|, sqrt(eps * width)), and the factor sqrt(width) is in the
    weight. The division may wait until after a rotation, which keeps lengths. In float16 the
    product before the division could overflow.
    """

    def __init__(self, weight: torch.Tensor, eps: float) -> None:
        width = weight.shape[-1]
        self._shape, self._eps = (width,), eps
        self._waits = weight.dtype != torch.float16
        self._weight = weight.detach() * (math.sqrt(width) if self._waits else 1.0)
        self._floor = torch.tensor(math.sqrt(width * eps))

    def scaled(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What is to be divided, and by what."""
        if not self._waits:
            return F.rms_norm(x, self._shape, None, self._eps).mul_(self._weight), None
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        return x * self._weight, length.hypot_(self._floor)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        scaled, length = self.scaled(x)
        return scaled if length is None else scaled.div_(length)
