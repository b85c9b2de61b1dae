"""What distinguishes one layer's attention from another's."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Variant:
    """Attention of one layer.

    Attributes:
        scaling: scores are the inner products times this.
        window: a query sees keys less than so many tokens before it; None: all.
        softcap: scores become ``softcap * tanh(score / softcap)``; None: they stay.
        sinks: [H], one more score a head that takes probability and has no value.
    """

    scaling: float
    window: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None
