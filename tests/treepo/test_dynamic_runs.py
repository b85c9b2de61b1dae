"""Training with further batches of prompts: it happens, is bounded, and resumes to the same end."""

import json
import os
import signal
from collections import Counter
from pathlib import Path

import pytest
from training_runs import num_rows, run, start, step_trees, wait_for

from treepo.tracking import read_rows

pytestmark = pytest.mark.long

# Every other problem scores 1 whatever the response: no signal. The others' scores vary with the
# response, which a high temperature makes differ.
REWARD = """
def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    return 1.0 if int(ground_truth) % 2 else sum(map(ord, solution_str)) % 10 / 10
"""


def overrides(tmp_path: Path, total_steps: int) -> list[str]:
    file = tmp_path / "every_other.py"
    file.write_text(REWARD)
    return [
        f"trainer.total_steps={total_steps}",
        "trainer.save_freq=2",
        "trainer.learner.optimizer.lr_warmup_steps=1",
        "trainer.keep_checkpoints=9",
        "algorithm=dynamic",
        "algorithm.filter_groups_metric=score",
        "rollout.temperature=2.0",
        "data.size=24",
        "reward=custom",
        f"reward.parts.custom.name={file}:compute_score",
        "evaluation.num_samples=1",
    ]


def informative(tree: dict) -> bool:
    return len({leaf["reward"] for leaf in tree["leaves"]}) > 1


def trained(tree: dict) -> bool:
    return tree["leaves"][0]["advantage"] is not None


def test_steps_sample_further_batches_within_the_bound_and_use_each_prompt_once(tmp_path):
    done = run(tmp_path, *overrides(tmp_path, total_steps=4))
    assert done.returncode == 0, done.stderr
    rows = read_rows(tmp_path / "latest" / "metrics.jsonl")[1:]
    batches = [row["training/num_gen_batches"] for row in rows]
    assert max(batches) > 1 and max(batches) <= 3
    assert any(row["training/num_returned_groups"] for row in rows)
    consumed: Counter[str] = Counter()
    returned_before: list[str] = []
    for row, step in zip(rows, range(1, 5), strict=True):
        trees = step_trees(tmp_path / "latest", step)
        ids = [tree["problem_id"] for tree in trees]
        assert len(ids) == len(set(ids)) == row["training/num_groups"] <= 12
        assert ids[: len(returned_before)] == returned_before
        with_signal = [tree["problem_id"] for tree in trees if informative(tree)]
        assert [tree["problem_id"] for tree in trees if trained(tree)] == with_signal[:4]
        if len(with_signal) < 4:
            assert row["training/num_gen_batches"] == 3
        returned_before = with_signal[4:]
        assert row["training/num_returned_groups"] == len(returned_before)
        consumed.update(set(ids) - set(returned_before))
    total = sum(consumed.values())
    assert total > 16, "more than four prompts a step"
    assert max(consumed.values()) <= -(-total // 24) + 1, "an epoch holds each of the 24 once"


def test_a_run_with_further_batches_is_resumed_to_the_same_weights(tmp_path):
    settings = overrides(tmp_path, total_steps=6)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    done = run(whole, *settings)
    assert done.returncode == 0, done.stderr
    process = start(cut, *settings)
    wait_for(lambda: num_rows(cut) > 4, process)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    done = run(cut, *settings)
    assert done.returncode == 0, done.stderr
    one, other = (
        json.loads((outputs / "latest" / "summary.json").read_text()) for outputs in (whole, cut)
    )
    for name in ("digest", "before", "after", "steps"):
        assert one[name] == other[name], name
    names = ("step", "training/num_gen_batches", "training/num_returned_groups", "actor/pg_loss")
    rows = [read_rows(outputs / "latest" / "metrics.jsonl") for outputs in (whole, cut)]
    for name in names:
        assert [r.get(name) for r in rows[0]] == [r.get(name) for r in rows[1]], name
    assert max(row.get("training/num_gen_batches", 0) for row in rows[0]) > 1
    for step in range(1, 7):
        assert step_trees(whole / "latest", step) == step_trees(cut / "latest", step)
