"""Looks up every name in a configuration before any work: a typo costs a second, not a run."""

from __future__ import annotations

from pathlib import Path

from rewards.registry import check_parts
from treepo.config import TrainConfig, strategy_settings


def check_names(config: TrainConfig) -> None:
    """Look up every name that a training run will ask a registry for.

    Raises:
        ValueError: an unknown name; the message lists the known ones.
    """
    from trainers.settings import POLICY_LOSSES
    from treepo.advantages import ADVANTAGES
    from treepo.data import DATA_SOURCES

    strategy_settings(config)
    ADVANTAGES.check(config.algorithm.adv_estimator)
    POLICY_LOSSES.check(config.trainer.learner.policy_loss.name)
    for data in (config.data, *config.evaluation.splits.values()):
        DATA_SOURCES.check(data.source)
    check_parts(config.reward)
    for label, part in config.reward.parts.items():
        file, colon, _ = part.name.rpartition(":")
        if colon and file.endswith(".py") and not Path(file).expanduser().is_file():
            raise ValueError(f"reward.parts.{label}.name={part.name!r}: there is no file {file}")
