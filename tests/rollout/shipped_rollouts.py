"""The rollout configurations that ship, for tests that run them all."""

from __future__ import annotations

from pathlib import Path

from omegaconf import OmegaConf

from rollout.strategies.base import STRATEGIES

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def rollouts() -> dict[str, dict]:
    """The rollout group's files, and what each experiment makes of them."""
    groups = {file.stem: group(file.stem) for file in sorted((CONFIGS / "rollout").glob("*.yaml"))}
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


def group(name: str) -> dict:
    """A file of the rollout group, with what it takes from the files that it names."""
    values = OmegaConf.to_container(OmegaConf.load(CONFIGS / "rollout" / f"{name}.yaml"))
    found: dict = {}
    for base in values.pop("defaults", []):
        found.update({} if base == "_self_" else group(base))
    return {**found, **values}


ROLLOUTS = rollouts()


def build(values):
    values = dict(values)
    strategy = STRATEGIES.get(values.pop("strategy"))
    settings = strategy.Settings(**values)
    settings.stop_token_ids = [1]
    return strategy(settings)
