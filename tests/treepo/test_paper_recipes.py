"""The papers' recipes run: on a tiny model and short responses, everything else as it stands."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import reasoning_gym

from treepo.tracking import read_rows

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]

# What needs GPUs: the size of model, batches and responses.
SMALL = [
    "model.path=asset:tiny_chain_sum",
    "cluster=laptop",
    "max_prompt_length=96",
    "rollout.n=4",
    "rollout.max_response_length=64",
    "engine.num_kv_slots=65536",
    "trainer.total_steps=8",
    "trainer.train_batch_size=4",
    "trainer.ppo_mini_batch_size=4",
    "trainer.learner.max_tokens_per_micro_batch=4096",
    "trainer.learner.optimizer.lr_warmup_steps=2",
    "trainer.learner.num_threads=1",
]
TREES = [
    "rollout.segment_length=8",
    "rollout.max_depth=8",
    "rollout.initial_divergence_max=4",
    "reward.parts.length.options.buffer_length=8",
]
IN_SEGMENTS = "trainer.segments.segment_length=16"


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """A file of sums that the tiny model is wrong about half of the time."""
    sums = reasoning_gym.create_dataset(
        "chain_sum", seed=5, size=64, min_terms=3, max_terms=5, min_digits=1, max_digits=1
    )
    file = tmp_path / "rows.jsonl"
    lines = [{"question": row["question"], "answer": f"#### {row['answer']}"} for row in sums]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("treepo_paper", TREES),
        ("treepo_ulorl", [*TREES, IN_SEGMENTS]),
        ("ulorl_paper", [IN_SEGMENTS, "trainer.learner.mpt.max_entropy=9"]),
    ],
)
def test_a_recipe_trains(recipe, words, rows, tmp_path):
    choices = [f"+experiment={recipe}", f"data.files=[{rows}]", *SMALL, *words]
    done = subprocess.run(
        [sys.executable, "-m", "treepo.train", *choices, f"output_dir={tmp_path}"],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "COLUMNS": "200"},
    )
    assert done.returncode == 0, done.stderr
    found = read_rows(tmp_path / "latest" / "metrics.jsonl")
    steps = [row for row in found if row["step"]]
    trained = [row for row in steps if not row["training/skipped_steps"]]
    assert len(steps) == 8 and trained, done.stdout
    assert all(row["training/num_groups_without_verdict"] == 0 for row in steps)
    if IN_SEGMENTS in words:
        assert max(row["training/segments_per_group/max"] for row in trained) > 1
    if recipe == "ulorl_paper":
        assert any(row["actor/mpt_masked_frac"] > 0 for row in trained)
    else:
        assert max(row["tree/shared_token_ratio"] for row in trained) > 0
