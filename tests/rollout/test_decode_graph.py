"""Decode steps over static buffers against the plain path: same tokens, same log-probs."""

from __future__ import annotations

import logging

import numpy as np
import plain_tree_kernels
import pytest
from tiny_models import tiny_model

from rollout.attention.tree_plan import Capacity
from rollout.decode_graph import DecodeSteps, _bucket
from rollout.engine import Engine
from rollout.extend import ExtendSpec
from rollout.settings import EngineSettings


@pytest.fixture(autouse=True)
def fast_kernels(monkeypatch):
    monkeypatch.setattr("rollout.attention.triton_tree.attend", plain_tree_kernels.attend)


class Counted(DecodeSteps):
    """Counts how steps came about, and hides the host's token ids from those that need none."""

    def __init__(self, runner):
        super().__init__(runner, captures=False)
        self.num_loads = self.num_runs = self.num_plain = 0

    def run(self, plan, token_ids):
        if self._loaded is not None and self._loaded.is_of(plan):
            token_ids = np.full_like(token_ids, -1)
        found = super().run(plan, token_ids)
        self.num_runs += found is not None
        self.num_plain += found is None
        return found

    def _load(self, plan, token_ids):
        self.num_loads += 1
        return super()._load(plan, token_ids)


def make_engine(family, *, static, **settings):
    settings = dict(num_kv_slots=600, attention="triton_tree") | settings
    engine = Engine(tiny_model(family), EngineSettings(**settings))
    engine._forward.steps = Counted(engine.runner) if static else None
    return engine


def decode(engine):
    """Segments of many lengths, some that stop early, and requests that come half-way."""
    stops = (3, 4, 5, 6)
    prompts = [list(range(2, 14)), list(range(2, 9)), [20, 21, 22]]
    nodes = [engine.prefill(prompt) for prompt in prompts]
    nodes.append(engine.append(nodes[1], [7, 7]))
    specs = [
        ExtendSpec(max_tokens=20, stop_token_ids=stops),
        ExtendSpec(max_tokens=9, temperature=0.7),
        ExtendSpec(max_tokens=24, top_p=0.8),
        ExtendSpec(max_tokens=14, temperature=0.0),
        ExtendSpec(max_tokens=70, top_k=5),
    ]
    found = {}
    ids = [engine.submit(nodes[i % 4], spec, 100 + i) for i, spec in enumerate(specs)]
    steps = 0
    while not engine.is_idle:
        for completion in engine.step():
            found[completion.request_id] = completion
        engine.check_integrity()
        steps += 1
        if steps in (6, 13):
            spec = ExtendSpec(max_tokens=11, stop_token_ids=stops[:1])
            ids.append(engine.submit(nodes[steps % 4], spec, 200 + steps))
    return [found[request_id] for request_id in ids]


@pytest.mark.parametrize("family", ["qwen2", "gemma2", "gpt_oss", "gpt2"])
def test_static_steps_give_the_tokens_and_log_probs_of_the_plain_path(family):
    engine = make_engine(family, static=True)
    plain = decode(make_engine(family, static=False))
    static = decode(engine)
    for one, other in zip(plain, static, strict=True):
        assert one.token_ids.tolist() == other.token_ids.tolist()
        assert one.finish_reason == other.finish_reason
        assert np.abs(one.logprobs - other.logprobs).max() < 1e-5
    counts = engine._forward.steps
    assert counts.num_plain <= 1  # only the step that shows the numbers of heads
    assert counts.num_runs > 50 and counts.num_loads < 0.4 * counts.num_runs


def test_a_reload_of_the_pools_memory_drops_what_points_into_the_old_one():
    engine = make_engine("qwen2", static=True)
    first = decode(engine)
    engine.sleep()
    engine.wake()
    steps = dict(engine._forward.steps._steps)
    again = decode(engine)
    assert [c.token_ids.tolist() for c in again] == [c.token_ids.tolist() for c in first]
    assert not set(map(id, steps.values())) & set(map(id, engine._forward.steps._steps.values()))


def test_a_preempted_request_goes_on_with_the_same_tokens():
    def segments(num_kv_slots):
        engine = make_engine("qwen2", static=True, num_kv_slots=num_kv_slots)
        node = engine.prefill([3, 4, 5])
        items = [(node, ExtendSpec(max_tokens=90), key) for key in range(3)]
        found = {}
        for completion in engine.extend(items):
            found[completion.request_id] = completion.token_ids.tolist()
            engine.free(completion.node)
        return engine.metrics().preempted, [found[i] for i in sorted(found)]

    num_preempted, tight = segments(230)
    assert num_preempted > 0 and segments(500) == (0, tight)


def test_models_that_cannot_be_captured_are_told_and_decode_in_the_plain_way(caplog):
    engine = make_engine("gpt_oss", static=False)
    with caplog.at_level(logging.WARNING):
        steps = DecodeSteps(engine.runner, captures=True)
    assert "experts" in steps.why_not
    assert "GptOssForCausalLM decodes without CUDA graphs" in caplog.text
    assert steps.run(object(), np.zeros(1, np.int64)) is None
    assert DecodeSteps(make_engine("qwen2", static=False).runner, captures=True).why_not is None


def test_buckets_are_few_and_hold_what_is_put_into_them():
    assert [_bucket(n) for n in (1, 8, 9, 16, 33, 64, 65, 200, 512)] == [
        *(8, 8, 16, 16, 64, 64, 128, 256, 512)
    ]
    rng = np.random.default_rng(0)
    keys = set()
    for _ in range(200):
        groups, rows = int(rng.choice([1, 2, 7, 12, 40])), int(rng.integers(1, 300))
        # spans of one chunk of keys each; a span of r rows has r results
        sizes = rng.integers(1, 30, rows)
        small = sum(-(-r * groups // 16) for r in sizes if r * groups <= 32)
        large = sum(-(-r * groups // 64) for r in sizes if r * groups > 32)
        needed = Capacity(
            rows=rows,
            spans=len(sizes),
            small=int(small),
            large=int(large),
            partials=int(sizes.sum()),
            slots=500,
        )
        rounded = needed.rounded(_bucket(rows), groups, 1000)
        assert rounded.holds(needed)
        keys.add((groups, rounded))
    assert len(keys) < 100
