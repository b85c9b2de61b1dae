"""Held-out problems and how responses to them are drawn: the same in training's own evaluations and
in the evaluation command, so that their scores agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rollout.strategies.settings import FlatSettings, SamplingSettings
from rollout.tree import Tree
from treepo.cluster import Cluster
from treepo.config import TrainConfig, strategy_settings
from treepo.data import Problem, held_out, load_problems
from treepo.data_settings import DataSettings
from treepo.evaluation import SamplingPass, greedy_and_sampled
from treepo.step import make_prompts


def load_splits(
    config: TrainConfig, tokenizer: Any, training: Sequence[Problem] | None = None
) -> dict[str, list[Problem]]:
    """Held-out problems by split: without those that are also trained on, unless a split allows
    them.

    Args:
        training: the training problems, if they are loaded already.
    """

    def load(data: DataSettings) -> list[Problem]:
        return load_problems(data, tokenizer, config.max_prompt_length)

    settings = config.evaluation.splits
    strict = any(data.on_overlap != "allow" for data in settings.values())
    if training is None:
        training = load(config.data) if strict else []
    return {
        name: held_out(load(data), training, name=name, on_overlap=data.on_overlap)
        for name, data in settings.items()
    }


def evaluation_passes(config: TrainConfig, seed: int) -> tuple[SamplingPass, SamplingPass]:
    """The greedy and the sampled pass of ``config.evaluation``."""
    settings = config.evaluation
    _, strategy = strategy_settings(config)
    return greedy_and_sampled(
        num_samples=settings.num_samples,
        temperature=settings.temperature,
        top_p=settings.top_p,
        max_response_length=settings.max_response_length or strategy.max_response_length,
        seed=seed,
    )


def sample_flat(
    cluster: Cluster,
    problems: Sequence[Problem],
    settings: SamplingPass,
    stops: SamplingSettings,
    policy_version: int = 0,
) -> list[Tree]:
    """Independent responses to each problem, by the weights of ``policy_version``; they end as the
    rollout's, whose settings are ``stops``, do.
    """
    flat: Any = replace(
        FlatSettings(),
        n=settings.num_samples,
        temperature=settings.temperature,
        top_p=settings.top_p,
        top_k=settings.top_k,
        min_p=settings.min_p,
        max_response_length=settings.max_response_length,
        stop_token_ids=stops.stop_token_ids,
        stop_token_sequences=stops.stop_token_sequences,
        stop_strings=stops.stop_strings,
    )
    prompts = make_prompts(problems, settings.seed, "evaluate", settings.name)
    trees, _ = cluster.sample(prompts, "flat", flat, policy_version)
    return trees
