"""TreePO sampling against flat sampling on the same engine, at equal leaves.

With w leaves a prompt, D paths that leave it, segments of l tokens and full-length paths of d
segments (no early end, no fallback, even branching), level k has min(w, D * 2^(k-1)) segments:
every path forks in two until there are w. A token is forwarded once, to predict the next one; a
response's last token predicts nothing. So the rows that any engine must forward for a prompt of P
tokens are

    tree:  P + l * sum_{k=1..d} min(w, D * 2^(k-1)) - w
    flat:  P + l * d * w - w

and for w = 16, D = 2 and P << l the quotient is 64/30 = 2.13 at d = 4, 112/78 = 1.44 at d = 7 and
224/190 = 1.18 at d = 14. That count is asserted for a prompt alone. The rates are those of a stream
of prompts through an engine that runs so many segments at a time and no more, as in training: so
both sides keep it full, though a tree begins narrow. Forks that start in different steps there read
the last row of their common path again; how many rows that adds is reported.
Workloads where most paths end early, so that the fallback fills the tree up, are apart.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from harness import (
    Gate,
    Options,
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
from shapes import qwen3_7m

from rollout import CostLedger, Engine, EngineSettings, Tree, generate
from rollout.strategies import Flat, FlatSettings, Prompt, Strategy, TreePO, TreePOSettings
from rollout.tree import num_unique_tokens
from treepo.base.keys import root_key

WIDTH, DIVERGENCE, VOCABULARY = 16, 2, 8192
MAX_RUNNING = 128  # segments at a time
TREE, FLAT = "tree", "flat"


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """``num_prompts`` prompts of ``prompt_length`` tokens, ``depth`` segments a path.

    Attributes:
        num_stops: so many token ids end a path; 0: all paths have full length.
    """

    depth: int
    segment_length: int
    num_prompts: int
    prompt_length: int = 16
    num_stops: int = 0

    @property
    def length(self) -> int:
        return self.depth * self.segment_length

    def prompts(self, numbers: Iterator[int], count: int | None = None) -> list[Prompt]:
        """As many prompts as the workload has, or ``count``. ``numbers`` gives their first tokens:
        with new ones in each run, no run finds its prompts in the cache.
        """
        rng = np.random.default_rng(self.depth)
        prompts = []
        for i in range(self.num_prompts if count is None else count):
            token_ids = rng.integers(0, VOCABULARY, self.prompt_length).astype(np.int32)
            token_ids[0] = next(numbers)
            key = root_key(0, 0, str(i))
            prompts.append(Prompt(problem_id=str(i), token_ids=token_ids, root_key=key))
        return prompts

    def strategies(self) -> dict[str, Strategy]:
        """Tree and flat, with equal leaves."""
        stops = list(range(self.num_stops))
        shared = dict(n=WIDTH, max_response_length=self.length, stop_token_ids=stops)
        tree = TreePOSettings(
            **shared,
            segment_length=self.segment_length,
            max_depth=self.depth,
            initial_divergence_min=DIVERGENCE,
            initial_divergence_max=DIVERGENCE,
            fallback="random" if stops else "none",
            repetition_count=0,
        )
        return {TREE: TreePO(tree), FLAT: Flat(FlatSettings(**shared))}

    def expected_query_tokens(self) -> dict[str, int]:
        """Of all prompts together, for full-length paths; see the module."""
        segments = {
            TREE: sum(min(WIDTH, DIVERGENCE * 2**level) for level in range(self.depth)),
            FLAT: WIDTH * self.depth,
        }
        return {
            name: self.num_prompts * (self.prompt_length + self.segment_length * count - WIDTH)
            for name, count in segments.items()
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampled:
    """What one run sampled and what it took."""

    num_leaves: int
    response_tokens: int  # of all trajectories, shared ones counted in each
    costs: CostLedger


def sample(engine: Engine, strategy: Strategy, prompts: Sequence[Prompt]) -> list[Tree]:
    """Trees of all prompts."""
    engine.reset_metrics()
    return list(generate(engine, strategy, prompts))


def measure(
    engine: Engine, work: Workload, rounds: int, numbers: Iterator[int]
) -> tuple[Seconds, dict[str, Sampled]]:
    """Both strategies in turns: their seconds, and what their last run sampled."""
    found: dict[str, Sampled] = {}

    def run_of(name: str, strategy: Strategy) -> Callable[[], None]:
        def run() -> None:
            trees = sample(engine, strategy, work.prompts(numbers))
            lengths = [
                len(tree.path_token_ids(leaf, with_prompt=False))
                for tree in trees
                for leaf in tree.leaves
            ]
            assert len(lengths) == WIDTH * work.num_prompts, "not all leaves"
            found[name] = Sampled(
                num_leaves=len(lengths), response_tokens=sum(lengths), costs=engine.metrics()
            )

        return run

    runs = {name: run_of(name, strategy) for name, strategy in work.strategies().items()}
    return run_paired(runs, rounds=rounds, warmup=0), found


def kv_over_unique(
    engine: Engine, work: Workload, numbers: Iterator[int]
) -> dict[str, dict[str, float]]:
    """Peak KV slots of one prompt's tree over the fewest that can hold it: its tokens that predict
    another, counted once a segment, and once a distinct prefix (forks may draw equal tokens). The
    tree's query tokens are those of the formula.
    """
    ratios = {}
    for name, strategy in work.strategies().items():
        (tree,) = sample(engine, strategy, work.prompts(numbers, 1))
        costs, alone = engine.metrics(), replace(work, num_prompts=1)
        assert costs.query_tokens == alone.expected_query_tokens()[name], "not the analytic count"
        peak = costs.peak_kv_slots
        ratios[name] = {
            "segment_unique": peak / num_unique_tokens(tree),
            "trie_unique": peak / num_distinct_prefixes(tree),
        }
    return ratios


def num_distinct_prefixes(tree: Tree) -> int:
    """Distinct non-empty prefixes of the trajectories, each without its last token."""
    return len(
        {
            path[:end].tobytes()
            for path in (tree.path_token_ids(leaf) for leaf in tree.leaves)
            for end in range(1, len(path))
        }
    )


def workloads(quick: bool) -> tuple[list[Workload], Workload]:
    """(full-length ones, one where most paths end early)."""
    length, prompts = (4, 2) if quick else (16, 48)
    plain = [
        Workload(depth=depth, segment_length=length, num_prompts=prompts)
        for depth in ((4, 7) if quick else (4, 7, 14))
    ]
    # A token ends its path with a probability of 1 in 32 (in 8): few paths reach their full length.
    stops = VOCABULARY // (8 if quick else 32)
    early = Workload(depth=7, segment_length=length, num_prompts=prompts, num_stops=stops)
    return plain, early


def main(argv: Sequence[str] | None = None) -> None:
    options = parse_args(__doc__, argv)
    torch.set_num_threads(1)
    engine = Engine(
        qwen3_7m(), EngineSettings(num_kv_slots=98304, max_running_requests=MAX_RUNNING)
    )
    plain, early = workloads(options.quick)
    rounds = 1 if options.quick else 3
    numbers = itertools.count()
    kv = {str(work.depth): kv_over_unique(engine, work, numbers) for work in plain}  # warms up, too
    results = {work: measure(engine, work, rounds, numbers) for work in [*plain, early]}
    _report(results, kv, plain, early, rounds, options)


def _compared(seconds: Seconds, found: dict[str, Sampled]) -> dict[str, float]:
    """Tree over flat: rates a second, and query tokens as flat over tree (what sharing saves)."""
    faster = speedup(seconds, TREE, FLAT).median
    tree, flat = found[TREE], found[FLAT]
    return {
        "trajectories_per_s": faster * tree.num_leaves / flat.num_leaves,
        "tokens_per_s": faster * tree.response_tokens / flat.response_tokens,
        "query_tokens": flat.costs.query_tokens / tree.costs.query_tokens,
    }


def _report(results, kv, plain, early, rounds: int, options: Options) -> None:
    ratios: dict[str, dict[str, object]] = {
        "trajectories_per_s": {},
        "tokens_per_s": {},
        "query_tokens": {},
        "kv_over_unique": {depth: found[TREE]["segment_unique"] for depth, found in kv.items()},
    }
    rows, gates, timings, counts = [], [], {}, {}
    for work, (seconds, found) in results.items():
        case = "early" if work is early else str(work.depth)
        compared = _compared(seconds, found)
        for name, value in compared.items():
            ratios[name][case] = value
        rows.append(
            (
                case,
                *compared.values(),
                *(found[n].num_leaves / Spread.of(seconds[n]).median for n in found),
            )
        )
        timings[case] = {
            "speedup": speedup(seconds, TREE, FLAT),
            "seconds": {name: Spread.of(taken) for name, taken in seconds.items()},
        }
        counts[case] = {
            name: {
                "query_tokens": sampled.costs.query_tokens,
                "generated_tokens": sampled.costs.generated_tokens,
                "response_tokens": sampled.response_tokens,
                "leaves": sampled.num_leaves,
                "peak_kv_bytes": sampled.costs.peak_kv_bytes,
                "sequential_steps": sampled.costs.sequential_steps,
            }
            for name, sampled in found.items()
        }
        if work is not early:
            expected = work.expected_query_tokens()
            counts[case]["expected_query_tokens"] = expected
            gates.append(
                Gate(
                    name=f"query tokens over the analytic count, depth {case}",
                    value=found[TREE].costs.query_tokens / expected[TREE],
                    at_most=1.01,
                )
            )
            if options.quick:
                continue  # two prompts of short segments say nothing about time or memory
            gates += [
                Gate(
                    name=f"trajectories/s over the token ratio, depth {case}",
                    value=compared["trajectories_per_s"] * expected[TREE] / expected[FLAT],
                    at_least=0.9,
                ),
                Gate(
                    name=f"KV over the unique tokens, depth {case}",
                    value=kv[case][TREE]["segment_unique"],
                    at_most=1.05,
                ),
            ]
    counts["kv_over_unique"] = kv
    header = (
        "depth",
        "trajectories/s",
        "tokens/s",
        "query tokens",
        "tree leaves/s",
        "flat leaves/s",
    )
    print_table("tree against flat (query tokens: flat over tree)", header, rows)
    report = Report(
        name="tree_vs_flat",
        device=device_in_words(),
        settings={
            "quick": options.quick,
            "model": "Qwen3, 6.8M parameters, random weights, float32",
            "leaves": WIDTH,
            "initial_divergence": DIVERGENCE,
            "segment_length": plain[0].segment_length,
            "prompt_length": plain[0].prompt_length,
            "num_prompts": plain[0].num_prompts,
            "max_running_requests": MAX_RUNNING,
            "early": f"depth {early.depth}, {early.num_stops} of {VOCABULARY} tokens end a path",
            "rounds": rounds,
        },
        ratios=ratios,
        counts=counts,
        timings=timings,
        gates=gates,
    )
    finish(report, options)


if __name__ == "__main__":
    main()
