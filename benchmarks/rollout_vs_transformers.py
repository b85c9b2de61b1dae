"""Sampling n responses to one prompt: our engine against transformers' generate and generate_batch.

Same weights, same prompt, same number of new tokens, temperature 1, no end of sequence, one thread.
`generate` has sdpa attention and its KV cache; `generate_batch` (continuous batching) has prefix
sharing, a pool of the size it needs, a manager that lives on between calls, and of several page
sizes the fastest. Ours computes the prompt anew in every run, too, and returns log-probs besides.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from harness import (
    Gate,
    Report,
    Seconds,
    Spread,
    device_in_words,
    finish,
    parse_args,
    print_table,
    run_paired,
    speedup,
)
from peers import Sampling, generate_batch_run
from shapes import copy_of, qwen3_7m
from transformers import PreTrainedModel

from rollout import Engine, EngineSettings, ExtendSpec

PAGE_SIZES = (16, 64, 256)
OURS, GENERATE, BATCH = "ours", "generate", "generate_batch"


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One workload: ``n`` responses of ``new_tokens`` tokens to a prompt."""

    dtype: str
    prompt_length: int
    n: int
    new_tokens: int

    @property
    def name(self) -> str:
        return f"{self.dtype}, prompt {self.prompt_length}, n={self.n}"

    @property
    def sampling(self) -> Sampling:
        return Sampling(n=self.n, new_tokens=self.new_tokens)

    def prompt(self, vocabulary: int) -> list[int]:
        return np.random.default_rng(0).integers(1, vocabulary, self.prompt_length).tolist()


def our_run(engine: Engine, case: Case) -> Callable[[], None]:
    """A run on our engine; it leaves nothing in the cache."""
    prompt = case.prompt(engine.model.config.vocab_size)
    spec = ExtendSpec(max_tokens=case.new_tokens)

    def run() -> None:
        node = engine.prefill(prompt)
        found = list(engine.extend([(node, spec, 1 + i) for i in range(case.n)]))
        for completion in found:
            assert len(completion.token_ids) == case.new_tokens
            engine.free(completion.node, drop=True)
        engine.free(node, drop=True)
        assert len(found) == case.n and engine.pool.num_held == 0

    return run


def generate_run(model: PreTrainedModel, case: Case) -> Callable[[], None]:
    """A run of ``model.generate``."""
    ids = torch.tensor([case.prompt(model.config.vocab_size)])
    config = case.sampling.config()
    whole = (case.n, case.prompt_length + case.new_tokens)

    def run() -> None:
        with torch.inference_mode():
            out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
        assert out.shape == whole

    return run


def batch_run(
    model: PreTrainedModel, case: Case, page_size: int, pool_for: Case | None = None
) -> Callable[[], None]:
    """A run of ``model.generate_batch``, with a pool for ``pool_for`` (None: for ``case``)."""
    return generate_batch_run(
        model,
        [case.prompt(model.config.vocab_size)],
        case.sampling,
        page_size=page_size,
        pool_tokens=(pool_for or case).new_tokens,
    )


def compare(engine: Engine, peers: Sequence[PreTrainedModel], case: Case, rounds: int) -> Seconds:
    """Seconds of the three runs, in turns."""
    generate, batched = peers
    short = replace(case, new_tokens=min(4, case.new_tokens))
    trials = {}
    for page_size in PAGE_SIZES:
        run = batch_run(batched, short, page_size, pool_for=case)
        trials[page_size] = run_paired({BATCH: run}, rounds=1)[BATCH][0]
        batched.destroy_cached_continuous_batching_manager()
    best = min(trials, key=lambda page_size: trials[page_size])
    for run in (
        our_run(engine, short),
        generate_run(generate, short),
        batch_run(batched, short, best, pool_for=case),
    ):
        run()  # warms up
    runs = {
        OURS: our_run(engine, case),
        GENERATE: generate_run(generate, case),
        BATCH: batch_run(batched, case, best),
    }
    seconds = run_paired(runs, rounds=rounds, warmup=0)
    batched.destroy_cached_continuous_batching_manager()
    return seconds


def vs_best_peer(seconds: Seconds) -> Spread:
    """How many times faster ours is than the peer that is faster by its median."""
    medians = {peer: Spread.of(seconds[peer]).median for peer in (GENERATE, BATCH)}
    return speedup(seconds, OURS, min(medians, key=lambda peer: medians[peer]))


def query_tokens(engine: Engine, case: Case) -> int:
    """Rows our engine forwards for a case: every token once, the responses' last ones never."""
    engine.reset_metrics()
    our_run(engine, case)()
    return engine.metrics().query_tokens


def cases(quick: bool) -> tuple[Case, list[Case]]:
    """(the headline, the grid)."""
    headline = Case(
        dtype="float32", prompt_length=128 if quick else 512, n=16, new_tokens=16 if quick else 96
    )
    grid = [
        Case(dtype=dtype, prompt_length=length, n=n, new_tokens=8 if quick else 64)
        for dtype in ("float32", "bfloat16")
        for length in ((16, 64) if quick else (16, 128, 512, 2048))
        for n in ((1, 8) if quick else (1, 8, 16))
    ]
    return headline, grid


def main(argv: Sequence[str] | None = None) -> None:
    options = parse_args(__doc__, argv)
    torch.set_num_threads(1)
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)
    headline, grid = cases(options.quick)
    rounds = 1 if options.quick else 3
    seconds: dict[Case, Seconds] = {}
    counts: dict[str, int] = {}
    for dtype in ("float32", "bfloat16"):
        model = qwen3_7m(dtype=dtype)
        peers = copy_of(model), copy_of(model)
        engine = Engine(model, EngineSettings(dtype=dtype, num_kv_slots=8192))
        for case in [headline, *grid]:
            if case.dtype == dtype:
                extra = 2 if case == headline and not options.quick else 0
                seconds[case] = compare(engine, peers, case, rounds + extra)
                counts[case.name] = query_tokens(engine, case)
    _report(seconds, counts, headline, grid, rounds, options)


def _report(seconds, counts, headline, grid, rounds, options) -> None:
    best = {case: vs_best_peer(seconds[case]) for case in grid}
    alone = min(best[case].median for case in grid if case.n == 1)
    together = min(best[case].median for case in grid if case.n >= 8)
    vs_generate = speedup(seconds[headline], OURS, GENERATE)
    vs_batch = speedup(seconds[headline], OURS, BATCH)
    rows, timings = [], {}
    for case in [headline, *grid]:
        rates = {
            name: case.n * case.new_tokens / Spread.of(taken).median
            for name, taken in seconds[case].items()
        }
        rows.append((case.name, *rates.values(), vs_best_peer(seconds[case]).median))
        timings[f"{case.name}, new tokens {case.new_tokens}"] = {
            "tokens_per_s": rates,
            "vs_generate": speedup(seconds[case], OURS, GENERATE),
            "vs_generate_batch": speedup(seconds[case], OURS, BATCH),
        }
    header = ("workload", OURS, GENERATE, BATCH, "vs the better peer")
    print_table("tokens a second (medians)", header, rows)
    report = Report(
        name="rollout_vs_transformers",
        device=device_in_words(),
        settings={
            "quick": options.quick,
            "model": "Qwen3, 6.8M parameters, random weights",
            "headline": headline.name,
            "rounds": rounds,
            "page_sizes_tried": PAGE_SIZES,
        },
        ratios={
            "vs_generate": vs_generate.median,
            "vs_generate_batch": vs_batch.median,
            "worst_vs_best_peer": min(alone, together),
            "worst_vs_best_peer_n1": alone,
            "worst_vs_best_peer_n8_up": together,
        },
        counts={"query_tokens": counts},
        timings=timings,
        gates=[
            Gate(name="vs_generate", value=vs_generate.median, at_least=4.0),
            Gate(name="vs_generate_batch", value=vs_batch.median, at_least=5.0),
            Gate(name="worst vs best peer, n = 1", value=alone, at_least=0.9),
            Gate(name="worst vs best peer, n >= 8", value=together, at_least=1.5),
        ],
    )
    finish(report, options)


if __name__ == "__main__":
    main()
