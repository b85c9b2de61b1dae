"""Attention over a packed row by batched rectangles with masks: any layer, any device.

The row falls into *chains*: maximal runs in which every token is the parent of the next (one chain
a leaf). All tokens of a chain see the chain's ancestors and the chain itself up to themselves: the
keys of a chain are a path of its tree, and on a path the mask is plain causal. So a chain is one
small rectangle of queries by path tokens; nothing invisible is computed but the triangle inside.
Long chains are cut, rectangles of about equal size are padded and run as one batched call of
``scaled_dot_product_attention``, and the index plan is made once a row for all layers.

It serves windows, soft caps, sinks, values of another size than keys, and devices other than the
CPU; ``nodes`` is faster where it applies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from trainers.attention.variant import Variant

_QUERIES_A_PIECE = 256  # chains are cut to this many queries: halves the causal triangle's waste
_PAIRS_A_CALL = 1 << 22  # query-key pairs of one call: bounds the memory of its mask and gathers
_PAIRS_A_CALL_COSTS = 1 << 15  # padding up to this many pairs is cheaper than one more call
# Rows of more pairs than this don't keep masks and gathered keys for the backward pass: there they
# are made again, a call at a time.
_PAIRS_KEPT = 1 << 24


@dataclass(frozen=True, slots=True)
class _Piece:
    """Part of a chain: its queries and the path tokens they may see, all indices in the row."""

    queries: np.ndarray  # [Q]
    keys: np.ndarray  # [K], in path order; the last Q are the queries themselves


@dataclass(frozen=True, slots=True, eq=False)
class _Rectangles:
    """B padded pieces of one call."""

    queries: torch.Tensor  # int64 [B, Q]
    keys: torch.Tensor  # int64 [B, K]
    query_at: torch.Tensor  # int64 [B, Q], the query's own place among the keys; -1 in padding
    window: int | None
    query_position: torch.Tensor  # int64 [B, Q]
    key_position: torch.Tensor  # int64 [B, K]

    @property
    def num_pairs(self) -> int:
        return self.queries.numel() * self.keys.shape[1]

    def visible(self) -> torch.Tensor:
        """bool [B, Q, K]; padded queries see the first key, so that no softmax is empty."""
        place = torch.arange(self.keys.shape[1], device=self.keys.device)
        visible = place <= self.query_at.clamp(min=0)[:, :, None]
        if self.window is not None:
            near = self.query_position[:, :, None] - self.key_position[:, None, :] < self.window
            visible &= near | (self.query_at < 0)[:, :, None]
        return visible

    def bias(self, dtype: torch.dtype, groups: int) -> torch.Tensor:
        """Additive mask [B, 1, groups * Q, K]."""
        visible = self.visible()
        bias = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
        return bias.masked_fill_(~visible, float("-inf")).repeat(1, groups, 1).unsqueeze(1)


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """All calls of a layer, and where each token's output is in their concatenated rows."""

    calls: tuple[_Rectangles, ...]
    output_row: torch.Tensor  # int64 [T]

    @property
    def is_kept(self) -> bool:
        return sum(call.num_pairs for call in self.calls) <= _PAIRS_KEPT


class ChainPlans:
    """The calls of a row by window, and their masks, made once for all layers."""

    def __init__(
        self, visible_until: np.ndarray, positions: np.ndarray, device: torch.device
    ) -> None:
        self._visible_until = visible_until
        self._positions = positions
        self._device = device
        self._plans: dict[int | None, Plan] = {}
        self._biases: dict[tuple[int | None, torch.dtype, int], list[torch.Tensor]] = {}

    def plan(self, window: int | None) -> Plan:
        """The calls of a layer with this window (in tokens; None: sees everything before it)."""
        if window not in self._plans:
            self._plans[window] = _make_plan(
                self._visible_until, self._positions, window, self._device
            )
        return self._plans[window]

    def kept_biases(
        self, window: int | None, dtype: torch.dtype, groups: int
    ) -> list[torch.Tensor]:
        """Additive masks of the plan's calls, made once for all layers."""
        key = (window, dtype, groups)
        if key not in self._biases:
            self._biases[key] = [call.bias(dtype, groups) for call in self.plan(window).calls]
        return self._biases[key]


def chain_attention(
    query: torch.Tensor,  # [1, H, T, D]
    key: torch.Tensor,  # [1, Hkv, T, D]
    value: torch.Tensor,  # [1, Hkv, T, Dv]
    plans: ChainPlans,
    variant: Variant,
) -> torch.Tensor:
    """[1, T, H, Dv]."""
    num_tokens, value_dim = query.shape[2], value.shape[3]
    groups = query.shape[1] // key.shape[1]
    plan = plans.plan(variant.window)

    def rows(states: torch.Tensor) -> torch.Tensor:  # [1, h, T, d] -> [T, h * d]
        return states[0].transpose(0, 1).reshape(num_tokens, -1)

    def run(
        call: _Rectangles,
        bias: torch.Tensor | None,
        query_rows: torch.Tensor,
        key_rows: torch.Tensor,
        value_rows: torch.Tensor,
    ) -> torch.Tensor:
        # F.embedding is a row gather whose backward adds rows fast on CPU (index_add does not).
        # Query heads that share a key head are stacked as more queries of it.
        q = F.embedding(call.queries, query_rows).unflatten(-1, (-1, groups, query.shape[3]))
        k = F.embedding(call.keys, key_rows).unflatten(-1, (-1, key.shape[3])).transpose(1, 2)
        v = F.embedding(call.keys, value_rows).unflatten(-1, (-1, value_dim)).transpose(1, 2)
        q = q.permute(0, 2, 3, 1, 4).flatten(2, 3)  # [B, Hkv, groups * Q, D]
        mask = call.bias(query.dtype, groups) if bias is None else bias
        out = _attend(q, k, v, mask, variant)
        out = out.unflatten(2, (groups, -1)).permute(0, 3, 1, 2, 4)
        return out.reshape(call.queries.numel(), -1)

    states = (rows(query), rows(key), rows(value))
    if plan.is_kept:
        biases = plans.kept_biases(variant.window, query.dtype, groups)
        outputs = [run(*each, *states) for each in zip(plan.calls, biases, strict=True)]
    elif torch.is_grad_enabled():
        outputs = [
            checkpoint(run, call, None, *states, use_reentrant=False, preserve_rng_state=False)
            for call in plan.calls
        ]
    else:
        outputs = [run(call, None, *states) for call in plan.calls]
    joined = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    output = F.embedding(plan.output_row, joined)
    return output.view(1, num_tokens, -1, value_dim)


def _attend(
    query: torch.Tensor,  # [B, Hkv, groups * Q, D]
    key: torch.Tensor,  # [B, Hkv, K, D]
    value: torch.Tensor,  # [B, Hkv, K, Dv]
    bias: torch.Tensor,  # [B, 1, groups * Q, K]
    variant: Variant,
) -> torch.Tensor:
    """[B, Hkv, groups * Q, Dv]."""
    scaling, softcap, sinks = variant.scaling, variant.softcap, variant.sinks
    if softcap is None and sinks is None:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scaling)
    scores = query @ key.transpose(2, 3) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores + bias
    dtype = torch.float32 if query.dtype in (torch.bfloat16, torch.float16) else query.dtype
    if sinks is None:
        return scores.softmax(-1, dtype=dtype).to(value.dtype) @ value
    # A sink is one more score a head, which takes probability and has no value.
    num_kv_heads, num_rows = query.shape[1:3]
    queries_a_head = num_rows * num_kv_heads // sinks.numel()
    sink = sinks.to(scores.dtype).view(num_kv_heads, -1).repeat_interleave(queries_a_head, dim=1)
    sink = sink[None, :, :, None].expand(len(scores), -1, -1, -1)
    probs = torch.cat([scores, sink], dim=-1).softmax(-1, dtype=dtype)[..., :-1]
    return probs.to(value.dtype) @ value


def _make_plan(
    visible_until: np.ndarray, positions: np.ndarray, window: int | None, device: torch.device
) -> Plan:
    pieces = _cut_into_pieces(visible_until, positions, window)
    calls, output_row, used = [], np.empty(len(visible_until), np.int64), 0
    for group in _group(pieces):
        num_queries = max(len(piece.queries) for piece in group)
        num_keys = max(len(piece.keys) for piece in group)
        queries = np.zeros((len(group), num_queries), np.int64)
        keys = np.zeros((len(group), num_keys), np.int64)
        query_at = np.full((len(group), num_queries), -1)
        query_position = np.zeros((len(group), num_queries), np.int64)
        key_position = np.zeros((len(group), num_keys), np.int64)
        for row, piece in enumerate(group):
            count, total = len(piece.queries), len(piece.keys)
            queries[row, :count] = piece.queries
            keys[row, :total] = piece.keys
            query_at[row, :count] = np.arange(total - count, total)
            query_position[row, :count] = positions[piece.queries]
            key_position[row, :total] = positions[piece.keys]
            output_row[piece.queries] = used + np.arange(count)
            used += num_queries
        calls.append(
            _Rectangles(
                queries=torch.from_numpy(queries).to(device),
                keys=torch.from_numpy(keys).to(device),
                query_at=torch.from_numpy(query_at).to(device),
                window=window,
                query_position=torch.from_numpy(query_position).to(device),
                key_position=torch.from_numpy(key_position).to(device),
            )
        )
    return Plan(tuple(calls), torch.from_numpy(output_row).to(device))


def _cut_into_pieces(
    visible_until: np.ndarray, positions: np.ndarray, window: int | None
) -> list[_Piece]:
    """The row's chains, cut to at most ``_QUERIES_A_PIECE`` queries, with the keys they can see."""
    num_tokens = len(visible_until)
    index = np.arange(num_tokens)
    reach = np.maximum.accumulate(visible_until)
    is_root = np.concatenate([[True], reach[:-1] <= index[1:]])
    is_start = np.concatenate([[True], visible_until[:-1] <= index[1:]])
    root_of = np.maximum.accumulate(np.where(is_root, index, 0))
    starts = np.flatnonzero(is_start)
    ends = np.append(starts[1:], num_tokens)
    pieces = []
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        root = int(root_of[start])
        ancestors = root + np.flatnonzero(visible_until[root:start] > start)
        for first in range(start, end, _QUERIES_A_PIECE):
            last = min(first + _QUERIES_A_PIECE, end)
            keys = np.concatenate([ancestors, index[start:last]])
            if window is not None:
                keys = keys[positions[keys] > positions[first] - window]
            pieces.append(_Piece(index[first:last], keys))
    return pieces


def _group(pieces: Sequence[_Piece]) -> list[list[_Piece]]:
    """Pieces that run in one call: neighbours by size, while padding costs less than a call."""
    ordered = sorted(pieces, key=lambda piece: (-len(piece.keys), -len(piece.queries)))
    groups: list[list[_Piece]] = []
    num_queries = num_keys = useful = 0
    for piece in ordered:
        own = len(piece.queries) * len(piece.keys)
        if groups:
            queries = max(num_queries, len(piece.queries))
            pairs = (len(groups[-1]) + 1) * queries * num_keys
            waste = pairs - useful - own
            if pairs <= _PAIRS_A_CALL and waste <= max(_PAIRS_A_CALL_COSTS, (useful + own) // 8):
                groups[-1].append(piece)
                num_queries, useful = queries, useful + own
                continue
        groups.append([piece])
        num_queries, num_keys, useful = len(piece.queries), len(piece.keys), own
    return groups
