"""Compare variants of a study: held-out accuracy against what it cost, one picture and one table.

    python scripts/compare_learning.py outputs/treepo.* --output docs/results/treepo_sampling
    python scripts/compare_learning.py outputs/treepo.* --seeds 0 1 --output first_two

Each folder is a variant with a run per seed. Costs: *query tokens* (what the sampler forwarded),
*trained tokens* (what the learner forwarded and back-propagated), *iterations* (the sampler's
forwards, one after the other) and seconds; ``--costs`` says which. The picture has a column a cost;
its first row is the held-out accuracy (left out where a run was evaluated at its end alone), and
``--steps METRIC ...`` adds rows of metrics of every step. Writes ``<output>.png`` and
``<output>.md``. Needs matplotlib (in the dev extra).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

from treepo.tracking import read_rows  # noqa: E402

COSTS = {
    "query": ("rollout/query_tokens", "query tokens"),
    "trained": ("training/trained_tokens", "trained tokens"),
    "iterations": ("rollout/sequential_steps", "iterations"),
    "seconds": ("timing_s/step", "seconds"),
}
DEFAULT_COSTS = ("query", "trained", "seconds")
SMOOTHED = 5  # steps in a point of a step's metric
RESAMPLES = 2000  # of the bootstrap over seeds


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Curve:
    """One run: accuracy at each evaluation and the costs so far; metrics of its steps."""

    accuracy: np.ndarray  # [E]
    costs: Mapping[str, np.ndarray]  # of each cost [E], cumulative
    # of each metric and cost [2, S]: what was spent so far and its value, of the steps that have it
    steps: Mapping[tuple[str, str], np.ndarray] = field(default_factory=dict)

    def accuracy_at(self, cost: str, budget: float) -> float:
        """Accuracy when so much was spent, on straight lines between evaluations."""
        return float(np.interp(budget, self.costs[cost], self.accuracy))


def read_curve(run: Path, metric: str, of_steps: Sequence[str] = ()) -> Curve:
    """The evaluations of a finished run.

    Args:
        of_steps: metrics of every step to read too.

    Raises:
        ValueError: the run logged no such metric.
    """
    totals = dict.fromkeys(COSTS, 0.0)
    accuracy: list[float] = []
    costs: dict[str, list[float]] = {name: [] for name in COSTS}
    steps: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for row in read_rows(run / "metrics.jsonl"):
        for name, (logged, _) in COSTS.items():
            totals[name] += row.get(logged) or 0.0
        for name in of_steps:
            if row.get(name) is not None:
                for cost in COSTS:
                    steps.setdefault((name, cost), []).append((totals[cost], row[name]))
        if row.get(metric) is not None:
            accuracy.append(row[metric])
            for name in COSTS:
                costs[name].append(totals[name])
    if not accuracy:
        raise ValueError(f"{run} has no metric {metric!r} in its metrics.jsonl")
    if missing := [name for name in of_steps if (name, "trained") not in steps]:
        raise ValueError(f"{run} has no metric {missing[0]!r} in its metrics.jsonl")
    return Curve(
        accuracy=np.array(accuracy),
        costs={name: np.array(values) for name, values in costs.items()},
        steps={name: np.array(points).T for name, points in steps.items()},
    )


def read_variant(
    folder: Path,
    metric: str,
    seeds: Collection[int] | None = None,
    of_steps: Sequence[str] = (),
) -> list[Curve]:
    """The finished runs of a variant, one a seed, by seed.

    Args:
        seeds: leave out others; None takes all.
        of_steps: as in :func:`read_curve`.

    Raises:
        ValueError: a run logged no such metric.
    """
    finished = [path.parent for path in sorted(folder.glob("*/summary.json"))]
    runs = {json.loads((run / "summary.json").read_text())["seed"]: run for run in finished}
    chosen = sorted(seed for seed in runs if seeds is None or seed in seeds)
    return [read_curve(runs[seed], metric, of_steps) for seed in chosen]


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and 95% bootstrap interval over seeds (the mean itself for one seed)."""
    data = np.asarray(values, np.float64)
    draws = np.random.default_rng(0).integers(0, len(data), (RESAMPLES, len(data)))
    low, high = np.percentile(data[draws].mean(axis=1), [2.5, 97.5])
    return float(data.mean()), float(low), float(high)


def table(curves: Mapping[str, Sequence[Curve]], costs_shown: Sequence[str] = DEFAULT_COSTS) -> str:
    """Accuracy at the end and at equal budgets, and what a run cost, a row a variant.

    The budget of a cost is the smallest that any run spent in all, so that every run reached it.
    There are none where a run was evaluated at its end alone.
    """
    budgets = {
        cost: min(curve.costs[cost][-1] for each in curves.values() for curve in each)
        for cost in costs_shown
    }
    header = ["variant", "seeds", "at the end"]
    at = costs_shown if _have_lines(curves) else ()
    header += [f"at {_amount(cost, budgets[cost])}" for cost in at]
    header += [COSTS[cost][1] for cost in costs_shown]
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for name, each in curves.items():
        cells = [name, str(len(each)), _spread([curve.accuracy[-1] for curve in each])]
        for cost in at:
            cells.append(_spread([c.accuracy_at(cost, budgets[cost]) for c in each]))
        spent = [float(np.mean([c.costs[cost][-1] for c in each])) for cost in costs_shown]
        cells += map(_number, spent)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _have_lines(curves: Mapping[str, Sequence[Curve]]) -> bool:
    """Whether every run was evaluated more than once."""
    return all(len(curve.accuracy) > 1 for each in curves.values() for curve in each)


def _spread(values: Sequence[float]) -> str:
    mean, low, high = interval(values)
    return f"{mean:.3f}" if len(values) == 1 else f"{mean:.3f} [{low:.3f}, {high:.3f}]"


def _amount(cost: str, value: float) -> str:
    return f"{value:.0f} s" if cost == "seconds" else f"{_number(value)} {COSTS[cost][1]}"


def _number(value: float) -> str:
    return f"{value / 1e6:.2f}M" if value >= 1e5 else f"{value:.0f}"


def draw(
    curves: Mapping[str, Sequence[Curve]],
    title: str,
    output: Path,
    costs_shown: Sequence[str] = DEFAULT_COSTS,
) -> None:
    """A column a cost, a row the held-out accuracy and each metric of the steps; a line is the mean
    over seeds, its band their range. Nothing, where there is no row.
    """
    rows = [title] if _have_lines(curves) else []
    rows += dict.fromkeys(metric for metric, _ in next(iter(curves.values()))[0].steps)
    if not rows:
        return
    size = 4.8 * len(costs_shown), 3.8 * len(rows)
    figure, panels = plt.subplots(
        len(rows), len(costs_shown), figsize=size, sharex="col", sharey="row", squeeze=False
    )
    colors = plt.get_cmap("tab10" if len(curves) <= 10 else "tab20")
    for number, (name, each) in enumerate(curves.items()):
        for row, of_row in zip(rows, panels, strict=True):
            for cost, panel in zip(costs_shown, of_row, strict=True):
                lines = [
                    (c.costs[cost], c.accuracy) if row == title else _smoothed(c.steps[row, cost])
                    for c in each
                ]
                _band(panel, lines, name, colors(number % colors.N))
    for row, of_row in zip(rows, panels, strict=True):
        of_row[0].set_ylabel(row if row == title else f"{row} (mean of {SMOOTHED} steps)")
    for cost, panel in zip(costs_shown, panels[-1], strict=True):
        panel.set_xlabel(COSTS[cost][1])
    for panel in panels.flat:
        panel.grid(alpha=0.3)
        panel.ticklabel_format(axis="x", style="sci", scilimits=(-4, 5))
    panels[0, -1].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(output, dpi=110)
    plt.close(figure)


def _smoothed(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means of neighbouring steps. ``points``: as in ``Curve.steps``."""
    kernel = np.ones(min(SMOOTHED, points.shape[1]))
    x, y = (np.convolve(row, kernel / len(kernel), mode="valid") for row in points)
    return x, y


def _band(
    panel: Any, lines: Sequence[tuple[np.ndarray, np.ndarray]], name: str, color: Any
) -> None:
    """Mean and range of lines (x, y), as far as all of them reach."""
    start, end = max(x[0] for x, _ in lines), min(x[-1] for x, _ in lines)
    grid = np.linspace(start, end, 60)
    values = np.array([np.interp(grid, x, y) for x, y in lines])
    panel.plot(grid, values.mean(axis=0), label=name, color=color, linewidth=1.4)
    if len(lines) > 1:
        low, high = values.min(axis=0), values.max(axis=0)
        panel.fill_between(grid, low, high, color=color, alpha=0.15)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("variants", nargs="+", type=Path, help="folders with a run a seed")
    parser.add_argument("--seeds", type=int, nargs="+", help="runs to compare; default: all")
    parser.add_argument("--metric", default="val-core/held_out/mean@8")
    parser.add_argument("--title", default="held-out accuracy (sampled)")
    parser.add_argument("--costs", nargs="+", choices=COSTS, default=DEFAULT_COSTS)
    parser.add_argument(
        "--steps",
        nargs="+",
        default=[],
        metavar="METRIC",
        help="of every step, a row of panels each",
    )
    parser.add_argument("--output", type=Path, required=True, help="path without ending")
    arguments = parser.parse_args()
    curves: dict[str, list[Curve]] = {}
    for folder in arguments.variants:
        try:
            found = read_variant(folder, arguments.metric, arguments.seeds, arguments.steps)
        except ValueError as error:
            parser.error(str(error))
        if found:
            curves[folder.name.partition(".")[2] or folder.name] = found
    if not curves:
        of_seeds = f" of seeds {arguments.seeds}" if arguments.seeds else ""
        parser.error(f"none of these folders holds a finished run{of_seeds} (no */summary.json)")
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    draw(curves, arguments.title, arguments.output.with_suffix(".png"), arguments.costs)
    text = table(curves, arguments.costs)
    arguments.output.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
