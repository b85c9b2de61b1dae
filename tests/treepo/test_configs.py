"""Every configuration that ships loads, passes its checks and says what it amounts to."""

from __future__ import annotations

from pathlib import Path

import pytest

from treepo.cli import compose, config_dir
from treepo.config import TrainConfig
from treepo.evaluate import EvaluateConfig
from treepo.names import check_names
from treepo.sft_settings import SFTSettings
from treepo.sizes import derived_sizes

CONFIGS = config_dir()
EXPERIMENTS = {path.stem for path in (CONFIGS / "experiment").glob("*.yaml")}
OF_SFT = {"make_tiny_model"}
GROUPS = ("model", "data", "rollout", "algorithm", "trainer", "reward", "cluster", "tracking")
CHOICES = [f"{group}={p.stem}" for group in GROUPS for p in (CONFIGS / group).glob("*.yaml")]
NEEDED = {
    "data=file": ["data.files=[rows.jsonl]"],
    "reward=custom": ["reward.parts.custom.name=rewards.exact:make"],
}


def check(config: TrainConfig) -> None:
    check_names(config)
    sizes = derived_sizes(config)
    assert {"responses a step", "updates a step", "longest path"} <= set(sizes)


@pytest.mark.parametrize("name", sorted(EXPERIMENTS - OF_SFT))
def test_every_experiment_can_be_trained_and_evaluated(name):
    check(compose("train", TrainConfig, [f"+experiment={name}"]))
    check(compose("evaluate", EvaluateConfig, [f"+experiment={name}", "checkpoint=x"]))


@pytest.mark.parametrize("name", sorted(OF_SFT))
def test_every_supervised_experiment_loads(name):
    assert compose("sft", SFTSettings, [f"+experiment={name}"]).steps > 0


@pytest.mark.parametrize("choice", CHOICES)
def test_every_choice_of_every_group_fits_the_default_configuration(choice):
    check(compose("train", TrainConfig, [choice, *NEEDED.get(choice, [])]))


def test_no_configuration_is_left_out_of_these_tests():
    tested = {f"experiment/{name}.yaml" for name in EXPERIMENTS}
    tested |= {choice.replace("=", "/") + ".yaml" for choice in CHOICES}
    tested |= {f"{name}.yaml" for name in ("train", "evaluate", "sft", "export", "report")}
    shipped = {str(p.relative_to(CONFIGS)) for p in Path(CONFIGS).rglob("*.yaml")}
    assert shipped == tested


def test_the_sizes_are_those_worked_out_by_hand():
    overrides = ["rollout.n=16", "trainer.train_batch_size=24", "trainer.ppo_mini_batch_size=12"]
    overrides += ["trainer.ppo_epochs=2", "trainer.total_steps=10", "max_prompt_length=64"]
    config = compose("train", TrainConfig, ["+experiment=quickstart", *overrides])
    sizes = derived_sizes(config)
    assert sizes["responses a step"] == "384 = 24 prompts x 16"
    assert sizes["updates a step"] == "4 of 12 prompts each"
    assert sizes["updates in all"] == "40" and sizes["prompts in all"] == "240"
    assert sizes["parameters"] == "358,752"
    assert "reference model" not in sizes
    overrides += ["trainer.learner.policy_loss.kl_loss_coef=0.01"]
    with_kl = derived_sizes(compose("train", TrainConfig, ["+experiment=quickstart", *overrides]))
    assert with_kl["reference model"].startswith(f"{358_752 * 4 / 2**20:.1f} MiB a learner rank")
    # 2 (K and V) x 3 layers x 2 heads x 32 x 4 bytes a token
    kv_bytes = 2 * 3 * 2 * 32 * 4 * config.engine.num_kv_slots
    assert sizes["KV pool"].startswith(f"{kv_bytes / 2**20:.1f} MiB")
