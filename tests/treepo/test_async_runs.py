"""Training while sampling goes on: short runs to their end, a kill, and a worker's death."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from training_runs import (
    documented_metrics,
    num_rows,
    run,
    start,
    step_trees,
    varied_reward,
    wait_for,
)

from rollout.growth import Growth
from treepo.checkpoint import latest_checkpoint, read_state
from treepo.data_order import DataPosition, shuffle
from treepo.pools import POOLS_FILE, Pools, load_pools
from treepo.tracking import read_rows

ASYNC = [
    "trainer=async",
    "cluster.colocate=false",
    "trainer.segments.segment_length=6",
    "trainer.segments.max_staleness=2",
    "trainer.learner.optimizer.lr_warmup_steps=1",
    "evaluation.num_samples=1",
]
FLAT = ["rollout=flat", "algorithm=grpo", "rollout.max_response_length=64"]


def settings(tmp_path: Path, *more: str) -> list[str]:
    return [*ASYNC, *varied_reward(tmp_path), *more]


def newest_pools(folder: Path) -> tuple[Pools, DataPosition]:
    """What the run's newest checkpoint holds of the data, and the position in it."""
    checkpoint = latest_checkpoint(folder / "checkpoints")
    position = DataPosition.of(read_state(checkpoint).data_position)
    return load_pools((checkpoint / POOLS_FILE).read_bytes()), position


def lose_checkpoints_without_unfinished_work(folder: Path) -> None:
    """Remove the newest checkpoints up to one that holds trees cut off in the middle.

    What is unfinished when a checkpoint is written is a matter of time here; in about one of four
    it is nothing.
    """
    while not any(isinstance(entry.work, Growth) for entry in newest_pools(folder)[0].unfinished):
        shutil.rmtree(latest_checkpoint(folder / "checkpoints"))
        assert latest_checkpoint(folder / "checkpoints") is not None, "the case did not arise"


def check_each_prompt_once(folder: Path, num_problems: int, seed: int = 0) -> None:
    """By the files of a finished run: what was handed out is in the trees of a step, or still in
    the pools of the last checkpoint, and nothing else is.
    """
    pools, position = newest_pools(folder)
    steps = [row["step"] for row in read_rows(folder / "metrics.jsonl") if row["step"]]
    assert steps == list(range(1, len(steps) + 1))
    used = Counter(tree["problem_id"] for step in steps for tree in step_trees(folder, step))
    held = Counter(problem.id for problem in pools.problems)
    handed_out = Counter({number: position.epoch for number in range(num_problems)})
    handed_out.update(
        int(i) for i in shuffle(seed, position.epoch, num_problems)[: position.offset]
    )
    handed_out.subtract(position.deferred)
    found = sorted((used + held).values())
    found = [0] * (num_problems - len(found)) + found
    assert found == sorted(handed_out.values())


def test_two_steps_sample_and_learn_at_once_and_say_how_it_went(tmp_path):
    words = settings(tmp_path, *FLAT, "trainer.total_steps=2", "data.size=24")
    done = run(tmp_path, *words)
    assert done.returncode == 0, done.stderr
    assert "sampler idle" in done.stdout and "learner idle" in done.stdout
    folder = (tmp_path / "latest").resolve()
    rows = read_rows(folder / "metrics.jsonl")[1:]
    assert [row["training/policy_version"] for row in rows] == [1, 2]
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        assert 0 <= row["pipeline/rollout_idle_frac"] <= 1
        assert 0 <= row["pipeline/learner_idle_frac"] <= 1
        assert row["pipeline/num_slices"] >= 1 and row["actor/num_updates"] == 2
    assert rows[1]["sync/golden_logprob_diff_max"] < 1e-4
    logged = {name for row in rows for name in row if not name.startswith(("val-", "reward/part/"))}
    assert not logged - documented_metrics()
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["steps"] == 2 and 0 <= summary["pipeline"]["rollout_idle_frac"] <= 1
    check_each_prompt_once(folder, 24)


@pytest.mark.long
def test_prompts_without_a_signal_are_not_sampled_for_ever(tmp_path):
    """A broken verifier ends the run with its error; equal scores skip the step."""
    file = tmp_path / "broken.py"
    file.write_text("def compute_score(data_source, solution_str, ground_truth):\n    1 / 0\n")
    small = ["trainer.total_steps=2", "trainer.val_before_train=false"]
    words = settings(tmp_path, *FLAT, *small, f"reward.parts.custom.name={file}:compute_score")
    done = run(tmp_path / "broken", *words)
    assert done.returncode == 1 and "got a verdict" in done.stderr, done.stderr
    file.write_text(file.read_text().replace("1 / 0", "return 0.0"))
    done = run(tmp_path / "equal", *words)
    assert done.returncode == 0, done.stderr
    rows = read_rows(tmp_path / "equal" / "latest" / "metrics.jsonl")
    assert [row["training/skipped_steps"] for row in rows] == [1.0, 1.0]
    assert all(row["training/num_groups"] >= 40 for row in rows)  # 10 batches of 4
    check_each_prompt_once((tmp_path / "equal" / "latest").resolve(), 64)


@pytest.mark.long
@pytest.mark.parametrize(
    "choices",
    [
        FLAT,
        [
            "rollout.temperature=2.0",
            "cluster.num_rollout_workers=2",
            "cluster.cpus_per_rollout_worker=0.5",
            "trainer.segments.on_stale=drop",
            "trainer.segments.max_staleness=1",
            "trainer.segments.submit=longest_first",
        ],
        [
            *FLAT,
            "cluster.num_learner_ranks=2",
            "cluster.cpus_per_learner_rank=0.5",
            "trainer.learner.off_policy.correction=none",
            "trainer.learner.old_logprobs=sampled",
        ],
    ],
    ids=["finish", "trees_of_two_workers_drop", "two_ranks"],
)
def test_a_killed_run_goes_on_and_uses_each_prompt_once(tmp_path, choices):
    words = settings(
        tmp_path, *choices, "data.size=16", "trainer.total_steps=14", "trainer.save_freq=1",
        "trainer.test_freq=5", "trainer.keep_checkpoints=14",
    )  # fmt: skip
    process = start(tmp_path, *words)
    wait_for(lambda: num_rows(tmp_path) > 7, process)
    asked = "cluster.num_learner_ranks=2" in choices
    os.kill(process.pid, signal.SIGTERM if asked else signal.SIGKILL)
    _, errors = process.communicate()
    if asked:
        assert process.returncode == 130 and "goes on from the last checkpoint" in errors, errors
    killed = (tmp_path / "latest").resolve()
    lose_checkpoints_without_unfinished_work(killed)
    done = run(tmp_path, *words)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "latest").resolve() == killed
    check_each_prompt_once(killed, 16)
    rows = read_rows(killed / "metrics.jsonl")[1:]
    cap = 1 if "trainer.segments.max_staleness=1" in choices else 2
    assert all(row.get("training/staleness/max", 0) <= cap for row in rows)
    assert any(row.get("training/staleness/max", 0) > 0 for row in rows), "nothing overlapped"
    assert sum(row["training/skipped_steps"] for row in rows) < 3


@pytest.mark.long
def test_the_death_of_a_worker_ends_the_run_and_names_it(tmp_path):
    words = settings(tmp_path, *FLAT, "trainer.total_steps=400", "data.size=24")
    process = start(tmp_path, *words)
    wait_for(lambda: num_rows(tmp_path) > 1, process)
    os.kill(worker_process(process.pid, "RolloutWorker"), signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and "rollout worker 0 of 1 died" in errors, errors


def worker_process(of: int, name: str) -> int:
    """The process below ``of`` that Ray calls ``ray::<name>``."""
    rows = subprocess.run(
        ["ps", "-eo", "pid=,ppid=,args="], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    parsed = [row.split(None, 2) for row in rows]
    below, number = {of}, 0
    while number < len(below):
        number = len(below)
        below |= {int(pid) for pid, parent, _ in parsed if int(parent) in below}
    (found,) = (
        int(pid)
        for pid, _, words in parsed
        if int(pid) in below and words.startswith(f"ray::{name}")
    )
    return found


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_the_quickstart_learns_while_it_samples(tmp_path):
    words = ["+experiment=quickstart_async", f"output_dir={tmp_path}", "trainer.total_steps=40"]
    done = subprocess.run(
        [sys.executable, "-m", "treepo.train", *words],
        capture_output=True,
        text=True,
        env={name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"},
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "latest" / "summary.json").read_text())
    gain = np.mean([summary["after"][k] - summary["before"][k] for k in summary["before"]])
    assert gain > 0.1, summary
