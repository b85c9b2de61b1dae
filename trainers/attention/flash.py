"""Attention over a packed row in which no token is shared, by flash-attn's varlen kernel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from trainers.attention.variant import Variant
from treepo.base.flash_varlen import Varlen, load_varlen


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SequenceEnds:
    """Where the row's sequences end.

    Attributes:
        ends: int32 [B + 1], from 0.
        longest: tokens of the longest.
    """

    ends: torch.Tensor
    longest: int

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> SequenceEnds:
        ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        return cls(ends=ends.to(device), longest=max(lengths))


def varlen_attention(
    query: torch.Tensor,  # [1, H, T, D]
    key: torch.Tensor,  # [1, Hkv, T, D]
    value: torch.Tensor,  # [1, Hkv, T, D]
    sequences: SequenceEnds,
    variant: Variant,
    varlen: Varlen | None = None,
) -> torch.Tensor:
    """[1, T, H, D]. Windows and soft caps are the kernel's own; there are no sinks.

    Args:
        varlen: None: flash-attn's kernel.
    """
    assert variant.sinks is None, "the kernel's log-sums carry no gradient"
    window = variant.window
    output: torch.Tensor = (varlen or load_varlen())(
        *(states[0].transpose(0, 1) for states in (query, key, value)),
        sequences.ends,
        sequences.ends,
        sequences.longest,
        sequences.longest,
        softmax_scale=variant.scaling,
        causal=True,
        window_size=(-1, -1) if window is None else (window - 1, 0),
        softcap=variant.softcap or 0.0,
    )
    return output.unsqueeze(0)
