from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from treepo.report import ReportConfig, report, work
from treepo.run_folder import RunFolder


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    run = RunFolder(path=tmp_path / "adding" / "20261123-080000-abcdef")
    run.trees.mkdir(parents=True)
    run.config_file.write_text("seed: 1\n")
    rows = [
        {"step": 0, "time": 0, "val-core/easy/greedy": 0.5},
        {"step": 1, "time": 2, "critic/accuracy": 0.25, "timing_s/gen": 3, "timing_s/step": 4},
        {"step": 2, "time": 4, "critic/accuracy": None, "timing_s/gen": 1, "timing_s/step": 4},
        {"step": 3, "time": 9, "critic/accuracy": 0.75, "val-core/easy/greedy": 0.875},
    ]
    run.metrics_file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for step in (2, 10):
        leaves = [
            {"reward": 0.0, "text": "3 + 4 = 8\u2028"},  # no line break of a file
            {"reward": None, "text": "no verdict"},
            {"reward": 1.0, "text": f"right at step {step}"},
            {"reward": 0.5, "text": "middling"},
        ]
        tree = {"problem_id": "sum-1", "nodes": [{"text": "3 + 4 [?]"}], "leaves": leaves}
        run.trees_file(step).write_text(json.dumps(tree, ensure_ascii=False) + "\n")
    return run


def shown(run: RunFolder, samples: int = 2) -> str:
    console = Console(file=io.StringIO(), width=140)
    report(run, samples, console)
    return console.file.getvalue()


def line_with(text: str, word: str) -> str:
    return next(line for line in text.splitlines() if word in line)


def test_the_report_of_an_unfinished_run_has_curves_and_times(run: RunFolder) -> None:
    text = shown(run)
    assert "adding 20261123-080000-abcdef: not finished, 3 steps" in text
    accuracy = line_with(text, "critic/accuracy")
    assert "▁█" in accuracy and "0.25" in accuracy and "0.75" in accuracy
    assert "0.875" in line_with(text, "val-core/easy/greedy")
    generation = line_with(text, " gen ")
    assert "4.0" in generation and "50%" in generation


def test_the_report_of_a_finished_run_has_its_scores(run: RunFolder) -> None:
    run.finish({"before": {"easy greedy": 0.5}, "after": {"easy greedy": 0.9}, "seconds": 90.0})
    text = shown(run)
    assert "finished, 3 steps, 1:30" in text
    assert "0.500" in line_with(text, "easy greedy") and "0.900" in line_with(text, "easy greedy")


def test_the_best_and_worst_responses_of_the_newest_trees_are_shown(run: RunFolder) -> None:
    text = shown(run)
    assert "step_10, sum-1: 3 + 4 [?]" in text
    assert "reward 1: right at step 10" in text and "reward 0: 3 + 4 = 8" in text
    assert "middling" not in text and "no verdict" not in text and "at step 2" not in text
    assert "right at step" not in shown(run, samples=0)


def test_a_run_that_has_only_begun_is_reported(tmp_path: Path) -> None:
    run = RunFolder(path=tmp_path / "adding" / "1")
    run.path.mkdir(parents=True)
    run.config_file.write_text("")
    assert "not finished, 0 steps" in shown(run)


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no run's folder"):
        work(ReportConfig(run=str(tmp_path)), False)
