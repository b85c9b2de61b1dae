"""Engines on a GPU: tree kernels and CUDA graphs against plain attention and the plain path."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_models import path_logprobs, tiny_model

from rollout.engine import Engine
from rollout.extend import ExtendSpec
from rollout.settings import EngineSettings

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
PROMPTS = [list(range(2, 30)), list(range(2, 12)), [20, 21, 22]]


def make_engine(family, **settings):
    model = tiny_model(family).to(DEVICE)
    return Engine(model, EngineSettings(num_kv_slots=4000, device=DEVICE, **settings))


def decode(engine):
    """(path, completion) of segments of many lengths; some come half-way."""
    nodes = [engine.prefill(prompt) for prompt in PROMPTS]
    specs = [
        ExtendSpec(max_tokens=100, stop_token_ids=(3,)),
        ExtendSpec(max_tokens=30, temperature=0.7),
        ExtendSpec(max_tokens=64, top_p=0.8),
        ExtendSpec(max_tokens=50, temperature=0.0),
    ]
    where = {engine.submit(nodes[i % 3], specs[i % 4], 100 + i): i % 3 for i in range(24)}
    found, steps = {}, 0
    while not engine.is_idle:
        for completion in engine.step():
            found[completion.request_id] = completion
        engine.check_integrity()
        steps += 1
        if steps == 20:
            where |= {engine.submit(nodes[i], specs[0], 500 + i): i for i in range(3)}
    return [(PROMPTS[where[i]], found[i]) for i in sorted(found)]


@pytest.mark.parametrize("family", ["qwen2", "gemma2", "gpt2", "gpt_oss", "deepseek_v3"])
def test_log_probs_on_the_tree_kernels_are_those_of_plain_attention(family):
    engine = make_engine(family)
    assert engine._forward.back_end == "triton_tree"
    model = tiny_model(family)  # on the CPU
    for prompt, completion in decode(engine)[:8]:
        path = np.concatenate([prompt, completion.token_ids])
        plain = path_logprobs(model, path, attention="eager")[len(prompt) :]
        temperature_one = completion.request_id % 4 != 1
        if temperature_one:
            assert np.abs(plain - completion.logprobs).max() < 1e-3


@pytest.mark.parametrize("family", ["qwen2", "gemma2", "gpt2"])
def test_captured_steps_give_the_tokens_and_log_probs_of_the_plain_path(family):
    engine = make_engine(family)
    plain = decode(make_engine(family, cuda_graphs=False))
    captured = decode(engine)
    steps = engine._forward.steps
    assert steps.why_not is None and steps._steps, "no step was captured"
    assert all(step._graph is not None for step in steps._steps.values())
    for (_, one), (_, other) in zip(plain, captured, strict=True):
        assert one.token_ids.tolist() == other.token_ids.tolist()
        assert np.abs(one.logprobs - other.logprobs).max() < 1e-4


def test_captured_steps_survive_new_memory_of_the_pool():
    engine = make_engine("qwen2")
    first = decode(engine)
    engine.sleep()
    engine.wake()
    for (_, one), (_, other) in zip(first, decode(engine), strict=True):
        assert one.token_ids.tolist() == other.token_ids.tolist()


def test_a_bfloat16_engine_decodes_with_captured_steps():
    model = tiny_model("qwen3", torch.bfloat16).to(DEVICE)
    settings = EngineSettings(num_kv_slots=4000, device=DEVICE, dtype="bfloat16")
    engine = Engine(model, settings)
    assert all(np.isfinite(c.logprobs).all() for _, c in decode(engine))
    assert engine._forward.steps._steps


def test_a_float64_engine_takes_torch_operations():
    model = tiny_model("gpt2", torch.float64).to(DEVICE)
    settings = EngineSettings(num_kv_slots=4000, device=DEVICE, dtype="float64")
    assert Engine(model, settings)._forward.back_end == "cpu"
