"""One step of sampling on a CPU: exact integer draws against the textbook and against transformers.

The textbook is float64 probabilities, their cumulative sum and one search, truncation by sorting
the whole vocabulary. Transformers is what `generate` does: its logits processors in float32, a
softmax and `torch.multinomial`. Ours also records log-probs, as the textbook does here;
transformers doesn't.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from harness import (
    Gate,
    Options,
    Report,
    device_in_words,
    finish,
    parse_args,
    print_table,
    run_paired,
    speedup,
)
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from rollout.extend import ExtendSpec
from rollout.running import Drawn, RunningTable
from rollout.stops import StopRules
from rollout.token_text import TokenText
from treepo.base.keys import Purpose, uniforms

OURS, TEXTBOOK, TRANSFORMERS = "ours", "textbook", "transformers"


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """``rows`` draws over ``vocabulary`` tokens."""

    vocabulary: int
    rows: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0

    @property
    def name(self) -> str:
        kind = f"temperature {self.temperature:g}"
        kind += f", top-p {self.top_p:g}" if self.top_p < 1 else ""
        kind += f", top-k {self.top_k}" if self.top_k else ""
        return f"{self.rows} rows of {self.vocabulary}, {kind}"

    @property
    def is_plain(self) -> bool:
        return self.top_p == 1 and not self.top_k


def textbook(logits: torch.Tensor, case: Case, uniform: torch.Tensor) -> torch.Tensor:
    """Tokens [N] by cumulative sums in float64; the log-probs are computed and dropped."""
    scaled = logits.double() / case.temperature
    weights = torch.exp(scaled - scaled.amax(1, keepdim=True))
    kept = weights
    if not case.is_plain:
        ranked, order = torch.sort(weights, dim=1, descending=True, stable=True)
        if case.top_k:
            ranked[:, case.top_k :] = 0
        before = ranked.cumsum(1) - ranked
        ranked[before >= case.top_p * ranked.sum(1, keepdim=True)] = 0
        kept = torch.zeros_like(weights).scatter_(1, order, ranked)
    cumulative = kept.cumsum(1)
    target = uniform.unsqueeze(1) * cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, target, right=True)
    chosen = weights.gather(1, tokens)
    torch.log(chosen / weights.sum(1, keepdim=True)), torch.log(chosen / cumulative[:, -1:])
    return tokens.squeeze(1)


def ways(case: Case) -> dict[str, Callable[[], torch.Tensor]]:
    """The three ways to draw, on the same logits."""
    logits = torch.randn(case.rows, case.vocabulary, generator=torch.Generator().manual_seed(0)) * 3
    table = RunningTable(case.rows, StopRules(TokenText(None)))
    spec = ExtendSpec(
        max_tokens=1 << 20,
        temperature=case.temperature,
        top_p=case.top_p,
        top_k=case.top_k,
        stop_token_ids=(case.vocabulary,),  # never drawn
    )
    rows = np.array([table.add(0, spec, key, Drawn()) for key in range(case.rows)])
    keys, positions = torch.arange(case.rows), torch.zeros(case.rows, dtype=torch.int64)
    uniform = uniforms(keys, positions, Purpose.TOKEN)  # of our first draws
    processors: list = [TemperatureLogitsWarper(case.temperature)] if case.temperature != 1 else []
    processors += [TopKLogitsWarper(case.top_k)] if case.top_k else []
    processors += [TopPLogitsWarper(case.top_p)] if case.top_p < 1 else []

    def generate() -> torch.Tensor:
        scores = logits.clone()
        for processor in processors:
            scores = processor(None, scores)
        return torch.multinomial(torch.softmax(scores, dim=-1), num_samples=1).squeeze(1)

    return {
        OURS: lambda: table.draw(rows, logits).token_ids,
        TEXTBOOK: lambda: textbook(logits, case, uniform),
        TRANSFORMERS: generate,
    }


def cases(quick: bool) -> list[Case]:
    shapes = [(4096, 16), (4096, 64)] if quick else [(4096, 16), (4096, 64), (151_936, 16)]
    kinds: list[dict] = [{}, dict(temperature=0.8), dict(top_p=0.95), dict(top_k=50)]
    return [
        Case(vocabulary=vocabulary, rows=rows, **kind)
        for vocabulary, rows in shapes
        for kind in kinds
    ]


def main(argv: Sequence[str] | None = None) -> None:
    options = parse_args(__doc__, argv)
    torch.set_num_threads(1)
    found = cases(options.quick)
    vs_textbook, vs_transformers, equal, timings, rows = {}, {}, {}, {}, []
    for case in found:
        runs = ways(case)
        with torch.inference_mode():
            equal[case.name] = int((runs[OURS]() == runs[TEXTBOOK]()).sum())
            rounds = 5 if options.quick or not case.is_plain else 40
            seconds = run_paired(runs, rounds=rounds, warmup=2)
        textbooks, generates = (speedup(seconds, OURS, other) for other in (TEXTBOOK, TRANSFORMERS))
        vs_textbook[case.name], vs_transformers[case.name] = textbooks.median, generates.median
        medians = {name: float(np.median(taken)) for name, taken in seconds.items()}
        timings[case.name] = {
            "seconds": medians,
            "vs_textbook": textbooks,
            "vs_transformers": generates,
        }
        taken = [1e6 * s for s in medians.values()]
        rows.append((case.name, *taken, textbooks.median, generates.median))
    header = ("one step", "ours, us", "textbook, us", "transformers, us", "vs", "vs")
    print_table("sampling on a CPU", header, rows)
    _report(options, found, vs_textbook, vs_transformers, equal, timings)


def _report(
    options: Options, found: Sequence[Case], vs_textbook, vs_transformers, equal, timings
) -> None:
    typical = float(np.median(list(vs_textbook.values())))
    worst_plain = min(vs_transformers[case.name] for case in found if case.is_plain)
    report = Report(
        name="sampler",
        device=device_in_words(),
        settings={"quick": options.quick, "logits": "normal, standard deviation 3"},
        ratios={
            "vs_textbook": vs_textbook,
            "vs_transformers": vs_transformers,
            "worst_vs_textbook": min(vs_textbook.values()),
        },
        counts={"draws": {case.name: case.rows for case in found}, "as_textbook": equal},
        timings=timings,
        gates=[
            Gate(name="against the textbook, median case", value=typical, at_least=2.0),
            Gate(name="against transformers, worst plain case", value=worst_plain, at_least=1.0),
        ],
    )
    finish(report, options)


if __name__ == "__main__":
    main()
