"""Training on packed trees against training on their leaves' paths as sequences: step time, memory.

A step is forward and backward of the clipped loss. The tree side runs the packed row through
``PolicyModel``. The flat side has each leaf's whole path as a sequence of its own, in batches of as
many tokens as the row has (so both may use the same memory), through the same model with
transformers' ``sdpa`` attention, which is causal and has no mask; head, loss and denominator are
the same. Both give the same gradient, which is compared.

For the workloads and their token ratios see ``training_trees.py``.
"""

from __future__ import annotations

import gc
import math
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from harness import (
    Gate,
    Options,
    Report,
    Spread,
    device_in_words,
    finish,
    parse_args,
    print_table,
    run_paired,
    speedup,
)
from shapes import qwen3_of_width
from torch.utils._python_dispatch import TorchDispatchMode
from training_trees import Workload, workloads
from transformers import PreTrainedModel

from trainers import attention
from trainers.attention.nodes import make_plan
from trainers.batch import PackedBatch
from trainers.losses import POLICY_LOSSES, trained_tokens
from trainers.model import PolicyModel
from trainers.settings import PolicyLossSettings

VOCABULARY = 4096
TREE, FLAT, AGAIN = "tree", "flat", "flat again"
AIM = 0.8  # of the token ratio, from width 512 on
MOST_NOISE = 0.02  # that the gate on time without sharing allows for
SETTINGS = PolicyLossSettings()


def loss_of(row: PackedBatch, logprobs: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """The clipped loss of the row's trained tokens ``index``, as the learner computes it for
    tokens that these weights sampled.
    """
    nothing = torch.zeros_like(logprobs)
    tokens = trained_tokens(row, index, logprobs, nothing, old_logprobs=logprobs.detach())
    return POLICY_LOSSES.get(SETTINGS.name)(tokens, SETTINGS).loss.sum() / row.denominator


def tree_step(policy: PolicyModel, row: PackedBatch) -> None:
    """Forward and backward of a packed row; gradients are left in the parameters."""
    policy.zero_grad()
    policy.model.set_attn_implementation(attention.NAME)
    index = torch.nonzero(row.weight > 0).squeeze(1)
    logprobs, _ = policy(row, index)
    loss_of(row, logprobs, index).backward()


def flat_step(policy: PolicyModel, rows: Sequence[PackedBatch], length: int) -> None:
    """The same of rows of sequences of ``length`` tokens, each row as a batch of transformers."""
    policy.zero_grad()
    policy.model.set_attn_implementation("sdpa")
    for row in rows:
        index = torch.nonzero(row.weight > 0).squeeze(1)
        num_sequences = row.leaf_token.shape[0]
        token_ids = row.token_ids[: num_sequences * length]  # less the row's padding
        output = policy.model.base_model(
            input_ids=token_ids.view(num_sequences, length), use_cache=False
        ).last_hidden_state.flatten(0, 1)
        hidden = output[row.predictor[index]]
        logprobs, _ = policy.head(hidden, row.token_ids[index], row.temperature[index])
        loss_of(row, logprobs, index).backward()


def gradient_error(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> float:
    """Largest difference over the largest entry, of the worst parameter; finite."""
    errors = [float((a - b).abs().max() / b.abs().max()) for a, b in zip(ours, theirs, strict=True)]
    # max() and comparisons would let NaN through.
    assert all(map(math.isfinite, errors)), f"gradients that are not finite: {errors}"
    return max(errors)


def gradients(model: PreTrainedModel) -> list[torch.Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of storages that operations make, while they live; ``peak``: the most at a
    time. What was there before isn't counted, nor what a kernel takes and gives back inside.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        known_before = {
            tensor.untyped_storage()._cdata
            for tensor in torch.utils._pytree.tree_leaves((args, kwargs))
            if isinstance(tensor, torch.Tensor)
        }
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._note(tensor.untyped_storage(), known_before)
        return result

    def _note(self, storage: torch.UntypedStorage, known_before: set[int]) -> None:
        at = storage._cdata
        if at in self._known or at in known_before:
            return
        size = storage.nbytes()
        self._known.add(at)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, at, size)

    def _forget(self, at: int, size: int) -> None:
        self._known.discard(at)
        self.live -= size


def peak_bytes(step: Callable[[], object], policy: PolicyModel) -> int:
    """Of a step, gradients included."""
    policy.zero_grad()
    gc.collect()
    with PeakMemory() as memory:
        step()
    return memory.peak


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """What one workload on one model took."""

    seconds: dict[str, list[float]]
    gradient_error: float
    peak_bytes: dict[str, int]
    pairs: dict[str, int]


def measure(policy: PolicyModel, work: Workload, rounds: int) -> Found:
    """Tree and flat in turns; without sharing flat a second time, which shows the noise."""
    row, rows = work.row(), work.flat_rows()
    found: dict[str, list[torch.Tensor]] = {}

    def tree() -> None:
        tree_step(policy, row)
        found[TREE] = gradients(policy.model)

    def flat() -> None:
        flat_step(policy, rows, work.path_length)
        found[FLAT] = gradients(policy.model)

    # These steps warm up, too. From the second row on flat needs what it needs for every row.
    peaks = {
        TREE: peak_bytes(lambda: tree_step(policy, row), policy),
        FLAT: peak_bytes(lambda: flat_step(policy, rows[:2], work.path_length), policy),
    }
    runs = {TREE: tree, FLAT: flat}
    if work.flat_tokens == work.tree_tokens:
        runs[AGAIN] = flat
        rounds = 3 * rounds
    seconds = run_paired(runs, rounds=rounds, warmup=0, clock=time.process_time)
    plan = make_plan(row.visible_until.numpy())
    return Found(
        seconds=seconds,
        gradient_error=gradient_error(found[TREE], found[FLAT]),
        peak_bytes=peaks,
        pairs={TREE: plan.num_pairs, FLAT: work.flat_pairs, "visible": work.tree_pairs},
    )


def main(argv: Sequence[str] | None = None) -> None:
    options = parse_args(__doc__, argv)
    torch.set_num_threads(1)
    attention.register()
    models = {128: 1} if options.quick else {256: 2, 512: 2, 1024: 1}  # width -> layers
    rounds = 2
    works = workloads(options.quick)
    found: dict[int, dict[str, Found]] = {}
    parameters: dict[int, int] = {}
    for width, num_layers in models.items():
        model = qwen3_of_width(width, num_layers=num_layers, vocab=VOCABULARY).train()
        parameters[width] = sum(p.numel() for p in model.parameters())
        policy = PolicyModel(model)
        found[width] = {}
        for name, work in works.items():
            found[width][name] = measure(policy, work, rounds)
            _show(width, work, found[width][name])
    finish(_report(found, works, models, parameters, rounds, options), options)


def _show(width: int, work: Workload, found: Found) -> None:
    faster = speedup(found.seconds, TREE, FLAT)
    print_table(
        f"width {width}, token ratio {work.token_ratio:.2f}",
        ("run", "CPU seconds", "peak MB", "pairs"),
        [
            (name, Spread.of(found.seconds[name]).median, peak / 1e6, found.pairs[name])
            for name, peak in found.peak_bytes.items()
        ],
    )
    print(
        f"  speedup {faster.median:.2f} ({faster.min:.2f} to {faster.max:.2f}), "
        f"{faster.median / work.token_ratio:.2f} of the token ratio; "
        f"gradients differ by {found.gradient_error:.1e}"
    )


def _report(
    found: dict[int, dict[str, Found]],
    works: dict[str, Workload],
    models: dict[int, int],
    parameters: dict[int, int],
    rounds: int,
    options: Options,
) -> Report:
    speedups = {
        f"width {width}": {name: speedup(one.seconds, TREE, FLAT) for name, one in by_work.items()}
        for width, by_work in found.items()
    }
    overhead = {
        width: speedup(by_name["1"].seconds, FLAT, TREE).median for width, by_name in found.items()
    }
    # Two runs of the same differ by this much; the gate on time without sharing leaves it room, up
    # to MOST_NOISE: a noisy machine is no excuse for being slower.
    noise = {
        width: abs(speedup(by_name["1"].seconds, AGAIN, FLAT).median - 1)
        for width, by_name in found.items()
    }
    error = max(one.gradient_error for by_work in found.values() for one in by_work.values())
    some = next(iter(found.values()))
    gates = [
        Gate(
            name=f"speedup over the token ratio, width {width}, ratio {name}",
            value=speedups[f"width {width}"][name].median / work.token_ratio,
            at_least=AIM,
        )
        for width in models
        if width >= 512
        for name, work in works.items()
    ]
    gates += [
        Gate(
            name=f"time over flat without sharing, width {width}",
            value=value,
            at_most=1 + min(noise[width], MOST_NOISE),
        )
        for width, value in overhead.items()
    ]
    gates += [
        Gate(
            name="pairs computed over those visible, most",
            value=max(one.pairs[TREE] / one.pairs["visible"] for one in some.values()),
            at_most=1.001,  # padding tokens see themselves
        ),
        Gate(name="gradient error", value=error, at_most=1e-4),
    ]
    return Report(
        name="tree_training",
        device=device_in_words(),
        settings={
            "quick": options.quick,
            "models": {
                f"width {width}": {
                    "family": "Qwen3, random weights, float32",
                    "num_layers": num_layers,
                    "num_parameters": parameters[width],
                }
                for width, num_layers in models.items()
            },
            "workloads": {
                name: {"num_trees": work.num_trees, "levels": work.levels}
                for name, work in works.items()
            },
            "loss": SETTINGS.name,
            "flat": "all paths as sequences, batches of as many tokens as the row, sdpa",
            "clock": "CPU time of the process",
            "rounds": rounds,
        },
        ratios={
            "speedup": {
                width: {name: one.median for name, one in by_name.items()}
                for width, by_name in speedups.items()
            },
            "token_ratio": {name: work.token_ratio for name, work in works.items()},
            "pair_ratio": {name: work.flat_pairs / work.tree_pairs for name, work in works.items()},
            "flat_overhead": {f"width {width}": value for width, value in overhead.items()},
            "flat_overhead_noise": {f"width {width}": value for width, value in noise.items()},
            "gradient_error": error,
            "peak_memory": {
                f"width {width}": {
                    name: one.peak_bytes[FLAT] / one.peak_bytes[TREE]
                    for name, one in by_work.items()
                }
                for width, by_work in found.items()
            },
        },
        counts={
            name: {
                "tree_tokens": work.tree_tokens,
                "flat_tokens": work.flat_tokens,
                "pairs": some[name].pairs,
                "peak_bytes": {
                    f"width {width}": by_work[name].peak_bytes for width, by_work in found.items()
                },
            }
            for name, work in works.items()
        },
        timings={
            f"width {width}": {
                name: {"cpu_seconds": one.seconds, "speedup": speedups[f"width {width}"][name]}
                for name, one in by_work.items()
            }
            for width, by_work in found.items()
        },
        gates=gates,
    )


if __name__ == "__main__":
    main()
