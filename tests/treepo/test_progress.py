from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

from rich.console import Console

from treepo.progress import Progress, clock_time, show_summary, sparkline

METRICS = {
    "critic/rewards/mean": 0.5,
    "critic/accuracy": 0.25,
    "response_length/mean": 31.25,
    "perf/throughput": 1234.6,
}


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def plain_console() -> Console:
    return Console(file=io.StringIO(), force_terminal=False, width=100)


def test_without_a_terminal_each_step_is_one_line() -> None:
    console, clock = plain_console(), Clock()
    with Progress(total_steps=10, title="adding", console=console, clock=clock) as progress:
        for step in (1, 2):
            clock.now += 3.0
            progress.update(step, METRICS)
    assert console.file.getvalue().splitlines() == [
        "adding",
        "step  1/10  reward 0.500  accuracy 0.250  response length 31.2  tokens/s 1,235  0:27 left",
        "step  2/10  reward 0.500  accuracy 0.250  response length 31.2  tokens/s 1,235  0:24 left",
    ]


def test_a_step_in_segments_in_which_nothing_ended_shows_what_is_unfinished() -> None:
    console = plain_console()
    with Progress(total_steps=1, console=console, clock=Clock()) as progress:
        progress.update(1, {"rollout/num_unfinished": 8.0, "perf/throughput": 0.0})
    assert console.file.getvalue() == "step 1/1  unfinished 8  tokens/s 0  0:00 left\n"


def test_without_a_terminal_a_stage_that_goes_on_is_one_line() -> None:
    console = plain_console()
    with Progress(total_steps=1, console=console) as progress:
        for name in ("sampling", "judging", "judging", "sampling"):
            progress.stage(name)
    assert console.file.getvalue().splitlines() == ["sampling", "judging", "sampling"]


def test_lines_are_not_wrapped_at_the_width_of_a_pipe() -> None:
    console = Console(file=io.StringIO(), force_terminal=False, width=20)
    with Progress(total_steps=1, console=console) as progress:
        progress.update(1, METRICS)
    assert len(console.file.getvalue().splitlines()) == 1


def test_what_is_missing_or_not_finite_is_left_out() -> None:
    console = plain_console()
    with Progress(total_steps=1, console=console, clock=Clock()) as progress:
        progress.update(1, {"critic/rewards/mean": float("nan"), "critic/accuracy": 1.0})
    assert console.file.getvalue() == "step 1/1  accuracy 1.000  0:00 left\n"


def test_the_time_left_follows_the_recent_steps_and_leaves_evaluations_out() -> None:
    clock = Clock()
    progress = Progress(total_steps=40, console=plain_console(), clock=clock)
    assert progress.seconds_left() is None
    clock.now += 100.0  # a slow first step
    progress.update(1, {})
    for step in range(2, 12):  # ten more push it out of the window
        clock.now += 2.0
        progress.update(step, {})
        clock.now += 50.0
        progress.evaluated(step, {"greedy": 0.5})
    assert progress.seconds_left() == (40 - 11) * 2.0


def test_a_resumed_run_counts_its_earlier_steps() -> None:
    console, clock = plain_console(), Clock()
    with Progress(total_steps=10, start_step=7, console=console, clock=clock) as progress:
        clock.now += 60.0  # workers start
        progress.begin_steps()
        clock.now += 1.0
        progress.update(8, {})
    assert "step  8/10  0:02 left" in console.file.getvalue()


def test_the_live_display_shows_everything() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    with Progress(total_steps=10, title="adding [x]", console=console) as progress:
        progress.stage("sampling")
        progress.update(4, METRICS)
        progress.evaluated(4, {"chain_sum greedy": 0.75})
        progress.say("checkpoint [4] written")
        progress.stage("training")
    shown = console.file.getvalue()
    for text in ("0.500", "0.250", "31.2", "1,235", "left", "chain_sum greedy 0.750", "▃"):
        assert text in shown, text
    assert "checkpoint [4] written" in shown


def test_a_sparkline_averages_what_does_not_fit() -> None:
    assert sparkline([0.0, 1.0], 10) == "▁█"
    assert sparkline([0.0, 1.0, 1.0, 1.0], 2) == "▅█"
    assert sparkline([-1.0, 2.0], 10) == "▁█"


def test_times_read_like_a_clock() -> None:
    assert [clock_time(s) for s in (0, 59.9, 93.4, 4000)] == ["0:00", "0:59", "1:33", "1:06:40"]


def test_the_summary_shows_before_after_and_where_to_go_on() -> None:
    console = plain_console()
    show_summary(
        before={"greedy": 0.44, "harder": float("nan")},
        after={"greedy": 0.91, "new": 0.5},
        seconds=240,
        run=Path("outputs/adding/1"),
        export=Path("outputs/adding/1/export"),
        overrides=["+experiment=quickstart", "experiment_name=adding", "data.files=[a, b]"],
        console=console,
    )
    text = console.file.getvalue()
    (greedy,) = [line for line in text.splitlines() if "greedy" in line]
    assert "0.440" in greedy and "0.910" in greedy and "+0.470" in greedy
    assert "4:00" in text
    assert "python -m treepo.report run=outputs/adding/1" in text
    again = "python -m treepo.evaluate checkpoint=outputs/adding/1/export "
    assert again + "+experiment=quickstart experiment_name=adding 'data.files=[a, b]'" in text


def test_the_summary_suggests_no_evaluation_that_could_not_run() -> None:
    for after, overrides in (({}, ["+experiment=quickstart"]), ({"greedy": 0.5}, [])):
        console, run = plain_console(), Path("outputs/adding/1")
        show_summary(
            before={}, after=after, seconds=1, run=run, overrides=overrides, console=console
        )
        assert "treepo.report" in console.file.getvalue()
        assert "treepo.evaluate" not in console.file.getvalue()
        assert ("no held-out problems to score" in console.file.getvalue()) == (not after)


def test_what_was_typed_is_known_to_the_command_that_runs() -> None:
    code = (
        "from treepo.cli import run_command, typed_overrides\n"
        "from treepo.config import TrainConfig\n"
        "assert typed_overrides() == []\n"
        "run_command('train', TrainConfig, lambda config, dry_run: print(typed_overrides()))\n"
    )
    words = ["+experiment=quickstart", "experiment_name=adding", "--dry-run", "rollout.n=8"]
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == str([word for word in words if word != "--dry-run"])


def test_quieted_libraries_speak_of_errors_only() -> None:
    code = """
from treepo.progress import quiet_libraries
quiet_libraries()
import logging
logger = logging.getLogger("DeepSpeed")
logger.addHandler(logging.StreamHandler())
logger.setLevel(logging.INFO)  # as the library does when it is imported
logger.info("chatter")
logger.warning("more chatter")
logger.error("a failure")
import warnings
warnings.warn("a warning")
"""
    environment = {**os.environ, "TORCH_CPP_LOG_LEVEL": "INFO"}
    done = subprocess.run(
        [sys.executable, "-c", code + "import os; print(os.environ['TORCH_CPP_LOG_LEVEL'])"],
        cwd=Path(__file__).resolve().parents[2],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr.strip() == "a failure"
    assert done.stdout.strip() == "INFO"
