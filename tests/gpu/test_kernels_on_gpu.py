"""The tree kernels and flash-attn on a GPU against the dense mask, at the sizes of real models."""

from __future__ import annotations

import pytest
import torch
from random_trees import TreeMaker, laid_out, last_token, random_tensors

from rollout.attention.base import Block, LayerVariant
from rollout.attention.flash import FlashPlan
from rollout.attention.reference import ReferencePlan
from rollout.attention.tree_plan import TreePlan

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda")
NUM_SLOTS = 20000
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def decoding_tree(maker: TreeMaker) -> list[Block]:
    """64 open nodes of several lengths below two prompts and what forks off them."""
    blocks = []
    for length in (700, 2100):
        prompt = maker.node(maker.root, length)
        branches = [maker.node(prompt, 40 + 30 * i) for i in range(4)]
        for i in range(32):
            parent = prompt if i % 5 == 0 else branches[i % 4]
            blocks.append(last_token(maker.open_node(parent, 64), 1 + (7 * i) % 60))
    return blocks


def prefill_tree(maker: TreeMaker) -> list[Block]:
    """Two long prompts with a common beginning, computed at once, beside decoded rows."""
    begin = maker.node(maker.root, 500)
    blocks = [Block(begin, 0, 500, begin.token_ids)]
    for length in (900, 1300):
        node = maker.node(begin, length)
        blocks.append(Block(node, 0, length, node.token_ids))
    return blocks + [last_token(maker.open_node(begin, 8), 3) for _ in range(5)]


def check(plan_of, blocks, variant, dtype, **shape):
    ordered, spans, positions = laid_out(blocks)
    shape = dict(num_slots=NUM_SLOTS, device="cuda", dtype=dtype) | shape
    query, keys, values = random_tensors(0, len(positions), **shape)
    found = plan_of(spans, positions, device=DEVICE).attend(query, keys, values, variant)
    expected = ReferencePlan(ordered, DEVICE).attend(query, keys, values, variant)
    assert (found.float() - expected.float()).abs().max() < TOLERANCE[dtype]


QWEN_7B = dict(heads=28, kv_heads=4, head_dim=128)
VARIANTS = [
    LayerVariant(scaling=0.09),
    LayerVariant(scaling=0.09, window=128),
    LayerVariant(scaling=0.09, softcap=30.0),
]


@pytest.mark.parametrize("make", [decoding_tree, prefill_tree])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_kernels_give_what_the_dense_mask_gives(make, variant, dtype):
    blocks = make(TreeMaker(0, num_slots=NUM_SLOTS))
    check(TreePlan, blocks, variant, dtype, **QWEN_7B)


@pytest.mark.parametrize(
    "shape",
    [
        dict(heads=14, kv_heads=2, head_dim=64),
        dict(heads=32, kv_heads=32, head_dim=96),
        dict(heads=16, kv_heads=8, head_dim=256),
        dict(heads=16, kv_heads=16, head_dim=192, value_dim=128),
        dict(heads=71, kv_heads=1, head_dim=64),
    ],
)
def test_all_shapes_of_heads_give_what_the_dense_mask_gives(shape):
    blocks = decoding_tree(TreeMaker(1, num_slots=NUM_SLOTS))
    variant = LayerVariant(scaling=0.09, sinks=torch.randn(shape["heads"], device="cuda"))
    for dtype in (torch.bfloat16, torch.float32):
        check(TreePlan, blocks, variant, dtype, **shape)


@pytest.mark.parametrize("make", [decoding_tree, prefill_tree])
@pytest.mark.parametrize("variant", VARIANTS)
def test_flash_attn_gives_what_the_dense_mask_gives(make, variant):
    pytest.importorskip("flash_attn")
    blocks = make(TreeMaker(0, num_slots=NUM_SLOTS))
    check(FlashPlan, blocks, variant, torch.bfloat16, **QWEN_7B)
