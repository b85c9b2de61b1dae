"""The soak of ``scripts/soak.py``: some seconds with every change, twenty minutes with the long
tests.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import soak

ACTS = ("flat", "treepo", "draft", "evict", "cancel", "load keep", "load recompute")


def test_some_seconds_of_random_strategies_cancels_evictions_and_weights():
    started = soak.start(None, "cpu", seed=1)
    lines = list(soak.run(started, 4.0))
    assert "MiB since" in lines[-1]
    wanted = {*ACTS, "compared", "scored"}
    for _ in range(60):  # a slow machine has not done everything yet
        if wanted <= set(started.acts):
            break
        started.episode()
    assert wanted - set(started.acts) == set()


def test_log_probs_are_compared_with_plain_attention_under_the_weights_in_force():
    started = soak.start(None, "cpu", seed=3)
    ids = started.tokens(20)
    for version in (1, 2):
        state = started.weights[version % 2]
        started.engine.load_weights(version, soak.manifest_of(state), state)
        started.version = version
        expected = started.engine.score_path(ids, 0.7)
        assert abs(started.plain_logprobs(ids, 0.7) - expected).max() < 1e-5
    started.version = 1
    assert abs(started.plain_logprobs(ids, 0.7) - expected).max() > 1e-3
    with pytest.raises(AssertionError, match="log-probs differ by .* from those of anybody"):
        started.compare(expected, expected + 1e-4, "anybody")


def test_memory_that_rises_over_the_second_half_is_noticed(monkeypatch):
    assert soak.rise([0, 1, 2, 3, 4], [900, 50, 70, 80, 90]) == pytest.approx(20)
    assert soak.rise([0, 1, 2, 3, 4], [0, 50, 70, 70, 70]) == pytest.approx(0)
    started = soak.start(None, "cpu", seed=1)
    clock = SimpleNamespace(now=0.0, bytes_per_second=0)
    monkeypatch.setattr(soak, "time", SimpleNamespace(monotonic=lambda: clock.now))
    monkeypatch.setattr(soak, "resident_bytes", lambda: int(clock.now * clock.bytes_per_second))
    monkeypatch.setattr(started, "episode", lambda: setattr(clock, "now", clock.now + 1))
    clock.bytes_per_second = 200 << 10  # episodes end at 61, ..., 120 s in the second half: 59 s
    with pytest.raises(AssertionError, match="rises by 12083200 bytes over the second half"):
        list(soak.run(started, 120))
    clock.now, clock.bytes_per_second = 0.0, 100 << 10
    assert "rises by +5.8 MiB over the second half" in list(soak.run(started, 120))[-1]


def test_a_soak_notices_keys_of_older_weights(monkeypatch):
    """The check can fail: weights that change while the cache stays are noticed."""
    started = soak.start(None, "cpu", seed=1)
    store = started.engine.store

    def keep_the_cache(version: int, in_flight: str) -> None:
        store.tree.roots[version] = store.tree.roots.pop(store.policy_version)
        store.policy_version = version
        started.engine._decoder.note_version(version)

    monkeypatch.setattr(started.engine, "_put_in_force", keep_the_cache)
    with pytest.raises(AssertionError, match="log-probs differ"):
        list(soak.run(started, 30.0))


@pytest.mark.long
@pytest.mark.timeout(1500)
def test_twenty_minutes_of_random_strategies_cancels_evictions_and_weights():
    started = soak.start(None, "cpu", seed=0)
    for line in soak.run(started, 20 * 60):
        print(line)
    for act in ACTS:
        assert started.acts[act] > 100, f"{act}: {started.acts[act]}"
    assert started.acts["compared"] > 1000
