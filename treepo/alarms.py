"""Stops a run whose sampler and learner disagree, before the outcome is published."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from trainers.off_policy_settings import AlarmSettings


@dataclass(frozen=True, kw_only=True, slots=True)
class _Alarm:
    """A threshold's metric, on which side of it a run goes on, and what the value says."""

    metric: str
    is_floor: bool
    meaning: str
    mend: str


_SAMPLER = (
    "compare engine.dtype with trainer.learner.dtype, look at training/staleness/mean (old "
    "tokens: lower the staleness, or set trainer.learner.off_policy.mask_older_than)"
)
_ALARMS = {
    "max_kl": _Alarm(
        metric="training/rollout_kl",
        is_floor=False,
        meaning="the sampler's log-probabilities are far from the learner's",
        mend=_SAMPLER,
    ),
    "min_eff_sample_size": _Alarm(
        metric="training/rollout_is_eff_sample_size",
        is_floor=True,
        meaning="a few tokens carry most of the importance weight",
        mend=f"{_SAMPLER}, or set trainer.learner.off_policy.correction=tis or icepop",
    ),
    "max_logprob_diff_p99": _Alarm(
        metric="training/rollout_logprob_diff_p99",
        is_floor=False,
        meaning="one token in a hundred has a log-probability further apart than this",
        mend=_SAMPLER,
    ),
    "max_masked_frac": _Alarm(
        metric="actor/masked_frac",
        is_floor=False,
        meaning="most of the loss is masked",
        mend="raise trainer.learner.off_policy.mask_older_than, widen off_policy.band, or raise "
        "mpt.min_prob",
    ),
}


def alarm_of(metrics: Mapping[str, float], alarms: AlarmSettings, step: int, run: Path) -> str:
    """Why the run has to stop before the step's weights are published: a value that is beyond its
    threshold or no number, both, and what to do. Empty if it need not. ``run``: its folder.
    """
    for name, alarm in _ALARMS.items():
        threshold, value = getattr(alarms, name), metrics.get(alarm.metric)
        if threshold == 0 or value is None:
            continue
        within = value >= threshold if alarm.is_floor else value <= threshold
        if not within:
            side = "below" if alarm.is_floor else "above"
            return (
                f"step {step}: {alarm.metric}={value:.4g} is {side} "
                f"trainer.learner.off_policy.alarms.{name}={threshold:g}: {alarm.meaning}. The "
                "update is not published, and the last checkpoint stands. To mend it: "
                f"{alarm.mend}. To go on as it is: resume the run (resume_mode={run}) with "
                "another threshold (0: no alarm)"
            )
    return ""
