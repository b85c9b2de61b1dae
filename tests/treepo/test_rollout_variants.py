"""Every variant of TreePO's sampling is chosen by its name on the command line."""

from __future__ import annotations

import pytest

from rollout.strategies.rule_settings import (
    BRANCHING_SCHEDULES,
    BRANCHING_SCORES,
    BRANCHINGS,
    BUDGETS,
    FALLBACK_CUTS,
    FALLBACKS,
)
from rollout.strategies.treepo import TreePO
from treepo.cli import compose
from treepo.config import TrainConfig, strategy_settings
from treepo.names import check_names
from treepo.sizes import derived_sizes

QUICKSTART = "+experiment=quickstart"
LOW = "rollout.branching=low_logprob"
CHOICES = [
    *(("branching", name) for name in BRANCHINGS),
    *(("branching_score", name, LOW) for name in BRANCHING_SCORES),
    *(("branching_schedule", name, LOW) for name in BRANCHING_SCHEDULES),
    *(
        ("budget", name, *([] if name == "width" else ["rollout.budget_tokens=256"]))
        for name in BUDGETS
    ),
    *(("fallback", name) for name in (*FALLBACKS, "none")),
    *(("fallback_cut", name) for name in FALLBACK_CUTS),
]


def configure(*overrides: str) -> TrainConfig:
    config = compose("train", TrainConfig, list(overrides))
    check_names(config)
    return config


@pytest.mark.parametrize("choice", CHOICES, ids=lambda choice: "=".join(choice[:2]))
@pytest.mark.parametrize("experiment", ["quickstart", "gsm8k"])
def test_a_variant_runs_by_its_name_from_the_command_line(choice, experiment):
    key, name, *needed = choice
    overrides = [f"+experiment={experiment}", f"rollout.{key}={name}", *needed]
    if experiment == "gsm8k" and key == "budget" and name != "width":
        overrides.append("rollout.budget_tokens=2048")
    config = configure(*overrides)
    derived_sizes(config)
    strategy_name, settings = strategy_settings(config)
    assert strategy_name == "treepo" and getattr(settings, key) == name
    TreePO(settings)  # every rule can be loaded


def test_temperatures_and_blocks_are_given_as_numbers():
    config = configure(
        QUICKSTART, LOW, "rollout.branching_schedule=linear",
        "rollout.branching_temperature=[4.0,0.5]", "rollout.fallback_cut=misaligned",
        "rollout.fallback_block_length=4",
    )  # fmt: skip
    _, settings = strategy_settings(config)
    assert settings.branching_temperature == [4.0, 0.5] and settings.block_length() == 4


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            [QUICKSTART, "rollout.fallback=none", "rollout.fallback_cut=misaligned"],
            "fallback_cut='misaligned' would not be used with fallback='none': choose fallback=",
        ),
        (
            [QUICKSTART, "rollout.branching_temperature=[2.0]"],
            "not be used with branching='even': choose branching=low_logprob, high_logprob or",
        ),
        (
            [QUICKSTART, "rollout.fallback_cut=misaligned", "rollout.fallback_block_length=64"],
            "is not less than max_response_length=64.*choose shorter blocks",
        ),
        ([QUICKSTART, "rollout.budget=level_tokens"], "budget_tokens=0.*must be >= 48"),
        ([QUICKSTART, "rollout.branching=low"], "unknown branching rule 'low'.*low_logprob"),
        (
            [QUICKSTART, "rollout.fallback=randon"],
            "unknown fallback chooser 'randon'. Did you mean 'random'",
        ),
        (["rollout=flat", "+rollout.branching=even"], "'branching'.*not used by this choice"),
    ],
)
def test_a_wrong_combination_says_which_one_is_right(overrides, message):
    with pytest.raises(ValueError, match=message):
        configure(*overrides)
