"""The benchmarks' harness: order of runs, ratios pair by pair, and the report's form."""

from __future__ import annotations

import json
import platform
from pathlib import Path

import harness
import numpy as np
import pytest
from harness import Gate, Options, Report, Spread


def report(**changes) -> Report:
    fields = dict(name="n", device="d", settings={}, ratios={}, counts={}, timings={})
    return Report(**{**fields, **changes})


def test_runs_take_turns_and_warm_up_untimed():
    log: list[str] = []
    ticks = iter(np.arange(100.0))
    runs = {"a": lambda: log.append("a"), "b": lambda: log.append("b")}
    seconds = harness.run_paired(
        runs, rounds=3, synchronize=lambda: log.append("|"), clock=lambda: next(ticks)
    )
    assert "".join(log) == "ab" + "|a||b|" * 3
    assert seconds == {"a": [1.0] * 3, "b": [1.0] * 3}


def test_a_speedup_is_taken_pair_by_pair():
    # Both slow down tenfold in the last round: the ratio of medians would be 2 / 1.
    seconds = {"ours": [1.0, 1.0, 10.0], "theirs": [4.0, 2.0, 20.0]}
    assert harness.speedup(seconds, "ours", "theirs") == Spread(median=2.0, min=2.0, max=4.0)


@pytest.mark.parametrize(
    ("gate", "passed"),
    [
        (Gate(name="g", value=2.0, at_least=2.0), True),
        (Gate(name="g", value=1.9, at_least=2.0), False),
        (Gate(name="g", value=0.15, at_most=0.15), True),
        (Gate(name="g", value=0.16, at_most=0.15), False),
    ],
)
def test_a_gate_passes_at_its_bound(gate, passed):
    assert gate.passed is passed


def test_the_report_is_written_with_its_fixed_fields(tmp_path, capsys):
    path = tmp_path / "new" / "report.json"
    found = report(
        settings={"layers": np.int64(2)},
        timings={"a": Spread(median=1.0, min=0.5, max=2.0)},
        gates=[Gate(name="fast", value=1.0, at_least=2.0)],
    )
    harness.finish(found, Options(quick=True, json=path))
    written = json.loads(path.read_text())
    assert list(written) == [
        *("name", "date", "device", "versions"),
        *("settings", "ratios", "counts", "timings", "gates"),
    ]
    assert written["settings"] == {"layers": 2}
    assert written["timings"] == {"a": {"median": 1.0, "min": 0.5, "max": 2.0}}
    assert written["gates"][0]["passed"] is False
    assert {"python", "torch", "transformers", "numpy"} <= set(written["versions"])
    assert "FAILED" in capsys.readouterr().out


def test_the_device_is_named_by_processor_and_threads_alone():
    words = harness.device_in_words(threads=1)
    assert words.endswith(", 1 thread")
    assert platform.node() not in words


def test_a_table_aligns_its_columns(capsys):
    harness.print_table("t", ("name", "x"), [("a", 1234.5), ("long name", 0.12346), ("b", 7)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:] == [
        "t",
        "       name       x",
        "          a   1,234",
        "  long name  0.1235",
        "          b       7",
    ]


def test_options_are_read_from_the_command_line():
    assert harness.parse_args("d", ["--quick", "--json", "x/y.json"]) == Options(
        quick=True, json=Path("x/y.json")
    )
    assert harness.parse_args(None, []) == Options(quick=False, json=None)
