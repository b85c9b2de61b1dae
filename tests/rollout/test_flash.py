"""The layout for flash-attn's varlen kernel against the dense mask, with the kernel as its
documentation describes it."""

from __future__ import annotations

import pytest
import torch
from random_trees import TreeMaker, laid_out, last_token, random_tensors

from rollout.attention.base import LayerVariant
from rollout.attention.flash import FlashPlan
from rollout.attention.reference import ReferencePlan

CPU = torch.device("cpu")


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
    assert return_attn_probs and q.shape[-1] == k.shape[-1] == v.shape[-1]
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
    return torch.cat(outputs), torch.cat(lses, dim=1), None


def assert_like_the_dense_mask(blocks, seed, variant, **shape):
    ordered, spans, positions = laid_out(blocks)
    query, keys, values = random_tensors(seed, len(positions), dtype=torch.float64, **shape)
    plan = FlashPlan(spans, positions, device=CPU, varlen=documented_varlen)
    found = plan.attend(query, keys, values, variant)
    expected = ReferencePlan(ordered, CPU).attend(query, keys, values, variant)
    assert (found - expected).abs().max() < 1e-12


@pytest.mark.parametrize(
    ("variant", "shape"),
    [
        (LayerVariant(scaling=0.3), {}),
        (LayerVariant(scaling=0.3, window=1), {}),
        (LayerVariant(scaling=0.3, window=7), {}),
        (LayerVariant(scaling=0.3, window=500), {}),
        (LayerVariant(scaling=0.3, softcap=2.0), {}),
        (LayerVariant(scaling=0.3, sinks=torch.tensor([1.0, -1.0, 4.0, 0.0])), {}),
        (LayerVariant(scaling=0.3, window=5, softcap=3.0, sinks=torch.ones(4)), {}),
        (LayerVariant(scaling=0.3), {"head_dim": 24, "value_dim": 16}),
        (LayerVariant(scaling=0.3), {"head_dim": 16, "value_dim": 24}),
        (LayerVariant(scaling=0.3), {"heads": 7, "kv_heads": 1}),
    ],
)
def test_any_tree_gives_what_the_dense_mask_gives(variant, shape):
    for seed in range(5):
        assert_like_the_dense_mask(TreeMaker(seed).random(12, 14), seed, variant, **shape)


@pytest.mark.parametrize("window", [None, 9])
def test_a_plan_that_advances_and_drops_rows_gives_what_the_dense_mask_gives(window):
    maker = TreeMaker(1)
    prompt = maker.node(maker.root, 8)
    branch = maker.node(prompt, 3)
    nodes = [maker.open_node(parent, 12) for parent in (prompt, branch, branch, prompt)]
    ordered, spans, positions = laid_out([last_token(node, 1) for node in nodes])
    nodes = [block.node for block in ordered]
    plan = FlashPlan(spans, positions, device=CPU, varlen=documented_varlen)
    variant = LayerVariant(scaling=0.3, window=window)
    for count in range(1, 10):
        query, keys, values = random_tensors(count, len(nodes), dtype=torch.float64)
        blocks = [last_token(node, count) for node in nodes]
        expected = ReferencePlan(blocks, CPU).attend(query, keys, values, variant)
        assert (plan.attend(query, keys, values, variant) - expected).abs().max() < 1e-12
        if count == 4:
            goes_on = torch.tensor([True, False, True, True]).numpy()
            plan.keep(goes_on)
            nodes = [node for node, goes in zip(nodes, goes_on, strict=True) if goes]
        plan.advance()
