"""What the benchmarks share: arguments, paired timing, and one JSON and one table a run.

Runs that are compared take turns in one process, A B A B ..., and their ratio is taken pair by
pair, so that a machine that slows down half-way slows both. Medians are reported, with the range.

A benchmark is `python benchmarks/NAME.py [--quick] [--json FILE]`. Counts carry no noise and are
what tests assert; gates on time are reported as passed or failed and never raise.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # measure the tree this file lies in
    sys.path.insert(0, str(ROOT))


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What the command line asks for.

    Attributes:
        quick: a small version that ends within 60 s on two cores.
        json: where to write the report; None: only the table is printed.
    """

    quick: bool
    json: Path | None


def parse_args(description: str | None, argv: Sequence[str] | None = None) -> Options:
    """Options of a benchmark; the first line of ``description`` (its docstring) is shown."""
    found = _parser(description, "a small version, within 60 seconds").parse_args(argv)
    return Options(quick=found.quick, json=found.json)


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuChoices:
    """What the command line of a GPU benchmark asks for beside ``Options``.

    Attributes:
        shapes: of models.
    """

    device: str
    shapes: tuple[str, ...]


def parse_gpu_args(
    description: str | None,
    argv: Sequence[str] | None,
    *,
    shapes: Sequence[str],
    default: Sequence[str],
) -> tuple[Options, GpuChoices]:
    """The same of a benchmark that needs a GPU; ``shapes`` may be chosen, ``default`` are."""
    parser = _parser(description, quick_help="a small version")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, ...; cpu to try the script")
    parser.add_argument("--shapes", nargs="+", choices=list(shapes), default=list(default))
    found = parser.parse_args(argv)
    if torch.device(found.device).type == "cuda" and not torch.cuda.is_available():
        parser.error(
            "this benchmark needs a CUDA device and torch finds none; to try the script itself, "
            "add: --device cpu --shapes tiny --quick"
        )
    return (
        Options(quick=found.quick, json=found.json),
        GpuChoices(device=found.device, shapes=tuple(found.shapes)),
    )


def _parser(description: str | None, quick_help: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(description or "").strip().partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help=quick_help)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report there")
    return parser


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """Median and range of a measured number."""

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, numbers: Sequence[float]) -> Spread:
        return cls(median=statistics.median(numbers), min=min(numbers), max=max(numbers))


Seconds = dict[str, list[float]]  # name of a run -> its seconds, in order of the rounds


def run_paired(
    runs: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    warmup: int = 1,
    synchronize: Callable[[], object] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> Seconds:
    """Time ``runs`` in turns: A B C, A B C, ..., after ``warmup`` untimed rounds.

    Args:
        synchronize: waits for the device, called before each look at the clock.
        clock: seconds; ``time.process_time`` leaves out what other processes take of the core.
    """
    for _ in range(warmup):
        for run in runs.values():
            run()
    seconds: Seconds = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            synchronize()
            began = clock()
            run()
            synchronize()
            seconds[name].append(clock() - began)
    return seconds


def speedup(seconds: Seconds, name: str, over: str) -> Spread:
    """How many times faster run ``name`` is than run ``over``, pair by pair."""
    pairs = zip(seconds[name], seconds[over], strict=True)
    return Spread.of([theirs / ours for ours, theirs in pairs])


@dataclass(frozen=True, kw_only=True, slots=True)
class Gate:
    """A number that is to reach ``at_least`` (or stay within ``at_most``)."""

    name: str
    value: float
    at_least: float | None = None
    at_most: float | None = None

    @property
    def passed(self) -> bool:
        return (self.at_least is None or self.value >= self.at_least) and (
            self.at_most is None or self.value <= self.at_most
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What a benchmark found; ``as_json`` is the file's form.

    Attributes:
        settings: what was run, so that it can be run again.
        ratios: name -> number, or -> numbers by case. Medians where measured.
        counts: what carries no noise: tokens, bytes, calls.
        timings: seconds, tokens a second and the ranges behind the ratios.
        gates: what was to be reached.
    """

    name: str
    device: str
    settings: Mapping[str, Any]
    ratios: Mapping[str, Any]
    counts: Mapping[str, Any]
    timings: Mapping[str, Any]
    gates: Sequence[Gate] = field(default=())

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "date": date.today().isoformat(),
            "device": self.device,
            "versions": versions(),
            "settings": dict(self.settings),
            "ratios": dict(self.ratios),
            "counts": dict(self.counts),
            "timings": dict(self.timings),
            "gates": [asdict(gate) | {"passed": gate.passed} for gate in self.gates],
        }


def finish(report: Report, options: Options) -> None:
    """Print the gates and write the JSON where it was asked for."""
    if report.gates:
        rows = [
            (
                gate.name,
                gate.value,
                f">= {gate.at_least:g}" if gate.at_least is not None else f"<= {gate.at_most:g}",
                "passed" if gate.passed else "FAILED",
            )
            for gate in report.gates
        ]
        print_table("gates", ("gate", "value", "aim", ""), rows)
    print(f"{report.name} on {report.device}")
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(report.as_json(), indent=1, default=_plain)
        options.json.write_text(text + "\n")


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Columns of text; numbers with four digits, aligned right."""
    lines = [[str(cell) for cell in header], *([_cell(cell) for cell in row] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    print(f"\n{title}")
    for line in lines:
        print("  " + "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))


def device_in_words(device: str = "cpu", *, threads: int | None = None) -> str:
    """The processor's (or GPU's) model name and the number of threads; names no machine."""
    count = torch.get_num_threads() if threads is None else threads
    words = f"{_processor()}, {count} thread{'s' if count > 1 else ''}"
    if torch.device(device).type == "cuda":
        words = f"{torch.cuda.get_device_name(device)}; host {words}"
    return words


def versions() -> dict[str, str]:
    """Of Python and of the libraries that matter for speed."""
    found = {"python": platform.python_version()}
    for name in ("treepo", "torch", "transformers", "numpy", "triton", "flash-attn"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # not installed: not used
    return found


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _plain(value: Any) -> Any:
    """JSON form of what the standard encoder doesn't know: records, numpy and torch numbers."""
    if isinstance(value, Spread):
        return asdict(value)
    return value.item()
