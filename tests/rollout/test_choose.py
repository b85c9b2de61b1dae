"""The choice of the attention back end, and engines on each that works on this machine."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from attention_doubles import seem_installed
from tiny_models import path_logprobs, tiny_model

from rollout.attention import choose
from rollout.attention.choose import choose_back_end
from rollout.attention.tree_plan import TreePlan
from rollout.engine import Engine
from rollout.extend import ExtendSpec
from rollout.settings import EngineSettings

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")
BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64


@pytest.fixture
def installed(monkeypatch):
    """Says which libraries are to seem installed."""

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    return functools.partial(seem_installed, monkeypatch, choose)


def test_auto_takes_the_kernels_on_a_gpu_and_torch_operations_elsewhere(installed):
    installed("triton", "flash_attn")
    assert choose_back_end("auto", CPU, FP32) == "cpu"
    assert choose_back_end("auto", CUDA, BF16) == "triton_tree"
    assert choose_back_end("auto", CUDA, FP32) == "triton_tree"
    assert choose_back_end("auto", CUDA, FP64) == "cpu"  # the kernels compute in fp32
    installed()
    assert choose_back_end("auto", CUDA, BF16) == "cpu"


def test_what_is_asked_for_and_can_work_is_taken(installed):
    installed("triton", "flash_attn")
    for device in (CPU, CUDA):
        for name in ("cpu", "reference"):
            assert choose_back_end(name, device, FP64) == name
    assert choose_back_end("triton_tree", CUDA, BF16) == "triton_tree"
    assert choose_back_end("flash", CUDA, BF16) == "flash"


@pytest.mark.parametrize(
    ("name", "device", "dtype", "libraries", "words"),
    [
        ("triton_tree", CUDA, BF16, (), "triton is not installed.*attention=auto"),
        ("triton_tree", CUDA, FP64, ("triton",), "dtype=float64.*attention=cpu"),
        ("triton_tree", CPU, FP32, ("triton",), "device=cuda, not cpu"),
        ("flash", CUDA, BF16, (), "flash-attn is not installed.*attention=auto"),
        ("flash", CUDA, FP32, ("flash_attn",), "not float32"),
        ("flash", CPU, BF16, ("flash_attn",), "device=cuda, not cpu"),
    ],
)
def test_what_cannot_work_is_refused_with_what_to_do(
    installed, name, device, dtype, libraries, words
):
    installed(*libraries)
    with pytest.raises(ValueError, match=f"attention='{name}' cannot work here: .*{words}"):
        choose_back_end(name, device, dtype)


def test_an_engine_refuses_a_back_end_that_cannot_work_before_it_serves():
    settings = EngineSettings(num_kv_slots=64, attention="flash")
    with pytest.raises(ValueError, match="attention='flash' cannot work here"):
        Engine(tiny_model("qwen2"), settings)


@pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")
def test_an_engine_on_the_tree_kernels_gives_the_log_probs_of_plain_attention():
    model = tiny_model("gemma2")  # grouped heads, windows and soft caps
    engine = Engine(model, EngineSettings(num_kv_slots=200, attention="triton_tree"))
    assert engine._forward.back_end == "triton_tree"
    prompts = [[3, 4, 5, 6, 7, 8, 9, 10], [3, 4, 5, 20]]
    nodes = [engine.prefill(prompt) for prompt in prompts]
    items = [(nodes[i % 2], ExtendSpec(max_tokens=2 + 2 * i), i) for i in range(3)]
    plans = set()
    for i, completion in enumerate(engine.extend(items)):
        last = engine._decoder._last
        plans |= {type(last[0].rows.plan)} if last else set()
        path = np.concatenate([prompts[i % 2], completion.token_ids])
        plain = path_logprobs(model, path, attention="eager")[len(prompts[i % 2]) :]
        assert np.abs(plain - completion.logprobs).max() < 2e-5
    assert plans == {TreePlan}
