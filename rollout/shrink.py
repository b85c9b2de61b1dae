"""A small random model of the same class as a given one, for the load probe.

What decides how attention is computed is kept: every kind of layer, head sizes, grouping of heads,
rotary settings, soft caps, sinks, tied embeddings. What only makes the model large is cut: width,
layers, vocabulary, experts. Windows and chunks become so short that a few tokens exceed them.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from rollout.linear import use_float64_experts
from rollout.support import CODE_ERRORS

WINDOW = 8
VOCABULARY = 61
_WIDTH = 64
_INNER = 48
_MOST_LAYERS = 8

# Configuration fields by what they mean; every family uses some of them.
_INNER_FIELDS = (
    "intermediate_size",
    "intermediate_size_mlp",
    "ffn_dim",
    "ffn_hidden_size",
    "n_inner",
    "moe_intermediate_size",
    "expert_intermediate_size",
    "shared_expert_intermediate_size",
    "shared_intermediate_size",
    "mlp_hidden_size",
    "dense_intermediate_size",
)
_EXPERT_FIELDS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_CHOSEN_EXPERT_FIELDS = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k")
_WINDOW_FIELDS = ("sliding_window", "attention_chunk_size", "window_size", "local_window_size")
_RANK_FIELDS = ("q_lora_rank", "kv_lora_rank")
_ID_FIELDS = ("pad_token_id", "bos_token_id", "eos_token_id")
_DENSE_FIRST_FIELDS = ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index")


def shrunk_model(model: PreTrainedModel, dtype: torch.dtype, seed: int = 0) -> PreTrainedModel:
    """A random model of ``model``'s class and device, small enough to try in a moment. The global
    random state is left as it was.

    Raises:
        ValueError: its configuration cannot be shrunk, or its code does not take it shrunk.
    """
    try:
        return _shrunk_model(model, dtype, seed)
    except CODE_ERRORS as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error


def _shrunk_model(model: PreTrainedModel, dtype: torch.dtype, seed: int) -> PreTrainedModel:
    config = shrunk_config(model.config)
    devices = [model.device.index or 0] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        small = type(model)._from_config(config, dtype=torch.float32, attn_implementation="eager")
        draw_weights(small)
    torch.nn.Module.to(small, model.device, dtype)
    use_float64_experts(small)
    small.eval()
    with torch.inference_mode():  # does it run at all?
        small(input_ids=torch.zeros(1, 3, dtype=torch.int64, device=model.device), use_cache=False)
    return small


def shrunk_config(config: PretrainedConfig) -> PretrainedConfig:
    """A copy of ``config`` with few layers, heads, experts and tokens.

    Raises:
        ValueError: the model is composed of several (vision, audio): their configurations depend on
            each other.
    """
    if config.get_text_config() is not config:
        raise ValueError("its configuration is composed of several")
    small = copy.deepcopy(config)
    _cut_layers(small)
    _cut_width(small)
    for field in _INNER_FIELDS:
        _lower(small, field, _INNER)
    for field in _EXPERT_FIELDS:
        _lower(small, field, 4)
    for field in _CHOSEN_EXPERT_FIELDS:
        _lower(small, field, 2)
    for field in ("n_group", "num_expert_group"):
        _lower(small, field, 2)
    _lower(small, "topk_group", 1)
    for field in _WINDOW_FIELDS:
        _lower(small, field, WINDOW)
    for field in _RANK_FIELDS:
        _lower(small, field, 32)
    _lower(small, "vocab_size", VOCABULARY)
    for field in _ID_FIELDS:
        if isinstance(getattr(small, field, None), int):
            setattr(small, field, min(getattr(small, field), VOCABULARY - 1))
    return small


def _lower(config: PretrainedConfig, field: str, most: int) -> None:
    value = getattr(config, field, None)
    if isinstance(value, int) and not isinstance(value, bool) and value > most:
        setattr(config, field, most)


def _cut_width(config: PretrainedConfig) -> None:
    """Few heads, as many to a group of keys as there were (up to 2), heads of the same size."""
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    hidden = config.hidden_size
    head_dim = getattr(config, "head_dim", None)
    groups = min(2, heads // kv_heads)
    few_kv = min(2, kv_heads)
    config.num_attention_heads = few_kv * groups
    if getattr(config, "num_key_value_heads", None):
        config.num_key_value_heads = few_kv
    is_free = getattr(config, "head_dim", None) is not None or hasattr(config, "qk_rope_head_dim")
    width = (
        _WIDTH
        if is_free and hidden != heads * (head_dim or 0)
        else few_kv * groups * (head_dim or hidden // heads)
    )
    config.hidden_size = width
    for field in ("word_embed_proj_dim", "embedding_size"):
        if getattr(config, field, None) == hidden:
            setattr(config, field, width)


def _cut_layers(config: PretrainedConfig) -> None:
    """One layer of each kind, two where there is only one kind. A kind is what the fields with an
    entry a layer say of it, and whether it comes before the first layer with experts.
    """
    depth = config.num_hidden_layers
    for field in _DENSE_FIRST_FIELDS:
        _lower(config, field, 1)
    per_layer: dict[str, list[Any]] = {
        field: list(value)
        for field, value in vars(config).items()
        if isinstance(value, list | tuple) and len(value) == depth and depth > 1
    }
    kinds: dict[tuple[str, ...], int] = {}
    for layer in range(depth):
        kinds.setdefault(tuple(repr(value[layer]) for value in per_layer.values()), layer)
    kept = sorted(kinds.values())[:_MOST_LAYERS]
    if len(kept) == 1:
        kept = [0, min(1, depth - 1)]
    for field, value in per_layer.items():
        setattr(config, field, [value[layer] for layer in kept])
    config.num_hidden_layers = len(kept)


@torch.no_grad()
def draw_weights(model: torch.nn.Module) -> None:
    """Weights larger than a fresh model's, so that what a token sees decides what it gives."""
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            parameter.normal_(0.0, 1.5 / parameter.shape[-1] ** 0.5)
        elif "sinks" in name:
            parameter.normal_(0.0, 1.0)
        else:
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
