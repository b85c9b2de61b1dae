"""GSM8K's rows go through the same path as every other data: read, sampled, judged, trained on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from treepo.tracking import read_rows

REAL = Path(__file__).parents[3] / "shared" / "data" / "gsm8k" / "train.jsonl"


def rows() -> list[str]:
    """The data set's own rows where they lie beside the project, and always some of its form."""
    made = [
        {
            "question": f"Ann has {i} apples and buys {i + 2} more. How many has she now?",
            "answer": f"She has {i} + {i + 2} = <<{i}+{i + 2}={2 * i + 2}>>{2 * i + 2}.\n"
            f"#### {2 * i + 2}",
        }
        for i in range(1, 13)
    ]
    lines = [json.dumps(row) for row in made]
    return lines + (REAL.read_text().splitlines()[:12] if REAL.is_file() else [])


def test_the_gsm8k_experiment_samples_and_scores_on_the_tiny_model(tmp_path):
    train, held_out = tmp_path / "train.jsonl", tmp_path / "test.jsonl"
    train.write_text("\n".join(rows()) + "\n")
    question = {"question": "What is 3 + 4?", "answer": "3 + 4 = 7\n#### 7"}
    held_out.write_text(json.dumps(question) + "\n")
    done = subprocess.run(
        [sys.executable, "-m", "treepo.train", "+experiment=gsm8k", f"output_dir={tmp_path}"]
        + ["data.source=file", f"data.files=[{train}]", "evaluation.splits.gsm8k.source=file"]
        + [f"evaluation.splits.gsm8k.files=[{held_out}]", "evaluation.num_samples=2"]
        + ["rollout.max_response_length=32", "rollout.segment_length=8", "rollout.n=4"]
        + ["trainer.train_batch_size=4", "trainer.ppo_mini_batch_size=4", "trainer.total_steps=2"]
        + ["trainer.learner.optimizer.lr_warmup_steps=1", "trainer.learner.num_threads=1"]
        + ["cluster.num_rollout_workers=1", "cluster.num_learner_ranks=1"]
        + ["reward.num_workers=1"],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "200"},
    )
    assert done.returncode == 0, done.stderr
    steps = [row for row in read_rows(tmp_path / "latest" / "metrics.jsonl") if row["step"] > 0]
    assert len(steps) == 2
    for row in steps:
        outcomes = {k: v for k, v in row.items() if k.startswith("reward/outcome/")}
        assert sum(outcomes.values()) == 16
        assert outcomes["reward/outcome/error"] == outcomes["reward/outcome/timeout"] == 0
