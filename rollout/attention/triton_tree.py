"""Attention over the token tree on a GPU, in two Triton kernels.

The first computes partial results: a program takes one run of keys that the same query rows see
(an *item* of the work list) and one KV head; the query heads of that KV head, of several rows, are
the rows of its tile. Keys and values are read from the pool by slot. The second merges each row's
partial results by log-sum-exp, as split-KV attention does (Dao 2023, FlashDecoding; the tree form
is Yao et al. 2024, DeFT).

A tile's shape does not depend on the load, and how a path is cut into items hardly does
(``rollout.attention.work_list``), so neither do the results. Scores, softmax and sums are fp32.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl

from rollout.attention.base import LayerVariant
from rollout.attention.tree_plan import Work
from rollout.attention.work_list import ITEM, LARGE_TILE, SMALL_TILE

_MERGE_BLOCK = 16  # partial results merged at a time
_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=["window"])
def _attend_items(
    query,
    keys,
    values,
    outputs,  # fp32 [partials, heads, VALUE_DIM]
    lses,  # fp32 [partials, heads], to base 2
    items,  # [items, COLUMNS], see ``rollout.attention.work_list``
    slots,
    lengths,
    positions,
    scaling,
    softcap,
    window,
    query_row_stride,
    query_head_stride,
    key_slot_stride,
    key_head_stride,
    value_slot_stride,
    value_head_stride,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    GROUPS: tl.constexpr,  # query heads of a KV head
    COLUMNS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    WIDEN: tl.constexpr,  # multiply in fp32 what is stored in less
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,  # HEAD_DIM, padded
    BLOCK_V: tl.constexpr,  # VALUE_DIM, padded
):
    item = items + tl.program_id(0) * COLUMNS
    kv_head = tl.program_id(1)
    key_head = keys + kv_head.to(tl.int64) * key_head_stride
    value_head = values + kv_head.to(tl.int64) * value_head_stride
    span = tl.load(item)
    if span < 0:
        return
    low = tl.load(item + 1)
    high = tl.load(item + 2)
    first = tl.load(item + 3)
    base = tl.load(item + 4)
    offset = tl.load(item + 5)
    start = tl.load(item + 6)
    row = tl.load(item + 7)
    num_rows = tl.load(item + 8)

    stacked = first + tl.arange(0, BLOCK_M)
    is_row = stacked < num_rows * GROUPS
    tile_row = stacked // GROUPS
    head = kv_head * GROUPS + stacked % GROUPS
    position = tl.load(positions + row + tile_row, mask=is_row, other=-1)

    # Leave out what no row of the tile sees: keys not there yet, keys after the last row, keys
    # before the first row's window (in whole blocks, so that blocks stay where they are).
    high = tl.minimum(high, tl.load(lengths + span))
    high = tl.minimum(high, tl.max(position, 0) + 1 - start)
    if HAS_WINDOW:
        earliest = tl.min(tl.where(is_row, position, 2147483647), 0)
        hidden = tl.maximum(earliest - window + 1 - start - low, 0)
        low += hidden // BLOCK_N * BLOCK_N

    column = tl.arange(0, BLOCK_K)
    value_column = tl.arange(0, BLOCK_V)
    query_row = (row + tile_row).to(tl.int64)
    tile = tl.load(
        query
        + query_row[:, None] * query_row_stride
        + head[:, None] * query_head_stride
        + column[None, :],
        mask=is_row[:, None] & (column[None, :] < HEAD_DIM),
        other=0.0,
    )
    if WIDEN:
        tile = tile.to(tl.float32)
    peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    output = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    for block in range(low, high, BLOCK_N):
        key = block + tl.arange(0, BLOCK_N)
        is_key = key < high
        slot = tl.load(slots + offset + key, mask=is_key, other=0).to(tl.int64)
        key_tile = tl.load(
            key_head + slot[None, :] * key_slot_stride + column[:, None],
            mask=is_key[None, :] & (column[:, None] < HEAD_DIM),
            other=0.0,
        )
        if WIDEN:
            key_tile = key_tile.to(tl.float32)
        score = tl.dot(tile, key_tile, input_precision="ieee") * scaling
        if HAS_SOFTCAP:
            # tanh(x) = 2 sigmoid(2 x) - 1
            score = softcap * (2.0 * tl.sigmoid(2.0 * score / softcap) - 1.0)
        depth = (start + key)[None, :]
        is_seen = is_key[None, :] & (depth <= position[:, None])
        if HAS_WINDOW:
            is_seen = is_seen & (depth > position[:, None] - window)
        score = tl.where(is_seen, score * _LOG2E, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(score, 1))
        # A row that has seen no key yet has peak -inf; -inf - -inf must not become nan.
        safe_peak = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weight = tl.exp2(score - safe_peak[:, None])
        decay = tl.exp2(peak - safe_peak)
        total = total * decay + tl.sum(weight, 1)
        value_tile = tl.load(
            value_head + slot[:, None] * value_slot_stride + value_column[None, :],
            mask=is_key[:, None] & (value_column[None, :] < VALUE_DIM),
            other=0.0,
        )
        weight = weight.to(value_tile.dtype)
        if WIDEN:
            weight, value_tile = weight.to(tl.float32), value_tile.to(tl.float32)
        output = tl.dot(weight, value_tile, output * decay[:, None], input_precision="ieee")
        peak = new_peak

    saw_key = total > 0.0
    total = tl.where(saw_key, total, 1.0)
    lse = tl.where(saw_key, peak + tl.log2(total), float("-inf"))
    place = (base + tile_row).to(tl.int64) * (tl.num_programs(1) * GROUPS) + head
    tl.store(lses + place, lse, mask=is_row)
    tl.store(
        outputs + place[:, None] * VALUE_DIM + value_column[None, :],
        output / total[:, None],
        mask=(is_row & saw_key)[:, None] & (value_column[None, :] < VALUE_DIM),
    )


@triton.jit
def _merge_rows(
    outputs,
    lses,
    result,  # [rows, heads, VALUE_DIM]
    row_start,
    order,
    sinks,  # [heads]
    VALUE_DIM: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    heads = tl.num_programs(1)
    begin = tl.load(row_start + row)
    end = tl.load(row_start + row + 1)
    column = tl.arange(0, BLOCK_V)
    peak = float("-inf")
    total = 0.0
    if HAS_SINKS:  # one more key, without a value
        peak = tl.load(sinks + head).to(tl.float32) * _LOG2E
        total = 1.0
    merged = tl.zeros((BLOCK_V,), tl.float32)
    for block in range(begin, end, BLOCK_P):
        index = block + tl.arange(0, BLOCK_P)
        is_partial = index < end
        place = tl.load(order + index, mask=is_partial, other=0).to(tl.int64) * heads + head
        lse = tl.load(lses + place, mask=is_partial, other=float("-inf"))
        new_peak = tl.maximum(peak, tl.max(lse, 0))
        safe_peak = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weight = tl.exp2(lse - safe_peak)
        decay = tl.exp2(peak - safe_peak)
        # A partial result that saw no key was not written.
        part = tl.load(
            outputs + place[:, None] * VALUE_DIM + column[None, :],
            mask=(weight > 0.0)[:, None] & (column[None, :] < VALUE_DIM),
            other=0.0,
        )
        merged = merged * decay + tl.sum(weight[:, None] * part, 0)
        total = total * decay + tl.sum(weight, 0)
        peak = new_peak
    merged = merged / tl.where(total > 0.0, total, 1.0)  # a padding row has no partial result
    tl.store(
        result + (row * heads + head) * VALUE_DIM + column,
        merged.to(result.dtype.element_ty),
        mask=column < VALUE_DIM,
    )


def block_sizes(head_dim: int, value_dim: int, item_size: int) -> tuple[int, int, int, int]:
    """(keys of a block, padded head size, padded value size, stages of the pipeline), so that the
    blocks fit the shared memory of small GPUs, too.
    """
    block_k = max(16, triton.next_power_of_2(head_dim))
    block_v = max(16, triton.next_power_of_2(value_dim))
    token_bytes = (block_k + block_v) * item_size
    block_n = 64 if token_bytes <= 512 else 32 if token_bytes <= 1024 else 16
    return block_n, block_k, block_v, 2 if token_bytes <= 1024 else 1


def attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    work: Work,
    variant: LayerVariant,
) -> torch.Tensor:
    """Attention of all query rows; see ``rollout.attention.base.Plan.attend``.

    Rows without partial results (padding) give 0. Launches kernels and allocates; it does not
    synchronise, so it can be captured in a CUDA graph.
    """
    num_rows, heads, head_dim = query.shape
    kv_heads, value_dim = values.shape[1:]
    assert keys.stride(-1) == values.stride(-1) == 1
    if query.stride(-1) != 1:
        query = query.contiguous()
    block_n, block_k, block_v, stages = block_sizes(head_dim, value_dim, keys.element_size())
    outputs = torch.empty(
        work.num_partials, heads, value_dim, dtype=torch.float32, device=query.device
    )
    lses = torch.empty(work.num_partials, heads, dtype=torch.float32, device=query.device)
    result = torch.empty(num_rows, heads, value_dim, dtype=query.dtype, device=query.device)
    with torch.cuda.device(query.device) if query.is_cuda else nullcontext():
        for items, block_m in ((work.small, SMALL_TILE), (work.large, LARGE_TILE)):
            if not len(items):
                continue
            _attend_items[(len(items), kv_heads)](
                query,
                keys,
                values,
                outputs,
                lses,
                items,
                work.slots,
                work.lengths,
                work.positions,
                float(variant.scaling),
                float(variant.softcap or 1.0),
                int(variant.window or 0),
                query.stride(0),
                query.stride(1),
                keys.stride(0),
                keys.stride(1),
                values.stride(0),
                values.stride(1),
                HEAD_DIM=head_dim,
                VALUE_DIM=value_dim,
                GROUPS=heads // kv_heads,
                COLUMNS=len(ITEM),
                HAS_SOFTCAP=variant.softcap is not None,
                HAS_WINDOW=variant.window is not None,
                # Triton's interpreter, which runs this on a CPU, multiplies the bits of bf16.
                WIDEN=keys.dtype == torch.bfloat16 and not keys.is_cuda,
                BLOCK_M=block_m,
                BLOCK_N=block_n,
                BLOCK_K=block_k,
                BLOCK_V=block_v,
                num_warps=4,
                num_stages=stages,
            )
        _merge_rows[(num_rows, heads)](
            outputs,
            lses,
            result,
            work.row_start,
            work.order,
            query if variant.sinks is None else variant.sinks.contiguous(),
            VALUE_DIM=value_dim,
            HAS_SINKS=variant.sinks is not None,
            BLOCK_P=_MERGE_BLOCK,
            BLOCK_V=block_v,
            num_warps=2,
        )
    return result
