"""What the supervised command can be told: plain dataclasses, checked when they are built. No torch
in here.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from rewards.chain_sum_settings import check_term_counts
from trainers.settings import LearnerSettings, OptimizerSettings, PolicyLossSettings
from treepo.checks_of_settings import require


@dataclass
class TinyModelSettings:
    """Shape of the Qwen3 model that is trained from scratch."""

    num_layers: int = 3
    hidden_size: int = 96
    intermediate_size: int = 256
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 32
    # base of the rotary frequencies: the larger, the more of a head finds its match at any distance
    rope_theta: float = 10_000.0

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            require(f"model.{name}", getattr(self, name), getattr(self, name) >= 1, ">= 1")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"model.num_kv_heads={self.num_kv_heads} does not divide "
                f"model.num_heads={self.num_heads}: heads share keys in equal groups"
            )


@dataclass
class DemonstrationSettings:
    """Chain sums of reasoning-gym and the slips of the pupil who answers them."""

    min_terms: int = 2
    max_terms: int = 6
    min_value: int = 1  # of a term
    max_value: int = 20
    # number of terms: 0: each from min_terms to max_terms alike; else lognormal with this median
    median_terms: float = 0.0
    log_sd: float = 0.0  # of the lognormal: standard deviation of the logarithm
    # terms and steps have numbers, each of which is one token, as is an operator with its term
    numbered: bool = False
    error_prob: float = 0.6  # with which a step that carries or borrows forgets it
    error_terms: list[int] = field(default_factory=list)  # with which alone; empty: all

    def __post_init__(self) -> None:
        require("data.min_terms", self.min_terms, self.min_terms >= 2, ">= 2")
        require("data.max_terms", self.max_terms, self.max_terms >= self.min_terms, ">= min_terms")
        require("data.min_value", self.min_value, self.min_value >= 0, ">= 0")
        require("data.max_value", self.max_value, self.max_value >= self.min_value, ">= min_value")
        require("data.error_prob", self.error_prob, 0 <= self.error_prob <= 1, "in [0, 1]")
        if self.median_terms or self.log_sd:
            check_term_counts(self.min_terms, self.max_terms, self.median_terms, self.log_sd)
        for term in self.error_terms:
            require(
                "data.error_terms",
                self.error_terms,
                self.min_value <= term <= self.max_value,
                f"terms that occur: {self.min_value} to {self.max_value} (min_value, max_value)",
            )


def _learner() -> LearnerSettings:
    return LearnerSettings(
        optimizer=OptimizerSettings(lr=3e-3, lr_warmup_steps=50, betas=[0.9, 0.95]),
        policy_loss=PolicyLossSettings(name="nll"),
        num_threads=1,
    )


@dataclass
class SFTSettings:
    """Everything the supervised command is told."""

    output: str = "outputs/sft"  # folder of the finished model; must not hold one yet
    # a model to go on from, with its tokenizer: folder, Hub name, or asset:NAME; empty: a fresh one
    start_from: str = ""
    seed: int = 0  # of the initial weights, the problems and the slips
    steps: int = 1000  # optimiser steps
    batch_size: int = 32  # demonstrations a step
    model: TinyModelSettings = field(default_factory=TinyModelSettings)
    data: DemonstrationSettings = field(default_factory=DemonstrationSettings)
    learner: LearnerSettings = field(default_factory=_learner)  # total_training_steps: 0 = steps

    def __post_init__(self) -> None:
        require("output", self.output, bool(self.output), "a folder")
        if self.start_from and self.model != TinyModelSettings():
            raise ValueError(
                f"model={self.model} is not used with start_from={self.start_from!r}, a model that "
                "has its shape: leave model.* out, or start_from for a fresh one"
            )
        require("seed", self.seed, self.seed >= 0, ">= 0")
        require("steps", self.steps, self.steps >= 1, ">= 1")
        require("batch_size", self.batch_size, self.batch_size >= 1, ">= 1")
        if self.learner.reference == "actor":
            raise ValueError(
                "learner.reference='actor': this command has one process; choose own or lora_off"
            )
