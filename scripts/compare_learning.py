"""Compare variants of a study: held-out accuracy against what it cost, one picture and one table.

    python scripts/compare_learning.py outputs/treepo.* --output docs/results/treepo_sampling
    python scripts/compare_learning.py outputs/treepo.* --seeds 0 1 --output first_two

Each folder is a variant with a run per seed. The cost is counted three ways: *query tokens* (what
the sampler forwarded), *trained tokens* (what the learner forwarded and back-propagated) and
seconds. Writes ``<output>.png`` and ``<output>.md``. Needs matplotlib (in the dev extra).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

from treepo.tracking import read_rows  # noqa: E402

COSTS = {
    "rollout/query_tokens": "query tokens (millions)",
    "training/trained_tokens": "trained tokens (millions)",
    "timing_s/step": "seconds of training",
}
RESAMPLES = 2000  # of the bootstrap over seeds


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Curve:
    """One run: accuracy at each evaluation and the costs so far."""

    accuracy: np.ndarray  # [E]
    costs: Mapping[str, np.ndarray]  # of each cost [E], cumulative

    def accuracy_at(self, cost: str, budget: float) -> float:
        """Accuracy when so much was spent, on straight lines between evaluations."""
        return float(np.interp(budget, self.costs[cost], self.accuracy))


def read_curve(run: Path, metric: str) -> Curve:
    """The evaluations of a finished run.

    Raises:
        ValueError: the run logged no such metric.
    """
    totals = dict.fromkeys(COSTS, 0.0)
    accuracy: list[float] = []
    costs: dict[str, list[float]] = {name: [] for name in COSTS}
    for row in read_rows(run / "metrics.jsonl"):
        for name in COSTS:
            totals[name] += row.get(name) or 0.0
        if row.get(metric) is not None:
            accuracy.append(row[metric])
            for name in COSTS:
                costs[name].append(totals[name])
    if not accuracy:
        raise ValueError(f"{run} has no metric {metric!r} in its metrics.jsonl")
    return Curve(
        accuracy=np.array(accuracy),
        costs={name: np.array(values) for name, values in costs.items()},
    )


def read_variant(folder: Path, metric: str, seeds: Collection[int] | None = None) -> list[Curve]:
    """The finished runs of a variant, one a seed, by seed.

    Args:
        seeds: leave out others; None takes all.

    Raises:
        ValueError: a run logged no such metric.
    """
    finished = [path.parent for path in sorted(folder.glob("*/summary.json"))]
    runs = {json.loads((run / "summary.json").read_text())["seed"]: run for run in finished}
    chosen = sorted(seed for seed in runs if seeds is None or seed in seeds)
    return [read_curve(runs[seed], metric) for seed in chosen]


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and 95% bootstrap interval over seeds (the mean itself for one seed)."""
    data = np.asarray(values, np.float64)
    draws = np.random.default_rng(0).integers(0, len(data), (RESAMPLES, len(data)))
    low, high = np.percentile(data[draws].mean(axis=1), [2.5, 97.5])
    return float(data.mean()), float(low), float(high)


def table(curves: Mapping[str, Sequence[Curve]]) -> str:
    """Accuracy at the end and at equal budgets, and what a run cost, a row a variant.

    The budget of a cost is the smallest that any run spent in all, so that every run reached it.
    """
    budgets = {
        cost: min(curve.costs[cost][-1] for each in curves.values() for curve in each)
        for cost in COSTS
    }
    header = ["variant", "seeds", "at the end"]
    header += [f"at {_amount(cost, budgets[cost])}" for cost in COSTS]
    header += ["query tokens", "trained tokens", "seconds"]
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for name, each in curves.items():
        cells = [name, str(len(each)), _spread([curve.accuracy[-1] for curve in each])]
        cells += [_spread([c.accuracy_at(cost, budgets[cost]) for c in each]) for cost in COSTS]
        spent = {cost: np.mean([c.costs[cost][-1] for c in each]) for cost in COSTS}
        cells += [_amount(cost, spent[cost]).rsplit(" ", 2)[0] for cost in list(COSTS)[:2]]
        cells += [f"{spent['timing_s/step']:.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _spread(values: Sequence[float]) -> str:
    mean, low, high = interval(values)
    return f"{mean:.3f}" if len(values) == 1 else f"{mean:.3f} [{low:.3f}, {high:.3f}]"


def _amount(cost: str, value: float) -> str:
    if cost == "timing_s/step":
        return f"{value:.0f} s"
    return f"{value / 1e6:.2f}M {cost.rpartition('/')[2].replace('_', ' ')}"


def draw(curves: Mapping[str, Sequence[Curve]], title: str, output: Path) -> None:
    """A panel a cost; the line is the mean over seeds, the band its range."""
    figure, panels = plt.subplots(1, len(COSTS), figsize=(4.8 * len(COSTS), 3.8), sharey=True)
    colors = plt.get_cmap("tab10" if len(curves) <= 10 else "tab20")
    for number, (name, each) in enumerate(curves.items()):
        for panel, cost in zip(panels, COSTS, strict=True):
            scale = 1.0 if cost == "timing_s/step" else 1e6
            end = min(curve.costs[cost][-1] for curve in each)
            grid = np.linspace(0.0, end, 60)
            lines = np.array([np.interp(grid, c.costs[cost], c.accuracy) for c in each])
            color = colors(number % colors.N)
            panel.plot(grid / scale, lines.mean(axis=0), label=name, color=color, linewidth=1.4)
            if len(each) > 1:
                panel.fill_between(
                    grid / scale, lines.min(axis=0), lines.max(axis=0), color=color, alpha=0.15
                )
    for panel, label in zip(panels, COSTS.values(), strict=True):
        panel.set_xlabel(label)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel(title)
    panels[-1].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(output, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("variants", nargs="+", type=Path, help="folders with a run a seed")
    parser.add_argument("--seeds", type=int, nargs="+", help="runs to compare; default: all")
    parser.add_argument("--metric", default="val-core/held_out/mean@8")
    parser.add_argument("--title", default="held-out accuracy (sampled)")
    parser.add_argument("--output", type=Path, required=True, help="path without ending")
    arguments = parser.parse_args()
    curves: dict[str, list[Curve]] = {}
    for folder in arguments.variants:
        try:
            found = read_variant(folder, arguments.metric, arguments.seeds)
        except ValueError as error:
            parser.error(str(error))
        if found:
            curves[folder.name.partition(".")[2] or folder.name] = found
    if not curves:
        of_seeds = f" of seeds {arguments.seeds}" if arguments.seeds else ""
        parser.error(f"none of these folders holds a finished run{of_seeds} (no */summary.json)")
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    draw(curves, arguments.title, arguments.output.with_suffix(".png"))
    text = table(curves)
    arguments.output.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
