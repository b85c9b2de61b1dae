"""Decode steps over static buffers against the plain path: same tokens, same log-probs."""

from __future__ import annotations

import logging
from contextlib import nullcontext

import numpy as np
import plain_tree_kernels
import pytest
import torch
from tiny_models import CONFIGS, tiny_model

from rollout import decoder
from rollout.attention.tree_plan import Capacity
from rollout.decode_graph import DecodeSteps, HostWaits, StaticStep, _bucket
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
    steps = dict(engine._forward.steps._steps)
    engine.sleep()
    assert steps and not engine._forward.steps._steps  # their memory is given up
    engine.wake()
    again = decode(engine)
    assert [c.token_ids.tolist() for c in again] == [c.token_ids.tolist() for c in first]
    assert not set(map(id, steps.values())) & set(map(id, engine._forward.steps._steps.values()))


def test_segments_that_get_more_slots_are_not_laid_out_anew(monkeypatch):
    engine = make_engine("qwen2", static=True)
    gathered = []
    gather = decoder.gather
    monkeypatch.setattr(decoder, "gather", lambda *args: gathered.append(1) or gather(*args))
    node = engine.prefill([3, 4, 5])
    specs = [ExtendSpec(max_tokens=count) for count in (150, 149, 148)]
    found = {c.request_id: c for c in engine.extend([(node, s, k) for k, s in enumerate(specs)])}
    assert [len(found[i].token_ids) for i in sorted(found)] == [150, 149, 148]
    assert len(gathered) == 2  # the prompt's forward and the first steady one
    plain = make_engine("qwen2", static=False, attention="cpu")
    node = plain.prefill([3, 4, 5])
    for other in plain.extend([(node, s, k) for k, s in enumerate(specs)]):
        assert other.token_ids.tolist() == found[other.request_id].token_ids.tolist()


def test_few_rows_that_are_left_of_a_deep_tree_still_fit():
    def segments(static):
        engine = make_engine("qwen2", static=static, num_kv_slots=900)
        node = engine.prefill([3, 4, 5])
        items = []
        for depth in range(30):  # a chain with a short segment off each node; one goes on for long
            items.append((node, ExtendSpec(max_tokens=4), depth))
            node = engine.append(node, [depth % 7 + 8])
        items.append((node, ExtendSpec(max_tokens=12), 99))
        found = {c.request_id: c.token_ids.tolist() for c in engine.extend(items)}
        return [found[i] for i in sorted(found)]

    assert segments(True) == segments(False)


def test_slots_given_back_and_taken_again_do_not_pile_up_in_a_plan():
    engine = make_engine("qwen2", static=True, num_kv_slots=420)
    node = engine.prefill([3, 4, 5])
    counts = [70, 72, 134, 300]
    items = [(node, ExtendSpec(max_tokens=count), i) for i, count in enumerate(counts)]
    found = {}
    for completion in engine.extend(items):
        found[completion.request_id] = len(completion.token_ids)
        engine.free(completion.node, drop=True)
    assert [found[i] for i in sorted(found)] == counts
    loaded = engine._forward.steps._loaded
    assert len(loaded.plan.table.slots) <= 3 + 300


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


def waits_of_a_step(engine):
    """What ``HostWaits`` finds in a static step of this engine."""
    node = engine.prefill([3, 4, 5, 6])
    for key in range(3):
        engine.submit(node, ExtendSpec(max_tokens=30), key)
    for _ in range(4):
        engine.step()
    with torch.inference_mode():
        return engine._forward.steps._loaded.step.try_out()


class NoKernels:
    """In place of the kernels, which do not wait; their stand-in of these tests does."""

    @staticmethod
    def attend(query, keys, values, work, variant):
        return query.new_zeros(*query.shape[:2], values.shape[2])


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "gemma2", "gpt2", "phi3", "opt", "gpt_oss"])
def test_a_step_has_nothing_for_which_the_host_waits(family, monkeypatch):
    monkeypatch.setattr("rollout.attention.triton_tree.attend", NoKernels.attend)
    assert waits_of_a_step(make_engine_unprobed(family, monkeypatch)) is None


def make_engine_unprobed(family, monkeypatch, change=lambda model: None):
    monkeypatch.setattr("rollout.probe.probe", lambda engine: None)
    model = tiny_model(family)
    change(model)
    engine = Engine(model, EngineSettings(num_kv_slots=600, attention="triton_tree"))
    engine._forward.steps = Counted(engine.runner)
    return engine


def test_experts_that_are_called_one_by_one_and_moving_rotary_frequencies_are_found(monkeypatch):
    monkeypatch.setattr("rollout.attention.triton_tree.attend", NoKernels.attend)
    one_by_one = make_engine_unprobed(
        "gpt_oss", monkeypatch, lambda model: model.set_experts_implementation("eager")
    )
    assert "nonzero in " in waits_of_a_step(one_by_one)
    config = CONFIGS["llama"]()
    config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    monkeypatch.setitem(CONFIGS, "dynamic", lambda: config)
    moving = waits_of_a_step(make_engine_unprobed("dynamic", monkeypatch))
    assert moving is not None and "modeling_rope_utils.py" in moving


@pytest.mark.parametrize(
    ("work", "name"),
    [
        (lambda x: x.sum().item(), "item"),
        (lambda x: bool((x > 0).all()), "is_nonzero"),
        (lambda x: x[x > 0], "index"),
        (lambda x: x.masked_select(x > 0), "masked_select"),
        (lambda x: torch.where(x > 0), "where"),
        (lambda x: x.unique(), "_unique2"),
        (lambda x: x.repeat_interleave(x.long()), "repeat_interleave"),
        (lambda x: x.index_put_((x > 0,), torch.zeros(())), "index_put_"),
    ],
)
def test_operations_for_which_the_host_waits_are_found(work, name):
    with torch.inference_mode(), HostWaits() as waits:
        work(torch.arange(4.0))
    assert waits.found is not None and waits.found.startswith(f"{name} in ")


def test_operations_for_which_the_host_does_not_wait_pass():
    with torch.inference_mode(), HostWaits() as waits:
        x = torch.arange(4.0)
        torch.where(x > 0, x, 0.0)[torch.tensor([1, 0])].repeat_interleave(2)
        x[torch.tensor([2])] = 1.0
    assert waits.found is None


def test_a_step_that_cannot_be_recorded_is_told_and_leaves_the_plain_way(caplog, monkeypatch):
    plain = decode(make_engine("qwen2", static=False))
    engine = make_engine("qwen2", static=True)
    steps = engine._forward.steps
    monkeypatch.setattr(steps, "_captures", True)
    monkeypatch.setattr(StaticStep, "try_out", lambda step: "nonzero in experts.py")
    monkeypatch.setattr("torch.cuda.graph_pool_handle", lambda: (0, 0))
    monkeypatch.setattr("torch.cuda.device", lambda device: nullcontext())
    with caplog.at_level(logging.WARNING):
        found = decode(engine)
    assert "Qwen2ForCausalLM decodes without CUDA graphs: the host has to wait" in caplog.text
    assert caplog.text.count("CUDA graphs") == 1 and steps.num_runs == 0
    assert [c.token_ids.tolist() for c in found] == [c.token_ids.tolist() for c in plain]


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
