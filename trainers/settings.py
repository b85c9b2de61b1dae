"""Settings of the learner: plain dataclasses of the standard library, parsed before torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from trainers.checks_of_settings import check as _check
from trainers.checks_of_settings import one_of as _one_of
from trainers.checks_of_settings import unused
from trainers.lora_settings import LoraSettings
from trainers.mpt_settings import MPTSettings
from trainers.off_policy_settings import OffPolicySettings
from treepo.base.registry import Registry
from treepo.base.typed import check_types

DTYPES = ("float32", "bfloat16")
OPTIMIZERS = ("adamw", "sgd")
ATTENTIONS = ("auto", "sdpa", "flex", "flash")
OLD_LOGPROBS = ("sampled", "recomputed")
REFERENCES = ("own", "actor", "lora_off")
SCHEDULES = ("constant", "linear", "cosine")

# Estimators of KL(policy || reference) from a sampled token; see trainers/kl.py. verl's names for
# the same: kl, mse, low_var_kl.
KL_LOSS_TYPES = ("k1", "k2", "k3")
_VERL_KL_NAMES = {"kl": "k1", "mse": "k2", "low_var_kl": "k3"}


@dataclass(frozen=True, kw_only=True, slots=True)
class LossTraits:
    """What can be known of a policy loss without torch. None: the loss has no such setting."""

    clip_ratio_low: float | None = None  # default of the setting
    clip_ratio_high: float | None = None
    clip_ratio_c: float | None = None
    is_sequence_level: bool = False  # its terms are of responses, so advantages must be too
    uses_advantages: bool = True  # False: supervised, so it has no place in treepo.train
    uses_old_logprobs: bool = True  # False: there is no ratio in the loss


_PPO_CLIP = LossTraits(clip_ratio_low=0.2, clip_ratio_high=0.28, clip_ratio_c=10.0)
LOSS_TRAITS = {
    "ppo_clip": _PPO_CLIP,
    "gspo": LossTraits(clip_ratio_low=3e-4, clip_ratio_high=4e-4, is_sequence_level=True),
    "cispo": LossTraits(clip_ratio_low=1.0, clip_ratio_high=0.28),
    "reinforce": LossTraits(uses_old_logprobs=False),
    "nll": LossTraits(uses_advantages=False, uses_old_logprobs=False),
}
# Names are known here, without torch; the functions are imported when one is used.
POLICY_LOSSES: Registry[Any] = Registry(
    "policy loss", {name: f"trainers.losses:{name}" for name in LOSS_TRAITS}
)


_Loss = TypeVar("_Loss", bound=Callable[..., Any])


def has_traits(**traits: Any) -> Callable[[_Loss], _Loss]:
    """Decorator of your own policy loss that says what it is, by the fields of
    :class:`LossTraits`: ``@has_traits(is_sequence_level=True, clip_ratio_low=3e-4)``. A bound that
    is left out is one that the loss doesn't use. Without the decorator a loss counts as one of
    tokens with the bounds of ``ppo_clip``.
    """

    def mark(loss: _Loss) -> _Loss:
        loss.traits = LossTraits(**traits)  # type: ignore[attr-defined]
        return loss

    return mark


def loss_traits(name: str) -> LossTraits:
    """Of a policy loss by name; a user's own (a name with a colon) is loaded and says it itself,
    see :func:`has_traits`.

    Raises:
        ValueError: the user's file, module or function does not exist.
    """
    if name in LOSS_TRAITS or ":" not in name:  # the latter: unknown, and refused by the registry
        return LOSS_TRAITS.get(name, _PPO_CLIP)
    traits = getattr(POLICY_LOSSES.get(name), "traits", _PPO_CLIP)
    assert isinstance(traits, LossTraits), f"{name}: traits are set by has_traits, got {traits!r}"
    return traits


def is_sequence_level(name: str) -> bool:
    """Whether the policy loss ``name`` has one term a response: then every token of a response must
    have the response's advantage.
    """
    return loss_traits(name).is_sequence_level


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
        check_types(self, "trainer.learner.optimizer.")
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


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipBounds:
    """The ratio's bounds: ``low`` and ``high`` of the clip, ``dual`` of the dual clip."""

    low: float
    high: float
    dual: float


@dataclass
class PolicyLossSettings:
    """The policy loss, its bounds, and what is added to it: KL to a reference, entropy."""

    # ppo_clip | gspo | cispo | reinforce | nll, or your own as module:function
    name: str = "ppo_clip"
    # Bounds of the ratio of new to old probability: 1 - clip_ratio_low and 1 + clip_ratio_high.
    # Left out: 0.2 and 0.28 (ppo_clip; DAPO's clip-higher), 3e-4 and 4e-4 (gspo), 1.0 (no lower
    # bound) and 0.28 (cispo). reinforce and nll have none
    clip_ratio_low: float | None = None
    clip_ratio_high: float | None = None
    # ppo_clip alone, dual clip: bound of the ratio where the advantage is negative. Left out: 10
    clip_ratio_c: float | None = None
    entropy_coeff: float = 0.0  # weight of an entropy bonus; 0: entropy is only measured
    # weight of KL(policy || the model that training began with); 0: that model is not kept
    kl_loss_coef: float = 0.0
    kl_loss_type: str = "k3"  # its estimator: k1 | k2 | k3 (verl's low_var_kl)

    def __post_init__(self) -> None:
        check_types(self, "trainer.learner.policy_loss.")
        _check("policy_loss.name", self.name, bool(self.name), "the name of a policy loss")
        self._refuse_unused()
        bounds = self.bounds()
        low, high, dual = self.clip_ratio_low, self.clip_ratio_high, self.clip_ratio_c
        _check("policy_loss.clip_ratio_low", low, 0 <= bounds.low <= 1, "in [0, 1]")
        _check("policy_loss.clip_ratio_high", high, bounds.high >= 1, ">= 0")
        _check(
            "policy_loss.clip_ratio_c", dual, bounds.dual > 1, "> 1 (a large number: no dual clip)"
        )
        _check("policy_loss.entropy_coeff", self.entropy_coeff, self.entropy_coeff >= 0, ">= 0")
        _check("policy_loss.kl_loss_coef", self.kl_loss_coef, self.kl_loss_coef >= 0, ">= 0")
        allowed = f"one of {', '.join(KL_LOSS_TYPES)}"
        if self.kl_loss_type in _VERL_KL_NAMES:
            allowed += f" ({self.kl_loss_type} is {_VERL_KL_NAMES[self.kl_loss_type]})"
        known = self.kl_loss_type in KL_LOSS_TYPES
        _check("policy_loss.kl_loss_type", self.kl_loss_type, known, allowed)
        if self.kl_loss_type != "k3" and self.kl_loss_coef == 0:
            mend = "set kl_loss_coef (such as 0.001), or leave kl_loss_type out"
            raise unused("policy_loss.kl_loss_type", self.kl_loss_type, "kl_loss_coef=0", mend)

    def bounds(self) -> ClipBounds:
        """The ratio's bounds, those left out filled in; infinite where the loss has none."""
        traits = loss_traits(self.name)

        def value(setting: float | None, default: float | None) -> float:
            return setting if setting is not None else math.inf if default is None else default

        low = value(self.clip_ratio_low, traits.clip_ratio_low)
        return ClipBounds(
            low=0.0 if low == math.inf else 1 - low,
            high=1 + value(self.clip_ratio_high, traits.clip_ratio_high),
            dual=value(self.clip_ratio_c, traits.clip_ratio_c),
        )

    def _refuse_unused(self) -> None:
        traits = loss_traits(self.name)
        for name in ("clip_ratio_low", "clip_ratio_high", "clip_ratio_c"):
            if getattr(self, name) is not None and getattr(traits, name) is None:
                users = [n for n, t in LOSS_TRAITS.items() if getattr(t, name) is not None]
                raise ValueError(
                    f"trainer.learner.policy_loss.{name}={getattr(self, name)!r} is not used by "
                    f"policy_loss.name={self.name!r}: leave it out, or choose {' or '.join(users)}"
                )


@dataclass
class LearnerSettings:
    """One learner rank. The same settings on every rank."""

    dtype: str = "float32"  # of weights and activations; bfloat16 keeps float32 master weights
    attention: str = "auto"  # auto | sdpa | flex (CUDA) | flash (flash-attn, no shared tokens)
    zero_stage: int = 0  # DeepSpeed ZeRO: 0 none, 1 optimiser, 2 + gradients, 3 + weights sharded
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    policy_loss: PolicyLossSettings = field(default_factory=PolicyLossSettings)
    lora: LoraSettings = field(default_factory=LoraSettings)  # adapters in place of full training
    # who says the log-probs that a KL penalty is towards: own (a copy of the initial model on every
    # rank) | actor (processes of their own: cluster.num_reference_workers) | lora_off (the model
    # without its adapters: no copy)
    reference: str = "own"
    # "old" log-probs of the ratio: sampled (the engine's) | recomputed (the learner's own before a
    # step's first update; one more forward for each further update)
    old_logprobs: str = "sampled"
    off_policy: OffPolicySettings = field(default_factory=OffPolicySettings)
    mpt: MPTSettings = field(default_factory=MPTSettings)
    max_tokens_per_micro_batch: int = 16384  # tokens of one packed row: bounds activation memory
    logprob_chunk_size: int = 4096  # tokens whose logits are alive at once
    fp32_lm_head: bool = False  # compute logits in float32 from bfloat16 weights and hidden states
    gradient_checkpointing: bool = False  # recompute layers in the backward pass to save memory
    num_threads: int = 0  # torch threads of a rank on CPU; 0 leaves torch's choice
    init_timeout_s: int = 300  # how long a rank waits for the others to join and to answer

    def __post_init__(self) -> None:
        check_types(self, "trainer.learner.")
        _one_of("dtype", self.dtype, DTYPES)
        _one_of("attention", self.attention, ATTENTIONS)
        _one_of("old_logprobs", self.old_logprobs, OLD_LOGPROBS)
        _one_of("reference", self.reference, REFERENCES)
        self._check_reference()
        self._check_old_logprobs()
        if not self._traits.uses_advantages:
            self._refuse_without_advantages()
        _check("zero_stage", self.zero_stage, self.zero_stage in (0, 1, 2, 3), "0, 1, 2 or 3")
        for name in ("max_tokens_per_micro_batch", "logprob_chunk_size", "init_timeout_s"):
            _check(name, getattr(self, name), getattr(self, name) > 0, "> 0")
        _check("num_threads", self.num_threads, self.num_threads >= 0, ">= 0 (0: torch's choice)")

    @property
    def has_reference(self) -> bool:
        """Whether the objective has a KL penalty."""
        return self.policy_loss.kl_loss_coef > 0

    def _check_reference(self) -> None:
        if self.reference == "own":
            return
        if not self.has_reference:
            mend = "set kl_loss_coef (such as 0.001), or leave reference out"
            raise unused("reference", self.reference, "policy_loss.kl_loss_coef=0", mend)
        if self.reference == "lora_off" and not self.lora.is_on:
            raise ValueError(
                "trainer.learner.reference='lora_off' needs adapters to switch off, but with "
                "lora.rank=0 every weight is trained: set lora.rank (such as 32), or choose own "
                "or actor"
            )

    @property
    def _traits(self) -> LossTraits:
        return loss_traits(self.policy_loss.name)

    def _check_old_logprobs(self) -> None:
        correction, loss = self.off_policy.correction, self.policy_loss.name
        if correction != "none" and self.old_logprobs == "sampled":
            raise ValueError(
                f"trainer.learner.off_policy.correction={correction!r} weights tokens by their "
                "recomputed over their sampled probability, and with old_logprobs='sampled' these "
                "are the same (a loss's own ratio is then to the sampler): set "
                "old_logprobs='recomputed', or leave the correction out"
            )
        has_use = correction != "none" or self._traits.uses_old_logprobs
        if self.old_logprobs == "recomputed" and not has_use:
            users = [name for name, traits in LOSS_TRAITS.items() if traits.uses_old_logprobs]
            raise ValueError(
                f"trainer.learner.old_logprobs='recomputed' is not used by policy_loss.name="
                f"{loss!r}, which has no ratio: leave it out, choose {' or '.join(users)}, or "
                "weight tokens with off_policy.correction, such as 'tis'"
            )

    def _refuse_without_advantages(self) -> None:
        where = f"policy_loss.name={self.policy_loss.name!r}, which is supervised"
        for name, value, default in (
            ("off_policy.correction", self.off_policy.correction, "none"),
            ("off_policy.mask_older_than", self.off_policy.mask_older_than, None),
            ("mpt.gate", self.mpt.gate, "never"),
        ):
            if value != default:
                raise unused(name, value, where, "leave it out, or choose ppo_clip, say")
