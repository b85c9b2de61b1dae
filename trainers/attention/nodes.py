"""Attention over a packed row without masks, gathers or padding, on a CPU.

Tokens stand in depth-first preorder, so the descendants of a token are one interval of the row. Two
kinds of calls of the fused kernel, on plain slices of the row, hold every visible pair once:

- a *chain* (a maximal run in which every token is the parent of the next) by itself: causal;
- a stretch of a chain by the descendants that branch off below it: a full rectangle.

Their partial results merge by log-sum-exp (``L = logaddexp(L1, L2)``, ``O = O1 + (O2 - O1)
exp(L2 - L)``). Given the merged output and ``L``, the kernel's backward gives each call's exact
share of the gradient, as in FlashAttention (arXiv 2205.14135, section B.4) and ring attention
(arXiv 2310.01889): with ``P = exp(S - L)`` and ``delta = rowsum(dO * O)``, ``dS = P (dO V^T -
delta)``, and both L and delta are those of the whole row. Kept for it are query, key, value, output
and L: nothing that grows with the number of pairs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.autograd.function import once_differentiable

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

# A merge costs about as much as so many more keys; rows in which tokens merge more often on average
# than this (many short nodes, far below each other) are left to batched rectangles.
_MERGES_A_TOKEN = 24


@dataclass(frozen=True, slots=True)
class Call:
    """Queries [query_start, query_end) by keys [key_start, key_end) of the row; ``causal``: the two
    intervals are the same, otherwise all see all.
    """

    query_start: int
    query_end: int
    key_start: int
    key_end: int
    causal: bool

    @property
    def num_pairs(self) -> int:
        """Query-key pairs that are visible, which are all that count as work."""
        rows, keys = self.query_end - self.query_start, self.key_end - self.key_start
        return rows * (rows + 1) // 2 if self.causal else rows * keys


@dataclass(frozen=True, slots=True)
class NodePlan:
    """All calls of a layer, the causal ones first: these hold each query exactly once."""

    calls: tuple[Call, ...]
    num_tokens: int

    @property
    def num_pairs(self) -> int:
        return sum(call.num_pairs for call in self.calls)

    @property
    def is_worthwhile(self) -> bool:
        """Whether merging costs little beside the products."""
        merged = sum(call.query_end - call.query_start for call in self.calls if not call.causal)
        return merged <= _MERGES_A_TOKEN * self.num_tokens


def make_plan(visible_until: np.ndarray) -> NodePlan:
    """The calls of a row (int64 [T])."""
    num_tokens = len(visible_until)
    index = np.arange(1, num_tokens)
    starts = np.append(0, index[visible_until[:-1] <= index])
    ends = np.append(starts[1:], num_tokens)
    causal, rectangles = [], []
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        causal.append(Call(start, end, start, end, True))
        # Along a chain, visible_until falls. Those that a stretch [start, key_end) is the most of
        # the chain to see are the descendants behind the ones that see more.
        until = visible_until[start:end]
        last_of_stretch = np.flatnonzero(np.append(until[1:] != until[:-1], True))
        above = end
        for last in last_of_stretch[::-1].tolist():
            if until[last] > above:
                rectangles.append(Call(above, int(until[last]), start, start + last + 1, False))
                above = int(until[last])
    return NodePlan((*causal, *rectangles), num_tokens)


def node_attention(
    query: torch.Tensor,  # [1, H, T, D]
    key: torch.Tensor,  # [1, Hkv, T, D]
    value: torch.Tensor,  # [1, Hkv, T, D]
    plan: NodePlan,
    scaling: float,
) -> torch.Tensor:
    """[1, T, H, D]."""
    output: torch.Tensor = _NodeAttention.apply(query, key, value, plan, scaling)
    return output


class _NodeAttention(torch.autograd.Function):
    """In the kernel's terms the batch is the key heads and the heads are the query heads of one:
    keys are shared by these with stride 0, not copied. All tensors are views, token-major.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        plan: NodePlan,
        scaling: float,
    ) -> torch.Tensor:
        q, k, v = _views(query, key, value)
        num_heads, num_tokens, dim = query.shape[1:]
        wide = torch.promote_types(query.dtype, torch.float32)
        rows = torch.empty(num_tokens, num_heads, dim, dtype=wide)
        out = _heads_first(rows, key.shape[1])
        lse = torch.empty(*out.shape[:3], dtype=wide)
        for call, queries, keys in _slices(plan):
            part, part_lse = _forward(
                q[:, :, queries], k[:, :, keys], v[:, :, keys], 0.0, call.causal, scale=scaling
            )
            if call.causal:
                out[:, :, queries] = part
                lse[:, :, queries] = part_lse
                continue
            merged = torch.logaddexp(lse[:, :, queries], part_lse)
            out[:, :, queries].lerp_(part.to(wide), (part_lse - merged).exp_().unsqueeze(-1))
            lse[:, :, queries] = merged
        output = rows.to(query.dtype)
        ctx.save_for_backward(query, key, value, output, lse)
        ctx.plan, ctx.scaling = plan, scaling
        return output.unsqueeze(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, output, lse = ctx.saved_tensors
        q, k, v = _views(query, key, value)
        out, grad_out = (_heads_first(rows, key.shape[1]) for rows in (output, grad[0]))
        grad_q, grad_k, grad_v = (
            torch.empty(states.shape[2], *states.shape[1::2], dtype=lse.dtype)
            for states in (query, key, value)
        )  # token-major: [T, h, D]
        grad_q_heads = _heads_first(grad_q, key.shape[1])
        for call, queries, keys in _slices(ctx.plan):
            part_q, part_k, part_v = _backward(
                grad_out[:, :, queries],
                q[:, :, queries],
                k[:, :, keys],
                v[:, :, keys],
                out[:, :, queries],
                lse[:, :, queries],
                0.0,
                call.causal,
                scale=ctx.scaling,
            )
            # Query heads that share a key head add up. Causal calls come first and hold each token.
            part_k, part_v = (part.sum(1).transpose(0, 1) for part in (part_k, part_v))
            if call.causal:
                grad_q_heads[:, :, queries] = part_q
                grad_k[keys], grad_v[keys] = part_k, part_v
            else:
                grad_q_heads[:, :, queries] += part_q
                grad_k[keys] += part_k
                grad_v[keys] += part_v
        states = (
            grad.to(query.dtype).transpose(0, 1).unsqueeze(0) for grad in (grad_q, grad_k, grad_v)
        )
        return (*states, None, None)


def _views(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[Hkv, groups, T, D] of each."""
    num_kv_heads = key.shape[1]
    groups = query.shape[1] // num_kv_heads
    return (
        query[0].unflatten(0, (num_kv_heads, groups)),
        key[0].unsqueeze(1).expand(-1, groups, -1, -1),
        value[0].unsqueeze(1).expand(-1, groups, -1, -1),
    )


def _heads_first(rows: torch.Tensor, num_kv_heads: int) -> torch.Tensor:
    """[T, H, D] as [Hkv, groups, T, D]."""
    return rows.unflatten(1, (num_kv_heads, -1)).permute(1, 2, 0, 3)


def _slices(plan: NodePlan) -> Iterator[tuple[Call, slice, slice]]:
    for call in plan.calls:
        yield call, slice(call.query_start, call.query_end), slice(call.key_start, call.key_end)
