"""Host work outside forward and sampling in a decode step: scheduler, plan and table.

A model in the shape of Qwen2.5-0.5B decodes 1, 64 and 512 sequences below one prompt. The parts of
a step are timed where they stand, so that they add up to the step. The forward is measured with two
numbers of layers and drawn out linearly to the 24 of the shape; the other parts do not depend on
the number of layers. Sampling is tensor work over the vocabulary and is reported apart: host work
is what a step costs outside the forward and the sampling.

"Forward" is the whole call of the model: the Python of transformers' modules and of our attention
(``attend`` of the plan) is in it. "Scheduler" is what is left of the step, freeing the memory of
the logits included.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Any

import numpy as np
import torch
from harness import Gate, Options, Report, device_in_words, finish, parse_args, print_table
from shapes import qwen2

import rollout.decoder as decoder
from rollout import Engine, EngineSettings, ExtendSpec
from rollout.attention.cpu import NodePlan
from rollout.model_runner import ModelRunner
from rollout.running import RunningTable

LAYERS = 24  # of the shape
PROMPT = 64
# part of a step -> where its time is spent: (owner, attribute)
PARTS: dict[str, list[tuple[Any, str]]] = {
    "forward": [(ModelRunner, "forward")],
    "sampling": [(RunningTable, "draw")],
    "plan": [(NodePlan, "advance"), (NodePlan, "keep"), (decoder, "gather")],
    "table": [(RunningTable, "record"), (RunningTable, "last_tokens")],
}


@contextmanager
def clocks() -> Iterator[dict[str, float]]:
    """Seconds spent in each part while the context is open (parts do not nest)."""
    spent = dict.fromkeys(PARTS, 0.0)
    originals = [(owner, name, getattr(owner, name)) for p in PARTS.values() for owner, name in p]

    def timed(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent[part] += time.perf_counter() - began

        return call

    for part, places in PARTS.items():
        for owner, name in places:
            setattr(owner, name, timed(part, getattr(owner, name)))
    try:
        yield spent
    finally:
        for owner, name, function in originals:
            setattr(owner, name, function)


def decode_steps(engine: Engine, num_running: int, steps: int) -> dict[str, float]:
    """Median seconds of each part of a steady decode step, and of "scheduler", what is left (it
    gives back the logits' memory, too).
    """
    node = engine.prefill(np.arange(1, PROMPT + 1))
    spec = ExtendSpec(max_tokens=steps + 3)
    requests = [engine.submit(node, spec, 1 + i) for i in range(num_running)]
    for _ in range(2):  # prefill, and the first batch of decoding
        engine.step()
    taken: list[dict[str, float]] = []
    for _ in range(steps):
        with clocks() as spent:
            began = time.perf_counter()
            engine.step()
            whole = time.perf_counter() - began
        taken.append(spent | {"scheduler": whole - sum(spent.values())})
    assert engine.num_running == num_running
    for request in requests:
        engine.cancel(request)
    engine.free(node, drop=True)
    return {part: median(step[part] for step in taken) for part in (*PARTS, "scheduler")}


def measure(quick: bool, sizes: Sequence[int], steps: int) -> dict[int, dict[str, float]]:
    """Seconds of each part of a step at each number of running sequences, for the whole shape."""
    few, more = 2, 3 if quick else 4
    found = {}
    for layers in (few, more):
        model = qwen2("0.5b", num_layers=layers)
        engine = Engine(model, EngineSettings(num_kv_slots=PROMPT + max(sizes) * (steps + 8)))
        found[layers] = {size: decode_steps(engine, size, steps) for size in sizes}
    whole = {}
    for size in sizes:
        parts = dict(found[more][size])
        a_layer = (parts["forward"] - found[few][size]["forward"]) / (more - few)
        parts["forward"] += a_layer * (LAYERS - more)
        whole[size] = parts
    return whole


def main(argv: Sequence[str] | None = None) -> None:
    options = parse_args(__doc__, argv)
    torch.set_num_threads(1)
    sizes = (1, 16) if options.quick else (1, 64, 512)
    steps = 3 if options.quick else 9
    _report(measure(options.quick, sizes, steps), steps, options)


def _report(measured: dict[int, dict[str, float]], steps: int, options: Options) -> None:
    rows, timings, gates = [], {}, []
    shares: dict[str, float] = {}
    with_sampling: dict[str, float] = {}
    for size, parts in measured.items():
        step = sum(parts.values())
        host = step - parts["forward"] - parts["sampling"]
        case = str(size)
        shares[case], with_sampling[case] = host / step, 1 - parts["forward"] / step
        micro = {part: 1e6 * seconds for part, seconds in parts.items()}
        timings[case] = {
            "microseconds_a_step": micro,
            "host_microseconds_a_step": 1e6 * host,
            "host_microseconds_a_sequence": 1e6 * host / size,
        }
        rows.append((case, *micro.values(), 1e6 * host / size, shares[case], with_sampling[case]))
        gates.append(
            Gate(
                name=f"host share outside forward and sampling, {case} running",
                value=shares[case],
                at_most=0.15,
            )
        )
    parts = next(iter(measured.values()))
    header = ("running", *parts, "outside, a sequence", "share outside", "with sampling")
    print_table("microseconds of a decode step (0.5B shape, 24 layers)", header, rows)
    report = Report(
        name="host_overhead",
        device=device_in_words(),
        settings={
            "quick": options.quick,
            "model": "Qwen2.5-0.5B's shape, random weights, float32",
            "prompt_length": PROMPT,
            "steps": steps,
        },
        ratios={"host_share": shares, "host_and_sampling_share": with_sampling},
        counts={"running": list(measured), "layers": LAYERS},
        timings=timings,
        gates=gates,
    )
    finish(report, options)


if __name__ == "__main__":
    main()
