"""A batch in which no prompt has a signal: nothing is learned, and the run says so and goes on."""

import json

from training_runs import run

from treepo.tracking import read_rows

REWARD = """
def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    return 1.0
"""


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
    steps = read_rows(tmp_path / "latest" / "metrics.jsonl")[1:]
    for row in steps:
        assert row["training/skipped_steps"] == 1 and row["frac_reward_zero_std"] == 1
        assert row["critic/score/mean"] == 1 and "actor/pg_loss" not in row
        assert row["training/policy_version"] == 0  # nothing new to publish
    summary = json.loads((tmp_path / "latest" / "summary.json").read_text())
    assert summary["steps"] == 2 and summary["before"] == summary["after"]
