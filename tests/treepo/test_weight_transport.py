"""The learner's weights reach engines over a weight group: cast, tied, proved, or refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from weight_members import run_members

import rollout.weight_receiver
from rollout.engine import Engine
from rollout.settings import EngineSettings
from rollout.weight_receiver import receive_weights
from rollout.weights import TornWeights
from trainers.weight_sender import send_weights, shared_arrays
from trainers.weight_sync import cast_manifest, prepare
from treepo.base.digest import manifest_of, tensor_digests
from treepo.base.weight_group import WeightGroupError

PATH = np.arange(1, 20)


def model_of(seed, dtype=torch.float32, tied=True, hidden_size=32):
    config = transformers.Qwen3Config(
        vocab_size=31,
        hidden_size=hidden_size,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.model.register_buffer("steps", torch.tensor([seed]))  # an integer buffer is not cast
    return model.to(dtype).eval()


def engine_of(model) -> Engine:
    dtype = str(model.dtype).removeprefix("torch.")
    return Engine(model, EngineSettings(num_kv_slots=256, dtype=dtype))


def sender(model, version=1, dtype="float32", max_bucket_bytes=5000):
    return lambda group: send_weights(group, version, model.state_dict(), dtype, max_bucket_bytes)


def receiver(engine, version=1):
    return lambda group: receive_weights(
        group, version, lambda manifest, parts: engine.load_weights(version, manifest, parts)
    )


@pytest.mark.parametrize("max_bucket_bytes", [64, 5000, 1 << 20])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [True, False])
def test_every_engine_stores_what_the_sender_vouches_for(tied, dtype, max_bucket_bytes):
    learner = model_of(1, tied=tied)
    engines = [engine_of(model_of(0, getattr(torch, dtype), tied)) for _ in range(2)]
    expected, *found = run_members(
        [sender(learner, 1, dtype, max_bucket_bytes), *map(receiver, engines)]
    )
    # The same proof as over shared memory, from another computation of it.
    assert expected == prepare(learner.state_dict(), dtype).digests
    assert list(expected) == list(learner.state_dict())
    assert found == [expected, expected]
    reference = model_of(1, tied=tied).to(getattr(torch, dtype))
    for engine in engines:
        assert engine.policy_version == 1
        assert engine.digests() == tensor_digests(reference.state_dict())
        assert np.array_equal(engine.score_path(PATH), engine_of(reference).score_path(PATH))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_arrays_for_shared_memory_carry_the_same_weights(dtype):
    learner, engine = model_of(1), engine_of(model_of(0, getattr(torch, dtype)))
    sent = prepare(learner.state_dict(), dtype)
    arrays = shared_arrays(sent.tensors, sent.manifest)
    assert "lm_head.weight" not in arrays  # tied: sent once
    name = "model.layers.1.mlp.up_proj.weight"
    assert arrays[name].__array_interface__["data"][0] == sent.tensors[name].data_ptr()
    assert engine.load_weights(1, sent.manifest, arrays) == sent.digests


def test_the_manifest_of_the_cast_needs_no_cast():
    state = model_of(1).state_dict()
    assert cast_manifest(state, "bfloat16") == prepare(state, "bfloat16").manifest
    assert cast_manifest(state, "float32") == manifest_of(state)


def test_no_bucket_is_larger_than_agreed_and_the_receiver_holds_one_at_a_time(monkeypatch):
    learner, engine = model_of(1), engine_of(model_of(0))
    total = sum(t.numel() * t.itemsize for t in engine.model.parameters())
    storages, elements = set(), 0
    put = rollout.weights.WeightLoad.put

    def watched(load, part):
        nonlocal elements
        storages.add(
            (part.values.untyped_storage().data_ptr(), part.values.untyped_storage().size())
        )
        elements += part.values.numel() * part.values.itemsize
        put(load, part)

    monkeypatch.setattr(rollout.weights.WeightLoad, "put", watched)
    expected, found = run_members([sender(learner, max_bucket_bytes=5000), receiver(engine)])
    assert expected == found
    ((_, size),) = storages  # one buffer, used again and again
    assert size <= 5000 < total <= elements


def test_an_engine_whose_model_differs_refuses_and_no_other_engine_changes():
    honest, odd = engine_of(model_of(0)), engine_of(model_of(0, hidden_size=40))
    before = honest.digests(), odd.digests()
    sent, kept, refused = run_members([sender(model_of(1)), receiver(honest), receiver(odd)])
    assert isinstance(refused, ValueError)
    assert "'model.embed_tokens.weight' is torch.float32 (31, 32)" in str(refused)
    for error in (sent, kept):
        assert isinstance(error, WeightGroupError)
        assert "engine 1 refuses the weights: tensor 'model.embed_tokens" in str(error)
    assert (honest.digests(), odd.digests()) == before
    for engine in (honest, odd):  # nothing was copied: at this level both still serve
        engine.score_path(PATH)
        assert engine.policy_version == 0


def test_an_engine_that_expects_another_version_or_is_busy_refuses():
    engine = engine_of(model_of(0))
    sent, refused = run_members([sender(model_of(1), 4), receiver(engine, 5)])
    assert str(refused) == "weights 4 are offered, 5 are expected"
    assert "engine 0 refuses the weights: weights 4 are offered" in str(sent)
    from rollout.extend import ExtendSpec

    engine.submit(engine.prefill(PATH), ExtendSpec(max_tokens=3), 1)
    sent, refused = run_members([sender(model_of(1)), receiver(engine)])
    assert "1 requests are unfinished" in str(refused) and "unfinished" in str(sent)


def test_a_sender_that_fails_half_way_leaves_engines_that_refuse_work_until_the_next_set():
    class Broken(dict):
        def __getitem__(self, name):
            if name == "model.norm.weight" and self.armed:
                raise RuntimeError("device lost")
            return super().__getitem__(name)

    state = Broken(model_of(1).state_dict())

    def fail_half_way(group):
        state.armed = False
        offer = group.offer

        def offer_then_arm(text):
            offer(text)
            state.armed = True

        group.offer = offer_then_arm
        return send_weights(group, 1, state, "float32", 5000)

    engines = [engine_of(model_of(0)) for _ in range(2)]
    sent, *received = run_members([fail_half_way, *map(receiver, engines)])
    assert str(sent) == "device lost"
    for engine, error in zip(engines, received, strict=True):
        assert isinstance(error, TornWeights)
        assert "half old, half new: the transfer of weights failed: learner: device lost" in str(
            error
        )
        with pytest.raises(ValueError, match="refuses work"):
            engine.score_path(PATH)
    expected, *found = run_members([sender(model_of(1)), *map(receiver, engines)])
    assert found == [expected, expected]
    for engine in engines:
        engine.score_path(PATH)


def test_sleeping_engines_receive_and_wake_with_the_new_weights():
    engine = engine_of(model_of(0))
    engine.sleep()
    expected, found = run_members([sender(model_of(1)), receiver(engine)])
    engine.wake()
    assert expected == found == engine.digests()
    assert np.array_equal(engine.score_path(PATH), engine_of(model_of(1)).score_path(PATH))
