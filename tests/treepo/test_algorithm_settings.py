"""A wrong combination of settings says which one is right."""

import numpy as np
import pytest
from scored_trees import flat, leaf_advantages

from treepo.advantages import estimate
from treepo.algorithm_settings import (
    ADVANTAGES,
    ESTIMATOR_TRAITS,
    NORMALISATIONS,
    AdvantageSettings,
    leaf_level_estimators,
)
from treepo.cli import compose
from treepo.config import TrainConfig
from treepo.config_checks import check_levels
from treepo.names import check_names
from treepo.train import work as train_command

ONE_PATH = ("rollout.initial_divergence_min=1", "rollout.initial_divergence_max=1")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(normalisation="std"), "normalisation='std'.*auto, tree, batch, leaves, tokens"),
        (dict(loss_weighting="token"), "loss_weighting='token'.*token_mean"),
        (dict(filter_groups_metric="accuracy"), "filter_groups_metric='accuracy'.*acc"),
        (dict(adv_eps=0.0), "^algorithm.adv_eps=0.0"),
        (dict(norm_adv_by_std_in_grpo=False), "treepo.*normalisation='none'.*'grpo'"),
        (
            dict(norm_adv_by_std_in_grpo=False, adv_estimator="rloo"),
            "not used by algorithm.adv_estimator='rloo': leave it out and set "
            "algorithm.normalisation='none'",
        ),
        (
            dict(norm_adv_by_std_in_grpo=False, adv_estimator="reinforce_pp"),
            "leave it out, or choose algorithm.adv_estimator='grpo'",
        ),
        (
            dict(norm_adv_by_std_in_grpo=False, adv_estimator="grpo", normalisation="batch"),
            "no use for algorithm.normalisation='batch'",
        ),
        (
            dict(adv_estimator="dr_grpo", normalisation="tree"),
            "'tree' is not used by algorithm.adv_estimator='dr_grpo': choose 'none', or leave",
        ),
        (
            dict(adv_estimator="reinforce_pp", normalisation="tree"),
            "choose 'leaves' or 'batch' or 'tokens' or 'release'.*'auto', which is 'leaves'",
        ),
        (
            dict(adv_estimator="spo", normalisation="leaves"),
            "not used by algorithm.adv_estimator='spo'",
        ),
        (dict(adv_estimator="tree_grpo", normalisation="batch"), "choose 'tree' or 'none'"),
        (
            dict(adv_estimator="dr_grpo", loss_weighting="sequence_mean"),
            "loss_weighting='fixed_length'.*'token_mean'.*adv_estimator='grpo'",
        ),
        (dict(treerl_sqrt_leaves=False), "not used by algorithm.adv_estimator='treepo'.*'treerl'"),
        (dict(max_num_gen_batches=0), "max_num_gen_batches=0.*>= 1"),
        (dict(max_num_gen_batches=3), "filter_groups=True"),
        (
            dict(filter_groups_metric="acc"),
            "metric='acc' is not used.*filter_groups=True",
        ),
    ],
)
def test_settings_that_contradict_themselves_say_what_to_change(changes, message):
    with pytest.raises(ValueError, match=message):
        AdvantageSettings(**changes)


@pytest.mark.parametrize("estimator", ESTIMATOR_TRAITS)
def test_every_estimator_can_be_chosen_by_its_name_alone(estimator):
    config = compose(
        "train", TrainConfig, ["+experiment=quickstart", f"algorithm.adv_estimator={estimator}"]
    )
    check_names(config)
    assert config.algorithm.divides_by == ESTIMATOR_TRAITS[estimator].auto
    assert ADVANTAGES.get(estimator).__name__ == estimator
    assert ADVANTAGES.get(estimator).__doc__


@pytest.mark.parametrize("estimator", ESTIMATOR_TRAITS)
def test_every_estimator_takes_its_normalisations_and_refuses_the_others(estimator):
    uses = ESTIMATOR_TRAITS[estimator].uses
    for normalisation in NORMALISATIONS:
        settings = dict(adv_estimator=estimator, normalisation=normalisation)
        if normalisation in ("auto", *uses):
            AdvantageSettings(**settings)
        else:
            with pytest.raises(
                ValueError, match=f"not used by algorithm.adv_estimator='{estimator}'"
            ):
                AdvantageSettings(**settings)


def test_switching_grpos_division_off_is_no_normalisation():
    settings = AdvantageSettings(adv_estimator="grpo", norm_adv_by_std_in_grpo=False)
    assert settings.divides_by == "none"


@pytest.mark.parametrize("estimator", ESTIMATOR_TRAITS)
def test_a_loss_of_whole_responses_refuses_advantages_that_differ_along_them(estimator):
    settings = AdvantageSettings(adv_estimator=estimator)
    check_levels(settings, "ppo_clip")
    if estimator in leaf_level_estimators():
        check_levels(settings, "gspo")
    else:
        with pytest.raises(ValueError, match=f"'{estimator}' gives each segment.*treepo_loo"):
            check_levels(settings, "gspo")


def test_that_refusal_comes_when_the_configuration_is_built():
    overrides = ["trainer.learner.policy_loss.name=gspo", "algorithm.adv_estimator=spo"]
    with pytest.raises(ValueError, match="policy_loss.name='gspo'.*choose a loss of tokens"):
        compose("train", TrainConfig, ["+experiment=quickstart", *overrides])


@pytest.mark.parametrize("estimator", ESTIMATOR_TRAITS)
def test_which_estimators_give_nothing_but_zeros_on_a_flat_tree_is_known_by_name(estimator):
    (found,) = estimate([flat([1.0, 0.0, 0.0])], AdvantageSettings(adv_estimator=estimator))
    by_segment = found.segment_advantage
    values = found.leaf_advantage if by_segment is None else by_segment
    assert np.any(values != 0) != ESTIMATOR_TRAITS[estimator].needs_forks
    assert np.all(leaf_advantages([flat([1.0, 1.0])], adv_estimator=estimator)[0] == 0)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rollout=flat"], "with rollout=flat there are none.*'grpo', or rollout=treepo"),
        (
            ["rollout.initial_divergence_min=16", "rollout.initial_divergence_max=16"],
            r"initial_divergence_min=16 \(rollout.n=16\).*'grpo', or .*_min and _max below 16",
        ),
    ],
)
def test_an_estimator_that_needs_forks_is_refused_where_there_are_none(overrides, message):
    quickstart, no_root = "+experiment=quickstart", "algorithm.adv_estimator=treepo_no_root"
    with pytest.raises(ValueError, match=message):
        compose("train", TrainConfig, [quickstart, no_root, *overrides])
    compose("train", TrainConfig, [quickstart, "algorithm.adv_estimator=grpo", *overrides])
    compose("train", TrainConfig, [quickstart, no_root])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["algorithm.adv_eps=inf"], "algorithm.adv_eps=inf: it must be a finite number"),
        (
            ["trainer.learner.policy_loss.kl_loss_coef=inf"],
            "trainer.learner.policy_loss.kl_loss_coef=inf: it must be a finite number",
        ),
        (
            ["trainer.learner.policy_loss.clip_ratio_c=inf"],
            "clip_ratio_c=inf: it must be a finite number, or null",
        ),
    ],
)
def test_a_setting_that_is_no_number_is_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        compose("train", TrainConfig, ["+experiment=quickstart", *overrides])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rollout.n=1", *ONE_PATH], "with rollout.n=1 there is one: .*'reinforce_pp'"),
        (["rollout.temperature=0"], "rollout.temperature=0.0 draws the same greedy response"),
    ],
)
def test_training_refuses_what_leaves_nothing_to_compare(overrides, message):
    config = compose("train", TrainConfig, ["+experiment=quickstart", *overrides])
    with pytest.raises(ValueError, match=message):
        train_command(config, dry_run=True)


def test_reinforce_pp_takes_one_response_a_prompt(capsys):
    overrides = ["+experiment=quickstart", "algorithm=reinforce_pp", "rollout.n=1", *ONE_PATH]
    train_command(compose("train", TrainConfig, overrides), dry_run=True)
    assert "24 = 24 prompts x 1" in capsys.readouterr().out
