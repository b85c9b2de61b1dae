"""Which models the engine serves, and that it says so when it does not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_models import path_logprobs, tiny_model

from rollout.attention import cpu
from rollout.engine import Engine
from rollout.extend import ExtendSpec
from rollout.settings import EngineSettings

PROMPT = list(range(3, 15))
SERVED = [
    "llama",
    "qwen2",
    "qwen3",
    "mistral",
    "gemma2",
    "gpt_oss",
    "phi3",
    "gpt_neox",
    "gpt2",
    "opt",
    "deepseek_v3",
]


@pytest.mark.parametrize("family", SERVED)
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


@pytest.mark.parametrize("family", ["mamba", "qwen3_next", "llama4"])
def test_a_recurrent_or_chunked_model_is_refused(family):
    with pytest.raises(ValueError, match="cannot be served by the tree engine"):
        Engine(tiny_model(family), EngineSettings(num_kv_slots=512))


def test_a_back_end_that_forgets_the_window_is_refused(monkeypatch):
    model = tiny_model("mistral")
    Engine(model, EngineSettings(num_kv_slots=512))
    monkeypatch.setattr(cpu.NodePlan, "_trim", lambda self, span, window: span)
    monkeypatch.setattr(
        cpu.NodePlan, "_hidden", lambda self, spans, rows, real, lengths, window: _causal(spans)
    )
    with pytest.raises(ValueError, match="differs from plain attention"):
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
