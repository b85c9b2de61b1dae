"""The plans of packed-tree attention on a CPU, and attention by them, against a dense mask."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from token_trees import random_tree, token_tree

from trainers import attention
from trainers.attention import chains, nodes, packed_tree
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
    monkeypatch.setattr(chains, "_QUERIES_A_PIECE", queries_a_piece)
    row = row_of(seed)
    seen = torch.zeros(row.num_tokens, row.num_tokens, dtype=torch.int64)
    plan = context_of(row).chains.plan(window)
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


@pytest.fixture
def by_chains(monkeypatch):
    """Layers that sequences or nodes could serve go to chains."""
    monkeypatch.setattr(packed_tree, "_fits_nodes", lambda *args: False)
    monkeypatch.setattr(packed_tree, "sequence_lengths", lambda visible_until: None)


def states_of(row, heads, kv_heads, *, dim=8, dtype=torch.float64, value_dim=None):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(
            1, count, row.num_tokens, size, generator=generator, dtype=dtype
        ).requires_grad_()
        for count, size in ((heads, dim), (kv_heads, dim), (kv_heads, value_dim or dim))
    ]


def assert_like_the_dense_mask(row, states, *, window=None, tolerance=1e-12):
    """Output and gradients."""
    out, _ = attention.packed_tree_attention(
        torch.nn.Identity(),
        *states,
        None,
        packed_tree=context_of(row),
        scaling=0.4,
        sliding_window=window,
    )
    expected = F.scaled_dot_product_attention(
        *states, attn_mask=dense_mask(row, window), scale=0.4, enable_gqa=True
    ).transpose(1, 2)
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)
    upstream = torch.randn(
        out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    ).to(out.dtype)
    found = torch.autograd.grad(out, states, upstream)
    wanted = torch.autograd.grad(expected, states, upstream)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=10 * tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("pairs_kept", [0, 1 << 24])
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
def test_attention_by_chains_and_its_gradients_equal_the_dense_mask(
    num_kv_heads, window, pairs_kept, monkeypatch, by_chains
):
    monkeypatch.setattr(chains, "_PAIRS_KEPT", pairs_kept)
    row = row_of(1)
    assert_like_the_dense_mask(row, states_of(row, 4, num_kv_heads), window=window)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
def test_attention_by_nodes_and_its_gradients_equal_the_dense_mask(num_kv_heads, seed):
    row = row_of(seed)
    assert any(not call.causal for call in context_of(row).nodes.calls)
    assert_like_the_dense_mask(row, states_of(row, 4, num_kv_heads))


@pytest.mark.parametrize("seed", range(8))
def test_the_calls_of_a_node_plan_hold_exactly_the_visible_pairs_once(seed):
    row = row_of(seed)
    plan = nodes.make_plan(row.visible_until.numpy())
    seen = torch.zeros(row.num_tokens, row.num_tokens, dtype=torch.int64)
    for call in plan.calls:
        rows, keys = call.query_end - call.query_start, call.key_end - call.key_start
        pairs = torch.ones(rows, keys, dtype=torch.int64)
        part = seen[call.query_start : call.query_end, call.key_start : call.key_end]
        part += pairs.tril() if call.causal else pairs
    assert torch.equal(seen, dense_mask(row).long())
    assert plan.num_pairs == int(dense_mask(row).sum())


@pytest.mark.parametrize("lengths", [[5, 16, 1, 9], [8, 8, 8], [7, 7, 3, 3, 3, 7], [1]])
@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
def test_a_row_of_plain_sequences_is_plain_attention_a_sequence(lengths, num_kv_heads, monkeypatch):
    row = pack_row([path_tree(torch.zeros(n, dtype=torch.int64)) for n in lengths])
    padding = row.num_tokens - sum(lengths)
    assert context_of(row).sequence_lengths == [*lengths, *[1] * padding]
    monkeypatch.setattr(nodes, "node_attention", None)  # not called
    assert_like_the_dense_mask(row, states_of(row, 4, num_kv_heads))
    assert_like_the_dense_mask(row, states_of(row, 4, num_kv_heads, value_dim=6))


def test_by_nodes_a_row_of_plain_sequences_is_one_causal_call_a_sequence():
    plan = nodes.make_plan(np.repeat([5, 21, 22], [5, 16, 1]))
    assert [(c.query_start, c.query_end, c.causal) for c in plan.calls] == [
        *((0, 5, True), (5, 21, True), (21, 22, True))
    ]


def test_a_row_with_a_shared_token_is_no_row_of_sequences():
    assert context_of(row_of(0)).sequence_lengths is None
    assert context_of(pack_row([])).sequence_lengths == [1] * 8


def test_the_calls_by_nodes_are_those_worked_out_by_hand():
    # tokens 0 1 | 2 3 below 1 | 4 below 3 | 5 below 3 | 6 below 1
    plan = nodes.make_plan(np.array([7, 7, 6, 6, 5, 6, 7]))
    found = [(c.query_start, c.query_end, c.key_start, c.key_end, c.causal) for c in plan.calls]
    assert found == [
        *((0, 5, 0, 5, True), (5, 6, 5, 6, True), (6, 7, 6, 7, True)),
        *((5, 6, 0, 4, False), (6, 7, 0, 2, False)),
    ]


def test_many_short_nodes_far_below_each_other_are_left_to_chains(monkeypatch):
    # a spine whose every token has a single token beside it, met first: each level merges once more
    count = 60
    until = np.full(2 * count, 2 * count)
    until[1::2] = np.arange(2, 2 * count + 1, 2)
    row = pack_row([path_tree(torch.zeros(2 * count, dtype=torch.int64))])
    row.visible_until[:] = torch.from_numpy(until)
    row.position_ids[:] = torch.arange(2 * count) // 2 + torch.arange(2 * count) % 2
    plan = context_of(row).nodes
    assert not plan.is_worthwhile and row_plan_is_exact(plan, row)
    monkeypatch.setattr(nodes, "node_attention", None)  # not called
    assert_like_the_dense_mask(row, states_of(row, 2, 1))


def row_plan_is_exact(plan, row):
    return plan.num_pairs == int(dense_mask(row).sum())


def test_a_window_that_no_path_reaches_is_no_window():
    row = row_of(2)
    context, longest = context_of(row), int(row.position_ids.max()) + 1
    assert context.binding(longest) is None and context.binding(longest - 1) == longest - 1
    assert dense_mask(row, longest).equal(dense_mask(row))
    assert not dense_mask(row, longest - 1).equal(dense_mask(row))


@pytest.mark.parametrize("by", ["nodes", "chains"])
def test_bfloat16_stays_near_the_dense_mask(by, monkeypatch):
    if by == "chains":
        monkeypatch.setattr(packed_tree, "_fits_nodes", lambda *args: False)
    row = row_of(4)
    states = states_of(row, 4, 2, dtype=torch.bfloat16)
    assert_like_the_dense_mask(row, states, tolerance=4e-2)


def test_values_of_another_size_than_keys_go_to_chains():
    row = row_of(3)
    assert_like_the_dense_mask(row, states_of(row, 4, 2, value_dim=6))


def test_work_is_near_the_visible_pairs_and_far_from_the_square_of_the_row():
    rng = random.Random(0)
    row = pack_row([token_tree(random_tree(rng, segment=40, depth=3)) for _ in range(8)])
    pairs = sum(call.num_pairs for call in context_of(row).chains.plan(None).calls)
    visible = int(dense_mask(row).sum())
    assert pairs < 3.5 * visible and pairs < row.num_tokens**2 / 10


def test_a_long_chain_is_cut_and_a_window_drops_the_keys_before_it():
    length = 2000
    visible_until = np.full(length, length)
    positions = np.arange(length)
    pieces = chains._cut_into_pieces(visible_until, positions, None)
    assert max(len(piece.queries) for piece in pieces) == 256
    assert sum(len(p.queries) * len(p.keys) for p in pieces) < 0.6 * length**2
    windowed = chains._cut_into_pieces(visible_until, positions, 64)
    assert max(len(piece.keys) for piece in windowed) == 256 + 63


def bytes_saved_for_backward(row):
    states = [torch.randn(1, 2, row.num_tokens, 8, requires_grad=True) for _ in range(3)]
    storages = {}

    def note(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out, _ = attention.packed_tree_attention(
            torch.nn.Identity(), *states, None, packed_tree=context_of(row)
        )
    return sum(storages.values()), out


def test_by_nodes_only_states_output_and_log_sums_are_kept_for_the_backward_pass():
    row = row_of(0)
    saved, _ = bytes_saved_for_backward(row)
    assert saved == 4 * 2 * row.num_tokens * (4 * 8 + 1)


def test_a_long_row_keeps_no_mask_and_no_gathered_keys_for_the_backward_pass(
    monkeypatch, by_chains
):
    monkeypatch.setattr(chains, "_QUERIES_A_PIECE", 16)
    row = pack_row([path_tree(torch.zeros(512, dtype=torch.int64))])

    monkeypatch.setattr(chains, "_PAIRS_KEPT", 1 << 24)
    kept, _ = bytes_saved_for_backward(row)
    monkeypatch.setattr(chains, "_PAIRS_KEPT", 0)
    recomputed, out = bytes_saved_for_backward(row)
    out.sum().backward()
    assert recomputed < kept / 5


def test_calling_without_a_row_says_what_is_missing():
    states = torch.zeros(1, 1, 8, 8)
    with pytest.raises(ValueError, match="packed_tree=context"):
        attention.packed_tree_attention(torch.nn.Identity(), states, states, states, None)
