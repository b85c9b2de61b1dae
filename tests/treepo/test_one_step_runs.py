"""Training on a batch while the next one is sampled: which weights draw what, that each prompt is
used once, and that a run that was killed comes to the same end.
"""

import json
from collections import Counter
from pathlib import Path

import pytest
from training_runs import (
    assert_same_end,
    documented_metrics,
    finish,
    kill_after,
    run,
    step_trees,
    varied_reward,
)

from treepo.checkpoint import latest_checkpoint
from treepo.one_step import AHEAD_FILE, load_ahead
from treepo.pools import POOLS_FILE, load_pools
from treepo.tracking import read_rows

ONE_STEP = [
    "trainer=one_step",
    "cluster.colocate=false",
    "data.size=24",
    "trainer.learner.optimizer.lr_warmup_steps=1",
    "evaluation.num_samples=1",
]
FLAT = ["rollout=flat", "algorithm=grpo", "rollout.n=4", "rollout.max_response_length=64"]


def versions(folder: Path, step: int) -> set[int]:
    """Of all sampled tokens of the step's trees."""
    return {
        version
        for tree in step_trees(folder, step)
        for node in tree["nodes"][1:]
        for version, _ in node["version_runs"]
    }


def test_a_batch_trains_one_update_after_the_weights_that_drew_it(tmp_path):
    words = [*ONE_STEP, *FLAT, *varied_reward(tmp_path), "trainer.total_steps=4"]
    words += ["trainer.save_freq=2", "trainer.keep_checkpoints=9"]
    folder = finish(tmp_path, words)
    rows = read_rows(folder / "metrics.jsonl")[1:]
    assert [row["training/skipped_steps"] for row in rows] == [0.0] * 4
    assert [versions(folder, step) for step in (1, 2, 3, 4)] == [{0}, {0}, {1}, {2}]
    assert [row["training/staleness/mean"] for row in rows] == [0, 1, 1, 1]
    assert [row["training/policy_version"] for row in rows] == [1, 2, 3, 4]
    for row in rows:
        assert 0 <= row["pipeline/learner_idle_frac"] < 1
        assert 0 <= row["pipeline/rollout_idle_frac"] <= 1
    assert rows[-1]["pipeline/rollout_idle_frac"] == 1, "the last step has nothing to draw"
    logged = {name for row in rows for name in row if not name.startswith(("val-", "reward/part/"))}
    assert not logged - documented_metrics()
    ids = Counter(tree["problem_id"] for step in (1, 2, 3, 4) for tree in step_trees(folder, step))
    assert len(ids) == 16 and max(ids.values()) == 1
    # What a checkpoint holds is the batch of the next step.
    middle = folder / "checkpoints" / "global_step_2"
    ahead = load_ahead((middle / AHEAD_FILE).read_bytes())
    in_step_3 = {tree["problem_id"] for tree in step_trees(folder, 3)}
    assert {problem.id for problem in ahead.sampled.problems} == in_step_3
    assert not (folder / "checkpoints" / "global_step_4" / AHEAD_FILE).exists()


BREAKS_DOWN = """
from pathlib import Path

FOLDER = Path(__file__).parent

def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    with open(FOLDER / "calls", "a") as file:
        file.write("x")
        if file.tell() > 40 and not (FOLDER / "repaired").exists():
            raise RuntimeError("service down")
    return sum(map(ord, solution_str)) % 10 / 10
"""


@pytest.mark.long
def test_a_batch_that_a_broken_verifier_left_without_verdicts_is_not_what_a_resumed_run_learns_from(
    tmp_path,
):
    file = tmp_path / "breaks.py"
    file.write_text(BREAKS_DOWN)
    words = [*ONE_STEP, *FLAT, "reward=custom", f"reward.parts.custom.name={file}:compute_score"]
    words += ["trainer.total_steps=5", "trainer.save_freq=1", "trainer.val_before_train=false"]
    done = run(tmp_path, *words)
    assert done.returncode == 1 and "service down" in done.stderr, done.stderr
    broken = (tmp_path / "latest").resolve()
    assert latest_checkpoint(broken / "checkpoints") is not None, "the case did not arise"
    (tmp_path / "repaired").touch()
    assert finish(tmp_path, words) == broken
    ids = Counter(tree["problem_id"] for step in range(1, 6) for tree in step_trees(broken, step))
    assert len(ids) == 20 and max(ids.values()) == 1


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "choices",
    [
        [*FLAT, "cluster.num_rollout_workers=2", "cluster.cpus_per_rollout_worker=0.5"],
        [
            "rollout.temperature=2.0",
            "trainer.segments.segment_length=12",
            "trainer.segments.max_staleness=2",
            "trainer.segments.refill=keep_in_flight",
            "trainer.segments.prompts_in_flight=9",
            "trainer.segments.stop_when_finished=4",
        ],
    ],
    ids=["flat", "trees in segments that stop at 4"],
)
def test_a_killed_run_learns_from_the_batch_that_waited_and_comes_to_the_same_end(
    tmp_path, choices
):
    words = [*ONE_STEP, *choices, *varied_reward(tmp_path), "trainer.total_steps=7"]
    words += ["trainer.save_freq=2"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    expected = finish(whole, words)
    killed = kill_after(cut, words, steps=3)
    newest = latest_checkpoint(killed / "checkpoints")
    files = json.loads((newest / "complete.json").read_text())["files"]
    assert AHEAD_FILE in files, "the case did not arise"
    if "trainer.segments.stop_when_finished=4" in choices:
        assert load_pools((newest / POOLS_FILE).read_bytes()).unfinished, "nothing was cut"
    assert finish(cut, words) == killed
    assert_same_end(expected, killed)
    rows = read_rows(expected / "metrics.jsonl")[1:]
    ages = [row["training/staleness/max"] for row in rows if not row["training/skipped_steps"]]
    cap = 2 if "trainer.segments.max_staleness=2" in choices else 1
    assert max(ages) == cap
    if cap == 2:
        counts = [row["rollout/num_finished"] for row in rows]
        assert counts.count(4) > 2, "steps were not cut at 4"
