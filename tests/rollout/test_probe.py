"""Which models the engine serves, and that it says so when it does not."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_models import path_logprobs, tiny_model

from rollout import probe
from rollout.attention import cpu
from rollout.engine import Engine
from rollout.extend import ExtendSpec
from rollout.settings import EngineSettings

PROMPT = list(range(3, 15))


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt_oss", "deepseek_v3"])
@pytest.mark.parametrize("attention", ["cpu", "reference"])
def test_a_served_family_samples_what_plain_attention_would(family, attention):
    engine = Engine(tiny_model(family), EngineSettings(num_kv_slots=512, attention=attention))
    node = engine.prefill(PROMPT)
    spec = ExtendSpec(max_tokens=6, temperature=0.8)
    forks = list(engine.extend([(node, spec, key) for key in range(3)]))
    below = list(engine.extend([(fork.node, spec, 10 + i) for i, fork in enumerate(forks * 2)]))
    for completion in forks + below:
        path = completion.node.path_token_ids()
        fresh = path_logprobs(engine.model, path, 0.8, attention="eager")
        assert np.abs(fresh[-6:] - completion.logprobs).max() < 2e-5
        scored = engine.score_path(path, 0.8)
        assert np.abs(fresh - scored).max() < 2e-5
    engine.check_integrity()


def test_a_back_end_that_forgets_the_window_is_refused(monkeypatch):
    model = tiny_model("mistral")
    Engine(model, EngineSettings(num_kv_slots=512))
    monkeypatch.setattr(cpu.NodePlan, "_trim", lambda self, span, window: span)
    monkeypatch.setattr(
        cpu.NodePlan, "_hidden", lambda self, spans, rows, real, lengths, window: _causal(spans)
    )
    with pytest.raises(ValueError, match="differ from plain attention"):
        Engine(model, EngineSettings(num_kv_slots=512))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_passes_the_probe(dtype):
    model = tiny_model("qwen3", getattr(torch, dtype))
    engine = Engine(model, EngineSettings(num_kv_slots=512, dtype=dtype))
    (found,) = engine.extend([(engine.prefill(PROMPT), ExtendSpec(max_tokens=8), 1)])
    assert len(found.token_ids) == 8
    assert engine.pool.keys[0].dtype == getattr(torch, dtype)


def test_a_missing_model_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere' does not exist"):
        Engine(tmp_path / "nowhere", EngineSettings())
    with pytest.raises(ValueError, match="has no config.json"):
        Engine(tmp_path, EngineSettings())


def test_a_model_folder_gives_the_model_that_was_saved(tmp_path):
    model = tiny_model("qwen3")
    model.save_pretrained(tmp_path)
    spec = ExtendSpec(max_tokens=8)
    found = []
    for source in (model, tmp_path):
        engine = Engine(source, EngineSettings(num_kv_slots=512))
        (completion,) = engine.extend([(engine.prefill(PROMPT), spec, 1)])
        found.append(completion.token_ids.tolist())
    assert found[0] == found[1]


def test_a_pool_too_small_for_the_probe_is_named():
    with pytest.raises(ValueError, match="num_kv_slots=8 is too small for the load probe"):
        Engine(tiny_model("llama"), EngineSettings(num_kv_slots=8))


def _causal(spans):
    rows = max(span.num_rows for span in spans)
    length = max(span.length for span in spans)
    hidden = np.zeros((len(spans), rows, length), bool)
    for i, span in enumerate(spans):
        hidden[i, :, span.length :] = True
        if span.causal:
            for row in range(span.num_rows):
                hidden[i, row, span.length - span.num_rows + row + 1 :] = True
    return hidden


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss", "llama"])
@pytest.mark.parametrize("field", ["softcap", "sinks", "window", "scaling"])
def test_a_back_end_that_forgets_a_layers_variant_is_refused(family, field, monkeypatch):
    forgotten = {"softcap": None, "sinks": None, "window": None, "scaling": 0.1}[field]
    inner = cpu.NodePlan.attend

    def attend(self, query, keys, values, variant):
        return inner(self, query, keys, values, replace(variant, **{field: forgotten}))

    monkeypatch.setattr(cpu.NodePlan, "attend", attend)
    has_it = {
        "gemma2": {"softcap", "window", "scaling"},
        "gpt_oss": {"sinks", "window", "scaling"},
        "llama": {"scaling"},
    }
    settings = EngineSettings(num_kv_slots=512)
    if field in has_it[family]:
        with pytest.raises(ValueError, match="in a small model of its class"):
            Engine(tiny_model(family), settings)
    else:
        Engine(tiny_model(family), settings)


def test_wrong_weights_of_the_real_model_are_refused_though_its_class_is_right(monkeypatch):
    model = tiny_model("llama")
    inner = type(model).forward

    def forward(self, *args, **kwargs):
        out = inner(self, *args, **kwargs)
        if self is model and "tree" in kwargs:
            out.logits = out.logits.roll(1, dims=-1)
        return out

    monkeypatch.setattr(type(model), "forward", forward)
    with pytest.raises(ValueError, match="with its own weights"):
        Engine(model, EngineSettings(num_kv_slots=512))


def test_where_no_small_model_can_be_made_the_own_weights_decide_beyond_the_window(monkeypatch):
    def cannot(*args):
        raise ValueError("its configuration is composed of several")

    monkeypatch.setattr(probe, "shrunk_model", cannot)
    model = tiny_model("mistral")
    with pytest.warns(UserWarning, match="no small model of its class can be made"):
        Engine(model, EngineSettings(num_kv_slots=512))
    inner = cpu.NodePlan.attend
    monkeypatch.setattr(
        cpu.NodePlan,
        "attend",
        lambda self, q, k, v, variant: inner(self, q, k, v, replace(variant, window=None)),
    )
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="with its own weights"):
        Engine(model, EngineSettings(num_kv_slots=512))


def test_the_probe_leaves_no_trace(monkeypatch):
    model = tiny_model("mistral")
    digests = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    engine = Engine(model, EngineSettings(num_kv_slots=512))
    assert torch.equal(torch.rand(3), expected)
    assert engine.pool.num_held == 0 and engine.is_idle
    assert engine.metrics().query_tokens == 0 and engine.metrics().generated_tokens == 0
    assert model.config._attn_implementation == "tree"
    assert engine.submit(engine.prefill(PROMPT), ExtendSpec(max_tokens=0), 1) == 0
    assert all(torch.equal(value, digests[name]) for name, value in model.state_dict().items())
    engine.check_integrity()


def test_a_back_end_without_float64_is_tried_in_the_models_own_dtype(monkeypatch):
    tried = []
    monkeypatch.setattr(probe, "choose_back_end", lambda *args: "triton_tree")
    monkeypatch.setattr(
        probe,
        "_try_small",
        lambda engine, dtype, settings: tried.append((dtype, settings.attention)) or True,
    )
    model = tiny_model("qwen3", torch.bfloat16)
    Engine(model, EngineSettings(num_kv_slots=512, dtype="bfloat16"))
    assert tried == [(torch.float64, "cpu"), (torch.bfloat16, "triton_tree")]
