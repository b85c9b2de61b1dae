"""Tiny random causal LMs of many families, and plain attention as the oracle."""

from __future__ import annotations

import numpy as np
import torch
import transformers as tf

from rollout.shrink import draw_weights, shrunk_config

VOCABULARY = 31
_SHARED = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=512,
    pad_token_id=0,
    bos_token_id=None,
    eos_token_id=1,
)
_GROUPED = dict(_SHARED, num_key_value_heads=2)

CONFIGS = {
    "llama": lambda: tf.LlamaConfig(**_GROUPED),
    "qwen2": lambda: tf.Qwen2Config(**_GROUPED),
    "qwen3": lambda: tf.Qwen3Config(**_GROUPED, head_dim=8),
    "mistral": lambda: tf.MistralConfig(**_GROUPED, sliding_window=6),
    "gemma2": lambda: tf.Gemma2Config(
        **_GROUPED,
        head_dim=8,
        sliding_window=6,
        query_pre_attn_scalar=8,
        attn_logit_softcapping=2.0,
    ),
    "gpt_oss": lambda: tf.GptOssConfig(
        **_GROUPED, head_dim=8, sliding_window=6, num_local_experts=2, num_experts_per_tok=1
    ),
    "gemma3": lambda: tf.Gemma3TextConfig(
        **_GROUPED,
        head_dim=8,
        sliding_window=6,
        query_pre_attn_scalar=8,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "qwen3_moe": lambda: tf.Qwen3MoeConfig(
        **_GROUPED, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16
    ),
    "mixtral": lambda: tf.MixtralConfig(
        **_GROUPED, sliding_window=6, num_local_experts=4, num_experts_per_tok=2
    ),
    "phi3": lambda: tf.Phi3Config(**_GROUPED),
    "olmo2": lambda: tf.Olmo2Config(**_GROUPED),
    "smollm3": lambda: tf.SmolLM3Config(**_GROUPED, no_rope_layers=[1, 0]),
    "glm4": lambda: tf.Glm4Config(**_GROUPED, head_dim=8),
    "starcoder2": lambda: tf.Starcoder2Config(**_GROUPED, sliding_window=6),
    "deepseek_v2": lambda: tf.DeepseekV2Config(
        **_SHARED,
        num_key_value_heads=4,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=12,
        moe_intermediate_size=16,
        n_routed_experts=4,
        n_shared_experts=1,
        num_experts_per_tok=2,
        topk_method="greedy",
        first_k_dense_replace=1,
    ),
    "gpt_neox": lambda: tf.GPTNeoXConfig(**_SHARED),
    "gpt2": lambda: tf.GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=512
    ),
    "opt": lambda: tf.OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        word_embed_proj_dim=32,
        max_position_embeddings=512,
    ),
    "granite": lambda: tf.GraniteConfig(**_GROUPED, logits_scaling=4.0, residual_multiplier=0.7),
    "cohere2": lambda: tf.Cohere2Config(**_GROUPED, sliding_window=6, logit_scale=0.3),
    "deepseek_v3": lambda: tf.DeepseekV3Config(
        **_SHARED,
        num_key_value_heads=4,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=12,
        moe_intermediate_size=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
    ),
}

# Families as they come, cut by the load probe's own rules.
_CUT = {
    name: (lambda config=config: shrunk_config(config()))
    for name, config in {
        "arcee": tf.ArceeConfig,
        "cohere": tf.CohereConfig,
        "ernie4_5": tf.Ernie4_5Config,
        "exaone4": tf.Exaone4Config,
        "gemma": tf.GemmaConfig,
        "glm4_moe": tf.Glm4MoeConfig,
        "gpt_bigcode": tf.GPTBigCodeConfig,
        "minimax_m2": tf.MiniMaxM2Config,
        "olmo3": tf.Olmo3Config,
        "olmoe": tf.OlmoeConfig,
        "phi": tf.PhiConfig,
        "phimoe": tf.PhimoeConfig,
        "seed_oss": tf.SeedOssConfig,
    }.items()
}
CONFIGS |= _CUT
SERVED = tuple(CONFIGS)

# Families that a token tree cannot serve.
_MAMBA = dict(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=4)
CONFIGS |= {
    "mamba": lambda: tf.MambaConfig(**_MAMBA),
    "mamba2": lambda: tf.Mamba2Config(**_MAMBA, num_heads=4, head_dim=16, n_groups=1),
    "falcon_mamba": lambda: tf.FalconMambaConfig(**_MAMBA),
    "rwkv": lambda: tf.RwkvConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, attention_hidden_size=32
    ),
    "recurrent_gemma": lambda: tf.RecurrentGemmaConfig(
        **_GROUPED, lru_width=32, attention_window_size=6, block_types=["recurrent", "attention"]
    ),
    "qwen3_next": lambda: tf.Qwen3NextConfig(
        **dict(_GROUPED, num_hidden_layers=4),  # the fourth layer is plain attention
        head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
    ),
    "jamba": lambda: tf.JambaConfig(
        **dict(_GROUPED, num_hidden_layers=4),
        num_experts=2,
        attn_layer_period=2,
        attn_layer_offset=1,
        mamba_d_state=4,
        use_mamba_kernels=False,
    ),
    "bamba": lambda: tf.BambaConfig(
        **_GROUPED, attn_layer_indices=[1], mamba_n_heads=4, mamba_d_head=16, mamba_n_groups=1
    ),
    "falcon_h1": lambda: tf.FalconH1Config(
        **_GROUPED, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_n_groups=1
    ),
    "lfm2": lambda: tf.Lfm2Config(**_GROUPED, layer_types=["conv", "full_attention"]),
    "minimax": lambda: tf.MiniMaxConfig(
        **_GROUPED, head_dim=8, layer_types=["linear_attention", "full_attention"]
    ),
    "llama4": lambda: tf.Llama4TextConfig(
        **_GROUPED,
        head_dim=8,
        intermediate_size_mlp=48,
        num_local_experts=2,
        attention_chunk_size=6,
    ),
    "bloom": lambda: tf.BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4),
    "mpt": lambda: tf.MptConfig(vocab_size=VOCABULARY, d_model=32, n_layers=2, n_heads=4),
    "falcon": lambda: tf.FalconConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4
    ),
    "stablelm": lambda: tf.StableLmConfig(**_GROUPED),
    "diffllama": lambda: tf.DiffLlamaConfig(**_GROUPED),
    "bert": lambda: tf.BertConfig(**_SHARED, is_decoder=False),
}


def tiny_model(family: str, dtype: torch.dtype = torch.float32, seed: int = 0):
    """A random model whose context matters: weights are larger than a fresh model's."""
    torch.manual_seed(seed)
    model = tf.AutoModelForCausalLM.from_config(CONFIGS[family]())
    if family in _CUT:
        draw_weights(model)
        return model.to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.25)
            elif "sinks" in name:
                parameter.normal_(0.0, 1.0)
    return model.to(dtype).eval()


def plain_logprobs(model, token_ids, temperature: float = 1.0, attention: str = "sdpa"):
    """float64 [n, V]: log-softmax after each token, by a fresh forward of the whole path."""
    before = model.config._attn_implementation
    model.set_attn_implementation(attention)
    with torch.inference_mode():
        ids = torch.tensor(np.asarray(token_ids), dtype=torch.int64)[None]
        logits = model(input_ids=ids, use_cache=False).logits[0]
    model.set_attn_implementation(before)
    return torch.log_softmax(logits.double() / temperature, dim=-1).numpy()


def path_logprobs(model, token_ids, temperature: float = 1.0, attention: str = "sdpa"):
    """float64 [n]: log-prob of each token given the ones before it; 0 for the first."""
    table = plain_logprobs(model, token_ids, temperature, attention)
    ids = np.asarray(token_ids)
    return np.concatenate([[0.0], table[np.arange(len(ids) - 1), ids[1:]]])
