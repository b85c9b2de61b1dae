"""The scripts that run and compare variants: which runs, and the numbers of the table."""

from __future__ import annotations

import json
from pathlib import Path

import compare_learning
import pytest
import study
import yaml

from treepo.cli import compose
from treepo.config import TrainConfig

ROOT = Path(__file__).resolve().parent.parent
STUDIES = sorted((ROOT / "scripts" / "studies").glob("*.yaml"))


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_variant_of_a_shipped_study_is_a_valid_run(path):
    described = yaml.safe_load(path.read_text())
    runs = study.runs_of(described, [], [0])
    assert [run.variant for run in runs] == list(described["variants"])
    composed = {run.variant: compose("train", TrainConfig, list(run.overrides)) for run in runs}
    texts = [repr(config) for config in composed.values()]
    assert len(set(texts)) == len(texts)  # no two variants are the same run


def test_all_variants_of_a_seed_run_before_the_next_seed():
    described = {"name": "s", "overrides": ["x=1"], "variants": {"a": ["y=2"], "b": []}}
    runs = study.runs_of(described, [], [3, 4])
    assert [(run.variant, run.seed) for run in runs] == [("a", 3), ("b", 3), ("a", 4), ("b", 4)]
    assert runs[0].overrides == ("x=1", "y=2") and runs[0].experiment == "s.a"
    with pytest.raises(ValueError, match=r"unknown variants \['c'\].*\['a', 'b'\]"):
        study.runs_of(described, ["c"], [0])


def test_a_finished_run_is_not_repeated(tmp_path):
    (run,) = study.runs_of({"name": "s", "overrides": [], "variants": {"a": []}}, [], [7])
    assert not run.is_finished(tmp_path)
    folder = tmp_path / "s.a" / "first"
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps({"seed": 7}))
    assert run.is_finished(tmp_path)


def test_accuracies_are_compared_at_a_budget_that_every_run_reached(tmp_path):
    def write(name: str, tokens: int, accuracies: list[float]) -> Path:
        run = tmp_path / name / "run"
        run.mkdir(parents=True)
        rows = [{"step": 0, "time": 0.0, "acc": accuracies[0]}]
        for step, accuracy in enumerate(accuracies[1:], start=1):
            costs = {name: float(tokens) for name in compare_learning.COSTS}
            rows.append({"step": step, "time": 1.0, "acc": accuracy, **costs})
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return run

    cheap = compare_learning.read_curve(write("cheap", 1_000_000, [0.1, 0.5, 0.9]), "acc")
    dear = compare_learning.read_curve(write("dear", 4_000_000, [0.1, 0.3, 0.9]), "acc")
    # Both reached 2 million: cheap with its last step, dear half-way through its first.
    assert cheap.accuracy_at("rollout/query_tokens", 2e6) == pytest.approx(0.9)
    assert dear.accuracy_at("rollout/query_tokens", 2e6) == pytest.approx(0.2)
    text = compare_learning.table({"cheap": [cheap], "dear": [dear]})
    assert "| cheap | 1 | 0.900 | 0.900 | 0.900 | 0.900 | 2.00M | 2.00M | 2000000 |" in text
    assert "| dear | 1 | 0.900 | 0.200 | 0.200 | 0.200 | 8.00M | 8.00M | 8000000 |" in text
    with pytest.raises(ValueError, match="no metric 'other'"):
        compare_learning.read_curve(tmp_path / "cheap" / "run", "other")


def test_the_interval_of_one_seed_is_its_value_and_of_several_holds_their_mean():
    assert compare_learning.interval([0.5]) == (0.5, 0.5, 0.5)
    mean, low, high = compare_learning.interval([0.2, 0.4, 0.6, 0.8])
    assert mean == pytest.approx(0.5) and 0.2 <= low < 0.5 < high <= 0.8
