"""Decoding on a GPU: tokens a second against the machine's bound, no sharing and generate_batch.

Random weights in the shapes of Qwen2.5 0.5B, 1.5B and 7B, bfloat16; 16 responses to each of several
prompts, flat and as a binary tree of the same leaves and length. Needs torch, transformers, triton
and numpy, and at most 8 minutes. `generate_batch` has no trees: it draws the leaves one by one.
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from harness import (
    Gate,
    GpuChoices,
    Options,
    Report,
    Spread,
    device_in_words,
    finish,
    parse_gpu_args,
    print_table,
    run_paired,
    speedup,
)
from peers import Sampling, generate_batch_run
from roofline import Costs, Machine, Workload, total_bound
from shapes import QWEN2, copy_of, qwen2
from transformers import PreTrainedModel

from rollout import Engine, EngineSettings, ExtendSpec

AIM = 0.6  # of the bound, for the largest shape
OURS, PRIVATE, BATCH = "ours", "ours, no sharing", "generate_batch"


def random_model(shape: str, device: str) -> PreTrainedModel:
    """Random weights, made on the device: bfloat16 on a GPU, float32 elsewhere."""
    dtype = "bfloat16" if torch.device(device).type == "cuda" else "float32"
    return qwen2(shape, dtype=dtype, device=device)


def workloads(quick: bool, shape: str) -> list[Workload]:
    """Flat and tree, with the same prompts, leaves and length of responses."""
    prompts, length, tokens = (
        (2, 24, 4) if shape == "tiny" else (4, 512, 16) if quick else (8, 512, 32)
    )
    common = dict(num_prompts=prompts, prompt_length=length)
    counts = (2, 4, 8, 16)
    return [
        Workload(name="flat", levels=((16, tokens * len(counts)),), **common),
        Workload(name="tree", levels=tuple((count, tokens) for count in counts), **common),
    ]


def prompts_of(work: Workload, vocabulary: int) -> list[list[int]]:
    shape = work.num_prompts, work.prompt_length
    return np.random.default_rng(0).integers(1, vocabulary, shape).tolist()


class OurRun:
    """A workload on our engine, which is left empty; after a run ``decode_seconds`` says how long
    the steps after the prompts' took.
    """

    def __init__(self, engine: Engine, work: Workload) -> None:
        self.engine = engine
        self.work = work
        self.prompts = prompts_of(work, engine.model.config.vocab_size)
        self.decode_seconds = 0.0

    def __call__(self) -> None:
        engine = self.engine
        roots = [engine.prefill(prompt) for prompt in self.prompts]
        made, above = list(roots), roots
        num_drawn, self.decode_seconds = 0, 0.0
        for level, (count, tokens) in enumerate(self.work.levels):
            copies = count * len(roots) // len(above)
            spec = ExtendSpec(max_tokens=tokens)
            order = {}
            for node in above:
                for _ in range(copies):
                    key = (level << 32) + len(order)
                    order[engine.submit(node, spec, key)] = len(order)
            below: list[Any] = [None] * len(order)
            while not engine.is_idle:
                before = engine.metrics().generated_tokens
                began = time.perf_counter()
                completions = engine.step()
                took = time.perf_counter() - began
                # A step in which not all drew computed (parts of) prompts; so did the first.
                drawn = engine.metrics().generated_tokens - before
                is_prompt = level == 0 and (num_drawn == 0 or drawn < len(order))
                num_drawn += drawn
                self.decode_seconds += 0.0 if is_prompt else took
                for completion in completions:
                    below[order[completion.request_id]] = completion.node
            above = below
            made += below
        assert num_drawn == self.work.num_generated
        for node in reversed(made):
            engine.free(node, drop=True)


def batch_run(model: PreTrainedModel, work: Workload, page_size: int) -> Callable[[], None]:
    """The leaves of a workload on ``model.generate_batch``."""
    sampling = Sampling(n=work.num_leaves // work.num_prompts, new_tokens=work.depth)
    return generate_batch_run(
        model, prompts_of(work, model.config.vocab_size), sampling, page_size=page_size
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """What a workload on a shape took; ``trouble``: why generate_batch did not run."""

    seconds: dict[str, list[float]]
    decode_seconds: list[float]
    bound: float
    decode_bound: float
    query_tokens: int
    trouble: str | None

    def of_bound(self) -> dict[str, float]:
        return {
            "whole": self.bound / Spread.of(self.seconds[OURS]).median,
            "decode": self.decode_bound / Spread.of(self.decode_seconds).median,
        }


def measure(
    model: PreTrainedModel, work: Workload, machine: Machine, device: str, rounds: int
) -> Found:
    """Ours, ours without sharing and generate_batch in turns."""
    synchronize = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None
    costs = Costs.of(model)
    ours = OurRun(make_engine(model, work, device), work)
    private = OurRun(make_engine(model, work, device, share_prefixes=False), work)
    decode_seconds: list[float] = []

    def timed() -> None:
        ours()
        decode_seconds.append(ours.decode_seconds)

    runs: dict[str, Callable[[], None]] = {OURS: timed, PRIVATE: private}
    peer = copy_of(model)
    peer.set_attn_implementation("sdpa")
    batched, trouble = peer_run(peer, work, synchronize)
    if batched is not None:
        runs[BATCH] = batched
    seconds = run_paired(runs, rounds=rounds, synchronize=synchronize)
    peer.destroy_cached_continuous_batching_manager()
    ours.engine.reset_metrics()
    ours()
    return Found(
        seconds=seconds,
        decode_seconds=decode_seconds[-rounds:],
        bound=total_bound([work.prefill(), *work.decode()], costs, machine),
        decode_bound=total_bound(work.decode(), costs, machine),
        query_tokens=ours.engine.metrics().query_tokens,
        trouble=trouble,
    )


def make_engine(
    model: PreTrainedModel, work: Workload, device: str, share_prefixes: bool = True
) -> Engine:
    each = work.prompt_length + work.depth
    settings = EngineSettings(
        dtype=str(model.dtype).removeprefix("torch."),
        device=device,
        num_kv_slots=work.num_leaves * (each + 64) + work.num_prompts * work.prompt_length,
        share_prefixes=share_prefixes,
    )
    return Engine(model, settings)


def peer_run(
    peer: PreTrainedModel, work: Workload, synchronize: Callable[[], object]
) -> tuple[Callable[[], None] | None, str | None]:
    """(generate_batch with the faster of two page sizes, why it does not run)."""
    trials: dict[int, float] = {}
    trouble = None
    for page_size in (32, 256):
        try:
            run = batch_run(peer, work, page_size)
            trials[page_size] = run_paired({BATCH: run}, rounds=1, synchronize=synchronize)[BATCH][
                0
            ]
        except Exception as error:  # a peer that fails must not cost our own numbers
            trouble = f"{type(error).__name__}: {error}".partition("\n")[0]
        peer.destroy_cached_continuous_batching_manager()
    if not trials:
        return None, trouble
    return batch_run(peer, work, min(trials, key=lambda size: trials[size])), None


def main(argv: Sequence[str] | None = None) -> None:
    options, choices = parse_gpu_args(
        __doc__, argv, shapes=list(QWEN2), default=["0.5b", "1.5b", "7b"]
    )
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)
    device = torch.device(choices.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    machine = Machine.measure(device, dtype)
    print(
        f"{device_in_words(choices.device)}: {machine.bytes_per_s / 1e9:,.0f} GB/s, "
        f"{machine.flops_per_s / 1e12:,.1f} TFLOP/s"
    )
    found: dict[str, Found] = {}
    works: dict[str, Workload] = {}
    for shape in choices.shapes:
        model = random_model(shape, choices.device)
        for work in workloads(options.quick, shape):
            name = f"{shape} {work.name}"
            works[name] = work
            found[name] = measure(model, work, machine, choices.device, 1 if options.quick else 3)
            _show(name, work, found[name])
            _give_back_memory()
        del model
        _give_back_memory()
    finish(_report(found, works, machine, options, choices), options)


def _give_back_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _show(name: str, work: Workload, found: Found) -> None:
    rows = [
        (run, Spread.of(taken).median, work.num_generated / Spread.of(taken).median)
        for run, taken in found.seconds.items()
    ]
    print_table(name, ("run", "seconds", "tokens/s"), rows)
    share = found.of_bound()
    print(f"  of the bound: {share['whole']:.2f}, decoding alone {share['decode']:.2f}")
    if found.trouble:
        print(f"  {BATCH} did not run: {found.trouble}")


def _report(
    found: dict[str, Found],
    works: dict[str, Workload],
    machine: Machine,
    options: Options,
    choices: GpuChoices,
) -> Report:
    largest = [name for name in found if name.startswith(choices.shapes[-1])]
    return Report(
        name="gpu_decode",
        device=device_in_words(choices.device),
        settings={
            "quick": options.quick,
            "shapes": list(choices.shapes),
            "workloads": {
                name: {
                    "num_prompts": work.num_prompts,
                    "prompt_length": work.prompt_length,
                    "levels": work.levels,
                }
                for name, work in works.items()
            },
            "machine": {
                "bytes_per_s": machine.bytes_per_s,
                "flops_per_s": machine.flops_per_s,
            },
        },
        ratios={
            "of_bound": {name: one.of_bound()["whole"] for name, one in found.items()},
            "decode_of_bound": {name: one.of_bound()["decode"] for name, one in found.items()},
            "vs_no_sharing": {
                name: speedup(one.seconds, OURS, PRIVATE).median for name, one in found.items()
            },
            "vs_generate_batch": {
                name: speedup(one.seconds, OURS, BATCH).median
                for name, one in found.items()
                if BATCH in one.seconds
            },
        },
        counts={
            name: {
                "generated_tokens": works[name].num_generated,
                "query_tokens": one.query_tokens,
                "expected_query_tokens": works[name].prefill().rows
                + sum(step.rows for step in works[name].decode()),
            }
            for name, one in found.items()
        },
        timings={
            name: {
                "seconds": one.seconds,
                "decode_seconds": one.decode_seconds,
                "bound_seconds": one.bound,
                "decode_bound_seconds": one.decode_bound,
                "tokens_per_s": works[name].num_generated / Spread.of(one.seconds[OURS]).median,
                "trouble": one.trouble,
            }
            for name, one in found.items()
        },
        gates=[
            Gate(
                name=f"{name}: share of the bound, decoding",
                value=found[name].of_bound()["decode"],
                at_least=AIM,
            )
            for name in largest
        ],
    )


if __name__ == "__main__":
    main()
