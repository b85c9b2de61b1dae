"""What a person sees of a run: a live display in a terminal, a line a step elsewhere, and a summary
at the end. Also the silencing of libraries whose logs would drown it. No torch in here.
"""

from __future__ import annotations

import logging
import math
import os
import shlex
import time
import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

# What is shown of a step's metrics: label, metric (see docs/metrics.md), format.
SHOWN = (
    ("reward", "critic/rewards/mean", "{:.3f}"),
    ("accuracy", "critic/accuracy", "{:.3f}"),
    ("response length", "response_length/mean", "{:.1f}"),
    ("unfinished", "rollout/num_unfinished", "{:.0f}"),
    ("tokens/s", "perf/throughput", "{:,.0f}"),
    ("sampler idle", "pipeline/rollout_idle_frac", "{:.0%}"),
    ("learner idle", "pipeline/learner_idle_frac", "{:.0%}"),
)
CURVE = "critic/accuracy"
_BARS = "▁▂▃▄▅▆▇█"
_RECENT = 10  # steps that the time left is judged by
_CURVE_WIDTH = 48  # characters


class Progress:
    """Shows how a run goes on. A context manager.

    Args:
        total_steps: steps of the whole run.
        start_step: steps that an earlier life of the run has done.
        title: stands above the display.
        console: where to write; the default is standard output.
        clock: seconds, never going back.
    """

    def __init__(
        self,
        *,
        total_steps: int,
        start_step: int = 0,
        title: str = "",
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total, self._step, self._title = total_steps, start_step, title
        self._console = console or Console()
        self._clock = clock
        self._begin = self._last = clock()
        self._durations: deque[float] = deque(maxlen=_RECENT)
        self._metrics: dict[str, float] = {}
        self._curve: list[float] = []
        self._evaluation = ""
        self._stage = ""
        self._live: Live | None = None
        if self._console.is_terminal:
            self._live = Live(
                console=self._console, get_renderable=self._render, refresh_per_second=4
            )

    def __enter__(self) -> Progress:
        if self._live is not None:
            self._live.start()
        elif self._title:
            self._line(self._title)
        return self

    def __exit__(self, *exception: object) -> None:
        self._stage = ""
        if self._live is not None:
            self._live.stop()

    def begin_steps(self) -> None:
        """The next step begins now: what went before is not taken for its time."""
        self._last = self._clock()

    def stage(self, name: str) -> None:
        """Say what is being done now."""
        is_new, self._stage = name != self._stage, name
        if self._live is None and is_new and self._step == 0 and not self._curve:
            self._line(name)  # before the first step a line tells that something is happening

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """A step is done.

        Args:
            metrics: as logged; those of ``SHOWN`` are displayed.
        """
        now = self._clock()
        self._durations.append(now - self._last)
        self._step, self._last, self._metrics = step, now, dict(metrics)
        if math.isfinite(value := metrics.get(CURVE, math.nan)):
            self._curve.append(value)
        if self._live is None:
            self._line(self.line())

    def evaluated(self, step: int, scores: Mapping[str, float]) -> None:
        """An evaluation is done; its time is not taken for a step's."""
        shown = "  ".join(f"{name} {value:.3f}" for name, value in scores.items())
        self._evaluation = f"after step {step}: {shown}"
        self._last = self._clock()
        if self._live is None:
            self._line(f"evaluation {self._evaluation}")

    def say(self, text: str) -> None:
        """Write a line that stays."""
        self._line(text)

    def seconds_left(self) -> float | None:
        """Of the remaining steps, judged by the recent ones; None before the first step."""
        if not self._durations:
            return None
        return (self._total - self._step) * sum(self._durations) / len(self._durations)

    def line(self) -> str:
        """The state as one line of text."""
        width = len(str(self._total))
        words = [f"step {self._step:>{width}}/{self._total}"]
        words += [f"{label} {value}" for label, value in self._values()]
        left = self.seconds_left()
        words += [f"{clock_time(left)} left"] if left is not None else []
        return "  ".join(words)

    def _values(self) -> list[tuple[str, str]]:
        return [
            (label, form.format(self._metrics[name]))
            for label, name, form in SHOWN
            if math.isfinite(self._metrics.get(name, math.nan))
        ]

    def _line(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _render(self) -> Panel:
        now, left = self._clock(), self.seconds_left()
        if left is not None:
            left = max(0.0, left - (now - self._last))
        head = Table.grid(padding=(0, 2), expand=False)
        head.add_row(
            f"step [bold]{self._step}[/]/{self._total}",
            ProgressBar(total=self._total, completed=self._step, width=32),
            f"{clock_time(now - self._begin)} gone",
            f"{clock_time(left)} left" if left is not None else "",
        )
        numbers = Table.grid(padding=(0, 2))
        for label, value in self._values():
            numbers.add_row(Text(label, style="dim"), Text(value, style="bold"))
        rows: list[Table | Text | Spinner] = [head, numbers]
        if self._curve:
            curve = Text("accuracy  ", style="dim")
            curve.append(sparkline(self._curve, _CURVE_WIDTH), style="green")
            rows.append(curve)
        if self._evaluation:
            rows.append(Text(f"held out {self._evaluation}", style="cyan"))
        if self._stage:
            rows.append(Spinner("dots", text=Text(self._stage, style="dim")))
        return Panel(Group(*rows), title=self._title or None, title_align="left", expand=False)


def sparkline(values: list[float], width: int) -> str:
    """Values of 0..1 as a line of at most ``width`` bars, each the mean of its share of them."""
    count = min(width, len(values))
    bars = []
    for i in range(count):
        share = values[i * len(values) // count : (i + 1) * len(values) // count]
        level = sum(share) / len(share)
        bars.append(_BARS[min(len(_BARS) - 1, max(0, int(level * len(_BARS))))])
    return "".join(bars)


def clock_time(seconds: float) -> str:
    """``93.4`` as ``1:33``, ``4000`` as ``1:06:40``."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def show_summary(
    *,
    before: Mapping[str, float],
    after: Mapping[str, float],
    seconds: float,
    run: Path,
    export: Path | None = None,
    overrides: Sequence[str] = (),
    console: Console | None = None,
) -> None:
    """The end of a run: scores before and after, where the model is, how to look deeper.

    Args:
        before: name -> score of 0..1; may lack what ``after`` has, and the other way round.
        overrides: what the run was started with; an evaluation with the same has the same problems
            and settings. Empty: none is suggested.
    """
    console = console or Console()
    if before or after:
        console.print(_accuracies(before, after, seconds))
    else:
        console.print(
            f"Done after {clock_time(seconds)}; there were no held-out problems to score."
        )
    lines = [f"Run          {run}"]
    if export is not None:
        lines.append(f"Model        {export}  (loads with transformers' from_pretrained)")
    lines.append(f"Look deeper  python -m treepo.report run={run}")
    if overrides and after:
        words = shlex.join([f"checkpoint={export or run}", *overrides])
        lines.append(f"Try again    python -m treepo.evaluate {words}")
    for text in lines:
        console.print(text, highlight=False, markup=False, soft_wrap=True)


def _accuracies(before: Mapping[str, float], after: Mapping[str, float], seconds: float) -> Table:
    table = Table(title=f"Held-out accuracy, after {clock_time(seconds)}", title_justify="left")
    table.add_column("")
    for name in ("before", "after", "change"):
        table.add_column(name, justify="right")
    for name in [*before, *(name for name in after if name not in before)]:
        old, new = before.get(name, math.nan), after.get(name, math.nan)
        known = [math.isfinite(old), math.isfinite(new)]
        table.add_row(
            Text(name),
            f"{old:.3f}" if known[0] else "–",
            Text(f"{new:.3f}" if known[1] else "–", style="bold"),
            f"{new - old:+.3f}" if all(known) else "",
        )
    return table


def quiet_libraries() -> None:
    """Let libraries speak of errors only. Call before they are imported. What the user set in the
    environment stays.
    """
    for name, value in {
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
        "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        "GLOG_minloglevel": "2",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DEDUP_LOGS": "1",
        "RAY_DISABLE_IMPORT_WARNING": "1",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "WANDB_SILENT": "true",
        "PYTHONWARNINGS": "ignore",  # for the workers that are started from here
    }.items():
        os.environ.setdefault(name, value)
    warnings.simplefilter("ignore")
    for name in ("DeepSpeed", "ray", "torch.distributed", "torch.distributed.elastic"):
        # These set their own levels when they are imported, which a filter outlives.
        logging.getLogger(name).addFilter(_only_errors)


def _only_errors(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR
