"""Families of transformers: what is served equals plain attention, what is not is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers as tf
from tiny_models import SERVED, plain_logprobs, tiny_model

from rollout.engine import Engine
from rollout.extend import ExtendSpec
from rollout.probe import plain_attention
from rollout.settings import EngineSettings
from rollout.shrink import draw_weights

PROMPT = list(range(3, 15))
MODEL_CLASSES = 20  # at least so many are to be served


def grown_tree(engine, rng):
    """(path, log-probs of its last tokens) of segments in a random tree: forks, splits, forced
    tokens, segments of any length, some of it freed on the way.
    """
    vocabulary = engine.model.config.vocab_size
    nodes = [engine.prefill(PROMPT)]
    scored = []
    for level in range(4):
        items = []
        for i in range(int(rng.integers(2, 5))):
            node = nodes[rng.integers(len(nodes))]
            length = len(node.path_token_ids())
            if rng.random() < 0.3:
                node = engine.split(node, int(rng.integers(1, length + 1)))
            if rng.random() < 0.4:
                node = engine.append(node, rng.integers(0, vocabulary, rng.integers(1, 4)))
            spec = ExtendSpec(max_tokens=int(rng.integers(1, 7)), temperature=0.8)
            items.append((node, spec, 100 * level + i))
        grown = list(engine.extend(items))
        engine.check_integrity()
        scored += [(c.node.path_token_ids(), c.logprobs) for c in grown]
        nodes += [c.node for c in grown]
        if level == 1:
            engine.free(nodes.pop(0))
            engine.tree.evict(5)
    return scored


def worst(model, scored):
    """Largest difference from a fresh forward of each path, and the log-probs' spread."""
    attention = plain_attention(model)
    errors, spreads = [], []
    for path, found in scored:
        table = plain_logprobs(model, path, 0.8, attention)[-len(found) - 1 : -1]
        expected = table[np.arange(len(found)), path[-len(found) :]]
        errors.append(np.abs(expected - found).max())
        spreads.append(table.std(axis=1).mean())
    return max(errors), float(np.mean(spreads))


def test_many_families_are_served():
    assert len({type(tiny_model(family)) for family in SERVED}) >= MODEL_CLASSES


@pytest.mark.parametrize("family", SERVED)
def test_a_random_tree_of_a_served_family_equals_plain_attention(family):
    for dtype, tolerance in ((torch.float64, 4e-6), (torch.float32, 1e-4)):
        settings = EngineSettings(
            num_kv_slots=512,
            dtype=str(dtype).removeprefix("torch."),
            max_running_requests=4,
            max_tokens_per_step=7,
        )
        engine = Engine(tiny_model(family, dtype), settings)
        scored = grown_tree(engine, np.random.default_rng(7))
        window = getattr(engine.model.config, "sliding_window", None) or 0
        assert max(len(path) for path, _ in scored) > window + 6
        error, spread = worst(engine.model, scored)
        assert error < tolerance, f"{dtype}: {error:.1e}"
        assert spread > 0.1, "weights so small that nothing is tested"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", ["qwen3", "gemma2", "gpt_oss", "deepseek_v3", "gpt2", "olmo3"])
def test_half_precision_equals_plain_attention_up_to_its_rounding(family, dtype):
    settings = EngineSettings(num_kv_slots=512, dtype=str(dtype).removeprefix("torch."))
    engine = Engine(tiny_model(family, dtype), settings)
    error, spread = worst(engine.model, grown_tree(engine, np.random.default_rng(7)))
    assert error < {torch.bfloat16: 0.2, torch.float16: 0.03}[dtype] * spread


@pytest.mark.parametrize(
    ("family", "cause"),
    [
        ("mamba", "recurrent layers"),
        ("mamba2", "recurrent layers"),
        ("falcon_mamba", "recurrent layers"),
        ("rwkv", "recurrent layers"),
        ("recurrent_gemma", "recurrent layers"),
        ("qwen3_next", "linear-attention or recurrent layers"),
        ("jamba", "recurrent"),
        ("bamba", "recurrent layers"),
        ("falcon_h1", "hybrid"),
        ("lfm2", "convolution layers"),
        ("minimax", "linear-attention or recurrent layers"),
        ("llama4", "chunked-attention layers"),
        ("bloom", "ALiBi"),
        ("mpt", "ALiBi"),
        ("falcon", "does not take its attention through transformers' attention interface"),
        ("stablelm", "StableLmAttention gets no keyword arguments"),
        ("diffllama", "differ from plain attention"),
        ("bert", "differ from plain attention"),
    ],
)
def test_a_model_that_is_no_causal_attention_is_refused_by_name_cause_and_remedy(family, cause):
    model = tiny_model(family)
    with pytest.raises(ValueError, match=cause) as refused:
        Engine(model, EngineSettings(num_kv_slots=512))
    message = str(refused.value)
    assert f"model {type(model).__name__} ({model.config.model_type})" in message
    assert "cannot be served by the tree engine" in message
    assert "Choose a model whose tokens meet in causal attention alone" in message


def test_an_encoder_decoder_is_refused():
    config = tf.T5Config(
        vocab_size=31, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_decoder_layers=1, num_heads=4
    )
    model = tf.T5ForConditionalGeneration(config).eval()
    with pytest.raises(ValueError, match="T5ForConditionalGeneration.*encoder-decoder"):
        Engine(model, EngineSettings(num_kv_slots=512))


def rotary_model(rope_type):
    """A model whose rotary frequencies change beyond 40 tokens."""
    shape = dict(
        vocab_size=31,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        eos_token_id=1,
    )
    rope = {"rope_type": rope_type, "rope_theta": 10000.0, "factor": 4.0}
    if rope_type == "dynamic":
        config = tf.LlamaConfig(**shape, max_position_embeddings=40, rope_parameters=rope)
    else:
        factors = {"short_factor": [1.0, 1.5, 2.0, 2.5], "long_factor": [4.0, 5.0, 6.0, 7.0]}
        config = tf.Phi3Config(
            **shape,
            max_position_embeddings=160,
            original_max_position_embeddings=40,
            rope_parameters=rope | factors,
        )
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(config)
    draw_weights(model)
    return model.eval()


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_paths_beyond_a_rotary_threshold_are_refused_and_up_to_it_are_right(rope_type):
    model = rotary_model(rope_type)
    engine = Engine(model, EngineSettings(num_kv_slots=512))
    node = engine.prefill(PROMPT)
    (whole,) = engine.extend([(node, ExtendSpec(max_tokens=28), 1)])
    fresh = plain_logprobs(model, whole.node.path_token_ids())[11:39]
    assert np.abs(fresh[np.arange(28), whole.token_ids] - whole.logprobs).max() < 2e-5
    with pytest.raises(ValueError, match=f"exceeds the 40 positions.*{rope_type} rotary"):
        engine.submit(node, ExtendSpec(max_tokens=29), 2)


def test_beyond_the_threshold_stored_keys_would_indeed_be_wrong():
    ids = np.random.default_rng(0).integers(0, 31, 41)
    for rope_type in ("dynamic", "longrope"):
        model = rotary_model(rope_type)
        short, long = plain_logprobs(model, ids[:40]), plain_logprobs(model, ids)
        assert np.abs(short - long[:40]).max() > 1e-3
