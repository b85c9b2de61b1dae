"""Draw the learning curves of finished runs and print their before/after table in Markdown.

    python scripts/learning_curves.py outputs/quickstart/* --output docs/results/quickstart

Writes ``<output>.png`` and ``<output>.md``. Needs matplotlib (in the dev extra).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

from treepo.tracking import read_rows  # noqa: E402

CURVES = {
    "critic/accuracy": "training accuracy (sampled)",
    "actor/entropy": "entropy (nats a token)",
    "response_length/mean": "response length (tokens)",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, help="run folders with metrics.jsonl")
    parser.add_argument("--labels", nargs="*", default=[], help="one a run; default: its seed")
    parser.add_argument("--output", type=Path, required=True, help="path without ending")
    arguments = parser.parse_args()
    runs = [run for run in arguments.runs if (run / "summary.json").is_file()]
    if not runs:
        parser.error("none of these folders holds a finished run (no summary.json)")
    summaries = [json.loads((run / "summary.json").read_text()) for run in runs]
    labels = arguments.labels or [f"seed {summary['seed']}" for summary in summaries]
    if len(labels) != len(runs):
        parser.error(f"{len(labels)} labels for {len(runs)} finished runs")
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    draw(runs, labels, arguments.output.with_suffix(".png"))
    text = table(summaries, labels)
    arguments.output.with_suffix(".md").write_text(text)
    print(text)


def draw(runs: list[Path], labels: list[str], output: Path) -> None:
    """One panel a metric, one line a run."""
    figure, panels = plt.subplots(1, len(CURVES), figsize=(4.6 * len(CURVES), 3.4))
    for run, label in zip(runs, labels, strict=True):
        rows = read_rows(run / "metrics.jsonl")
        for panel, name in zip(panels, CURVES, strict=True):
            points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
            panel.plot(*zip(*points, strict=True), label=label, linewidth=1.2)
    for panel, title in zip(panels, CURVES.values(), strict=True):
        panel.set(title=title, xlabel="step")
        panel.grid(alpha=0.3)
    panels[0].set_ylim(0, 1)
    panels[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(output, dpi=110)
    plt.close(figure)


def table(summaries: list[dict], labels: list[str]) -> str:
    """Held-out accuracy before → after of every split and pass, a row a run."""
    names = list(summaries[0]["after"])
    lines = [
        "| run | " + " | ".join(names) + " | steps | seconds |",
        "|---" * (len(names) + 3) + "|",
    ]
    for summary, label in zip(summaries, labels, strict=True):
        cells = [
            f"{summary['before'].get(name, float('nan')):.3f} → {summary['after'][name]:.3f}"
            for name in names
        ]
        lines.append(
            f"| {label} | {' | '.join(cells)} | {summary['steps']} | {summary['seconds']:.0f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
