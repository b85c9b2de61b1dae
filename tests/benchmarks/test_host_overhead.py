"""The clocks of the host overhead benchmark: they stand where the work is, and go away again."""

from __future__ import annotations

import host_overhead
import numpy as np
from host_overhead import PARTS
from shapes import qwen3_7m

from rollout import Engine, EngineSettings, ExtendSpec


def test_every_part_of_a_step_is_clocked_and_nothing_stays_behind():
    places = [place for part in PARTS.values() for place in part]
    before = [getattr(owner, name) for owner, name in places]
    engine = Engine(qwen3_7m(), EngineSettings(num_kv_slots=512))
    node = engine.prefill(np.arange(1, 9))
    for i in range(3):
        engine.submit(node, ExtendSpec(max_tokens=8), 1 + i)
    engine.step()
    with host_overhead.clocks() as spent:
        for _ in range(4):
            engine.step()
    assert min(spent.values()) > 0, spent
    assert [getattr(owner, name) for owner, name in places] == before


def test_a_steady_step_is_the_sum_of_its_parts():
    engine = Engine(qwen3_7m(), EngineSettings(num_kv_slots=1024))
    found = host_overhead.decode_steps(engine, num_running=4, steps=3)
    assert set(found) == {*PARTS, "scheduler"} and min(found.values()) > 0
    assert engine.is_idle
