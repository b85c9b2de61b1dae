"""Weights that come in parts or from shared memory: copied in place, and never half in force."""

from __future__ import annotations

from multiprocessing import shared_memory

import numpy as np
import pytest
import torch
from tiny_models import CONFIGS, path_logprobs, tiny_model
from transformers import AutoModelForCausalLM

from rollout.engine import Engine
from rollout.extend import ExtendSpec
from rollout.settings import EngineSettings
from rollout.weights import Part, TornWeights, as_tensor, stored_state
from treepo.base.digest import WeightManifest, manifest_of, tensor_digests

PROMPT = [3, 5, 7, 9, 11, 13, 2]


def make_engine(model=None) -> Engine:
    return Engine(model or tiny_model("qwen3"), EngineSettings(num_kv_slots=512))


def weight_set(model):
    state = stored_state(model)
    return manifest_of(state), {name: tensor.clone() for name, tensor in state.items()}


def parts_of(tensors, cut=100):
    """Every tensor in pieces of at most ``cut`` elements."""
    for name, tensor in tensors.items():
        flat = tensor.reshape(-1)
        for start in range(0, len(flat), cut):
            yield Part(name, start, flat[start : start + cut])


def qwen3(tied):
    config = CONFIGS["qwen3"]()
    config.tie_word_embeddings = tied
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)


def assert_serves(engine, model, node):
    """What the engine samples has the log-probabilities of ``model``."""
    (done,) = engine.extend([(node, ExtendSpec(max_tokens=5), 1)])
    fresh = path_logprobs(model, done.node.path_token_ids())[-5:]
    assert np.allclose(fresh, done.logprobs, atol=1e-5)
    engine.check_integrity()


def test_read_only_shared_memory_is_read_where_it_lies_and_without_a_warning(recwarn):
    other, engine = tiny_model("qwen3", seed=1), make_engine()
    manifest, tensors = weight_set(other)
    size = sum(tensor.numel() for tensor in tensors.values())
    block = shared_memory.SharedMemory(create=True, size=4 * size)
    try:
        memory = np.frombuffer(block.buf, np.float32, count=size)
        memory[:] = np.concatenate([tensor.numpy().ravel() for tensor in tensors.values()])
        arrays, at = {}, 0
        for name, tensor in tensors.items():
            array = memory[at : at + tensor.numel()].reshape(tensor.shape)
            array.flags.writeable = False
            assert as_tensor(array, None).data_ptr() == memory.ctypes.data + 4 * at
            arrays[name] = array
            at += tensor.numel()
        found = engine.load_weights(1, manifest, arrays)
        assert found == tensor_digests(stored_state(other))
        del memory, arrays, array
    finally:
        block.close()
        block.unlink()
    assert not [warning for warning in recwarn if "writable" in str(warning.message)]


@pytest.mark.parametrize("tied", [True, False])
def test_parts_are_copied_as_they_come(tied):
    engine, other = make_engine(qwen3(tied)), qwen3(tied)
    with torch.no_grad():
        other.lm_head.weight.mul_(2)
    manifest, tensors = weight_set(other)
    if tied:
        del tensors["lm_head.weight"]

    def watched():
        stored = stored_state(engine.model)
        for part in parts_of(tensors):
            yield part
            stop = part.start + len(part.values)
            assert torch.equal(stored[part.name].view(-1)[part.start : stop], part.values)

    assert engine.load_weights(1, manifest, watched()) == tensor_digests(stored_state(other))
    assert engine.policy_version == 1


def test_a_tensor_stored_with_strides_is_loaded_whole_and_in_parts():
    def transposed(seed):
        model = tiny_model("qwen3", seed=seed)
        weight = model.model.layers[0].mlp.up_proj.weight
        weight.data = weight.data.T.contiguous().T
        assert not weight.is_contiguous()
        return model

    other = transposed(1)
    manifest, tensors = weight_set(other)
    for sent in (tensors, parts_of(tensors)):
        engine = make_engine(transposed(0))
        assert engine.load_weights(1, manifest, sent) == tensor_digests(stored_state(other))


def test_no_part_is_asked_for_before_the_manifest_fits():
    engine = make_engine()
    before = engine.digests()
    manifest, tensors = weight_set(tiny_model("qwen3", seed=1))
    turned = WeightManifest(tensors=manifest.tensors[::-1], tied=manifest.tied)

    def parts():
        raise AssertionError("asked for")
        yield

    with pytest.raises(ValueError, match="another order"):
        engine.load_weights(1, turned, parts())
    assert engine.digests() == before
    engine.score_path(PROMPT)  # still serves


def lost_part(parts):
    return parts[:-1]


def foreign_part(parts):
    return [*parts[:20], Part("extra", 0, torch.zeros(1))]


def repeated_part(parts):
    return [*parts[:20], parts[19]]


def skipped_part(parts):
    return [*parts[:1], *parts[2:]]


def part_of_another_dtype(parts):
    return [*parts[:20], parts[20]._replace(values=parts[20].values.double())]


def part_that_is_too_long(parts):
    last = parts[-1]
    return [*parts[:-1], last._replace(values=torch.cat([last.values, torch.zeros(1)]))]


def broken_line(parts):
    yield from parts[:30]
    raise RuntimeError("the line is dead")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lost_part, "missing lm_head.weight"),
        (foreign_part, "'extra' came, which the manifest lacks"),
        (repeated_part, "elements .* came, but"),
        (skipped_part, "elements 200 to 300 of .* came, but 100 of its 992 are there"),
        (part_of_another_dtype, "is torch.float64, expected torch.float32"),
        (part_that_is_too_long, "came, but"),
        (broken_line, "the line is dead"),
    ],
)
def test_a_load_that_stops_half_way_leaves_an_engine_that_refuses_work_until_a_whole_one(
    spoil, message
):
    engine, other = make_engine(), tiny_model("qwen3", seed=1)
    manifest, tensors = weight_set(other)
    node = engine.prefill(PROMPT)
    list(engine.extend([(node, ExtendSpec(max_tokens=5), 1)]))
    with pytest.raises(TornWeights, match=f"half old, half new: .*{message}"):
        engine.load_weights(1, manifest, spoil(list(parts_of(tensors))))
    assert engine.policy_version == 0
    for work in (
        lambda: engine.submit(node, ExtendSpec(max_tokens=5), 1),
        lambda: engine.step(),
        lambda: engine.score_path(PROMPT),
    ):
        with pytest.raises(ValueError, match="refuses work: a weight load is under way or"):
            work()
    assert engine.load_weights(1, manifest, tensors) == tensor_digests(stored_state(other))
    assert_serves(engine, other, node)


def test_a_load_that_is_interrupted_by_hand_leaves_an_engine_that_refuses_work():
    engine, other = make_engine(), tiny_model("qwen3", seed=1)
    manifest, tensors = weight_set(other)

    def interrupted(parts):
        yield from parts[:30]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.load_weights(1, manifest, interrupted(list(parts_of(tensors))))
    with pytest.raises(ValueError, match="refuses work"):
        engine.score_path(PROMPT)
    engine.load_weights(1, manifest, tensors)
    assert_serves(engine, other, engine.prefill(PROMPT))


def test_a_line_that_breaks_before_the_first_part_leaves_the_old_weights_in_force():
    engine = make_engine()
    manifest, _ = weight_set(tiny_model("qwen3", seed=1))
    before = engine.digests()
    with pytest.raises(RuntimeError, match="the line is dead"):
        engine.load_weights(1, manifest, broken_line([]))
    assert engine.digests() == before
    assert_serves(engine, tiny_model("qwen3"), engine.prefill(PROMPT))


@pytest.mark.parametrize("in_parts", [False, True])
def test_a_sleeping_engine_takes_weights_and_wakes_with_them(in_parts):
    engine, other = make_engine(), tiny_model("qwen3", seed=1)
    node = engine.prefill(PROMPT)
    list(engine.extend([(node, ExtendSpec(max_tokens=5), 1)]))
    engine.sleep()
    manifest, tensors = weight_set(other)
    sent = parts_of(tensors) if in_parts else tensors
    assert engine.load_weights(3, manifest, sent) == tensor_digests(stored_state(other))
    with pytest.raises(ValueError, match="asleep"):
        engine.score_path(PROMPT)
    engine.wake()
    assert engine.policy_version == 3
    assert_serves(engine, other, node)


def test_buffers_are_part_of_a_weight_set_and_of_its_digests():
    def with_buffers(value):
        model = tiny_model("qwen3")
        model.model.register_buffer("scale", torch.tensor([value], dtype=torch.float64))
        model.model.register_buffer("scratch", torch.zeros(3), persistent=False)
        return model

    engine, other = make_engine(with_buffers(1.0)), with_buffers(2.0)
    manifest, tensors = weight_set(other)
    assert "model.scale" in tensors and "model.scratch" not in tensors
    assert engine.load_weights(1, manifest, parts_of(tensors)) == tensor_digests(tensors)
    assert engine.model.model.scale.item() == 2.0


def test_parts_that_come_while_requests_run_go_where_the_switch_says():
    engine, other = make_engine(), tiny_model("qwen3", seed=1)
    manifest, tensors = weight_set(other)
    engine.submit(engine.prefill(PROMPT), ExtendSpec(max_tokens=8), 1)
    for _ in range(3):
        engine.step()
    with pytest.raises(ValueError, match="1 requests are unfinished"):
        engine.load_weights(1, manifest, parts_of(tensors))
    # A torn load in between: the request waits, and goes on under the whole set that follows.
    with pytest.raises(TornWeights):
        engine.load_weights(
            1, manifest, broken_line(list(parts_of(tensors))), in_flight="recompute"
        )
    with pytest.raises(ValueError, match="refuses work"):
        engine.step()
    engine.load_weights(1, manifest, parts_of(tensors), in_flight="recompute")
    done = []
    while not done:
        done = engine.step()
    assert done[0].policy_versions.tolist() == [0] * 3 + [1] * 5
    ids = done[0].node.path_token_ids()
    assert np.allclose(path_logprobs(other, ids)[-5:], done[0].logprobs[-5:], atol=1e-5)
    assert np.allclose(
        path_logprobs(tiny_model("qwen3"), ids)[7:10], done[0].logprobs[:3], atol=1e-5
    )
    engine.check_integrity()
