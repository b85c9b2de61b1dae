"""Every configuration that ships loads, passes its checks and says what it amounts to."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from rewards.records import RewardItem
from rewards.registry import make_part
from treepo.cli import compose, config_dir
from treepo.config import TrainConfig, strategy_settings
from treepo.evaluate import EvaluateConfig
from treepo.names import check_names
from treepo.sft_settings import SFTSettings
from treepo.sizes import derived_sizes

CONFIGS = config_dir()
EXPERIMENTS = {path.stem for path in (CONFIGS / "experiment").glob("*.yaml")}
OF_SFT = {"make_tiny_model", "make_long_model", "make_long_model_2"}
GROUPS = ("model", "data", "rollout", "algorithm", "trainer", "learner")
GROUPS += ("reward", "cluster", "tracking")
CHOICES = [f"{group}={p.stem}" for group in GROUPS for p in (CONFIGS / group).glob("*.yaml")]
NEEDED = {
    "data=file": ["data.files=[rows.jsonl]"],
    "+experiment=treepo_paper": ["data.files=[rows.jsonl]"],
    "+experiment=ulorl_paper": ["data.files=[rows.jsonl]"],
    "+experiment=treepo_ulorl": ["data.files=[rows.jsonl]"],
    "trainer=async": ["cluster.colocate=false"],
    "trainer=one_step": ["cluster.colocate=false"],
    "reward=custom": ["reward.parts.custom.name=rewards.exact:make"],
}


def check(config: TrainConfig) -> None:
    check_names(config)
    sizes = derived_sizes(config)
    assert {"responses a step", "updates a step", "longest path"} <= set(sizes)


@pytest.mark.parametrize("name", sorted(EXPERIMENTS - OF_SFT))
def test_every_experiment_can_be_trained_and_evaluated(name):
    words = [f"+experiment={name}", *NEEDED.get(f"+experiment={name}", [])]
    check(compose("train", TrainConfig, words))
    check(compose("evaluate", EvaluateConfig, [*words, "checkpoint=x"]))


@pytest.mark.parametrize("name", sorted(OF_SFT))
def test_every_supervised_experiment_loads(name):
    assert compose("sft", SFTSettings, [f"+experiment={name}"]).steps > 0


@pytest.mark.parametrize("choice", CHOICES)
def test_every_choice_of_every_group_fits_the_default_configuration(choice):
    check(compose("train", TrainConfig, [choice, *NEEDED.get(choice, [])]))


def test_no_configuration_is_left_out_of_these_tests():
    tested = {f"experiment/{name}.yaml" for name in EXPERIMENTS}
    tested |= {choice.replace("=", "/") + ".yaml" for choice in CHOICES}
    tested |= {f"{name}.yaml" for name in ("train", "evaluate", "sft", "export", "report", "clean")}
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
    overrides += ["trainer.learner.lora.rank=2", "trainer.learner.reference=lora_off"]
    lora = derived_sizes(compose("train", TrainConfig, ["+experiment=quickstart", *overrides]))
    # q, k and v, o, gate and up, down of 3 layers of width 96, 4 and 2 heads of 32, MLP of 256
    adapters = 2 * 3 * (96 + 128 + 2 * (96 + 64) + 128 + 96 + 2 * (96 + 256) + 256 + 96)
    assert lora["adapters"].startswith(f"{adapters:,} parameters, learning rate 0.0003 (")
    memory = f"{(358_752 * 4 + adapters * 16) / 2**20:.1f} MiB (frozen weights"
    assert lora["learner memory"].startswith(memory)
    assert lora["reference model"] == "none: the model without its adapters"
    # 2 (K and V) x 3 layers x 2 heads x 32 x 4 bytes a token
    kv_bytes = 2 * 3 * 2 * 32 * 4 * config.engine.num_kv_slots
    assert sizes["KV pool"].startswith(f"{kv_bytes / 2**20:.1f} MiB")


def test_the_paper_s_recipe_is_the_paper_s():
    config = compose("train", TrainConfig, ["+experiment=treepo_paper", "data.files=[rows.jsonl]"])
    _, rollout = strategy_settings(config)
    assert (rollout.n, rollout.segment_length, rollout.max_depth) == (16, 512, 14)
    assert (rollout.initial_divergence_min, rollout.initial_divergence_max) == (2, 8)
    assert (rollout.branching, rollout.fallback) == ("even", "random")
    assert (rollout.temperature, rollout.top_p, rollout.top_k) == (1.0, 1.0, 0)
    assert rollout.max_response_length == 7168 and config.max_prompt_length == 1024

    algorithm = config.algorithm
    assert (algorithm.adv_estimator, algorithm.loss_weighting) == ("treepo", "token_mean")
    assert (algorithm.filter_groups, algorithm.filter_groups_metric) == (True, "acc")
    assert algorithm.max_num_gen_batches == 3

    trainer, optimizer = config.trainer, config.trainer.learner.optimizer
    assert (trainer.train_batch_size, trainer.ppo_mini_batch_size) == (512, 32)
    assert (optimizer.lr, optimizer.lr_schedule, optimizer.lr_warmup_steps) == (
        1e-6, "constant", 10,
    )  # fmt: skip
    assert (optimizer.weight_decay, optimizer.grad_clip) == (0.1, 1.0)
    assert trainer.learner.old_logprobs == "recomputed"
    loss = trainer.learner.policy_loss
    assert (loss.name, loss.kl_loss_coef, loss.entropy_coeff) == ("ppo_clip", 0.0, 0.0)
    bounds = loss.bounds()
    assert (bounds.low, bounds.high, bounds.dual) == (0.8, 1.28, 10.0)

    part = make_part("length", config.reward.parts["length"].options)
    item = RewardItem(data_source="", prompt="", solution_str="", ground_truth="")
    lengths = {6656: 0.0, 6912: -0.5, 7168: -1.0}  # the buffer is the last 512 tokens
    for num_tokens, value in lengths.items():
        assert part(replace(item, num_tokens=num_tokens)).value == value


def test_ulorl_s_recipe_is_the_paper_s():
    config = compose("train", TrainConfig, ["+experiment=ulorl_paper", "data.files=[rows.jsonl]"])
    name, rollout = strategy_settings(config)
    assert (name, rollout.n, rollout.temperature, rollout.top_p) == ("flat", 8, 0.85, 1.0)
    trainer = config.trainer
    assert rollout.max_response_length == 2**17 and trainer.segments.segment_length == 2**14
    assert trainer.segments.num_segments(rollout.max_response_length) == 8
    assert trainer.train_batch_size == trainer.ppo_mini_batch_size == 128
    assert derived_sizes(config)["updates a step"] == "1 of 128 prompts each"
    algorithm, loss = config.algorithm, trainer.learner.policy_loss
    assert (algorithm.adv_estimator, algorithm.divides_by) == ("grpo", "tree")
    assert (algorithm.loss_weighting, algorithm.filter_groups) == ("token_mean", True)
    assert algorithm.overlong == "zero" and loss.kl_loss_coef == 0
    optimizer = trainer.learner.optimizer
    assert (optimizer.name, optimizer.lr, optimizer.lr_schedule) == ("adamw", 1e-6, "constant")
    assert trainer.learner.old_logprobs == "recomputed"
    mpt = trainer.learner.mpt
    assert (mpt.gate, mpt.min_prob, mpt.max_entropy) == ("response", 0.99, 0.2)
    assert mpt.masked_in_denominator and trainer.learner.off_policy.correction == "none"
    evaluation = config.evaluation
    assert (evaluation.num_samples, evaluation.temperature, evaluation.top_p) == (32, 0.85, 0.95)


@pytest.mark.parametrize("choices", [[], ["rollout=treepo_short", "algorithm=treepo"]])
def test_the_segmented_quickstart_is_the_quickstart_in_segments(choices):
    plain = compose("train", TrainConfig, ["+experiment=quickstart", *choices])
    config = compose("train", TrainConfig, ["+experiment=quickstart_segments", *choices])
    assert config.rollout["strategy"] == ("treepo" if choices else "flat")
    assert config.algorithm.adv_estimator == ("treepo" if choices else "grpo")
    assert config.rollout["max_response_length"] == 64 and config.trainer.segments.is_on
    assert config.data == plain.data and config.trainer.total_steps == plain.trainer.total_steps
