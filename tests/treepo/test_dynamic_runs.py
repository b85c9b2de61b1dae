"""Training with further batches of prompts: it happens, is bounded, and resumes to the same end."""

from collections import Counter
from pathlib import Path

import pytest
from training_runs import assert_same_end, finish, kill_after, run, step_trees

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
    expected = finish(whole, settings)
    killed = kill_after(cut, settings, steps=4)
    assert finish(cut, settings) == killed
    batches = "training/num_gen_batches", "training/num_returned_groups"
    assert_same_end(expected, killed, *batches)
    rows = read_rows(expected / "metrics.jsonl")
    assert max(row.get("training/num_gen_batches", 0) for row in rows) > 1
