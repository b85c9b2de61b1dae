"""Models with random weights in given shapes, built in code: no download, the same everywhere."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config, Qwen3Config

# Qwen2.5's shapes, and a tiny one to try a script with.
QWEN2: dict[str, dict[str, Any]] = {
    "tiny": dict(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    ),
    "0.5b": dict(
        vocab_size=151936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    ),
    "1.5b": dict(
        vocab_size=151936,
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    ),
    "7b": dict(
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        tie_word_embeddings=False,
    ),
}


def qwen3_7m(*, dtype: str = "float32") -> PreTrainedModel:
    """6.8 million parameters; plain attention (sdpa)."""
    return _qwen3(dtype, 256, vocab_size=8192, num_hidden_layers=6, head_dim=32)


def qwen3_of_width(width: int, *, num_layers: int, vocab: int = 4096) -> PreTrainedModel:
    """A Qwen3 of ``width`` with heads of 64 numbers, two query heads a key head; float32."""
    return _qwen3("float32", width, vocab_size=vocab, num_hidden_layers=num_layers, head_dim=64)


def _qwen3(dtype: str, width: int, *, head_dim: int, **sizes: int) -> PreTrainedModel:
    config = Qwen3Config(
        hidden_size=width,
        intermediate_size=3 * width,
        num_attention_heads=width // head_dim,
        num_key_value_heads=width // (2 * head_dim),
        head_dim=head_dim,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
        **sizes,
    )
    return _random(config, dtype)


def qwen2(
    shape: str, *, num_layers: int | None = None, dtype: str = "float32", device: str = "cpu"
) -> PreTrainedModel:
    """A shape of ``QWEN2`` with its own number of layers or ``num_layers``, made on the device."""
    sizes = dict(QWEN2[shape])
    if num_layers is not None:
        sizes["num_hidden_layers"] = num_layers
    config = Qwen2Config(
        **sizes,
        max_position_embeddings=32768,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    return _random(config, dtype, device)


def copy_of(model: PreTrainedModel) -> PreTrainedModel:
    """The same weights in another model, whose attention can be switched by itself."""
    return copy.deepcopy(model)


def _random(config, dtype: str, device: str = "cpu") -> PreTrainedModel:
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            config, dtype=getattr(torch, dtype), attn_implementation="sdpa"
        )
    return model.eval()
