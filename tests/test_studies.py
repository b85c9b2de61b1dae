"""The scripts that run and compare variants: which runs, and the numbers of the table."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import compare_learning
import matplotlib.pyplot as plt
import pytest
import study
import yaml

from treepo.cli import compose
from treepo.config import TrainConfig
from treepo.run_folder import begin_run

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
    folder, lock = begin_run(tmp_path, "s.a", "")
    assert not run.is_finished(tmp_path)
    folder.finish({"seed": 8})
    assert not run.is_finished(tmp_path)
    folder.finish({"seed": 7})
    assert run.is_finished(tmp_path)
    assert study.carry_out(run, tmp_path) == (True, "s.a seed 7: was finished")
    lock.release()


def test_a_study_fails_where_a_run_does_and_not_by_the_name_of_a_variant(tmp_path, monkeypatch):
    described = {"name": "s", "overrides": [], "variants": {"failed": [], "b": ["x"]}}
    good, bad = study.runs_of(described, [], [0])
    monkeypatch.setattr(
        study.Run,
        "command",
        lambda run, outputs: [sys.executable, "-c", f"print('so'); exit({3 * (run == bad)})"],
    )
    assert study.carry_out(good, tmp_path) == (True, "s.failed seed 0: done")
    ok, news = study.carry_out(bad, tmp_path)
    log = tmp_path / "s.b" / "seed_0.log"
    assert not ok and news == f"s.b seed 0: failed with code 3; see {log}"
    assert log.read_text() == "so\n"


def write_run(run: Path, tokens: int, accuracies: list[float]) -> None:
    run.mkdir(parents=True)
    rows = [{"step": 0, "time": 0.0, "acc": accuracies[0]}]
    for step, accuracy in enumerate(accuracies[1:], start=1):
        costs = {name: float(tokens) for name, _ in compare_learning.COSTS.values()}
        costs["entropy"] = step / 10
        rows.append({"step": step, "time": 1.0, "acc": accuracy, **costs})
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_accuracies_are_compared_at_a_budget_that_every_run_reached(tmp_path):
    cheap, dear = tmp_path / "cheap", tmp_path / "dear"
    write_run(cheap, 1_000_000, [0.1, 0.5, 0.9])
    write_run(dear, 4_000_000, [0.1, 0.3, 0.9])
    cheap, dear = (compare_learning.read_curve(run, "acc") for run in (cheap, dear))
    # Both reached 2 million: cheap with its last step, dear half-way through its first.
    assert cheap.accuracy_at("query", 2e6) == pytest.approx(0.9)
    assert dear.accuracy_at("query", 2e6) == pytest.approx(0.2)
    text = compare_learning.table({"cheap": [cheap], "dear": [dear]})
    assert "| cheap | 1 | 0.900 | 0.900 | 0.900 | 0.900 | 2.00M | 2.00M | 2.00M |" in text
    assert "| dear | 1 | 0.900 | 0.200 | 0.200 | 0.200 | 8.00M | 8.00M | 8.00M |" in text
    text = compare_learning.table({"cheap": [cheap], "dear": [dear]}, ["iterations"])
    assert "| at the end | at 2.00M iterations | iterations |" in text
    assert "| dear | 1 | 0.900 | 0.200 | 8.00M |" in text
    with pytest.raises(ValueError, match="no metric 'other'"):
        compare_learning.read_curve(tmp_path / "cheap", "other")


def test_metrics_of_steps_are_drawn_below_the_accuracy_against_every_cost(tmp_path):
    for name, tokens in (("cheap", 1000), ("dear", 4000)):
        write_run(tmp_path / name, tokens, [0.1, 0.5, 0.9])
    runs = [tmp_path / "cheap", tmp_path / "dear"]
    each = [compare_learning.read_curve(run, "acc", ["entropy"]) for run in runs]
    assert each[1].steps["entropy", "query"].tolist() == [[4000, 8000], [0.1, 0.2]]
    curves = {"both": each, "one": each[:1]}
    compare_learning.draw(curves, "acc", tmp_path / "picture.png", ["trained", "iterations"])
    height, width, _ = plt.imread(tmp_path / "picture.png").shape
    assert width == pytest.approx(2 * 4.8 / (2 * 3.8) * height, rel=0.01)  # two by two panels
    only_end = [replace(curve, accuracy=curve.accuracy[-1:]) for curve in each]
    compare_learning.draw({"both": only_end}, "acc", tmp_path / "picture.png", ["trained"])
    height, width, _ = plt.imread(tmp_path / "picture.png").shape
    assert width > height, "one row: the accuracy has no line"
    without_steps = [replace(curve, steps={}) for curve in only_end]
    compare_learning.draw({"both": without_steps}, "acc", tmp_path / "none.png", ["trained"])
    assert not (tmp_path / "none.png").exists()
    text = compare_learning.table({"both": only_end}, ["trained"])
    assert text.startswith("| variant | seeds | at the end | trained tokens |")
    with pytest.raises(ValueError, match="no metric 'other'"):
        compare_learning.read_curve(tmp_path / "cheap", "acc", ["other"])


def test_the_finished_runs_of_the_chosen_seeds_are_compared(tmp_path):
    for seed in (2, 0, 1):
        run = tmp_path / f"run_{seed}"
        write_run(run, 1000, [0.0, seed / 10])
        (run / "summary.json").write_text(json.dumps({"seed": seed}))
    write_run(tmp_path / "unfinished", 1000, [0.0, 0.9])

    def ends(seeds):
        found = compare_learning.read_variant(tmp_path, "acc", seeds)
        return [curve.accuracy[-1] for curve in found]

    assert ends(None) == [0.0, 0.1, 0.2]
    assert ends([2, 0, 5]) == [0.0, 0.2] and ends([5]) == []


def test_the_interval_of_one_seed_is_its_value_and_of_several_holds_their_mean():
    assert compare_learning.interval([0.5]) == (0.5, 0.5, 0.5)
    mean, low, high = compare_learning.interval([0.2, 0.4, 0.6, 0.8])
    assert mean == pytest.approx(0.5) and 0.2 <= low < 0.5 < high <= 0.8
