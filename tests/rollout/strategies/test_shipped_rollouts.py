"""Every shipped rollout configuration grows trees, its fallback included."""

from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf

from rollout.strategies.base import STRATEGIES

CONFIGS = Path(__file__).resolve().parents[3] / "configs"


def rollouts() -> dict[str, dict]:
    """The rollout group's files, and what each experiment makes of them."""
    groups = {
        file.stem: OmegaConf.to_container(OmegaConf.load(file))
        for file in sorted((CONFIGS / "rollout").glob("*.yaml"))
    }
    found = dict(groups)
    for file in sorted((CONFIGS / "experiment").glob("*.yaml")):
        experiment = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
        choices = {}
        for entry in experiment.get("defaults", []):
            choices.update(entry if isinstance(entry, dict) else {})
        choice = choices.get("override /rollout")
        changes = experiment.get("rollout")
        if choice or changes:
            base = groups[choice or (changes or {}).get("strategy", "treepo")]
            found[f"experiment {file.stem}"] = {**base, **(changes or {})}
    return found


ROLLOUTS = rollouts()


def build(values):
    values = dict(values)
    strategy = STRATEGIES.get(values.pop("strategy"))
    settings = strategy.Settings(**values)
    settings.stop_token_ids = [1]
    return strategy(settings)


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
