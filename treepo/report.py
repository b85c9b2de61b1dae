"""``python -m treepo.report run=FOLDER``: what a run did, read from its folder."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from treepo.cli import run_command
from treepo.progress import clock_time, sparkline
from treepo.run_folder import RunFolder
from treepo.tracking import read_rows

# Shown as curves, in this order, where a run has them; those of the second kind are shares of 1.
CURVES = (
    "critic/rewards/mean",
    "critic/accuracy",
    "response_length/mean",
    "response_length/clip_ratio",
    "actor/pg_loss",
    "actor/entropy",
    "actor/pg_clipfrac",
    "actor/ppo_kl",
    "actor/kl_loss",
    "actor/grad_norm",
    "frac_reward_zero_std",
    "training/rollout_probs_diff_mean",
    "training/rollout_kl",
    "training/staleness/mean",
    "rollout/num_unfinished",
    "rollout/num_waiting",
    "pipeline/rollout_idle_frac",
    "pipeline/learner_idle_frac",
    "actor/masked_frac",
    "tree/shared_token_ratio",
    "tree/fallbacks",
    "perf/throughput",
    "timing_s/step",
)
_WIDTH = 20  # characters of a curve
_LINES = 12  # of a sample's text


@dataclass
class ReportConfig:
    """Which run, and how much of it."""

    run: str = "outputs/latest"  # a run's folder
    samples: int = 2  # trees of the newest step to show a response of; 0: none


def work(config: ReportConfig, dry_run: bool) -> None:
    """Print the report. It reads files only: a dry run is no different."""
    path = Path(config.run).expanduser()
    run = RunFolder(path=path.resolve())
    if not run.config_file.is_file():
        raise ValueError(f"run={config.run!r} is no run's folder: it has no config.yaml")
    report(run, config.samples, Console())


def report(run: RunFolder, samples: int, console: Console) -> None:
    """Print a run's summary, curves, time and some responses."""
    rows = read_rows(run.metrics_file)
    summary = _summary(run)
    state = "finished" if run.is_finished else "not finished"
    last = rows[-1]["step"] if rows else 0
    seconds = summary.get("seconds")
    took = f", {clock_time(seconds)}" if isinstance(seconds, int | float) else ""
    _print(console, f"{run.experiment} {run.run_id}: {state}, {last} steps{took}")
    if table := _before_and_after(summary):
        console.print(table)
    if rows:
        console.print(curves(rows))
        console.print(shares_of_time(rows))
    for text in newest_responses(run, samples):
        _print(console, text)
    for path in (run.export, run.checkpoints, run.trees):
        if path.is_dir():
            _print(console, f"{path.name + '/':13}{path}")


def curves(rows: Sequence[Mapping[str, Any]]) -> Table:
    """A line a metric: its course between its smallest and largest value, and both ends."""
    table = Table(title="Training", title_justify="left")
    table.add_column("metric", no_wrap=True, overflow="fold", min_width=max(map(len, CURVES)))
    table.add_column("course", no_wrap=True)
    for name in ("first", "last"):
        table.add_column(name, justify="right", no_wrap=True)
    held_out = sorted({n for row in rows for n in row if n.startswith("val-core/")})
    for name in (*CURVES, *held_out):
        values = _numbers(rows, name)
        if values:
            low, high = min(values), max(values)
            scaled = [(v - low) / (high - low) if high > low else 0.5 for v in values]
            ends = (f"{values[0]:.3g}", f"{values[-1]:.3g}")
            table.add_row(name, sparkline(scaled, _WIDTH), *ends)
    return table


def shares_of_time(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Where a step's time went, over all steps."""
    total = sum(_numbers(rows, "timing_s/step"))
    table = Table("part", title="Time", title_justify="left")
    table.add_column("seconds", justify="right")
    table.add_column("share of steps", justify="right")
    for name in sorted({n for row in rows for n in row if n.startswith("timing_s/")}):
        spent = sum(_numbers(rows, name))
        share = f"{spent / total:.0%}" if total else "–"
        table.add_row(name.removeprefix("timing_s/"), f"{spent:.1f}", share)
    return table


def newest_responses(run: RunFolder, count: int) -> list[str]:
    """Of each of the newest step's first ``count`` trees, the best and the worst response."""
    files = sorted(run.trees.glob("step_*.jsonl"), key=lambda file: int(file.stem[5:]))
    if not files or count < 1:
        return []
    texts = []
    with files[-1].open(encoding="utf-8") as stream:  # lines end at \n alone, as JSON's do
        trees = [json.loads(line) for line in islice(stream, count)]
    for tree in trees:
        leaves = [leaf for leaf in tree["leaves"] if leaf["reward"] is not None]
        texts.append(f"\n{files[-1].stem}, {tree['problem_id']}: {_cut(tree['nodes'][0]['text'])}")
        picked = sorted(leaves, key=lambda leaf: -leaf["reward"])
        for leaf in picked[:1] + picked[1:][-1:]:
            texts.append(f"  reward {leaf['reward']:g}: {_cut(leaf['text'])}")
    return texts


def _before_and_after(summary: Mapping[str, Any]) -> Table | None:
    before, after = summary.get("before") or {}, summary.get("after") or {}
    if not after:
        return None
    table = Table("held out", title="Scores", title_justify="left")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    for name in after:
        values = (before.get(name), after[name])
        shown = [f"{v:.3f}" if isinstance(v, int | float) else "–" for v in values]
        table.add_row(Text(name), *shown)
    return table


def _summary(run: RunFolder) -> dict[str, Any]:
    if not run.summary_file.is_file():
        return {}
    return json.loads(run.summary_file.read_text(encoding="utf-8"))


def _numbers(rows: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    values = (row.get(name) for row in rows)
    return [float(v) for v in values if isinstance(v, int | float) and math.isfinite(v)]


def _cut(text: str) -> str:
    lines = text.strip().splitlines() or [""]
    rest = ["…"] if len(lines) > _LINES else []
    return "\n    ".join([*lines[:_LINES], *rest])


def _print(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def main() -> None:
    run_command("report", ReportConfig, work)


if __name__ == "__main__":
    main()
