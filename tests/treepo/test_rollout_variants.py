"""Every variant of TreePO's sampling is chosen by its name on the command line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rollout.strategies.finish import answer_detectors
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
from treepo.opening import load_inputs
from treepo.sizes import derived_sizes
from treepo.train import work

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
            "fallback_cut='misaligned' would not be used with rollout.fallback='none': choose",
        ),
        (
            [QUICKSTART, "rollout.branching_temperature=[2.0]"],
            "not be used with rollout.branching='even': choose rollout.branching=low_logprob, ",
        ),
        (
            [QUICKSTART, "rollout.fallback_cut=misaligned", "rollout.fallback_block_length=64"],
            "is not less than rollout.max_response_length=64.*choose shorter blocks",
        ),
        ([QUICKSTART, "rollout.budget=level_tokens"], "budget_tokens=0.*must be >= 48"),
        ([QUICKSTART, "rollout.branching=low"], "unknown branching rule 'low'.*low_logprob"),
        (
            [QUICKSTART, "rollout.fallback=randon"],
            "unknown fallback chooser 'randon'. Did you mean 'random'",
        ),
        (
            ["rollout=flat", "+rollout.branching=even", "+rollout.treeness=3"],
            "'branching', 'treeness' is not used.*take out.*~rollout.branching ~rollout.treeness$",
        ),
    ],
)
def test_a_wrong_combination_says_which_one_is_right(overrides, message):
    with pytest.raises(ValueError, match=message):
        configure(*overrides)


@pytest.mark.parametrize("experiment", ["quickstart", "gsm8k"])
def test_an_experiment_goes_on_flat_responses_by_two_words(experiment, capsys):
    tree = configure(f"+experiment={experiment}")
    config = configure(f"+experiment={experiment}", "rollout=flat", "algorithm=grpo")
    name, settings = strategy_settings(config)
    assert name == "flat" and config.algorithm.adv_estimator == "grpo"
    for key in ("n", "max_response_length"):
        assert getattr(settings, key) == tree.rollout[key]
    work(config, True)
    assert "strategy: flat" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("experiment", "expected"),
    [
        ("quickstart", dict(n=16, length=64, segment=6, depth=11, divergence=(8, 8))),
        ("gsm8k", dict(n=8, length=512, segment=128, depth=4, divergence=(2, 2))),
    ],
)
def test_the_trees_of_an_experiment_have_its_shape(experiment, expected):
    _, settings = strategy_settings(configure(f"+experiment={experiment}"))
    assert expected == dict(
        n=settings.n,
        length=settings.max_response_length,
        segment=settings.segment_length,
        depth=settings.max_depth,
        divergence=(settings.initial_divergence_min, settings.initial_divergence_max),
    )


@pytest.mark.parametrize("finish", ["boxed_and_eos", "boxed_as_eos"])
def test_a_boxed_finish_needs_one_key_and_reads_the_models_own_text(finish, capsys):
    config = configure(QUICKSTART, f"rollout.finish={finish}", "data.size=64")
    work(config, True)
    assert f"finish: {finish}" in capsys.readouterr().out
    inputs = load_inputs(config)
    assert config.rollout["answer_tokenizer"] == ""  # what was asked for stays as it was
    _, settings = inputs.strategy
    (detector,) = answer_detectors(settings)
    text = np.array([inputs.tokenizer.eos_token_id])
    assert settings.answer_tokenizer == inputs.model_path and not detector(text)


def test_a_shipped_models_tokenizer_reads_answers(tiny_model_path):
    overrides = ["rollout.finish=boxed_as_eos", "rollout.answer_tokenizer=asset:tiny_chain_sum"]
    _, settings = load_inputs(configure(QUICKSTART, "data.size=64", *overrides)).strategy
    assert Path(settings.answer_tokenizer) == tiny_model_path


def test_another_way_to_see_answers_is_not_joined_by_the_models_tokenizer():
    overrides = ["rollout.finish=boxed_as_eos", "rollout.answer_token_ids=[[5]]"]
    _, settings = load_inputs(configure(QUICKSTART, "data.size=64", *overrides)).strategy
    assert settings.answer_tokenizer == ""


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rollout.answer_tokenizer=asset:huge", "not shipped; shipped: tiny_chain_sum"),
        ("rollout.answer_tokenizer=no/such/folder", "rollout.answer_tokenizer=.*no such folder"),
        ("rollout.answer_detector=nofile.py:f", "answer_detector file 'nofile.py' does not exist"),
        ("rollout.answer_detector=f", "answer_detector 'f': expected 'module:function'"),
        ("rollout.branching=nofile.py:f", "branching rule file 'nofile.py' does not exist"),
        ("algorithm.adv_estimator=nofile.py:f", "estimator file 'nofile.py' does not exist"),
    ],
)
def test_what_is_not_there_shows_in_a_dry_run(override, message):
    with pytest.raises(ValueError, match=message):
        work(configure(QUICKSTART, "rollout.finish=boxed_as_eos", override), True)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rollout.answer_tokenizer=someone/tiny", "'someone/tiny': no tokenizer can be loaded"),
        ("rollout.answer_detector=math:no_such", "math has no 'no_such'"),
        ("rollout.branching=math:no_such", "math has no 'no_such'"),
    ],
)
def test_what_cannot_be_loaded_shows_before_any_worker_starts(override, message):
    config = configure(QUICKSTART, "data.size=64", "rollout.finish=boxed_as_eos", override)
    with pytest.raises(ValueError, match=message):
        load_inputs(config)
