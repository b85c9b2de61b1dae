"""A sleeping engine gives up memory, and serves as before when it wakes."""

from __future__ import annotations

import gc

import pytest
import torch
from tiny_models import tiny_model

from rollout.engine import Engine
from rollout.extend import ExtendSpec
from rollout.fused_layers import fused_layers
from rollout.linear import PackedLinear
from rollout.settings import EngineSettings
from rollout.weights import stored_state
from treepo.base.digest import manifest_of, tensor_digests

PROMPT = [5, 6, 7, 8, 9]


def make_engine(family="qwen3", seed=0, **settings):
    model = tiny_model(family, seed=seed)
    return Engine(model, EngineSettings(num_kv_slots=300, **settings))


def tokens_of(engine):
    node = engine.prefill(PROMPT)
    specs = [(node, ExtendSpec(max_tokens=12), key) for key in range(4)]
    done = sorted(engine.extend(specs), key=lambda completion: completion.request_id)
    return [(c.token_ids.tolist(), c.logprobs.tolist()) for c in done]


def storages_of(tensors):
    return {t.untyped_storage()._cdata: t.untyped_storage() for t in tensors}.values()


def weight_bytes(engine):
    return sum(s.nbytes() for s in storages_of(stored_state(engine.model).values()))


@pytest.mark.parametrize("family", ["qwen3", "gpt2", "gemma2"])
def test_weights_in_host_memory_come_back_to_the_last_bit(family):
    engine = make_engine(family)
    before, digests, size = tokens_of(engine), engine.digests(), weight_bytes(engine)
    addresses = {name: id(p) for name, p in engine.model.named_parameters()}
    assert size > 10_000
    assert engine.sleep("host") == size
    assert weight_bytes(engine) == 0 and not engine.pool.keys
    with pytest.raises(ValueError, match="asleep without its weights"):
        engine.digests()
    with pytest.raises(ValueError, match="asleep"):
        engine.score_path(PROMPT)
    assert engine.sleep("host") == 0  # it sleeps already
    assert engine.wake() == size and weight_bytes(engine) == size
    assert engine.digests() == digests and tokens_of(engine) == before
    assert {name: id(p) for name, p in engine.model.named_parameters()} == addresses
    assert engine.wake() == 0
    engine.check_integrity()


def test_all_memory_of_keys_values_and_weights_is_given_up():
    """Of all tensors that the engine made none holds memory but tables of less than 2 kB."""

    def large():
        gc.collect()
        every = (t for t in gc.get_objects() if type(t) in (torch.Tensor, torch.nn.Parameter))
        strided = [t for t in every if t.layout == torch.strided]
        return {s._cdata for s in storages_of(strided) if s.nbytes() > 2000}

    before = large()
    engine = make_engine("llama")
    tokens_of(engine)
    assert len(large() - before) > 20
    engine.sleep("drop")
    assert not large() - before
    assert len(fused_layers(engine.model)) == 2


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_packed_and_merged_copies_of_weights_go_and_are_made_again(family):
    model = tiny_model(family, torch.bfloat16)
    engine = Engine(model, EngineSettings(num_kv_slots=300, dtype="bfloat16"))
    before = tokens_of(engine)

    def copies():
        packed = [m._packed for m in model.modules() if isinstance(m, PackedLinear)]
        return [c for c in packed + [f._weights for f in fused_layers(model)] if c is not None]

    had = len(copies())
    engine.sleep("host")
    assert copies() == []
    engine.wake()
    assert tokens_of(engine) == before and len(copies()) == had


def weight_set(model):
    state = stored_state(model)
    return manifest_of(state), {name: tensor.clone() for name, tensor in state.items()}


@pytest.mark.parametrize("weights", ["keep", "host", "drop"])
def test_a_publication_reaches_a_sleeping_engine_whatever_it_did_with_its_weights(weights):
    engine, other = make_engine(), make_engine(seed=1)
    tokens_of(engine)
    engine.sleep(weights)
    manifest, tensors = weight_set(other.model)
    assert engine.load_weights(1, manifest, tensors) == tensor_digests(stored_state(other.model))
    with pytest.raises(ValueError, match="asleep: call wake"):
        engine.score_path(PROMPT)
    assert engine.wake() == 0
    assert tokens_of(engine) == tokens_of(other)


def test_dropped_weights_are_missed_until_a_whole_set_came():
    engine, other = make_engine(), make_engine(seed=1)
    manifest, tensors = weight_set(other.model)
    assert engine.sleep("drop") == 0
    with pytest.raises(ValueError, match="missing"):
        engine.load_weights(1, manifest, {k: v for k, v in tensors.items() if "norm" not in k})
    engine.wake()
    for call in (lambda: engine.score_path(PROMPT), engine.step):
        with pytest.raises(ValueError, match="refuses work: .*dropped when it fell asleep"):
            call()
    engine.load_weights(1, manifest, tensors)
    assert tokens_of(engine) == tokens_of(other)


def test_a_set_that_does_not_fit_leaves_a_sleeper_s_weights_in_force():
    engine, other = make_engine(), make_engine(seed=1)
    before = tokens_of(engine)
    manifest, tensors = weight_set(other.model)
    engine.sleep("host")
    tensors.pop("model.norm.weight")
    with pytest.raises(ValueError, match="missing model.norm.weight"):
        engine.load_weights(1, manifest, tensors)
    engine.wake()
    assert engine.policy_version == 0 and tokens_of(engine) == before


def test_copies_in_host_memory_can_be_dropped_later():
    engine = make_engine()
    engine.sleep("host")
    engine.sleep("drop")
    assert engine.wake() == 0
    with pytest.raises(ValueError, match="refuses work"):
        engine.score_path(PROMPT)


def test_tied_weights_stay_tied_and_are_copied_once():
    model = tiny_model("gemma2")
    engine = Engine(model, EngineSettings(num_kv_slots=300))
    manifest = manifest_of(stored_state(model))
    assert manifest.tied
    assert engine.sleep("host") < sum(t.nbytes for t in stored_state(model).values())
    engine.wake()
    assert manifest_of(stored_state(model)) == manifest


def test_an_unknown_way_to_sleep_is_refused():
    with pytest.raises(ValueError, match="weights='away': choose one of keep, host, drop"):
        make_engine().sleep("away")
