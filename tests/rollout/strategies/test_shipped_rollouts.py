"""Every shipped rollout configuration grows trees, its fallback included."""

import numpy as np
import pytest
from shipped_rollouts import ROLLOUTS, build


@pytest.mark.parametrize("name", ROLLOUTS)
def test_a_shipped_rollout_fills_its_width_after_early_ends(drive, name):
    """Most paths end in their first segments, so that TreePO's fallback runs."""
    strategy = build(ROLLOUTS[name])
    length = getattr(strategy.settings, "segment_length", 512)
    fallbacks = 0
    for key in range(6):
        rate = (3.0 if key % 2 else 1.0) / length
        script = drive.random_script(min(0.9, rate), vocabulary=30_000)
        engine = drive.ScriptedEngine(script)
        tree = drive.grow(strategy, drive.prompt(key), engine)
        for segment in tree.segments[1:]:
            before = drive.path_tokens(tree.segments, segment.parent)
            assert np.array_equal(engine.prompts[segment.path_key], before)
        if getattr(strategy.settings, "fallback", "none") != "none":
            assert tree.num_leaves == strategy.settings.n
        fallbacks += tree.counters.fallbacks
    if getattr(strategy.settings, "fallback", "none") != "none":
        assert fallbacks > 0


def test_the_published_rollout_group_is_found():
    assert {"flat", "treepo"} <= set(ROLLOUTS)
