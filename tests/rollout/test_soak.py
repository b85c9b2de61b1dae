"""The soak of ``scripts/soak.py``: some seconds with every change, twenty minutes with the long
tests.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "soak.py"


@pytest.fixture(scope="module")
def soak() -> ModuleType:
    spec = importlib.util.spec_from_file_location("soak", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["soak"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_some_seconds_of_random_strategies_cancels_evictions_and_weights(soak):
    started = soak.start(None, "cpu", seed=1)
    lines = list(soak.run(started, 8.0))
    assert "MiB since" in lines[-1]
    assert started.acts["flat"] + started.acts["treepo"] > 0


def test_a_soak_notices_keys_of_older_weights(soak, monkeypatch):
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
def test_twenty_minutes_of_random_strategies_cancels_evictions_and_weights(soak):
    started = soak.start(None, "cpu", seed=0)
    for line in soak.run(started, 20 * 60):
        print(line)
    for act in ("flat", "treepo", "draft", "evict", "cancel", "load keep", "load recompute"):
        assert started.acts[act] > 100, f"{act}: {started.acts[act]}"
    assert started.acts["compared"] > 1000
