"""Rollout in segments against whole responses, on the same engine and scheduler, at equal tokens.

With whole responses a step lasts as long as its longest response, and most slots idle at its end.
In segments (UloRL, arXiv 2507.19766) a step ends when each path has drawn a segment at most; what
is unfinished goes on in the next step, beside as many new prompts as ever. Lengths are lognormal
and prescribed: the strategy draws each response's ``max_tokens`` by its path key, so that all
variants decode the same responses, in as many steps but for the last ones, in which nothing new
begins. Every step loads weights as a new version, so that what goes on is computed anew first: that
is counted and timed.

Both sides submit the longest first by the lengths they have seen (``treepo/submission.py``); the
order of arrival stands beside it. With as many slots as new responses a step the order matters
little, so both are also run with half the slots.

An iteration is one forward of the engine. It costs about a + c * rows; what the counted iterations
and rows of a run would cost at given quotients c N / a (N: slots) is added, since the quotient is a
matter of the machine. Time is that of the process on its core, one thread.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist

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
from shapes import qwen2

from rollout import CostLedger, Engine, EngineSettings, Tree
from rollout.growth import Growth, GrowthLimits
from rollout.length_statistics import LengthStatistics
from rollout.scheduler import grow_all
from rollout.strategies import Flat, FlatSettings, Prompt
from rollout.tree import EOS
from rollout.weights import stored_state
from treepo.base.digest import manifest_of
from treepo.base.keys import Purpose, root_key, uniform
from treepo.data import Problem
from treepo.pools import Unfinished
from treepo.submission import expected_tokens, of_tree

SEGMENTS = (1, 2, 4, 8)
PROMPT_SPREAD, RESPONSE_SPREAD = 0.7, 0.7  # of log length, between prompts and within one
COST_QUOTIENTS = (0.0, 1.0, 3.0)  # c N / a


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """Prompts that are begun ``prompts_per_step`` at a time, each once an epoch.

    Attributes:
        n: responses a prompt. ``prompts_per_step * n`` slots, so that new ones begin at once.
        mean_length: of the lognormal distribution, in tokens, before the cap.
        cap: tokens that a response has at most.
    """

    prompts_per_step: int
    steps_per_epoch: int
    epochs: int
    n: int
    mean_length: int
    cap: int
    prompt_length: int = 32
    vocabulary: int = 512

    @property
    def slots(self) -> int:
        return self.prompts_per_step * self.n

    def prompts(self) -> list[Prompt]:
        """In the order in which they are begun."""
        rng = np.random.default_rng(0)
        count = self.prompts_per_step * self.steps_per_epoch
        token_ids = rng.integers(0, self.vocabulary, (count, self.prompt_length)).astype(np.int32)
        return [
            Prompt(
                problem_id=str(i), token_ids=token_ids[i], root_key=root_key("lengths", epoch, i)
            )
            for epoch in range(self.epochs)
            for i in rng.permutation(count).tolist()
        ]

    def length(self, problem_id: str, path_key: int) -> int:
        """Of one response: exp(mu + s_p z_p + s_r z_r), rounded up, at most the cap; z_p is the
        prompt's, z_r the response's, both standard normal.
        """
        variance = PROMPT_SPREAD**2 + RESPONSE_SPREAD**2
        mu = math.log(self.mean_length) - variance / 2
        z_prompt = _normal(root_key("spread", problem_id))
        z = PROMPT_SPREAD * z_prompt + RESPONSE_SPREAD * _normal(path_key)
        return min(self.cap, math.ceil(math.exp(mu + z)))


class Prescribed(Flat):
    """Flat sampling of responses whose lengths are drawn by their path keys."""

    def __init__(self, work: Workload) -> None:
        super().__init__(FlatSettings(n=work.n, max_response_length=work.cap))
        self.work = work

    def start(self, prompt: Prompt):
        state, requests = super().start(prompt)
        requests = [
            replace(
                request,
                spec=replace(
                    request.spec, max_tokens=self.work.length(prompt.problem_id, request.path_key)
                ),
            )
            for request in requests
        ]
        return replace(state, outstanding=tuple(requests)), requests

    def finished_part(self, state) -> Tree:
        """As ``Flat`` has it, but that a prescribed length below the cap is an end of its own."""
        tree = super().finished_part(state)
        segments = [
            replace(s, finish_reason=EOS) if 0 < i and s.num_tokens < self.work.cap else s
            for i, s in enumerate(tree.segments)
        ]
        return replace(tree, segments=tuple(segments))


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """How a run is served.

    Attributes:
        num_segments: of a response of the cap's length.
        longest_first: by length statistics; False: in the order of arrival.
        constant_in_flight: a step begins as many prompts as two steps' worth in flight lack; False:
            as many as ever.
        keeps_kv: no new weights come, so what goes on finds its keys and values.
        half_slots: half as many slots as new responses a step.
    """

    num_segments: int
    longest_first: bool = True
    constant_in_flight: bool = False
    keeps_kv: bool = False
    half_slots: bool = False

    @property
    def name(self) -> str:
        words = [str(self.num_segments)]
        words += [] if self.longest_first else ["arrival"]
        words += ["in_flight"] if self.constant_in_flight else []
        words += ["kept"] if self.keeps_kv else []
        words += ["half"] if self.half_slots else []
        return "_".join(words)

    @property
    def base(self) -> str:
        """Name of the run with whole responses that it is compared with."""
        return "1_half" if self.half_slots else "1"


@dataclass(frozen=True, kw_only=True, slots=True)
class Served:
    """What one run decoded and what it took.

    Attributes:
        lengths: of all responses, by their tree's key.
    """

    num_steps: int
    lengths: dict[int, tuple[int, ...]]
    costs: CostLedger

    @property
    def trained_tokens(self) -> int:
        return sum(map(sum, self.lengths.values()))

    def cost(self, quotient: float, slots: int) -> float:
        """Of all iterations, in those of one without rows: sum of 1 + quotient * rows / slots."""
        return self.costs.sequential_steps + quotient * self.costs.query_tokens / slots


class Runner:
    """An engine, and how a variant uses it."""

    def __init__(self, work: Workload, slots: int) -> None:
        model = qwen2("tiny")
        self.work = work
        settings = EngineSettings(
            num_kv_slots=2 * work.slots * (work.cap + work.prompt_length),
            max_running_requests=slots,
        )
        self.engine = Engine(model, settings)
        self.weights = {name: t.clone() for name, t in stored_state(model).items()}
        self.manifest = manifest_of(self.weights)

    def run(self, variant: Variant, prompts: Sequence[Prompt]) -> Served:
        """All ``prompts``, until every response is finished."""
        work, engine = self.work, self.engine
        strategy = Prescribed(work)
        length = -(-work.cap // variant.num_segments) if variant.num_segments > 1 else 0
        todo = list(prompts)[::-1]
        pool: list[Growth] = []
        statistics, lengths, num_steps = LengthStatistics(), dict[int, tuple[int, ...]](), 0
        engine.reset_metrics()
        while todo or pool:
            if not variant.keeps_kv:
                version = engine.policy_version + 1
                engine.load_weights(version, self.manifest, self.weights)
            wanted = work.prompts_per_step
            if variant.constant_in_flight:
                wanted = max(0, 2 * work.prompts_per_step - len(pool))
            items = [*pool, *(todo.pop() for _ in range(min(wanted, len(todo))))]
            expected = self._expected(items, statistics, length) if variant.longest_first else None
            grown = grow_all(engine, strategy, items, GrowthLimits(segment_length=length), expected)
            pool = [tree for tree in grown if isinstance(tree, Growth)]
            for tree in grown:
                if isinstance(tree, Tree):
                    statistics = statistics.add(of_tree(tree, work.cap))
                    key = tree.segments[0].path_key
                    lengths[key] = tuple(tree.segments[leaf].num_tokens for leaf in tree.leaves)
            num_steps += 1
        return Served(num_steps=num_steps, lengths=lengths, costs=engine.metrics())

    def _expected(
        self, items: Sequence[Prompt | Growth], statistics: LengthStatistics, segment_length: int
    ) -> list[float]:
        """What is known of the lengths of ``items``, which never is how long they will be."""
        strategy = Prescribed(self.work)
        return expected_tokens(
            [_entry(item) for item in items],
            statistics,
            segment_length=segment_length,
            rollout=strategy.settings,
            finished_part=lambda growth: strategy.finished_part(growth.state),
        )


def _entry(item: Prompt | Growth) -> Unfinished:
    """As a run's unfinished pool has it."""
    problem = Problem(
        id=item.problem_id,
        prompt_token_ids=np.zeros(0, np.int32),
        data_source="",
        ground_truth=None,
        extra_info={},
        prompt_text="",
    )
    return Unfinished(problem=problem, work=item, begun=0, oldest_version=0)


def variants(quick: bool) -> list[Variant]:
    """All that are run."""
    found = [Variant(num_segments=count) for count in SEGMENTS]
    if quick:
        return found
    found += [Variant(num_segments=count, longest_first=False) for count in (1, 4)]
    found += [
        Variant(num_segments=4, constant_in_flight=True),
        Variant(num_segments=4, keeps_kv=True),
    ]
    return found + [
        Variant(num_segments=count, longest_first=longest_first, half_slots=True)
        for count in (1, 4)
        for longest_first in (True, False)
    ]


def workload(quick: bool) -> Workload:
    """What all variants decode."""
    mean = 16 if quick else 48
    steps = 8 if quick else 12
    return Workload(
        prompts_per_step=8, steps_per_epoch=steps, epochs=2, n=8, mean_length=mean, cap=8 * mean
    )


def main(argv: Sequence[str] | None = None) -> None:
    options = parse_args(__doc__, argv)
    torch.set_num_threads(1)
    work = workload(options.quick)
    rounds = 1 if options.quick else 5
    prompts = work.prompts()
    runners = {
        half: Runner(work, work.slots // 2 if half else work.slots) for half in (False, True)
    }
    for runner in runners.values():  # warms up
        runner.run(Variant(num_segments=8), prompts[: work.prompts_per_step])
    found: dict[str, Served] = {}

    def run_of(variant: Variant) -> Callable[[], None]:
        def run() -> None:
            found[variant.name] = runners[variant.half_slots].run(variant, prompts)

        return run

    runs = {variant.name: run_of(variant) for variant in variants(options.quick)}
    seconds = run_paired(runs, rounds=rounds, warmup=0, clock=time.process_time)
    for name, served in found.items():
        assert served.lengths == found["1"].lengths, f"{name} decoded other responses"
    _report(work, found, seconds, rounds, options)


def _normal(key: int) -> float:
    """A standard normal number, by its key."""
    return NormalDist().inv_cdf(uniform(key, 0, Purpose.BRANCH))


def _report(
    work: Workload,
    found: dict[str, Served],
    seconds: Seconds,
    rounds: int,
    options: Options,
) -> None:
    base = found["1"]
    bases = {variant.name: variant.base for variant in variants(options.quick)}
    iterations = {
        name: found[bases[name]].costs.sequential_steps / served.costs.sequential_steps
        for name, served in found.items()
    }
    times = {name: speedup(seconds, name, bases[name]) for name in found}
    ratios = {
        **{f"speedup_{count}": times[str(count)].median for count in SEGMENTS[1:]},
        **{f"iterations_{count}": iterations[str(count)] for count in SEGMENTS[1:]},
        "speedup": {name: spread.median for name, spread in times.items()},
        "iterations": iterations,
        "cost_model": {
            f"c N / a = {quotient:g}": {
                name: base.cost(quotient, work.slots) / served.cost(quotient, work.slots)
                for name, served in found.items()
                if bases[name] == "1"
            }
            for quotient in COST_QUOTIENTS
        },
    }
    hours = {name: Spread.of(taken).median / 3600 for name, taken in seconds.items()}
    rows = [
        (
            name,
            served.num_steps,
            served.costs.sequential_steps,
            served.costs.generated_tokens / served.costs.sequential_steps,
            served.costs.query_tokens,
            iterations[name],
            times[name].median,
            served.num_steps / hours[name],
        )
        for name, served in found.items()
    ]
    header = ("segments", "steps", "iterations", "decoding", "rows", "fewer", "faster", "steps/h")
    print_table("whole responses against segments, at equal tokens", header, rows)
    gates = [Gate(name="iterations, 4 segments", value=iterations["4"], at_least=2.2)]
    if not options.quick:  # short segments say little about time
        gates.append(Gate(name="time, 4 segments", value=times["4"].median, at_least=1.5))
    lengths = np.array([length for group in base.lengths.values() for length in group])
    report = Report(
        name="segment_rollout",
        device=device_in_words(),
        settings={
            "quick": options.quick,
            "model": "Qwen2, 2 layers of width 64, random weights, float32",
            "prompts_per_step": work.prompts_per_step,
            "n": work.n,
            "slots": work.slots,
            "prompts": work.prompts_per_step * work.steps_per_epoch,
            "epochs": work.epochs,
            "prompt_length": work.prompt_length,
            "lengths": f"lognormal of mean {work.mean_length}, spread of the logarithm "
            f"{PROMPT_SPREAD} between prompts and {RESPONSE_SPREAD} within, at most {work.cap}",
            "rounds": rounds,
        },
        ratios=ratios,
        counts={
            "responses": len(lengths),
            "trained_tokens": base.trained_tokens,
            "mean_length": lengths.mean(),
            "longest": lengths.max(),
            "cut_at_cap": (lengths == work.cap).mean(),
            "runs": {
                name: {
                    "steps": served.num_steps,
                    "iterations": served.costs.sequential_steps,
                    "iterations_per_1000_trained_tokens": 1000
                    * served.costs.sequential_steps
                    / served.trained_tokens,
                    "query_tokens": served.costs.query_tokens,
                    "generated_tokens": served.costs.generated_tokens,
                    "preempted": served.costs.preempted,
                    "peak_kv_bytes": served.costs.peak_kv_bytes,
                }
                for name, served in found.items()
            },
        },
        timings={
            "seconds": {name: Spread.of(taken) for name, taken in seconds.items()},
            "speedup": times,
            "steps_per_hour": {name: found[name].num_steps / hours[name] for name in found},
        },
        gates=gates,
    )
    finish(report, options)


if __name__ == "__main__":
    main()
