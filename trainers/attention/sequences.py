"""Attention over a packed row in which no token is shared: plain causal attention a sequence.

Neighbours of equal length are one call, on views of the row. It is what the same sequences would
cost as a batch without padding.
"""

from __future__ import annotations

import itertools

import numpy as np
import torch
import torch.nn.functional as F


def sequence_lengths(visible_until: np.ndarray) -> list[int] | None:
    """Of the sequences of a row (int64 [T]); None if tokens of it are shared. A padding token is a
    sequence of one.
    """
    last = np.flatnonzero(visible_until == np.arange(1, len(visible_until) + 1))
    lengths = np.diff(last, prepend=-1)
    plain = np.array_equal(np.repeat(last + 1, lengths), visible_until)
    return lengths.tolist() if plain else None


def sequence_attention(
    query: torch.Tensor,  # [1, H, T, D]
    key: torch.Tensor,  # [1, Hkv, T, D]
    value: torch.Tensor,  # [1, Hkv, T, Dv]
    lengths: list[int],
    scaling: float,
) -> torch.Tensor:
    """[1, T, H, Dv]."""
    runs = [(length, len(list(same))) for length, same in itertools.groupby(lengths)]
    sizes = [length * count for length, count in runs]
    outputs = []
    for (length, count), *states in zip(
        runs, *(s[0].transpose(0, 1).split(sizes) for s in (query, key, value)), strict=True
    ):
        q, k, v = (rows.unflatten(0, (count, length)).transpose(1, 2) for rows in states)
        out = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
        )
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs)).unsqueeze(0)
