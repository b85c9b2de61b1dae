"""FlexAttention, flash-attn's varlen kernel and the choice between kernels, without a GPU: flex as
the plain function it is uncompiled, varlen as its documentation describes it.
"""

from __future__ import annotations

import importlib
import random

import numpy as np
import pytest
import torch
from attention_doubles import documented_varlen, seem_installed
from test_attention_plan import context_of, dense_mask, row_of, states_of
from token_trees import random_tree, save_tiny_model, token_tree
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from trainers import attention
from trainers.attention import choose, packed_tree
from trainers.attention.chains import chain_attention
from trainers.attention.choose import check_attention, choose_attention
from trainers.attention.flash import SequenceEnds, varlen_attention
from trainers.attention.flex import BLOCK, FlexMasks, flex_tree_attention, visible_blocks
from trainers.attention.variant import Variant
from trainers.model import load_policy
from trainers.packing import pack_row, path_tree
from trainers.settings import LearnerSettings

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")
BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64


def dense_attention(query, key, value, visible, variant):
    """[1, T, H, Dv], by a score for every pair."""
    groups = query.shape[1] // key.shape[1]
    key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))
    scores = query @ key.transpose(2, 3) * variant.scaling
    if variant.softcap is not None:
        scores = variant.softcap * torch.tanh(scores / variant.softcap)
    scores = scores.masked_fill(~visible, float("-inf"))
    if variant.sinks is not None:
        sinks = variant.sinks[None, :, None, None].expand(-1, -1, scores.shape[2], 1)
        scores = torch.cat([scores, sinks], dim=-1)
    probs = scores.softmax(-1)[..., : key.shape[2]]
    return (probs @ value).transpose(1, 2)


def assert_equal_with_gradients(found, expected, inputs, tolerance):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    upstream = torch.randn(expected.shape, dtype=expected.dtype)
    for ours, theirs in zip(
        torch.autograd.grad(found, inputs, upstream),
        torch.autograd.grad(expected, inputs, upstream),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=10 * tolerance, atol=10 * tolerance)


def sinks(dtype=FP64):
    return torch.tensor([1.0, -1.0, 4.0, 0.0], dtype=dtype).requires_grad_()


@pytest.fixture
def flex_on_cpu(monkeypatch):
    """Uncompiled flex_attention is plain operations, with a backward on any device; torch refuses
    it on a CPU because the compiled kernel for CPUs has none. Its tracing is forgotten before, as
    soft caps that change within a process would become symbols, which it doesn't take.
    """
    torch._dynamo.reset()
    module = importlib.import_module("torch.nn.attention.flex_attention")
    monkeypatch.setattr(module, "_validate_device", lambda *states: None)
    return flex_attention


VARIANTS = {
    "plain": dict(),
    "window": dict(window=5),
    "softcap": dict(softcap=2.0),
    "sinks": dict(sinks=sinks()),
    "all": dict(window=7, softcap=3.0, sinks=sinks()),
}


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
def test_flex_attention_and_its_gradients_equal_a_score_for_every_pair(
    name, num_kv_heads, flex_on_cpu
):
    row = row_of(3)
    assert row.num_tokens % BLOCK  # the row is padded
    states = states_of(row, 4, num_kv_heads)
    variant = Variant(scaling=0.4, **VARIANTS[name])
    found = flex_tree_attention(*states, context_of(row).flex_masks, variant, flex_on_cpu)
    visible = dense_mask(row, variant.window)
    expected = dense_attention(*states, visible, variant)
    inputs = [*states, *([] if variant.sinks is None else [variant.sinks])]
    assert_equal_with_gradients(found, expected, inputs, 1e-12)
    by_chains = chain_attention(*states, context_of(row).chains, variant)
    torch.testing.assert_close(found, by_chains, rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_in_float32_with_values_of_another_size(flex_on_cpu):
    row = row_of(5)
    states = states_of(row, 4, 2, dtype=FP32, value_dim=6)
    variant = Variant(scaling=0.4, window=6)
    found = flex_tree_attention(*states, context_of(row).flex_masks, variant, flex_on_cpu)
    expected = dense_attention(*states, dense_mask(row, 6), variant)
    assert_equal_with_gradients(found, expected, states, 2e-6)


def long_row(seed=0):
    rng = random.Random(seed)
    trees = [token_tree(random_tree(rng, segment=150, depth=3)) for _ in range(2)]
    return pack_row([*trees, path_tree(torch.zeros(300, dtype=torch.int64))])


def padded(row):
    """The row's mask with padding tokens up to whole blocks, which see themselves alone."""
    missing = -row.num_tokens % BLOCK
    until = torch.cat(
        [row.visible_until, torch.arange(row.num_tokens + 1, row.num_tokens + missing + 1)]
    )
    return until, torch.cat([row.position_ids, torch.zeros(missing, dtype=torch.int64)])


@pytest.mark.parametrize("seed", range(3))
def test_blocks_are_those_that_torch_finds_by_looking_at_every_pair(seed):
    row = long_row(seed)
    mask = FlexMasks(row.visible_until.numpy(), row.position_ids.numpy(), CPU).mask(None)
    until, _ = padded(row)

    def is_visible(b, h, query, key):
        return (key <= query) & (query < until[key])

    expected = create_block_mask(is_visible, None, None, len(until), len(until), device="cpu")
    assert mask.shape == expected.shape and len(until) >= 10 * BLOCK
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(mask, name), getattr(expected, name)), name
    assert expected.full_kv_num_blocks.sum() > 5 and mask.sparsity() > 50
    for name in ("kv", "full_kv", "q", "full_q"):
        counts = getattr(mask, f"{name}_num_blocks")[0, 0]
        ours, theirs = (getattr(m, f"{name}_indices")[0, 0] for m in (mask, expected))
        for at, count in enumerate(counts.tolist()):
            assert ours[at, :count].tolist() == theirs[at, :count].tolist()


@pytest.mark.parametrize("window", [1, 100, 128, 200, 10_000])
def test_with_a_window_blocks_hold_all_visible_pairs_and_whole_ones_nothing_else(window):
    row = long_row(1)
    until, positions = padded(row)
    some, whole = visible_blocks(until.numpy(), positions.numpy(), window)
    index = torch.arange(len(until))
    pairs = (index <= index[:, None]) & (index[:, None] < until)
    pairs &= positions[:, None] - positions < window
    blocks = pairs.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))
    has_any, has_all = blocks.any(3).any(1).numpy(), blocks.all(3).all(1).numpy()
    assert (some | ~has_any).all() and (has_all | ~whole).all()
    assert np.array_equal(whole, has_all)
    if window <= 128:
        without, _ = visible_blocks(until.numpy(), positions.numpy(), None)
        assert some.sum() < without.sum()


@pytest.mark.parametrize("changes", [{}, {"window": 1}, {"window": 6}, {"softcap": 2.0}])
@pytest.mark.parametrize("lengths", [[5, 16, 1, 9], [24], [3, 3, 2]])
def test_the_varlen_kernel_gets_the_row_s_sequences(lengths, changes):
    row = pack_row([path_tree(torch.zeros(n, dtype=torch.int64)) for n in lengths])
    states = states_of(row, 4, 2)
    variant = Variant(scaling=0.4, **changes)
    ends = context_of(row).sequence_ends
    found = varlen_attention(*states, ends, variant, documented_varlen)
    expected = dense_attention(*states, dense_mask(row, variant.window), variant)
    assert_equal_with_gradients(found, expected, states, 1e-12)


def test_ends_are_sums_of_the_lengths():
    ends = SequenceEnds.of([5, 16, 1], CPU)
    assert ends.ends.tolist() == [0, 5, 21, 22] and ends.longest == 16


@pytest.fixture
def installed(monkeypatch):
    """Says which libraries are to seem installed. Nothing of it is remembered after the test."""

    def seem(*names):
        choose._is_installed.cache_clear()
        seem_installed(monkeypatch, choose, *names)

    yield seem
    choose._is_installed.cache_clear()


class Seeming:
    """The parts of a tensor that the choice looks at."""

    def __init__(self, device, dtype, head_dim=64):
        self.device, self.dtype, self.shape = device, dtype, (1, 2, 8, head_dim)


def chosen(requested, device, dtype, *, shared=True, has_sinks=False, dims=(64, 64)):
    query, value = (Seeming(device, dtype, dim) for dim in dims)
    return choose_attention(requested, query, value, is_shared=shared, has_sinks=has_sinks)


def test_auto_takes_the_best_kernel_that_fits(installed):
    installed("triton", "flash_attn")
    assert chosen("auto", CPU, FP32) == chosen("auto", CPU, BF16, shared=False) == "sdpa"
    assert chosen("auto", CUDA, BF16) == "flex"
    assert chosen("auto", CUDA, BF16, shared=False) == "flash"
    assert chosen("auto", CUDA, FP32, shared=False) == "flex"
    assert chosen("auto", CUDA, BF16, shared=False, has_sinks=True) == "flex"
    assert chosen("auto", CUDA, BF16, shared=False, dims=(192, 128)) == "flex"
    assert chosen("auto", CUDA, FP64) == "sdpa"
    installed("triton")
    assert chosen("auto", CUDA, BF16, shared=False) == "flex"
    installed()
    assert chosen("auto", CUDA, BF16) == "sdpa"


def test_the_import_path_is_searched_once_for_a_kernel(installed, monkeypatch):
    installed()
    searched = []
    monkeypatch.setattr(choose, "find_spec", searched.append)  # finds nothing
    for _ in range(3):
        assert chosen("auto", CUDA, BF16, shared=False) == "sdpa"
    assert searched == ["flash_attn", "triton"]


def test_what_is_asked_for_and_fits_is_taken(installed):
    installed("triton", "flash_attn")
    assert chosen("sdpa", CUDA, BF16) == "sdpa"
    assert chosen("flex", CUDA, BF16, shared=False) == "flex"
    assert chosen("flash", CUDA, BF16, shared=False) == "flash"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "share tokens.*attention=auto"),
        ({"shared": False, "has_sinks": True}, "sinks.*attention=auto"),
        ({"shared": False, "dims": (512, 512)}, "at most 256.*attention=auto"),
    ],
)
def test_flash_refuses_what_it_cannot_serve(installed, changes, words):
    installed("flash_attn")
    with pytest.raises(ValueError, match=f"attention='flash' cannot serve this row: .*{words}"):
        chosen("flash", CUDA, BF16, **changes)


@pytest.mark.parametrize(
    ("name", "device", "dtype", "libraries", "words"),
    [
        ("flex", CPU, BF16, ("triton",), "needs a CUDA device, not cpu.*attention=auto"),
        ("flex", CUDA, BF16, (), "triton is not installed.*attention=sdpa"),
        ("flex", CUDA, FP64, ("triton",), "not float64.*attention=sdpa"),
        ("flash", CPU, BF16, ("flash_attn",), "needs a CUDA device, not cpu.*attention=auto"),
        ("flash", CUDA, FP32, ("flash_attn",), "not float32.*dtype=bfloat16"),
        ("flash", CUDA, BF16, (), "flash-attn is not installed.*attention=auto"),
    ],
)
def test_what_cannot_work_is_refused_with_what_to_do(
    installed, name, device, dtype, libraries, words
):
    installed(*libraries)
    with pytest.raises(ValueError, match=f"attention='{name}' cannot work here: .*{words}"):
        check_attention(name, device, dtype)


def test_the_setting_is_checked_when_built_and_the_machine_before_weights_are_loaded(
    tmp_path, monkeypatch
):
    with pytest.raises(ValueError, match="trainer.learner.attention='fast'.*auto, sdpa, flex"):
        LearnerSettings(attention="fast")
    path = save_tiny_model(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="attention='flex' cannot work here"):
        load_policy(path, LearnerSettings(attention="flex"))
    assert load_policy(path, LearnerSettings(attention="sdpa")).attention_kernel == "sdpa"


@pytest.mark.parametrize("kernel", ["flex", "flash", "sdpa"])
def test_a_layer_goes_to_the_kernel_that_was_chosen(kernel, monkeypatch):
    """The choice reaches the function that serves it, with the row's plan and layer's variant."""
    row = pack_row([path_tree(torch.zeros(8, dtype=torch.int64))])
    states = states_of(row, 4, 2)
    calls = []

    def noted(name):
        def serve(query, key, value, plan, variant):
            calls.append((name, type(plan).__name__, variant.window, variant.softcap))
            return query.transpose(1, 2)

        return serve

    monkeypatch.setattr(packed_tree, "choose_attention", lambda *args, **kwargs: kernel)
    monkeypatch.setattr(packed_tree, "flex_tree_attention", noted("flex"))
    monkeypatch.setattr(packed_tree, "varlen_attention", noted("flash"))
    monkeypatch.setattr(packed_tree, "chain_attention", noted("sdpa"))
    attention.packed_tree_attention(
        torch.nn.Identity(),
        *states,
        None,
        packed_tree=context_of(row),
        sliding_window=3,
        softcap=2.0,
    )
    plans = {"flex": "FlexMasks", "flash": "SequenceEnds", "sdpa": "ChainPlans"}
    assert calls == [(kernel, plans[kernel], 3, 2.0)]
