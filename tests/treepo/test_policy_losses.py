"""Policy losses as the configuration chooses them, and the advantages that fit them."""

from pathlib import Path

import pytest
from scored_trees import irregular
from training_runs import SMALL

from treepo.advantages import estimate
from treepo.cli import compose
from treepo.config import TrainConfig
from treepo.names import check_names
from treepo.samples import token_trees
from treepo.sft_settings import SFTSettings
from treepo.step import mini_batches

CLIP = "trainer.learner.policy_loss.clip_ratio"
NAME = "trainer.learner.policy_loss.name"
KL = [
    "trainer.learner.policy_loss.kl_loss_coef=0.01",
    "trainer.learner.policy_loss.kl_loss_type=k2",
]


def configure(*overrides: str) -> TrainConfig:
    config = compose("train", TrainConfig, [*SMALL, *overrides])
    check_names(config)
    return config


@pytest.mark.parametrize("name", ["ppo_clip", "gspo", "cispo", "reinforce"])
def test_every_loss_is_chosen_by_its_name_with_and_without_a_kl_penalty(name):
    loss = configure(f"{NAME}={name}").trainer.learner.policy_loss
    assert loss.name == name and loss.kl_loss_coef == 0
    assert configure(f"{NAME}={name}", *KL).trainer.learner.policy_loss.kl_loss_type == "k2"


def test_the_supervised_loss_is_refused_in_training_by_rewards_and_kept_for_sft():
    with pytest.raises(ValueError, match="'nll' leaves.*treepo.sft alone: choose ppo_clip, gspo"):
        configure(f"{NAME}=nll")
    sft = compose(
        "sft", SFTSettings, ["+experiment=make_tiny_model", "learner.policy_loss.name=nll"]
    )
    assert sft.learner.policy_loss.name == "nll"


THEIRS = """
from trainers.losses import gspo, nll, ppo_clip
from trainers.settings import has_traits

@has_traits(is_sequence_level=True, clip_ratio_low=3e-4, clip_ratio_high=4e-4)
def of_responses(tokens, settings):
    return gspo(tokens, settings)

@has_traits(uses_advantages=False)
def imitate(tokens, settings):
    return nll(tokens, settings)

def of_tokens(tokens, settings):
    return ppo_clip(tokens, settings)
"""


def test_a_users_loss_says_itself_what_it_is(tmp_path):
    file = tmp_path / "their_losses.py"
    file.write_text(THEIRS)
    loss = configure(f"{NAME}={file}:of_responses").trainer.learner.policy_loss
    assert (loss.bounds().low, loss.bounds().high) == pytest.approx((1 - 3e-4, 1 + 4e-4))
    with pytest.raises(ValueError, match="clip_ratio_c=3.0 is not used by.*of_responses"):
        configure(f"{NAME}={file}:of_responses", f"{CLIP}_c=3.0")
    with pytest.raises(ValueError, match="one advantage a response, but .*'spo'"):
        configure(f"{NAME}={file}:of_responses", "algorithm.adv_estimator=spo")
    with pytest.raises(ValueError, match="one term a response"):
        updates_with(f"{file}:of_responses", "treepo.advantages.spo:spo")
    with pytest.raises(ValueError, match="imitate.*treepo.sft alone"):
        configure(f"{NAME}={file}:imitate")
    # one that says nothing is of tokens, with ppo_clip's bounds
    plain = configure(f"{NAME}={file}:of_tokens", "algorithm.adv_estimator=spo", f"{CLIP}_c=3.0")
    assert plain.trainer.learner.policy_loss.bounds().high == pytest.approx(1.28)
    with pytest.raises(ValueError, match="has no 'of_leaves'"):
        configure(f"{NAME}={file}:of_leaves")


def test_recomputed_old_logprobs_are_refused_where_the_loss_has_no_ratio():
    recomputed = "trainer.learner.old_logprobs=recomputed"
    assert configure(recomputed).trainer.learner.old_logprobs == "recomputed"
    with pytest.raises(ValueError, match="has no ratio.*ppo_clip or gspo or cispo"):
        configure(recomputed, f"{NAME}=reinforce")
    with pytest.raises(ValueError, match="old_logprobs='verl': must be one of sampled, recomputed"):
        configure("trainer.learner.old_logprobs=verl")


MPT = "trainer.learner.mpt"
OFF = "trainer.learner.off_policy"


def test_corrections_and_masks_are_chosen_by_name():
    learner = configure().trainer.learner
    assert learner.off_policy.correction == "none" and learner.mpt.gate == "never"
    assert learner.off_policy.mask_older_than is None
    words = [f"{OFF}.correction=tis", f"{OFF}.mask_older_than=0"]
    tis = configure("learner=ulorl", "trainer.segments.segment_length=16", *words)
    learner = tis.trainer.learner
    assert (learner.old_logprobs, learner.mpt.gate) == ("recomputed", "response")
    assert learner.off_policy.largest_weight == 2 and learner.off_policy.mask_older_than == 0
    words = [f"{OFF}.correction=icepop", f"{OFF}.band=[0.2,8]", f"{MPT}.gate=batch"]
    learner = configure("learner=ulorl", *words).trainer.learner
    assert learner.off_policy.kept_band == (0.2, 8.0) and learner.mpt.gate == "batch"
    words = [f"{OFF}.correction=decoupled", f"{OFF}.cap=5", f"{MPT}.gate=always"]
    learner = configure("learner=ulorl", *words).trainer.learner
    assert learner.off_policy.largest_weight == 5 and learner.mpt.gate == "always"
    with pytest.raises(ValueError, match="correction='tis'.*set old_logprobs='recomputed'"):
        configure(f"{OFF}.correction=tis")


def test_reinforce_takes_recomputed_logprobs_for_a_correction_alone():
    words = [f"{NAME}=reinforce", "trainer.learner.old_logprobs=recomputed"]
    assert configure(*words, f"{OFF}.correction=tis").trainer.learner.off_policy.correction == "tis"
    with pytest.raises(ValueError, match="has no ratio.*off_policy.correction, such as 'tis'"):
        configure(*words)


ONE_STEP = ["trainer=one_step", "cluster.colocate=false"]
SEGMENTS = "trainer.segments.segment_length=16"


@pytest.mark.parametrize(
    ("age", "words", "message"),
    [
        (
            0,
            [],
            "never masks .*'sync', .*segment_length=0 .* are 0 to 0 versions old .*: leave it out$",
        ),
        (
            2,
            [SEGMENTS, "trainer.segments.max_staleness=2"],
            "never masks .* are 0 to 2 versions .*or set it to 0 to 1$",
        ),
        (1, ONE_STEP, "never masks .*'one_step', .* are 1 to 1 versions old .*: leave it out$"),
        (0, ONE_STEP, "masks every token.* 1 to 1 versions old .*: leave it out$"),
        (
            0,
            [*ONE_STEP, SEGMENTS],
            "masks every token.* 1 or more versions .*leave it out, or set it to 1 or more$",
        ),
        (
            3,
            [*ONE_STEP, SEGMENTS, "trainer.segments.max_staleness=3"],
            "never masks .*max_staleness=3 .*or set it to 1 to 2$",
        ),
    ],
)
def test_a_mask_of_ages_that_no_token_has_or_that_all_have_is_refused(age, words, message):
    with pytest.raises(ValueError, match=f"mask_older_than={age} {message}"):
        configure(*words, f"{OFF}.mask_older_than={age}")


@pytest.mark.parametrize(
    ("age", "words"),
    [
        (0, [SEGMENTS]),
        (9, [SEGMENTS]),
        (1, [SEGMENTS, "trainer.segments.max_staleness=2"]),
        (1, [*ONE_STEP, SEGMENTS]),
        (1, [*ONE_STEP, SEGMENTS, "trainer.segments.max_staleness=2"]),
    ],
)
def test_a_mask_of_ages_that_some_tokens_have_is_taken(age, words):
    learner = configure(*words, f"{OFF}.mask_older_than={age}").trainer.learner
    assert learner.off_policy.mask_older_than == age


def test_masks_that_do_not_fit_the_algorithm_are_refused():
    node_level = "algorithm.adv_estimator=spo"
    with pytest.raises(ValueError, match="mpt.gate='always'.*'spo' gives.*choose.*treepo"):
        configure(f"{MPT}.gate=always", node_level)
    theirs = "algorithm.adv_estimator=treepo.advantages.spo:spo"
    with pytest.raises(ValueError, match="mpt.gate='response' masks.*differ from token to token"):
        updates_with("ppo_clip", "treepo.advantages.spo:spo", f"{MPT}.gate=response")
    assert configure(theirs) and updates_with("ppo_clip", "treepo", f"{MPT}.gate=response")
    outside = f"{MPT}.masked_in_denominator=false"
    assert configure(f"{MPT}.gate=always", outside)
    with pytest.raises(ValueError, match="mpt.masked_in_denominator=False.*'fixed_length'"):
        configure(f"{MPT}.gate=always", outside, "algorithm.loss_weighting=fixed_length")
    outside = [f"{OFF}.mask_older_than=1", f"{OFF}.masked_in_denominator=false"]
    with pytest.raises(ValueError, match="off_policy.masked_in_denominator=False.*constant"):
        configure(*outside, "algorithm=dr_grpo")


# The algorithms that papers name, as words of the command line; docs/algorithms.md has them too.
PAPERS = {
    "PPO-clip": (
        [f"{CLIP}_high=0.2"],
        {"name": "ppo_clip", "low": 0.8, "high": 1.2},
        {"loss_weighting": "token_mean"},
    ),
    "DAPO": (
        ["algorithm=dapo"],
        {"name": "ppo_clip", "low": 0.8, "high": 1.28},
        {"adv_estimator": "grpo", "loss_weighting": "token_mean", "max_num_gen_batches": 10},
    ),
    "GSPO": (
        ["algorithm=grpo", f"{NAME}=gspo", "algorithm.loss_weighting=sequence_mean"],
        {"name": "gspo", "low": 1 - 3e-4, "high": 1 + 4e-4},
        {"adv_estimator": "grpo", "loss_weighting": "sequence_mean"},
    ),
    "CISPO": (
        ["algorithm=grpo", f"{NAME}=cispo"],
        {"name": "cispo", "low": 0.0, "high": 1.28},
        {"adv_estimator": "grpo", "loss_weighting": "token_mean"},
    ),
    "Dr. GRPO": (
        ["algorithm=dr_grpo", f"{CLIP}_high=0.2"],
        {"name": "ppo_clip", "low": 0.8, "high": 1.2},
        {"adv_estimator": "dr_grpo", "loss_weighting": "fixed_length", "divides_by": "none"},
    ),
    "REINFORCE": (
        ["algorithm=reinforce_pp", f"{NAME}=reinforce"],
        {"name": "reinforce", "low": 0.0, "high": float("inf")},
        {"adv_estimator": "reinforce_pp", "filter_groups": False},
    ),
}


@pytest.mark.parametrize("paper", PAPERS)
def test_every_algorithm_that_papers_name_is_a_few_words_on_the_command_line(paper):
    words, loss, algorithm = PAPERS[paper]
    config = configure(*words)
    settings = config.trainer.learner.policy_loss
    bounds = settings.bounds()
    assert settings.name == loss["name"]
    assert (bounds.low, bounds.high) == pytest.approx((loss["low"], loss["high"]))
    for name, value in algorithm.items():
        assert getattr(config.algorithm, name) == value
    page = (Path(__file__).parents[2] / "docs" / "algorithms.md").read_text()
    (row,) = (line for line in page.splitlines() if line.startswith(f"| {paper} |"))
    assert all(f"`{word}`" in row for word in words), row


def updates_with(loss: str, estimator: str, *words: str):
    config = configure(f"{NAME}={loss}", f"algorithm.adv_estimator={estimator}", *words)
    groups = [irregular()]
    trees = token_trees(groups, estimate(groups, config.algorithm))
    return mini_batches(trees, config, 64, key=0)


def test_a_users_estimator_at_node_level_is_refused_with_a_loss_of_whole_responses():
    """By path, so that nothing is known of it beforehand: its advantages show what it is."""
    theirs = "treepo.advantages.spo:spo"
    with pytest.raises(ValueError, match="name='gspo' has one term a response.*ppo_clip"):
        updates_with("gspo", theirs)
    assert updates_with("ppo_clip", theirs) and updates_with("gspo", "treepo")
