"""Settings of the learner: plain dataclasses of the standard library, parsed before torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from treepo.base.registry import Registry

DTYPES = ("float32", "bfloat16")
OPTIMIZERS = ("adamw", "sgd")
SCHEDULES = ("constant", "linear", "cosine")

# Names are known here, without torch; the functions are imported when one is used.
POLICY_LOSSES: Registry[Any] = Registry(
    "policy loss",
    {name: f"trainers.losses:{name}" for name in ("ppo_clip", "reinforce", "nll")},
)


@dataclass
class OptimizerSettings:
    """The optimiser, its schedule and gradient clipping."""

    name: str = "adamw"  # adamw | sgd (plain, for tests and ablations)
    lr: float = 1e-6  # peak learning rate
    lr_schedule: str = "constant"  # after the warm-up: constant | linear | cosine
    lr_warmup_steps: int = 0  # optimiser steps over which the rate rises linearly to lr
    total_training_steps: int = 0  # when linear and cosine reach their minimum; 0: at the run's end
    min_lr_ratio: float = 0.0  # that minimum, as a share of lr
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])  # of AdamW
    eps: float = 1e-8  # of AdamW
    weight_decay: float = 0.01  # decoupled (AdamW); L2 with sgd
    grad_clip: float = 1.0  # largest gradient norm of an update; 0 switches clipping off

    def __post_init__(self) -> None:
        _one_of("optimizer.name", self.name, OPTIMIZERS)
        _one_of("optimizer.lr_schedule", self.lr_schedule, SCHEDULES)
        _check("optimizer.lr", self.lr, self.lr >= 0, ">= 0")
        _check("optimizer.lr_warmup_steps", self.lr_warmup_steps, self.lr_warmup_steps >= 0, ">= 0")
        _check(
            "optimizer.total_training_steps",
            self.total_training_steps,
            self.total_training_steps == 0 or self.total_training_steps > self.lr_warmup_steps,
            f"0 (the whole run) or more than lr_warmup_steps ({self.lr_warmup_steps})",
        )
        _check("optimizer.min_lr_ratio", self.min_lr_ratio, 0 <= self.min_lr_ratio <= 1, "in [0,1]")
        _check(
            "optimizer.betas",
            self.betas,
            len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas),
            "two numbers in [0, 1)",
        )
        _check("optimizer.eps", self.eps, self.eps > 0, "> 0")
        _check("optimizer.weight_decay", self.weight_decay, self.weight_decay >= 0, ">= 0")
        _check("optimizer.grad_clip", self.grad_clip, self.grad_clip >= 0, ">= 0 (0: no clipping)")


@dataclass
class PolicyLossSettings:
    """The policy loss and its bounds (DAPO's clip-higher; dual clip of Ye et al. 2020)."""

    name: str = "ppo_clip"  # ppo_clip | reinforce | nll, or your own as module:function
    clip_ratio_low: float = 0.2  # a falling ratio counts down to 1 - clip_ratio_low
    clip_ratio_high: float = 0.28  # a rising ratio counts up to 1 + clip_ratio_high
    clip_ratio_c: float = 10.0  # dual clip: bound of the ratio where the advantage is negative
    entropy_coeff: float = 0.0  # weight of an entropy bonus; 0: entropy is only measured

    def __post_init__(self) -> None:
        _check("policy_loss.name", self.name, bool(self.name), "the name of a policy loss")
        low, high, dual = self.clip_ratio_low, self.clip_ratio_high, self.clip_ratio_c
        _check("policy_loss.clip_ratio_low", low, 0 <= low <= 1, "in [0, 1]")
        _check("policy_loss.clip_ratio_high", high, high >= 0, ">= 0")
        _check("policy_loss.clip_ratio_c", dual, dual > 1, "> 1 (a large number switches it off)")


@dataclass
class LearnerSettings:
    """One learner rank. The same settings on every rank."""

    dtype: str = "float32"  # of weights and activations; bfloat16 keeps float32 master weights
    zero_stage: int = 0  # DeepSpeed ZeRO: 0 none, 1 optimiser, 2 + gradients, 3 + weights sharded
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    policy_loss: PolicyLossSettings = field(default_factory=PolicyLossSettings)
    max_tokens_per_micro_batch: int = 16384  # tokens of one packed row: bounds activation memory
    logprob_chunk_size: int = 4096  # tokens whose logits are alive at once
    fp32_lm_head: bool = False  # compute logits in float32 from bfloat16 weights and hidden states
    gradient_checkpointing: bool = False  # recompute layers in the backward pass to save memory
    num_threads: int = 0  # torch threads of a rank on CPU; 0 leaves torch's choice
    init_timeout_s: int = 300  # how long a rank waits for the others to join and to answer

    def __post_init__(self) -> None:
        _one_of("dtype", self.dtype, DTYPES)
        _check("zero_stage", self.zero_stage, self.zero_stage in (0, 1, 2, 3), "0, 1, 2 or 3")
        for name in ("max_tokens_per_micro_batch", "logprob_chunk_size", "init_timeout_s"):
            _check(name, getattr(self, name), getattr(self, name) > 0, "> 0")
        _check("num_threads", self.num_threads, self.num_threads >= 0, ">= 0 (0: torch's choice)")


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    _check(name, value, value in allowed, f"one of {', '.join(allowed)}")


def _check(name: str, value: Any, ok: bool, allowed: str) -> None:
    if not ok:
        raise ValueError(f"trainer.learner.{name}={value!r}: must be {allowed}")
