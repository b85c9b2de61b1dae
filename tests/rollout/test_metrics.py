"""What the engine says of its work, worked out by hand."""

from __future__ import annotations

import pytest
from tiny_models import tiny_model

from rollout.engine import Engine
from rollout.extend import ExtendSpec
from rollout.metrics import CostLedger
from rollout.settings import EngineSettings

PROMPT = [3, 5, 7, 9, 11, 13, 2]


def make_engine(**settings) -> Engine:
    return Engine(tiny_model("qwen3"), EngineSettings(**{"num_kv_slots": 1024, **settings}))


def test_hits_and_shared_tokens_are_counted_by_segment():
    engine = make_engine()
    node = engine.prefill(PROMPT)
    first = list(engine.extend([(node, ExtendSpec(max_tokens=4), key) for key in range(8)]))
    costs = engine.metrics()
    # eight segments below seven tokens; the prompt's slots are there for the second to the eighth
    assert (costs.path_tokens, costs.cached_tokens) == (8 * 7, 7 * 7)
    assert costs.hit_rate == pytest.approx(7 / 8)
    # alone each would forward 7 + 3 rows: 80; together 7 + 8 * 3
    assert costs.query_tokens == 31
    assert costs.shared_token_ratio == pytest.approx(1 - 31 / 80)
    assert (costs.generated_tokens, costs.segments) == (32, 8)
    engine.reset_metrics()
    list(engine.extend([(first[0].node, ExtendSpec(max_tokens=2), 9)]))
    assert engine.metrics().path_tokens == 11
    assert engine.metrics().tokens_per_second > 0


def test_sharing_switched_off_shares_nothing():
    engine = make_engine(share_prefixes=False)
    node = engine.prefill(PROMPT)
    list(engine.extend([(node, ExtendSpec(max_tokens=4), key) for key in range(8)]))
    costs = engine.metrics()
    assert costs.query_tokens == 80 and costs.cached_tokens == 0
    assert costs.hit_rate == 0 and costs.shared_token_ratio == 0


def test_an_idle_ledger_divides_by_nothing():
    empty = CostLedger()
    assert (empty.hit_rate, empty.shared_token_ratio, empty.tokens_per_second) == (0, 0, 0)


def test_gauges_tell_waiting_running_live_cached_and_free():
    engine = make_engine(max_running_requests=2)
    node = engine.prefill(PROMPT)
    for key in range(3):
        engine.submit(node, ExtendSpec(max_tokens=5), key)
    assert engine.gauges().num_waiting == 3
    done = engine.step()
    gauges = engine.gauges()
    assert (gauges.num_waiting, gauges.num_running) == (1, 2)
    assert gauges.slots_live == gauges.slots_held == len(PROMPT) + 2 * 5
    while not engine.is_idle:
        done += engine.step()
    for completion in done:
        engine.free(completion.node)
    engine.free(node)
    gauges = engine.gauges()
    assert (gauges.num_waiting, gauges.num_running, gauges.slots_live) == (0, 0, 0)
    assert gauges.slots_cached == len(PROMPT) + 3 * 5
    assert gauges.slots_free == 1024 - gauges.slots_cached
    assert gauges.kv_bytes_per_slot == engine.pool.bytes_per_slot > 0


def test_a_request_may_be_cancelled_while_its_siblings_stream():
    engine = make_engine()
    node = engine.prefill(PROMPT)
    lengths = (2, 30, 4)
    found = []
    for completion in engine.extend([(node, ExtendSpec(max_tokens=n), n) for n in lengths]):
        if not found:
            assert engine.cancel(completion.request_id + 1)  # the long one
        found.append(len(completion.token_ids))
    assert found == [2, 4]
    assert engine.is_idle and engine.metrics().cancelled == 1
    assert not engine.cancel(99)
    engine.check_integrity()


def test_lower_priority_is_evicted_first_and_soft_handles_likewise():
    engine = make_engine(num_kv_slots=64)
    first, second = engine.prefill([1] * 20), engine.prefill([2] * 20)
    for node in (first, second):
        (drawn,) = engine.extend([(node, ExtendSpec(max_tokens=1), 1)])
        engine.free(drawn.node, drop=True)
    engine.set_priority(first, 1)  # older, but worth more
    for node in (first, second):
        engine.soften(node)
    third = engine.prefill([3] * 20)
    list(engine.extend([(third, ExtendSpec(max_tokens=10), 1)]))
    assert first.is_locked and not second.is_locked
    assert first.tree_node.is_alive and not second.tree_node.is_alive
    engine.check_integrity()
