"""Linear layers as the engine runs them: packed weights, the head in fp32, padding of rows."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_models import tiny_model

from rollout import linear
from rollout.engine import Engine
from rollout.extend import ExtendSpec
from rollout.linear import (
    Fp32Head,
    PackedLinear,
    pack_linear_layers,
    undo_linear_changes,
    use_fp32_head,
)
from rollout.row_rule import RowRule, row_rule
from rollout.settings import EngineSettings

PROMPT = list(range(3, 15))


@pytest.fixture(autouse=True)
def small_layers_are_packed_too(monkeypatch):
    monkeypatch.setattr(linear, "_LEAST_PACKED", 0)


def layers(dtype, *shapes, bias=True):
    torch.manual_seed(0)
    return torch.nn.Sequential(*(torch.nn.Linear(i, o, bias=bias) for i, o in shapes)).to(dtype)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)]
)
@pytest.mark.parametrize("bias", [True, False])
def test_a_packed_layer_gives_what_float64_gives_up_to_rounding(dtype, tolerance, bias):
    model = layers(dtype, (96, 200), bias=bias)
    pack_linear_layers(model)
    rows = torch.randn(2, 5, 96).to(dtype)
    weight = model[0].weight.double()
    exact = F.linear(rows.double(), weight, model[0].bias.double() if bias else None)
    with torch.inference_mode():
        found = model(rows)
        assert model(rows[:, :0]).shape == (2, 0, 200)
    assert found.dtype == dtype and found.shape == exact.shape
    assert (found.double() - exact).abs().max() < tolerance * exact.abs().max()


def test_new_weights_are_packed_anew_however_they_arrive():
    model = layers(torch.float32, (64, 64))
    pack_linear_layers(model)
    rows = torch.randn(3, 64)
    for change in (
        lambda: model.state_dict()["0.weight"].copy_(torch.randn(64, 64)),
        lambda: model.load_state_dict(layers(torch.float32, (64, 64)).state_dict()),
        lambda: setattr(model[0].weight, "data", torch.randn(64, 64)),
    ):
        with torch.no_grad():
            change()
        with torch.inference_mode():
            assert torch.allclose(
                model(rows), F.linear(rows, model[0].weight, model[0].bias), atol=1e-4
            )


def test_a_packed_model_can_be_copied_trained_and_put_back():
    model = layers(torch.float32, (32, 16))
    pack_linear_layers(model)
    rows = torch.randn(3, 32)
    with torch.inference_mode():
        expected = model(rows)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.inference_mode():
            assert type(twin[0]) is PackedLinear and torch.equal(twin(rows), expected)
    model(rows).sum().backward()
    assert torch.allclose(model[0].weight.grad, rows.sum(0).expand(16, -1))
    undo_linear_changes(model)
    assert type(model[0]) is torch.nn.Linear and "_packed" not in vars(model[0])


@pytest.mark.parametrize(
    ("rule", "padded"),
    [
        (RowRule(1, 1), {1: 1, 3: 3, 8: 8}),
        (RowRule(4, 1), {1: 4, 3: 4, 4: 4, 5: 5, 9: 9}),
        (RowRule(2, 2), {1: 2, 2: 2, 5: 6}),
        (RowRule(8, 8), {1: 8, 8: 8, 9: 16}),
    ],
)
def test_padding_reaches_the_next_row_count_of_the_rule(rule, padded):
    assert {n: n + rule.padding(n) for n in padded} == padded


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str
)
def test_padded_by_the_rule_a_row_is_the_same_in_any_company(dtype, packed):
    model = layers(dtype, (64, 31), (31, 130), (768, 256), (2048, 96))
    if packed:
        pack_linear_layers(model)
    rule = row_rule(model)
    with torch.inference_mode():
        for layer in model:
            rows = torch.randn(80, layer.in_features).to(dtype)
            expected = layer(rows)
            for n in range(1, 70):
                padded = F.pad(rows[:n], (0, 0, 0, rule.padding(n)))
                assert torch.equal(layer(padded)[:n], expected[:n]), f"{n} rows, {layer}"


@pytest.mark.parametrize(
    ("depends", "expected"),
    [
        (lambda n: False, RowRule(1, 1)),
        (lambda n: n == 1, RowRule(2, 1)),
        (lambda n: n < 4, RowRule(4, 1)),
        (lambda n: n % 2, RowRule(2, 2)),
        (lambda n: n % 4, RowRule(4, 4)),
        (lambda n: n % 8, RowRule(8, 8)),
    ],
)
def test_the_cheapest_rule_is_found_for_kernels_that_treat_some_row_counts_apart(
    depends, expected, monkeypatch
):
    def forward(self, rows):
        return rows[:, :4] + (1.0 if depends(len(rows)) else 0.0)

    model = layers(torch.float32, (8, 8), (64, 8))
    pack_linear_layers(model)
    assert type(model[0]) is PackedLinear
    monkeypatch.setattr(PackedLinear, "forward", forward)
    assert row_rule(model) == expected


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", ["qwen3", "gemma2", "cohere2", "granite", "gpt2", "gpt_neox"])
def test_logits_of_the_fp32_head_equal_a_head_worked_out_in_float64(family, dtype, monkeypatch):
    monkeypatch.setattr(linear, "_HEAD_CHUNK", 32 * 7)  # several chunks, the last one short
    model = tiny_model(family, getattr(torch, dtype))
    engine = Engine(model, EngineSettings(num_kv_slots=512, dtype=dtype, fp32_lm_head=True))
    hidden = []
    head = model.get_output_embeddings()
    head.register_forward_pre_hook(lambda module, args: hidden.append(args[0].clone()))
    logits = []
    inner = engine.runner.forward
    monkeypatch.setattr(
        engine.runner, "forward", lambda *args: logits.append(inner(*args)) or logits[-1]
    )
    (found,) = engine.extend([(engine.prefill(PROMPT), ExtendSpec(max_tokens=6), 1)])
    assert len(logits) == len(hidden) == 6
    config = model.config.get_text_config()
    for rows, got in zip(hidden, logits, strict=True):
        expected = rows[0].double() @ head.weight.double().T
        if family == "cohere2":
            expected *= config.logit_scale
        if family == "granite":
            expected /= config.logits_scaling
        if family == "gemma2":
            cap = config.final_logit_softcapping
            expected = torch.tanh(expected / cap) * cap
        assert got.dtype == torch.float32
        assert (got - expected[: len(got)]).abs().max() < 1e-5 * expected.abs().max()
    last = torch.log_softmax(logits[-1][0].double(), -1)[found.token_ids[-1]]
    assert abs(float(last) - found.logprobs[-1]) < 1e-6


def test_the_fp32_head_copies_nothing_and_leaves_wide_models_alone():
    model = tiny_model("qwen3", torch.bfloat16)
    names = list(model.state_dict())
    use_fp32_head(model)
    head = model.get_output_embeddings()
    assert type(head) is Fp32Head and head.weight.dtype == torch.bfloat16
    assert list(model.state_dict()) == names
    for dtype in (torch.float32, torch.float64):
        model = tiny_model("qwen3", dtype)
        use_fp32_head(model)
        assert type(model.get_output_embeddings()) is torch.nn.Linear


def test_a_head_that_is_no_linear_layer_is_named(monkeypatch):
    model = tiny_model("qwen3", torch.bfloat16)
    monkeypatch.setattr(type(model), "get_output_embeddings", lambda self: torch.nn.Identity())
    with pytest.raises(ValueError, match="fp32_lm_head=True does not fit model Qwen3ForCausalLM"):
        use_fp32_head(model)


@pytest.mark.gpu
@pytest.mark.parametrize("bias", [True, False])
def test_on_a_gpu_the_fp32_head_keeps_its_fp32_sums(bias):
    head = torch.nn.Linear(512, 1000, bias=bias, device="cuda", dtype=torch.bfloat16)
    head.__class__ = Fp32Head
    rows = torch.randn(1, 9, 512, device="cuda", dtype=torch.bfloat16)
    with torch.inference_mode():
        found = head(rows)
    exact = F.linear(rows.double(), head.weight.double(), head.bias.double() if bias else None)
    assert found.dtype == torch.float32 and (found - exact).abs().max() < 1e-5


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
def test_every_dtype_runs_end_to_end_with_and_without_packed_weights(dtype, packed):
    model = tiny_model("qwen3", getattr(torch, dtype))
    settings = EngineSettings(num_kv_slots=512, dtype=dtype, pack_weights=packed)
    engine = Engine(model, settings)
    assert any(type(m) is PackedLinear for m in model.modules()) == (
        packed and linear.can_pack(getattr(torch, dtype))
    )
    (found,) = engine.extend([(engine.prefill(PROMPT), ExtendSpec(max_tokens=8), 1)])
    assert len(found.token_ids) == 8 and np.isfinite(found.logprobs).all()
    assert engine.pool.keys[0].dtype == getattr(torch, dtype)


def test_small_float32_layers_are_left_to_torch(monkeypatch):
    monkeypatch.undo()
    model = layers(torch.float32, (256, 256), (256, 768))
    pack_linear_layers(model)
    kinds = [torch.nn.Linear, PackedLinear if linear.can_pack(torch.float32) else torch.nn.Linear]
    assert [type(layer) for layer in model] == kinds


@pytest.mark.parametrize(
    ("dtype", "pad_rows", "pads"),
    [("float64", False, True), ("float32", True, True), ("float32", False, False)],
)
def test_rows_are_padded_in_float64_and_where_it_is_asked_for(dtype, pad_rows, pads, monkeypatch):
    monkeypatch.setattr("rollout.model_runner.row_rule", lambda model: RowRule(4, 4))
    settings = EngineSettings(num_kv_slots=512, dtype=dtype, pad_rows=pad_rows)
    engine = Engine(tiny_model("qwen3", getattr(torch, dtype)), settings)
    assert engine.runner.row_rule.padding(1) == (3 if pads else 0)
