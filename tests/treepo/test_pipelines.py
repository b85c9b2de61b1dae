"""What the asynchronous pipeline needs is checked before work, and said."""

from __future__ import annotations

import pytest

from treepo.cli import compose
from treepo.config import TrainConfig
from treepo.resources import check_resources
from treepo.sizes import derived_sizes

QUICKSTART = "+experiment=quickstart_async"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["trainer.pipeline=asynch"],
            "trainer.pipeline='asynch' is unknown.*sync, one_step, async",
        ),
        (["trainer.segments.stop_when_finished=4"], "stop_when_finished=4 .*stop_when_finished=0"),
        (
            ["cluster.colocate=true"],
            "cluster.colocate=True .*colocate=false, which needs 2 CPUs and 0 GPUs",
        ),
        (["cluster.weight_transport=group"], "weight_transport='group' .*=object_store"),
        (["trainer.segments.max_staleness=0"], "max_staleness=0 .*max_staleness=2, say"),
        (["trainer.segments.refill=constant"], "refill='constant' .*refill=keep_in_flight"),
        (["trainer.segments.train_on=all"], "train_on='all' .*train_on=full_batch"),
        (
            ["trainer.segments.group_policy=finished_part"],
            "group_policy='finished_part' .*group_policy=wait_all",
        ),
        (
            ["trainer.learner.off_policy.correction=none"],
            "old_logprobs='recomputed' .*decoupled, tis or icepop, or .*old_logprobs=sampled",
        ),
        (
            [
                "trainer.learner.off_policy.correction=none",
                "trainer.learner.old_logprobs=sampled",
                "trainer.learner.policy_loss.name=reinforce",
            ],
            "policy_loss.name='reinforce' has no ratio .*decoupled, tis or icepop, or choose",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused_with_what_does(overrides, message):
    with pytest.raises(ValueError, match=message):
        compose("train", TrainConfig, [QUICKSTART, *overrides])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["cluster.colocate=true"], "colocate=True .*pipeline='one_step'.*which needs 2 CPUs"),
        (
            ["trainer.segments.segment_length=16", "trainer.segments.max_staleness=1"],
            "max_staleness=1 lets no tree go on .*to 2 or more, or to 0",
        ),
        (
            ["trainer.learner.off_policy.correction=none"],
            "old_logprobs='recomputed' .*pipeline='one_step'.*decoupled, tis or icepop",
        ),
    ],
)
def test_the_one_step_pipeline_refuses_what_does_not_fit(overrides, message):
    with pytest.raises(ValueError, match=message):
        compose("train", TrainConfig, ["+experiment=quickstart_one_step", *overrides])


@pytest.mark.parametrize(
    "choices",
    [
        ["cluster.weight_transport=group"],
        ["algorithm=dynamic"],
        ["trainer.segments.segment_length=16", "trainer.segments.group_policy=finished_part"],
        ["trainer.learner.off_policy.correction=none", "trainer.learner.old_logprobs=sampled"],
    ],
)
def test_the_one_step_pipeline_goes_with_what_a_synchronous_step_does(choices):
    words = ["+experiment=quickstart_one_step", *choices]
    assert compose("train", TrainConfig, words).trainer.pipeline == "one_step"


@pytest.mark.parametrize("experiment", ["quickstart_async", "quickstart_one_step"])
@pytest.mark.parametrize(
    ("learner", "rank", "gate"), [("ulorl", 0, "response"), ("lora", 32, "never")]
)
def test_a_learner_is_chosen_whatever_the_pipeline(experiment, learner, rank, gate):
    plain, chosen = (
        compose("train", TrainConfig, [f"+experiment={experiment}", *words]).trainer
        for words in ([], [f"learner={learner}"])
    )
    assert (chosen.pipeline, chosen.segments) == (plain.pipeline, plain.segments)
    assert chosen.learner.off_policy.correction == "decoupled"
    assert (chosen.learner.lora.rank, chosen.learner.mpt.gate) == (rank, gate)


def test_a_dry_run_says_that_sampling_is_a_step_ahead():
    config = compose("train", TrainConfig, ["+experiment=quickstart_one_step"])
    assert "a version of the weights older" in derived_sizes(config)["sampling and learning"]


def test_whole_responses_do_not_fit_and_segments_are_named():
    with pytest.raises(ValueError, match="segment_length=0 .*segment_length=16, say"):
        compose(
            "train",
            TrainConfig,
            ["+experiment=quickstart", "trainer.pipeline=async", "cluster.colocate=false"],
        )


@pytest.mark.parametrize(
    "choices",
    [
        [],
        ["trainer.learner.off_policy.correction=tis"],
        ["trainer.learner.off_policy.correction=icepop"],
        ["trainer.learner.off_policy.correction=none", "trainer.learner.old_logprobs=sampled"],
        ["trainer.segments.on_stale=drop", "trainer.segments.submit=longest_first"],
        ["trainer.learner.policy_loss.name=reinforce"],
        ["rollout=treepo_short", "algorithm=treepo"],
    ],
)
def test_what_accounts_for_older_weights_may_be_chosen(choices):
    config = compose("train", TrainConfig, [QUICKSTART, *choices])
    assert config.trainer.pipeline == "async" and not config.cluster.colocate


def test_processes_for_both_sides_are_asked_for_at_once():
    config = compose("train", TrainConfig, [QUICKSTART, "cluster.num_rollout_workers=3"])
    check_resources(config.cluster, {"CPU": 4.0, "GPU": 0.0})
    with pytest.raises(ValueError, match="3 x 1 and .*at the same time, need 4.*1 missing"):
        check_resources(config.cluster, {"CPU": 3.0, "GPU": 0.0})


@pytest.mark.parametrize(("chosen", "grow"), [(0, 48), (30, 30), (500, 72)])
def test_a_dry_run_says_how_much_is_under_way(chosen, grow):
    """24 prompts a batch and a cap of 2: 72 begun at most, 48 grow by default."""
    words = [f"trainer.segments.prompts_in_flight={chosen}", "trainer.segments.max_staleness=2"]
    config = compose("train", TrainConfig, [QUICKSTART, *words])
    text = derived_sizes(config)["sampling and learning"]
    assert f"{grow} trees grow, at most 72 prompts" in text and "more than 2 versions" in text
