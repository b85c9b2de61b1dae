"""A batch in which nothing has a signal: nothing is learned, and the run says so and goes on."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from scored_trees import flat
from training_runs import SMALL, run

from treepo.advantages import filter_groups
from treepo.checkpoint import RunState
from treepo.cli import compose
from treepo.config import TrainConfig, strategy_settings
from treepo.dynamic_sampling import StepBatch
from treepo.run_folder import RunFolder
from treepo.session import Session
from treepo.tracking import read_rows

REWARD = """
def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    return 1.0
"""


@pytest.mark.long
def test_steps_without_any_signal_are_skipped_and_counted(tmp_path):
    file = tmp_path / "always_right.py"
    file.write_text(REWARD)
    done = run(
        tmp_path,
        "trainer.total_steps=2",
        "trainer.learner.optimizer.lr_warmup_steps=1",
        "reward=custom",
        f"reward.parts.custom.name={file}:compute_score",
    )
    assert done.returncode == 0, done.stderr
    assert "step 2 skipped: the responses of every prompt score the same" in done.stdout
    steps = read_rows(tmp_path / "latest" / "metrics.jsonl")[1:]
    for row in steps:
        assert row["training/skipped_steps"] == 1 and row["frac_reward_zero_std"] == 1
        assert row["critic/score/mean"] == 1 and "actor/pg_loss" not in row
        assert row["training/policy_version"] == 0  # nothing new to publish
    summary = json.loads((tmp_path / "latest" / "summary.json").read_text())
    assert summary["steps"] == 2 and summary["before"] == summary["after"]


class Unpublished(Session):
    def publish(self):
        return {}


def learn(*overrides, rewards, others=(), reported=None, stages=None, rows=None):
    """``Session.learn`` on flat trees; its metrics, what it said, and the updates it asked for
    of a cluster that only notes them and answers ``reported``. ``stages`` and ``rows`` (lists) get
    the stages that it went through and the rows that it logged.
    """
    config = compose("train", TrainConfig, [*SMALL, "trainer.save_trees_freq=0", *overrides])
    said, updates = [], []
    stages = [] if stages is None else stages
    progress = SimpleNamespace(say=said.append, stage=stages.append)
    tracker = SimpleNamespace(log=lambda step, metrics: rows.append((step, metrics)))
    answer = reported or {}
    cluster = SimpleNamespace(
        update=lambda batches, version: updates.append((batches, version)) or dict(answer)
    )
    nothing = dict.fromkeys(Session.__dataclass_fields__)
    opened = dict(
        config=config,
        strategy=strategy_settings(config),
        cluster=cluster,
        progress=progress,
        tracker=tracker,
        timings={},
        run=RunFolder(path=Path("outputs/a/1")),
        state=START,
    )
    session = Unpublished(**nothing | opened)
    groups = [flat(scores) for scores in (rewards, *others)]
    counts = filter_groups(groups)[1]
    batch = StepBatch(
        sampled=None, kept=groups, counts=counts, returned=[], num_gen_batches=1, after=None
    )
    return session.learn(7, batch), said, updates


START = RunState(step=6, policy_version=3, data_position={}, digest="", seconds=0.0, seed=0)
NO_ROOT = "algorithm.adv_estimator=treepo_no_root"


def test_a_batch_whose_advantages_are_all_zero_is_skipped_and_said():
    """The prompt's responses score differently, but none share a segment below the prompt."""
    metrics, said, updates = learn(NO_ROOT, rewards=[1.0, 0.0, 0.0])
    assert metrics == {"training/skipped_steps": 1.0} and not updates
    assert said == ["step 7 skipped: every advantage is 0, so there is nothing to learn"]


@pytest.mark.parametrize(
    "term", [[], ["policy_loss.kl_loss_coef=0.01"], ["policy_loss.entropy_coeff=0.01"]]
)
def test_terms_that_need_no_advantage_train_on_such_a_batch(term):
    overrides = [f"trainer.learner.{setting}" for setting in term]
    for rewards in ([1.0, 0.0, 0.0], [1.0, 1.0, 1.0]):
        metrics, said, updates = learn(NO_ROOT, *overrides, rewards=rewards)
        assert bool(updates) == bool(term) == (not said)
        assert metrics["training/skipped_steps"] == (not term)


def test_a_batch_with_a_signal_trains():
    metrics, said, updates = learn("algorithm.adv_estimator=grpo", rewards=[1.0, 0.0, 0.0])
    assert len(updates) == 1 and not said and metrics["training/skipped_steps"] == 0
    # all of its prompts alike, and the prompts apart: a signal for an estimator of whole batches
    metrics, said, updates = learn(
        "algorithm=reinforce_pp", rewards=[1.0, 1.0], others=[[0.0, 0.0, 0.0]]
    )
    assert len(updates) == 1 and not said and metrics["training/skipped_steps"] == 0
