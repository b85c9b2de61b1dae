"""Small training runs for tests, started as a user starts them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from treepo.tracking import read_rows

SMALL = [
    "+experiment=quickstart",
    "data.size=64",
    "rollout.n=4",
    "rollout.initial_divergence_min=2",
    "rollout.initial_divergence_max=2",
    "trainer.train_batch_size=4",
    "trainer.ppo_mini_batch_size=2",
    "trainer.save_trees_freq=1",
    "trainer.learner.num_threads=1",
    "evaluation.splits.held_out.size=8",
    "evaluation.splits.longer.size=8",
    "evaluation.num_samples=2",
    "cluster.num_rollout_workers=1",
    "cluster.num_learner_ranks=1",
    "reward.num_workers=1",
]

# Scores that vary with the response, so that nearly every group has a signal.
VARIED_REWARD = """
def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    return sum(map(ord, solution_str)) % 10 / 10
"""

OF_TREES = "rollout.initial_divergence"  # what flat sampling has no setting for


def command(outputs: Path, *overrides: str) -> list[str]:
    """``python -m treepo.train`` on a few problems, writing below ``outputs``."""
    flat = "rollout=flat" in overrides
    small = [word for word in SMALL if not (flat and word.startswith(OF_TREES))]
    return [sys.executable, "-m", "treepo.train", *small, f"output_dir={outputs}", *overrides]


def start(outputs: Path, *overrides: str) -> subprocess.Popen[str]:
    """Start a run as a process of its own; its output is read through a pipe."""
    return subprocess.Popen(
        command(outputs, *overrides),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "COLUMNS": "200"},
    )


def run(outputs: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    """Run to the end; the caller looks at ``returncode``."""
    return subprocess.run(
        command(outputs, *overrides),
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, "COLUMNS": "200"},
    )


def finish(outputs: Path, words: list[str]) -> Path:
    """Run to a good end; the run's folder."""
    done = run(outputs, *words)
    assert done.returncode == 0, done.stderr
    return (outputs / "latest").resolve()


def kill_after(outputs: Path, words: list[str], steps: int) -> Path:
    """Start a run and kill it when it has done more than ``steps``; its folder."""
    process = start(outputs, *words)
    wait_for(lambda: num_rows(outputs) > steps, process)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    return (outputs / "latest").resolve()


def assert_same_end(one: Path, other: Path, *metrics: str) -> None:
    """Two finished runs have the same weights, scores, trees and ``metrics`` of all steps."""
    summaries = [json.loads((run / "summary.json").read_text()) for run in (one, other)]
    for name in ("digest", "before", "after", "steps"):
        assert summaries[0][name] == summaries[1][name], name
    rows = [read_rows(run / "metrics.jsonl") for run in (one, other)]
    for name in ("step", "actor/pg_loss", "critic/score/mean", *metrics):
        assert [r.get(name) for r in rows[0]] == [r.get(name) for r in rows[1]], name
    for step in range(1, summaries[0]["steps"] + 1):
        assert step_trees(one, step) == step_trees(other, step), f"trees of step {step}"


def varied_reward(folder: Path) -> list[str]:
    """What chooses ``VARIED_REWARD``, written below ``folder``."""
    file = folder / "varied.py"
    file.write_text(VARIED_REWARD)
    return ["reward=custom", f"reward.parts.custom.name={file}:compute_score"]


def step_trees(run_folder: Path, step: int) -> list[dict]:
    """The lines of a step's file of trees."""
    lines = (run_folder / "trees" / f"step_{step}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def wait_for(condition, process, seconds: float = 240) -> None:
    """Poll until ``condition()``; fail if the process ends or time runs out first."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline, "the run did not get there in time"
        time.sleep(0.02)


def num_rows(outputs: Path) -> int:
    """Rows written so far, that of the evaluation before training included."""
    return len(read_rows(outputs / "latest" / "metrics.jsonl"))


def documented_metrics() -> set[str]:
    """The names in docs/metrics.md, their braces spelt out."""
    text = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
    names = set()
    for name in re.findall(r"`([^`]+)`", text):
        before, _, rest = name.partition("{")
        choices, _, after = rest.partition("}")
        names |= {before + choice + after for choice in choices.split(",")}
    return names
