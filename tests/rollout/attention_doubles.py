"""Stand-ins for what is absent: flash-attn's varlen kernel in plain operations, as its
documentation describes it, and libraries that seem installed.
"""

from __future__ import annotations

import importlib.util
from types import ModuleType

import pytest
import torch


def documented_varlen(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    block_table=None,
):
    """What flash_attn_varlen_func's documentation says, in plain operations."""
    assert dropout_p == 0.0 and q.shape[-1] == k.shape[-1] == v.shape[-1]
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    lengths_q, lengths_k = cu_seqlens_q.diff(), cu_seqlens_k.diff()
    assert max_seqlen_q == lengths_q.max() and max_seqlen_k == lengths_k.max()
    assert cu_seqlens_q[-1] == len(q) and cu_seqlens_k[-1] == len(k)
    groups = q.shape[1] // k.shape[1]
    outputs, lses = [], []
    for i in range(len(lengths_q)):
        rows = q[cu_seqlens_q[i] : cu_seqlens_q[i + 1]]
        keys = k[cu_seqlens_k[i] : cu_seqlens_k[i + 1]].repeat_interleave(groups, dim=1)
        values = v[cu_seqlens_k[i] : cu_seqlens_k[i + 1]].repeat_interleave(groups, dim=1)
        scores = torch.einsum("nhd,shd->hns", rows, keys) * softmax_scale
        if softcap > 0:
            scores = softcap * torch.tanh(scores / softcap)
        aligned = torch.arange(len(rows)).unsqueeze(1) + len(keys) - len(rows)
        columns = torch.arange(len(keys))
        left, right = window_size
        hidden = torch.zeros(len(rows), len(keys), dtype=torch.bool)
        if causal or right >= 0:
            hidden |= columns > aligned + max(right, 0)
        if left >= 0:
            hidden |= columns < aligned - left
        scores = scores.masked_fill(hidden, float("-inf"))
        outputs.append(torch.einsum("hns,shd->nhd", torch.softmax(scores, -1), values))
        lses.append(torch.logsumexp(scores, -1))
    if not return_attn_probs:
        return torch.cat(outputs)
    return torch.cat(outputs), torch.cat(lses, dim=1), None


def seem_installed(monkeypatch: pytest.MonkeyPatch, choose: ModuleType, *names: str) -> None:
    """Let ``choose.find_spec`` say that of triton and flash-attn just ``names`` are installed."""
    real = importlib.util.find_spec
    seems = {name: name in names for name in ("triton", "flash_attn")}
    monkeypatch.setattr(
        choose, "find_spec", lambda name: seems[name] or None if name in seems else real(name)
    )
