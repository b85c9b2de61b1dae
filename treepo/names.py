"""Looks up every name in a configuration before any work: a typo costs a second, not a run."""

from __future__ import annotations

from rewards.registry import check_parts
from treepo.config import TrainConfig, resolve_tokenizer_path, strategy_settings


def check_names(config: TrainConfig) -> None:
    """Look up every name that a training run will ask a registry for.

    Raises:
        ValueError: an unknown name (the message lists the known ones), or user code whose file is
            missing.
    """
    from trainers.settings import POLICY_LOSSES
    from treepo.advantages import ADVANTAGES
    from treepo.data import DATA_SOURCES

    check_strategy(config)
    ADVANTAGES.check(config.algorithm.adv_estimator)
    POLICY_LOSSES.check(config.trainer.learner.policy_loss.name)
    for data in (config.data, *config.evaluation.splits.values()):
        DATA_SOURCES.check(data.source)
    check_parts(config.reward)


def check_strategy(config: TrainConfig) -> None:
    """Look up what the rollout names: its settings check the rules, the tokenizer is a path."""
    _, settings = strategy_settings(config)
    if tokenizer := getattr(settings, "answer_tokenizer", ""):
        resolve_tokenizer_path(tokenizer, field_name="rollout.answer_tokenizer")
