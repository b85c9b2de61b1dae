"""The index plan of packed-tree attention against a dense mask."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from token_trees import random_tree, token_tree

from trainers import attention
from trainers.packing import pack_row, path_tree


def dense_mask(row, window=None):
    """[T, T]: k is seen by q iff k <= q < visible_until[k], and within the window."""
    index = torch.arange(row.num_tokens)
    visible = (index <= index[:, None]) & (index[:, None] < row.visible_until)
    if window is not None:
        visible &= row.position_ids[:, None] - row.position_ids < window
    return visible


def row_of(seed, count=3):
    rng = random.Random(seed)
    return pack_row([token_tree(random_tree(rng, segment=9)) for _ in range(count)])


def context_of(row):
    return attention.PackedTreeContext(
        visible_until=row.visible_until,
        position_ids=row.position_ids,
        device=torch.device("cpu"),
    )


@pytest.mark.parametrize("window", [None, 1, 5, 1000])
@pytest.mark.parametrize("queries_a_piece", [3, 256])
@pytest.mark.parametrize("seed", range(4))
def test_the_calls_of_a_plan_hold_exactly_the_visible_pairs_once(
    seed, queries_a_piece, window, monkeypatch
):
    monkeypatch.setattr(attention, "_QUERIES_A_PIECE", queries_a_piece)
    row = row_of(seed)
    seen = torch.zeros(row.num_tokens, row.num_tokens, dtype=torch.int64)
    plan = context_of(row).plan(window)
    rows = [
        (queries, call.keys[b], visible[b, at])
        for call in plan.calls
        for visible in [call.visible()]
        for b in range(len(call.queries))
        for at, queries in enumerate(call.queries[b].tolist())
    ]
    for token, at in enumerate(plan.output_row.tolist()):
        query, keys, visible = rows[at]
        assert query == token
        seen[token].index_add_(0, keys[visible], torch.ones(int(visible.sum()), dtype=torch.int64))
    assert torch.equal(seen, dense_mask(row, window).long())


@pytest.mark.parametrize("pairs_kept", [0, 1 << 24])
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
def test_attention_and_its_gradients_equal_the_dense_mask(
    num_kv_heads, window, pairs_kept, monkeypatch
):
    monkeypatch.setattr(attention, "_PAIRS_KEPT", pairs_kept)
    row = row_of(1)
    generator = torch.Generator().manual_seed(0)

    def states(heads):
        return torch.randn(
            1, heads, row.num_tokens, 8, generator=generator, dtype=torch.float64
        ).requires_grad_()

    query, key, value = states(4), states(num_kv_heads), states(num_kv_heads)
    out, _ = attention.packed_tree_attention(
        torch.nn.Identity(),
        query,
        key,
        value,
        None,
        packed_tree=context_of(row),
        scaling=0.4,
        sliding_window=window,
    )
    expected = F.scaled_dot_product_attention(
        query, key, value, attn_mask=dense_mask(row, window), scale=0.4, enable_gqa=True
    ).transpose(1, 2)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    upstream = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    found = torch.autograd.grad(out, (query, key, value), upstream)
    wanted = torch.autograd.grad(expected, (query, key, value), upstream)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_work_is_near_the_visible_pairs_and_far_from_the_square_of_the_row():
    rng = random.Random(0)
    row = pack_row([token_tree(random_tree(rng, segment=40, depth=3)) for _ in range(8)])
    pairs = sum(call.num_pairs for call in context_of(row).plan(None).calls)
    visible = int(dense_mask(row).sum())
    assert pairs < 3.5 * visible and pairs < row.num_tokens**2 / 10


def test_a_long_chain_is_cut_and_a_window_drops_the_keys_before_it():
    length = 2000
    visible_until = np.full(length, length)
    positions = np.arange(length)
    pieces = attention._cut_into_pieces(visible_until, positions, None)
    assert max(len(piece.queries) for piece in pieces) == 256
    assert sum(len(p.queries) * len(p.keys) for p in pieces) < 0.6 * length**2
    windowed = attention._cut_into_pieces(visible_until, positions, 64)
    assert max(len(piece.keys) for piece in windowed) == 256 + 63


def test_a_long_row_keeps_no_mask_and_no_gathered_keys_for_the_backward_pass(monkeypatch):
    monkeypatch.setattr(attention, "_QUERIES_A_PIECE", 16)
    row = pack_row([path_tree(torch.zeros(512, dtype=torch.int64))])

    def bytes_saved(pairs_kept):
        monkeypatch.setattr(attention, "_PAIRS_KEPT", pairs_kept)
        states = [torch.randn(1, 2, 512, 8, requires_grad=True) for _ in range(3)]
        storages = {}

        def note(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            out, _ = attention.packed_tree_attention(
                torch.nn.Identity(), *states, None, packed_tree=context_of(row)
            )
        return sum(storages.values()), out

    kept, _ = bytes_saved(1 << 24)
    recomputed, out = bytes_saved(0)
    out.sum().backward()
    assert recomputed < kept / 5


def test_calling_without_a_row_says_what_is_missing():
    states = torch.zeros(1, 1, 8, 8)
    with pytest.raises(ValueError, match="packed_tree=context"):
        attention.packed_tree_attention(torch.nn.Identity(), states, states, states, None)
