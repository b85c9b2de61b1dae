"""Training on a GPU: packed trees by FlexAttention against their paths as sequences.

Random weights in the shapes of Qwen2.5 0.5B and 1.5B, bfloat16, forward and backward of the
clipped loss, over token ratios from 1 to 8 (see ``tree_training.py``). The flat side runs all
paths, in rows of as many tokens as the trees' row, by flash-attn's varlen kernel where it is
installed, else by torch's ``scaled_dot_product_attention`` a sequence. Needs torch, transformers
and numpy, and at most 8 minutes.
"""

from __future__ import annotations

import functools
import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from gpu_decode import random_model
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
from training_trees import Workload, workloads
from tree_training import (
    AIM,
    FLAT,
    MOST_NOISE,
    TREE,
    gradient_error,
    gradients,
    loss_of,
    peak_bytes,
)

from trainers import attention
from trainers.attention.flex import FlexMasks
from trainers.batch import PackedBatch, on_device
from trainers.model import PolicyModel

# Of gradients against flat's, over a parameter's largest: bfloat16 rounds to 1/256 at each layer.
MOST_GRADIENT_ERROR = {"bfloat16": 5e-2, "float32": 1e-4}
SHAPES = ("tiny", "0.5b", "1.5b")


def gpu_workloads(quick: bool) -> dict[str, Workload]:
    """Those of ``tree_training.py``; in full with paths of 2,048 tokens and 8,192 a row."""
    if quick:
        return workloads(True)
    return {
        name: Workload(
            num_trees=work.num_trees // 2,
            levels=tuple((count, 4 * tokens) for count, tokens in work.levels),
        )
        for name, work in workloads(False).items()
    }


def step(policy: PolicyModel, rows: Sequence[PackedBatch], kernel: str) -> None:
    """Forward and backward of all rows; gradients are left in the parameters."""
    policy.zero_grad()
    policy.attention_kernel = kernel
    for row in rows:
        index = torch.nonzero(row.weight > 0).squeeze(1)
        logprobs, _ = policy(row, index)
        loss_of(row, logprobs, index).backward()


def kernels(device: str) -> dict[str, str]:
    """``trainer.learner.attention`` of each side."""
    if torch.device(device).type != "cuda":
        return {TREE: "auto", FLAT: "sdpa"}
    return {TREE: "flex", FLAT: "flash" if find_spec("flash_attn") else "sdpa"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """What one workload on one shape took.

    Attributes:
        seconds: of each side's steps, by round.
        block_pairs: pairs in the blocks that FlexAttention computes in a layer.
    """

    seconds: dict[str, list[float]]
    first_seconds: dict[str, float]
    gradient_error: float
    peak_bytes: dict[str, int]
    block_pairs: int


def measure(policy: PolicyModel, work: Workload, device: str, rounds: int) -> Found:
    """Tree and flat in turns."""
    on_gpu = torch.device(device).type == "cuda"
    synchronize: Callable[[], object] = torch.cuda.synchronize if on_gpu else lambda: None
    row = work.row()
    rows = {TREE: [row], FLAT: work.flat_rows()}
    steps = {
        name: functools.partial(
            step, policy, [on_device(row, torch.device(device)) for row in rows[name]], kernel
        )
        for name, kernel in kernels(device).items()
    }
    peaks, first, found = {}, {}, {}
    for name, run in steps.items():  # compiles and warms up
        began = time.perf_counter()
        peaks[name] = _peak_on_gpu(run, policy) if on_gpu else peak_bytes(run, policy)
        synchronize()
        first[name] = time.perf_counter() - began
        found[name] = gradients(policy.model)
    error = gradient_error(found[TREE], found[FLAT])
    found.clear()
    seconds = run_paired(steps, rounds=rounds, synchronize=synchronize)
    masks = FlexMasks(row.visible_until.numpy(), row.position_ids.numpy(), torch.device("cpu"))
    return Found(
        seconds=seconds,
        first_seconds=first,
        gradient_error=error,
        peak_bytes=peaks,
        block_pairs=masks.num_pairs(None),
    )


def _peak_on_gpu(run: Callable[[], object], policy: PolicyModel) -> int:
    """Bytes beyond those there before, gradients included."""
    policy.zero_grad()
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def main(argv: Sequence[str] | None = None) -> None:
    options, choices = parse_gpu_args(__doc__, argv, shapes=SHAPES, default=SHAPES[1:])
    attention.register()
    works = gpu_workloads(options.quick)
    rounds = 1 if options.quick else 3
    found: dict[str, dict[str, Found]] = {}
    for shape in choices.shapes:
        model = random_model(shape, choices.device)
        model.set_attn_implementation(attention.NAME)
        policy = PolicyModel(model)
        found[shape] = {}
        for name, work in works.items():
            found[shape][name] = measure(policy, work, choices.device, rounds)
            _show(shape, work, found[shape][name])
        del model, policy
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    finish(_report(found, works, rounds, options, choices), options)


def _show(shape: str, work: Workload, found: Found) -> None:
    rows = [
        (
            name,
            Spread.of(taken).median,
            work.tree_tokens / Spread.of(taken).median,
            found.peak_bytes[name] / 1e9,
            found.first_seconds[name],
        )
        for name, taken in found.seconds.items()
    ]
    header = ("run", "seconds", "tree tokens/s", "peak GB", "first step, seconds")
    print_table(f"{shape}, token ratio {work.token_ratio:.2f}", header, rows)
    faster = speedup(found.seconds, TREE, FLAT).median
    print(
        f"  speedup {faster:.2f}, {faster / work.token_ratio:.2f} of the token ratio; gradients "
        f"differ by {found.gradient_error:.1e}"
    )


def _report(
    found: dict[str, dict[str, Found]],
    works: dict[str, Workload],
    rounds: int,
    options: Options,
    choices: GpuChoices,
) -> Report:
    speedups = {
        shape: {name: speedup(one.seconds, TREE, FLAT) for name, one in by_name.items()}
        for shape, by_name in found.items()
    }
    largest = choices.shapes[-1]
    gates = [
        Gate(
            name=f"speedup over the token ratio, {largest}, ratio {name}",
            value=speedups[largest][name].median / work.token_ratio,
            at_least=AIM,
        )
        for name, work in works.items()
    ]
    dtype = "bfloat16" if torch.device(choices.device).type == "cuda" else "float32"
    overhead = {shape: 1 / by_name["1"].median for shape, by_name in speedups.items()}
    gates += [
        Gate(
            name=f"time over flat without sharing, {largest}",
            value=overhead[largest],
            at_most=1 + MOST_NOISE,
        ),
        Gate(
            name="gradient error",
            value=max(one.gradient_error for of in found.values() for one in of.values()),
            at_most=MOST_GRADIENT_ERROR[dtype],
        ),
    ]
    chosen = kernels(choices.device)
    return Report(
        name="gpu_tree_training",
        device=device_in_words(choices.device),
        settings={
            "quick": options.quick,
            "shapes": list(choices.shapes),
            "dtype": dtype,
            "attention": chosen,
            "workloads": {
                name: {"num_trees": work.num_trees, "levels": work.levels}
                for name, work in works.items()
            },
            "rounds": rounds,
        },
        ratios={
            "speedup": {
                shape: {name: one.median for name, one in by_name.items()}
                for shape, by_name in speedups.items()
            },
            "token_ratio": {name: work.token_ratio for name, work in works.items()},
            "pair_ratio": {name: work.flat_pairs / work.tree_pairs for name, work in works.items()},
            "flat_overhead": overhead,
            "gradient_error": {
                shape: {name: one.gradient_error for name, one in by_name.items()}
                for shape, by_name in found.items()
            },
        },
        counts={
            name: {
                "tree_tokens": work.tree_tokens,
                "flat_tokens": work.flat_tokens,
                "visible_pairs": work.tree_pairs,
                "flat_pairs": work.flat_pairs,
                "block_pairs": next(iter(found.values()))[name].block_pairs,
                "peak_bytes": {shape: by_name[name].peak_bytes for shape, by_name in found.items()},
            }
            for name, work in works.items()
        },
        timings={
            shape: {
                name: {
                    "seconds": one.seconds,
                    "first_seconds": one.first_seconds,
                    "speedup": speedups[shape][name],
                }
                for name, one in by_name.items()
            }
            for shape, by_name in found.items()
        },
        gates=gates,
    )


if __name__ == "__main__":
    main()
