"""Receiving weights: what fits is copied and proved, what does not fit is named."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_models import CONFIGS, path_logprobs, tiny_model
from transformers import AutoModelForCausalLM

from rollout.engine import Engine
from rollout.extend import ExtendSpec
from rollout.settings import EngineSettings
from rollout.weights import stored_state
from treepo.base.digest import WeightManifest, manifest_of, tensor_digests

PROMPT = [3, 5, 7, 9, 11, 13, 2]


def make_engine(model=None, **settings) -> Engine:
    return Engine(model or tiny_model("qwen3"), EngineSettings(num_kv_slots=512, **settings))


def weight_set(model):
    state = stored_state(model)
    return manifest_of(state), {name: tensor.clone() for name, tensor in state.items()}


def qwen3(tied):
    config = CONFIGS["qwen3"]()
    config.tie_word_embeddings = tied
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)


def test_loaded_weights_are_in_force_and_their_digests_are_of_what_is_stored():
    engine, other = make_engine(), tiny_model("qwen3", seed=1)
    manifest, tensors = weight_set(other)
    digests = engine.load_weights(7, manifest, tensors)
    assert digests == tensor_digests(stored_state(other)) == engine.digests()
    assert engine.policy_version == 7
    path = np.arange(1, 20)
    assert np.allclose(engine.score_path(path), path_logprobs(other, path), atol=1e-5)


def test_no_request_reads_keys_and_values_of_older_weights():
    engine, other = make_engine(), tiny_model("qwen3", seed=1)
    node = engine.prefill(PROMPT)
    (old,) = engine.extend([(node, ExtendSpec(max_tokens=5), 1)])
    engine.load_weights(1, *weight_set(other))
    engine.check_integrity()
    assert engine.pool.num_held == 0
    (new,) = engine.extend([(old.node, ExtendSpec(max_tokens=5), 2)])
    fresh = path_logprobs(other, new.node.path_token_ids())[-5:]
    assert np.allclose(fresh, new.logprobs, atol=1e-5)
    assert set(old.policy_versions) == {0} and set(new.policy_versions) == {1}
    engine.check_integrity()


def test_numpy_arrays_and_bfloat16_tensors_are_taken():
    other = tiny_model("qwen3", seed=1)
    manifest, tensors = weight_set(other)
    engine = make_engine()
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    assert engine.load_weights(1, manifest, arrays) == tensor_digests(stored_state(other))

    half = tiny_model("qwen3", torch.bfloat16, seed=1)
    engine = make_engine(tiny_model("qwen3", torch.bfloat16), dtype="bfloat16")
    manifest, tensors = weight_set(half)
    assert engine.load_weights(1, manifest, tensors) == tensor_digests(stored_state(half))
    # numpy has no bfloat16: integers of the same size stand for it
    engine = make_engine(tiny_model("qwen3", torch.bfloat16), dtype="bfloat16")
    arrays = {name: tensor.view(torch.int16).numpy() for name, tensor in tensors.items()}
    assert engine.load_weights(1, manifest, arrays) == tensor_digests(stored_state(half))
    arrays["model.norm.weight"] = arrays["model.norm.weight"].astype(np.int32)
    with pytest.raises(ValueError, match="is torch.int32"):
        engine.load_weights(2, manifest, arrays)


def test_one_tensor_of_a_tied_pair_is_enough():
    engine, other = make_engine(qwen3(tied=True)), qwen3(tied=True)
    with torch.no_grad():
        other.lm_head.weight.mul_(2)
    manifest, tensors = weight_set(other)
    assert manifest.tied == (("model.embed_tokens.weight", "lm_head.weight"),)
    del tensors["lm_head.weight"]
    assert engine.load_weights(1, manifest, tensors) == tensor_digests(stored_state(other))
    manifest, tensors = weight_set(other)
    tensors["lm_head.weight"] = tensors["lm_head.weight"] + 1
    with pytest.raises(ValueError, match="are tied but their values differ"):
        engine.load_weights(2, manifest, tensors)


@pytest.mark.parametrize("engine_ties", [True, False])
def test_a_head_tied_on_one_side_alone_is_an_error(engine_ties):
    engine = make_engine(qwen3(tied=engine_ties))
    manifest, tensors = weight_set(qwen3(tied=not engine_ties))
    with pytest.raises(ValueError, match="tied weights differ"):
        engine.load_weights(1, manifest, tensors)
    assert engine.policy_version == 0


def test_missing_unexpected_and_misshapen_tensors_are_named_and_nothing_is_copied():
    engine = make_engine()
    before = engine.digests()
    manifest, tensors = weight_set(tiny_model("qwen3", seed=1))
    name = "model.norm.weight"

    def attempt(message, manifest=manifest, **changes):
        broken = {**tensors, **{k.replace("__", "."): v for k, v in changes.items()}}
        broken = {k: v for k, v in broken.items() if v is not None}
        with pytest.raises(ValueError, match=message):
            engine.load_weights(1, manifest, broken)
        assert engine.digests() == before and engine.policy_version == 0

    attempt("missing model.norm.weight, unexpected none", model__norm__weight=None)
    attempt("missing none, unexpected extra", extra=torch.zeros(1))
    attempt("expected torch.float32 .32,.", model__norm__weight=torch.zeros(31))
    attempt("is torch.float64", model__norm__weight=tensors[name].double())
    short = WeightManifest(tensors=manifest.tensors[1:], tied=manifest.tied)
    attempt("the manifest does not fit the engine's model", manifest=short)
    turned = WeightManifest(tensors=manifest.tensors[::-1], tied=manifest.tied)
    attempt("another order", manifest=turned)


def test_a_flipped_byte_and_two_swapped_tensors_change_the_digests():
    sent = tiny_model("qwen3", seed=1)
    expected = tensor_digests(stored_state(sent))
    manifest, tensors = weight_set(sent)
    tensors["model.norm.weight"].view(torch.uint8)[5] ^= 1
    found = make_engine().load_weights(1, manifest, tensors)
    assert [n for n in expected if expected[n] != found[n]] == ["model.norm.weight"]

    manifest, tensors = weight_set(sent)
    a, b = "model.layers.0.self_attn.k_proj.weight", "model.layers.0.self_attn.v_proj.weight"
    tensors[a], tensors[b] = tensors[b], tensors[a]
    found = make_engine().load_weights(1, manifest, tensors)
    assert [n for n in expected if expected[n] != found[n]] == [a, b]


def test_weights_that_arrive_while_requests_run_are_refused():
    engine = make_engine()
    engine.submit(engine.prefill(PROMPT), ExtendSpec(max_tokens=5), 1)
    with pytest.raises(ValueError, match="1 requests are unfinished"):
        engine.load_weights(1, *weight_set(tiny_model("qwen3", seed=1)))
