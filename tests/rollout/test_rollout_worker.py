"""The worker without Ray: it samples from proved weights of the version asked for alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_models import path_logprobs, tiny_model
from tiny_tokenizers import of_pieces

from rollout.growth import Growth, GrowthLimits
from rollout.metrics import CostLedger
from rollout.settings import EngineSettings
from rollout.strategies.base import Prompt
from rollout.strategies.settings import FlatSettings
from rollout.tree import EOS
from rollout.weights import stored_state
from rollout.worker import RolloutWorker
from treepo.base.digest import manifest_of, tensor_digests

SETTINGS = FlatSettings(n=2, max_response_length=6)


@pytest.fixture
def worker(tmp_path):
    tiny_model("qwen3").save_pretrained(tmp_path)
    threads = torch.get_num_threads()
    worker = RolloutWorker(3)
    worker.setup(str(tmp_path), EngineSettings(num_kv_slots=512))
    yield worker
    torch.set_num_threads(threads)


def prompts():
    ids = [[5, 6, 7], [5, 9], [8, 8, 8, 8]]
    return [
        Prompt(problem_id=f"p{i % 2}", token_ids=np.array(x, np.int32), root_key=i)
        for i, x in enumerate(ids)
    ]


def test_trees_come_in_the_order_of_the_prompts_with_their_costs(worker):
    trees, costs = worker.sample(prompts(), "flat", SETTINGS, 0)
    assert [t.segments[0].token_ids.tolist() for t in trees] == [
        p.token_ids.tolist() for p in prompts()
    ]
    assert costs.generated_tokens == 3 * 2 * 6 and costs.segments == 6
    assert costs.peak_kv_bytes == costs.peak_kv_slots * 2 * 2 * 2 * 8 * 4
    again, more = worker.sample(prompts(), "flat", SETTINGS, 0)
    assert all(a.same_tokens(b) for a, b in zip(trees, again, strict=True))
    assert more.generated_tokens == costs.generated_tokens
    assert worker.ping() == 3


def test_trees_are_grown_in_pieces_in_the_order_of_the_work(worker):
    trees, costs = worker.sample(prompts(), "flat", SETTINGS, 0)
    limits = GrowthLimits(segment_length=4)
    first, some = worker.grow(prompts(), "flat", SETTINGS, 0, limits)
    assert [type(tree) for tree in first] == [Growth] * 3 and some.generated_tokens == 3 * 2 * 4
    second, more = worker.grow(first[::-1], "flat", SETTINGS, 0, limits, [1.0, 2.0, 3.0])
    assert more.generated_tokens == 3 * 2 * 2
    assert all(a.same_tokens(b) for a, b in zip(second[::-1], trees, strict=True))
    with pytest.raises(ValueError, match="holds weights of version 0, not 1"):
        worker.grow(first, "flat", SETTINGS, 1, limits)


def test_a_stale_worker_and_one_with_unconfirmed_weights_refuse_work(worker):
    with pytest.raises(ValueError, match="holds weights of version 0, not 1"):
        worker.sample(prompts(), "flat", SETTINGS, 1)
    other = tiny_model("qwen3", seed=1)
    state = stored_state(other)
    digests = worker.load_weights(1, manifest_of(state), state)
    assert digests == tensor_digests(state) == worker.digests()
    with pytest.raises(ValueError, match="version 1 are not confirmed"):
        worker.sample(prompts(), "flat", SETTINGS, 1)
    scores = worker.score_paths([np.arange(1, 9), np.arange(3, 5)])
    assert np.allclose(scores[0], path_logprobs(other, np.arange(1, 9)), atol=1e-5)
    with pytest.raises(ValueError, match="holds weights of version 1, not 2"):
        worker.confirm(2)
    worker.confirm(1)
    assert worker.policy_version() == 1
    trees, _ = worker.sample(prompts(), "flat", SETTINGS, 1)
    assert {v for t in trees for s in t.segments if s.sampled for v in s.policy_versions} == {1}


def test_a_worker_whose_weight_load_failed_refuses_work(worker):
    state = stored_state(tiny_model("qwen3", seed=1))
    manifest = manifest_of(state)
    del state["model.norm.weight"]
    with pytest.raises(ValueError, match="missing model.norm.weight"):
        worker.load_weights(1, manifest, state)
    with pytest.raises(ValueError, match="refuses work"):
        worker.sample(prompts(), "flat", SETTINGS, 0)


def test_an_unknown_strategy_lists_the_known_ones(worker):
    with pytest.raises(ValueError, match="flat"):
        worker.sample(prompts(), "flatt", SETTINGS, 0)


def test_ledgers_add_counts_and_take_the_larger_peak():
    a = CostLedger(generated_tokens=3, peak_kv_slots=10, peak_kv_bytes=4, wall_seconds=1.5)
    b = CostLedger(generated_tokens=4, peak_kv_slots=7, peak_kv_bytes=9, sequential_steps=2)
    expected = CostLedger(
        generated_tokens=7, peak_kv_slots=10, peak_kv_bytes=9, wall_seconds=1.5, sequential_steps=2
    )
    assert a + b == a.merge(b) == expected


@pytest.mark.parametrize(
    ("field", "value"),
    [("dtype", "int8"), ("attention", "fast"), ("num_kv_slots", 0), ("max_running_requests", 0)],
)
def test_a_setting_out_of_range_is_named(field, value):
    with pytest.raises(ValueError, match=f"engine setting {field}={value!r}"):
        EngineSettings(**{field: value})


def test_stop_strings_use_the_model_folders_tokenizer_or_the_one_named_at_setup(worker, tmp_path):
    settings = FlatSettings(n=4, max_response_length=40, stop_strings=["b", "ac"])
    with pytest.raises(ValueError, match="stop_strings need a tokenizer"):
        worker.sample(prompts(), "flat", settings, 0)
    tokenizer = of_pieces([chr(ord("a") + i) for i in range(26)] + ["ab", "ba", "ca", "cc", "dd"])
    elsewhere = tmp_path / "tokenizer"
    tokenizer.save_pretrained(elsewhere)
    worker.setup(str(tmp_path), EngineSettings(num_kv_slots=512), str(elsewhere))
    named, _ = worker.sample(prompts(), "flat", settings, 0)
    tokenizer.save_pretrained(tmp_path)
    worker.setup(str(tmp_path), EngineSettings(num_kv_slots=512))
    trees, _ = worker.sample(prompts(), "flat", settings, 0)
    assert all(a.same_tokens(b) for a, b in zip(trees, named, strict=True))
    reasons = set()
    for tree in trees:
        for leaf in tree.leaves:
            ids = tree.path_token_ids(leaf, with_prompt=False).tolist()
            text, before = tokenizer.decode(ids), tokenizer.decode(ids[:-1])
            ended = tree.segments[leaf].finish_reason == EOS
            assert ended == ("b" in text or "ac" in text)
            assert "b" not in before and "ac" not in before
            reasons.add(ended)
    assert True in reasons
