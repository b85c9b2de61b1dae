"""The layout for flash-attn's varlen kernel against the dense mask, with the kernel as its
documentation describes it."""

from __future__ import annotations

import pytest
import torch
from attention_doubles import documented_varlen
from random_trees import TreeMaker, laid_out, last_token, random_tensors

from rollout.attention.base import LayerVariant
from rollout.attention.flash import FlashPlan
from rollout.attention.reference import ReferencePlan

CPU = torch.device("cpu")


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
