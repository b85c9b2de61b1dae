"""Training attention over a packed row of token trees, without a mask over the whole row.

The row's tokens stand in depth-first preorder, so each is seen by one interval of queries
(``k <= q < visible_until[k]``). The row falls into *chains*: maximal runs in which every token is
the parent of the next (one chain a leaf). All tokens of a chain see the chain's ancestors and the
chain itself up to themselves: the keys of a chain are a path of its tree, and on a path the mask is
plain causal. So a chain is one small rectangle of queries by path tokens; nothing invisible is
computed but the triangle inside. Long chains are cut, rectangles of about equal size are padded and
run as one batched call of ``scaled_dot_product_attention``, and the index plan is made once a row
for all layers.

The function is registered with transformers under the name ``packed_tree`` and receives the row as
the keyword ``packed_tree`` of the model's forward. It is plain torch and runs on any device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface

NAME = "packed_tree"

_QUERIES_A_PIECE = 256  # chains are cut to this many queries: halves the causal triangle's waste
_PAIRS_A_CALL = 1 << 22  # query-key pairs of one call: bounds the memory of masks and gathers
_PAIRS_A_CALL_COSTS = 1 << 15  # padding up to this many pairs is cheaper than one more call


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
    visible: torch.Tensor  # bool [B, Q, K]; padded queries see the first key


@dataclass(frozen=True, slots=True, eq=False)
class _Plan:
    """All calls of a layer, and where each token's output is in their concatenated rows."""

    calls: tuple[_Rectangles, ...]
    output_row: torch.Tensor  # int64 [T]


@dataclass(slots=True, eq=False)
class PackedTreeContext:
    """What attention needs to know of one row; made once a forward, shared by all layers."""

    visible_until: torch.Tensor  # int64 [T]
    position_ids: torch.Tensor  # int64 [T]
    device: torch.device
    _plans: dict[int | None, _Plan] = field(default_factory=dict)
    _biases: dict[tuple[int | None, torch.dtype], list[torch.Tensor]] = field(default_factory=dict)

    def plan(self, window: int | None) -> _Plan:
        if window not in self._plans:
            self._plans[window] = _make_plan(
                self.visible_until.cpu().numpy(),
                self.position_ids.cpu().numpy(),
                window,
                self.device,
            )
        return self._plans[window]

    def biases(self, window: int | None, dtype: torch.dtype) -> list[torch.Tensor]:
        """Additive masks of the plan's calls, [B, 1, Q, K] in the query's dtype."""
        if (window, dtype) not in self._biases:
            self._biases[window, dtype] = [
                torch.zeros(call.visible.shape, dtype=dtype, device=self.device)
                .masked_fill_(~call.visible, float("-inf"))
                .unsqueeze(1)
                for call in self.plan(window).calls
            ]
        return self._biases[window, dtype]


def register() -> None:
    """Make ``attn_implementation="packed_tree"`` known to transformers."""
    AttentionInterface.register(NAME, packed_tree_attention)
    AttentionMaskInterface.register(NAME, _no_mask)


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """Transformers' mask hook: the row's own structure is the mask."""
    return None


def packed_tree_attention(
    module: torch.nn.Module,
    query: torch.Tensor,  # [1, H, T, D]
    key: torch.Tensor,  # [1, Hkv, T, D]
    value: torch.Tensor,  # [1, Hkv, T, Dv]
    attention_mask: torch.Tensor | None,
    *,
    packed_tree: PackedTreeContext | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of every token to its ancestors and itself (within the layer's window).

    Returns:
        The output [1, T, H, Dv] and no attention weights.
    """
    if packed_tree is None:
        raise ValueError(
            "attention 'packed_tree' needs the row: call the model with packed_tree=context(batch)"
        )
    if position_bias is not None or attention_mask is not None:
        raise ValueError(
            f"{type(module).__name__} adds a position bias or a mask of its own to attention "
            "scores, which training on token trees doesn't support; choose another model"
        )
    assert dropout == 0.0, "attention dropout must be switched off"
    assert query.shape[0] == 1, f"one packed row at a time, got a batch of {query.shape[0]}"
    num_heads, num_tokens, head_dim = query.shape[1:]
    num_kv_heads, value_dim = value.shape[1], value.shape[3]
    plan = packed_tree.plan(sliding_window)
    biases = packed_tree.biases(sliding_window, query.dtype)

    def rows(states: torch.Tensor) -> torch.Tensor:  # [1, h, T, d] -> [T, h * d]
        return states[0].transpose(0, 1).reshape(num_tokens, -1)

    query_rows, key_rows, value_rows = rows(query), rows(key), rows(value)
    outputs = []
    for call, bias in zip(plan.calls, biases, strict=True):
        # F.embedding is a row gather whose backward adds rows fast on CPU (index_add does not).
        q = F.embedding(call.queries, query_rows).unflatten(-1, (num_heads, head_dim))
        k = F.embedding(call.keys, key_rows).unflatten(-1, (num_kv_heads, head_dim))
        v = F.embedding(call.keys, value_rows).unflatten(-1, (num_kv_heads, value_dim))
        out = _attend(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), bias, scaling, softcap, s_aux
        )
        outputs.append(out.transpose(1, 2).reshape(-1, num_heads * value_dim))
    joined = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    output = F.embedding(plan.output_row, joined)
    return output.view(1, num_tokens, num_heads, value_dim), None


def _attend(
    query: torch.Tensor,  # [B, H, Q, D]
    key: torch.Tensor,  # [B, Hkv, K, D]
    value: torch.Tensor,  # [B, Hkv, K, Dv]
    bias: torch.Tensor,  # [B, 1, Q, K]
    scaling: float | None,
    softcap: float | None,
    sinks: torch.Tensor | None,  # [H]
) -> torch.Tensor:
    """[B, H, Q, Dv]."""
    if softcap is None and sinks is None:
        grouped = query.shape[1] != key.shape[1]
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=bias, scale=scaling, enable_gqa=grouped
        )
    groups = query.shape[1] // key.shape[1]
    key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))
    scores = query @ key.transpose(2, 3) * (scaling or query.shape[-1] ** -0.5)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores + bias
    dtype = torch.float32 if query.dtype in (torch.bfloat16, torch.float16) else query.dtype
    if sinks is None:
        return scores.softmax(-1, dtype=dtype).to(value.dtype) @ value
    # A sink is one more score a head, which takes probability and has no value.
    sink = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
    probs = torch.cat([scores, sink], dim=-1).softmax(-1, dtype=dtype)[..., :-1]
    return probs.to(value.dtype) @ value


def _make_plan(
    visible_until: np.ndarray, positions: np.ndarray, window: int | None, device: torch.device
) -> _Plan:
    pieces = _cut_into_pieces(visible_until, positions, window)
    calls, output_row, used = [], np.empty(len(visible_until), np.int64), 0
    for group in _group(pieces):
        num_queries = max(len(piece.queries) for piece in group)
        num_keys = max(len(piece.keys) for piece in group)
        queries = np.zeros((len(group), num_queries), np.int64)
        keys = np.zeros((len(group), num_keys), np.int64)
        query_at = np.full((len(group), num_queries), -1)  # index of the query on its path
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
        visible = np.arange(num_keys) <= query_at[:, :, None]
        if window is not None:
            visible &= query_position[:, :, None] - key_position[:, None, :] < window
        visible[:, :, 0] |= query_at < 0
        calls.append(
            _Rectangles(
                torch.from_numpy(queries).to(device),
                torch.from_numpy(keys).to(device),
                torch.from_numpy(visible).to(device),
            )
        )
    return _Plan(tuple(calls), torch.from_numpy(output_row).to(device))


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
            if pairs <= _PAIRS_A_CALL and waste <= max(_PAIRS_A_CALL_COSTS, (useful + own) // 2):
                groups[-1].append(piece)
                num_queries, useful = queries, useful + own
                continue
        groups.append([piece])
        num_queries, num_keys, useful = len(piece.queries), len(piece.keys), own
    return groups
