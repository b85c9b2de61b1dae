"""Policy losses as the configuration chooses them, and the advantages that fit them."""

import pytest
from scored_trees import irregular
from training_runs import SMALL

from treepo.advantages import estimate
from treepo.cli import compose
from treepo.config import TrainConfig
from treepo.names import check_names
from treepo.samples import token_trees
from treepo.step import mini_batches

NAME = "trainer.learner.policy_loss.name"
KL = [
    "trainer.learner.policy_loss.kl_loss_coef=0.01",
    "trainer.learner.policy_loss.kl_loss_type=k2",
]


def configure(*overrides: str) -> TrainConfig:
    config = compose("train", TrainConfig, [*SMALL, *overrides])
    check_names(config)
    return config


@pytest.mark.parametrize("name", ["ppo_clip", "gspo", "cispo", "reinforce", "nll"])
def test_every_loss_is_chosen_by_its_name_with_and_without_a_kl_penalty(name):
    loss = configure(f"{NAME}={name}").trainer.learner.policy_loss
    assert loss.name == name and loss.kl_loss_coef == 0
    assert configure(f"{NAME}={name}", *KL).trainer.learner.policy_loss.kl_loss_type == "k2"


def updates_with(loss: str, estimator: str):
    config = configure(f"{NAME}={loss}", f"algorithm.adv_estimator={estimator}")
    groups = [irregular()]
    return mini_batches(token_trees(groups, estimate(groups, config.algorithm)), config, key=0)


def test_a_users_estimator_at_node_level_is_refused_with_a_loss_of_whole_responses():
    """By path, so that nothing is known of it beforehand: its advantages show what it is."""
    theirs = "treepo.advantages.spo:spo"
    with pytest.raises(ValueError, match="name='gspo' has one term a response.*ppo_clip"):
        updates_with("gspo", theirs)
    assert updates_with("ppo_clip", theirs) and updates_with("gspo", "treepo")
