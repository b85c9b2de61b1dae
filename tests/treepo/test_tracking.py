from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from treepo.tracking import NON_FINITE, Tracker, drop_rows_after, read_rows
from treepo.tracking_settings import TrackingSettings


def make_tracker(folder: Path, mode: str = "disabled", **kwargs) -> Tracker:
    return Tracker(
        TrackingSettings(wandb_mode=mode),
        metrics_file=folder / "metrics.jsonl",
        experiment="adding",
        run_id="20261123-080000-abcd",
        clock=lambda: 12.5,
        **kwargs,
    )


def test_each_step_is_one_json_object_with_step_and_time(tmp_path: Path) -> None:
    with make_tracker(tmp_path) as tracker:
        tracker.log(0, {"val-core/chain_sum/mean@4": 0.25})
        tracker.log(
            1, {"actor/entropy": np.float32(0.5), "actor/pg_loss": torch.tensor(2.0), "n": 3}
        )
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"step": 0, "time": 12.5, "val-core/chain_sum/mean@4": 0.25},
        {"step": 1, "time": 12.5, "actor/entropy": 0.5, "actor/pg_loss": 2.0, "n": 3},
    ]


def test_a_row_is_on_disk_when_log_returns_even_if_the_process_dies(tmp_path: Path) -> None:
    code = f"""
import os
from pathlib import Path
from treepo.tracking import Tracker
from treepo.tracking_settings import TrackingSettings
tracker = Tracker(TrackingSettings(), metrics_file=Path({str(tmp_path / "metrics.jsonl")!r}),
                  experiment="a", run_id="b")
tracker.log(1, {{"x": 1.0}})
os.kill(os.getpid(), 9)
"""
    done = subprocess.run([sys.executable, "-c", code])
    assert done.returncode == -9
    assert [row["x"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1.0]


def test_values_that_are_not_finite_become_null_and_are_counted(tmp_path: Path) -> None:
    with make_tracker(tmp_path) as tracker:
        tracker.log(1, {"a": float("nan"), "b": np.float64("inf"), "c": torch.tensor(1.0)})
        tracker.log(2, {"a": 1.0})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text
    first, second = read_rows(tmp_path / "metrics.jsonl")
    assert (first["a"], first["b"], first["c"], first[NON_FINITE]) == (None, None, 1.0, 2)
    assert NON_FINITE not in second


def test_a_metric_that_is_no_number_is_refused_by_name(tmp_path: Path) -> None:
    with make_tracker(tmp_path) as tracker, pytest.raises(ValueError, match="actor/lr"):
        tracker.log(1, {"actor/lr": [1.0, 2.0]})


def test_a_resume_drops_rows_newer_than_the_checkpoint_and_goes_on(tmp_path: Path) -> None:
    with make_tracker(tmp_path) as tracker:
        for step in range(5):
            tracker.log(step, {"x": step})
    with make_tracker(tmp_path, resume_step=2) as tracker:
        tracker.log(3, {"x": 30})
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [(row["step"], row["x"]) for row in rows] == [(0, 0), (1, 1), (2, 2), (3, 30)]


def test_a_new_run_starts_with_an_empty_file(tmp_path: Path) -> None:
    with make_tracker(tmp_path) as tracker:
        tracker.log(7, {})
    with make_tracker(tmp_path) as tracker:
        tracker.log(0, {})
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [0]


def test_a_line_cut_short_by_a_crash_is_dropped_on_resume(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1, "time": 1.0}\n{"step": 2, "ti')
    with make_tracker(tmp_path, resume_step=2) as tracker:
        tracker.log(2, {"x": 1})
    assert [row["step"] for row in read_rows(file)] == [1, 2]


def test_a_damaged_line_in_the_middle_is_an_error_with_file_and_line(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\nnonsense\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2 "):
        drop_rows_after(file, 3)


def test_dropping_nothing_leaves_the_file_untouched(tmp_path: Path) -> None:
    with make_tracker(tmp_path) as tracker:
        tracker.log(1, {"x": 0.1})
    inode = (tmp_path / "metrics.jsonl").stat().st_ino
    assert drop_rows_after(tmp_path / "metrics.jsonl", 1) == 1
    assert (tmp_path / "metrics.jsonl").stat().st_ino == inode


def test_steps_must_grow(tmp_path: Path) -> None:
    with make_tracker(tmp_path) as tracker:
        tracker.log(1, {})
        with pytest.raises(AssertionError):
            tracker.log(1, {})


def test_the_run_keeps_its_wandb_id_over_a_resume(tmp_path: Path) -> None:
    with make_tracker(tmp_path, state={"wandb_id": "from-the-checkpoint"}) as tracker:
        assert tracker.state() == {"wandb_id": "from-the-checkpoint"}
    with make_tracker(tmp_path) as tracker:
        assert tracker.state() == {"wandb_id": "20261123-080000-abcd"}


def test_an_unknown_wandb_mode_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="tracking.wandb_mode='on'.*disabled, offline, online"):
        TrackingSettings(wandb_mode="on")


def test_wandb_offline_writes_a_run_without_network_or_account(tmp_path: Path) -> None:
    with make_tracker(tmp_path, mode="offline", config={"seed": 1}) as tracker:
        tracker.log(1, {"critic/score/mean": 0.5, "bad": float("nan")})
        tracker.summary({"after": {"greedy": 0.9}})
    (run,) = (tmp_path / "wandb").glob("offline-run-*-20261123-080000-abcd")
    (log,) = run.glob("*.wandb")
    # W&B's own process writes the file; on a busy machine it may end a moment after `finish`.
    deadline = time.monotonic() + 60
    while not {b"critic/score/mean", b"adding"} <= (written := known_words(log)):
        assert time.monotonic() < deadline, f"after a minute the file holds {written}"
        time.sleep(0.1)
    assert read_rows(tmp_path / "metrics.jsonl")[0]["critic/score/mean"] == 0.5


def known_words(log: Path) -> set[bytes]:
    content = log.read_bytes()
    return {word for word in (b"critic/score/mean", b"adding") if word in content}


def test_wandb_online_without_an_account_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    assert "WANDB_API_KEY" not in os.environ
    with pytest.raises(ValueError, match="wandb login"):
        make_tracker(tmp_path, mode="online")
