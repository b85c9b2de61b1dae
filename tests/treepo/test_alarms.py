"""A run whose sampler and learner disagree stops with the value, the threshold and what to do."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from test_no_signal import learn
from training_runs import SMALL, run

from trainers.off_policy_settings import AlarmSettings
from treepo.alarms import alarm_of
from treepo.base.errors import RunFailed
from treepo.cli import compose
from treepo.config import TrainConfig
from treepo.loop import MAY_CHANGE
from treepo.tracking import read_rows

OFF = "trainer.learner.off_policy"
RUN = Path("outputs/a/1")
FINE = {
    "training/rollout_kl": 0.01,
    "training/rollout_is_eff_sample_size": 0.9,
    "training/rollout_logprob_diff_p99": 0.02,
    "actor/masked_frac": 0.1,
}


@pytest.mark.parametrize(
    ("threshold", "metric", "value", "message"),
    [
        ("max_kl", "training/rollout_kl", 1.2, "rollout_kl=1.2 is above .*max_kl=1:"),
        (
            "min_eff_sample_size",
            "training/rollout_is_eff_sample_size",
            0.2,
            "eff_sample_size=0.2 is below .*min_eff_sample_size=0.3.*correction=tis",
        ),
        (
            "max_logprob_diff_p99",
            "training/rollout_logprob_diff_p99",
            0.06,
            "diff_p99=0.06 is above .*max_logprob_diff_p99=0.05.*engine.dtype",
        ),
        ("max_masked_frac", "actor/masked_frac", 0.8, "masked_frac=0.8 is above .*=0.5.*widen"),
    ],
)
def test_each_threshold_stops_on_its_own_metric_and_says_so(threshold, metric, value, message):
    alarms = AlarmSettings(
        max_kl=1.0, min_eff_sample_size=0.3, max_logprob_diff_p99=0.05, max_masked_frac=0.5
    )
    assert alarm_of(FINE, alarms, step=3, run=RUN) == ""
    said = alarm_of(FINE | {metric: value}, alarms, step=3, run=RUN)
    assert re.match(f"step 3: {metric}.*alarms.{threshold}=.*To mend it", said)
    assert re.search(message, said) and "(resume_mode=outputs/a/1)" in said
    assert metric in alarm_of(FINE | {metric: float("nan")}, alarms, step=3, run=RUN)  # is not fine
    off = {name: 0.0 for name in AlarmSettings.__dataclass_fields__}
    assert alarm_of(FINE | {metric: value}, AlarmSettings(**off), step=3, run=RUN) == ""


def test_a_step_without_an_update_has_nothing_to_compare():
    assert alarm_of({}, AlarmSettings(max_kl=0.1, min_eff_sample_size=0.9), step=1, run=RUN) == ""


def test_thresholds_are_set_from_the_command_line_and_may_change_when_a_run_goes_on():
    words = [f"{OFF}.alarms.max_kl=0.3", f"{OFF}.alarms.min_eff_sample_size=0.2"]
    alarms = compose("train", TrainConfig, [*SMALL, *words]).trainer.learner.off_policy.alarms
    assert (alarms.max_kl, alarms.min_eff_sample_size) == (0.3, 0.2)
    assert {f"{OFF}.alarms.{name}" for name in AlarmSettings.__dataclass_fields__} < {*MAY_CHANGE}


def test_a_step_beyond_a_threshold_is_logged_and_not_published():
    stages, rows = [], []
    disagreeing = FINE | {"training/rollout_kl": 1.2}
    words = dict(rewards=[1.0, 0.0], stages=stages, rows=rows)
    with pytest.raises(RunFailed, match="step 7: training/rollout_kl=1.2"):
        learn("algorithm=grpo", **words, reported=disagreeing)
    assert rows == [(7, disagreeing)] and stages == ["learning"]
    _, _, updates = learn("algorithm=grpo", **words, reported=FINE)
    assert stages[-1] == "publishing weights" and len(rows) == 1
    ((_, version),) = updates
    assert version == 3  # the policy version in force reaches the learner
    learn("algorithm=grpo", f"{OFF}.alarms.max_kl=0", **words, reported=disagreeing)
    assert len(rows) == 1


SAMPLER = """
from dataclasses import replace
from rollout.strategies import TreePO

class OfOtherWeights(TreePO):
    def advance(self, state, results):
        return super().advance(state, [replace(r, logprobs=r.logprobs + 1.5) for r in results])
"""


@pytest.mark.long
def test_a_sampler_that_disagrees_stops_the_run_before_its_update_is_published(tmp_path):
    """Tokens are noted as 1.5 nats likelier than the learner finds them, which the weights' own
    proof at every publication cannot see; the alarm is on by default.
    """
    file = tmp_path / "sampler.py"
    file.write_text(SAMPLER)
    done = run(
        tmp_path,
        f"rollout.strategy={file}:OfOtherWeights",
        "trainer.val_before_train=false",
        "trainer.total_steps=2",
        "trainer.learner.optimizer.lr_warmup_steps=1",
    )
    assert done.returncode != 0
    assert re.search(r"step 1: training/rollout_kl=1\.[45]\d* is above", done.stderr), done.stderr
    assert "trainer.learner.off_policy.alarms.max_kl=1: the sampler's" in done.stderr
    assert "not published" in done.stderr and "Traceback" not in done.stderr
    (row,) = read_rows(tmp_path / "latest" / "metrics.jsonl")
    assert row["training/rollout_kl"] == pytest.approx(1.5, abs=0.1)
    assert row["training/rollout_is_eff_sample_size"] > 0.99  # all are off by the same
    assert row["actor/num_updates"] > 0 and "sync/golden_logprob_diff_max" not in row
