"""Training attention on a GPU, by each kernel, against a float64 reference with a dense mask."""

from __future__ import annotations

import importlib.util
import random

import pytest
import torch
from token_trees import random_tree, token_tree

from trainers.attention.chains import ChainPlans, chain_attention
from trainers.attention.flash import SequenceEnds, varlen_attention
from trainers.attention.flex import FlexMasks, flex_tree_attention
from trainers.attention.sequences import sequence_attention, sequence_lengths
from trainers.attention.variant import Variant
from trainers.packing import pack_row, path_tree

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda")
TOLERANCE = {torch.float32: 5e-5, torch.bfloat16: 5e-2}


def tree_row():
    rng = random.Random(0)
    return pack_row([token_tree(random_tree(rng, segment=150, depth=3)) for _ in range(2)])


def path_row():
    return pack_row([path_tree(torch.zeros(n, dtype=torch.int64)) for n in (700, 130, 130, 1)])


def states_of(row, dtype):
    generator = torch.Generator(DEVICE).manual_seed(0)
    shapes = [(1, heads, row.num_tokens, 64) for heads in (8, 2, 2)]
    return [
        torch.randn(s, generator=generator, device=DEVICE, dtype=dtype).requires_grad_()
        for s in shapes
    ]


def dense(query, key, value, row, variant):
    """[1, T, H, D] in float64."""
    query, key, value = (states.double() for states in (query, key, value))
    index, until, depth = (
        t.to(DEVICE) for t in (torch.arange(row.num_tokens), row.visible_until, row.position_ids)
    )
    visible = (index <= index[:, None]) & (index[:, None] < until)
    if variant.window is not None:
        visible &= depth[:, None] - depth < variant.window
    key, value = (states.repeat_interleave(4, dim=1) for states in (key, value))
    scores = query @ key.transpose(2, 3) * variant.scaling
    if variant.softcap is not None:
        scores = variant.softcap * torch.tanh(scores / variant.softcap)
    scores = scores.masked_fill(~visible, float("-inf"))
    if variant.sinks is not None:
        sinks = variant.sinks.double()[None, :, None, None].expand(-1, -1, row.num_tokens, 1)
        scores = torch.cat([scores, sinks], dim=-1)
    return (scores.softmax(-1)[..., : row.num_tokens] @ value).transpose(1, 2)


def assert_like_dense(attend, row, dtype, variant):
    """Output and gradients."""
    states = states_of(row, dtype)
    inputs = [*states, *([] if variant.sinks is None else [variant.sinks])]
    found, expected = attend(*states), dense(*states, row, variant)
    upstream = torch.randn(expected.shape, device=DEVICE, dtype=torch.float64)
    ours = torch.autograd.grad(found, inputs, upstream.to(found.dtype))
    theirs = torch.autograd.grad(expected, inputs, upstream)
    for a, b in zip((found, *ours), (expected, *theirs), strict=True):
        error = (a.double() - b).abs().max() / b.abs().max()
        assert error < TOLERANCE[dtype]


def variants():
    sinks = torch.linspace(-1, 2, 8, device=DEVICE if torch.cuda.is_available() else "cpu")
    return {
        "plain": dict(),
        "window": dict(window=200),
        "softcap": dict(softcap=2.0),
        "sinks": dict(sinks=sinks.requires_grad_()),
    }


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", ["plain", "window", "softcap", "sinks"])
@pytest.mark.parametrize("kernel", ["flex", "chains"])
def test_trees_by_each_kernel_equal_the_dense_reference(kernel, name, dtype):
    row = tree_row()
    variant = Variant(scaling=0.125, **variants()[name])
    arrays = row.visible_until.numpy(), row.position_ids.numpy(), DEVICE
    if kernel == "flex":
        masks = FlexMasks(*arrays)
        assert_like_dense(lambda *s: flex_tree_attention(*s, masks, variant), row, dtype, variant)
    else:
        plans = ChainPlans(*arrays)
        assert_like_dense(lambda *s: chain_attention(*s, plans, variant), row, dtype, variant)


def test_paths_by_plain_attention_and_by_flash_attn_equal_the_dense_reference():
    row, variant = path_row(), Variant(scaling=0.125)
    lengths = sequence_lengths(row.visible_until.numpy())
    assert lengths is not None
    assert_like_dense(
        lambda *s: sequence_attention(*s, lengths, 0.125), row, torch.bfloat16, variant
    )
    if importlib.util.find_spec("flash_attn"):
        ends = SequenceEnds.of(lengths, DEVICE)
        assert_like_dense(
            lambda *s: varlen_attention(*s, ends, variant), row, torch.bfloat16, variant
        )
