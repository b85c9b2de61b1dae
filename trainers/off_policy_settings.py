"""Settings for tokens that other weights than the learner's drew, or other arithmetic: corrections,
masks of old tokens, and alarms. Plain dataclasses of the standard library, parsed before torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from trainers.checks_of_settings import check, one_of, unused
from treepo.base.typed import check_types

CORRECTIONS = ("none", "decoupled", "tis", "icepop")
_TIS_CAP = 2.0  # verl's rollout_is_threshold
_ICEPOP_BAND = (0.5, 5.0)  # Ring-1T, arXiv 2510.18855; verl's "0.5_5.0"


@dataclass
class AlarmSettings:
    """When a run stops because sampler and learner disagree, before new weights are published.
    Thresholds of a step's metrics; 0 switches one off.
    """

    # nats: training/rollout_kl, the mean of sampled minus learner's log-prob. Seen of quickstarts
    # in float32: 7e-8 on-policy, 0.008 with tokens up to 4 versions old; 1: other weights
    max_kl: float = 1.0
    # in [0, 1]: training/rollout_is_eff_sample_size; verl warns below 0.3
    min_eff_sample_size: float = 0.0
    max_logprob_diff_p99: float = 0.0  # nats: training/rollout_logprob_diff_p99
    max_masked_frac: float = 0.0  # in [0, 1]: actor/masked_frac, share of the loss that is masked

    def __post_init__(self) -> None:
        check_types(self, "trainer.learner.off_policy.alarms.")
        for name in (f.name for f in fields(self)):
            value = getattr(self, name)
            check(f"off_policy.alarms.{name}", value, value >= 0, ">= 0 (0: no alarm)")
        for name in ("min_eff_sample_size", "max_masked_frac"):
            value = getattr(self, name)
            check(f"off_policy.alarms.{name}", value, value <= 1, "in [0, 1], a share")


@dataclass
class OffPolicySettings:
    """What the policy loss does with tokens that were not drawn from the weights being trained.

    Corrections weight tokens by functions of rho = pi_prox / pi_behav, the probability under the
    weights before the step's first update over that under which the token was drawn.
    """

    # none | decoupled (rho; AReaL) | tis (min(rho, cap)) | icepop (rho within the band, else 0).
    # All but none need old_logprobs=recomputed
    correction: str = "none"
    # tis: largest weight, left out: 2. decoupled: tokens with a larger rho are dropped (AReaL's
    # behav_imp_weight_cap), left out: none are
    cap: float | None = None
    band: list[float] = field(default_factory=list)  # of icepop; left out: [0.5, 5]
    # tokens that are more than this many weight versions old have no part in the loss (0: only
    # those of the weights in force have); left out: age does not matter
    mask_older_than: int | None = None
    # whether what is masked (old, or dropped by a correction) counts in what the loss is divided by
    masked_in_denominator: bool = True
    alarms: AlarmSettings = field(default_factory=AlarmSettings)

    def __post_init__(self) -> None:
        check_types(self, "trainer.learner.off_policy.")
        one_of("off_policy.correction", self.correction, CORRECTIONS)
        here = f"off_policy.correction={self.correction!r}"
        if self.cap is not None and self.correction not in ("tis", "decoupled"):
            raise unused("off_policy.cap", self.cap, here, "choose tis or decoupled, or drop it")
        if self.band and self.correction != "icepop":
            raise unused("off_policy.band", self.band, here, "choose icepop, or drop it")
        if self.cap is not None:
            check("off_policy.cap", self.cap, self.cap >= 1, ">= 1 (a weight of 1 is on-policy)")
        if self.band:
            fits = len(self.band) == 2 and 0 <= self.band[0] <= 1 <= self.band[1]
            check("off_policy.band", self.band, fits, "[low, high] with 0 <= low <= 1 <= high")
        age = self.mask_older_than
        check("off_policy.mask_older_than", age, age is None or age >= 0, ">= 0, or left out")
        if not (self.masked_in_denominator or self.masks):
            raise unused(
                "off_policy.masked_in_denominator",
                self.masked_in_denominator,
                "settings that mask nothing",
                "set mask_older_than, correction=icepop, or correction=decoupled with a cap",
            )

    @property
    def drops(self) -> bool:
        """Whether the correction gives some tokens weight 0."""
        return self.correction == "icepop" or (
            self.correction == "decoupled" and self.cap is not None
        )

    @property
    def masks(self) -> bool:
        """Whether there are tokens that have no part in the policy loss."""
        return self.drops or self.mask_older_than is not None

    @property
    def largest_weight(self) -> float | None:
        """The cap in force; None: there is none."""
        return _TIS_CAP if self.cap is None and self.correction == "tis" else self.cap

    @property
    def kept_band(self) -> tuple[float, float]:
        """IcePop's band in force."""
        low, high = self.band or _ICEPOP_BAND
        return low, high
