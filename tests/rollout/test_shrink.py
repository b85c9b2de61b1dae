"""The small model of the load probe: what it keeps, what it cuts, and what it leaves alone."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from tiny_models import tiny_model

from rollout.shrink import VOCABULARY, WINDOW, shrunk_config, shrunk_model


def test_one_layer_of_each_kind_stays_and_fields_with_an_entry_a_layer_are_cut_alike():
    config = tf.SmolLM3Config()  # rotary but every fourth layer
    assert config.num_hidden_layers == 36 and config.no_rope_layers[:4] == [1, 1, 1, 0]
    small = shrunk_config(config)
    assert small.num_hidden_layers == 2 and small.no_rope_layers == [1, 0]
    assert len(small.layer_types) == 2
    small = shrunk_config(tf.Gemma3TextConfig())
    assert small.layer_types == ["sliding_attention", "full_attention"]
    assert small.sliding_window == WINDOW
    small = shrunk_config(tf.LlamaConfig())  # one kind: two layers of it
    assert small.num_hidden_layers == 2


def test_dense_and_expert_layers_both_stay():
    config = tf.DeepseekV3Config()
    assert config.first_k_dense_replace == 3
    small = shrunk_config(config)
    assert small.first_k_dense_replace == 1 and small.num_hidden_layers == 2
    assert small.n_routed_experts == 4 and small.num_experts_per_tok == 2
    assert (small.n_group, small.topk_group) == (2, 1)
    assert (small.kv_lora_rank, small.q_lora_rank) == (32, 32)
    for field in ("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"):
        assert getattr(small, field) == getattr(config, field)


@pytest.mark.parametrize(
    ("config", "heads", "kv_heads", "head_dim"),
    [
        (tf.Qwen2Config(num_attention_heads=14, num_key_value_heads=2, hidden_size=896), 4, 2, 64),
        (tf.Qwen3Config(), 2, 2, 128),
        (tf.GPT2Config(), 2, None, 64),
        (tf.GemmaConfig(num_attention_heads=8, num_key_value_heads=1), 2, 1, 256),
    ],
)
def test_heads_keep_their_size_and_their_grouping(config, heads, kv_heads, head_dim):
    small = shrunk_config(config)
    assert small.num_attention_heads == heads
    assert getattr(small, "num_key_value_heads", None) == kv_heads
    explicit = getattr(small, "head_dim", None)
    assert (explicit or small.hidden_size // heads) == head_dim
    assert small.vocab_size == VOCABULARY
    assert small.tie_word_embeddings == config.tie_word_embeddings


def test_the_original_configuration_and_the_random_state_are_left_alone():
    model = tiny_model("gemma2")
    before = model.config.to_dict()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    small = shrunk_model(model, torch.float64)
    assert torch.equal(torch.rand(3), expected)
    assert model.config.to_dict() == before
    assert type(small) is type(model) and small.dtype == torch.float64
    again = shrunk_model(model, torch.float64)
    assert all(
        torch.equal(a, b) for a, b in zip(small.parameters(), again.parameters(), strict=True)
    )


def test_a_model_composed_of_several_is_not_shrunk():
    config = tf.LlavaConfig(text_config=tf.LlamaConfig(), vision_config=tf.CLIPVisionConfig())
    with pytest.raises(ValueError, match="composed of several"):
        shrunk_config(config)


def test_an_error_of_the_familys_code_is_told(monkeypatch):
    model = tiny_model("llama")

    def broken(self, *args, **kwargs):
        raise IndexError("no such layer")

    monkeypatch.setattr(type(model), "forward", broken)
    with pytest.raises(ValueError, match="IndexError: no such layer"):
        shrunk_model(model, torch.float64)
