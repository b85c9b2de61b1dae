"""Fused decoder layers: which are fused, that nothing else changes, that new weights are seen."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
import transformers as tf
from tiny_models import SERVED, tiny_model

from rollout.engine import Engine
from rollout.extend import ExtendSpec
from rollout.fused_layers import FusedForward, fused_layers, undo_fused_layers
from rollout.fusing import fuse_decoder_layers
from rollout.linear import PackedLinear, can_pack
from rollout.model_runner import use_tree_attention
from rollout.row_rule import row_rule
from rollout.settings import EngineSettings

pytestmark = pytest.mark.skipif(
    not can_pack(torch.float32), reason="this CPU has no packed products"
)
PACKED = [dtype for dtype in (torch.float32, torch.bfloat16) if can_pack(dtype)]
FUSED = {"llama", "qwen2", "qwen3", "mistral", "smollm3", "seed_oss"}
PROMPT = list(range(3, 15))


def fused_model(family, dtype=torch.float32):
    model = use_tree_attention(tiny_model(family, dtype))
    fuse_decoder_layers(model)
    return model


def engine_of(model, **settings):
    dtype = str(model.dtype).removeprefix("torch.")
    return Engine(model, EngineSettings(num_kv_slots=512, dtype=dtype, **settings))


def drawn(engine, n=5):
    """Log-probs of forks of a prompt, and of forks of those."""
    spec = ExtendSpec(max_tokens=5)
    root = engine.prefill(PROMPT)
    found = sorted(engine.extend([(root, spec, k) for k in range(n)]), key=lambda c: c.request_id)
    more = engine.extend([(c.node, spec, 10 + k) for k, c in enumerate(found)])
    found += sorted(more, key=lambda c: c.request_id)
    return [c.token_ids for c in found], np.stack([c.logprobs for c in found])


@pytest.mark.parametrize("family", SERVED)
def test_layers_of_llamas_form_are_fused_and_others_are_left(family):
    model = fused_model(family)
    expected = model.config.num_hidden_layers if family in FUSED else 0
    assert len(fused_layers(model)) == expected


@pytest.mark.parametrize("dtype", PACKED, ids=str)
@pytest.mark.parametrize("family", sorted(FUSED))
def test_log_probs_of_a_tree_are_those_of_the_unfused_model(family, dtype):
    model = tiny_model(family, dtype)
    plain = engine_of(copy.deepcopy(model), pack_weights=False)
    fused = engine_of(model)
    assert fused_layers(fused.model) and not fused_layers(plain.model)
    ids, found = drawn(fused)
    for path in {tuple(PROMPT + list(tokens)) for tokens in ids}:
        expected = plain.score_path(list(path))
        spread = expected.std()
        error = np.abs(fused.score_path(list(path)) - expected).max()
        assert error < {torch.float32: 1e-5, torch.bfloat16: 0.1}[dtype] * spread
    if dtype == torch.float32:
        other_ids, other = drawn(plain)
        assert [list(t) for t in ids] == [list(t) for t in other_ids]
        assert np.abs(found - other).max() < 5e-5


def biased_llama():
    config = tf.LlamaConfig(
        vocab_size=31, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, attention_bias=True, mlp_bias=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3)
    return model.eval()


def test_biases_of_all_products_are_added():
    plain, model = biased_llama(), biased_llama()
    engine = engine_of(model)
    assert len(fused_layers(model)) == 2
    ids = np.arange(20) % 31
    assert (
        np.abs(engine.score_path(ids) - engine_of(plain, pack_weights=False).score_path(ids)).max()
        < 1e-4
    )


def _scaled(inner, factor):
    def forward(self, *args, **kwargs):
        return inner.forward(self, *args, **kwargs) * factor

    return type("Sabotaged", (inner,), {"forward": forward})


def _clamped(inner):
    def forward(self, x):
        return inner.forward(self, x).clamp(-9.0, 9.0)

    return type("Clamped", (inner,), {"forward": forward})


SABOTAGE = {
    "layer scaled": lambda layer: setattr(layer, "__class__", _scaled(type(layer), 1.01)),
    "MLP scaled": lambda layer: setattr(layer.mlp, "__class__", _scaled(type(layer.mlp), 1.01)),
    "norm scaled": lambda layer: setattr(
        layer.post_attention_layernorm,
        "__class__",
        _scaled(type(layer.post_attention_layernorm), 1.001),
    ),
    "MLP clamped": lambda layer: setattr(layer.mlp, "__class__", _clamped(type(layer.mlp))),
    "another activation": lambda layer: setattr(layer.mlp, "act_fn", torch.nn.GELU()),
    "own forward": lambda layer: setattr(layer.mlp, "forward", layer.mlp.forward),
    "one more parameter": lambda layer: layer.mlp.register_parameter(
        "gain", torch.nn.Parameter(torch.ones(1))
    ),
    "another linear layer": lambda layer: setattr(
        layer.mlp.up_proj, "__class__", type("Linear", (torch.nn.Linear,), {})
    ),
}


@pytest.mark.parametrize("dtype", PACKED, ids=str)
@pytest.mark.parametrize("name", SABOTAGE)
def test_a_layer_that_computes_a_little_else_is_not_fused(name, dtype):
    model = use_tree_attention(tiny_model("qwen3", dtype))
    SABOTAGE[name](model.model.layers[1])
    fuse_decoder_layers(model)
    (fused,) = fused_layers(model)
    assert fused.layer is model.model.layers[0]


@pytest.mark.parametrize("epsilon", [1e-6, 1e-5, 1e-3])
def test_the_norms_epsilon_is_kept(epsilon):
    model = tiny_model("qwen3")
    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = epsilon
    fuse_decoder_layers(use_tree_attention(model))
    assert len(fused_layers(model)) == 2


def _load(layer, name, new, *, assign):
    layer.load_state_dict({**layer.state_dict(), name: new}, assign=assign)


CHANGES = {
    "in place": lambda layer, name, new: layer.get_parameter(name).copy_(new),
    "by state dict": lambda layer, name, new: _load(layer, name, new, assign=False),
    "assigned": lambda layer, name, new: _load(layer, name, new, assign=True),
    "other memory": lambda layer, name, new: setattr(layer.get_parameter(name), "data", new),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_new_value_of_any_parameter_is_noticed(change):
    model = tiny_model("qwen3")
    engine = engine_of(model)
    ids = np.arange(20)
    layer = model.model.layers[1]
    for name, parameter in list(layer.named_parameters()):
        before = engine.score_path(ids)
        with torch.no_grad():
            CHANGES[change](layer, name, parameter.detach() + 0.3 * torch.randn_like(parameter))
        found = engine.score_path(ids)
        fresh = engine_of(copy.deepcopy(model), pack_weights=False).score_path(ids)
        assert np.abs(found - fresh).max() < 1e-4, name
        assert np.abs(found - before).max() > 1e-3, name


def test_the_state_dict_is_as_before_and_no_weight_is_packed_twice():
    plain, model = tiny_model("qwen3"), tiny_model("qwen3")
    engine = engine_of(model)
    drawn(engine)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True)
    )
    for fused in fused_layers(model):
        assert not any(type(linear) is PackedLinear for linear in fused.linear_layers())


def test_a_fused_model_can_be_copied_and_its_copies_are_on_their_own():
    model = tiny_model("qwen3")
    expected = engine_of(model).score_path(PROMPT)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        layers = fused_layers(twin)
        assert [f.layer for f in layers] == list(twin.model.layers)
        with torch.no_grad():
            twin.model.layers[0].mlp.up_proj.weight.mul_(3.0)
        assert np.abs(engine_of(twin).score_path(PROMPT) - expected).max() > 1e-3
        assert np.array_equal(engine_of(model).score_path(PROMPT), expected)


def test_a_fused_model_trains_and_can_be_put_back():
    plain, model = tiny_model("qwen3"), fused_model("qwen3")
    ids = torch.tensor([PROMPT])
    for each in (plain, model):
        each.set_attn_implementation("sdpa")
        each(input_ids=ids, use_cache=False).logits.square().sum().backward()
    for a, b in zip(plain.parameters(), model.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)
    undo_fused_layers(model)
    assert not fused_layers(model)
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_second_engine_undoes_what_the_first_changed():
    model = tiny_model("qwen3")
    engine_of(model)
    assert fused_layers(model)
    engine_of(model, pack_weights=False)
    assert not fused_layers(model)
    engine_of(model)
    assert len(fused_layers(model)) == 2


def test_hooks_and_exchanged_modules_inside_a_fused_layer_count():
    model = tiny_model("qwen3")
    engine = engine_of(model)
    before = engine.score_path(PROMPT)
    attention, calls = model.model.layers[1].self_attn, []
    hook = attention.q_proj.register_forward_hook(lambda *args: calls.append(1))
    assert np.abs(engine.score_path(PROMPT) - before).max() < 1e-5 and calls
    hook.remove()
    attention.v_proj = torch.nn.Linear(32, 16)
    fresh = engine_of(copy.deepcopy(model), pack_weights=False).score_path(PROMPT)
    assert np.abs(engine.score_path(PROMPT) - fresh).max() < 1e-5


@pytest.mark.parametrize("dtype", PACKED, ids=str)
def test_padded_by_the_rule_a_fused_row_is_the_same_in_any_company(dtype):
    model = fused_model("qwen3", dtype)
    rule = row_rule(model)
    (fused, _) = fused_layers(model)
    rows = torch.randn(40, 32).to(dtype)
    with torch.inference_mode():
        expected = fused.through(rows)
        for n in range(1, 32):
            padded = torch.nn.functional.pad(rows[:n], (0, 0, 0, rule.padding(n)))
            assert torch.equal(fused.through(padded)[:n], expected[:n]), n


def test_the_row_rule_tries_what_a_fused_layer_runs(monkeypatch):
    model = fused_model("qwen3")
    through = FusedForward.through
    monkeypatch.setattr(
        FusedForward, "through", lambda self, x: through(self, x) + (len(x) % 4 > 0)
    )
    assert row_rule(model).multiple >= 4


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_model_that_takes_no_packed_weights_is_left(dtype, monkeypatch):
    if dtype == torch.float32:
        monkeypatch.setattr("rollout.fusing.can_pack", lambda dtype: False)
    assert not fused_layers(fused_model("qwen3", dtype))
